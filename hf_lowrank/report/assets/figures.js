/* The pictures: each is a section of the page with controls, and a function from what is shown to a chart's spec. */
(() => {
  const { DATA, state, html, number, meanInterval, shownRuns, runTitle, methodTitle, finite } = LR;
  const M = (id) => DATA.metrics[id];
  const yTitle = (id) => M(id).title + (M(id).unit ? ` (${M(id).unit})` : "");

  /** Series of runs, or of methods over seeds where that is asked for: {label, method, x, y, lo, hi}. */
  function gathered(lines) {
    if (state.seeds !== "mean") return lines.map(({ run, ...line }) => ({ label: runTitle(run), method: run.method, ...line }));
    const methods = new Map();
    for (const line of lines) {
      if (!methods.has(line.run.method)) methods.set(line.run.method, []);
      methods.get(line.run.method).push(line);
    }
    return [...methods.entries()].sort((a, b) => a[0] - b[0]).map(([method, members]) => {
      if (members.length === 1) {
        const { run, ...line } = members[0];
        return { label: methodTitle(run), method, ...line };
      }
      const points = new Map();
      for (const line of members) {
        line.x.forEach((x, i) => {
          if (!finite(line.y[i])) return;
          if (!points.has(x)) points.set(x, []);
          points.get(x).push(line.y[i]);
        });
      }
      // A mean over fewer seeds than its neighbours would jump: only positions that every seed has are drawn.
      const full = [...points.entries()].filter(([, values]) => values.length === members.length).sort((a, b) => a[0] - b[0]);
      const found = full.map(([, values]) => meanInterval(values));
      return {
        ...members[0], run: undefined, label: DATA.methods[method].title, method,
        x: full.map(([x]) => x), y: found.map((f) => f.mean), lo: found.map((f) => f.lo), hi: found.map((f) => f.hi),
      };
    });
  }

  const steps = { label: "step" };

  /** Loss over steps. Controls: which loss, and how much of the run. */
  function lossSpec(options) {
    const lines = shownRuns().map((run) => ({ run, ...run.loss[options.which || "eval"] }));
    let series = gathered(lines).map((s) => ({ ...s, points: options.which !== "train" }));
    const end = Math.max(0, ...series.flatMap((s) => s.x));
    const from = options.part === "end" ? end / 2 : options.part === "tail" ? end * 0.1 : -1;
    series = series.map((s) => {
      const keep = s.x.map((_, i) => i).filter((i) => s.x[i] >= from);
      const pick = (values) => values && keep.map((i) => values[i]);
      return { ...s, x: pick(s.x), y: pick(s.y), lo: pick(s.lo), hi: pick(s.hi) };
    });
    const unigrams = [...new Set(shownRuns().map((run) => run.unigram).filter(finite))];
    const refs = unigrams.length === 1 && from < 0 ? [{ y: unigrams[0], label: "unigram model" }] : [];
    return { x: steps, y: { label: "loss (nats per token)", title: true }, series, refs, height: 420 };
  }

  /** A metric of the whole model over steps. */
  function trendSpec(metric, options = {}) {
    const lines = shownRuns().filter((run) => run.metrics[metric] && run.metrics[metric].x.length).map((run) => {
      const { x, y, lo, hi } = run.metrics[metric];
      return { run, x, y, lo, hi };
    });
    return { x: steps, y: { label: yTitle(metric) }, series: gathered(lines), ...options };
  }

  /** The steps at which shown runs have a curve of `metric`. */
  const curveSteps = (metric) => [...new Set(shownRuns().flatMap((run) => (run.curves[metric] || []).map((c) => c.step)))].sort((a, b) => a - b);

  /** The place of the last step at which the most runs have a curve: where the picture opens. */
  function fullestStep(metric) {
    const all = curveSteps(metric);
    const count = (step) => shownRuns().filter((run) => (run.curves[metric] || []).some((c) => c.step === step)).length;
    return all.reduce((best, step, i) => (count(step) >= count(all[best]) ? i : best), 0);
  }

  /** Loss along a line in weight space, at the chosen step. */
  function curveSpec(metric, options) {
    const all = curveSteps(metric);
    const step = all[Math.min(options.step ?? fullestStep(metric), all.length - 1)];
    const lines = [];
    let relative = false;
    for (const run of shownRuns()) {
      const curve = (run.curves[metric] || []).find((c) => c.step === step);
      if (!curve) continue;
      const path = metric.endsWith("_path");
      const centre = path ? (curve.y[0] + curve.y[curve.y.length - 1]) / 2 : curve.y[curve.t.indexOf(0)] ?? Math.min(...curve.y.filter(finite));
      relative ||= curve.relative;
      const shift = options.absolute ? 0 : centre;
      const less = (values) => values && values.map((v) => (finite(v) ? v - shift : null));
      lines.push({ run, x: curve.t, y: less(curve.y), lo: less(curve.lo), hi: less(curve.hi) });
    }
    return {
      x: { label: relative ? "distance, in root-mean-square weights" : options.xLabel || "distance", value: (v) => number(v, 3) },
      y: { label: options.absolute ? "loss (nats per token)" : "rise of the loss (nats)", title: true },
      series: gathered(lines).map((s) => ({ ...s, points: false })), height: 400,
    };
  }

  const UNITS = {
    train_seconds: (v) => (v < 90 ? `${number(v, 3)} s` : v < 5400 ? `${number(v / 60, 3)} min` : `${number(v / 3600, 3)} h`),
    peak_memory: (v) => `${number(v / 2 ** 20, 4)} MiB`,
    optimizer_bytes: (v) => `${number(v / 2 ** 20, 3)} MiB`,
  };
  const SCALES = { peak_memory: [2 ** 20, "MiB"], optimizer_bytes: [2 ** 20, "MiB"], train_seconds: [1, "seconds"] };

  /** Final values of one quantity by method, the smallest mean first. */
  function stripSpec(id) {
    const byMethod = new Map();
    const [scale, unit] = SCALES[id] || [1, DATA.quantities[id].unit];
    for (const run of shownRuns()) {
      if (!finite(run.final[id])) continue;
      if (!byMethod.has(run.method)) byMethod.set(run.method, []);
      byMethod.get(run.method).push({ name: runTitle(run), value: run.final[id] / scale });
    }
    const rows = [...byMethod.entries()].map(([method, values]) => ({ label: DATA.methods[method].title, method, values, ...meanInterval(values.map((v) => v.value)) }));
    rows.sort((a, b) => a.mean - b.mean || a.method - b.method);
    const title = DATA.quantities[id].title;
    return { rows, label: unit ? `${title} (${unit})` : title, value: (v) => (UNITS[id] ? UNITS[id](v * scale) : number(v, 4)) };
  }

  /* Layers: `model.layers.3.self_attn.q_proj` is block 3 of the kind self_attn.q_proj. */
  const PLACES = DATA.scopes.map((path) => {
    const parts = path.split(".");
    const at = parts.findIndex((p) => /^\d+$/.test(p));
    return at < 0 ? { kind: path, block: 0 } : { kind: parts.slice(at + 1).join(".") || (at === 1 && parts[0] === "hidden_states" ? "hidden states" : "block"), block: +parts[at] };
  });
  const layered = (metric) => shownRuns().filter((run) => run.metrics[metric] && run.metrics[metric].layers);
  const layerMetrics = () => Object.keys(DATA.metrics).filter((m) => DATA.runs.some((run) => run.metrics[m] && run.metrics[m].layers));
  const layerSteps = (metric) => [...new Set(layered(metric).flatMap((run) => run.metrics[metric].layers.steps))].sort((a, b) => a - b);

  /** Small multiples: one chart for each kind of layer, depth on x. */
  function layerSpecs(metric, step) {
    const kinds = new Map();
    for (const run of layered(metric)) {
      const table = run.metrics[metric].layers;
      const row = table.values[table.steps.indexOf(step)];
      if (!row) continue;
      const own = new Map();
      table.scopes.forEach((scope, i) => {
        const { kind, block } = PLACES[scope];
        if (!own.has(kind)) own.set(kind, []);
        own.get(kind).push([block, row[i]]);
      });
      for (const [kind, points] of own) {
        points.sort((a, b) => a[0] - b[0]);
        if (!kinds.has(kind)) kinds.set(kind, []);
        kinds.get(kind).push({ run, x: points.map((p) => p[0]), y: points.map((p) => p[1]) });
      }
    }
    return [...kinds.entries()].map(([kind, lines]) => {
      const blocks = [...new Set(lines.flatMap((l) => l.x))].sort((a, b) => a - b);
      const every = Math.ceil(blocks.length / 6);
      return [kind, {
        x: { label: "block", ticks: blocks.filter((_, i) => i % every === 0), write: String }, y: { label: yTitle(metric) },
        series: gathered(lines), height: 190, ends: false,
      }];
    });
  }

  /* Pictures whose scale is that of all methods of the group: made once, and shown or not. */
  const made = new Map();
  const once = (key, make) => {
    if (!made.has(key)) made.set(key, make());
    return made.get(key);
  };
  const ofGroup = () => DATA.runs.filter((run) => run.group === state.group);
  const visibleOnly = (found) => ({ ...found, specs: found.specs.filter(({ method }) => !state.hidden.has(method)) });

  /** Layer × step heat maps, one for each method (means over its runs). */
  const heatSpecs = (metric) => visibleOnly(once(`${state.group} ${metric}`, () => makeHeats(metric)));
  function makeHeats(metric) {
    const byMethod = new Map();
    for (const run of ofGroup().filter((run) => run.metrics[metric] && run.metrics[metric].layers)) {
      if (!byMethod.has(run.method)) byMethod.set(run.method, []);
      byMethod.get(run.method).push(run.metrics[metric].layers);
    }
    const specs = [...byMethod.entries()].sort((a, b) => a[0] - b[0]).map(([method, tables]) => {
      const stepsHere = tables[0].steps.filter((s) => tables.every((t) => t.steps.includes(s)));
      const values = tables[0].scopes.map((scope) => stepsHere.map((s) => {
        const found = tables.map((t) => (t.values[t.steps.indexOf(s)] || [])[t.scopes.indexOf(scope)]).filter(finite);
        return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
      }));
      const rows = tables[0].scopes.map((scope) => {
        const hidden = /^hidden_states\.(\d+)$/.exec(DATA.scopes[scope]);
        return hidden ? (hidden[1] === "0" ? "embedding" : `block ${hidden[1]}`) : DATA.scopes[scope].replace(/^model\./, "");
      });
      return { method, spec: { rows, columns: stepsHere.map(String), values, xLabel: "step", what: M(metric).title } };
    });
    const all = specs.flatMap((s) => s.spec.values.flat()).filter(finite);
    const low = Math.min(...all), high = Math.max(...all);
    for (const entry of specs) Object.assign(entry.spec, { low, high });
    return { specs, low, high };
  }

  /** Loss planes: one for each run, or for the first of each method, all on one scale of the rise. */
  const planeSpecs = () => visibleOnly(once(`${state.group} ${state.seeds} plane`, makePlanes));
  function makePlanes() {
    const runs = ofGroup().filter((run) => run.plane);
    const chosen = state.seeds === "mean" ? runs.filter((run, i) => runs.findIndex((o) => o.method === run.method) === i) : runs;
    const specs = chosen.map((run) => {
      const { x, y, loss, step } = run.plane;
      const least = Math.min(...loss.flat().filter(finite));
      const rise = loss.map((row) => row.map((v) => (finite(v) ? v - least : null))).reverse();
      const label = (v) => number(v, 2);
      return { run, method: run.method, spec: { rows: y.map(label).reverse(), columns: x.map(label), values: rise, xLabel: "first direction", what: `rise at step ${step}`, plane: true } };
    });
    const high = Math.max(...specs.flatMap((s) => s.spec.values.flat()).filter(finite));
    for (const { spec } of specs) Object.assign(spec, { low: 0, high });
    return { specs, high };
  }

  /** Barriers between methods, where more than one baseline was measured: rows are runs, columns their baselines. */
  function barrierSpec() {
    const found = new Map();
    const add = (a, b, value) => {
      const key = `${a}\u0000${b}`;
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(value);
    };
    const bases = new Set();
    const nameToRun = new Map(DATA.runs.map((run) => [run.name, run]));
    for (const run of shownRuns()) {
      const entry = run.metrics.method_barrier;
      if (!entry || !entry.pairs) continue;
      for (const [base, value] of entry.pairs) {
        const other = nameToRun.get(base);
        if (!finite(value) || (other && !LR.visible(other))) continue;
        const name = other ? methodTitle(other) : base;
        bases.add(name);
        add(methodTitle(run), name, value);
        if (name !== methodTitle(run)) add(name, methodTitle(run), value);
      }
    }
    const order = (name) => DATA.methods.findIndex((m) => m.title === name);
    const sorted = (names) => [...new Set(names)].sort((a, b) => order(a) - order(b));
    const rows = sorted([...found.keys()].map((key) => key.split("\u0000")[0]));
    const columns = sorted([...bases]);
    if (!rows.length || columns.length < 2) return null;
    const values = rows.map((a) => columns.map((b) => {
      const pair = found.get(`${a}\u0000${b}`);
      return pair ? pair.reduce((p, q) => p + q, 0) / pair.length : null;
    }));
    const all = values.flat().filter(finite);
    return { rows, columns, values, low: Math.min(0, ...all), high: Math.max(...all), xLabel: "to", what: "barrier in nats", square: true };
  }

  Object.assign(LR, { stripSpec, lossSpec, trendSpec, curveSpec, curveSteps, fullestStep, layerMetrics, layerSteps, layerSpecs, heatSpecs, planeSpecs, barrierSpec });
})();
