import { GUIDELINE, Work, byId, keys } from "./common.js";
import { READING } from "./reading.js";

let plain = false;
const buttons = [...document.querySelectorAll("[data-choice]")];
const more = byId("more");

const work = new Work("compare", show, { reason: byId("reason") });

function show(item, said) {
  more.reset();
  for (const [side, given] of Object.entries(said.ratings ?? {})) {
    for (const [aspect, value] of Object.entries(given)) more.elements.namedItem(`${side}/${aspect}`).value = value;
  }
  fill(item);
}

function fill(item) {
  for (const [side, shown] of [["left", item.shown[0]], ["right", item.shown[1]]]) {
    const place = byId(side);
    place.classList.toggle("plain", plain && Boolean(shown.text));
    if (plain && shown.text) place.textContent = shown.text;
    else place.innerHTML = shown.html;
  }
}

function ratings() {
  const given = {};
  for (const [name, value] of new FormData(more)) {
    const at = name.indexOf("/"); // an aspect may be called anything, also "speed/size" and "__proto__"
    if (at > 0) (given[name.slice(0, at)] ??= Object.create(null))[name.slice(at + 1)] = Number(value);
  }
  return given;
}

function vote(button) {
  if (!work.current) return;
  const { choice, strength } = button.dataset;
  button.classList.add("pressed");
  setTimeout(() => button.classList.remove("pressed"), 250);
  work.done(
    "/api/judge",
    {
      choice,
      strength: Number(strength) || null,
      seconds: work.clock.seconds,
      reason: byId("reason").value,
      ratings: ratings(),
      guideline: GUIDELINE,
    },
    button.getAttribute("aria-label") ?? "Both bad",
  );
}

for (const button of buttons) button.addEventListener("click", () => vote(button));
more.addEventListener("submit", (event) => event.preventDefault());
byId("reason").addEventListener("keydown", (event) => event.key === "Enter" && event.target.blur());

const of = (choice, strength) => () => vote(buttons.find((b) => b.dataset.choice === choice && b.dataset.strength === String(strength)));
keys({
  ...READING,
  1: of("left", 3),
  2: of("left", 2),
  3: of("left", 1),
  4: of("tie", 0),
  5: of("right", 1),
  6: of("right", 2),
  7: of("right", 3),
  t: of("tie", 0),
  b: of("both_bad", 0),
  s: () => work.skip(),
  u: () => work.undo(),
  f: () => work.flag(),
  r: () => byId("reason").focus(),
  p: () => {
    plain = !plain;
    if (work.current) fill(work.current);
  },
});
