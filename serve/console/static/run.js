// A run's page: live values, curves, the diagnosis with its evidence marked on them, the way to stop it.
import { Chart, color, controls, figure } from "./chart.js";
import { announce, el, fill, get, poll, post, say, t } from "./common.js";
import { Log, smoothed } from "./logs.js";

const head = document.getElementById("run");
const name = head.dataset.run;
const log = new Log(name);
let live = head.dataset.live === "true";
let diagnosis = null;

const NAMES = {
  loss: [t("Train loss"), "--train"],
  eval_loss: [t("Test loss"), "--test"],
  retention_loss: [t("Retention loss"), "--retention"],
  eval_accuracy: [t("Test accuracy"), "--test"],
  learning_rate: [t("Learning rate"), "--c0"],
  grad_norm: [t("Gradient norm"), "--c1"],
  tokens_per_second: [t("Tokens per second"), "--c2"],
};
const chart = new Chart(document.getElementById("chart"), mark);
const settings = controls(chart, show);

function show() {
  const [metric, weight, scale] = settings();
  const curves = [];
  for (const key of metric === "losses" ? ["loss", "eval_loss", "retention_loss"] : [metric]) {
    const [label, color] = NAMES[key];
    const points = log.points(key);
    if (!points[0].length) continue;
    const smooths = weight > 0 && !key.startsWith("eval") && !key.startsWith("retention");
    if (smooths) curves.push({ label: t("{name}, as logged", { name: label }), points, color, width: 1, faint: true });
    curves.push({ label, points: [points[0], smooths ? smoothed(points[1], weight) : points[1]], color });
  }
  chart.show(curves, scale);
}

/** Draw what the diagnosis rests on: the best test loss and the rise after it, the first retention loss. */
function mark(context, plot) {
  if (!diagnosis?.findings || diagnosis.axis !== "step" || settings()[0] !== "losses") return;
  const { left, top, width, height } = plot.bbox;
  const { overfitting, catastrophic_forgetting: forgetting } = diagnosis.findings;
  context.save();
  context.beginPath();
  context.rect(left, top, width, height);
  context.clip();
  context.lineWidth = devicePixelRatio;
  context.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  context.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  const words = (text, x, y, key, align = "left") => {
    context.fillStyle = color(key);
    context.textAlign = align;
    context.fillText(text, x, y);
  };
  const best = overfitting.numbers.best_at;
  if (best !== undefined) {
    const x = plot.valToPos(best, "x", true);
    if (overfitting.level !== "Low") {
      const [steps] = log.points("eval_loss");
      const right = plot.valToPos(steps.at(-1) ?? best, "x", true);
      context.fillStyle = color(overfitting.level === "High" ? "--bad" : "--warn", 0.14);
      context.fillRect(x, top, right - x, height);
    }
    context.strokeStyle = color("--test");
    line(context, x, top, x, top + height);
    const inner = x > left + 0.7 * width;
    words(t("best test loss"), x + (inner ? -6 : 6) * devicePixelRatio, top + 14 * devicePixelRatio, "--test", inner ? "right" : "left");
  }
  const first = forgetting.numbers.first_retention_loss;
  if (first !== undefined && !(plot.scales.y.distr === 3 && first <= 0)) {
    const y = plot.valToPos(first, "y", true);
    context.strokeStyle = color("--retention");
    line(context, left, y, left + width, y);
    words(t("first retention loss"), left + width - 6 * devicePixelRatio, y - 5 * devicePixelRatio, "--retention", "right");
  }
  if (forgetting.level !== "Low" && forgetting.numbers.at !== undefined) {
    const x = plot.valToPos(forgetting.numbers.at, "x", true);
    context.strokeStyle = color("--bad");
    line(context, x, top, x, top + height);
    words(t("sudden lasting rise"), x + 6 * devicePixelRatio, top + 30 * devicePixelRatio, "--bad");
  }
  context.restore();
}

function line(context, x, y, toX, toY) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}

const RISKS = {
  overfitting: t("Overfitting"),
  underfitting: t("Underfitting"),
  catastrophic_forgetting: t("Forgetting"),
};
const CHINESE = document.documentElement.lang === "zh-CN"; // the command's own recommendations are Chinese
const ADVICE = {
  "overfitting High": "Stop, lower the learning rate, raise dropout or add data, take fewer epochs, and train again.",
  "overfitting Medium": "Watch the test loss; if it does not fall again, stop and take the checkpoint where it was lowest.",
  "underfitting High": "More epochs, a higher learning rate, a larger model or LoRA rank; check the data, and train again.",
  "underfitting Medium": "Some more epochs or a higher learning rate; watch the train loss.",
  "catastrophic_forgetting High": "Go back to the version before, and change the settings.",
  "catastrophic_forgetting Medium": "Lower the learning rate, mix general data in with --replay_ratio, watch the retention loss.",
};
const DIVERGED = "The loss did not fall: lower the learning rate, check the data and the precision (bf16 instead of fp16), train again.";

function advice(risk, finding) {
  if (finding.level === "Low") return "";
  if (CHINESE) return diagnosis.recommendations[risk];
  return finding.diverged ? DIVERGED : ADVICE[`${risk} ${finding.level}`];
}

let told = {}; // the level of each risk that was spoken
let shown = "";

/** Speak the risks whose level is another one now. */
function speak(findings) {
  const levels = Object.fromEntries(Object.entries(findings).map(([risk, { level }]) => [risk, level]));
  const news = Object.keys(levels).filter((risk) => levels[risk] !== told[risk]);
  if (news.length) announce(news.map((risk) => `${RISKS[risk]}: ${t(levels[risk])}`).join(". "));
  told = levels;
}

async function judge() {
  diagnosis = await get("/console/api/diagnosis", { run: name });
  const found = JSON.stringify(diagnosis);
  if (found === shown) return;
  shown = found;
  speak(diagnosis.findings ?? {});
  const place = document.getElementById("judging");
  place.hidden = !diagnosis.problem;
  if (diagnosis.problem) place.textContent = diagnosis.problem;
  const findings = Object.entries(diagnosis.findings ?? {}).map(([risk, finding]) =>
    el(
      "li",
      {},
      el("div", { class: "what" }, el("b", {}, RISKS[risk]), el("span", { class: `level ${finding.level}` }, t(finding.level))),
      el(
        "div",
        {},
        el("p", {}, finding.missing || finding.reason),
        advice(risk, finding) ? el("p", { class: "advice" }, advice(risk, finding)) : null,
        Object.keys(finding.numbers).length
          ? el("details", {}, el("summary", {}, t("Evidence")), numbers(finding.numbers))
          : null,
      ),
    ),
  );
  const list = document.getElementById("findings");
  const before = [...list.querySelectorAll("details")];
  const focused = before.findIndex((details) => details.contains(document.activeElement));
  list.replaceChildren(...findings);
  const now = list.querySelectorAll("details");
  now.forEach((details, i) => (details.open = before[i]?.open ?? false));
  now[focused]?.querySelector("summary").focus({ preventScroll: true });
  chart.plot?.redraw();
}

function numbers(values) {
  const rows = Object.entries(values).map(([key, value]) => el("div", {}, el("dt", {}, key.replaceAll("_", " ")), el("dd", {}, figure(value))));
  return el("dl", { class: "pairs" }, rows);
}

const stop = document.getElementById("stop");
const dialog = document.getElementById("stopping");
stop.addEventListener("click", () => dialog.showModal());
dialog.addEventListener("close", async () => {
  if (dialog.returnValue !== "yes") return;
  try {
    await post("/console/api/stop", { run: name });
    say(t("Asked to stop. It ends after this step, with a checkpoint."));
    await refresh();
  } catch (error) {
    say(error.message, true);
  }
});

function saved(found) {
  document.getElementById("no-checkpoints").hidden = found.length > 0;
  const rows = document.getElementById("checkpoints");
  rows.closest("table").hidden = !found.length;
  rows.replaceChildren(
    ...found.map((one) =>
      el("tr", {}, el("td", {}, one.name, one.best ? [" ", el("span", { class: "tag" }, t("best"))] : null), el("td", { class: "n" }, one.step), el("td", { class: "n quiet" }, one.changed)),
    ),
  );
}

let judged = 0;
async function refresh() {
  const run = await get("/console/api/run", { run: name });
  const ended = live && !run.live;
  live = run.live;
  head.dataset.live = String(live);
  fill(document, run);
  saved(run.checkpoints);
  stop.hidden = run.state !== "running";
  if (await log.grow()) show();
  if (ended || (live && Date.now() - judged > 15000)) {
    judged = Date.now();
    await judge();
  }
}

await log.grow();
show();
judged = Date.now();
judge().catch((error) => (document.getElementById("judging").textContent = error.message));
poll(refresh, () => (live ? 2 : 15));
