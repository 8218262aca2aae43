"use strict";

const box = document.querySelector("input");
const form = document.querySelector("form");
const header = document.querySelector("header");
const sections = [...document.querySelectorAll("section")];
const columns = sections.map((section) => [...section.querySelectorAll("li")]);
const reranked = sections.findIndex((section) => section.id === "reranker");

// Marks a passage in all columns; none without a passage.
function show(passage) {
  for (const item of columns.flat()) {
    item.classList.toggle("same", passage !== undefined && item.dataset.passage === passage);
  }
}

// Puts what is typed next behind the question; after / and Esc it replaces the question.
function toEnd() {
  box.setSelectionRange(box.value.length, box.value.length);
}

// Gives a passage the focus, and brings its column into the window.
function go(item) {
  item.focus({ preventScroll: true });
  item.scrollIntoView({ block: "nearest", inline: "start" });
}

// Goes down, or to another column, from the passage that has the focus; up from the first to the box.
function move(item, down, right) {
  const column = columns.findIndex((items) => items.includes(item));
  let to = column + right;
  while (columns[to] && !columns[to].length) {
    to += right;
  }
  const items = columns[to] || columns[column];
  const row = columns[column].indexOf(item) + down;
  if (row < 0) {
    box.focus();
    toEnd();
    window.scrollTo({ top: 0 });
  } else {
    go(items[Math.min(row, items.length - 1)]);
  }
}

const KEYS = {
  ArrowDown: [1, 0],
  j: [1, 0],
  ArrowUp: [-1, 0],
  k: [-1, 0],
  ArrowRight: [0, 1],
  l: [0, 1],
  ArrowLeft: [0, -1],
  h: [0, -1],
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) {
    return;
  }
  const item = document.activeElement.closest("li");
  const typing = document.activeElement === box;
  const first = columns[reranked] && columns[reranked][0];
  if ((event.key === "/" && !typing) || (event.key === "Escape" && item)) {
    box.focus();
    box.select();
  } else if (item && event.key in KEYS) {
    move(item, ...KEYS[event.key]);
  } else if (first && !item && (event.key === "ArrowDown" || (event.key === "j" && !typing))) {
    go(first);
  } else {
    return;
  }
  event.preventDefault();
});

document.addEventListener("focusin", () => {
  const item = document.activeElement.closest("li");
  show(item ? item.dataset.passage : undefined);
});
for (const item of columns.flat()) {
  item.addEventListener("mouseenter", () => show(item.dataset.passage));
}

form.addEventListener("submit", () => form.classList.add("busy"));
// Back in the browser's history the page is as it was left.
window.addEventListener("pageshow", () => form.classList.remove("busy"));
toEnd();

// What is scrolled to stops below the header.
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--head", `${header.offsetHeight}px`);
}).observe(header);

// On a telephone, tells which column is seen.
const main = document.querySelector("main");
function tell() {
  const distances = sections.map((section) => Math.abs(section.getBoundingClientRect().left));
  const nearest = sections[distances.indexOf(Math.min(...distances))].id;
  for (const link of document.querySelectorAll("nav a")) {
    link.toggleAttribute("aria-current", link.hash === `#${nearest}`);
  }
}
if (main) {
  main.addEventListener("scroll", tell);
  tell();
}
