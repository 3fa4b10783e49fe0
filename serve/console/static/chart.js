// One chart of curves over steps, drawn by uPlot; colours follow the page's.
import uPlot from "./vendor/uPlot.esm.js";
import { t } from "./common.js";

const HEIGHT = 340;
const MOST_POINTS = 60; // of a curve whose points are marked
const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);

/** A colour of the page (a CSS variable's name) as a canvas takes it, as seen now: light or dark. */
export function color(name, opacity = 1) {
  probe.style.color = `color-mix(in srgb, var(${name}) ${100 * opacity}%, transparent)`;
  return getComputedStyle(probe).color;
}

/** Numbers for axis and legend: four figures, small and large ones with an exponent. */
export function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export class Chart {
  /** `place` is an element; `draw` adds marks: (context, chart) after the curves. */
  constructor(place, draw = () => {}) {
    this.place = place;
    this.draw = draw;
    this.plot = null;
    this.note = document.getElementById("chart-note");
    this.hint = this.note.textContent;
    this.shape = "";
    this.curves = [];
    this.log = false;
    new ResizeObserver(() => this.fit()).observe(place);
    document.addEventListener("theme", () => this.again());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.again());
  }

  /** Show curves of {label, points: [steps, values], color: a CSS variable's name, width, faint}. */
  show(curves, log) {
    this.curves = curves;
    const some = curves.some(({ points }) => points[0].length);
    this.place.hidden = !some;
    this.note.textContent = some ? this.hint : t("This log has no values of this kind.");
    if (!some) return;
    const shape = JSON.stringify([log, curves.map(({ label, color, width, faint }) => [label, color, width, faint])]);
    const data = joined(curves);
    if (this.plot && shape === this.shape) {
      const { min, max } = this.plot.scales.x;
      const zoomed = this.zoomed;
      this.plot.setData(data, !zoomed);
      if (zoomed) this.plot.setScale("x", { min, max });
      return;
    }
    this.shape = shape;
    this.log = log;
    this.plot?.destroy();
    this.zoomed = false;
    this.plot = new uPlot(this.options(curves, log), data, this.place);
  }

  again() {
    this.shape = "";
    if (this.plot) this.show(this.curves, this.log);
  }

  reset() {
    this.zoomed = false;
    if (this.plot) this.plot.setData(this.plot.data, true);
  }

  fit() {
    const width = this.place.clientWidth;
    if (this.plot && width && this.plot.width !== width) this.plot.setSize({ width, height: HEIGHT });
  }

  options(curves, log) {
    const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false } };
    return {
      width: this.place.clientWidth || 600,
      height: HEIGHT,
      scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
      axes: [
        { ...axis, values: (_, places) => places.map((place) => (Number.isInteger(place) ? place.toLocaleString() : "")) },
        { ...axis, size: 62, values: (_, places) => places.map((place) => (place === null ? "" : figure(place))) },
      ],
      cursor: { points: { size: 7 }, drag: { x: true, y: false } },
      legend: { live: true },
      series: [
        { label: t("Step"), value: (_, value) => (value === null ? "–" : value.toLocaleString()) },
        ...curves.map((curve, i) => ({
          label: curve.label,
          stroke: color(curve.color, curve.faint ? 0.35 : 1),
          width: curve.width ?? 2,
          spanGaps: true,
          points: { show: () => !curve.faint && this.curves[i].points[0].length <= MOST_POINTS, size: 5, fill: color(curve.color) },
          value: (_, value) => figure(value),
        })),
      ],
      hooks: {
        draw: [(plot) => this.draw(plot.ctx, plot)],
        setSelect: [(plot) => (this.zoomed = plot.select.width > 0)],
        ready: [(plot) => plot.over.addEventListener("dblclick", () => (this.zoomed = false))],
      },
    };
  }
}

/** Curves of different steps as uPlot wants them: one ascending list of steps, null where a curve has no value. */
function joined(curves) {
  const steps = [...new Set(curves.flatMap(({ points }) => points[0]))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const columns = curves.map(({ points }) => {
    const column = new Array(steps.length).fill(null);
    points[0].forEach((step, i) => (column[place.get(step)] = points[1][i]));
    return column;
  });
  return [steps, ...columns];
}

/** The controls beside a chart: [metric, smoothing, log scale] as they stand; `changed` is called when they change. */
export function controls(chart, changed) {
  const at = (id) => document.getElementById(id);
  for (const id of ["metric", "smooth", "log"]) at(id).addEventListener("input", changed);
  at("reset").addEventListener("click", () => chart.reset());
  return () => [at("metric").value, Number(at("smooth").value), at("log").checked];
}
