"use strict";
/** Reads CIF texts and draws them with 3Dmol.js; what report.js needs of it is returned at the end. */
const Crystals = (() => {
  const AXIS_COLOURS = ["#d6453d", "#2f9e44", "#3b6fe0"]; // a, b, c
  const EDGE_COLOUR = "#8793a3";
  const NEAR_FACE_A = 0.3; // an atom this close to a face of the cell is drawn on the opposite one too
  const BOND_SLACK_A = 0.1; // beyond the sum of two covalent radii
  const FIELD_OF_VIEW = (20 * Math.PI) / 180; // 3Dmol's
  const START = [-0.588, -0.1576, -0.2053, 0.7663]; // quaternion: c upwards, seen from above and from one side

  // ---- reading --------------------------------------------------------------------------------------------------

  /** Cell edges, angles and atoms of a CIF in space group P1 with fractional coordinates. */
  function readCif(text) {
    const cell = ["length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma"].map((key) =>
      parseFloat((new RegExp(`^\\s*_cell_${key}\\s+(\\S+)`, "m").exec(text) || [])[1]));
    const lines = text.split(/\r?\n/).map((line) => line.trim());
    const atoms = readAtoms(lines);
    const numbers = cell.concat(...atoms.map((atom) => atom.frac));
    if (!atoms.length || !numbers.every(Number.isFinite)) throw new Error("no complete cell and atoms in this CIF");
    return { cell, atoms, ...geometry(cell) };
  }

  function readAtoms(lines) {
    const start = lines.findIndex((line) => line.startsWith("_atom_site_"));
    const end = lines.findIndex((line, i) => i > start && !line.startsWith("_atom_site_"));
    if (start < 0 || end < 0) return [];
    const keys = lines.slice(start, end).map((line) => line.split(/\s/)[0].slice("_atom_site_".length));
    const symbolAt = keys.includes("type_symbol") ? keys.indexOf("type_symbol") : keys.indexOf("label");
    const fracAt = ["fract_x", "fract_y", "fract_z"].map((key) => keys.indexOf(key));
    const atoms = [];
    for (const line of lines.slice(end)) {
      const row = line.split(/\s+/);
      if (row.length !== keys.length || /^(_|loop_|data_|#)/.test(line)) break;
      const [elem] = /^[A-Z][a-z]?/.exec(row[symbolAt]) || ["X"];
      atoms.push({ elem, frac: fracAt.map((column) => parseFloat(row[column])) });
    }
    return atoms;
  }

  /** The crystal and no error, or null and the reason; `cif` may be null. */
  function tryRead(cif) {
    if (cif === null) return [null, "Nothing was decoded."];
    try {
      return [readCif(cif), ""];
    } catch (error) {
      return [null, `It can't be drawn: ${error.message}.`];
    }
  }

  /** Lattice vectors (rows, a along x, b in the xy plane), volume and the radius of the sphere around the cell. */
  function geometry([a, b, c, ...degrees]) {
    const [ca, cb, cg] = degrees.map((angle) => Math.cos((angle * Math.PI) / 180));
    const sg = Math.sqrt(1 - cg * cg);
    const cy = (ca - cb * cg) / sg;
    const cz = Math.sqrt(Math.max(0, 1 - cb * cb - cy * cy));
    const vectors = [[a, 0, 0], [b * cg, b * sg, 0], [c * cb, c * cy, c * cz]];
    const corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]; // the other four lie opposite
    const radius = Math.max(...corners.map((corner) => Math.hypot(...cartesian(vectors, corner))));
    return { vectors, radius, volume: a * b * sg * c * cz };
  }

  /** Position in angstrom relative to the centre of the cell. */
  function cartesian(vectors, frac) {
    return [0, 1, 2].map((k) => frac.reduce((sum, f, i) => sum + (f - 0.5) * vectors[i][k], 0));
  }

  /** The radius in angstrom of the largest of some CIFs, 0 where none can be read. */
  function radius(...cifs) {
    return Math.max(0, ...cifs.map((cif) => (tryRead(cif)[0] || { radius: 0 }).radius));
  }

  /** [element, count] of the reduced formula, elements in alphabetical order. */
  function formula(crystal) {
    const counts = {};
    for (const { elem } of crystal.atoms) counts[elem] = (counts[elem] || 0) + 1;
    const gcd = (m, n) => (n ? gcd(n, m % n) : m);
    const divisor = Object.values(counts).reduce(gcd);
    return Object.keys(counts).sort().map((elem) => [elem, counts[elem] / divisor]);
  }

  function colour(elem) {
    const { Jmol, defaultColor } = $3Dmol.elementColors;
    return "#" + (Jmol[elem] ?? defaultColor).toString(16).padStart(6, "0");
  }

  // ---- drawing --------------------------------------------------------------------------------------------------

  const hasWebgl = (() => {
    try {
      return Boolean(new OffscreenCanvas(1, 1).getContext("webgl2"));
    } catch {
      return false;
    }
  })();

  function makeViewer(stage) {
    if (!hasWebgl) return null;
    const viewer = $3Dmol.createViewer(stage, { backgroundAlpha: 0, orthographic: true, disableFog: true });
    return viewer.setView([0, 0, 0, 0, ...START]);
  }

  /** Replace what a viewer shows, keeping its rotation; the zoom fits a sphere of `scale` angstrom.
   *  Calls of 3Dmol that render at once are avoided: without a graphics card each takes a tenth of a second. */
  function draw(viewer, crystal, { scale = crystal.radius, bonds = false, letters = true } = {}) {
    viewer.removeAllModels();
    viewer.removeAllShapes();
    if (letters) viewer.removeAllLabels();
    const model = viewer.addModel();
    const atoms = drawnAtoms(crystal);
    model.addAtoms(bonds ? bonded(atoms) : atoms);
    for (const elem of new Set(atoms.map((atom) => atom.elem))) {
      const color = colour(elem);
      const sphere = { radius: 0.38 * $3Dmol.bondLength(elem), color };
      model.setStyle({ elem }, bonds ? { sphere, stick: { radius: 0.09, color } } : { sphere });
    }
    drawEdges(viewer, crystal, scale);
    if (letters) drawLetters(viewer, crystal, scale);
    fit(viewer, scale);
    viewer.render();
  }

  /** Every atom of the cell and its images on opposite faces, edges and corners, for 3Dmol. */
  function drawnAtoms(crystal) {
    const margin = crystal.cell.slice(0, 3).map((edge) => Math.min(NEAR_FACE_A / edge, 0.2));
    const places = (f, i) => {
      const inside = f - Math.floor(f);
      return [inside, inside - 1, inside + 1].filter((x) => x >= -margin[i] && x <= 1 + margin[i]);
    };
    const drawn = [];
    for (const { elem, frac } of crystal.atoms) {
      const [xs, ys, zs] = frac.map(places);
      for (const fx of xs) for (const fy of ys) for (const fz of zs) {
        drawn.push({ elem, ...point(crystal, [fx, fy, fz]), bonds: [], bondOrder: [] });
      }
    }
    return drawn;
  }

  function point(crystal, frac) {
    const [x, y, z] = cartesian(crystal.vectors, frac);
    return { x, y, z };
  }

  /** Join atoms nearer than the sum of their covalent radii and a little: a guide to the eye, not chemistry. */
  function bonded(atoms) {
    const radii = atoms.map((atom) => $3Dmol.bondLength(atom.elem));
    atoms.forEach((p, i) => {
      for (let k = i + 1; k < atoms.length; k++) {
        const q = atoms[k];
        const distance = Math.hypot(p.x - q.x, p.y - q.y, p.z - q.z);
        if (distance < 0.4 || distance > radii[i] + radii[k] + BOND_SLACK_A) continue;
        p.bonds.push(k);
        q.bonds.push(i);
        p.bondOrder.push(1);
        q.bondOrder.push(1);
      }
    });
    return atoms;
  }

  /** The twelve edges of the cell, those that are a, b and c in their colours. */
  function drawEdges(viewer, crystal, scale) {
    for (let axis = 0; axis < 3; axis++) {
      const [u, v] = [0, 1, 2].filter((other) => other !== axis);
      for (const [fu, fv] of [[0, 0], [0, 1], [1, 0], [1, 1]]) {
        const start = [0, 0, 0];
        [start[u], start[v]] = [fu, fv];
        const end = start.with(axis, 1);
        const isAxis = !fu && !fv;
        viewer.addCylinder({
          start: point(crystal, start), end: point(crystal, end), fromCap: 2, toCap: 2,
          radius: scale * (isAxis ? 0.011 : 0.006), color: isAxis ? AXIS_COLOURS[axis] : EDGE_COLOUR,
        });
      }
    }
  }

  function drawLetters(viewer, crystal, scale) {
    for (let axis = 0; axis < 3; axis++) {
      const tip = [0, 0, 0].with(axis, 1 + (0.7 + 0.08 * scale) / crystal.cell[axis]);
      viewer.addLabel("abc"[axis], {
        position: point(crystal, tip), font: "sans-serif", fontSize: 22, bold: true, fontColor: AXIS_COLOURS[axis],
        showBackground: false, alignment: "center", inFront: true,
      }, undefined, true);
    }
  }

  function fit(viewer, scale) {
    const canvas = viewer.getCanvas();
    const aspect = Math.max(canvas.clientWidth / canvas.clientHeight, 1) || 1;
    const distance = ((scale + 0.4) * aspect) / Math.tan(FIELD_OF_VIEW);
    viewer.setSlab(-3 * scale - 5, 3 * scale + 5);
    viewer.setPerceivedDistance(distance);
  }

  return { hasWebgl, tryRead, radius, formula, colour, makeViewer, draw };
})();
