"""The script of a page of runs: boxes show and hide, the buttons in a table's head sort it."""

# A box shows what its selector finds. Empty cells stay last, whichever way a column is sorted.
SCRIPT = """
"use strict";
for (const box of document.querySelectorAll("input[data-shows]")) {
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll(box.dataset.shows)) part.classList.toggle("off", !box.checked);
  });
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = button.closest("table").tBodies[0];
    const turned = { none: head.dataset.first, ascending: "descending", descending: "ascending" };
    const order = turned[head.getAttribute("aria-sort")];
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
    const value = (row) => row.cells[head.cellIndex].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (!x || !y) return !x - !y;
      const found = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
      return order === "ascending" ? found : -found;
    });
    body.append(...rows);
  });
}
"""
