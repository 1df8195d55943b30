/* A plot with axes: drawing again when its width changes, zoom by dragging, log switch, keys.

A kind of plot gives paint() (draw everything), read(x, y) (the read-out at a pixel) and
walk(right, up) (the read-out moved by keys). Plots with the same link share zoom and axis. */
"use strict";
const plots = [];

/* The place for switches beside the title of a plot's card. */
function toolsOf(place) {
  const title = place.closest(".card").querySelector("h2"), tools = element("div", {class: "tools"});
  const head = element("div", {class: "head"});
  title.replaceWith(head);
  head.append(title, tools);
  return tools;
}

class Plot {
  constructor(place, spec) {
    this.place = place;
    this.spec = spec;
    this.axes = spec.axes || [spec.x || "step"];
    this.axis = 0;
    this.zoom = null;
    this.logX = (spec.log || "").includes("x");
    this.logY = (spec.log || "").includes("y");
    this.toolbar = element("div", {class: "legend"});
    this.place.before(this.toolbar);
    this.tools = toolsOf(place);
    this.svg = add(place, "svg", {role: "img", tabindex: 0, "aria-label": spec.label});
    this.listen();
    this.switches();
    plots.push(this);
    new ResizeObserver(() => this.draw(false)).observe(place);
  }

  /* Column of the horizontal axis in a point: [first axis, value, other axes ...]. */
  get column() { return this.axis ? this.axis + 1 : 0; }

  switches() {
    const group = this.tools;
    if (this.canLog("y")) group.append(this.button(this.spec.logName || "log", () => this.logY,
      () => { this.logY = !this.logY; this.draw(true); }));
    if (this.canLog("x")) group.append(this.button("log x", () => this.logX,
      () => { this.logX = !this.logX; this.setZoom(null); }));
    this.reset = element("button", {class: "tool", hidden: ""}, "reset zoom");
    this.reset.addEventListener("click", () => { this.setZoom(null); this.svg.focus(); });
    group.append(this.reset);
  }

  button(text, pressed, act) {
    const node = element("button", {class: "tool", "aria-pressed": String(pressed())}, text);
    node.addEventListener("click", () => {
      act();
      node.setAttribute("aria-pressed", String(pressed()));
    });
    return node;
  }

  listen() {
    const at = event => {
      const box = this.svg.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.svg.addEventListener("pointerdown", event => {
      this.start = event.button ? null : at(event);
      this.read(...at(event));
    });
    this.svg.addEventListener("pointermove", event => this.moved(event, ...at(event)));
    this.svg.addEventListener("pointerup", event => {
      const [start, [x]] = [this.start, at(event)];
      const dragged = this.selection;
      this.stop();
      if (dragged && start) this.choose(start[0], x);
    });
    this.svg.addEventListener("pointercancel", () => this.stop());
    this.svg.addEventListener("pointerleave", () => { if (!this.selection) this.leave(); });
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("dblclick", () => this.setZoom(null));
    this.svg.addEventListener("keydown", event => this.key(event));
  }

  moved(event, x, y) {
    if (!this.start || Math.abs(x - this.start[0]) < 8 && !this.selection) {
      this.read(x, y);
      return;
    }
    if (!this.selection) {
      this.leave();
      this.svg.setPointerCapture(event.pointerId);
      this.selection = add(this.svg, "rect", {class: "selection", y: this.box.top,
                                              height: this.box.bottom - this.box.top});
    }
    const ends = [this.start[0], x].map(p => Math.max(this.box.left, Math.min(this.box.right, p)));
    this.selection.setAttribute("x", Math.min(...ends));
    this.selection.setAttribute("width", Math.abs(ends[1] - ends[0]));
  }

  stop() {
    this.selection?.remove();
    this.selection = this.start = null;
  }

  choose(from, to) {
    const inside = [from, to].map(p => Math.max(this.box.left, Math.min(this.box.right, p)));
    const [low, high] = inside.map(p => this.xScale.back(p)).sort((a, b) => a - b);
    if (high > low) this.setZoom([low, high]);
  }

  setZoom(zoom) {
    for (const plot of this.linked()) {
      plot.zoom = zoom;
      plot.reset.hidden = !zoom;
      plot.draw(true);
    }
  }

  setAxis(axis) {
    this.axis = Math.min(axis, this.axes.length - 1);
    this.zoom = null;
    this.reset.hidden = true;
    this.draw(true);
  }

  linked() {
    return this.spec.link ? plots.filter(plot => plot.spec.link === this.spec.link) : [this];
  }

  key(event) {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1],
                  Home: [-1e9, 0], End: [1e9, 0]}[event.key];
    if (step) this.walk(...step);
    else if (event.key === "+" || event.key === "-") this.zoomBy(event.key === "+" ? .5 : 2);
    else if (event.key === "Escape" || event.key === "0") this.setZoom(null);
    else return;
    event.preventDefault();
  }

  zoomBy(factor) {
    const {left, right} = this.box, middle = this.cursorX ?? (left + right) / 2;
    const back = pixel => this.xScale.back(pixel);
    const low = back(middle - (middle - left) * factor), high = back(middle + (right - middle) * factor);
    const [first, last] = this.whole;
    const cut = [Math.max(low, first), Math.min(high, last)];
    this.setZoom(cut[0] <= first && cut[1] >= last ? null : cut);
  }

  draw(always) {
    const width = this.place.clientWidth;
    if (!width || !always && width === this.width) return;
    this.width = width;
    this.height = this.tallness();
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.svg.setAttribute("height", this.height);
    this.cursorX = null;
    this.paint();
    this.cursor = add(this.svg, "g", {visibility: "hidden", "pointer-events": "none"});
    this.place.dataset.drawn = this.svg.querySelectorAll(".mark").length;
  }

  tallness() { return this.spec.tall ? 320 : 220; }

  /* The box inside of labels of these widths in pixels. */
  setBox(labels) {
    this.box = {left: 12 + labels, right: this.width - 8, top: 10, bottom: this.height - 38};
  }

  horizontal() {
    const {left, right, bottom} = this.box, names = this.spec.categories;
    const room = Math.max(2, Math.floor((right - left) / 95));
    /* Values that are few are told themselves. */
    const few = this.zoom ? null : this.spec.ticks;
    const at = names ? names.map((_, i) => i) : few || this.xScale.ticks(room);
    let last = -1e9;
    for (const tick of at) {
      const x = this.xScale.at(tick), anchor = x > this.width - 26 ? "end" : "middle";
      if (x < left - 1 || x > right + 1 || few && x - last < 44) continue;
      last = x;
      add(this.svg, "text", {x, y: bottom + 17, "text-anchor": anchor},
          names ? names[tick] : placed(tick));
    }
    add(this.svg, "text", {x: (left + right) / 2, y: this.height - 3, "text-anchor": "middle",
                           class: "axis"}, this.axes[this.axis]);
  }

  clip() {
    const id = "clip-" + this.place.id, {left, right, top, bottom} = this.box;
    add(add(add(this.svg, "defs"), "clipPath", {id}), "rect",
        {x: left - 5, y: top - 6, width: right - left + 10, height: bottom - top + 10});
    return `url(#${id})`;
  }

  leave() {
    hideTip();
    if (this.cursor) this.cursor.setAttribute("visibility", "hidden");
  }

  /* Show the read-out beside a pixel of the plot. */
  say(title, lines, x, y) {
    const box = this.svg.getBoundingClientRect();
    this.cursorX = x;
    this.cursor.setAttribute("visibility", "visible");
    showTip(title, lines, box.left + x, box.top + y);
  }
}
