import { Refused, byId, toast } from "./common.js";
import { draftOf, setDraft } from "./drafts.js";
import { token } from "./outbox.js";
import { drop, keep, read } from "./storage.js";
import { PERSON, call, post } from "./wire.js";

const VOTE = `keel-arena-vote-${PERSON}`; // a vote that the server has not answered yet
const DRAFT = { id: "arena", kind: "arena" };
const turns = byId("turns");
const form = byId("say");
const field = byId("message");
let conversation = turns.dataset.conversation || null;
let busy = false;
let ended = false;
let listening = new AbortController(); // to the answers that come
let unanswered = { message: null, token: null }; // sent again under its name, so that it is the same turn

const sides = { left: "A", right: "B" };

function element(tag, className, text) {
  return Object.assign(document.createElement(tag), { className, textContent: text ?? "" });
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

/** What stands in the field; it is kept while it is typed. */
function write(message) {
  field.value = message;
  setDraft(DRAFT, "message", message || null);
}

function refresh() {
  const voting = read(VOTE) !== undefined;
  byId("send").disabled = busy || ended || voting;
  field.disabled = ended;
  byId("choices").hidden = ended || busy || voting || !turns.querySelector(".turn");
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
    if (unanswered.message !== message) unanswered = { message, token: token() };
    const turn = turns.children.length + 1;
    listening = new AbortController();
    const answer = await call(`/api/arena/${conversation}/say`, { ...unanswered, turn }, listening.signal);
    byId("hello").hidden = true;
    write("");
    shown = addTurn(message);
    for await (const line of lines(answer.body)) {
      if (line.error) throw new Refused(409, line.error, 0, true);
      const place = shown.places[line.side];
      if (line.html === undefined) place.append(line.text);
      else {
        place.classList.remove("streaming", "plain");
        place.innerHTML = line.html;
      }
    }
    if (turns.querySelector(".streaming")) throw new TypeError("broken off");
    unanswered = { message: null, token: null };
  } catch (error) {
    if (listening.signal.aborted) return; // for a new conversation
    problem(error instanceof Refused ? error.message : "The connection broke. Send your message again.");
    if (shown) {
      shown.turn.remove();
      write(message);
    }
  } finally {
    busy = false;
    refresh();
    field.focus();
  }
}

/** Sends the vote until the server has taken it, or refused it for good. */
async function vote() {
  const { conversation: voted, given } = read(VOTE);
  const { choice } = given;
  refresh();
  try {
    const names = await post(`/api/arena/${voted}/vote`, given);
    drop(VOTE);
    problem("");
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
    if (error.last) {
      drop(VOTE);
      problem(`Your vote was not counted: ${error.message}`);
    } else {
      problem("The server does not answer just now. Your vote is kept in this browser and sent again.");
      setTimeout(vote, Math.max(3000, error.wait ?? 0));
    }
    refresh();
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
  button.addEventListener("click", () => {
    if (read(VOTE) !== undefined) return;
    const given = { choice: button.dataset.choice, token: token(), turn: turns.children.length };
    keep(VOTE, { conversation, given });
    vote();
  });
}
byId("new").addEventListener("click", () => {
  listening.abort();
  conversation = null;
  ended = false;
  unanswered = { message: null, token: null };
  turns.replaceChildren();
  byId("names").hidden = true;
  byId("hello").hidden = false;
  problem("");
  refresh();
  field.focus();
});
field.addEventListener("input", () => write(field.value));
field.value = draftOf(DRAFT.id).message ?? field.value;
if (read(VOTE) !== undefined) vote(); // of an earlier visit
refresh();
