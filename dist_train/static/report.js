"use strict";
(() => {
  const { hasWebgl, tryRead, radius, formula, colour, makeViewer, draw } = Crystals;
  const { add, button, chooser, fileName, save, zip } = Page;
  // Who wants less motion gets a slow animation that ends.
  const [FRAME_MS, LOOPS] = Page.reducedMotion ? [1500, false] : [450, true];
  const data = JSON.parse(document.getElementById("data").textContent);
  const panes = [];
  let bonds = false; // one choice for all views

  function writeFormula(node, crystal) {
    node.replaceChildren();
    for (const [elem, count] of formula(crystal)) {
      node.append(elem);
      if (count > 1) add(node, "sub", "", String(count));
    }
  }

  /** A name for the file of a CIF, of its data block; without the ending. */
  function stem(cif, role = "") {
    const [, id] = /^data_(\S+)/m.exec(cif) || [];
    return fileName([id || "crystal", role].filter(Boolean).join("-"));
  }

  /** A button that offers [stem, CIF] of all crystals of a section as an archive. */
  function saveAll(bar, files) {
    button(bar, "↓ all CIFs", () => save("crystals.zip", zip(files), "application/zip"), `${files.length} CIF files in a zip archive`);
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
      const told = "Join atoms nearer than the sum of their covalent radii and 0.1 Å";
      this.bonds = button(buttons, "Bonds", toggleBonds, told);
      this.download = button(buttons, "↓ CIF", null, "Download this crystal as a CIF file");
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
      this.name.textContent = this.name.title = name;
      this.download.hidden = cif === null;
      this.download.onclick = () => save(`${stem(cif, role)}.cif`, cif, "chemical/x-cif");
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

  function pairs(section) {
    const [left, right] = [0, 1].map(() => new Pane(section.querySelector(".panes")));
    if (hasWebgl) {
      left.viewer.linkViewer(right.viewer);
      right.viewer.linkViewer(left.viewer);
    }
    const titles = data.pairs.map((pair) => pair.title + (pair.right === null ? " (failed)" : ""));
    const bar = section.querySelector(".bar");
    chooser(bar, titles, (i) => {
      const pair = data.pairs[i];
      const shared = { name: pair.title, scale: radius(pair.left, pair.right) || undefined };
      left.show({ ...shared, cif: pair.left, role: pair.left_label });
      right.show({ ...shared, cif: pair.right, role: pair.right_label, reason: pair.note });
      section.querySelector(".note").textContent = pair.right === null ? "" : pair.note;
    });
    const sides = data.pairs.flatMap((pair) => [[pair.left_label, pair.left], [pair.right_label, pair.right]]);
    saveAll(bar, sides.filter(([, cif]) => cif !== null).map(([label, cif]) => [stem(cif, label), cif]));
  }

  function path(section) {
    const pane = new Pane(section.querySelector(".panes"));
    const bar = section.querySelector(".bar");
    const frames = data.path;
    const scale = radius(...frames.map((frame) => frame.cif)) || undefined;
    const play = button(bar, "▶ Play", () => run(!timer));
    play.classList.add("wide");
    const slider = Page.slider(bar, "Step of the interpolation", frames.length - 1, () => {
      run(false);
      show(Number(slider.value));
    });
    const count = add(bar, "span", "count");
    const show = (i) => {
      slider.value = i;
      count.textContent = `${i + 1} of ${frames.length}`;
      pane.show({ cif: frames[i].cif, name: frames[i].title, reason: frames[i].note, scale });
    };
    let timer = 0;
    const run = (on) => {
      clearInterval(timer);
      timer = on ? setInterval(step, FRAME_MS) : 0;
      play.textContent = on ? "❚❚ Pause" : "▶ Play";
      if (on && !LOOPS && Number(slider.value) === frames.length - 1) show(0);
    };
    const step = () => {
      show((Number(slider.value) + 1) % frames.length);
      if (!LOOPS && Number(slider.value) === frames.length - 1) run(false);
    };
    section.addEventListener("keydown", (event) => event.key === "Escape" && run(false));
    document.addEventListener("visibilitychange", () => document.hidden && run(false));
    for (const node of [play, slider, count]) node.hidden = frames.length < 2;
    saveAll(bar, frames.filter((frame) => frame.cif !== null).map((frame) => [stem(frame.cif), frame.cif]));
    show(0);
  }

  function samples(section) {
    const host = section.querySelector(".panes");
    const pane = new Pane(host);
    const grid = add(host, "div", "thumbs");
    const thumbs = data.samples.map(({ title, cif }, i) => {
      const thumb = button(grid, "", () => choose(i));
      thumb.className = "thumb";
      add(thumb, "img").alt = "";
      const name = add(thumb, "b", "", cif === null ? "no crystal" : "unreadable");
      const [crystal] = tryRead(cif);
      if (crystal) writeFormula(name, crystal);
      add(thumb, "span", "", title);
      return thumb;
    });
    function choose(i) {
      thumbs.forEach((thumb, k) => thumb.setAttribute("aria-pressed", String(k === i)));
      const { cif, title, note } = data.samples[i];
      pane.show({ cif, name: title, reason: note });
    }
    const written = data.samples.filter(({ cif }) => cif !== null).map(({ cif }) => [stem(cif), cif]);
    saveAll(section.querySelector(".bar"), written);
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

  // ---- start ----------------------------------------------------------------------------------------------------

  document.querySelectorAll("#tables article").forEach(Tables.build);
  const densities = (section) => Slices.build(section, data.densities);
  const charts = (section) => Charts.build(section, data.charts);
  const builders = { charts, pairs, densities, path, samples };
  for (const section of document.querySelectorAll("main > section")) {
    const build = builders[section.id];
    section.hidden = build ? !data[section.id].length : !section.querySelector("article, figure");
    if (section.hidden) continue;
    if (build) build(section);
    add(document.getElementById("nav"), "a", "", section.dataset.nav).href = `#${section.id}`;
  }
  const drawn = ["pairs", "path", "samples"].some((id) => data[id].length);
  document.getElementById("no-webgl").hidden = hasWebgl || !drawn;
  document.documentElement.dataset.ready = "true";
})();
