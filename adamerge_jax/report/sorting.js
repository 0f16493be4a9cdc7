// Sorts a table by a column when its heading is pressed: numbers by size, largest first.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2 || headings.every((heading) => !heading.textContent)) continue;
  const given = [...body.rows];
  headings.forEach((heading, column) => {
    if (!heading.textContent) return;
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    button.title = "Sort by this column";
    heading.append(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const after = { null: "descending", descending: "ascending" }[before];
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      if (after) heading.setAttribute("aria-sort", after);
      const key = (row) => row.cells[column].textContent;
      const number = (text) => parseFloat(text.replaceAll(",", ""));
      const rows = [...given];
      if (after) {
        rows.sort((one, other) => {
          const [a, b] = [key(one), key(other)];
          const [x, y] = [number(a), number(b)];
          if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
          const order = isNaN(x) ? b.localeCompare(a) : y - x;
          return after === "descending" ? order : -order;
        });
      }
      body.append(...rows);
    });
  });
}
