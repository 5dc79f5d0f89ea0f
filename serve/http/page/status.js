// What the server is doing: asked once a second while somebody looks.

import { get } from "/page/api.js";
import { element, percent } from "/page/conversation.js";
import { Plot } from "/page/plot.js";

const PERIOD_MS = 1000;
const KEPT_S = 300;
// Counts of one second are few: what is plotted is over the last five.
const SPAN_S = 5.5;

export class Status {
  constructor({ model, health, numbers, plots }) {
    Object.assign(this, { model, health, numbers, plots });
    this.samples = [];
    this.points = [];
    this.timer = null;
    this.lines = null;
    document.addEventListener("visibilitychange", () => this.resume());
    this.resume();
  }

  /** Asks now, and again every second; with another key, after a silence, or after having been hidden. */
  resume() {
    clearTimeout(this.timer);
    this.turn = {};
    if (!document.hidden) this.#poll(this.turn);
  }

  async #poll(turn) {
    const asked = performance.now();
    let again = true;
    try {
      const info = await get("/get_server_info");
      if (turn !== this.turn) return;
      this.#take(info, performance.now() / 1000);
      this.#say("", false);
    } catch (error) {
      if (turn !== this.turn) return;
      this.#say(error.message, true);
      // Every second would only fill the server's log.
      again = !error.isAboutKey;
    }
    if (again) this.timer = setTimeout(() => this.#poll(turn), Math.max(100, PERIOD_MS - (performance.now() - asked)));
  }

  #say(text, isBad) {
    if (this.health.textContent !== text) this.health.textContent = text;
    this.health.classList.toggle("bad", isBad);
  }

  #take(info, time) {
    const { stats, method } = info;
    this.model.textContent = `${info.served_model_name} · ${method.name}, stride ${method.stride}`;
    this.#show(info);
    const { num_committed: committed, tally } = stats;
    const sample = { time, committed, forwards: tally.forwards, accepted: tally.accepted, verified: tally.verified };
    // A server that was started again counts from zero.
    if (committed < (this.samples.at(-1)?.committed ?? 0)) this.samples = [];
    this.samples = [...this.samples.filter((each) => time - each.time < SPAN_S), sample];
    this.points = [...this.points.filter((each) => time - each.time < KEPT_S), point(this.samples[0], sample)];
    this.#draw(method.stride, time);
  }

  #show(info) {
    const { stats } = info;
    const pages = info.num_pages - 1;
    const used = pages - stats.num_free_pages;
    const rows = {
      Running: `${stats.num_running} of ${info.max_running_requests}`,
      Waiting: `${stats.num_waiting} of ${info.max_queued_requests}`,
      "Pages in use": `${used} of ${pages} (${percent(used, pages)})`,
      "Pages kept for prefixes": `${stats.num_cached_pages}`,
      "Prefix-cache hits": percent(stats.num_cached_tokens, stats.num_prompt_tokens),
      "Tokens per forward": stats.tally.forwards ? (stats.num_committed / stats.tally.forwards).toFixed(2) : "–",
      "Tokens so far": stats.num_committed.toLocaleString("en"),
      "Context length": info.context_length.toLocaleString("en"),
    };
    if (this.numbers.childElementCount === 0) {
      for (const name of Object.keys(rows)) this.numbers.append(element("dt", "", name), element("dd"));
    }
    const places = this.numbers.querySelectorAll("dd");
    Object.values(rows).forEach((text, index) => (places[index].textContent = text));
  }

  #draw(stride, time) {
    if (this.lines?.stride !== stride) {
      const rate = new Plot("Tokens per second", { show: (value) => value.toFixed(value < 10 ? 1 : 0), seconds: KEPT_S });
      const per = new Plot("Tokens per forward", {
        least: stride > 1 ? 1 : 0,
        most: Math.max(stride, 1),
        show: (value) => String(Number(value.toFixed(2))),
        seconds: KEPT_S,
      });
      const accepted = new Plot("Drafts accepted, by depth", { most: 1, show: (value) => percent(value, 1), seconds: KEPT_S });
      // Plain AR drafts nothing.
      const plots = stride > 1 ? [rate, per, accepted] : [rate, per];
      this.lines = { stride, plots };
      this.plots.replaceChildren(...plots.map((plot) => plot.figure));
    }
    const [rate, per, accepted] = this.lines.plots;
    const of = (name) => this.points.map((each) => ({ time: each.time, values: each[name] }));
    rate.draw(of("rate"), time);
    per.draw(of("perForward"), time);
    accepted?.draw(of("accepted"), time);
  }
}

/** What happened from one sample to another. */
function point(first, last) {
  const time = last.time;
  const committed = last.committed - first.committed;
  const forwards = last.forwards - first.forwards;
  const shares = last.verified.map((count, depth) => {
    const verified = count - (first.verified[depth] ?? 0);
    return verified > 0 ? (last.accepted[depth] - (first.accepted[depth] ?? 0)) / verified : null;
  });
  return {
    time,
    rate: [time > first.time ? committed / (time - first.time) : null],
    perForward: [forwards > 0 ? committed / forwards : null],
    accepted: shares,
  };
}
