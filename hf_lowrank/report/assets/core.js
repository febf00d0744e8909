"use strict";
/* Basics: small helpers, number formats, and the state of what is shown. No names leave this function scope. */
(() => {
  /** @type {Payload} The types are in types.js, written from the Python that fills it. */
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  /** Makes an SVG element; text is set as text, never as markup. */
  function svg(tag, attributes = {}, text = null) {
    const node = document.createElementNS(SVG, tag);
    for (const key in attributes) if (attributes[key] !== null) node.setAttribute(key, attributes[key]);
    if (text !== null) node.textContent = text;
    return node;
  }

  /** Makes an HTML element with properties and children; strings become text nodes. */
  function html(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

  /** `digits` significant digits as people read them: 0.0123, 1 234, 1.2×10⁻⁷. */
  function number(value, digits = 3) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    let text;
    if (size < 1e-4 || size >= 1e9) {
      const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
      text = mantissa.replace(/\.?0+$/, "") + "×10" + [...String(+exponent)].map((c) => SUPERSCRIPT[c]).join("");
    } else {
      const places = Math.max(digits - 1 - Math.floor(Math.log10(size)), 0);
      text = value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
      text = text.replace(/,/g, "\u202f");
    }
    return text.replace("-", "−");
  }

  /** Round tick positions over [low, high], about `count` of them, and how to write them. */
  function ticks(low, high, count) {
    const span = high - low || Math.abs(high) || 1;
    const raw = span / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const values = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
    const places = Math.max(
      0,
      -Math.floor(Math.log10(step) + 1e-9) + (step / 10 ** Math.floor(Math.log10(step) + 1e-9) === 2.5 ? 1 : 0),
    );
    const write = (v) => {
      if (Math.abs(v) < step * 1e-6) return "0";
      if (places > 5) return number(v, 2);
      if (Math.abs(v) >= 1e4 && step >= 1000)
        return number(v / 1000, Math.max(1, Math.ceil(Math.log10(Math.abs(v) / step)) + 1)) + "k";
      return v
        .toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places })
        .replace(/,/g, "\u202f")
        .replace("-", "−");
    };
    return { values, write, step };
  }

  /** [low, high] with air around it; values that differ by rounding alone count as equal, else ticks would not end. */
  function padded(low, high, share) {
    const size = Math.max(Math.abs(low), Math.abs(high));
    const pad = high - low > size * 1e-9 ? (high - low) * share : size * 0.05 || 1;
    return [low - pad, high + pad];
  }

  function csvText(rows) {
    // A leading =, +, - or @ would be run as a formula by spreadsheets, unless it starts a number.
    const cell = (value) => {
      if (value === null || value === undefined) return "";
      let text = String(value);
      if (typeof value === "string" && /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text))) text = "'" + text;
      return /[",\n\r]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
    };
    return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  /* Widths of plots, read once and again after the window has changed: reading one between two drawings would lay the
     whole page out for each of them. */
  const widths = new WeakMap();
  let epoch = 0;
  function widthOf(host) {
    const known = widths.get(host);
    if (known && known.epoch === epoch && known.width) return known.width;
    const width = Math.floor(host.clientWidth);
    widths.set(host, { width, epoch });
    return width;
  }
  const forgetWidths = () => {
    epoch++;
  };

  function download(name, text) {
    const link = html("a", {
      download: name,
      href: URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" })),
    });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  /* What is shown. Parts subscribe; a change calls them once, together. */
  const state = {
    group: 0,
    hidden: new Set(),
    seeds: DATA.runs.some((run, i) =>
      DATA.runs.some((o, j) => j > i && o.method === run.method && o.group === run.group),
    )
      ? "mean"
      : "each",
  };
  const listeners = [];
  const changed = () => listeners.forEach((listen) => listen());
  const visible = (run) => run.group === state.group && !state.hidden.has(run.method);
  const shownRuns = () => DATA.runs.filter(visible);
  /** What is drawn: each run, or for each method the means over its runs (a method's only run is its mean). */
  const meansOf = new Map(DATA.means.map((means) => [`${means.group} ${means.method}`, means]));
  const meanOf = (run) => meansOf.get(`${run.group} ${run.method}`) ?? run;
  const byMethod = (runs) => [...new Set(runs.map(meanOf))].sort((a, b) => a.method - b.method);
  const shownEntries = () => (state.seeds === "mean" ? byMethod(shownRuns()) : shownRuns());
  const methodTitle = (run) => DATA.methods[run.method].title;
  /** The short name of a run or of a method's means in legends: the method, and the seed where it is needed. */
  const runTitle = (run) => {
    if (run.name === undefined) return methodTitle(run);
    const twins = DATA.runs.filter((o) => o.method === run.method && o.group === run.group);
    if (twins.length === 1) return methodTitle(run);
    const seedTells = twins.filter((o) => o.seed === run.seed).length === 1 && run.seed !== null;
    return seedTells ? `${methodTitle(run)}, seed ${run.seed}` : `${methodTitle(run)}, ${run.name}`;
  };

  window.LR = {
    DATA,
    svg,
    html,
    number,
    ticks,
    padded,
    csvText,
    download,
    widthOf,
    forgetWidths,
    state,
    listeners,
    changed,
    visible,
    shownRuns,
    shownEntries,
    meanOf,
    byMethod,
    methodTitle,
    runTitle,
  };
})();
