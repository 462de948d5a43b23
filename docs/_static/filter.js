/* Lists that can be filtered by words and by chapter: claims, references.
 *
 * The form comes hidden and is shown here, so that nothing is dead without a script. A list is what has the class
 * "filtered"; its items say their chapters in data-chapter. What is asked for stands in the address after "#", so that
 * it can be kept and sent: #words=momentum&chapter=02.
 */
"use strict";

(() => {
  const form = document.querySelector("form[data-filter]");
  if (!form) return;
  const name = form.dataset.filter;
  const words = form.elements.namedItem("words");
  const chapter = form.elements.namedItem("chapter");
  const status = form.querySelector("[role=status]");

  // Without accents and dashes, and with one kind of quotation mark, so that what is typed is found
  const plain = (text) =>
    text.normalize("NFKD").replace(/\p{M}/gu, "").replace(/[‘’]/g, "'").replace(/[“”]/g, '"').replace(/[\u2010-\u2015\u2212-]/g, "").toLowerCase();

  const items = [...document.querySelectorAll(".filtered > li")].map((element) => ({
    element,
    text: plain(element.textContent),
    chapters: (element.dataset.chapter || "").split(" "),
  }));
  const sections = [...document.querySelectorAll("section")].filter(
    (section) => section.querySelector(":scope > .filtered"),
  );

  let announcing = 0;
  function announce(message) {
    clearTimeout(announcing);
    // Once the typing pauses, or every letter would be read out
    announcing = setTimeout(() => { status.textContent = message; }, 300);
  }

  function show() {
    const wanted = plain(words.value).split(/\s+/).filter(Boolean);
    let found = 0;
    for (const item of items) {
      const fits =
        (!chapter.value || item.chapters.includes(chapter.value)) && wanted.every((word) => item.text.includes(word));
      item.element.hidden = !fits;
      found += fits;
    }
    for (const section of sections) {
      section.hidden = !section.querySelector(".filtered > li:not([hidden])");
    }
    announce(found === items.length ? `All ${found} ${name}` : `${found} of ${items.length} ${name}`);
  }

  function keep() {
    const asked = new URLSearchParams();
    if (words.value.trim()) asked.set("words", words.value.trim());
    if (chapter.value) asked.set("chapter", chapter.value);
    const hash = asked.size || [...asked].length ? `#${asked}` : "";
    try {
      // Not a step back in the browser for every letter
      history.replaceState(null, "", hash || location.pathname + location.search);
    } catch {
      location.replace(hash || "#"); // where a page from a file may not
    }
  }

  function take() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) {
      // The address of a section: a filter must not hide it
      const target = document.getElementById(decodeURIComponent(hash));
      if (!target || !target.closest("[hidden]")) return;
      words.value = chapter.value = "";
      show();
      target.scrollIntoView();
      return;
    }
    const asked = new URLSearchParams(hash);
    words.value = asked.get("words") || "";
    chapter.value = asked.get("chapter") || "";
    if (chapter.selectedIndex < 0) chapter.value = "";
    show();
  }

  const changed = () => { show(); keep(); };
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(changed)); // when the fields are empty
  window.addEventListener("hashchange", take);

  form.hidden = false;
  take();
})();
