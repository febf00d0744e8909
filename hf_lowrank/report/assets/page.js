/* The page itself: theme, filters, and everything measured as one table. */
(() => {
  const { DATA, state, listeners, changed, swatch, download, csvText, shownRuns, finite } = LR;
  const root = document.documentElement;

  /* Theme: the system's, until the reader says otherwise. */
  const themeButton = document.getElementById("theme");
  const dark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const remember = (value) => {
    try {
      localStorage.setItem("hf_lowrank theme", value);
    } catch {
      /* file: pages may have no storage */
    }
  };
  const recall = () => {
    try {
      return localStorage.getItem("hf_lowrank theme");
    } catch {
      return null;
    }
  };
  const labelTheme = () => {
    const other = dark() ? "light" : "dark";
    themeButton.setAttribute("aria-label", `Switch to ${other} colours`);
    themeButton.title = `Switch to ${other} colours`;
  };
  if (["light", "dark"].includes(recall())) root.dataset.theme = recall();
  themeButton.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remember(root.dataset.theme);
    labelTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", labelTheme);
  labelTheme();

  /* Filters. */
  for (const chip of document.querySelectorAll("button.chip")) {
    const method = +chip.dataset.method;
    chip.prepend(swatch(method, 24));
    chip.addEventListener("click", () => {
      if (state.hidden.has(method)) state.hidden.delete(method);
      else state.hidden.add(method);
      changed();
    });
    chip.addEventListener("dblclick", () => {
      DATA.methods.forEach((_, i) => (i === method ? state.hidden.delete(i) : state.hidden.add(i)));
      changed();
    });
  }
  document.getElementById("allmethods")?.addEventListener("click", () => {
    state.hidden.clear();
    changed();
  });
  for (const radio of document.querySelectorAll("input[name=seeds]")) {
    radio.checked = radio.value === state.seeds;
    radio.addEventListener("change", () => {
      state.seeds = radio.value;
      changed();
    });
  }
  document.getElementById("group")?.addEventListener("change", (event) => {
    state.group = +event.target.value;
    LR.forgetWidths();
    changed();
  });
  listeners.push(() => {
    const present = new Set(DATA.runs.filter((run) => run.group === state.group).map((run) => run.method));
    for (const chip of document.querySelectorAll("button.chip")) {
      chip.hidden = !present.has(+chip.dataset.method);
      chip.setAttribute("aria-pressed", String(!state.hidden.has(+chip.dataset.method)));
    }
    const all = document.getElementById("allmethods");
    if (all) all.hidden = state.hidden.size === 0;
  });
  for (const slot of document.querySelectorAll("[data-swatch]")) slot.append(swatch(+slot.dataset.swatch, 26));

  /* By metric: the figures that tell of it, whole sections where none of theirs does, and its column of the runs. */
  const metricChoice = document.getElementById("metric");
  const figuresOf = [...document.querySelectorAll("#pictures section")].map((section) => [
    section,
    [...section.querySelectorAll("figure")],
  ]);
  const tellsOf = (figure, dimension, metric) => {
    const { trend, heat, curve, tells = "", dimension: own } = figure.dataset;
    if (figure.id === "fig-layers")
      return LR.layerMetrics().some((m) => (metric ? m === metric : DATA.metrics[m].dimension === dimension));
    const told = [trend, heat, ...tells.split(" ")].filter(Boolean);
    if (metric) return told.includes(metric);
    return (
      own === dimension ||
      told.some((m) => DATA.metrics[m]?.dimension === dimension) ||
      (curve !== undefined && told.length === 0)
    );
  };
  metricChoice.addEventListener("change", () => {
    const [kind, name] = [metricChoice.value.slice(0, 1), metricChoice.value.slice(2)];
    const metric = kind === "m" ? name : null,
      dimension = kind === "d" ? name : null;
    for (const [section, figures] of figuresOf) {
      for (const figure of figures)
        figure.classList.toggle("filtered", Boolean(kind) && !tellsOf(figure, dimension, metric));
      section.classList.toggle(
        "filtered",
        figures.every((figure) => figure.classList.contains("filtered")),
      );
    }
    const set = (select, value) => {
      if (!select || ![...select.options].some((option) => option.value === value)) return;
      select.value = value;
      select.dispatchEvent(new Event("change"));
    };
    if (metric) {
      set(document.getElementById("compare-by"), metric);
      set(document.getElementById("layer-metric"), metric);
    }
    LR.chooseColumns(metric, dimension);
    LR.redraw();
    const left = figuresOf
      .flatMap(([, figures]) => figures)
      .filter((figure) => !figure.classList.contains("filtered")).length;
    document.getElementById("live").textContent = `${left} pictures shown`;
  });
  metricChoice.value = "";

  /* Everything measured, as one tidy table. */
  document.getElementById("savealldata")?.addEventListener("click", () => {
    const rows = [["run", "method", "seed", "step", "metric", "scope", "value", "ci_low", "ci_high"]];
    for (const run of shownRuns()) {
      const name = DATA.methods[run.method].name;
      for (const [metric, entry] of Object.entries(run.metrics)) {
        entry.x.forEach((step, i) =>
          rows.push([
            run.name,
            name,
            run.seed,
            step,
            metric,
            "model",
            entry.y[i],
            entry.lo ? entry.lo[i] : null,
            entry.hi ? entry.hi[i] : null,
          ]),
        );
        const layers = entry.layers;
        if (layers)
          layers.steps.forEach((step, i) =>
            layers.scopes.forEach((scope, j) => {
              if (finite(layers.values[i][j]))
                rows.push([
                  run.name,
                  name,
                  run.seed,
                  step,
                  metric,
                  DATA.scopes[scope],
                  layers.values[i][j],
                  null,
                  null,
                ]);
            }),
          );
      }
    }
    download("measurements.csv", csvText(rows));
  });

  document.body.classList.add("ready");
  changed();
})();
