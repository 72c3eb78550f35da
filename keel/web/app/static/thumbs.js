import { GUIDELINE, Work, byId, keys } from "./common.js";
import { READING } from "./reading.js";

let plain = false;
const [up, down] = document.querySelectorAll("[data-up]");

const work = new Work("thumb", fill, { reason: byId("reason") });

function fill(item) {
  const place = byId("reply");
  const [shown] = item.shown;
  place.classList.toggle("plain", plain && Boolean(shown.text)); // one without a text says so
  if (plain && shown.text) place.textContent = shown.text;
  else place.innerHTML = shown.html;
}

function give(button) {
  if (!work.current) return;
  button.classList.add("pressed");
  setTimeout(() => button.classList.remove("pressed"), 250);
  const said = { up: Boolean(button.dataset.up), seconds: work.clock.seconds, reason: byId("reason").value, guideline: GUIDELINE };
  work.done("/api/thumb", said, button.getAttribute("aria-label"));
}

for (const button of [up, down]) button.addEventListener("click", () => give(button));
byId("reason").addEventListener("keydown", (event) => event.key === "Enter" && event.target.blur());

keys({
  ...READING,
  1: () => give(up),
  2: () => give(down),
  s: () => work.skip(),
  u: () => work.undo(),
  f: () => work.flag(),
  r: () => byId("reason").focus(),
  p: () => {
    plain = !plain;
    if (work.current) fill(work.current);
  },
});
