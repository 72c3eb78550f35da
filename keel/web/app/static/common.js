// What the working pages share: requests that outlive a lost connection, the queue of items fetched ahead, the clock.

const meta = (name) => document.querySelector(`meta[name="${name}"]`).content;
const byId = (id) => document.getElementById(id);
const GUIDELINE = document.querySelector('meta[name="guideline"]')?.content ?? null; // the version this page was made with
const OUTBOX = `keel-outbox-${meta("person")}`;
const SETTLED = 250; // milliseconds: what comes sooner after a vote is its key or tap again, not a word on the next item
const AHEAD = 3; // items fetched ahead: enough for a tunnel, few enough to keep nobody waiting for them

export const token = () => crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

export function toast(text) {
  const place = byId("toast");
  place.textContent = text;
  place.classList.remove("fresh");
  void place.offsetWidth; // restarts the animation
  place.classList.add("fresh");
}

// ------------------------------------------------------------------------------------------------------ requests

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The answer's JSON. Throws Refused when the server said no, TypeError when there is no connection. */
export async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF": meta("csrf") },
    body: JSON.stringify(body),
  });
  if (answer.ok) return answer.json();
  let said = "";
  try {
    said = (await answer.json()).error;
  } catch {
    said = answer.statusText;
  }
  throw new Refused(answer.status, said);
}

/** Whether it makes sense to send the same again later. */
const passing = (error) => !(error instanceof Refused) || error.status >= 500 || [401, 429].includes(error.status);

// ------------------------------------------------------------------------------------- the outbox: kept, then sent

const load = () => {
  try {
    return JSON.parse(localStorage.getItem(OUTBOX) ?? "[]");
  } catch {
    return [];
  }
};
const save = (letters) => localStorage.setItem(OUTBOX, JSON.stringify(letters));

export class Outbox {
  constructor(onProgress) {
    this.onProgress = onProgress;
    this.sending = null;
    this.pause = 1000;
    addEventListener("online", () => this.send());
    addEventListener("storage", (event) => event.key === OUTBOX && this.tell());
    this.send();
  }

  get waiting() {
    return load().length;
  }

  /** Keeps a letter, then tries to send all that wait, oldest first. */
  add(path, body) {
    save([...load(), { path, body }]);
    return this.send();
  }

  /** Takes the newest letter back if it was not sent: true when it could. */
  recall(assignment) {
    const letters = load();
    const last = letters.at(-1);
    if (this.sending && letters.length === 1) return false; // it is on its way
    if (!last || last.body.assignment !== assignment) return false;
    save(letters.slice(0, -1));
    this.tell();
    return true;
  }

  send() {
    this.sending ??= this.sendAll().finally(() => (this.sending = null));
    return this.sending;
  }

  async sendAll() {
    clearTimeout(this.timer);
    for (let letters = load(); letters.length; letters = load()) {
      const [{ path, body }] = letters;
      try {
        const answer = await post(path, body);
        if (answer.progress) this.onProgress(answer.progress);
      } catch (error) {
        if (passing(error)) {
          this.tell(error);
          this.timer = setTimeout(() => this.send(), this.pause);
          this.pause = Math.min(this.pause * 2, 30_000);
          return;
        }
        toast(error.message); // the server will never take it: an item that went to somebody else, for example
      }
      // by its token, not by its place: another window may have sent it, too
      save(load().filter((letter) => letter.body.token !== body.token || letter.body.assignment !== body.assignment));
      this.pause = 1000;
    }
    this.tell();
  }

  tell(error) {
    const place = byId("offline");
    const count = this.waiting;
    place.hidden = !count || !error;
    if (place.hidden) return;
    const what = `${count} ${count === 1 ? "judgement is" : "judgements are"} kept in this browser`;
    if (error instanceof Refused && error.status === 401) {
      place.innerHTML = "";
      const link = Object.assign(document.createElement("a"), { href: "/sign-in", textContent: "Sign in again" });
      place.append(`${what}. `, link, " to send them.");
    } else {
      place.textContent = `No connection. ${what} and will be sent when it is back.`;
    }
  }
}

// ------------------------------------------------------------------------------------------------ items and time

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
    return Math.round(this.sum + (document.hidden ? 0 : performance.now() - this.since)) / 1000;
  }
}

export function showProgress({ today, done, wanted }) {
  byId("progress").hidden = false;
  byId("today").textContent = today;
  byId("project").textContent = `${done.toLocaleString("en")} of ${wanted.toLocaleString("en")}`;
  byId("done").max = Math.max(1, wanted);
  byId("done").value = done;
}

/** A page that shows one item after another. `show(item, said)` fills the page; `kind` is what is asked for. */
export class Work {
  constructor(kind, show) {
    this.kind = kind;
    this.show = show;
    this.items = []; // fetched ahead; the first is on the screen
    this.past = []; // the last few that were done, newest last, with what was said: undo without a connection
    this.clock = new Clock();
    this.doneAt = -Infinity;
    this.outbox = new Outbox(showProgress);
    byId("again").addEventListener("click", () => this.fill());
    byId("flag").addEventListener("click", () => this.flag());
    byId("skip").addEventListener("click", () => this.skip());
    byId("undo").addEventListener("click", () => this.undo());
    this.fill();
  }

  get current() {
    return this.items[0] ?? null;
  }

  /** Fetches until enough are here. */
  async fill() {
    if (this.filling) return;
    this.filling = true;
    try {
      await this.outbox.send(); // what was done already must not come again
      while (this.items.length <= AHEAD) {
        const held = [...this.items, ...this.unsent()].map((item) => item.id);
        const { item, progress, guideline } = await post("/api/next", { kind: this.kind, holding: held.slice(0, 8) });
        byId("changed").hidden = guideline === GUIDELINE;
        if (!this.outbox.waiting) showProgress(progress);
        if (!item || this.items.some((one) => one.id === item.id)) break;
        this.items.push(item);
        if (this.items.length === 1) this.display();
      }
      if (!this.current) this.blank(false);
    } catch (error) {
      if (error instanceof Refused && error.status === 401) location.href = "/sign-in";
      if (!this.current) this.blank(true);
      setTimeout(() => this.fill(), 3000);
    } finally {
      this.filling = false;
    }
  }

  /** Assignments whose judgement waits in the outbox. */
  unsent() {
    return load().map((letter) => ({ id: letter.body.assignment }));
  }

  /** `said`: what was said of it before it was taken back. */
  display(said = {}) {
    byId("waiting").hidden = true;
    byId("empty").hidden = true;
    byId("item").hidden = false;
    byId("vote").hidden = false;
    const talk = byId("messages");
    talk.replaceChildren(...this.current.messages.map(bubble));
    this.show(this.current, said);
    scrollTo(0, 0);
    byId("prompt-h").focus({ preventScroll: true });
    this.clock.restart();
  }

  blank(offline) {
    byId("item").hidden = true;
    byId("vote").hidden = true;
    byId("empty").hidden = offline;
    byId("waiting").hidden = !offline;
    if (offline) byId("waiting").textContent = "No connection, and nothing fetched ahead. This page goes on by itself.";
  }

  /** The item on the screen is done: keep and send what was said, and show the next one at once. */
  done(path, body, said) {
    if (performance.now() - this.doneAt < SETTLED) return;
    this.doneAt = performance.now();
    const item = this.items.shift();
    this.past = [...this.past, { item, body }].slice(-8);
    this.outbox.add(path, { assignment: item.id, token: token(), ...body });
    toast(said);
    if (this.current) this.display();
    else this.blank(!navigator.onLine);
    this.fill();
  }

  skip() {
    if (this.current) this.done("/api/skip", { kind: this.kind, token: undefined }, "Skipped");
  }

  async undo() {
    const last = this.past.at(-1);
    if (last && this.outbox.recall(last.item.id)) {
      this.past.pop();
      this.back(last.item, last.body);
      return;
    }
    try {
      await this.outbox.send();
      const { item, progress } = await post("/api/undo", { kind: this.kind });
      showProgress(progress);
      const known = this.past.find((one) => one.item.id === item?.id);
      this.past = this.past.filter((one) => one !== known);
      if (item) this.back(item, known?.body);
      else toast("Nothing to take back");
    } catch (error) {
      toast(error instanceof Refused ? error.message : "No connection: that one was sent already");
    }
  }

  back(item, said) {
    this.items = [item, ...this.items.filter((one) => one.id !== item.id)];
    this.doneAt = -Infinity;
    this.display(said);
    toast("Taken back");
  }

  flag() {
    if (!this.current) return;
    const dialog = byId("flagging");
    byId("flag-text").value = "";
    dialog.returnValue = "cancel";
    dialog.showModal();
    const { id } = this.current;
    dialog.onclose = () => {
      if (dialog.returnValue !== "flag") return;
      this.outbox.add("/api/flag", { assignment: id, token: token(), text: byId("flag-text").value });
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
    const typing = event.target.matches("input:not([type=radio]), textarea, select");
    if (typing && event.key === "Escape") event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (document.querySelector("dialog[open]")) return;
    const handler = handlers[event.key.toLowerCase()];
    if (!handler) return;
    event.preventDefault();
    handler();
  });
}

export { GUIDELINE, byId };
