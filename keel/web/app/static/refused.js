// What the server will not count, with what was typed: a list on the page that stays until its person discards it.

import { drop, keep, keysOf, read } from "./storage.js";
import { PERSON } from "./wire.js";

const PREFIX = `keel-refused-${PERSON}-`;

/** `about`: { what, prompt, text }. The same `name` is the same entry. */
export function refuse(name, about, why) {
  keep(PREFIX + name, { ...about, why, at: Date.now() });
  showRefused();
}

/** It counts after all. */
export function withdraw(name) {
  drop(PREFIX + name);
  showRefused();
}

const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren(button.closest("li").querySelector("pre")); // to be copied by hand
    if (!document.execCommand("copy")) return;
  }
  button.textContent = "Copied";
}

function entry(key) {
  const { what = "", prompt = "", text = "", why = "", at = 0 } = read(key) ?? {};
  const head = element("p", {}, element("b", { textContent: what }), prompt ? ` on “${prompt}”` : "");
  const note = element("p", { className: "note", textContent: `${why} (${new Date(at).toLocaleString()})` });
  const discard = element("button", { type: "button", textContent: "Discard" });
  discard.addEventListener("click", () => {
    drop(key);
    showRefused();
  });
  const buttons = [discard];
  if (text) {
    const button = element("button", { type: "button", textContent: "Copy the text" });
    button.addEventListener("click", () => copy(text, button));
    buttons.unshift(button);
  }
  const said = text ? [element("pre", { textContent: text, tabIndex: 0 })] : [];
  return element("li", {}, head, note, ...said, element("p", { className: "actions" }, ...buttons));
}

export function showRefused() {
  const keys = keysOf(PREFIX);
  const place = document.getElementById("refused");
  if (!place) return; // a page without the list
  place.hidden = !keys.length;
  place.querySelector("summary").textContent = `Not counted: ${keys.length}`;
  place.querySelector("ul").replaceChildren(...keys.map(entry));
}

addEventListener("storage", ({ key }) => (key === null || key.startsWith(PREFIX)) && showRefused());
