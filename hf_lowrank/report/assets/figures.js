/* The pictures: each is a section of the page with controls, and a function from what is shown to a chart's spec. */
(() => {
  const { DATA, state, number, shownRuns, shownEntries, byMethod, runTitle, methodTitle, finite } = LR;
  const M = (id) => DATA.metrics[id];
  const yTitle = (id) => M(id).title + (M(id).unit ? ` (${M(id).unit})` : "");

  /** What every series has, of a run or of the means of a method. */
  /** Behind a name whose numbers are of the model's own parameters instead of dense weights. */
  const mark = (found) => (found?.own ? " †" : "");
  const named = (entry, found) => ({ label: runTitle(entry) + mark(found), method: entry.method });

  const steps = { label: "step" };

  /** Loss over steps. Controls: which loss, and how much of the run. */
  function lossSpec(options) {
    const points = options.which !== "train";
    let series = shownEntries().map((entry) => ({ ...named(entry), ...entry.loss[options.which || "eval"], points }));
    const end = Math.max(0, ...series.flatMap((s) => s.x));
    const from = options.part === "end" ? end / 2 : options.part === "tail" ? end * 0.1 : -1;
    series = series.map((s) => {
      const keep = s.x.map((_, i) => i).filter((i) => s.x[i] >= from);
      const pick = (values) => values && keep.map((i) => values[i]);
      return { ...s, x: pick(s.x), y: pick(s.y), lo: pick(s.lo), hi: pick(s.hi) };
    });
    const unigrams = [
      ...new Set(
        shownRuns()
          .map((run) => run.unigram)
          .filter(finite),
      ),
    ];
    const refs = unigrams.length === 1 && from < 0 ? [{ y: unigrams[0], label: "unigram model" }] : [];
    return { x: steps, y: { label: "loss (nats per token)", title: true }, series, refs, height: 420 };
  }

  /** A metric of the whole model over steps. */
  function trendSpec(metric, options = {}) {
    const series = shownEntries()
      .filter((entry) => entry.metrics[metric] && entry.metrics[metric].x.length)
      .map((entry) => {
        const { x, y, lo, hi } = entry.metrics[metric];
        return { ...named(entry, entry.metrics[metric]), x, y, lo, hi };
      });
    return { x: steps, y: { label: yTitle(metric) }, series, ...options };
  }

  /** The steps at which shown runs have a curve of `metric`. */
  const curveSteps = (metric) =>
    [...new Set(shownRuns().flatMap((run) => (run.curves[metric] || []).map((c) => c.step)))].sort((a, b) => a - b);

  /** The index of the last step at which the most runs have a curve: where the picture opens. */
  function fullestStep(metric) {
    const all = curveSteps(metric);
    const count = (step) => shownRuns().filter((run) => (run.curves[metric] || []).some((c) => c.step === step)).length;
    return all.reduce((best, step, i) => (count(step) >= count(all[best]) ? i : best), 0);
  }

  /** Loss along a line in weight space, at the chosen step. */
  function curveSpec(metric, options) {
    const all = curveSteps(metric);
    const step = all[Math.min(options.step ?? fullestStep(metric), all.length - 1)];
    const series = [];
    let relative = false;
    for (const entry of shownEntries()) {
      const curve = (entry.curves[metric] || []).find((c) => c.step === step);
      if (!curve) continue;
      relative ||= curve.relative;
      const { t: x, y, lo, hi, rise_lo, rise_hi, center, slope = 0 } = curve;
      const rise = (values) => values && values.map((v, i) => (finite(v) ? v - center - slope * x[i] : null));
      const band = options.absolute ? { y, lo, hi } : { y: rise(y), lo: rise_lo ?? rise(lo), hi: rise_hi ?? rise(hi) };
      series.push({ ...named(entry, curve), x, ...band, points: false });
    }
    return {
      x: {
        label: relative ? "distance, in root-mean-square weights" : options.xLabel || "distance",
        value: (v) => number(v, 3),
      },
      y: { label: options.absolute ? "loss (nats per token)" : "rise of the loss (nats)", title: true },
      series,
      height: 400,
    };
  }

  const UNITS = {
    train_seconds: (v) =>
      v < 90 ? `${number(v, 3)} s` : v < 5400 ? `${number(v / 60, 3)} min` : `${number(v / 3600, 3)} h`,
    peak_memory: (v) => `${number(v / 2 ** 20, 4)} MiB`,
    optimizer_bytes: (v) => `${number(v / 2 ** 20, 3)} MiB`,
  };
  const SCALES = { peak_memory: [2 ** 20, "MiB"], optimizer_bytes: [2 ** 20, "MiB"], train_seconds: [1, "seconds"] };

  /** Final values of one quantity by method, the smallest mean first. */
  function stripSpec(id) {
    const [scale, unit] = SCALES[id] || [1, DATA.quantities[id].unit];
    const scaled = (v) => (finite(v) ? v / scale : null);
    const runs = shownRuns().filter((run) => finite(run.final[id]));
    const rows = byMethod(runs).map((entry) => {
      const values = runs
        .filter((run) => run.method === entry.method)
        .map((run) => ({ name: runTitle(run), value: scaled(run.final[id]) }));
      const {
        mean,
        lo = null,
        hi = null,
        n = 1,
      } = finite(entry.final[id]) ? { mean: entry.final[id] } : entry.final[id];
      const label = methodTitle(entry) + mark(entry.metrics[id]);
      return { label, method: entry.method, values, mean: scaled(mean), lo: scaled(lo), hi: scaled(hi), n };
    });
    rows.sort((a, b) => a.mean - b.mean || a.method - b.method);
    const title = DATA.quantities[id].title;
    return {
      rows,
      label: unit ? `${title} (${unit})` : title,
      value: (v) => (UNITS[id] ? UNITS[id](v * scale) : number(v, 4)),
    };
  }

  /* Layers: `model.layers.3.self_attn.q_proj` is block 3 of the kind self_attn.q_proj. */
  const LAYERS = DATA.scopes.map((path) => {
    const parts = path.split(".");
    const at = parts.findIndex((p) => /^\d+$/.test(p));
    return at < 0
      ? { kind: path, block: 0 }
      : {
          kind: parts.slice(at + 1).join(".") || (at === 1 && parts[0] === "hidden_states" ? "hidden states" : "block"),
          block: +parts[at],
        };
  });
  const layerMetrics = () =>
    Object.keys(DATA.metrics).filter((m) => DATA.runs.some((run) => run.metrics[m] && run.metrics[m].layers));
  const layerSteps = (metric) =>
    [...new Set(shownRuns().flatMap((run) => run.metrics[metric]?.layers?.steps ?? []))].sort((a, b) => a - b);

  /** Small multiples: one chart for each kind of layer, depth on x. */
  function layerSpecs(metric, step) {
    const kinds = new Map();
    for (const entry of shownEntries()) {
      const table = entry.metrics[metric]?.layers;
      const row = table ? table.steps.indexOf(step) : -1;
      if (row < 0) continue;
      const own = new Map();
      table.scopes.forEach((scope, i) => {
        const { kind, block } = LAYERS[scope];
        if (!own.has(kind)) own.set(kind, []);
        own.get(kind).push({ block, y: table.values[row][i], lo: table.lo?.[row][i], hi: table.hi?.[row][i] });
      });
      for (const [kind, points] of own) {
        points.sort((a, b) => a.block - b.block);
        if (!kinds.has(kind)) kinds.set(kind, []);
        const bands = table.lo ? { lo: points.map((p) => p.lo), hi: points.map((p) => p.hi) } : {};
        kinds.get(kind).push({ ...named(entry), x: points.map((p) => p.block), y: points.map((p) => p.y), ...bands });
      }
    }
    return [...kinds.entries()].map(([kind, series]) => {
      const blocks = [...new Set(series.flatMap((l) => l.x))].sort((a, b) => a - b);
      const every = Math.ceil(blocks.length / 6);
      return [
        kind,
        {
          x: { label: "block", ticks: blocks.filter((_, i) => i % every === 0), write: String },
          y: { label: yTitle(metric) },
          series,
          height: 190,
          ends: false,
        },
      ];
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

  /** Layer × step heat maps, one for each method (means over its runs), at the steps that all of its runs have. */
  const heatSpecs = (metric) => visibleOnly(once(`${state.group} ${metric}`, () => makeHeats(metric)));
  function makeHeats(metric) {
    const specs = byMethod(ofGroup().filter((run) => run.metrics[metric]?.layers)).map((entry) => {
      const table = entry.metrics[metric].layers;
      const most = Math.max(...(table.runs ?? [1]));
      const columns = table.steps.map((_, i) => i).filter((i) => (table.runs?.[i] ?? 1) === most);
      const values = table.scopes.map((_, j) => columns.map((i) => table.values[i][j]));
      const rows = table.scopes.map((scope) => {
        const hidden = /^hidden_states\.(\d+)$/.exec(DATA.scopes[scope]);
        if (!hidden) return DATA.scopes[scope].replace(/^model\./, "");
        return hidden[1] === "0" ? "embedding" : `block ${hidden[1]}`;
      });
      const at = columns.map((i) => String(table.steps[i]));
      return { method: entry.method, spec: { rows, columns: at, values, xLabel: "step", what: M(metric).title } };
    });
    const all = specs.flatMap((s) => s.spec.values.flat()).filter(finite);
    const [low, high] = DATA.heats[`${state.group} ${metric}`];
    for (const entry of specs) Object.assign(entry.spec, { low, high });
    return { specs, low, high, below: all.some((v) => v < low), above: all.some((v) => v > high) };
  }

  /** Loss planes: one for each run, or for the first of each method, all on one scale of the rise. */
  const planeSpecs = () => visibleOnly(once(`${state.group} ${state.seeds} plane`, makePlanes));
  function makePlanes() {
    const runs = ofGroup().filter((run) => run.plane);
    const chosen =
      state.seeds === "mean" ? runs.filter((run, i) => runs.findIndex((o) => o.method === run.method) === i) : runs;
    const specs = chosen.map((run) => {
      const { x, y, loss, step } = run.plane;
      const least = Math.min(...loss.flat().filter(finite));
      const rise = loss.map((row) => row.map((v) => (finite(v) ? v - least : null))).reverse();
      const label = (v) => number(v, 2);
      return {
        run,
        method: run.method,
        spec: {
          rows: y.map(label).reverse(),
          columns: x.map(label),
          values: rise,
          xLabel: "first direction",
          what: `rise at step ${step}`,
          plane: true,
        },
      };
    });
    const high = Math.max(...specs.flatMap((s) => s.spec.values.flat()).filter(finite));
    for (const { spec } of specs) Object.assign(spec, { low: 0, high });
    return { specs, high };
  }

  /** Barriers between methods, where more than one baseline was measured: rows are methods, columns baselines. */
  function barrierSpec() {
    const shown = (name) => typeof name === "string" || !state.hidden.has(name);
    const found = DATA.barriers.filter((b) => b.group === state.group && shown(b.row) && shown(b.column));
    const title = (name) => (typeof name === "string" ? name : DATA.methods[name].title);
    const order = (name) => (typeof name === "string" ? -1 : name);
    const sorted = (names) => [...new Set(names)].sort((a, b) => order(a) - order(b));
    const rowNames = sorted(found.map((b) => b.row));
    const columnNames = sorted(found.map((b) => b.column));
    if (columnNames.length < 2) return null;
    const value = (row, column) => found.find((b) => b.row === row && b.column === column)?.value ?? null;
    const values = rowNames.map((row) => columnNames.map((column) => value(row, column)));
    const [rows, columns] = [rowNames.map(title), columnNames.map(title)];
    const all = values.flat().filter(finite);
    return {
      rows,
      columns,
      values,
      low: Math.min(0, ...all),
      high: Math.max(...all),
      xLabel: "to",
      what: "barrier in nats",
      square: true,
    };
  }

  Object.assign(LR, {
    stripSpec,
    lossSpec,
    trendSpec,
    curveSpec,
    curveSteps,
    fullestStep,
    layerMetrics,
    layerSteps,
    layerSpecs,
    heatSpecs,
    mark,
    planeSpecs,
    barrierSpec,
  });
})();
