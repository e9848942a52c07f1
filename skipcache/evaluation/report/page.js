"use strict";

// Tables: a button in each head cell sorts by data-value, or by text. Empty values stay last.
function makeSortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent.trim();
  };
  const sort = (column) => {
    const isDown = heads[column].getAttribute("aria-sort") === "ascending";
    const sign = isDown ? -1 : 1;
    const isNumber = heads[column].classList.contains("number");
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [valueOf(one, column), valueOf(other, column)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (isNumber ? a - b : a.localeCompare(b, "en", { numeric: true }));
    });
    heads.forEach((head) => head.setAttribute("aria-sort", "none"));
    heads[column].setAttribute("aria-sort", isDown ? "descending" : "ascending");
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    const title = head.querySelector(".title") ?? head;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    button.addEventListener("click", () => sort(column));
    title.append(button);
    head.setAttribute("aria-sort", "none");
  });
  table.querySelectorAll(".needs-script").forEach((note) => (note.hidden = false));
}

// Clips: every film strip of a section shows the same frame, so that they can be compared.
function makePlayer(section) {
  const play = section.querySelector(".play");
  const range = section.querySelector(".frame-range");
  const films = () => section.querySelectorAll(".film");
  let timer = null;
  const show = (frame) => {
    range.value = frame;
    for (const film of films()) {
      const own = frame % film.dataset.frames;
      film.style.setProperty("--column", own % film.dataset.columns);
      film.style.setProperty("--row", Math.floor(own / film.dataset.columns));
    }
  };
  const start = () => {
    const count = Number(range.max) + 1;
    const next = () => show((Number(range.value) + 1) % count);
    timer = setInterval(next, Number(films()[0].dataset.frameMs));
    play.textContent = "Pause";
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  play.addEventListener("click", () => (timer === null ? start() : stop()));
  range.addEventListener("input", () => {
    stop();
    show(Number(range.value));
  });
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) stop();
  else start();
  return () => show(Number(range.value));
}

// Pictures: the samples stand in the contact sheet; the viewer shows copies of two of them.
function makeViewer(section) {
  const viewer = section.querySelector(".viewer");
  if (!viewer) return;
  const find = (selector) => viewer.querySelector(selector);
  const [cells, samples] = [find(".cell-choice"), find(".sample-choice")];
  const [wipe, gain] = [find(".wipe-range"), find(".gain-range")];
  const stage = find(".stage.wipe");
  const redraw = find(".play") ? makePlayer(section) : () => {};
  const thumbOf = (cell) =>
    section.querySelector(`.thumb[data-cell="${cell}"][data-sample="${samples.value}"]`);

  const choose = () => {
    const pair = [thumbOf(viewer.dataset.reference), thumbOf(cells.value)];
    ["below", "above"].forEach((place, i) => {
      for (const slot of viewer.querySelectorAll(`.${place}`)) {
        const film = pair[i]?.firstElementChild.cloneNode(true);
        if (film && slot.closest(".difference")) film.firstElementChild.alt = "";
        slot.replaceChildren(...(film ? [film] : []));
      }
    });
    section.querySelectorAll(".chosen").forEach((thumb) => thumb.classList.remove("chosen"));
    pair[1]?.classList.add("chosen");
    const numbers = section.querySelector(`.contact-numbers[data-cell="${cells.value}"]`);
    find(".tag.right").textContent = cells.selectedOptions[0].textContent;
    find(".numbers").textContent = numbers?.textContent ?? "";
    redraw();
  };
  const setWipe = () => {
    stage.style.setProperty("--wipe", `${wipe.value}%`);
    wipe.setAttribute("aria-valuetext", `${wipe.value} % uncached`);
  };
  const setGain = () => {
    const times = 2 ** gain.value;
    find(".stage.difference").style.setProperty("--gain", times);
    find(".gain-text").textContent = times;
    gain.setAttribute("aria-valuetext", `${times} times`);
  };
  const drag = (event) => {
    if (!event.buttons) return;
    const box = stage.getBoundingClientRect();
    wipe.value = (100 * (event.clientX - box.left)) / box.width;
    setWipe();
  };

  cells.addEventListener("change", choose);
  samples.addEventListener("change", choose);
  wipe.addEventListener("input", setWipe);
  gain.addEventListener("input", setGain);
  stage.addEventListener("pointerdown", drag);
  stage.addEventListener("pointermove", drag);
  section.querySelector(".contacts").addEventListener("click", (event) => {
    const thumb = event.target.closest(".thumb");
    if (!thumb) return;
    samples.value = thumb.dataset.sample;
    if (thumb.dataset.cell !== viewer.dataset.reference) cells.value = thumb.dataset.cell;
    choose();
  });
  if (!cells.options.length) return;
  choose();
  setWipe();
  setGain();
  viewer.hidden = false;
  if (matchMedia("(max-width: 42rem)").matches) section.querySelector(".contacts").open = false;
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll(".pictures").forEach(makeViewer);
