/* Explorers that move without a kernel. The page holds, for each,

     <figure class="explorer" data-frames="../frames/02.js" data-key="02" data-index="0" data-controls="4">
       <img src="….png" alt="…" width="810" height="297" loading="lazy">
     </figure>

   When it comes near the screen, its frames are loaded (course_lib/proving/frames.py says what they hold), controls stand
   above the picture, and the picture is the frame for their positions. data-controls, the number of controls, may be left
   out; with it their room is kept from the start. Without DecompressionStream, or frames, the picture stays as it is. */
"use strict";

(() => {
  const VERSION = 1;
  const NEAR = "600px"; // loading starts so far below or above the screen
  const PAUSE = 500; // milliseconds without a movement before the picture is described aloud
  const NOTE = "Drawn beforehand at {n} positions; the notebook’s own moves freely.";
  const chapters = new Map(); // the explorers of each file of frames, once it is asked for

  /** An element with attributes (or properties: text) and children. */
  function element(tag, { text, ...attributes } = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    made.append(...children);
    return made;
  }

  /** The explorers of a chapter. Its file is a script: pages opened from a disk may load those, but fetch nothing. */
  function load(source, key) {
    if (!chapters.has(source)) chapters.set(source, run(source).then(() => unpack(window.explorerFrames[key])));
    return chapters.get(source);
  }

  function run(source) {
    return new Promise((resolve, reject) => {
      const script = element("script", { src: source });
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${source} cannot be loaded`));
      document.head.append(script);
    });
  }

  async function unpack(base64) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const file = await new Response(stream).json();
    if (file.version !== VERSION) throw new Error(`frames of version ${file.version}, not ${VERSION}`);
    return file.explorers;
  }

  /** One control: what stands in the page, and functions that read and set its position. */
  function makeControl(control, id, changed) {
    const { label, shown, kind, start } = control;
    const name = element("label", { for: id, class: "explorer-label", text: label });
    // autocomplete: a browser that comes back to a page would set the old position, and the picture be another
    const common = { id, class: "explorer-input", autocomplete: "off" };
    const isChoice = kind === "choice";
    const options = shown.map((words, position) => element("option", { value: position, text: words }));
    const input = isChoice
      ? element("select", common, ...options)
      : element("input", { ...common, type: "range", min: 0, max: shown.length - 1, step: 1 });
    const value = element("span", { class: "explorer-value", "aria-hidden": "true" }); // aria-valuetext says it
    const say = () => {
      if (isChoice) return; // a list shows and says its option by itself
      value.textContent = shown[input.value];
      input.setAttribute("aria-valuetext", shown[input.value]);
    };
    const move = (position) => {
      input.value = position;
      say();
    };
    input.addEventListener("input", () => {
      say();
      changed();
    });
    move(start);
    const box = element("div", { class: "explorer-control" }, name, input, ...(isChoice ? [] : [value]));
    return { box, position: () => Number(input.value), reset: () => move(start) };
  }

  /** Put controls into `bar`, and the frame for their positions in the place of `image`. */
  function show(explorer, { bar, note, image, status, word }) {
    const { pieces, frames, grid, controls } = explorer;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", explorer.view);
    svg.setAttribute("role", "img");
    const [width, height] = explorer.size;
    svg.setAttribute("width", image.getAttribute("width") || width); // as the image: nothing moves
    svg.setAttribute("height", image.getAttribute("height") || height);

    let timer;
    const draw = () => {
      const place = made.reduce((before, control, i) => before * controls[i].shown.length + control.position(), 0);
      const [words, ...parts] = frames[grid[place]].map((index) => pieces[index]);
      svg.innerHTML = parts.join("").replaceAll("{id}", word);
      svg.setAttribute("aria-label", words);
      return words;
    };
    const changed = () => {
      const words = draw();
      clearTimeout(timer);
      timer = setTimeout(() => (status.textContent = words), PAUSE);
    };
    const made = controls.map((control, i) => makeControl(control, `${word}control${i}`, changed));
    const reset = element("button", { type: "button", class: "explorer-reset", text: "Reset" });
    reset.addEventListener("click", () => {
      for (const control of made) control.reset();
      changed();
    });

    draw();
    bar.replaceChildren(...made.map((control) => control.box), reset);
    image.replaceWith(svg);
    note.textContent = NOTE.replace("{n}", grid.length.toLocaleString("en"));
  }

  /** Make a figure ready: room for its controls, and its frames asked for when a reader comes near. */
  function prepare(figure, number) {
    const image = figure.querySelector("img");
    const { frames, key, index = 0, controls = 2 } = figure.dataset;
    const room = Array.from({ length: Number(controls) }, () => element("div", { class: "explorer-control" }));
    room.push(element("button", { type: "button", class: "explorer-reset", disabled: "", text: "Reset" }));
    const bar = element("div", { class: "explorer-controls", role: "group", "aria-label": "Controls" }, ...room);
    const note = element("p", { class: "explorer-note", text: NOTE.replace("{n}", "many") });
    const status = element("p", { class: "explorer-status", role: "status", "aria-live": "polite" });
    const picture = element("div", { class: "explorer-picture" });
    figure.style.setProperty("--wide", image.getAttribute("width"));
    image.before(bar, picture, note, status);
    picture.append(image);
    new ResizeObserver(() => scrollable(picture)).observe(picture);

    const start = async () => {
      watcher.disconnect();
      figure.removeEventListener("focusin", start);
      try {
        const explorer = (await load(frames, key))[index];
        show(explorer, { bar, note, image, status, word: `explorer${number}-` });
      } catch (error) {
        console.error(error);
        bar.remove();
        note.textContent = "The other pictures could not be loaded; this one shows where the explorer starts.";
      }
    };
    const watcher = new IntersectionObserver(
      (entries) => entries.some((entry) => entry.isIntersecting) && start(),
      { rootMargin: `${NEAR} 0px` },
    );
    watcher.observe(figure);
    figure.addEventListener("focusin", start);
  }

  /** A picture wider than the page scrolls by itself; then, and only then, the keyboard can stop at it. */
  function scrollable(picture) {
    const wide = picture.scrollWidth > picture.clientWidth + 1;
    const attributes = { tabindex: "0", role: "group", "aria-label": "Picture, scrolls sideways" };
    for (const [name, value] of Object.entries(attributes)) {
      if (wide) picture.setAttribute(name, value);
      else picture.removeAttribute(name);
    }
  }

  function prepareAll() {
    if (!("DecompressionStream" in window && "IntersectionObserver" in window)) return;
    document.querySelectorAll("figure.explorer[data-frames]").forEach(prepare);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", prepareAll);
  else prepareAll();
})();
