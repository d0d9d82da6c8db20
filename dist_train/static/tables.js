"use strict";
/** Tables that are sorted by a click on a column, filtered by words, and saved as CSV. */
const Tables = (() => {
  const LEAST_TO_FILTER = 6;

  const value = (cell) => cell.dataset.v ?? cell.textContent;

  /** Below zero where cell x comes first; cells without a value stay last in both directions. */
  function compare(x, y, direction) {
    const [a, b] = [x, y].map(value);
    if (!a || !b) return Boolean(b) - Boolean(a);
    const difference = Number(a) - Number(b);
    return direction * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
  }

  function sortable(table) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.firstChild.onclick = () => {
        const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((p, q) => compare(p.cells[column], q.cells[column], direction));
        table.tBodies[0].append(...rows);
      };
    });
  }

  /** A box above the table: rows are shown that hold all of its words, in any cells and in any case. */
  function filterable(table, tools) {
    const rows = [...table.tBodies[0].rows];
    const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join("\n").toLowerCase());
    const count = Page.add(tools, "span", "count");
    count.setAttribute("role", "status");
    const box = Page.add(tools, "input");
    Object.assign(box, { type: "search", placeholder: "Filter rows" });
    box.setAttribute("aria-label", "Show the rows that hold these words");
    box.oninput = () => {
      const words = box.value.toLowerCase().split(/\s+/);
      rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    box.oninput();
  }

  function build(card) {
    const table = card.querySelector("table");
    const title = card.querySelector("h3").textContent;
    const tools = Page.add(card.querySelector("header"), "span", "tools");
    sortable(table);
    if (table.tBodies[0].rows.length >= LEAST_TO_FILTER) filterable(table, tools);
    Page.button(tools, "↓ CSV", () => {
      const rows = [...table.rows].filter((row) => !row.hidden);
      Page.saveCsv(title, rows.map((row) => [...row.cells].map(value)));
    }, "Download the rows shown as CSV");
  }

  return { build };
})();
