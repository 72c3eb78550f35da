import { Refused, byId, post, toast, token } from "./common.js";

const turns = byId("turns");
const form = byId("say");
const field = byId("message");
let conversation = turns.dataset.conversation || null;
let busy = false;
let ended = false;

const sides = { left: "A", right: "B" };

function element(tag, className, text) {
  return Object.assign(document.createElement(tag), { className, textContent: text ?? "" });
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

function refresh() {
  byId("send").disabled = busy || ended;
  field.disabled = ended;
  byId("choices").hidden = ended || busy || !turns.querySelector(".turn");
  form.hidden = ended;
}

function addTurn(message) {
  const turn = element("section", "turn");
  turn.setAttribute("aria-label", `Turn ${turns.children.length + 1}`);
  const said = element("div", "message user");
  said.append(element("div", "text plain", message));
  const pair = element("div", "pair");
  const places = {};
  for (const [side, letter] of Object.entries(sides)) {
    const reply = element("article", `response ${letter.toLowerCase()}`);
    reply.setAttribute("aria-label", `Model ${letter}`);
    const head = element("h2", "");
    head.append(element("span", "letter", letter));
    places[side] = element("div", "text plain streaming");
    reply.append(head, places[side]);
    pair.append(reply);
  }
  turn.append(said, pair);
  turns.append(turn);
  turn.scrollIntoView({ block: "start", behavior: "smooth" });
  return { turn, places };
}

/** Reads one JSON object a line as they come. */
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

async function say(message) {
  busy = true;
  refresh();
  problem("");
  let shown = null;
  try {
    conversation ??= (await post("/api/arena", {})).id;
    const answer = await fetch(`/api/arena/${conversation}/say`, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF": document.querySelector("meta[name=csrf]").content },
      body: JSON.stringify({ message }),
    });
    if (!answer.ok) throw new Refused(answer.status, (await answer.json()).error);
    byId("hello").hidden = true;
    field.value = "";
    shown = addTurn(message);
    for await (const line of lines(answer.body)) {
      const place = shown.places[line.side];
      if (line.html === undefined) place.append(line.text);
      else {
        place.classList.remove("streaming", "plain");
        place.innerHTML = line.html;
      }
    }
    if (turns.querySelector(".streaming")) throw new TypeError("broken off");
  } catch (error) {
    problem(error instanceof Refused ? error.message : "The connection broke. Send your message again.");
    if (shown) {
      shown.turn.remove();
      field.value = message;
    }
  } finally {
    busy = false;
    refresh();
    field.focus();
  }
}

async function vote(choice) {
  const given = { choice, token: token() };
  try {
    const names = await post(`/api/arena/${conversation}/vote`, given);
    ended = true;
    const place = byId("names");
    const said = { left: "You preferred A.", right: "You preferred B.", tie: "A tie.", both_bad: "Both bad." }[choice];
    place.replaceChildren(element("p", "", said));
    const list = element("dl", "");
    for (const [side, letter] of Object.entries(sides)) {
      const pair = document.createElement("div");
      const term = document.createElement("dt");
      term.append(element("span", `letter ${letter.toLowerCase()}`, letter));
      pair.append(term, element("dd", "", names[side]));
      list.append(pair);
    }
    place.append(list);
    place.hidden = false;
    place.scrollIntoView({ block: "center", behavior: "smooth" });
    toast("Vote counted");
    refresh();
    byId("new").focus();
  } catch (error) {
    problem(error instanceof Refused ? error.message : "No connection. Vote again in a moment.");
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const message = field.value.trim();
  if (message && !busy && !ended) say(message);
});
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    form.requestSubmit();
  }
});
for (const button of document.querySelectorAll("#choices [data-choice]")) {
  button.addEventListener("click", () => vote(button.dataset.choice));
}
byId("new").addEventListener("click", () => {
  conversation = null;
  ended = false;
  turns.replaceChildren();
  byId("names").hidden = true;
  byId("hello").hidden = false;
  problem("");
  refresh();
  field.focus();
});
refresh();
