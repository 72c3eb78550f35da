// What is being typed about an item, kept until it is handed in: a reload or a crash loses none of it.

import { drop, keep, keysOf, read } from "./storage.js";
import { PERSON } from "./wire.js";

const PREFIX = `keel-draft-${PERSON}-`;
const key = (id) => `${PREFIX}${id}`;

export const draftOf = (id) => read(key(id))?.fields ?? {};

/** `text` null: nothing is being typed there any more. */
export function setDraft({ id, kind, prompt }, field, text) {
  const fields = { ...draftOf(id), [field]: text };
  if (text === null) delete fields[field];
  if (Object.keys(fields).length) keep(key(id), { id, kind, prompt, fields });
  else if (read(key(id)) !== undefined) drop(key(id));
}

export const dropDraft = (id) => drop(key(id));

/** All drafts about items of one kind of work. */
export const draftsOf = (kind) => keysOf(PREFIX).map(read).filter((draft) => draft?.kind === kind);
