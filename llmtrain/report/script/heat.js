/* A heat map: one row per layer, one column per logged step, color for the value.

spec: {rows, columns, values: one list per row, label, y, unit, log}. */
"use strict";
const SHADES = 24;

class HeatMap extends Plot {
  canLog() {
    const [least, most] = this.reach();
    return least > 0 && most > least && arguments[0] === "y";
  }

  reach() {
    return extent(this.spec.values.flat().filter(value => value !== null));
  }

  tallness() {
    const rows = this.spec.rows.length;
    return 48 + Math.max(110, Math.min(420, rows * (rows > 24 ? 10 : 18)));
  }

  paint() {
    const {rows, columns, values} = this.spec;
    this.setBox(6.6 * Math.max(...rows.map(row => row.length)));
    this.whole = [0, columns.length];
    this.xScale = scale(...(this.zoom || this.whole), this.box.left, this.box.right, false);
    /* The first row lies at the bottom, as a model is drawn. */
    this.yScale = scale(0, rows.length, this.box.bottom, this.box.top, false);
    const {left, right, bottom} = this.box;
    const [least, most] = this.reach(), shade = scale(least, most, 0, SHADES - 1, this.logY);
    const paths = Array.from({length: SHADES}, () => []);
    const tall = this.yScale.at(0) - this.yScale.at(1), gap = tall > 8 ? 1 : 0;
    const from = Math.floor(this.xScale.low), to = Math.ceil(this.xScale.high);
    values.forEach((row, r) => {
      const y = (this.yScale.at(r + 1) + gap).toFixed(1), height = (tall - gap).toFixed(1);
      for (let c = from; c < to; c++) {
        if (row[c] === null || row[c] === undefined) continue;
        const x = Math.max(left, this.xScale.at(c)), end = Math.min(right, this.xScale.at(c + 1));
        paths[most > least ? Math.round(shade.at(row[c])) : 0].push(
          `M${x.toFixed(1)} ${y}h${(end - x + .3).toFixed(1)}v${height}H${x.toFixed(1)}z`);
      }
    });
    paths.forEach((parts, level) => {
      if (parts.length) add(this.svg, "path", {d: parts.join(""), class: "mark",
                                               fill: ramp("h", level / (SHADES - 1))});
    });
    const stride = Math.ceil(13 / tall);
    rows.forEach((name, r) => {
      if (r % stride && r !== rows.length - 1) return;
      if (stride > 1 && r !== rows.length - 1 && r > rows.length - 1 - stride) return;
      add(this.svg, "text", {x: left - 8, y: this.yScale.at(r + .5) + 4, "text-anchor": "end"}, name);
    });
    const count = Math.max(2, Math.floor((right - left) / 95)), width = to - from;
    for (let i = 0; i < count; i++) {
      const c = from + Math.round((i + .5) * width / count - .5);
      if (c < to) add(this.svg, "text", {x: this.xScale.at(c + .5), y: bottom + 17,
                                         "text-anchor": "middle"}, placed(columns[c]));
    }
    add(this.svg, "text", {x: (left + right) / 2, y: this.height - 3, "text-anchor": "middle",
                           class: "axis"}, this.axes[0]);
    this.key1?.remove();
    this.key1 = colorKey("h", shown(least), shown(most), this.spec.unit || "");
    this.toolbar.prepend(this.key1);
  }

  read(x, y) {
    const {left, right, top, bottom} = this.box;
    if (x < left || x > right || y < top || y > bottom) return this.leave();
    return this.cell(Math.floor(this.xScale.back(x)), Math.floor(this.yScale.back(y)));
  }

  cell(column, row) {
    const {rows, columns, values} = this.spec;
    this.c = Math.max(0, Math.min(columns.length - 1, column));
    this.r = Math.max(0, Math.min(rows.length - 1, row));
    const x = this.xScale.at(this.c), y = this.yScale.at(this.r + 1);
    this.cursor.replaceChildren();
    add(this.cursor, "rect", {x, y, width: Math.max(3, this.xScale.at(this.c + 1) - x),
      height: this.yScale.at(this.r) - y, fill: "none", stroke: "var(--ink)", "stroke-width": 1.5});
    this.say(`${this.axes[0]} ${placed(columns[this.c])}`,
             [[null, `${this.spec.y || "layer"} ${rows[this.r]}`, shown(values[this.r][this.c])]], x, y);
  }

  walk(right, up) { this.cell((this.c ?? 0) + right, (this.r ?? 0) + up); }
}
