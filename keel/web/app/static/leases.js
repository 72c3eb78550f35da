// The page tells the server that it is still open: what it shows, and what it fetched ahead, is kept for its person.

import { LEASE, post } from "./wire.js";

const EVERY = Math.max(1000, Math.min(LEASE / 6, 300_000)); // a hidden tab's timers run once a minute at least
const LONGEST_IDLE = 2 * 3_600_000; // milliseconds since the last sign of the person; then the items may go to others

export class Leases {
  /** `ids()`: what is held here; `lost(ids, gone)`: what is done, or gone to others. */
  constructor(ids, lost) {
    this.ids = ids;
    this.lost = lost;
    this.changes = 0;
    this.sign = performance.now();
    for (const what of ["keydown", "pointerdown", "pointermove", "wheel", "scroll", "touchmove", "focus"]) {
      addEventListener(what, () => this.seen(), { passive: true, capture: true });
    }
    document.addEventListener("visibilitychange", () => document.hidden || this.seen());
    setInterval(() => performance.now() - this.sign < LONGEST_IDLE && this.renew(), EVERY);
  }

  seen() {
    const away = performance.now() - this.sign;
    this.sign = performance.now();
    if (away > LONGEST_IDLE) this.renew();
  }

  /** What is held here is another thing now: an answer that is on its way knows nothing of it. */
  changed() {
    this.changes += 1;
  }

  async renew() {
    const { changes } = this;
    const assignments = this.ids().slice(0, 16);
    if (!assignments.length) return;
    try {
      const { gone, done } = await post("/api/hold", { assignments });
      if (changes !== this.changes) return;
      this.lost(done, false);
      this.lost(gone, true);
    } catch {
      // no connection: the next time will do
    }
  }
}
