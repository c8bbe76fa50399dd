// One crosshair through all charts: where the pointer (or an arrow key) is in one of them, every chart tells its values.
"use strict";

const charts = [...document.querySelectorAll(".chart")].map((figure) => ({
  figure,
  plot: figure.querySelector(".plot"),
  hair: figure.querySelector(".crosshair"),
  at: figure.querySelector(".at"),
  readouts: [...figure.querySelectorAll("b[data-line]")],
  lines: JSON.parse(figure.querySelector("script").textContent),
  x0: Number(figure.dataset.x0),
  x1: Number(figure.dataset.x1),
}));
let current = null;

function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(steps[high] - step) < Math.abs(steps[low] - step) ? high : low;
}

function readable(value) {
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function show(step) {
  current = step;
  for (const chart of charts) {
    chart.hair.hidden = false;
    chart.hair.style.left = `${(100 * (step - chart.x0)) / (chart.x1 - chart.x0)}%`;
    chart.at.textContent = `step ${step.toLocaleString("en")}`;
    for (const readout of chart.readouts) {
      const { steps, values } = chart.lines[Number(readout.dataset.line)];
      if (!steps.length) continue;
      const index = nearest(steps, step);
      // Validation happens now and then: say where, unless it is where the crosshair is.
      const elsewhere = Math.abs(steps[index] - step) > (chart.x1 - chart.x0) / 200;
      readout.textContent = readable(values[index]) + (elsewhere ? ` at ${steps[index].toLocaleString("en")}` : "");
    }
  }
}

function hide() {
  current = null;
  for (const chart of charts) {
    chart.hair.hidden = true;
    chart.at.textContent = "";
    for (const readout of chart.readouts) readout.textContent = readout.dataset.last;
  }
}

for (const chart of charts) {
  const steps = chart.lines[0].steps;
  const follow = (event) => {
    const box = chart.plot.getBoundingClientRect();
    const place = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    show(steps[nearest(steps, chart.x0 + place * (chart.x1 - chart.x0))]);
  };
  chart.plot.addEventListener("pointermove", follow);
  chart.plot.addEventListener("pointerdown", follow);
  chart.plot.addEventListener("pointerleave", hide);
  chart.plot.addEventListener("blur", hide);
  chart.plot.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (event.key === "Escape") hide();
    if (!direction) return;
    event.preventDefault();
    const from = current === null ? steps.length - 1 : nearest(steps, current);
    show(steps[Math.min(steps.length - 1, Math.max(0, from + direction))]);
  });
}

window.addEventListener("beforeprint", () => {
  hide();
  for (const details of document.querySelectorAll("details")) details.open = true;
});
