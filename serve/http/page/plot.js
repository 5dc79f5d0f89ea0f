// Lines over the last minutes, drawn as SVG paths.

const WIDTH = 300;
const HEIGHT = 60;
const STROKES = ["", "second", "third", "later"];

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** The next of 1, 2, 5, 10, 20, ... that is at least `value`. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value) ?? 10 * power;
}

export class Plot {
  /** `least`, `most`: ends of the axis; without `most` it grows with the values. `show` makes words of one value. */
  constructor(title, { least = 0, most = null, show, seconds }) {
    Object.assign(this, { title, least, most, show, seconds });
    this.figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = `${title} `;
    this.now = document.createElement("output");
    caption.append(this.now);
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    const axis = document.createElement("div");
    axis.className = "axis";
    this.range = document.createElement("span");
    const ends = document.createElement("span");
    ends.textContent = `last ${seconds / 60} minutes`;
    axis.append(this.range, ends);
    this.figure.append(caption, this.svg, axis);
  }

  /** `points`: {time, values}, in order, times in seconds; a value of null and a hole in time break the line. */
  draw(points, now) {
    const values = points.flatMap((point) => point.values).filter((value) => value !== null);
    const most = this.most ?? ceiling(Math.max(0, ...values));
    const x = (time) => WIDTH * (1 - (now - time) / this.seconds);
    const y = (value) => HEIGHT - 2 - ((HEIGHT - 4) * (value - this.least)) / (most - this.least);
    const grid = svg("path", { class: "grid", d: `M0 ${y(most)}H${WIDTH}M0 ${y((most + this.least) / 2)}H${WIDTH}` });
    const numLines = Math.max(0, ...points.map((point) => point.values.length));
    const lines = Array.from({ length: numLines }, (_, index) =>
      svg("path", { class: STROKES[Math.min(index, STROKES.length - 1)], d: this.#line(points, index, x, y) }),
    );
    this.svg.replaceChildren(grid, ...lines);
    const latest = (points.at(-1)?.values ?? []).map((value) => (value === null ? "–" : this.show(value))).join(" · ");
    this.now.textContent = latest || "–";
    this.range.textContent = `${this.show(this.least)} to ${this.show(most)}`;
    this.svg.setAttribute("aria-label", `${this.title}: now ${latest || "unknown"}`);
  }

  #line(points, index, x, y) {
    let path = "";
    let last = null;
    for (const { time, values } of points) {
      const value = values[index] ?? null;
      if (value !== null) path += `${last !== null && time - last < 3.5 ? "L" : "M"}${x(time).toFixed(1)} ${y(value).toFixed(1)}`;
      last = value === null ? null : time;
    }
    return path;
  }
}
