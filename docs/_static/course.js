// Questions that are really asked: what answers one is folded until the reader has decided (the class "asks" of the page
// folds it, so without this script everything is in sight). Which questions were answered is kept in this browser only.

const KEPT = "craft-of-training.answers";

function kept() {
  try { return JSON.parse(localStorage.getItem(KEPT)) || {}; } catch { return {}; }
}

function keep(key, said) {
  try { localStorage.setItem(KEPT, JSON.stringify({ ...kept(), [key]: said })); } catch { /* a page need not remember */ }
}

const answers = (key) => document.querySelectorAll(`.cell[class*="tag_asked-${key.replace(".", "-")}"]`);

function unfold(key) {
  for (const cell of answers(key)) cell.classList.add("open");
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
function decided(question, said) {
  const key = question.dataset.key;
  const measured = document.querySelector(`.answer[data-key="${key}"]`)?.dataset.measured;
  unfold(key);
  for (const choice of question.querySelectorAll(".decide button")) {
    choice.disabled = true;
    choice.setAttribute("aria-pressed", String(choice.textContent === said));
  }
  const verdict = measured === undefined ? "" : said === measured ? "✓ So it was measured." : `Measured: ${measured}.`;
  question.querySelector(".said").textContent = said ? `You said: ${said}. ${verdict}` : verdict;
}

function ask(question) {
  const key = question.dataset.key;
  if (!answers(key).length) return;
  const options = JSON.parse(question.dataset.options);
  const row = document.createElement("div");
  row.className = "decide";
  const decide = (said) => { keep(key, said); decided(question, said); };
  for (const option of options) row.append(button(option, () => decide(option)));
  row.append(button(options.length ? "Go on without a guess" : "I have decided: show what was measured", () => decide("")));
  const said = document.createElement("p");
  said.className = "said";
  said.setAttribute("aria-live", "polite");
  question.append(row, said);
  if (key in kept()) decided(question, kept()[key]);
}

// A link may lead to a claim or a heading inside of what is folded
function unfoldTarget() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const cell = target && target.closest('.cell[class*="tag_asked-"]:not(.open)');
  if (!cell) return;
  const found = [...document.querySelectorAll(".prediction")].find((one) => [...answers(one.dataset.key)].includes(cell));
  if (found) decided(found, kept()[found.dataset.key] ?? "");
  cell.classList.add("open");
  target.scrollIntoView();
}

function offerAll(questions) {
  const head = document.querySelector(".page-head");
  if (!head || !questions.length) return;
  head.append(button(`Show all answers (${questions.length} questions)`, (event) => {
    for (const cell of document.querySelectorAll('.cell[class*="tag_asked-"]')) cell.classList.add("open");
    event.target.disabled = true;
  }));
}

const questions = [...document.querySelectorAll(".prediction")];
questions.forEach(ask);
offerAll(questions);
unfoldTarget();
addEventListener("hashchange", unfoldTarget);

// What is wider than the column is scrolled by keys too
for (const block of document.querySelectorAll("article pre, article figure")) {
  if (block.scrollWidth > block.clientWidth + 1) block.tabIndex = 0;
}

// The search fetches the pages that it found for an excerpt of each; from a disk nothing can be fetched
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// "/" goes to the search
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea")) return;
  const field = document.querySelector(".sidebar-search");
  if (field) { event.preventDefault(); field.focus(); }
});
