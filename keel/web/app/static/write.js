import { Work, byId } from "./common.js";

const { kind } = byId("item").dataset;
const area = byId("text");
const draft = (item) => `keel-draft-${item.id}`;

const work = new Work(kind, (item) => {
  area.value = localStorage.getItem(draft(item)) ?? (kind === "edit" ? item.shown[0].text : "");
  count();
  area.focus({ preventScroll: true });
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
  work.done("/api/write", { kind, text, seconds: work.clock.seconds }, kind === "write" ? "Reply kept" : "Edit kept");
}

byId("submit").addEventListener("click", submit);
byId("restore")?.addEventListener("click", () => {
  if (!work.current) return;
  area.value = work.current.shown[0].text;
  localStorage.removeItem(draft(work.current));
  count();
});
area.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
