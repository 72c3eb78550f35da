import { GUIDELINE, Work, byId } from "./common.js";

const { kind } = byId("item").dataset;
const area = byId("text");
const draft = (item) => `keel-draft-${item.id}`;

const work = new Work(kind, (item, said) => {
  area.value = localStorage.getItem(draft(item)) ?? said.text ?? (kind === "edit" ? item.shown[0].text : "");
  count();
});

function count() {
  const words = area.value.trim().split(/\s+/).filter(Boolean).length;
  byId("words").textContent = `${words} ${words === 1 ? "word" : "words"}`;
}

area.addEventListener("input", () => {
  count();
  if (work.current) localStorage.setItem(draft(work.current), area.value);
});

function submit() {
  const text = area.value.trim();
  if (!work.current || !text) return area.focus();
  if (kind === "edit" && text === work.current.shown[0].text.trim()) {
    byId("words").textContent = "as it was: improve it, or skip";
    return area.focus();
  }
  localStorage.removeItem(draft(work.current));
  work.done("/api/write", { kind, text, seconds: work.clock.seconds, guideline: GUIDELINE }, kind === "write" ? "Reply kept" : "Edit kept");
}

byId("submit").addEventListener("click", submit);
byId("restore")?.addEventListener("click", () => {
  if (!work.current) return;
  area.value = work.current.shown[0].text;
  localStorage.removeItem(draft(work.current));
  count();
});
// anywhere on the page: after an undo the focus is at the conversation, where reading begins
document.addEventListener("keydown", (event) => {
  const open = document.querySelector("dialog[open]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat && !open) submit();
});
