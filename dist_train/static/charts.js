"use strict";
/** Lines over training steps as SVG, with the values at the pointer or at a cursor moved by the arrow keys. */
const Charts = (() => {
  const HEIGHT = 230;
  const [LEFT, RIGHT, TOP, BOTTOM] = [58, 14, 12, 26];
  const FEW_POINTS = 40; // up to so many are marked with dots
  const LOG_SPAN = 10; // values that differ by more than this factor are drawn on a logarithmic axis

  function svg(parent, tag, attributes, text = "") {
    const node = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  }

  function format(value) {
    const size = Math.abs(value);
    const long = size && (size < 1e-3 || size >= 1e6);
    return long ? Number(value.toPrecision(3)).toExponential().replace("e+", "e") : String(Number(value.toPrecision(4)));
  }

  /** Round values between two limits, some `most` of them. */
  function linearTicks(low, high, most) {
    const rough = (high - low) / most || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
  }

  function logTicks(low, high) {
    const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const factors = to - from <= 2 ? [1, 2, 5] : [1];
    const every = Math.ceil((to - from) / 6);
    const powers = Array.from({ length: to - from + 1 }, (_, i) => from + i).filter((power) => (power - from) % every === 0);
    return powers.flatMap((power) => factors.map((factor) => factor * 10 ** power)).filter((x) => x >= low && x <= high);
  }

  /** Place of the step nearest to `step` that has a value; -1 where there is none. */
  function nearest(line, step) {
    let best = -1;
    line.values.forEach((value, i) => {
      if (value !== null && (best < 0 || Math.abs(line.steps[i] - step) < Math.abs(line.steps[best] - step))) best = i;
    });
    return best;
  }

  class Chart {
    constructor(host, chart) {
      this.lines = chart.lines;
      this.steps = [...new Set(chart.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
      const values = chart.lines.flatMap((line) => line.values.filter((value) => value !== null));
      [this.low, this.high] = [Math.min(...values), Math.max(...values)];
      this.log = this.low > 0 && this.high > LOG_SPAN * this.low;
      const card = Page.add(host, "article", "card chart");
      const header = Page.add(card, "header");
      Page.add(header, "h3", "", chart.title);
      if (chart.unit) Page.add(header, "span", "name", chart.unit);
      const tools = Page.add(header, "span", "tools");
      if (this.low > 0 && this.high > this.low) {
        const toggle = Page.button(tools, "Log", () => {
          this.log = !this.log;
          toggle.setAttribute("aria-pressed", String(this.log));
          this.draw();
        }, "Logarithmic axis");
        toggle.setAttribute("aria-pressed", String(this.log));
      }
      Page.button(tools, "↓ CSV", () => this.save(chart.title), "Download these values as CSV");
      this.stage = Page.add(card, "div", "plot");
      this.stage.tabIndex = 0;
      this.stage.setAttribute("role", "img");
      this.stage.setAttribute("aria-label", `${chart.title} over steps; the arrow keys tell its values`);
      this.readout = Page.add(card, "p", "readout");
      this.readout.setAttribute("role", "status");
      this.stage.onpointermove = (event) => this.point(event.clientX - this.stage.getBoundingClientRect().left);
      this.stage.onkeydown = (event) => this.key(event);
      new ResizeObserver(() => this.draw()).observe(this.stage);
      this.tell(this.steps.length - 1);
    }

    x(step) {
      const [first, last] = [this.steps[0], this.steps.at(-1)];
      return LEFT + ((step - first) / (last - first || 1)) * (this.width - LEFT - RIGHT);
    }

    y(value) {
      const scale = this.log ? Math.log10 : (v) => v;
      const [low, high] = [scale(this.low), scale(this.high)];
      const share = high > low ? (scale(value) - low) / (high - low) : 0.5;
      return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
    }

    draw() {
      this.width = this.stage.clientWidth;
      if (this.width < LEFT + RIGHT + 10) return;
      this.stage.replaceChildren();
      this.picture = svg(this.stage, "svg", { width: this.width, height: HEIGHT, "aria-hidden": "true" });
      const right = this.width - RIGHT;
      for (const value of this.log ? logTicks(this.low, this.high) : linearTicks(this.low, this.high, 5)) {
        svg(this.picture, "line", { x1: LEFT, x2: right, y1: this.y(value), y2: this.y(value), class: "grid" });
        svg(this.picture, "text", { x: LEFT - 7, y: this.y(value) + 4, class: "end" }, format(value));
      }
      const [first, last] = [this.steps[0], this.steps.at(-1)];
      for (const step of linearTicks(first, last, this.width / 85).filter(Number.isInteger)) {
        const x = this.x(step);
        svg(this.picture, "text", { x: Math.min(x, right + 4), y: HEIGHT - 8, class: x > right - 24 ? "end" : "middle" }, step);
      }
      this.lines.forEach((line, i) => this.path(line, i));
      this.cursor = svg(this.picture, "g", { class: "cursor" });
      this.tell(this.at);
    }

    path(line, i) {
      let pen = "M";
      let path = "";
      line.values.forEach((value, k) => {
        path += value === null ? "" : `${pen}${this.x(line.steps[k]).toFixed(1)},${this.y(value).toFixed(1)}`;
        pen = value === null ? "M" : "L";
      });
      svg(this.picture, "path", { d: path, class: `line-${i % 6}` });
      if (line.values.length > FEW_POINTS) return;
      line.values.forEach((value, k) => {
        if (value !== null) svg(this.picture, "circle", { cx: this.x(line.steps[k]), cy: this.y(value), r: 2.6, class: `line-${i % 6}` });
      });
    }

    point(x) {
      const away = this.steps.map((step) => Math.abs(this.x(step) - x));
      this.tell(away.indexOf(Math.min(...away)));
    }

    key(event) {
      const last = this.steps.length - 1;
      const to = { ArrowLeft: this.at - 1, ArrowRight: this.at + 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.tell(Math.max(0, Math.min(last, to)));
    }

    /** Move the cursor to a step and write its values below, which is the legend, too. */
    tell(at) {
      this.at = at;
      const step = this.steps[at];
      this.readout.replaceChildren();
      Page.add(this.readout, "span", "", `step ${step}`);
      this.cursor?.replaceChildren();
      if (this.cursor) svg(this.cursor, "line", { x1: this.x(step), x2: this.x(step), y1: TOP, y2: HEIGHT - BOTTOM });
      this.lines.forEach((line, i) => {
        const k = nearest(line, step);
        const entry = Page.add(this.readout, "span");
        Page.add(entry, "i", `line-${i % 6}`);
        const elsewhere = k >= 0 && line.steps[k] !== step ? ` at ${line.steps[k]}` : "";
        entry.append(`${line.name} ${k < 0 ? "–" : format(line.values[k])}${elsewhere}`);
        if (k >= 0 && this.cursor) {
          svg(this.cursor, "circle", { cx: this.x(line.steps[k]), cy: this.y(line.values[k]), r: 4, class: `line-${i % 6}` });
        }
      });
    }

    save(title) {
      const byStep = this.lines.map((line) => new Map(line.steps.map((step, k) => [step, line.values[k]])));
      const rows = this.steps.map((step) => [step, ...byStep.map((values) => values.get(step) ?? "")].map(String));
      Page.saveCsv(title, [["step", ...this.lines.map((line) => line.name)], ...rows]);
    }
  }

  return { build: (section, charts) => charts.forEach((chart) => new Chart(section.querySelector(".charts"), chart)) };
})();
