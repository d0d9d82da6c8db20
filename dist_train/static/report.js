"use strict";
(() => {
  const { hasWebgl, tryRead, radius, formula, colour, makeViewer, draw } = Crystals;
  const FRAME_MS = 450;
  const data = JSON.parse(document.getElementById("data").textContent);
  const panes = [];
  let bonds = false; // one choice for all views

  function add(parent, tag, className = "", text = "") {
    const node = parent.appendChild(document.createElement(tag));
    if (className) node.className = className;
    if (text) node.textContent = text;
    return node;
  }

  function writeFormula(node, crystal) {
    node.replaceChildren();
    for (const [elem, count] of formula(crystal)) {
      node.append(elem);
      if (count > 1) add(node, "sub", "", String(count));
    }
  }

  function save(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "chemical/x-cif" }));
    link.download = (name.replace(/[^\w.-]+/g, "_").slice(0, 80) || "crystal") + ".cif";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---- one crystal ----------------------------------------------------------------------------------------------

  /** A card with a role, a formula, a 3-D view, the cell and a legend; `show` draws a CIF in it. */
  class Pane {
    constructor(host) {
      const card = add(host, "article", "card pane");
      const header = add(card, "header");
      this.role = add(header, "span", "role");
      this.formula = add(header, "span", "formula");
      this.name = add(header, "span", "name");
      const buttons = add(header, "span", "buttons");
      this.bonds = add(buttons, "button", "", "Bonds");
      this.bonds.title = "Join atoms nearer than the sum of their covalent radii and 0.1 Å";
      this.bonds.onclick = toggleBonds;
      this.download = add(buttons, "button", "", "↓ CIF");
      this.download.title = "Download this crystal as a CIF file";
      this.stage = add(card, "div", "stage");
      this.failure = add(this.stage, "div", "failure");
      const below = add(card, "div", "below");
      this.legend = add(below, "div", "legend");
      this.facts = add(below, "div", "facts");
      this.viewer = makeViewer(this.stage);
      // The wheel scrolls the page; with Ctrl, or by a pinch, it zooms the crystal.
      this.stage.addEventListener("wheel", (event) => event.ctrlKey || event.stopPropagation(), { capture: true });
      panes.push(this);
    }

    /** Draw a CIF, or where it is null show the reason; on `scale` angstrom, or else on the crystal's own. */
    show({ cif, role = "", name = "", reason = "", scale = undefined }) {
      this.role.textContent = role;
      this.role.hidden = !role;
      this.name.textContent = name;
      this.download.hidden = cif === null;
      this.download.onclick = () => save([name, role].filter(Boolean).join("-"), cif);
      for (const node of [this.formula, this.legend, this.facts, this.failure]) node.replaceChildren();
      const [crystal, error] = tryRead(cif);
      this.drawn = { crystal, scale };
      if (crystal) this.describe(crystal);
      if (!crystal) this.fail("No crystal", reason || error);
      else if (!hasWebgl) this.fail("No 3-D view", "This browser offers no WebGL 2.");
      else this.failure.hidden = true;
      this.redraw();
    }

    redraw() {
      const { crystal, scale } = this.drawn;
      this.bonds.setAttribute("aria-pressed", String(bonds));
      this.bonds.hidden = !crystal || !hasWebgl;
      if (crystal && hasWebgl) draw(this.viewer, crystal, { scale, bonds });
    }

    fail(title, reason) {
      this.failure.hidden = false;
      add(this.failure, "b", "", title);
      add(this.failure, "span", "", reason);
    }

    describe(crystal) {
      writeFormula(this.formula, crystal);
      for (const [elem] of formula(crystal)) {
        const entry = add(this.legend, "span");
        add(entry, "i").style.background = colour(elem);
        entry.append(elem);
      }
      const edges = crystal.cell.slice(0, 3).map((x) => x.toFixed(2)).join(" × ");
      const angles = crystal.cell.slice(3).map((x) => x.toFixed(1) + "°").join(" ");
      const atoms = crystal.atoms.length === 1 ? "1 atom" : `${crystal.atoms.length} atoms`;
      this.facts.textContent = `${edges} Å · ${angles} · ${crystal.volume.toFixed(1)} Å³ · ${atoms}`;
    }
  }

  function toggleBonds() {
    bonds = !bonds;
    panes.forEach((pane) => pane.redraw());
  }

  // ---- sections -------------------------------------------------------------------------------------------------

  /** A drop-down list with a button on either side; `onChange` is told the index chosen, 0 at first. */
  function chooser(bar, titles, onChange) {
    const previous = add(bar, "button", "", "‹ Previous");
    const select = add(bar, "select");
    const next = add(bar, "button", "", "Next ›");
    const count = add(bar, "span", "count");
    select.setAttribute("aria-label", "Crystal");
    titles.forEach((title, i) => { add(select, "option", "", title).value = i; });
    const go = (i) => {
      select.selectedIndex = (i + titles.length) % titles.length;
      count.textContent = `${select.selectedIndex + 1} of ${titles.length}`;
      onChange(select.selectedIndex);
    };
    select.onchange = () => go(select.selectedIndex);
    previous.onclick = () => go(select.selectedIndex - 1);
    next.onclick = () => go(select.selectedIndex + 1);
    bar.hidden = titles.length < 2;
    go(0);
  }

  function pairs(section) {
    const [left, right] = [0, 1].map(() => new Pane(section.querySelector(".panes")));
    if (hasWebgl) {
      left.viewer.linkViewer(right.viewer);
      right.viewer.linkViewer(left.viewer);
    }
    const titles = data.pairs.map((pair) => pair.title + (pair.right === null ? " (failed)" : ""));
    chooser(section.querySelector(".bar"), titles, (i) => {
      const pair = data.pairs[i];
      const shared = { name: pair.title, scale: radius(pair.left, pair.right) || undefined };
      left.show({ ...shared, cif: pair.left, role: pair.left_label });
      right.show({ ...shared, cif: pair.right, role: pair.right_label, reason: pair.note });
      section.querySelector(".note").textContent = pair.right === null ? "" : pair.note;
    });
  }

  function path(section) {
    const pane = new Pane(section.querySelector(".panes"));
    const bar = section.querySelector(".bar");
    const frames = data.path;
    const scale = radius(...frames.map((frame) => frame.cif)) || undefined;
    const play = add(bar, "button", "wide", "▶ Play");
    const slider = add(bar, "input");
    const count = add(bar, "span", "count");
    Object.assign(slider, { type: "range", min: 0, max: frames.length - 1, value: 0 });
    slider.setAttribute("aria-label", "Step of the interpolation");
    const show = (i) => {
      slider.value = i;
      count.textContent = `${i + 1} of ${frames.length}`;
      pane.show({ cif: frames[i].cif, name: frames[i].title, scale });
    };
    let timer = 0;
    const run = (on) => {
      clearInterval(timer);
      timer = on ? setInterval(() => show((Number(slider.value) + 1) % frames.length), FRAME_MS) : 0;
      play.textContent = on ? "❚❚ Pause" : "▶ Play";
    };
    play.onclick = () => run(!timer);
    slider.oninput = () => {
      run(false);
      show(Number(slider.value));
    };
    bar.hidden = frames.length < 2;
    show(0);
  }

  function samples(section) {
    const host = section.querySelector(".panes");
    const pane = new Pane(host);
    const grid = add(host, "div", "thumbs");
    const buttons = data.samples.map(({ title, cif }, i) => {
      const button = add(grid, "button", "thumb");
      add(button, "img").alt = "";
      const name = add(button, "b", "", "unreadable");
      const [crystal] = tryRead(cif);
      if (crystal) writeFormula(name, crystal);
      add(button, "span", "", title);
      button.onclick = () => choose(i);
      return button;
    });
    function choose(i) {
      buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === i)));
      pane.show({ cif: data.samples[i].cif, name: data.samples[i].title });
    }
    choose(0);
    if (hasWebgl) thumbnails(grid.querySelectorAll("img"));
  }

  /** One hidden view draws the small pictures one after another, so that the page stays responsive. */
  function thumbnails(images) {
    const stage = add(document.body, "div");
    stage.id = "thumb-stage";
    const viewer = makeViewer(stage);
    const next = (i) => {
      if (i === images.length) return stage.remove();
      const [crystal] = tryRead(data.samples[i].cif);
      if (crystal) {
        draw(viewer, crystal, { letters: false });
        images[i].src = viewer.pngURI();
      }
      return setTimeout(next, 0, i + 1);
    };
    next(0);
  }

  // ---- tables ---------------------------------------------------------------------------------------------------

  /** Below zero where cell x comes first; cells without a value stay last in both directions. */
  function compare(x, y, direction) {
    const [a, b] = [x, y].map((cell) => cell.dataset.v ?? cell.textContent);
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

  // ---- start ----------------------------------------------------------------------------------------------------

  document.querySelectorAll("table").forEach(sortable);
  const builders = { pairs, path, samples };
  for (const section of document.querySelectorAll("main > section")) {
    const build = builders[section.id];
    section.hidden = build ? !data[section.id].length : !section.querySelector("article, figure");
    if (section.hidden) continue;
    if (build) build(section);
    add(document.getElementById("nav"), "a", "", section.dataset.nav).href = `#${section.id}`;
  }
  const drawn = Object.keys(builders).some((id) => data[id].length);
  document.getElementById("no-webgl").hidden = hasWebgl || !drawn;
  document.documentElement.dataset.ready = "true";
})();
