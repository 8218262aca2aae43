"use strict";

const box = document.querySelector("input");
const columns = [...document.querySelectorAll("section")].map((section) => [...section.querySelectorAll("li")]);
const reranked = columns.findIndex((_, number) => document.querySelectorAll("section")[number].id === "reranker");

// Marks a passage in all columns; none without a passage.
function show(passage) {
  for (const item of columns.flat()) {
    item.classList.toggle("same", passage !== undefined && item.dataset.passage === passage);
  }
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
    window.scrollTo({ top: 0 });
  } else {
    items[Math.min(row, items.length - 1)].focus();
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
    first.focus();
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

const form = document.querySelector("form");
form.addEventListener("submit", () => form.classList.add("busy"));
// Back in the browser's history the page is as it was left.
window.addEventListener("pageshow", () => form.classList.remove("busy"));
box.setSelectionRange(box.value.length, box.value.length);
