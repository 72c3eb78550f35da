// Calls to the server: whose they are, and what an answer means.

const meta = (name) => document.querySelector(`meta[name="${name}"]`)?.content ?? null;

export const PERSON = meta("person");
export const GUIDELINE = meta("guideline"); // the version this page was made with
export const LEASE = 1000 * Number(meta("lease") ?? 1800); // milliseconds for which an item is kept for its person
const LONGEST_SILENCE = 120_000; // milliseconds; a server that waits for its database takes up to 60 s
let csrf = meta("csrf");

/** The server said no. `last`: that is its last word on it; else the same may be sent again, in `wait` milliseconds. */
export class Refused extends Error {
  constructor(status, message, wait = 0, last = false) {
    super(message);
    Object.assign(this, { status, wait, last });
  }
}

/** Somebody else is signed in on this browser: what this page's person did must not be sent as theirs. */
export class Stranger extends Error {}

const again = new Set([401, 403, 408, 425, 429]);

async function refusal(answer) {
  let said = null;
  try {
    said = (await answer.json()).error;
  } catch {
    // not this server's word, but that of a proxy or of a network that one must sign in to first
  }
  const wait = 1000 * (Number(answer.headers.get("Retry-After")) || 0);
  const last = typeof said === "string" && answer.status < 500 && !again.has(answer.status);
  return new Refused(answer.status, said ?? `status ${answer.status}`, wait, last);
}

const send = (path, body, signal) =>
  fetch(path, { method: "POST", headers: { "Content-Type": "application/json", "X-CSRF": csrf }, body: JSON.stringify(body), signal });

/** Signing in again, in another window perhaps, gives the session another token: true when there is a new one. */
async function renewed() {
  const answer = await fetch("/api/me");
  if (!answer.ok) throw await refusal(answer);
  const me = await answer.json();
  if (me.person !== PERSON) throw new Stranger(me.name);
  const fresh = me.csrf !== csrf;
  csrf = me.csrf;
  for (const field of document.querySelectorAll("input[name=csrf]")) field.value = csrf;
  return fresh;
}

/** The answer when the server took it. Throws Refused, Stranger, or another error when there is no connection. */
export async function call(path, body, signal) {
  let answer = await send(path, body, signal);
  if (answer.status === 403 && (await renewed())) answer = await send(path, body, signal);
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

/** The answer's JSON. A server that says nothing for so long is taken for gone. */
export const post = async (path, body) => (await call(path, body, AbortSignal.timeout?.(LONGEST_SILENCE))).json();
