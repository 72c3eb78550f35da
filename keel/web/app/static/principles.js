// Questions about one principle: one at a time, each answer kept in the outbox until the server has taken it.

import { Outbox, token } from "./outbox.js";
import { READING } from "./reading.js";
import { showRefused } from "./refused.js";
import { post } from "./wire.js";

const byId = (id) => document.getElementById(id);
const SETTLED = 250; // milliseconds: what comes sooner is the last key again
const outbox = new Outbox(() => {});
const past = []; // what was answered here, newest last
let current = null;
let answered = 0;
let since = 0;
let timer;

function bubble({ role, html }) {
  const message = Object.assign(document.createElement("div"), { className: `message ${role}` });
  message.append(Object.assign(document.createElement("div"), { className: "text", innerHTML: html }));
  return message;
}

function show(question) {
  current = question;
  since = performance.now();
  byId("waiting").hidden = true;
  byId("empty").hidden = Boolean(question);
  byId("item").hidden = !question;
  byId("vote").hidden = !question && !past.length;
  for (const button of document.querySelectorAll("[data-answer], #skip")) button.disabled = !question;
  if (!question) return;
  byId("messages").replaceChildren(...question.messages.map(bubble));
  byId("reply").innerHTML = question.reply;
  byId("principle").textContent = question.principle;
  scrollTo(0, 0);
  byId("prompt-h").focus({ preventScroll: true });
}

function tell(count) {
  answered = count;
  byId("progress").hidden = false;
  byId("today").textContent = count;
}

async function next() {
  clearTimeout(timer);
  try {
    const waiting = outbox.letters.map(({ body }) => body).filter(({ question }) => question);
    const holding = waiting.map(({ question }) => question).slice(0, 64);
    const found = await post("/api/principles/next", { holding });
    tell(found.answered + waiting.filter(({ answer }) => answer).length);
    if (!current) show(found.question);
    if (!outbox.count) outbox.tell(null);
  } catch (error) {
    outbox.tell(error);
    byId("waiting").hidden = false;
    byId("waiting").textContent = "Nothing more is here to do until the server answers. This page goes on by itself.";
    timer = setTimeout(next, Math.max(3000, error.wait ?? 0));
  }
}

/** `answer`: none for a question that is skipped. */
function done(button, answer) {
  if (!current || performance.now() - since < SETTLED) return;
  const body = { question: current.id, token: token(), ...(answer && { answer }) };
  past.push({ question: current, token: body.token, counts: Boolean(answer) });
  const about = { kind: "principle", what: button.textContent.trim(), text: current.principle };
  current = null;
  byId("item").hidden = true;
  if (answer) tell(answered + 1);
  outbox.add(answer ? "/api/principles/answer" : "/api/principles/skip", body, about).finally(next);
}

const give = (button) => done(button, button.dataset.answer);
const skip = () => done(byId("skip"));

async function undo() {
  const last = past.pop();
  if (last && outbox.recall(last.token)) {
    if (last.counts) tell(answered - 1);
    return show(last.question);
  }
  try {
    await outbox.send();
    const found = await post("/api/principles/undo", last ? { question: last.question.id } : {});
    tell(found.answered);
    if (found.question) show(found.question);
  } catch (error) {
    if (last) past.push(last);
    outbox.tell(error);
  }
}

showRefused();
for (const button of document.querySelectorAll("[data-answer]")) button.addEventListener("click", () => give(button));
byId("skip").addEventListener("click", skip);
byId("undo").addEventListener("click", undo);
byId("again").addEventListener("click", next);
addEventListener("online", () => current || next());
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.closest("input, textarea, select")) return;
  const button = document.querySelector(`[data-answer][aria-keyshortcuts="${event.key}"]`);
  if (button) give(button);
  else if (event.key.toLowerCase() === "s") skip();
  else if (event.key.toLowerCase() === "u") undo();
  else if (document.querySelector("#item:not([hidden])")) READING[event.key.toLowerCase()]?.();
});
next();
