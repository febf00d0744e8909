/* Specs of the charts of tasks, prediction and sweep. */
(() => {
  const { DATA, state, number, shownRuns, byMethod, methodTitle, runTitle, finite } = LR;

  const shownTasks = () => DATA.tasks.filter((task) => shownRuns().some((run) => run.tasks[task.id]));
  const taskTitle = (task) =>
    DATA.tasks.some((other) => other.task === task.task && other.metric !== task.metric) || task.chance === null
      ? `${task.task} (${task.metric})`
      : task.task;

  /** One strip of methods for a task; with a single run the interval is the one over the task's items. */
  function taskSpec(task) {
    const runs = shownRuns().filter((run) => finite(run.tasks[task.id]?.[0]));
    const rows = byMethod(runs).map((entry) => {
      const values = runs
        .filter((run) => run.method === entry.method)
        .map((run) => ({ name: runTitle(run), value: run.tasks[task.id][0] }));
      const found = entry.tasks[task.id];
      const interval = Array.isArray(found) ? { mean: found[0], lo: found[1], hi: found[2], n: 1 } : found;
      return { label: methodTitle(entry), method: entry.method, values, ...interval, items: values.length === 1 };
    });
    rows.sort((a, b) => (task.higher ? b.mean - a.mean : a.mean - b.mean) || a.method - b.method);
    const label = `${task.metric}${task.higher ? "" : ", lower is better"}`;
    return {
      rows,
      label,
      value: (v) => number(v, 3),
      ref: finite(task.chance) ? { at: task.chance, label: `guessing ${number(task.chance, 2)}` } : null,
    };
  }

  /** Loss against the mean above-chance score over all checkpoints (`by` empty), or against one task's at the last. */
  function scatterSpec(by) {
    const task = DATA.tasks.find((t) => t.id === by);
    const series = new Map();
    for (const run of shownRuns()) {
      if (!series.has(run.method))
        series.set(run.method, {
          label: DATA.methods[run.method].title,
          method: run.method,
          x: [],
          y: [],
          names: [],
          big: [],
        });
      const s = series.get(run.method);
      const seed = run.seed === null ? run.name : `seed ${run.seed}`;
      if (task) {
        if (!run.tasks[by] || !finite(run.final.validation_loss)) continue;
        s.big.push(s.x.length);
        s.x.push(run.final.validation_loss);
        s.y.push(run.tasks[by][0]);
        s.names.push(`${seed}, step ${run.tasks[by][3]}`);
        continue;
      }
      run.above.x.forEach((loss, i) => {
        if (i === run.above.x.length - 1) s.big.push(s.x.length);
        s.x.push(loss);
        s.y.push(run.above.y[i]);
        s.names.push(`${seed}, step ${run.above.step[i]}`);
      });
    }
    const chance = task ? task.chance : 0;
    return {
      x: { label: "validation loss (nats per token)" },
      y: { label: task ? `${taskTitle(task)}, ${task.metric}` : "mean above-chance score" },
      series: [...series.values()].filter((s) => s.x.length).sort((a, b) => a.method - b.method),
      refs: finite(chance) ? [{ y: chance, label: "guessing" }] : [],
      empty: "No checkpoint of these runs has both a loss and a score.",
    };
  }

  /** Two panels of one question: predicted from perplexity alone, and with geometry, against the actual scores. */
  function predictionSpecs(question) {
    const found = DATA.predictions.find((prediction) => prediction.question === question);
    if (!found) return [];
    const methodOf = (name) => DATA.runs.find((run) => run.name === name || run.name.endsWith("/" + name))?.method;
    const panel = (key, title) => {
      const series = new Map();
      found.observed.forEach((observed, i) => {
        const [run, step] = found.rows[i] || ["", ""];
        const method = methodOf(run) ?? 0;
        if (state.hidden.has(method)) return;
        if (!series.has(method))
          series.set(method, { label: DATA.methods[method].title, method, x: [], y: [], names: [] });
        const s = series.get(method);
        s.x.push(found[key][i]);
        s.y.push(observed);
        s.names.push(`${run}, step ${step}`);
      });
      return {
        title,
        spec: {
          x: { label: "predicted above-chance score" },
          y: { label: "actual score" },
          series: [...series.values()].sort((a, b) => a.method - b.method),
          equal: true,
          height: 340,
        },
      };
    };
    const panels = [
      panel("predicted_perplexity", "Perplexity alone"),
      panel("predicted_both", "Perplexity and geometry"),
    ];
    return panels;
  }

  /** Loss by learning rate, the winner ringed, one at an edge named in its label; marks alone where more was swept. */
  function sweepSpec() {
    const trials = new Map();
    for (const entry of DATA.sweep) {
      if (state.hidden.has(entry.method) || !finite(entry.loss) || !finite(entry.rate)) continue;
      if (!trials.has(entry.method)) trials.set(entry.method, []);
      trials.get(entry.method).push(entry);
    }
    const rates = [...new Set(DATA.sweep.map((entry) => entry.rate).filter(finite))].sort((a, b) => a - b);
    const series = [...trials.entries()]
      .sort((a, b) => a[0] - b[0])
      .map(([method, entries]) => {
        entries.sort((a, b) => a.rate - b.rate);
        const rings = entries.map((_, i) => i).filter((i) => entries[i].chosen);
        const edge = entries.some((entry) => entry.chosen && entry.edge);
        return {
          label: DATA.methods[method].title + (edge ? " (at the edge)" : ""),
          loose: entries.some((entry) => entry.varied),
          method,
          x: entries.map((e) => e.rate),
          y: entries.map((e) => e.loss),
          rings,
        };
      });
    const shown = rates.filter(
      (rate, i) => i === 0 || Math.log(rate / rates[0]) / Math.log(rates[rates.length - 1] / rates[0] || 2) > 0.04,
    );
    return {
      x: { label: "learning rate", log: true, ticks: shown, write: (v) => String(Number(v.toPrecision(3))) },
      y: { label: "loss (nats per token)", title: true },
      series,
      height: 380,
    };
  }

  Object.assign(LR, { shownTasks, taskTitle, taskSpec, scatterSpec, predictionSpecs, sweepSpec });
})();
