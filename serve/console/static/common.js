// What all pages share: the reader's language, elements made of texts, requests, the switch of colours.

const language = document.documentElement.lang;
const texts = language === "zh-CN" ? await (await fetch("/console/static/zh-CN.json")).json() : {};

/** The text in the reader's language, with values for its {names}. */
export function t(text, values = {}) {
  return (texts[text] ?? text).replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** An element with attributes (`class`, `data-…`, on… are functions) and children: elements or texts, never markup. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** The JSON of an address; an error has the server's sentence. */
export async function get(address, values = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(values)) query.set(key, value);
  return answer(await fetch(values && query.size ? `${address}?${query}` : address, { signal }));
}

/** Send a JSON object. */
export async function post(address, value) {
  return answer(
    await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) }),
  );
}

async function answer(response) {
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error?.message ?? `${response.status} ${response.statusText}`);
  return found;
}

/** Tell the reader something, for some seconds; screen readers speak it. */
export function say(text, wrong = false) {
  const place = document.getElementById("say");
  place.textContent = text;
  place.classList.toggle("wrong", wrong);
  place.classList.add("shown");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => place.classList.remove("shown"), wrong ? 9000 : 4000);
}

/** Let screen readers speak what is new, and no more: what stands on the page is not repeated. */
export function announce(text) {
  const place = document.getElementById("news");
  if (place.textContent !== text) place.textContent = text;
}

/** Call `work` again and again, `seconds()` apart, while the page is seen; null ends it. One failure does not. */
export function poll(work, seconds) {
  let timer = 0;
  let failed = 0;
  const next = () => {
    const wait = seconds();
    clearTimeout(timer);
    if (wait !== null) timer = setTimeout(turn, 1000 * wait * Math.min(10, 1 + failed));
  };
  const turn = async () => {
    if (document.hidden) return; // goes on when the page is seen again
    try {
      await work();
      failed = 0;
    } catch (error) {
      failed += 1;
      if (failed === 3) say(t("The console does not answer: {why}", { why: error.message }), true);
    }
    next();
  };
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) turn();
  });
  next();
}

/** Put a run's live values into the elements that have them. */
export function fill(place, run) {
  for (const element of place.querySelectorAll("[data-cell]")) {
    const text = run.cells[element.dataset.cell];
    if (text !== undefined && element.textContent !== text) element.textContent = text;
  }
  for (const state of place.querySelectorAll(".state")) state.className = `state ${run.state}`;
  for (const bar of place.querySelectorAll("progress")) bar.value = run.share;
}

const themes = ["auto", "light", "dark"];
const button = document.getElementById("theme");
const current = () => document.documentElement.dataset.theme ?? "auto";
const following = () => themes[(themes.indexOf(current()) + 1) % themes.length];
function label() {
  button.textContent = button.dataset[current()];
  const name = t("Colours: {now}. Change to: {next}", { now: button.dataset[current()], next: button.dataset[following()] });
  button.setAttribute("aria-label", name); // it begins with what is seen, and says what a press does
  button.title = name;
}
button.addEventListener("click", () => {
  const next = following();
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("llmops.theme", next);
  } catch {
    say(t("This browser keeps no settings, so the colours last until the page is left."));
  }
  label();
  announce(t("Colours: {now}", { now: button.dataset[next] }));
  document.dispatchEvent(new Event("theme"));
});
label();
