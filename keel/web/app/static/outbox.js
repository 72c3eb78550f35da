// What was done, kept until the server has taken it or refused it for good. Each letter has a key of its own: two tabs
// never write over each other's, and one that can't be read spoils no other. Its token makes it count once however often
// it is sent.

import { refuse } from "./refused.js";
import { drop, keep, keysOf, raw, read, unsaved } from "./storage.js";
import { PERSON, Refused, Stranger, post } from "./wire.js";

const PREFIX = `keel-letter-${PERSON}-`;
const SHORTEST = 1000; // milliseconds between tries
const LONGEST = 30_000;
const FLICKER = 400; // what is sent sooner is not spoken of

export const token = () => crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

const counted = (count) => `${count} ${count === 1 ? "judgement" : "judgements"}`;

export class Outbox {
  constructor(onProgress) {
    this.onProgress = onProgress;
    this.sending = null;
    this.pause = SHORTEST;
    this.last = 0;
    adopt();
    const now = () => this.send();
    for (const sign of ["online", "focus", "pageshow"]) addEventListener(sign, now);
    document.addEventListener("visibilitychange", () => document.hidden || now());
    addEventListener("storage", () => this.count || this.tell(null));
    document.querySelector("form[action='/sign-out']")?.addEventListener("submit", (event) => {
      const { count } = this;
      if (count && !confirm(`${counted(count)} not sent yet will wait here until you sign in on this browser again. Sign out?`)) event.preventDefault();
    });
    addEventListener("beforeunload", (event) => unsaved("keel-").length && event.preventDefault());
    this.send();
  }

  /** Oldest first. */
  get letters() {
    const found = keysOf(PREFIX).map((key) => ({ key, ...read(key) }));
    return found.filter(({ body }) => body).sort((a, b) => a.at - b.at);
  }

  get count() {
    return keysOf(PREFIX).length;
  }

  /** Keeps a letter, then tries to send all that wait. `about`: what it is, should the server refuse it. */
  add(path, body, about) {
    this.last = Math.max(Date.now(), this.last + 1);
    keep(PREFIX + body.token, { path, body, about, at: this.last, tried: false });
    setTimeout(() => this.warn(), FLICKER);
    return this.send();
  }

  /** Takes a letter back that never left this browser: true when it could. */
  recall(token) {
    const letter = read(PREFIX + token);
    if (!letter || letter.tried) return false;
    drop(PREFIX + token);
    this.tell(null);
    return true;
  }

  send() {
    this.sending ??= this.sendAll().finally(() => (this.sending = null));
    return this.sending;
  }

  async sendAll() {
    clearTimeout(this.timer);
    const stuck = new Set(); // the server fails on these: the others need not wait for them
    let trouble = null;
    let idle = true;
    for (let letter; (letter = this.letters.find(({ key }) => !stuck.has(key))); ) {
      const error = await this.sendOne(letter);
      idle = false;
      if (!error) continue;
      trouble = error;
      if (error.status !== 500) break;
      stuck.add(letter.key);
    }
    if (!idle) this.tell(trouble);
    if (!trouble) return;
    this.timer = setTimeout(() => this.send(), Math.max(this.pause, trouble.wait ?? 0));
    this.pause = Math.min(this.pause * 2, LONGEST);
  }

  /** Why it must wait; nothing when it is out of the way. */
  async sendOne({ key, ...letter }) {
    const offline = !navigator.onLine;
    keep(key, { ...letter, tried: true });
    try {
      const answer = await post(letter.path, letter.body);
      if (answer.progress) this.onProgress(answer.progress);
    } catch (error) {
      if (!error.last) {
        // what was begun and broken off offline has not left this browser
        if (offline && !(error instanceof Refused) && read(key)) keep(key, { ...letter, tried: letter.tried });
        return error;
      }
      refuse(letter.body.token, letter.about ?? {}, error.message);
    }
    drop(key);
    this.pause = SHORTEST;
    return null;
  }

  /** Says what keeps the letters, or the page's work, waiting. */
  tell(trouble) {
    const place = document.getElementById("offline");
    const { count } = this;
    place.hidden = !trouble;
    if (trouble) place.replaceChildren(...reason(trouble, count));
    this.warn();
  }

  warn() {
    const { length } = unsaved(PREFIX);
    const place = document.getElementById("unsaved");
    place.hidden = !length;
    place.textContent = `This browser's storage is full or closed. Closing this tab would lose ${counted(length)} not sent yet.`;
  }
}

function reason(trouble, count) {
  const where = unsaved(PREFIX).length ? "tab" : "browser";
  const kept = count ? ` ${counted(count)} of yours ${count === 1 ? "is" : "are"} kept in this ${where}` : "";
  if (trouble instanceof Stranger) {
    const then = kept ? `${kept}, to be sent when you are the one who is signed in.` : " Sign in again to go on.";
    return [`${trouble.message} is signed in on this browser now.${then}`];
  }
  const link = Object.assign(document.createElement("a"), { href: "/sign-in", target: "_blank", textContent: "Sign in again" });
  if (trouble.status === 401) return [`You are signed out.${kept && `${kept}.`} `, link, kept ? " to send what waits." : " to go on."];
  const then = kept && `${kept} and will be sent`;
  if (trouble instanceof Refused) {
    const what = trouble.status < 500 ? `The server does not take this now: ${trouble.message}.` : "The server is in trouble.";
    return [`${what}${then && `${then} as soon as it can take ${count === 1 ? "it" : "them"}.`}`];
  }
  return [`No connection.${then && `${then} when it is back.`}`];
}

/** Letters that can't be sent: those of a page before this one, which knew its items by their numbers, and those that
 * can't be read. */
function adopt() {
  const before = `keel-outbox-${PERSON.split("-").at(-1)}`;
  const letters = read(before);
  if (Array.isArray(letters)) {
    for (const body of letters.map((letter) => letter?.body).filter(Boolean)) {
      const said = [body.choice, body.tiers && JSON.stringify(body.tiers), body.text, body.reason].filter(Boolean);
      const about = { what: "What waited here", text: said.join("\n\n") };
      refuse(body.token ?? token(), about, "It was made on an older page, and the server can't tell any more on what");
    }
    drop(before);
  }
  for (const key of keysOf(PREFIX)) {
    if (read(key)?.body) continue;
    refuse(key.slice(PREFIX.length), { what: "A judgement", text: raw(key) ?? "" }, "What this browser kept of it can't be read");
    drop(key);
  }
}
