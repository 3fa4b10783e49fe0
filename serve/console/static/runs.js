// The list of runs: live values, and the button that compares.
import { fill, get, poll, t } from "./common.js";

const rows = new Map([...document.querySelectorAll("tr[data-run]")].map((row) => [row.dataset.run, row]));
let live = [...document.querySelectorAll(".state")].some((state) => /running|stopping/.test(state.className));

async function refresh() {
  const { runs } = await get("/console/api/runs", Object.fromEntries(new URLSearchParams(location.search)));
  live = runs.some((run) => run.live);
  const others = runs.filter((run) => !rows.has(run.name)).length;
  for (const run of runs) if (rows.has(run.name)) fill(rows.get(run.name), run);
  const busy = document.querySelector("input:checked") || document.activeElement?.matches("input, select");
  if (others && !busy) location.reload(); // a new run: the list is another one
}

poll(refresh, () => (live ? 2 : 10));

const compare = document.getElementById("compare");
function count() {
  const marked = document.querySelectorAll("input[name=run]:checked").length;
  compare.disabled = marked < 2;
  compare.textContent = marked < 2 ? t("Compare the marked ones") : t("Compare {n} runs", { n: marked });
}
document.getElementById("runs")?.addEventListener("change", count);
if (compare) count();
