"use strict";
/** Planes of voxels through densities, true beside decoded: in their real shape, on one scale of length and of colour. */
const Slices = (() => {
  const RING_A = 0.5; // radius of the balls around atoms that a plane is shown to cut
  const HEIGHT = 330;
  const MARGIN = 26;
  const BEYOND = 0.15; // share of a periodic cell that is drawn beyond it on every side
  const AXES = { true: "abc", false: "xyz" }; // of a periodic cell, of a box
  // Dark to bright, evenly spaced; the steps of the scale at the foot of a page are these, too.
  const STOPS = [[8, 6, 30], [60, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]];
  const COLOURS = Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (STOPS.length - 1);
    const k = Math.min(Math.floor(place), STOPS.length - 2);
    return STOPS[k].map((from, rgb) => Math.round(from + (place - k) * (STOPS[k + 1][rgb] - from)));
  });

  const dot = (p, q) => p[0] * q[0] + p[1] * q[1] + p[2] * q[2];
  const minus = (p, q, times) => p.map((x, i) => x - times * q[i]);
  const length = (p) => Math.sqrt(dot(p, p));
  const modulo = (i, n) => ((i % n) + n) % n;

  /** The vectors that span a plane across an axis, as [x, y] in angstrom: the first along x; and the axis in that frame. */
  function frame(volume, axis) {
    const [u, v] = [0, 1, 2].filter((other) => other !== axis).map((other) => volume.extent[other]);
    const w = volume.extent[axis];
    const x = u.map((value) => value / length(u));
    const across = minus(v, x, dot(v, x));
    const y = across.map((value) => value / length(across));
    const away = minus(minus(w, x, dot(w, x)), y, dot(w, y));
    return { u: [length(u), 0], v: [dot(v, x), dot(v, y)], w: [dot(w, x), dot(w, y)], depth: length(away) };
  }

  const beyond = (volume) => (volume.periodic ? BEYOND : 0);

  /** A plane of voxels as an image that begins so many voxels before the grid, in x and y, and ends as many after it: as
   *  much as is drawn beyond the cell, and one more, so that the image can be smooth up to its edges. */
  function image(volume, channel, axis, plane) {
    const [first, second] = [0, 1, 2].filter((other) => other !== axis);
    const sizes = [volume.shape[first], volume.shape[second]];
    const before = sizes.map((n) => Math.ceil(beyond(volume) * n) + 1);
    const [width, height] = sizes.map((n, k) => n + 2 * before[k]);
    const inside = (i, n) => (volume.periodic ? modulo(i, n) : Math.max(0, Math.min(n - 1, i)));
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    const place = [0, 0, 0];
    place[axis] = plane;
    for (let j = 0; j < height; j++) for (let i = 0; i < width; i++) {
      [place[first], place[second]] = [inside(i - before[0], sizes[0]), inside(j - before[1], sizes[1])];
      const [, h, w] = volume.shape;
      const at = ((channel * volume.shape[0] + place[0]) * h + place[1]) * w + place[2];
      pixels.data.set([...COLOURS[volume.values[at]], 255], 4 * (j * width + i));
    }
    context.putImageData(pixels, 0, 0);
    return { canvas, before, sizes };
  }

  class Panel {
    constructor(host) {
      const card = Page.add(host, "article", "card pane");
      const header = Page.add(card, "header");
      this.role = Page.add(header, "span", "role");
      this.name = Page.add(header, "span", "name");
      this.canvas = Page.add(card, "canvas", "slice");
      this.canvas.setAttribute("role", "img");
    }

    /** angstroms: [width, height] that has to fit into the canvas, for all panels the same. */
    draw(volume, channel, axis, share, angstroms) {
      const ratio = window.devicePixelRatio || 1;
      const width = this.canvas.clientWidth;
      if (!width) return;
      Object.assign(this.canvas, { width: width * ratio, height: HEIGHT * ratio });
      const { u, v, w, depth } = frame(volume, axis);
      const scale = Math.min((width - 2 * MARGIN) / angstroms[0], (HEIGHT - 2 * MARGIN) / angstroms[1]);
      // y points upwards; the parallelogram stands in the middle.
      const middle = [(u[0] + v[0]) / 2, (u[1] + v[1]) / 2];
      const context = this.canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      Object.assign(context, { font: "600 12px system-ui, sans-serif", textAlign: "center", textBaseline: "middle" });
      const toPixels = (p) => [width / 2 + scale * (p[0] - middle[0]), HEIGHT / 2 - scale * (p[1] - middle[1])];
      const at = (fu, fv) => [0, 1].map((k) => fu * u[k] + fv * v[k]);
      const outline = (low, high) => {
        const path = new Path2D();
        for (const corner of [[low, low], [high, low], [high, high], [low, high]]) path.lineTo(...toPixels(at(...corner)));
        path.closePath();
        return path;
      };
      const over = beyond(volume);
      context.save();
      context.clip(outline(-over, 1 + over));
      const plane = modulo(Math.round(share * volume.shape[axis]), volume.shape[axis]);
      const picture = image(volume, channel, axis, plane);
      const [pu, pv] = [u, v].map((p) => [scale * p[0], -scale * p[1]]);
      context.save();
      context.transform(...pu, ...pv, ...toPixels([0, 0]));
      context.scale(...picture.sizes.map((n) => 1 / n));
      context.drawImage(picture.canvas, ...picture.before.map((n) => -n - 0.5)); // voxel i of n lies at i / n
      context.restore();
      this.atoms(context, volume, axis, plane / volume.shape[axis], { u, v, w, depth, scale, toPixels });
      context.restore();
      Object.assign(context, { strokeStyle: "#fffc", lineWidth: 1 });
      context.stroke(outline(0, 1));
      const [first, second] = [0, 1, 2].filter((other) => other !== axis).map((k) => AXES[volume.periodic][k]);
      context.fillStyle = getComputedStyle(this.canvas).color;
      const [right, up] = [at(0.5, -over), at(-over, 0.5)].map(toPixels);
      context.fillText(first, right[0], right[1] + 12);
      context.fillText(second, up[0] - 12, up[1]);
    }

    atoms(context, volume, axis, share, { u, v, w, depth, scale, toPixels }) {
      const [first, second] = [0, 1, 2].filter((other) => other !== axis);
      const images = volume.periodic ? [-1, 0, 1] : [0];
      for (const [symbol, frac] of volume.atoms) for (const iu of images) for (const iv of images) for (const iw of images) {
        const above = frac[axis] + iw - share;
        if (Math.abs(above) * depth >= RING_A) continue;
        const [fu, fv] = [frac[first] + iu, frac[second] + iv];
        const [x, y] = toPixels([0, 1].map((k) => fu * u[k] + fv * v[k] + above * w[k]));
        const radius = scale * Math.sqrt(RING_A ** 2 - (above * depth) ** 2);
        for (const [colour, lineWidth] of [["#000a", 3.5], ["#fff", 1.5]]) {
          Object.assign(context, { strokeStyle: colour, lineWidth });
          context.beginPath();
          context.arc(x, y, radius, 0, 2 * Math.PI);
          context.stroke();
        }
        Object.assign(context, { strokeStyle: "#000c", lineWidth: 3, fillStyle: "#fff" });
        context.strokeText(symbol, x, y);
        context.fillText(symbol, x, y);
      }
    }
  }

  function decoded(density) {
    for (const volume of density.volumes) volume.values ??= Uint8Array.from(atob(volume.bytes), (byte) => byte.charCodeAt(0));
    return density;
  }

  /** Plane across an axis that holds the most of a volume's first channel. */
  function fullest(volume, axis) {
    const [d, h, w] = volume.shape;
    const sums = Array(volume.shape[axis]).fill(0);
    for (let i = 0; i < d * h * w; i++) sums[[Math.floor(i / (h * w)), Math.floor(i / w) % h, i % w][axis]] += volume.values[i];
    return sums.indexOf(Math.max(...sums));
  }

  function span(volume, axis) {
    const { u, v } = frame(volume, axis);
    return [0, 1].map((k) => (1 + 2 * beyond(volume)) * (Math.abs(u[k]) + Math.abs(v[k])));
  }

  function colourScale(host) {
    const card = Page.add(host, "div", "scale");
    const low = Page.add(card, "span");
    const bar = Page.add(card, "span", "colours");
    bar.style.background = `linear-gradient(90deg, ${STOPS.map((rgb) => `rgb(${rgb})`).join(", ")})`;
    const high = Page.add(card, "span");
    return (from, to) => { [low.textContent, high.textContent] = [from, to].map((value) => value.toFixed(3)); };
  }

  function build(section, densities) {
    const bar = section.querySelector(".bar");
    const tools = Page.add(section, "div", "bar");
    const panels = Page.add(section, "div", "panes two");
    const note = Page.add(section, "p", "note");
    const setScale = colourScale(section);
    const shown = { channel: 0, axis: 2 };
    const channels = Page.dropdown(tools, "Channel", [], (i) => {
      shown.channel = i;
      draw();
    });
    const axes = [0, 1, 2].map((axis) => Page.button(tools, "", () => across(axis)));
    const slider = Page.slider(tools, "Plane", 0, () => draw());
    const where = Page.add(tools, "span", "count");

    function across(axis) {
      shown.axis = axis;
      const [volume] = shown.density.volumes;
      slider.max = volume.shape[axis] - 1;
      slider.value = fullest(volume, axis);
      draw();
    }

    function draw() {
      const { density, channel, axis } = shown;
      const [volume] = density.volumes;
      const share = Number(slider.value) / volume.shape[axis];
      const names = AXES[volume.periodic];
      const edge = length(volume.extent[axis]);
      where.textContent = `${names[axis]} = ${share.toFixed(3)} · ${(share * edge).toFixed(2)} of ${edge.toFixed(2)} Å`;
      axes.forEach((button, i) => {
        button.textContent = `across ${names[i]}`;
        button.setAttribute("aria-pressed", String(i === axis));
      });
      setScale(density.low[channel], density.high[channel]);
      const spans = density.volumes.map((each) => span(each, axis));
      const angstroms = [0, 1].map((k) => Math.max(...spans.map((each) => each[k])));
      density.volumes.forEach((each, i) => {
        shown.panels[i].canvas.setAttribute("aria-label", `${each.label}: ${density.channels[channel]}, ${where.textContent}`);
        shown.panels[i].draw(each, channel, axis, share, angstroms);
      });
    }

    Page.chooser(bar, densities.map((density) => density.title), (i) => {
      const density = decoded(densities[i]);
      shown.density = density;
      shown.channel = Math.min(shown.channel, density.channels.length - 1);
      channels.replaceChildren();
      density.channels.forEach((name) => Page.add(channels, "option", "", name));
      channels.selectedIndex = shown.channel;
      panels.replaceChildren();
      shown.panels = density.volumes.map((volume) => {
        const panel = new Panel(panels);
        panel.role.textContent = volume.label;
        panel.name.textContent = `${volume.shape.join(" × ")} voxels`;
        return panel;
      });
      const left = density.left_out ? `${density.left_out} more channels are left out: the page would be too large. ` : "";
      note.textContent = left + density.note;
      across(shown.axis);
    });
    new ResizeObserver(() => draw()).observe(panels);
  }

  return { build };
})();
