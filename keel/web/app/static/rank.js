import { GUIDELINE, Work, byId, keys } from "./common.js";
import { READING } from "./reading.js";

const list = byId("ranked");
let marked = 0;

const work = new Work("rank", show, { reason: byId("reason") });

function show(item, said) {
  marked = 0;
  list.replaceChildren(...item.shown.map((shown, place) => card(shown, place, item.shown.length)));
  for (const [rank, places] of (said.tiers ?? []).entries()) {
    for (const place of places) list.children[place].querySelector(`input[value="${rank + 1}"]`).checked = true;
  }
  mark(0);
  check();
}

function card(shown, place, count) {
  const row = document.createElement("li");
  row.className = "response";
  row.tabIndex = -1;
  const group = document.createElement("fieldset");
  group.className = "places";
  group.innerHTML = `<legend class="vh">Rank of response ${place + 1}, 1 is best</legend>`;
  for (let rank = 1; rank <= count; rank += 1) {
    const label = document.createElement("label");
    label.innerHTML = `<input type="radio" name="rank-${place}" value="${rank}"><span>${rank}</span>`;
    group.append(label);
  }
  const text = Object.assign(document.createElement("div"), { className: "text", innerHTML: shown.html });
  row.append(group, text);
  row.addEventListener("change", check);
  row.addEventListener("click", () => mark(place));
  return row;
}

function mark(place) {
  const rows = [...list.children];
  if (!rows.length) return;
  marked = Math.max(0, Math.min(rows.length - 1, place));
  rows.forEach((row, number) => row.classList.toggle("marked", number === marked));
}

function step(by) {
  mark(marked + by);
  list.children[marked]?.scrollIntoView({ block: "nearest" });
}

const given = () => [...list.children].map((row) => Number(row.querySelector("input:checked")?.value ?? 0));

function check() {
  byId("submit").disabled = !given().length || given().includes(0);
}

function set(rank) {
  const input = list.children[marked]?.querySelector(`input[value="${rank}"]`);
  if (!input) return;
  input.checked = true;
  check();
  if (marked < list.children.length - 1) step(1);
}

function submit() {
  const ranks = given();
  if (!work.current || ranks.includes(0)) return;
  const tiers = [...new Set(ranks)].sort((a, b) => a - b).map((rank) => ranks.flatMap((r, place) => (r === rank ? [place] : [])));
  work.done("/api/rank", { tiers, seconds: work.clock.seconds, reason: byId("reason").value, guideline: GUIDELINE }, "Ranked");
}

byId("submit").addEventListener("click", submit);
const digits = Object.fromEntries([1, 2, 3, 4, 5, 6, 7, 8, 9].map((rank) => [rank, () => set(rank)]));
keys({
  ...READING,
  ...digits,
  j: () => step(1),
  k: () => step(-1),
  enter: submit,
  s: () => work.skip(),
  u: () => work.undo(),
  f: () => work.flag(),
});
