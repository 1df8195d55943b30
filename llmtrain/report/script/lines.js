/* Lines and dots over a horizontal axis: curves of runs, values of trials, fits.

spec: {series, label, axes, link, quiet, zero, tall, unit, marks, bands, categories, log, near, key}.
A series: {name, color | shade, points: [[x, y, other axes ...]], faint, dash, dots, line, labels,
trial; trials, shades, best by point}. */
"use strict";

class LinePlot extends Plot {
  constructor(place, spec) {
    super(place, spec);
    this.hidden = new Set();
    this.chosen = null;
    /* One point at a time is read where a common x says little, or series are many. */
    this.single = spec.near || spec.series.length > 12;
    if (spec.series.length > 1 && !spec.key && !spec.quiet) this.legend();
    if (spec.key) this.toolbar.prepend(colorKey("r", ...spec.key));
    document.addEventListener("trials", event => {
      this.chosen = event.detail;
      if (spec.series.some(series => series.trial !== undefined)) this.draw(true);
    });
  }

  canLog(which) {
    if (which === "x" && (this.spec.link || this.spec.categories)) return false;
    const column = which === "x" ? 0 : 1;
    let least = Infinity, most = 0;
    for (const series of this.spec.series) {
      for (const point of series.points) {
        if (point[column] === null) continue;
        least = Math.min(least, point[column]);
        most = Math.max(most, point[column]);
      }
    }
    return least > 0 && most > least;
  }

  legend() {
    const buttons = this.spec.series.map(series => {
      const look = series.line === false ? "swatch dot" : series.dash ? "swatch dash" : "swatch";
      const swatch = element("i", {class: look,
        style: `--color:${colorOf(series)};opacity:${series.faint ? .35 : 1}`});
      const button = element("button", {"aria-pressed": "true"}, swatch, series.name);
      button.addEventListener("click", event => this.toggle(series.name, event.shiftKey));
      return button;
    });
    this.toolbar.prepend(...buttons);
    this.buttons = buttons;
  }

  /* Hide or show a series; with shift show it alone. Hiding the last one shows all. */
  toggle(name, alone) {
    const names = this.spec.series.map(series => series.name);
    if (alone) this.hidden = new Set(names.filter(other => other !== name));
    else if (!this.hidden.delete(name)) this.hidden.add(name);
    if (names.every(other => this.hidden.has(other))) this.hidden.clear();
    this.buttons?.forEach((button, i) =>
      button.setAttribute("aria-pressed", String(!this.hidden.has(names[i]))));
    this.draw(true);
  }

  visible() {
    return this.spec.series.filter(series => series.points.length &&
      !this.hidden.has(series.name) &&
      (!this.chosen || series.trial === undefined || this.chosen.has(series.trial)));
  }

  paint() {
    const column = this.column;
    this.shown = this.visible();
    if (!this.shown.length) this.shown = this.spec.series.filter(s => s.points.length).slice(0, 1);
    if (!this.shown.length) {
      add(this.svg, "text", {x: 12, y: 30}, "nothing was logged");
      this.xScale = null;
      return;
    }
    this.sorted = new Map(this.shown.map(s => [s, s.points.filter(p => p[1] !== null)]));
    const [low, high] = this.range(column);
    const yScale = scale(low, high, this.height - 38, 10, this.logY);
    const labels = yScale.ticks(this.spec.tall ? 7 : 5).map(t => [t, shown(t)]);
    this.setBox(6.6 * Math.max(...labels.map(([, text]) => text.length)));
    const {left, right} = this.box;
    this.xScale = scale(...(this.zoom || this.whole), left, right, this.logX);
    this.yScale = yScale;
    this.shade();
    for (const [tick, text] of labels) {
      const y = yScale.at(tick);
      add(this.svg, "line", {x1: left, x2: right, y1: y, y2: y, stroke: "var(--grid)"});
      add(this.svg, "text", {x: left - 8, y: y + 4, "text-anchor": "end"}, text);
    }
    this.horizontal();
    this.marks();
    const clip = this.clip();
    for (const series of this.shown) this.line(series, clip);
    this.spikes(low, high);
  }

  /* Sets this.whole, the range of x without zoom; returns the range of y in sight. */
  range(column) {
    const names = this.spec.categories;
    const xs = [...this.sorted.values()].flatMap(points => points.map(p => p[column]));
    let [first, last] = names ? [-.4, names.length - .6] : extent(xs);
    if (this.logX) [first, last] = [first / 1.12, last * 1.12];
    else if (this.spec.near && !names) {
      const pad = (last - first || Math.abs(last) || 1) * .04;
      [first, last] = [first - pad, last + pad];
    } else if (this.spec.link) first = Math.min(first, 0);
    if (first === last) [first, last] = [first - .5, last + .5];
    this.whole = [first, last];
    const [from, to] = this.zoom || this.whole;
    let ys = [...this.sorted.values()].flatMap(points =>
      points.filter(p => p[column] >= from && p[column] <= to).map(p => p[1]));
    if (!ys.length) ys = [...this.sorted.values()].flatMap(points => points.map(p => p[1]));
    let [low, high] = extent(ys);
    if (this.logY) return [low / 1.06, high * 1.06];
    if (this.spec.zero && !this.zoom) return [Math.min(0, low), high * 1.06 || 1];
    /* A few wild values must not flatten the rest; zoomed in they are shown whole. */
    const most = quantile(ys, .985), span = most - low;
    if (!this.zoom && !this.spec.near && high > most + .6 * span && span > 0) {
      high = most + .3 * span;
    }
    const pad = (high - low || Math.abs(high) || 1) * .06;
    return [low - pad, high + pad];
  }

  /* Where a step lies on the axis that is shown. */
  stepAt(step) {
    if (!this.axis) return this.xScale.at(step);
    const points = this.spec.series.reduce((a, b) => b.points.length > a.points.length ? b : a).points;
    return this.xScale.at(points[near(points, step, 0)][this.column]);
  }

  shade() {
    const {left, right, top, bottom} = this.box;
    for (const [from, to] of this.spec.bands || []) {
      const x = Math.max(left, this.stepAt(from)), end = Math.min(right, this.stepAt(to));
      if (end > x) add(this.svg, "rect", {x, y: top, width: end - x, height: bottom - top,
                                          fill: "var(--band)"});
    }
  }

  marks() {
    let labelled = -1e9;
    const {left, right, top, bottom} = this.box;
    for (const [step, text, bad] of this.spec.marks || []) {
      const x = this.stepAt(step);
      if (x < left - .5 || x > right + .5) continue;
      const color = bad ? "var(--bad)" : "var(--faint)";
      const line = add(this.svg, "line", {x1: x, x2: x, y1: top, y2: bottom, stroke: color,
                                          "stroke-dasharray": "3 3"});
      add(line, "title", {}, `${text}, step ${step.toLocaleString("en-US")}`);
      if (!this.spec.tall || x - labelled < 74) continue;
      labelled = x;
      const end = x > this.width - 90;
      add(this.svg, "text", {x: x + (end ? -5 : 5), y: top + 10, class: bad ? "bad" : "",
                             "text-anchor": end ? "end" : "start"}, text);
    }
  }

  path(points) {
    const column = this.column;
    return points.map((p, i) => (i ? "L" : "M") + this.xScale.at(p[column]).toFixed(1) + " " +
                                this.yScale.at(p[1]).toFixed(1)).join("");
  }

  line(series, clip) {
    const points = this.sorted.get(series), color = colorOf(series), thin = this.shown.length > 12;
    if (series.line !== false && points.length > 1) {
      add(this.svg, "path", {d: this.path(points), fill: "none", stroke: color, class: "mark",
        "stroke-width": series.faint || thin ? 1.1 : 2, "stroke-dasharray": series.dash ? "5 4" : "none",
        "stroke-opacity": series.faint ? .38 : thin ? .75 : 1,
        "stroke-linejoin": "round", "stroke-linecap": "round", "clip-path": clip});
    }
    if (!series.dots && points.length > 1) return;
    points.forEach((p, i) => {
      if (this.chosen && series.trials && !this.chosen.has(series.trials[i])) return;
      const own = series.shades ? ramp("r", series.shades[i]) : color;
      const best = series.best === i;
      add(this.svg, "circle", {cx: this.xScale.at(p[this.column]).toFixed(1),
        cy: this.yScale.at(p[1]).toFixed(1), r: best ? 6 : series.shades ? 4.5 : 3.2, class: "mark",
        fill: series.shades || series.line === false ? own : "var(--card)",
        stroke: best ? "var(--ink)" : series.shades ? "var(--card)" : own,
        "stroke-width": best || !series.shades ? 2 : 1, "clip-path": clip});
    });
  }

  /* Small triangles where values lie above what is shown. */
  spikes(low, high) {
    let last = -1e9;
    for (const series of this.shown) {
      if (series.faint && this.shown.length > 12) continue;
      for (const p of this.sorted.get(series)) {
        const x = this.xScale.at(p[this.column]);
        if (p[1] <= high || x < this.box.left || x > this.box.right || x - last < 5) continue;
        last = x;
        add(this.svg, "path", {d: `M${x - 4} ${this.box.top + 1}h8l-4 -7z`, fill: colorOf(series)});
      }
      last = -1e9;
    }
  }

  read(x, y) {
    if (!this.xScale) return;
    if (this.single) this.readNearest(x, y);
    else this.readAll(this.xScale.back(x), y);
  }

  readNearest(x, y) {
    const column = this.column;
    let best = null, least = Infinity;
    for (const series of this.shown) {
      const points = this.sorted.get(series);
      if (!points.length) continue;
      const middle = this.spec.near ? 0 : near(points, this.xScale.back(x), column);
      const [from, to] = this.spec.near ? [0, points.length] : [middle, middle + 1];
      for (let i = from; i < to; i++) {
        const far = Math.hypot((this.xScale.at(points[i][column]) - x) / (this.spec.near ? 1 : 4),
                               this.yScale.at(points[i][1]) - y);
        if (far < least) [best, least] = [[series, i], far];
      }
    }
    if (best) this.readPoint(...best);
  }

  readPoint(series, index) {
    const points = this.sorted.get(series), p = points[index], column = this.column;
    const x = this.xScale.at(p[column]), y = this.yScale.at(p[1]);
    this.at = index;
    this.lead = series;
    this.cursor.replaceChildren();
    if (this.shown.length > 12) {
      add(this.cursor, "path", {d: this.path(points), fill: "none", stroke: "var(--ink)",
                                "stroke-width": 2.5, "stroke-opacity": .85});
    }
    add(this.cursor, "circle", {cx: x, cy: y, r: 5, fill: colorOf(series), stroke: "var(--ink)",
                                "stroke-width": 2});
    const names = this.spec.categories, where = names ? names[Math.round(p[column])] : placed(p[column]);
    const value = `${shown(p[1], 5)}${this.spec.unit || ""}`;
    this.say(series.labels?.[index] || series.name,
             [[null, this.axes[this.axis], where], [null, this.spec.y || "value", value]], x, y);
  }

  readAll(at, y) {
    const column = this.column, series = this.shown.filter(s => this.sorted.get(s).length);
    this.lead = series.reduce((a, b) => this.sorted.get(b).length > this.sorted.get(a).length ? b : a);
    const points = this.sorted.get(this.lead);
    this.at = near(points, at, column);
    const here = points[this.at][column], x = this.xScale.at(here);
    const {top, bottom, left, right} = this.box;
    this.cursor.replaceChildren();
    add(this.cursor, "line", {x1: x, x2: x, y1: top, y2: bottom, stroke: "var(--faint)"});
    const lines = [], loose = (this.xScale.high - this.xScale.low) * .01;
    for (const one of series) {
      const own = this.sorted.get(one), p = own[near(own, here, column)];
      const px = this.xScale.at(p[column]);
      if (px >= left - 1 && px <= right + 1) {
        add(this.cursor, "circle", {cx: px, cy: Math.max(top, this.yScale.at(p[1])), r: 4,
                                    fill: colorOf(one), stroke: "var(--card)", "stroke-width": 2});
      }
      const where = Math.abs(p[column] - here) <= loose ? "" : ` (at ${placed(p[column])})`;
      lines.push([colorOf(one), one.name + where, shown(p[1]) + (this.spec.unit || "")]);
    }
    this.say(`${this.axes[this.axis]} ${placed(here)}`, lines, x, y);
  }

  walk(right, up) {
    if (!this.xScale) return;
    const lead = this.lead && this.shown.includes(this.lead) ? this.lead : this.shown[0];
    if (this.single) {
      const next = this.shown[(this.shown.indexOf(lead) + up + this.shown.length) % this.shown.length];
      const last = this.sorted.get(next).length - 1;
      this.readPoint(next, Math.max(0, Math.min(last, (this.at ?? -1) + right)));
      return;
    }
    const points = this.sorted.get(lead);
    const next = Math.max(0, Math.min(points.length - 1, (this.at ?? -1) + right));
    if (points.length) this.readAll(points[next][this.column], 60);
  }
}
