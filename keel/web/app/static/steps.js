// A reply, one step at a time. Labels, times and reasons are kept as a line of text each, as what is typed is: a reload
// loses none of them, and what the server will not count can be read.

import { GUIDELINE, LONGEST_LOOK, Work, byId, keys, settled, toast } from "./common.js";
import { READING } from "./reading.js";
import { refuse, withdraw } from "./refused.js";
import { keep, read } from "./storage.js";
import { PERSON } from "./wire.js";

const WORDS = { good: "Good", neutral: "Neutral", bad: "Bad", unsure: "Unsure" };
const SHOWS = `shows-reference-${PERSON}`; // whether this person wants reference answers shown; no work that a closing tab may lose
const [list, marks, mistake, correction, note] = ["steps", "marks", "mistake", "correction", "note"].map(byId);
const chips = [...mistake.querySelectorAll("[name=reasons]")];
const buttons = [...document.querySelectorAll("[data-mark]")];

let said = blank(0); // of the item on the screen

function blank(count) {
  const [labels, spent] = [Array(count).fill(null), Array(count).fill(0)];
  return { labels, spent, reasons: [], seen: false, at: 0, since: 0, of: -1, others: {} };
}

const firstBad = () => said.labels.indexOf("bad");
const judged = () => (firstBad() < 0 ? said.labels : said.labels.slice(0, firstBad() + 1));

// ------------------------------------------------------------------------------------------------------ as a text

function written({ labels, spent, reasons, seen }) {
  const lines = labels.map((label, i) => `${i + 1} ${label ?? "-"} (${(spent[i] ?? 0).toFixed(2)} s)`);
  const known = lines.filter((_, i) => labels[i] || spent[i]);
  if (!labels.some(Boolean) && !seen) return ""; // nothing was said
  return [...known, ...(reasons.length ? [`why: ${reasons.join(", ")}`] : []), ...(seen ? ["saw the reference answer"] : [])].join("\n");
}

function understood(text, count) {
  const found = blank(count);
  for (const line of text.split("\n")) {
    const [, number, label, seconds] = /^(\d+) (\S+) \(([\d.]+) s\)$/.exec(line) ?? [];
    if (number > count) continue;
    if (number) [found.labels[number - 1], found.spent[number - 1]] = [label in WORDS ? label : null, Number(seconds)];
    if (line.startsWith("why: ")) found.reasons = line.slice(5).split(", ");
    if (line.startsWith("saw ")) found.seen = true;
  }
  const open = found.labels.indexOf(null);
  const bad = found.labels.indexOf("bad");
  found.of = bad;
  found.at = bad >= 0 ? bad : open >= 0 ? open : count - 1;
  return found;
}

/** Keeps what was said so far. */
function kept() {
  marks.value = written(said);
  marks.dispatchEvent(new Event("input"));
}

// --------------------------------------------------------------------------------------------------- on the screen

const work = new Work("step", show, { marks, correction, note });

function show(item, before) {
  byId("mistake-place").append(mistake); // out of the list, which is made anew
  list.replaceChildren(...item.html.map(row));
  said = blank(item.steps.length);
  if (before.labels && before.marks === undefined) before.marks = written({ ...before, spent: before.step_seconds ?? [], seen: before.reference_shown ?? false });
  byId("reference").hidden = item.reference === null;
  byId("answer").textContent = item.reference ?? "";
}

function row(html, i) {
  const made = document.createElement("li");
  made.tabIndex = -1;
  const words = Object.assign(document.createElement("span"), { className: "step-text", dir: "auto", innerHTML: html });
  const label = Object.assign(document.createElement("span"), { className: "step-label" });
  made.append(words, label);
  made.addEventListener("click", ({ target }) => mistake.contains(target) || go(i));
  return made;
}

marks.addEventListener("input", () => {
  if (!work.current) return;
  if (marks.value !== written(said)) said = understood(marks.value, list.children.length);
  paint();
});

function paint() {
  const bad = firstBad();
  [...list.children].forEach((row, i) => {
    const after = bad >= 0 && i > bad;
    const label = after ? null : said.labels[i];
    row.className = `${label ?? ""} ${after ? "beyond" : ""}`;
    row.querySelector(".step-label").textContent = after ? "not judged" : label ? WORDS[label] : "";
    if (i === said.at) row.setAttribute("aria-current", "step");
    else row.removeAttribute("aria-current");
  });
  mistake.hidden = bad < 0;
  if (bad >= 0 && mistake.parentElement !== list.children[bad]) list.children[bad].append(mistake);
  for (const chip of chips) chip.checked = said.reasons.includes(chip.value);
  const now = said.labels[said.at];
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.mark === now && !(bad >= 0 && said.at > bad)));
  byId("place").textContent = `Step ${said.at + 1} of ${list.children.length}`;
  byId("hand-in").classList.toggle("ready", !judged().includes(null));
  paintReference();
}

function paintReference() {
  const shown = read(SHOWS) ?? true;
  for (const id of ["answer", "doubt"]) byId(id).hidden = !shown;
  byId("show").setAttribute("aria-expanded", String(shown));
  byId("show-word").textContent = shown ? "Hide" : "Show";
  if (shown && work.current?.reference) said.seen = true;
}

function turnReference() {
  if (!work.current || work.current.reference === null) return;
  keep(SHOWS, !(read(SHOWS) ?? true));
  paint();
  kept();
}

/** The time since the last look belongs to the step that was looked at. */
function timed() {
  const now = work.clock.seconds;
  said.spent[said.at] = Math.min(LONGEST_LOOK, said.spent[said.at] + Math.max(0, now - said.since));
  said.since = now;
}

function go(i) {
  if (!work.current || i < 0 || i >= list.children.length) return;
  timed();
  said.at = i;
  paint();
  const row = list.children[i];
  const free = [document.body, byId("prompt-h")].includes(document.activeElement) || list.contains(document.activeElement);
  if (free) row.focus({ preventScroll: true }); // a screen reader reads it
  else byId("reader").textContent = `Step ${i + 1}: ${row.querySelector(".step-text").textContent}`;
  row.scrollIntoView({ block: "nearest" });
}

// ------------------------------------------------------------------------------------------------------- what is said

function label(mark) {
  if (!work.current || !settled(work)) return;
  const bad = firstBad();
  if (bad >= 0 && said.at > bad) {
    toast(`Nothing after step ${bad + 1} is judged: it is bad`);
    return;
  }
  timed();
  said.labels[said.at] = mark;
  moved();
  const next = judged().findIndex((one, i) => i > said.at && !one);
  if (mark !== "bad" && next >= 0) go(next);
  else {
    paint();
    byId("reader").textContent = `Step ${said.at + 1}: ${WORDS[mark]}`;
    if (mark === "bad") mistake.scrollIntoView({ block: "nearest" });
  }
  kept();
}

/** Why a step is bad, and what should stand in its place, is said of that step: when another one is the first bad one,
 * it waits until that one is again. What was typed is in the list until then. */
function moved() {
  const bad = firstBad();
  if (bad < 0 || bad === said.of) return;
  const before = said.of;
  said.of = bad;
  if (before < 0) return;
  const [line, other] = [correction.value, said.others[bad] ?? { line: "", reasons: [] }];
  said.others[before] = { line, reasons: said.reasons };
  [said.reasons, correction.value] = [other.reasons, other.line];
  correction.dispatchEvent(new Event("input"));
  const { prompt, id } = work.current;
  if (said.others[bad]) withdraw(`${id}-step-${bad + 1}`); // a reload would have left it there alone
  const why = `It was written for step ${before + 1}, and step ${bad + 1} is the first bad one`;
  if (line.trim()) refuse(`${id}-step-${before + 1}`, { what: "What you wrote", prompt, text: line.trim() }, why);
}

function reason(chip) {
  if (!work.current || firstBad() < 0) return;
  const { value } = chip;
  said.reasons = said.reasons.includes(value) ? said.reasons.filter((one) => one !== value) : [...said.reasons, value];
  paint();
  kept();
}

function handIn() {
  if (!work.current) return;
  const open = judged().indexOf(null);
  if (open >= 0) {
    go(open);
    toast(`Step ${open + 1} has no label yet`);
    return;
  }
  send(firstBad() < 0 ? "solution" : "found_error");
}

function send(outcome) {
  timed();
  const bad = firstBad();
  const line = correction.value.trim();
  const body = {
    labels: said.labels.map((one, i) => (bad >= 0 && i > bad ? null : one)),
    outcome,
    reasons: bad < 0 ? [] : said.reasons,
    correction: bad < 0 ? "" : line,
    note: ["give_up", "bad_problem"].includes(outcome) ? note.value : "",
    reference_shown: said.seen,
    step_seconds: said.spent.map((seconds) => Math.round(100 * seconds) / 100),
    seconds: Math.min(LONGEST_LOOK, Math.round(100 * said.spent.reduce((sum, one) => sum + one, 0)) / 100),
    guideline: GUIDELINE,
  };
  const what = { solution: "No bad step", found_error: `Step ${bad + 1} is bad`, give_up: "Given up", bad_problem: "Bad problem" }[outcome];
  const { prompt, id } = work.current;
  const unused = [bad < 0 ? line : "", body.note ? "" : note.value.trim()].filter(Boolean).join("\n\n");
  kept();
  if (!work.done("/api/steps", body, what, [written(said), line, note.value].filter((one) => one.trim()).join("\n\n"))) return;
  if (unused) refuse(`${id}-unused`, { what: "What you wrote", prompt, text: unused }, "It belongs to none of what you handed in");
}

function stop(outcome) {
  if (!work.current) return;
  const bad = firstBad();
  if (outcome === "give_up" && bad >= 0) {
    toast(`Step ${bad + 1} is bad: hand in, or change its label first`);
    return;
  }
  const [item, dialog] = [work.current, byId("stopping")];
  const up = outcome === "give_up";
  byId("stopping-h").textContent = up ? "Give up on this reply" : "Something is wrong with the problem";
  byId("note-word").textContent = up ? "Why can’t you judge it?" : "What is wrong with it? (optional)";
  note.required = up;
  dialog.returnValue = "cancel";
  dialog.showModal();
  dialog.onclose = () => {
    if (dialog.returnValue !== "stop" || work.current !== item) return;
    if (up && !note.value.trim()) toast("Say why you give up");
    else send(outcome);
  };
}

for (const button of buttons) button.addEventListener("click", () => label(button.dataset.mark));
for (const chip of chips) chip.addEventListener("change", () => reason(chip));
byId("before").addEventListener("click", () => go(said.at - 1));
byId("after").addEventListener("click", () => go(said.at + 1));
byId("hand-in").addEventListener("click", handIn);
byId("give-up").addEventListener("click", () => stop("give_up"));
byId("bad-problem").addEventListener("click", () => stop("bad_problem"));
byId("show").addEventListener("click", turnReference);
correction.addEventListener("keydown", (event) => event.key === "Enter" && (event.stopPropagation(), event.target.blur()));

document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("button, a, summary, textarea") || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  handIn();
});

keys({
  ...READING,
  1: () => label("good"),
  2: () => label("neutral"),
  3: () => label("bad"),
  4: () => label("unsure"),
  5: () => reason(chips[0]),
  6: () => reason(chips[1]),
  7: () => reason(chips[2]),
  8: () => reason(chips[3]),
  j: () => go(said.at + 1),
  k: () => go(said.at - 1),
  arrowdown: () => go(said.at + 1),
  arrowup: () => go(said.at - 1),
  c: () => mistake.hidden || correction.focus(),
  a: turnReference,
  g: () => stop("give_up"),
  b: () => stop("bad_problem"),
  s: () => work.skip(),
  u: () => work.undo(),
  f: () => work.flag(),
});
