/* The page itself: filters, theme, and which picture stands in which figure. */
(() => {
  const { DATA, state, listeners, changed, html, number, draw, strip, heat, swatch, saveChart, rowsOf, download, csvText, shownRuns, finite } = LR;
  const root = document.documentElement;

  /* Theme: the system's, until the reader says otherwise. */
  const themeButton = document.getElementById("theme");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const remember = (value) => { try { localStorage.setItem("hf_lowrank theme", value); } catch { /* file: pages may have no storage */ } };
  const recall = () => { try { return localStorage.getItem("hf_lowrank theme"); } catch { return null; } };
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
  document.getElementById("allmethods")?.addEventListener("click", () => { state.hidden.clear(); changed(); });
  for (const radio of document.querySelectorAll("input[name=seeds]")) {
    radio.checked = radio.value === state.seeds;
    radio.addEventListener("change", () => { state.seeds = radio.value; changed(); });
  }
  document.getElementById("group")?.addEventListener("change", (event) => { state.group = +event.target.value; changed(); });
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

  /* Figures draw when they come near the window and again when what they show has changed. */
  const figures = [];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const figure = figures.find((f) => f.node === entry.target);
      figure.near = entry.isIntersecting;
      if (figure.near && figure.stale) refresh(figure);
    }
  }, { rootMargin: "300px" });
  function refresh(figure) {
    figure.stale = false;
    figure.render();
  }
  function add(node, render) {
    const figure = { node, render, stale: true, near: false };
    figures.push(figure);
    near.observe(node);
    return figure;
  }
  /* What the reader sees is drawn at once, what lies just outside follows, the rest waits until it is near. */
  let later = 0;
  const redraw = (force = false) => {
    const seen = (figure) => {
      const box = figure.node.getBoundingClientRect();
      return box.bottom > 0 && box.top < window.innerHeight;
    };
    const due = force ? figures : figures.filter((figure) => figure.near && seen(figure));
    figures.forEach((figure) => { figure.stale = true; });
    due.forEach(refresh);
    clearTimeout(later);
    const follow = () => {
      const next = figures.find((figure) => figure.near && figure.stale);
      if (!next) return;
      refresh(next);
      later = setTimeout(follow);
    };
    later = setTimeout(follow, 30);
  };
  listeners.push(() => redraw());
  let width = window.innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 120);
  });
  addEventListener("beforeprint", () => redraw(true));

  const options = (select, entries) => {
    const before = select.value;
    select.replaceChildren(...entries.map(([value, label]) => html("option", { value: String(value) }, label)));
    select.value = String(entries.some(([value]) => String(value) === before) ? before : entries[0]?.[0]);
  };
  /** A picture's plot: focusable, so that arrow keys can read it. */
  function plotBox(host, label) {
    host.tabIndex = 0;
    host.setAttribute("role", "group");
    host.setAttribute("aria-roledescription", "chart");
    host.setAttribute("aria-label", `${label}. Left and right arrow keys read the values.`);
    return host;
  }
  /** The values behind a chart as a table, for whoever would rather read than look. */
  function valuesTable(spec, title) {
    const [head, ...rows] = rowsOf(spec);
    const write = (value) => (typeof value === "number" ? number(value, 5) : value === null || value === undefined ? "–" : String(value));
    const shown = rows.slice(0, 500);
    const names = ["Series", "Method", spec.x.label, spec.y.label, "95 % from", "95 % to"];
    const table = html("table", {},
      html("caption", { className: "out" }, title),
      html("thead", {}, html("tr", {}, ...head.map((_, i) => html("th", { scope: "col" }, names[i])))),
      html("tbody", {}, ...shown.map((row) => html("tr", {}, ...row.map((value, i) => (i === 0 ? html("th", { scope: "row" }, write(value)) : html("td", {}, write(value))))))));
    const box = html("div", { className: "scroll", tabIndex: 0 }, table);
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", title);
    return rows.length > shown.length ? [box, html("p", { className: "quiet" }, `${rows.length - shown.length} more values are in the CSV.`)] : [box];
  }
  function tools(figure, name, title, specOf) {
    const bar = figure.querySelector(".tools");
    const values = figure.querySelector(".values");
    const tableButton = html("button", { type: "button", className: "plainbutton" }, "Values");
    tableButton.setAttribute("aria-expanded", "false");
    tableButton.setAttribute("aria-label", `${title}: show the values as a table`);
    const fill = () => values.replaceChildren(...valuesTable(specOf(), title));
    tableButton.addEventListener("click", () => {
      const open = tableButton.getAttribute("aria-expanded") !== "true";
      tableButton.setAttribute("aria-expanded", String(open));
      values.hidden = !open;
      if (open) fill(); else values.replaceChildren();
    });
    const save = html("button", { type: "button", className: "plainbutton" }, "CSV");
    save.setAttribute("aria-label", `${title}: download as CSV`);
    save.addEventListener("click", () => saveChart(name, specOf()));
    bar.append(tableButton, save);
    return () => { if (!values.hidden) fill(); };
  }

  /* Methods side by side, by any quantity. */
  const compareFigure = document.getElementById("fig-compare");
  if (compareFigure) {
    const pick = compareFigure.querySelector("select");
    const sections = new Map();
    for (const [id, about] of Object.entries(DATA.quantities)) {
      if (!sections.has(about.dimension)) sections.set(about.dimension, html("optgroup", { label: about.dimension }));
      sections.get(about.dimension).append(html("option", { value: id }, about.title));
    }
    pick.append(...sections.values());
    const host = compareFigure.querySelector(".chart");
    const values = compareFigure.querySelector(".values");
    const rows = (spec) => [["method", "run", pick.value], ...spec.rows.flatMap((row) => row.values.map((v) => [row.label, v.name, v.value]))];
    const figure = add(compareFigure, () => {
      const spec = LR.stripSpec(pick.value);
      compareFigure.querySelector(".meaning").textContent = DATA.quantities[pick.value].help + ".";
      strip(host, spec);
      values.replaceChildren(html("ul", {}, ...spec.rows.map((row) => html("li", {}, `${row.label}: ${spec.value(row.mean)}` + (finite(row.lo) ? `, 95 % interval ${spec.value(row.lo)} to ${spec.value(row.hi)}, ${row.n} runs` : row.n > 1 ? `, ${row.n} runs` : ", one run")))));
    });
    pick.addEventListener("change", () => refresh(figure));
    const save = html("button", { type: "button", className: "plainbutton" }, "CSV");
    save.setAttribute("aria-label", "Methods side by side: download as CSV");
    save.addEventListener("click", () => download(`${pick.value}.csv`, csvText(rows(LR.stripSpec(pick.value)))));
    compareFigure.querySelector(".tools").append(save);
  }

  /* The loss over steps. */
  const lossFigure = document.getElementById("fig-loss");
  if (lossFigure) {
    const choice = { which: "eval", part: "tail" };
    const host = plotBox(lossFigure.querySelector(".chart"), "Loss over training steps");
    const spec = () => LR.lossSpec(choice);
    const retable = tools(lossFigure, "loss", "Loss over training steps", spec);
    const figure = add(lossFigure, () => { draw(host, spec()); retable(); });
    for (const input of lossFigure.querySelectorAll("input")) {
      input.checked = choice[input.dataset.option] === input.value;
      input.addEventListener("change", () => { choice[input.dataset.option] = input.value; refresh(figure); });
    }
  }

  /* Loss along lines: one figure for each kind of sweep. */
  for (const node of document.querySelectorAll("figure[data-curve]")) {
    const metric = node.dataset.curve;
    const title = node.querySelector("h3").textContent;
    const host = plotBox(node.querySelector(".chart"), title);
    const slider = node.querySelector("input[type=range]");
    const output = node.querySelector("output");
    const choice = { step: null, absolute: false, xLabel: node.dataset.x };
    const spec = () => LR.curveSpec(metric, choice);
    const retable = tools(node, metric, title, spec);
    const figure = add(node, () => {
      const all = LR.curveSteps(metric);
      slider.max = String(Math.max(all.length - 1, 0));
      slider.disabled = all.length < 2;
      if (choice.step === null) slider.value = String(LR.fullestStep(metric));
      const at = all[+slider.value];
      output.textContent = at === undefined ? "–" : `step ${at}`;
      slider.setAttribute("aria-valuetext", output.textContent);
      draw(host, spec());
      retable();
    });
    slider.addEventListener("input", () => { choice.step = +slider.value; refresh(figure); });
    for (const input of node.querySelectorAll("input[type=radio]")) {
      input.checked = (input.value === "absolute") === choice.absolute;
      input.addEventListener("change", () => { choice.absolute = input.value === "absolute"; refresh(figure); });
    }
  }

  /* Metrics over steps, in small multiples. */
  for (const node of document.querySelectorAll("figure[data-trend]")) {
    const metric = node.dataset.trend;
    const title = DATA.metrics[metric].title;
    const host = plotBox(node.querySelector(".chart"), `${title} over training steps`);
    const spec = () => LR.trendSpec(metric, { height: 216, ends: false, empty: node.dataset.why || "No value for these runs." });
    const retable = tools(node, metric, `${title} over training steps`, spec);
    add(node, () => { draw(host, spec()); retable(); });
  }

  /* Heat maps of layers and steps. */
  for (const node of document.querySelectorAll("[data-heat]")) {
    const metric = node.dataset.heat;
    const grid = node.querySelector(".grid");
    add(node, () => {
      const { specs, low, high } = LR.heatSpecs(metric);
      const pieces = specs.map(({ method }) => {
        const host = html("div", { className: "chart" });
        return { host, box: html("div", { className: "multiple" }, html("h4", {}, swatch(method, 24), ` ${DATA.methods[method].title}`), host) };
      });
      grid.replaceChildren(...pieces.map((p) => p.box));
      pieces.forEach((p, i) => heat(p.host, specs[i].spec));
      node.querySelector(".scale").replaceChildren(html("span", {}, number(low, 3)), html("i", {}), html("span", {}, number(high, 3)));
    });
  }
  const planeFigure = document.getElementById("fig-planes");
  if (planeFigure) {
    const grid = planeFigure.querySelector(".grid");
    add(planeFigure, () => {
      const { specs, high } = LR.planeSpecs();
      const pieces = specs.map(({ run }) => {
        const host = html("div", { className: "chart" });
        return { host, box: html("div", { className: "multiple" }, html("h4", {}, swatch(run.method, 24), ` ${LR.runTitle(run)}`), host) };
      });
      grid.replaceChildren(...pieces.map((p) => p.box));
      pieces.forEach((p, i) => heat(p.host, specs[i].spec));
      planeFigure.querySelector(".scale").replaceChildren(html("span", {}, "0"), html("i", {}), html("span", {}, `${number(high, 3)} nats`));
    });
  }
  const barrierFigure = document.getElementById("fig-barriers");
  if (barrierFigure) {
    add(barrierFigure, () => {
      const spec = LR.barrierSpec();
      barrierFigure.hidden = !spec;
      if (spec) heat(barrierFigure.querySelector(".chart"), spec);
    });
  }

  /* Layer by layer. */
  const layerFigure = document.getElementById("fig-layers");
  if (layerFigure) {
    const pick = layerFigure.querySelector("select");
    const slider = layerFigure.querySelector("input[type=range]");
    const output = layerFigure.querySelector("output");
    const grid = layerFigure.querySelector(".grid");
    options(pick, LR.layerMetrics().map((m) => [m, DATA.metrics[m].title]));
    let moved = false;
    const current = () => {
      const all = LR.layerSteps(pick.value);
      return all[Math.min(moved ? +slider.value : all.length - 1, all.length - 1)];
    };
    const figure = add(layerFigure, () => {
      const all = LR.layerSteps(pick.value);
      slider.max = String(Math.max(all.length - 1, 0));
      slider.disabled = all.length < 2;
      if (!moved) slider.value = slider.max;
      output.textContent = all.length ? `step ${current()}` : "–";
      slider.setAttribute("aria-valuetext", output.textContent);
      layerFigure.querySelector(".meaning").textContent = DATA.metrics[pick.value]?.meaning || "";
      const specs = LR.layerSpecs(pick.value, current());
      const boxes = specs.map(([kind]) => {
        const host = plotBox(html("div", { className: "chart" }), `${DATA.metrics[pick.value].title} of ${kind} by block`);
        return { host, box: html("div", { className: "multiple" }, html("h4", {}, kind), host) };
      });
      grid.replaceChildren(...boxes.map((b) => b.box));
      boxes.forEach((b, i) => draw(b.host, specs[i][1]));
      if (!boxes.length) grid.append(html("p", { className: "empty" }, "No layer was measured for these runs."));
    });
    pick.addEventListener("change", () => { moved = false; refresh(figure); });
    slider.addEventListener("input", () => { moved = true; refresh(figure); });
    const save = html("button", { type: "button", className: "plainbutton" }, "CSV");
    save.setAttribute("aria-label", "Layer by layer: download as CSV");
    save.addEventListener("click", () => {
      const rows = LR.layerSpecs(pick.value, current()).flatMap(([kind, spec]) => rowsOf(spec).slice(1).map((row) => [pick.value, current(), kind, ...row]));
      download(`${pick.value}-layers.csv`, csvText([["metric", "step", "kind", "series", "method", "block", "value", "ci_low", "ci_high"], ...rows]));
    });
    layerFigure.querySelector(".tools").append(save);
  }

  /* Everything measured, as one tidy table. */
  document.getElementById("savealldata")?.addEventListener("click", () => {
    const rows = [["run", "method", "seed", "step", "metric", "scope", "value", "ci_low", "ci_high"]];
    for (const run of shownRuns()) {
      const name = DATA.methods[run.method].name;
      for (const [metric, entry] of Object.entries(run.metrics)) {
        entry.x.forEach((step, i) => rows.push([run.name, name, run.seed, step, metric, "model", entry.y[i], entry.lo ? entry.lo[i] : null, entry.hi ? entry.hi[i] : null]));
        const layers = entry.layers;
        if (layers) layers.steps.forEach((step, i) => layers.scopes.forEach((scope, j) => { if (finite(layers.values[i][j])) rows.push([run.name, name, run.seed, step, metric, DATA.scopes[scope], layers.values[i][j], null, null]); }));
      }
    }
    download("measurements.csv", csvText(rows));
  });

  document.body.classList.add("ready");
  changed();
})();
