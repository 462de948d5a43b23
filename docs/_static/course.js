// Questions that are really asked: what answers one is folded until the reader has decided (the class "asks" of the page
// folds it, so without this script everything is in sight). Guesses are kept in this browser only.

const KEPT = "craft-of-training.answers";
const TOLD = "craft-of-training.told"; // set by who does not want to be asked

function stored(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}

function store(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch { /* a page need not remember */ }
}

function guesses() {
  try { return JSON.parse(stored(KEPT)) || {}; } catch { return {}; }
}

function keep(key, said) {
  const kept = guesses();
  if (said === null) delete kept[key];
  else kept[key] = said;
  store(KEPT, JSON.stringify(kept));
}

const answers = (key) => document.querySelectorAll(`[class*="asked-${key.replace(".", "-")}"]`);

function fold(key, open) {
  for (const part of answers(key)) part.classList.toggle("open", open);
  fit();
}

// What is wider than the column is scrolled, by keys too, and a shadow says that there is more. Asked again when
// something is unfolded: what is folded has no width
function fit() {
  for (const block of document.querySelectorAll("article pre, article figure")) {
    if (block.scrollWidth > block.clientWidth + 1) block.tabIndex = 0;
  }
  document.querySelectorAll(".scrolls, .explorer-picture").forEach(hint);
}

function hint(box) {
  box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 8);
}

function button(words, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "craft";
  made.textContent = words;
  made.addEventListener("click", act);
  return made;
}

// The reader's guess beside what was measured; `said` is "" for who went on without one
function decided(question, said, focus) {
  const key = question.dataset.key;
  const measured = document.querySelector(`.answer[data-key="${key}"]`)?.dataset.measured;
  fold(key, true);
  question.querySelector(".decide").hidden = true;
  const isChoice = JSON.parse(question.dataset.options).length > 0;
  const right = isChoice && said === measured;
  const verdict = measured === undefined ? "" : right ? "\u2713 So it was measured." : `Measured: ${measured}.`;
  const words = question.querySelector(".said");
  words.textContent = `${said ? `You said: ${said}. ` : ""}${verdict} `;
  words.append(button("Ask again", () => { keep(key, null); again(question); }));
  if (focus) words.focus({ preventScroll: true });
}

function again(question) {
  fold(question.dataset.key, false);
  question.querySelector(".decide").hidden = false;
  question.querySelector(".said").textContent = "";
  question.querySelector(".decide :is(button, input)").focus({ preventScroll: true });
}

function ask(question) {
  const key = question.dataset.key;
  if (!answers(key).length) return;
  const options = JSON.parse(question.dataset.options);
  const row = document.createElement("form");
  row.className = "decide";
  const decide = (said) => { keep(key, said); decided(question, said, true); };
  for (const option of options) row.append(button(option, () => decide(option)));
  if (!options.length) {
    const field = document.createElement("input");
    field.setAttribute("aria-label", "Your guess");
    field.placeholder = "your guess";
    field.autocomplete = "off";
    row.append(field, button("Show what was measured", () => decide(field.value.trim())));
  } else {
    row.append(button("Go on without a guess", () => decide("")));
  }
  row.addEventListener("submit", (event) => { event.preventDefault(); row.querySelector("button").click(); });
  const said = document.createElement("p");
  said.className = "said";
  said.tabIndex = -1;
  said.setAttribute("aria-live", "polite");
  question.append(row, said);
  if (key in guesses()) decided(question, guesses()[key], false);
}

// A link may lead to a claim or a figure inside of what is folded
function unfoldTarget() {
  let name = location.hash.slice(1);
  try { name = decodeURIComponent(name); } catch { return; }
  const target = name && document.getElementById(name);
  const part = target && target.closest('[class*="asked-"]:not(.open)');
  if (!part) return;
  const found = questions.find((one) => [...answers(one.dataset.key)].includes(part));
  if (found) decided(found, guesses()[found.dataset.key] ?? "", false);
  part.classList.add("open");
  target.scrollIntoView();
}

function offerAll() {
  const head = document.querySelector(".page-head");
  if (!head || !questions.length) return;
  const page = document.documentElement.classList;
  const words = () => (page.contains("asks") ? `Show all answers (${questions.length} questions)` : "Ask me the questions");
  const toggle = button(words(), () => {
    store(TOLD, page.toggle("asks") ? null : "yes");
    toggle.textContent = words();
    fit();
  });
  head.append(toggle);
}

const questions = [...document.querySelectorAll(".prediction")];
questions.forEach(ask);
offerAll();
unfoldTarget();
addEventListener("hashchange", unfoldTarget);

// Keys that scroll what is wider than the column do not turn the page
addEventListener("keydown", (event) => {
  if (/^Arrow(Left|Right)$/.test(event.key) && event.target.closest?.('[tabindex="0"]')) event.stopPropagation();
}, true);

addEventListener("scroll", (event) => { if (event.target.matches?.(".scrolls, .explorer-picture")) hint(event.target); }, true);
addEventListener("resize", fit);
addEventListener("load", fit);
fit();
for (const explorer of document.querySelectorAll("figure.explorer")) {
  new MutationObserver(fit).observe(explorer, { childList: true });
}

// The search fetches the pages that it found for an excerpt of each; from a disk nothing can be fetched
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
// ... and an excerpt is made of words: not of a formula's second form, nor of paragraphs run together
if (typeof Search !== "undefined" && Search.htmlToText) {
  const plain = Search.htmlToText;
  Search.htmlToText = (text, anchor) => {
    const page = new DOMParser().parseFromString(text, "text/html");
    for (const part of page.querySelectorAll(".katex-mathml, .cell_input, .page-head")) part.remove();
    for (const part of page.querySelectorAll("p, li, dt, dd, td, th, div, h2, h3")) part.append(" ");
    return plain(page.documentElement.outerHTML, anchor);
  };
}

// "/" goes to the search
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest?.("input, select, textarea")) return;
  const field = document.querySelector(".sidebar-search");
  if (field) { event.preventDefault(); field.focus(); }
});
