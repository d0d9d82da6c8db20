"use strict";
/** What the sections of the page share: elements, choices, downloads. */
const Page = (() => {
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;

  function add(parent, tag, className = "", text = "") {
    const node = parent.appendChild(document.createElement(tag));
    if (className) node.className = className;
    if (text) node.textContent = text;
    return node;
  }

  function button(parent, text, onclick, title = "") {
    const node = add(parent, "button", "", text);
    return Object.assign(node, { type: "button", onclick, title });
  }

  /** A drop-down list with its label; `onChange` is told the index chosen. */
  function dropdown(parent, label, titles, onChange) {
    const select = add(parent, "select");
    select.setAttribute("aria-label", label);
    titles.forEach((title, i) => { add(select, "option", "", title).value = i; });
    select.onchange = () => onChange(select.selectedIndex);
    return select;
  }

  /** A drop-down list with a button on either side; `onChange` is told the index chosen, 0 at first. */
  function chooser(bar, titles, onChange) {
    const previous = button(bar, "‹ Previous", () => go(select.selectedIndex - 1));
    const select = dropdown(bar, "Crystal", titles, (i) => go(i));
    const next = button(bar, "Next ›", () => go(select.selectedIndex + 1));
    const count = add(bar, "span", "count");
    const go = (i) => {
      select.selectedIndex = (i + titles.length) % titles.length;
      count.textContent = `${select.selectedIndex + 1} of ${titles.length}`;
      onChange(select.selectedIndex);
    };
    for (const node of [previous, select, next, count]) node.hidden = titles.length < 2;
    go(0);
  }

  function slider(parent, label, most, oninput) {
    const node = add(parent, "input");
    node.setAttribute("aria-label", label);
    return Object.assign(node, { type: "range", min: 0, max: most, value: 0, oninput });
  }

  // ---- downloads ------------------------------------------------------------------------------------------------

  const fileName = (text) => text.replace(/[^\w.-]+/g, "_").replace(/^[._]+/, "").slice(0, 80) || "crystal";

  /** Offer a text or bytes as a file. */
  function save(name, content, type = "text/plain") {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function saveCsv(title, rows) {
    const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    save(`${fileName(title)}.csv`, rows.map((row) => row.map(quoted).join(",") + "\r\n").join(""), "text/csv");
  }

  /** The number of low bytes that each value takes, lowest byte first. */
  const lowFirst = (...fields) =>
    fields.flatMap(([value, size]) => Array.from({ length: size }, (_, i) => (value >>> (8 * i)) & 255));

  function crc32(bytes) {
    let sum = ~0;
    for (const byte of bytes) {
      sum ^= byte;
      for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
    }
    return ~sum >>> 0;
  }

  /** [name, text] of files as a zip archive without compression; files of one name are numbered. */
  function zip(files) {
    const encoder = new TextEncoder();
    const parts = [];
    const directory = [];
    const seen = {};
    let offset = 0;
    for (const [stem, text] of files) {
      seen[stem] = (seen[stem] ?? 0) + 1;
      const name = encoder.encode(`${stem}${seen[stem] > 1 ? `-${seen[stem]}` : ""}.cif`);
      const body = encoder.encode(text);
      const size = body.length;
      // Version, names in UTF-8, stored, 0:00 on 1 January 1980, checksum, sizes, no extra field.
      const about = lowFirst([20, 2], [0x800, 2], [0, 4], [33, 2], [crc32(body), 4], [size, 4], [size, 4], [name.length, 2], [0, 2]);
      const header = Uint8Array.from([...lowFirst([0x04034b50, 4]), ...about, ...name]);
      directory.push(...lowFirst([0x02014b50, 4], [20, 2]), ...about, ...lowFirst([0, 2], [0, 4], [0, 4], [offset, 4]), ...name);
      parts.push(header, body);
      offset += header.length + size;
    }
    const end = lowFirst([0x06054b50, 4], [0, 4], [files.length, 2], [files.length, 2], [directory.length, 4], [offset, 4], [0, 2]);
    return new Blob([...parts, Uint8Array.from([...directory, ...end])]);
  }

  return { reducedMotion, add, button, dropdown, chooser, slider, fileName, save, saveCsv, zip };
})();
