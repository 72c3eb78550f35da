import { GUIDELINE, Work, byId } from "./common.js";
import "./reading.js";

const { kind } = byId("item").dataset;
const area = byId("text");
// a textarea knows one kind of line end
const original = (item) => (kind === "edit" ? item.shown[0].text.replace(/\r\n?/g, "\n") : "");

const work = new Work(kind, () => {}, { text: area }, original);

function count() {
  const words = area.value.trim().split(/\s+/).filter(Boolean).length;
  byId("words").textContent = `${words} ${words === 1 ? "word" : "words"}`;
}

area.addEventListener("input", count);

function submit() {
  const text = area.value.trim();
  if (!work.current || !text) return area.focus();
  if (kind === "edit" && text === original(work.current).trim()) {
    byId("words").textContent = "as it was: improve it, or skip";
    return area.focus();
  }
  work.done("/api/write", { kind, text, seconds: work.clock.seconds, guideline: GUIDELINE }, kind === "write" ? "Reply kept" : "Edit kept");
}

byId("submit").addEventListener("click", submit);
byId("restore")?.addEventListener("click", () => {
  if (!work.current) return;
  area.value = original(work.current);
  area.dispatchEvent(new Event("input"));
});
// anywhere on the page: after an undo the focus is at the conversation, where reading begins
document.addEventListener("keydown", (event) => {
  const open = document.querySelector("dialog[open]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat && !open) submit();
});
