// What the working pages share: the queue of items fetched ahead, what is said of them, the clock, the keys.

import { dropDraft, draftOf, draftsOf, setDraft } from "./drafts.js";
import { Leases } from "./leases.js";
import { Outbox, token } from "./outbox.js";
import { refuse, showRefused } from "./refused.js";
import { GUIDELINE, PERSON, Refused, post } from "./wire.js";

const byId = (id) => document.getElementById(id);
const SETTLED = 250; // milliseconds: what comes sooner after a vote is its key or tap again, not a word on the next item
const AHEAD = 3; // items fetched ahead: enough for a tunnel, few enough to keep nobody waiting for them
const MOST_TRIES = 12; // of fetching at once
export const LONGEST_LOOK = 86_400; // seconds; the server takes no more, and a screen that stood there for a weekend was not read
const LATE = ["write", "edit", "step"]; // kinds of work that count also when the item went to somebody else: they take long

export function toast(text) {
  const place = byId("toast");
  place.textContent = text;
  place.classList.remove("fresh");
  void place.offsetWidth; // restarts the animation
  place.classList.add("fresh");
}

// ------------------------------------------------------------------------------------------------ items and time

/** Whether what comes now is meant for the item on the screen, and not the last key or tap again. */
export const settled = ({ doneAt }) => performance.now() - doneAt >= SETTLED;

/** Seconds during which the page was looked at. */
export class Clock {
  constructor() {
    this.restart();
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.sum += performance.now() - this.since;
      else this.since = performance.now();
    });
  }

  restart() {
    this.sum = 0;
    this.since = performance.now();
  }

  get seconds() {
    const looked = this.sum + (document.hidden ? 0 : performance.now() - this.since);
    return Math.min(LONGEST_LOOK, Math.round(looked) / 1000);
  }
}

export function showProgress({ today, done, wanted }) {
  byId("progress").hidden = false;
  byId("today").textContent = today;
  byId("project").textContent = `${done.toLocaleString("en")} of ${wanted.toLocaleString("en")}`;
  byId("done").max = Math.max(1, wanted);
  byId("done").value = done;
}

/** A page that shows one item after another. `show(item, said)` fills the page; `kind` is what is asked for; `fields`
 * are the inputs whose text is kept while it is typed, by their name in what is sent, and `start(item)` is what stands in
 * them at first. */
export class Work {
  constructor(kind, show, fields, start = () => "") {
    Object.assign(this, { kind, show, fields, start });
    this.items = []; // fetched ahead, with the one on the screen
    this.current = null; // the one on the screen: what is said is said of it, whatever else goes wrong
    this.past = []; // the last few that were done, newest last, with what was said: undo without a connection
    this.clock = new Clock();
    this.doneAt = -Infinity;
    this.outbox = new Outbox(showProgress);
    this.leases = new Leases(() => this.held(), (ids, gone) => ids.forEach((id) => this.lose(id, gone)));
    this.windows = "BroadcastChannel" in globalThis ? new BroadcastChannel(`keel-${PERSON}`) : null;
    this.windows?.addEventListener("message", ({ data }) => this.lose(data, false));
    for (const [name, input] of Object.entries(fields)) input.addEventListener("input", () => this.typed(name, input));
    byId("again").addEventListener("click", () => this.fill());
    byId("flag").addEventListener("click", () => this.flag());
    byId("skip").addEventListener("click", () => this.skip());
    byId("undo").addEventListener("click", () => this.undo());
    // the second press of a slow double click means what stood there before
    const twice = (event) => event.detail > 1 && event.target.closest("#vote button:not(#undo, #flag, [data-again])") && event.stopPropagation();
    addEventListener("click", twice, { capture: true });
    addEventListener("online", () => this.fill());
    addEventListener("pageshow", ({ persisted }) => persisted && this.begin()); // what an old page shows may be gone
    showRefused();
    this.begin();
  }

  async begin() {
    this.items = [];
    this.leave();
    await this.leases.renew(); // what was being written when the tab went comes first
    this.fill();
  }

  /** Assignments that this page must not lose: those it has, and those of which something is being typed. */
  held() {
    return [...new Set([...this.items, ...draftsOf(this.kind)].map(({ id }) => id))];
  }

  /** Fetches until enough are here. */
  async fill() {
    if (this.filling) return;
    this.filling = true;
    clearTimeout(this.timer);
    try {
      await this.outbox.send(); // what was done already must not come again
      for (let tries = 0; tries < MOST_TRIES && this.items.length <= AHEAD; tries += 1) {
        const held = [...this.items.map(({ id }) => id), ...this.unsent()];
        const { item, progress, guideline } = await post("/api/next", { kind: this.kind, holding: held.slice(0, 8) });
        byId("changed").hidden = guideline === GUIDELINE;
        if (!this.outbox.count) {
          showProgress(progress);
          this.outbox.tell(null);
        }
        if (!item || this.items.some(({ id }) => id === item.id)) break;
        if (this.unsent().includes(item.id)) continue; // it was done while this was under way
        this.items.push(item);
        if (!this.current) this.display();
      }
      if (!this.current) this.blank(false);
    } catch (error) {
      this.outbox.tell(error);
      if (!this.current) this.blank(true);
      byId("waiting").textContent = "Nothing more is here to do until the server answers. This page goes on by itself.";
      this.timer = setTimeout(() => this.fill(), Math.max(3000, error.wait ?? 0));
    } finally {
      this.filling = false;
    }
  }

  /** Assignments of this kind whose judgement waits in the outbox. */
  unsent() {
    return this.outbox.letters.filter(({ about }) => !about?.kind || about.kind === this.kind).map(({ body }) => body.assignment);
  }

  /** Puts the first item on the screen. `said`: what was said of it before it was taken back. */
  display(said = this.items[0].said ?? {}) {
    const [item] = this.items;
    this.current = null; // until all of it stands there
    for (const place of ["waiting", "empty"]) byId(place).hidden = true;
    for (const place of ["item", "vote"]) byId(place).hidden = false;
    byId("messages").replaceChildren(...item.messages.map(bubble));
    item.prompt = byId("messages").lastElementChild?.querySelector(".text").textContent.trim().slice(0, 120) ?? "";
    this.show(item, said);
    const draft = draftOf(item.id);
    for (const [name, input] of Object.entries(this.fields)) input.value = draft[name] ?? said[name] ?? this.start(item);
    this.current = item;
    for (const input of Object.values(this.fields)) input.dispatchEvent(new Event("input"));
    scrollTo(0, 0);
    byId("prompt-h").focus({ preventScroll: true });
    this.clock.restart();
  }

  /** Takes the item off the screen and goes on with the next one. */
  leave() {
    this.leases.changed();
    if (this.current) this.items = this.items.filter(({ id }) => id !== this.current.id);
    this.current = null;
    if (this.items.length) this.display();
    else this.blank(true);
  }

  blank(waiting) {
    byId("item").hidden = true;
    byId("vote").hidden = true;
    byId("empty").hidden = waiting;
    byId("waiting").hidden = !waiting;
  }

  typed(name, input) {
    if (this.current) setDraft(this.current, name, input.value === this.start(this.current) ? null : input.value);
  }

  /** The item on the screen is done: keep and send what was said, and show the next one at once. True when it was.
   * `text`: what of it can be read, should the server refuse it. */
  done(path, body, what, text = body.text ?? body.reason ?? "") {
    const item = this.current;
    if (!item || !settled(this)) return false;
    this.doneAt = performance.now();
    const letter = { assignment: item.id, token: token(), ...body };
    const { kind, prompt } = item;
    this.outbox.add(path, letter, { kind, what, prompt, text });
    this.past = [...this.past, { item, said: { ...draftOf(item.id), ...body }, token: letter.token }].slice(-8);
    dropDraft(item.id);
    this.windows?.postMessage(item.id);
    this.leave();
    toast(what);
    this.fill();
    return true;
  }

  /** An item is its person's no longer (`gone`), or was done in another window. What was typed about it is kept in the
   * list. */
  lose(id, gone) {
    const shown = this.current?.id === id;
    if (shown && gone && LATE.includes(this.kind)) return; // it counts all the same
    const why = gone ? "It is yours no longer: it went to somebody else, or was taken out" : "It was done in another window";
    const draft = draftsOf(this.kind).find((one) => one.id === id);
    const item = this.items.find((one) => one.id === id) ?? draft;
    if (!item) return;
    const values = shown ? Object.values(this.fields).map(({ value }) => value) : Object.values(draft?.fields ?? {});
    const text = values.filter((value) => value.trim() && value !== (shown ? this.start(item) : "")).join("\n\n");
    if (text) refuse(`${id}`, { what: "What you were writing", prompt: item.prompt, text }, why);
    dropDraft(id);
    this.items = this.items.filter((one) => one.id !== id);
    if (shown) {
      this.leave();
      toast(why);
    }
    this.fill();
  }

  skip() {
    this.done("/api/skip", { kind: this.kind }, "Skipped");
  }

  async undo() {
    const last = this.past.at(-1);
    if (last && this.outbox.recall(last.token)) {
      this.past.pop();
      this.back(last.item, last.said);
      return;
    }
    try {
      await this.outbox.send();
      if (this.unsent().length) throw new TypeError("not sent yet");
      const assignment = last?.item.id; // named, so that an undo that is sent again takes back nothing else
      const { item, progress } = await post("/api/undo", { kind: this.kind, assignment });
      showProgress(progress);
      const known = this.past.find((one) => one.item.id === item?.id);
      this.past = this.past.filter((one) => one !== known && one !== last);
      if (item) this.back(item, known?.said ?? item.said);
      else toast("Nothing to take back");
    } catch (error) {
      toast(error.last ? error.message : "It may have been sent already: take it back when the server answers again");
    }
  }

  back(item, said) {
    this.leases.changed();
    this.items = [item, ...this.items.filter(({ id }) => id !== item.id)];
    this.doneAt = -Infinity;
    this.display(said);
    toast("Taken back");
  }

  flag() {
    const item = this.current;
    if (!item) return;
    const [dialog, text] = [byId("flagging"), byId("flag-text")];
    text.value = draftOf(item.id).flag ?? "";
    text.oninput = () => setDraft(item, "flag", text.value || null);
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.onclose = () => {
      if (dialog.returnValue !== "flag") return;
      const about = { kind: "flag", what: "Flag", prompt: item.prompt, text: text.value };
      this.outbox.add("/api/flag", { assignment: item.id, token: token(), text: text.value }, about);
      setDraft(item, "flag", null);
      toast("Flagged for the reviewers");
    };
  }
}

function bubble({ role, html }) {
  const message = document.createElement("div");
  message.className = `message ${role}`;
  const name = Object.assign(document.createElement("span"), { className: "vh", textContent: `${role}: ` });
  const text = Object.assign(document.createElement("div"), { className: "text", innerHTML: html });
  message.append(name, text);
  return message;
}

/** Calls handlers by key, but not while something is typed or a dialog is open. Escape leaves a field. */
export function keys(handlers) {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input:not([type=radio], [type=checkbox]), textarea, select");
    if (typing && event.key === "Escape") event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (document.querySelector("dialog[open]")) return;
    const handler = handlers[event.key.toLowerCase()];
    if (!handler) return;
    event.preventDefault();
    handler();
  });
}

export { GUIDELINE, Refused, byId };
