// The curator: one pair at a time, by keyboard; every decision is on the server's disk before the next pair is shown.
import { announce, el, get, post, say, t } from "./common.js";

const place = document.getElementById("curate");
const { report, data } = place.dataset;
const at = (id) => document.getElementById(id);
let state = await get("/console/api/curator", { report, data });
let pairs = [];
let current = 0; // place in `pairs`
let queue = Promise.resolve(); // keys are obeyed one after the other, however fast they are pressed

/** Pairs in the order of their groups, each with its group's place. */
function flatten() {
  pairs = state.groups.flatMap((group, number) => group.pairs.map((pair) => Object.assign(pair, { number })));
}

function soon(act) {
  queue = queue.then(act);
}

const isOpen = (pair) => !pair.decision;
const left = () => pairs[current].sides[0].intent;
const right = () => pairs[current].suggested ?? pairs[current].sides[1].intent;
const suspects = state.groups.some((group) => group.pairs.some((pair) => pair.suggested !== undefined)); // one question each

const OF_SUSPECTS = [
  ["k", t("Keep"), () => decide({ action: "keep" })],
  ["l", () => t("It is {intent}", { intent: right() }), () => decide({ action: "relabel", side: 0 })],
  ["e", t("Another intent …"), another],
  ["1", t("Drop"), () => decide({ action: "drop", side: 0 })],
  ["u", t("Undo"), undo],
];
const OF_PAIRS = [
  ["k", t("Keep both"), () => decide({ action: "keep" })],
  ["l", () => t("Left is {intent}", { intent: right() }), () => decide({ action: "relabel", side: 0 })],
  ["r", () => t("Right is {intent}", { intent: left() }), () => decide({ action: "relabel", side: 1 })],
  ["e", t("Another intent …"), another],
  ["m", () => t("Merge into {intent}", { intent: left() }), () => decide({ action: "merge", side: 1 })],
  ["Shift+M", () => t("Merge into {intent}", { intent: right() }), () => decide({ action: "merge", side: 0 })],
  ["1", t("Drop left"), () => decide({ action: "drop", side: 0 })],
  ["2", t("Drop right"), () => decide({ action: "drop", side: 1 })],
  ["u", t("Undo"), undo],
];
const ACTIONS = suspects ? OF_SUSPECTS : OF_PAIRS;
const MOVES = [
  ["↓", t("Next pair"), () => move(current + 1)],
  ["↑", t("Pair before"), () => move(current - 1)],
  ["n", t("Next open pair"), () => move(nextOpen(current + 1))],
  ["?", t("Keys"), () => at("keys").showModal()],
];
const NAMES = { ArrowDown: "↓", ArrowUp: "↑", j: "↓" };

function nextOpen(from) {
  for (let i = 0; i < pairs.length; i += 1) {
    const k = (from + i) % pairs.length;
    if (isOpen(pairs[k])) return k;
  }
  return Math.min(from, pairs.length - 1);
}

function move(to) {
  current = Math.max(0, Math.min(pairs.length - 1, to));
  show();
  if (pairs.length) announce(summary(pairs[current]));
}

/** A pair in one sentence, for whoever does not see it. */
function summary(pair) {
  const sides = pair.sides.map((side) => `${side.question}: ${side.intent}`);
  return [...sides, ...(suspects ? [pair.suggested] : []), told(pair)].join(" – ");
}

async function decide(what) {
  const pair = pairs[current];
  try {
    const { decision } = await post("/console/api/curator/decide", { report, data, pair: pair.key, ...what });
    const merged = pairs.some((one) => one.number === pair.number && one.decision?.action === "merge");
    if (merged || what.action === "merge" || what.action === "undo") await load(pair.key); // others of the group change, too
    else pair.decision = decision;
    if (what.action !== "undo") current = nextOpen(current + 1);
    show();
    announce([WORDS[what.action], summary(pairs[current])].filter(Boolean).join(". "));
    if (merged && what.action === "keep") say(t("Both are right, so the merge of their intents is taken back."));
    else if (!pairs.some(isOpen)) say(t("All pairs are looked at. Now write the cleaned file."));
  } catch (error) {
    say(error.message, true);
  }
}

function undo() {
  const { decision } = pairs[current];
  if (decision) return decide({ action: "undo", pair: decision.pair });
  say(t("There is nothing to undo here."));
  return null;
}

function another() {
  const { sides } = pairs[current];
  sides.forEach((side, i) => (at(`other-${i}`).textContent = side.question));
  at("other-1").closest("label").hidden = sides.length < 2;
  at("other-intent").value = "";
  at("other").showModal();
  at("other-intent").focus();
}

at("other-form").addEventListener("submit", (event) => {
  if (event.submitter?.value === "no") return;
  const side = Number(new FormData(event.target).get("side"));
  const intent = at("other-intent").value.trim();
  soon(() => decide({ action: "relabel", side, intent }));
});
at("intents").replaceChildren(...state.intents.map((intent) => el("option", { value: intent })));

async function load(key) {
  state = await get("/console/api/curator", { report, data });
  flatten();
  const found = pairs.findIndex((pair) => pair.key === key);
  current = found < 0 ? 0 : found;
}

const WORDS = { keep: t("kept"), merge: t("merged"), relabel: t("relabelled"), drop: t("dropped") };

function badge(decision) {
  return decision ? el("span", { class: `tag ${decision.action}` }, WORDS[decision.action]) : el("span", { class: "tag open" }, t("open"));
}

/** What a decision did, in words. */
function told(pair) {
  const { decision, sides } = pair;
  if (!decision) return t("Not looked at yet.");
  const question = sides[decision.side]?.question ?? "";
  if (decision.action === "merge") return t("{gone} goes into {intent}.", { gone: decision.intents[decision.side], intent: decision.intent });
  if (decision.action === "relabel") return t("“{question}” gets the intent {intent}.", { question, intent: decision.intent });
  if (decision.action === "drop") return t("“{question}” is left out.", { question });
  return suspects ? t("It is right as it is.") : t("Both are right as they are.");
}

/** What stands beside a suspect. */
function suggestion({ suggested, probability }) {
  return el(
    "div",
    { class: "sidecard" },
    el("p", { class: "quiet small" }, t("Suggested by a classifier that did not see it, probability {n}%", { n: (100 * probability).toFixed(0) })),
    el("p", {}, el("span", { class: "intent" }, suggested)),
  );
}

/** What has the focus among the buttons that are made anew, by their `data-hold`. */
function held() {
  const hold = document.activeElement?.dataset.hold ?? "";
  const [list] = hold.split(" ");
  if (list === "pair") return () => `pair ${current}`; // the focus goes along with the pair that is looked at
  if (list === "group") return () => `group ${pairs[current].number}`;
  return () => hold;
}

function show() {
  const pair = pairs[current];
  if (!pair) return;
  const hold = held();
  at("pair").replaceChildren(
    el(
      "div",
      { class: "sides" },
      pair.sides.map((side, i) =>
        el(
          "div",
          { class: "sidecard" },
          el("p", { class: "quiet small" }, `${suspects ? "" : `${i ? t("Right") : t("Left")} · `}${t("record {n}", { n: side.record })}${side.whole ? ` · ${t("all its questions")}` : ""}`),
          el("p", { class: "question" }, side.question),
          el("p", {}, el("span", { class: "intent" }, side.intent)),
          side.reply ? el("p", { class: "reply quiet small" }, side.reply) : null,
        ),
      ),
      suspects ? suggestion(pair) : null,
    ),
    el("p", { class: "verdict" }, badge(pair.decision), " ", told(pair)),
  );
  at("actions").replaceChildren(
    ...ACTIONS.map(([key, words, act]) => el("button", { type: "button", "data-hold": `act ${key}`, onclick: () => soon(act) }, typeof words === "function" ? words() : words, " ", el("kbd", {}, key))),
  );
  const rows = pairs.map((one, i) => [one, i]).filter(([one]) => one.number === pair.number);
  at("pairs").replaceChildren(
    ...rows.map(([one, i]) =>
      el(
        "li",
        {},
        el("button", { type: "button", "data-hold": `pair ${i}`, "aria-current": i === current ? "true" : null, onclick: () => soon(() => move(i)) },
          el("span", { class: "two" }, el("span", {}, one.sides[0].question), el("span", {}, suspects ? one.suggested : one.sides[1].question)), badge(one.decision)),
      ),
    ),
  );
  at("pairs").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  groups(pair.number);
  if (hold()) (document.querySelector(`[data-hold="${hold()}"]`) ?? at("pair")).focus({ preventScroll: true });
  const done = pairs.filter((one) => !isOpen(one)).length;
  at("share").value = pairs.length ? done / pairs.length : 1;
  at("counted").textContent = t("{done} of {all} looked at", { done, all: pairs.length }) + (state.shown < state.total ? ` · ${t("the first {n} of {all} pairs are shown", { n: state.shown, all: state.total })}` : "");
}

function groups(number) {
  const only = at("open-only").checked;
  const items = state.groups.map((group, i) => [group, i, group.pairs.filter(isOpen).length]).filter(([, i, open]) => !only || open || i === number);
  at("groups").replaceChildren(
    ...items.map(([group, i, open]) =>
      el(
        "li",
        {},
        el(
          "button",
          { type: "button", "data-hold": `group ${i}`, "aria-current": i === number ? "true" : null, onclick: () => soon(() => move(pairs.findIndex((pair) => pair.number === i))) },
          el("span", { class: "names" }, group.intents[0], el("span", { class: "quiet" }, " ↔ "), group.intents[1]),
          group.alike ? el("span", { class: "tag" }, t("alike names")) : null,
          el("span", { class: "quiet n" }, open ? t("{open} of {all} open", { open, all: group.pairs.length }) : t("done")),
        ),
      ),
    ),
  );
  at("groups").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
}

at("open-only").addEventListener("change", () => groups(pairs[current]?.number));
at("help").addEventListener("click", () => at("keys").showModal());
at("key-list").replaceChildren(
  ...[...ACTIONS, ...MOVES].map(([key, words]) =>
    el("div", {}, el("dt", {}, el("kbd", {}, key)), el("dd", {}, { l: suspects ? t("it gets the suggested intent") : t("left question gets the right one's intent"), r: t("right question gets the left one's intent"), m: t("merge the intents, the left name stays"), "Shift+M": t("merge the intents, the right name stays") }[key] ?? words)),
  ),
);

const KEYS = "llmops.keys"; // who speaks to the computer, or whose hand slips, turns single keys off
function keysAct() {
  try {
    return localStorage.getItem(KEYS) !== "off";
  } catch {
    return at("keys-on").checked; // storage is switched off: as long as the page
  }
}
at("keys-on").checked = keysAct();
document.body.classList.toggle("no-keys", !at("keys-on").checked);
at("keys-on").addEventListener("change", () => {
  const on = at("keys-on").checked;
  try {
    localStorage.setItem(KEYS, on ? "on" : "off");
  } catch {
    say(t("This browser keeps no settings, so the keys are as they are until the page is left."));
  }
  document.body.classList.toggle("no-keys", !on);
});

document.addEventListener("keydown", (event) => {
  if (!keysAct() || event.isComposing) return;
  const modified = ["Control", "Meta", "Alt", "AltGraph"].some((key) => event.getModifierState(key));
  if (modified || document.querySelector("dialog[open]")) return;
  if (/^(input|textarea|select)$/i.test(event.target.tagName) && event.target.type !== "checkbox") return;
  const pressed = event.shiftKey && event.key.toUpperCase() === "M" ? "Shift+M" : (NAMES[event.key] ?? event.key);
  const found = [...ACTIONS, ...MOVES].find(([key]) => key === pressed);
  if (!found || (event.repeat && ACTIONS.includes(found))) return; // a key that is held decides once
  event.preventDefault();
  soon(found[2]);
});

at("write").addEventListener("click", async () => {
  try {
    const found = await post("/console/api/curator/write", { report, data });
    const done = t("{file} is written: {relabelled} relabelled, {merged} merged, {dropped} dropped; {changes} says what changed.", { ...found, file: found.cleaned });
    const unfit = t("{n} decisions are about what the data does not have any more and were not applied.", { n: found.not_applied });
    say(found.not_applied ? `${done} ${unfit}` : done, found.not_applied > 0);
  } catch (error) {
    say(error.message, true);
  }
});

flatten();
current = nextOpen(0);
show();
if (!pairs.length) at("pair").replaceChildren(el("p", {}, t("The report has no pairs.")));
