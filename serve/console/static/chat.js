// The chat: every model that is served answers the same question, side by side, as it writes.
import { announce, el, get, post, say, t } from "./common.js";

const at = (id) => document.getElementById(id);
const KEPT = "llmops.chat"; // this tab's conversation outlives a reload
const NAMES = { base: t("Base model"), tuned: t("Tuned model") };
const ORDER = ["base", "tuned"];
let models = [];
let talks = new Map(); // model id -> {messages, place, column}; messages are questions that got an answer, and it
let running = null; // AbortController of the answers that are written

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

function keep() {
  const all = Object.fromEntries([...talks].map(([id, talk]) => [id, talk.messages]));
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ talks: all, settings: Object.fromEntries(new FormData(at("settings"))) }));
  } catch {
    // storage is full or switched off: the conversation lasts until the page is left
  }
}

function bubble(message) {
  return el("div", { class: `bubble ${message.role}` }, el("span", { class: "hidden" }, message.role === "user" ? t("You:") : t("Model:")), el("p", { class: "said" }, message.content));
}

function open(id, messages) {
  const place = el("div", { class: "log", role: "log", tabindex: "0", "aria-label": NAMES[id] ?? id });
  const column = el("section", { class: "panel talk" }, el("div", { class: "bar" }, el("h2", {}, NAMES[id] ?? id), el("span", { class: "quiet small", "data-speed": "" })), place);
  place.append(...messages.map(bubble));
  talks.set(id, { messages, place, column });
  return column;
}

/** The request for a model: OpenAI's fields, those that were left empty left out. */
function request(model, messages) {
  const { system, ...numbers } = Object.fromEntries(new FormData(at("settings")));
  const body = { model, stream: true, stream_options: { include_usage: true } };
  body.messages = [...(system.trim() ? [{ role: "system", content: system.trim() }] : []), ...messages];
  for (const [key, value] of Object.entries(numbers)) if (value !== "" && !(key === "top_k" && value === "0")) body[key] = Number(value);
  return body;
}

/** The events of a stream: parsed `data:` lines up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Let a model answer. The question is told again only where an answer came: two in a row are no conversation. */
async function answer(id, question, signal) {
  const talk = talks.get(id);
  const { messages } = talk; // a new conversation has a list of its own
  const message = { role: "assistant", content: "" };
  const shown = bubble(message);
  const text = shown.querySelector(".said");
  const speed = talk.column.querySelector("[data-speed]");
  talk.place.append(shown);
  talk.place.setAttribute("aria-busy", "true");
  const started = performance.now();
  let tokens = 0;
  let failed = false;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(request(id, [...messages, question])),
    });
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error?.message ?? `${response.status} ${response.statusText}`);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      tokens = event.usage?.completion_tokens ?? tokens;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      const below = talk.place.scrollHeight - talk.place.scrollTop - talk.place.clientHeight < 40;
      message.content += piece;
      text.textContent = message.content;
      if (below) talk.place.scrollTop = talk.place.scrollHeight;
    }
    const seconds = (performance.now() - started) / 1000;
    speed.textContent = tokens ? t("{tokens} tokens, {rate} per second", { tokens, rate: Math.round(tokens / seconds) }) : "";
  } catch (error) {
    if (error.name !== "AbortError") {
      shown.classList.add("wrong");
      text.textContent = `${message.content} ${error.message}`.trim();
      failed = true;
    }
  } finally {
    talk.place.removeAttribute("aria-busy");
  }
  if (failed) return;
  if (message.content.trim()) messages.push(question, message);
  else {
    text.textContent = t("No answer came; the question is not told again.");
    text.classList.add("quiet");
  }
}

async function intents(question, round) {
  const found = await post("/v1/intents", { questions: [question], top: 5 });
  if (running !== round) return; // there is a new conversation
  const [first] = found.data;
  const [{ intent: likeliest, probability: share }] = first.top;
  announce(t("Intent: {intent}, {n}%", { intent: likeliest, n: (100 * share).toFixed(1) }));
  at("intents").hidden = false;
  at("bars").replaceChildren(
    ...first.top.map(({ intent, probability }) =>
      el("li", {}, el("span", { class: "name" }, intent), el("meter", { min: "0", max: "1", value: String(probability), "aria-label": intent }), el("span", { class: "n" }, `${(100 * probability).toFixed(1)}%`)),
    ),
    ...(first.reply ? [el("li", { class: "reply quiet" }, first.reply)] : []),
  );
}

async function send() {
  const question = at("question").value.trim();
  if (!question || running) return;
  if (!at("settings").reportValidity()) return;
  const round = new AbortController();
  running = round;
  at("question").value = "";
  at("send").disabled = true;
  at("halt").hidden = false;
  const message = { role: "user", content: question };
  for (const talk of talks.values()) {
    talk.place.append(bubble(message));
    talk.place.scrollTop = talk.place.scrollHeight;
  }
  const knows = models.some((model) => model.intents);
  await Promise.all([
    ...[...talks.keys()].map((id) => answer(id, message, round.signal)),
    knows ? intents(question, round).catch((error) => say(error.message, true)) : null,
  ]);
  if (running !== round) return;
  ready();
  keep();
  at("question").focus();
}

/** Nothing is being answered any more. */
function ready() {
  running = null;
  at("send").disabled = false;
  at("halt").hidden = true;
}

at("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("keydown", (event) => {
  // Enter also ends a Chinese input, which Safari tells by the key code alone
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
});
at("halt").addEventListener("click", () => running?.abort());
at("anew").addEventListener("click", () => {
  running?.abort();
  ready();
  for (const talk of talks.values()) {
    talk.messages = [];
    talk.place.replaceChildren();
  }
  at("intents").hidden = true;
  keep();
  at("question").focus();
});
at("settings").addEventListener("input", keep);
at("settings").addEventListener("submit", (event) => event.preventDefault());

const listed = await get("/v1/models").catch((error) => ({ data: [], why: error.message }));
models = [...listed.data].sort((a, b) => ORDER.indexOf(a.id) - ORDER.indexOf(b.id));
at("no-model").hidden = models.length > 0;
at("with-model").hidden = models.length === 0;
at("anew").hidden = models.length === 0;
at("which").textContent = models.length ? models.map((model) => NAMES[model.id] ?? model.id).join(" · ") : (listed.why ?? "");
const before = kept();
for (const [name, value] of Object.entries(before.settings ?? {})) if (at("settings").elements[name]) at("settings").elements[name].value = value;
at("talks").replaceChildren(...models.map((model) => open(model.id, before.talks?.[model.id] ?? [])));
at("talks").classList.toggle("single", models.length === 1);
for (const talk of talks.values()) talk.place.scrollTop = talk.place.scrollHeight;
