// Several runs on one chart, one curve each.
import { Chart, controls } from "./chart.js";
import { poll } from "./common.js";
import { Log, smoothed } from "./logs.js";

const logs = JSON.parse(document.querySelector("[data-runs]").dataset.runs).map((run) => new Log(run));
const chart = new Chart(document.getElementById("chart"));
const settings = controls(chart, show);

function show() {
  const [metric, weight, scale] = settings();
  const key = metric === "losses" ? "eval_loss" : metric;
  const smooths = weight > 0 && !["eval_loss", "eval_accuracy", "retention_loss"].includes(key);
  const curves = logs.map((log, i) => {
    const [steps, values] = log.points(key);
    return { label: log.run, points: [steps, smooths ? smoothed(values, weight) : values], color: `--c${i % 8}` };
  });
  chart.show(curves, scale);
}

async function refresh() {
  const grown = await Promise.all(logs.map((log) => log.grow()));
  if (grown.some(Boolean)) show();
}

await refresh();
poll(refresh, () => 4);
