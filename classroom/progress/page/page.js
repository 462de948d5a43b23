// Fetches the page anew every few seconds and changes only what has changed: the place on the page, what is unfolded and
// what has the focus stay.
"use strict";

const SECONDS = Number(document.currentScript.dataset.seconds);

function update(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(document.importNode(fresh, true));
  } else if (old.nodeType === Node.ELEMENT_NODE) {
    for (const { name } of [...old.attributes])
      if (name !== "open" && !fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes)
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    const before = [...old.childNodes], after = [...fresh.childNodes];
    after.forEach((child, k) => k < before.length ? update(before[k], child) : old.append(document.importNode(child, true)));
    before.slice(after.length).forEach((child) => child.remove());
  } else if (old.data !== fresh.data) {
    old.data = fresh.data;
  }
}

const clock = () => new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

function say(id, words) {
  const line = document.getElementById(id);
  if (line.textContent !== words) line.textContent = words;
}

async function look() {
  try {
    const answer = await fetch(location.pathname, { cache: "no-store", redirect: "error" });
    if (!answer.ok) throw new Error(answer.statusText);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    update(document.getElementById("live"), fresh.getElementById("live"));
    say("state", `As of ${clock()}.`);
    say("lost", "");
  } catch {
    say("lost", "No answer: what is shown is old. Is the page still served?");
  }
  setTimeout(look, 1000 * SECONDS);
}

say("state", `As of ${clock()}.`);
setTimeout(look, 1000 * SECONDS);
