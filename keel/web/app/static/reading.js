// Long conversations: their long messages are folded, and a key leads to what is judged.

const folds = () => [...document.querySelectorAll("#messages .fold")];

/** To the responses: the next key scrolls there, and a screen reader goes on there. */
export function toResponses() {
  const place = document.querySelector("[data-response]");
  place.focus({ preventScroll: true });
  (place.closest(".response, .writing") ?? place).scrollIntoView({ block: "start" });
}

/** Opens all folded messages, or folds them again when all are open. */
export function turnFolds() {
  const open = folds().some((fold) => !fold.open);
  for (const fold of folds()) fold.open = open;
  if (open) document.querySelector("#messages").scrollIntoView({ block: "start" });
}

export const READING = { d: toResponses, o: turnFolds };

document.getElementById("jump").addEventListener("click", toResponses);
document.getElementById("unfold").addEventListener("click", turnFolds);
