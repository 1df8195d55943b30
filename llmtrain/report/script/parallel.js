/* Parallel coordinates of a sweep: one line per trial; drag on an axis to keep part of the trials.

spec: {axes: [{name, title, values, log, categories}], trials, shades, labels, key, label}.
What is kept is told to the page as the event "trials": a set of trial numbers, or null for all. */
"use strict";

class ParallelPlot {
  constructor(place, spec) {
    this.place = place;
    this.spec = spec;
    this.kept = spec.axes.map(() => null);
    this.toolbar = element("div", {class: "legend"}, colorKey("r", ...spec.key));
    this.count = element("span", {class: "quiet", role: "status"});
    this.clear = element("button", {class: "tool", hidden: ""}, "all trials");
    this.clear.addEventListener("click", () => this.keep(-1, null));
    toolsOf(place).append(this.count, this.clear);
    place.before(this.toolbar);
    this.svg = add(place, "svg", {role: "group", "aria-label": spec.label});
    this.svg.addEventListener("pointermove", event => this.moved(event));
    this.svg.addEventListener("pointerdown", event => this.pressed(event));
    this.svg.addEventListener("pointerup", event => this.released(event));
    this.svg.addEventListener("pointercancel", () => { this.drag = null; });
    this.svg.addEventListener("pointerleave", () => { if (!this.drag) this.leave(); });
    plots.push(this);
    new ResizeObserver(() => this.draw(false)).observe(place);
  }

  inside(trial) {
    return this.kept.every((range, a) => {
      const value = this.spec.axes[a].values[trial];
      return !range || value !== null && value >= range[0] && value <= range[1];
    });
  }

  draw(always) {
    const width = Math.max(this.place.clientWidth, this.spec.axes.length * 96);
    if (!this.place.clientWidth || !always && width === this.width) return;
    this.width = width;
    const height = 330, top = 44, bottom = height - 24;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.style.width = `${width}px`;
    this.svg.setAttribute("height", height);
    const count = this.spec.axes.length, pad = 52;
    this.xs = this.spec.axes.map((_, i) => pad + i * (width - 2 * pad) / Math.max(1, count - 1));
    this.scales = this.spec.axes.map(axis => this.scaleOf(axis, bottom, top));
    const lines = add(this.svg, "g", {});
    this.spec.trials.forEach((_, trial) => this.line(lines, trial));
    this.spec.axes.forEach((axis, a) => this.axis(axis, a, top, bottom));
    this.cursor = add(this.svg, "g", {"pointer-events": "none"});
    this.place.dataset.drawn = this.svg.querySelectorAll(".mark").length;
  }

  scaleOf(axis, bottom, top) {
    if (axis.categories) return scale(-.3, axis.categories.length - .7, bottom, top, false);
    let [low, high] = extent(axis.values.filter(value => value !== null));
    if (low === high) [low, high] = axis.log ? [low / 2, high * 2] : [low - .5, high + .5];
    return scale(low, high, bottom, top, axis.log);
  }

  path(trial) {
    let pen = "M", path = "";
    this.spec.axes.forEach((axis, a) => {
      const value = axis.values[trial];
      if (value === null) { pen = "M"; return; }
      path += `${pen}${this.xs[a].toFixed(1)} ${this.scales[a].at(value).toFixed(1)}`;
      pen = "L";
    });
    return path;
  }

  line(group, trial) {
    const shade = this.spec.shades[trial], kept = this.inside(trial);
    add(group, "path", {d: this.path(trial), fill: "none", class: "mark",
      stroke: kept ? shade === null ? "var(--faint)" : ramp("r", shade) : "var(--lost)",
      "stroke-width": kept ? 1.8 : 1, "stroke-opacity": kept ? .85 : .45,
      "stroke-dasharray": shade === null ? "4 3" : "none"});
  }

  axis(axis, a, top, bottom) {
    const x = this.xs[a], group = add(this.svg, "g", {tabindex: 0, role: "group", class: "brush",
      "aria-label": `${axis.title}: arrow keys keep fewer trials, Escape keeps all`});
    add(group, "title", {}, axis.title);
    add(group, "rect", {x: x - 16, y: top - 8, width: 32, height: bottom - top + 16,
                        fill: "transparent"});
    add(group, "line", {x1: x, x2: x, y1: top, y2: bottom, stroke: "var(--faint)"});
    const name = axis.name.length > 14 ? axis.name.slice(0, 13) + "…" : axis.name;
    add(group, "text", {x, y: 16, "text-anchor": "middle", class: "name"}, name);
    const last = a === this.xs.length - 1;
    const at = axis.categories ? axis.categories.map((_, i) => i)
                               : axis.ticks || this.scales[a].ticks(5);
    let before = 1e9;
    for (const tick of at) {
      if (before - this.scales[a].at(tick) < 13) continue;
      before = this.scales[a].at(tick);
      const text = axis.categories ? axis.categories[tick] : axis.ticks ? shown(tick) : shown(tick, 3);
      add(group, "line", {x1: x - 3, x2: x + 3, y1: this.scales[a].at(tick),
                          y2: this.scales[a].at(tick), stroke: "var(--faint)"});
      add(group, "text", {x: last ? x + 8 : x - 8, y: this.scales[a].at(tick) + 4, class: "halo",
                          "text-anchor": last ? "start" : "end"},
          text.length > 12 ? text.slice(0, 11) + "…" : text);
    }
    if (this.kept[a]) {
      const ends = this.kept[a].map(value => this.scales[a].at(value));
      add(group, "rect", {x: x - 7, y: ends[1], width: 14, height: Math.max(2, ends[0] - ends[1]),
                          class: "selection", rx: 3});
    }
    group.addEventListener("keydown", event => this.key(event, a));
  }

  /* The axis of a keyboard: up raises the lower end, down lowers the upper end. */
  key(event, a) {
    const scaled = this.scales[a], [low, high] = this.kept[a] || [scaled.low, scaled.high];
    const step = (scaled.at(scaled.low) - scaled.at(scaled.high)) / 20;
    if (event.key === "ArrowUp") this.keep(a, [scaled.back(scaled.at(low) - step), high]);
    else if (event.key === "ArrowDown") this.keep(a, [low, scaled.back(scaled.at(high) + step)]);
    else if (event.key === "Escape") this.keep(a, null);
    else return;
    event.preventDefault();
    this.svg.querySelectorAll(".brush")[a].focus();
  }

  /* Keep the trials within a range of an axis; a = -1 keeps all trials again. */
  keep(a, range, dragging) {
    if (a < 0) this.kept.fill(null);
    else this.kept[a] = range && range[0] <= range[1] ? range : null;
    const some = this.kept.some(Boolean), {trials} = this.spec;
    const inside = trials.filter((_, trial) => this.inside(trial));
    this.clear.hidden = !some;
    this.count.textContent = some ? `${inside.length} of ${trials.length} trials` : "";
    this.draw(true);
    this.told = some ? new Set(inside) : null;
    if (!dragging) document.dispatchEvent(new CustomEvent("trials", {detail: this.told}));
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  pressed(event) {
    const [x, y] = this.point(event);
    const a = this.xs.findIndex(at => Math.abs(at - x) <= 16);
    if (a < 0) return this.hover(x, y);
    this.drag = {a, from: y};
    this.svg.setPointerCapture(event.pointerId);
    return this.leave();
  }

  moved(event) {
    const [x, y] = this.point(event);
    if (this.drag) this.range(y);
    else this.hover(x, y);
  }

  range(y) {
    const {a, from} = this.drag, scaled = this.scales[a];
    if (Math.abs(y - from) < 4) return;
    this.drag.far = true;
    this.keep(a, [scaled.back(Math.max(y, from)), scaled.back(Math.min(y, from))], true);
  }

  released() {
    if (this.drag?.far) document.dispatchEvent(new CustomEvent("trials", {detail: this.told}));
    else if (this.drag) this.keep(this.drag.a, null);
    this.drag = null;
  }

  hover(x, y) {
    const right = this.xs.findIndex(at => at >= x);
    const b = right < 0 ? this.xs.length - 1 : Math.max(right, Math.min(1, this.xs.length - 1));
    const a = Math.max(0, b - 1);
    const share = b > a ? (x - this.xs[a]) / (this.xs[b] - this.xs[a]) : 0;
    let best = -1, least = 30;
    this.spec.trials.forEach((_, trial) => {
      const [from, to] = [a, b].map(i => this.spec.axes[i].values[trial]);
      if (from === null && to === null || !this.inside(trial)) return;
      const start = this.scales[a].at(from ?? to), end = this.scales[b].at(to ?? from);
      const far = Math.abs(start + (end - start) * share - y);
      if (far < least) [best, least] = [trial, far];
    });
    if (best < 0) return this.leave();
    this.cursor.replaceChildren();
    add(this.cursor, "path", {d: this.path(best), fill: "none", stroke: "var(--ink)",
                              "stroke-width": 3});
    const lines = this.spec.axes.map(axis => {
      const value = axis.values[best];
      return [null, axis.title, axis.categories ? axis.categories[value] ?? "–" : shown(value, 5)];
    });
    const box = this.svg.getBoundingClientRect();
    return showTip(this.spec.labels[best], lines, box.left + x, box.top + y);
  }

  leave() {
    hideTip();
    this.cursor?.replaceChildren();
  }
}
