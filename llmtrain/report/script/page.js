/* Starts the page: every plot, the switch of the horizontal axis, tables that sort, tips of bars. */
"use strict";

function sortable(table) {
  const body = table.querySelector("tbody");
  table.querySelectorAll("th").forEach((head, column) => {
    const button = element("button", {}, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [row.cells[column].textContent, row]);
      rows.sort(([a], [b]) => compared(a, b, down ? -1 : 1));
      body.append(...rows.map(([, row]) => row));
    });
  });
  document.addEventListener("trials", event => {
    for (const row of body.rows) {
      const trial = row.querySelector("[data-trial]")?.dataset.trial;
      row.hidden = Boolean(event.detail) && !event.detail.has(Number(trial));
    }
  });
}

/* Numbers by size, other text by letters, what is missing last. */
function compared(a, b, sign) {
  if (a === "–" || b === "–") return a === b ? 0 : a === "–" ? 1 : -1;
  const [x, y] = [a, b].map(text => Number(text.replaceAll(",", "").replace("%", "")));
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y);
}

/* What rules all linked plots: the horizontal axis, and which runs are drawn. */
function controls(group) {
  const linked = () => plots.filter(plot => plot.spec.link === group.dataset.link);
  const axes = [...group.querySelectorAll("[data-axis]")];
  axes.forEach(button => button.addEventListener("click", () => {
    axes.forEach(other => other.setAttribute("aria-pressed", String(other === button)));
    linked().forEach(plot => plot.setAxis(Number(button.dataset.axis)));
  }));
  const runs = [...group.querySelectorAll("[data-series]")];
  runs.forEach(button => button.addEventListener("click", event => {
    linked().forEach(plot => plot.toggle(button.dataset.series, event.shiftKey));
    const hidden = linked()[0].hidden;
    runs.forEach(other => other.setAttribute("aria-pressed", String(!hidden.has(other.dataset.series))));
  }));
}

const KINDS = {lines: LinePlot, heat: HeatMap, parallel: ParallelPlot};
const specs = JSON.parse(document.getElementById("plots").textContent);
for (const [id, spec] of Object.entries(specs)) {
  new KINDS[spec.kind || "lines"](document.getElementById(id), spec);
}
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("[data-link]").forEach(controls);
for (const node of document.querySelectorAll("[data-tip]")) {
  for (const kind of ["pointermove", "pointerdown"]) {
    node.addEventListener(kind, event => showTip(node.dataset.tip, [], event.clientX, event.clientY));
  }
  node.addEventListener("pointerleave", hideTip);
}
addEventListener("scroll", hideTip, {passive: true});
