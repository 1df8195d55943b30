/* What every plot shares: SVG elements, the read-out, numbers, ticks, scales and colors. */
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const tip = document.getElementById("tip");

function add(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/* The read-out: a bold first line, then [color or null, name, value] each. */
function showTip(title, lines, x, y) {
  tip.replaceChildren(element("b", {}, title), ...lines.map(([color, name, value]) => {
    const swatch = color ? [element("i", {class: "swatch", style: `background:${color}`})] : [];
    return element("div", {}, ...swatch, element("span", {}, name), element("span", {}, value));
  }));
  tip.style.opacity = 1;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth - 8 ? x - 16 - box.width : x + 16;
  tip.style.left = Math.max(8, Math.min(left, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(8, Math.min(y - box.height / 2, innerHeight - box.height - 8)) + "px";
}

function hideTip() { tip.style.opacity = 0; }

function shown(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e15) return value.toExponential(digits - 2).replace("e+", "e");
  if (size >= 1e12) return +(value / 1e12).toPrecision(digits) + "T";
  if (size >= 1e9) return +(value / 1e9).toPrecision(digits) + "B";
  if (size >= 1e6) return +(value / 1e6).toPrecision(digits) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(digits) + "k";
  if (size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(Math.max(0, digits - 2)).split("e-");
    return `${+mantissa}e−${exponent}`;
  }
  return String(+value.toPrecision(digits));
}

/* Where on a horizontal axis: whole numbers in full up to a million. */
function placed(value) {
  return Number.isInteger(value) && Math.abs(value) < 1e6 ? value.toLocaleString("en-US")
                                                          : shown(value, 5);
}

/* Round steps of an axis: 1, 2, 2.5 or 5 times a power of ten. */
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough * (1 - 1e-9));
  const result = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    result.push(+(i * step).toPrecision(12) || 0);
  }
  return result;
}

/* Ticks of a logarithmic axis: powers of ten, with 2 and 5 between where there is room. */
function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  for (const steps of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const decades = Math.log10(high / low), coarse = steps.length === 1 && decades > 2 * count;
    const stride = coarse ? Math.ceil(decades / count) : 1;
    const result = [];
    for (let power = first; power <= last; power += stride) {
      for (const step of steps) {
        const value = +(step * 10 ** power).toPrecision(6);
        if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) result.push(value);
      }
    }
    if (result.length <= count + 1 || steps.length === 1) {
      return result.length > 1 ? result : ticks(low, high, count);
    }
  }
  return [];
}

/* A scale from [low, high] to pixels [from, to]: at(value), back(pixel), ticks(count). */
function scale(low, high, from, to, log) {
  const bend = log ? Math.log : value => value, unbend = log ? Math.exp : value => value;
  const start = bend(low), span = bend(high) - start || 1;
  return {
    low, high,
    at: value => from + (bend(value) - start) / span * (to - from),
    back: pixel => unbend(start + (pixel - from) / (to - from) * span),
    ticks: count => log ? logTicks(low, high, count) : ticks(low, high, count),
  };
}

/* Lowest and highest of numbers; spread arguments would overflow on long lists. */
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

/* Index of the point nearest to x among points in order of their column. */
function near(points, x, column) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][column] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][column] - x) <= Math.abs(points[high][column] - x) ? low : high;
}

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/* A color between three of the style sheet: "r" from best to worst, "h" from little to much. */
function ramp(name, share) {
  const [from, to] = share < .5 ? [0, 1] : [1, 2];
  const percent = Math.round(200 * (share - from / 2));
  return `color-mix(in oklab, var(--${name}${to}) ${percent}%, var(--${name}${from}))`;
}

function colorOf(series) {
  return series.shade === undefined ? `var(--c${series.color % 8})` : ramp("r", series.shade);
}

function colorKey(name, low, high, note) {
  const stops = [0, 1, 2].map(i => `var(--${name}${i})`).join(", ");
  return element("div", {class: "colors"}, element("span", {}, low),
                 element("i", {style: `background:linear-gradient(90deg in oklab, ${stops})`}),
                 element("span", {}, high), element("span", {class: "quiet"}, note));
}
