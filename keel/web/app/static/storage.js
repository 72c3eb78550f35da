// What this browser keeps, by key. Storage may be full, closed or emptied at any moment, and holds what others wrote:
// nothing here throws, and what the disk does not take stays in this tab.

const here = new Map(); // all that this tab keeps: key -> { value, saved }

const disk = (act) => {
  try {
    return act(localStorage);
  } catch {
    return undefined; // closed, full, or not to be read
  }
};

const save = (key, value) => disk((store) => (store.setItem(key, JSON.stringify(value)), true)) ?? false;

export function keep(key, value) {
  here.set(key, { value, saved: save(key, value) });
  for (const [other, kept] of here) if (!kept.saved) kept.saved = save(other, kept.value); // there may be room again
}

export const raw = (key) => disk((store) => store.getItem(key)) ?? null;

/** What is kept under the key; undefined when there is nothing, or nothing that can be read. */
export function read(key) {
  const mine = here.get(key);
  if (mine && !mine.saved) return mine.value; // newer than what the disk has
  return disk((store) => JSON.parse(store.getItem(key))) ?? mine?.value;
}

export function drop(key) {
  here.delete(key);
  disk((store) => store.removeItem(key));
}

/** The keys that begin so, sorted: this tab's, and what other tabs and earlier visits left. */
export function keysOf(prefix) {
  const kept = disk((store) => Object.keys(store)) ?? [];
  return [...new Set([...kept, ...here.keys()])].filter((key) => key.startsWith(prefix)).sort();
}

/** The keys whose value would be lost with this tab. */
export const unsaved = (prefix) => [...here].filter(([key, { saved }]) => !saved && key.startsWith(prefix)).map(([key]) => key);

addEventListener("storage", ({ key, newValue }) => {
  if (key === null) for (const [kept, { value }] of [...here]) keep(kept, value); // emptied under our feet
  else if (newValue === null) here.delete(key); // another tab is done with it
});
