
"use strict";
// Numbers sort as numbers, words as words; empty cells come last, whichever way.
const compare = (a, b) => {
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
};
const heads = [...document.querySelectorAll("thead th")];
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const body = document.querySelector("tbody");
  const key = row => row.cells[column].dataset.sort;
  const rows = [...body.rows].sort((a, b) => {
    if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
    return way * compare(key(a), key(b));
  });
  body.append(...rows);
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
}));
