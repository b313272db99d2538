"use strict";
// A click on a head cell sorts its table by that column; a second click turns the order around.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  const number = (text) => parseFloat(text.replace("\u2212", "-").replace(/[, ]/g, ""));
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [number(key(a)), number(key(b))];
        const both = Number.isFinite(x) && Number.isFinite(y);
        return (up ? 1 : -1) * (both ? x - y : key(a).localeCompare(key(b), "en", { numeric: true }));
      });
      body.append(...rows);
    });
  });
}
