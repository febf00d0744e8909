/* Which chart each figure shows, and what its controls do. */
(() => {
  const {
    DATA,
    html,
    number,
    draw,
    strip,
    heat,
    scatter,
    swatch,
    rowsOf,
    finite,
    add,
    refresh,
    cells,
    options,
    plotBox,
    tools,
    csvButton,
  } = LR;

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
    const rows = (spec) => [
      ["method", "run", pick.value],
      ...spec.rows.flatMap((row) => row.values.map((v) => [row.label, v.name, v.value])),
    ];
    const figure = add(compareFigure, () => {
      const spec = LR.stripSpec(pick.value);
      compareFigure.querySelector(".meaning").textContent = DATA.quantities[pick.value].help;
      strip(host, spec);
      values.replaceChildren(
        html(
          "ul",
          {},
          ...spec.rows.map((row) =>
            html(
              "li",
              {},
              `${row.label}: ${spec.value(row.mean)}` +
                (finite(row.lo)
                  ? `, 95 % interval ${spec.value(row.lo)} to ${spec.value(row.hi)}, ${row.n} runs`
                  : row.n > 1
                    ? `, ${row.n} runs`
                    : ", one run"),
            ),
          ),
        ),
      );
    });
    pick.addEventListener("change", () => refresh(figure));
    csvButton(
      compareFigure,
      () => `${pick.value.replace(/[^\w]+/g, "-")}.csv`,
      "Methods side by side",
      () => rows(LR.stripSpec(pick.value)),
    );
  }

  /* The loss over steps. */
  const lossFigure = document.getElementById("fig-loss");
  if (lossFigure) {
    const choice = { which: "eval", part: "tail" };
    const host = plotBox(lossFigure.querySelector(".chart"), "Loss over training steps");
    const spec = () => LR.lossSpec(choice);
    const retable = tools(lossFigure, "loss", "Loss over training steps", spec);
    const figure = add(lossFigure, () => {
      draw(host, spec());
      retable();
    });
    for (const input of lossFigure.querySelectorAll("input")) {
      input.checked = choice[input.dataset.option] === input.value;
      input.addEventListener("change", () => {
        choice[input.dataset.option] = input.value;
        refresh(figure);
      });
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
    slider.addEventListener("input", () => {
      choice.step = +slider.value;
      refresh(figure);
    });
    for (const input of node.querySelectorAll("input[type=radio]")) {
      input.checked = (input.value === "absolute") === choice.absolute;
      input.addEventListener("change", () => {
        choice.absolute = input.value === "absolute";
        refresh(figure);
      });
    }
  }

  /* Metrics over steps, in small multiples. */
  for (const node of document.querySelectorAll("figure[data-trend]")) {
    const metric = node.dataset.trend;
    const title = DATA.metrics[metric].title;
    const host = plotBox(node.querySelector(".chart"), `${title} over training steps`);
    const spec = () =>
      LR.trendSpec(metric, { height: 216, ends: false, empty: node.dataset.why || "No value for these runs." });
    const retable = tools(node, metric, `${title} over training steps`, spec);
    add(node, () => {
      draw(host, spec());
      retable();
    });
  }

  /* Heat maps of layers and steps. */
  for (const node of document.querySelectorAll("[data-heat]")) {
    const metric = node.dataset.heat;
    const grid = node.querySelector(".grid");
    add(node, () => {
      const { specs, low, high, below, above } = LR.heatSpecs(metric);
      const hosts = cells(
        grid,
        specs.map((s) => s.method),
        (method) => html("h4", {}, swatch(method, 24), ` ${DATA.methods[method].title}`),
      );
      hosts.forEach((host, i) => heat(host, specs[i].spec));
      node
        .querySelector(".scale")
        .replaceChildren(
          html("span", {}, `${below ? "▾ ≤ " : ""}${number(low, 3)}`),
          html("i", {}),
          html("span", {}, `${above ? "▴ ≥ " : ""}${number(high, 3)}`),
        );
    });
  }
  const planeFigure = document.getElementById("fig-planes");
  if (planeFigure) {
    const grid = planeFigure.querySelector(".grid");
    add(planeFigure, () => {
      const { specs, high } = LR.planeSpecs();
      const hosts = cells(
        grid,
        specs.map((s) => s.run),
        (run) => html("h4", {}, swatch(run.method, 24), ` ${LR.runTitle(run)}${LR.mark(run.plane)}`),
      );
      hosts.forEach((host, i) => heat(host, specs[i].spec));
      planeFigure
        .querySelector(".scale")
        .replaceChildren(html("span", {}, "0"), html("i", {}), html("span", {}, `${number(high, 3)} nats`));
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
    options(
      pick,
      LR.layerMetrics().map((m) => [m, DATA.metrics[m].title]),
    );
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
      const hosts = cells(
        grid,
        specs.map(([kind]) => kind),
        (kind, host) => {
          plotBox(host, kind);
          return html("h4", {}, kind);
        },
      );
      hosts.forEach((host, i) => {
        plotBox(host, `${DATA.metrics[pick.value].title} of ${specs[i][0]} by block`);
        draw(host, specs[i][1]);
      });
      if (!specs.length) grid.append(html("p", { className: "empty" }, "No layer was measured for these runs."));
    });
    pick.addEventListener("change", () => {
      moved = false;
      refresh(figure);
    });
    slider.addEventListener("input", () => {
      moved = true;
      refresh(figure);
    });
    csvButton(
      layerFigure,
      () => `${pick.value}-layers.csv`,
      "Layer by layer",
      () => [
        ["metric", "step", "kind", "series", "method", "block", "value", "ci_low", "ci_high"],
        ...LR.layerSpecs(pick.value, current()).flatMap(([kind, spec]) =>
          rowsOf(spec)
            .slice(1)
            .map((row) => [pick.value, current(), kind, ...row]),
        ),
      ],
    );
  }

  /* Downstream: a strip for each task, and the loss against the score. */
  const said = (spec) =>
    html(
      "ul",
      {},
      ...spec.rows.map((row) =>
        html(
          "li",
          {},
          `${row.label}: ${spec.value(row.mean)}` +
            (finite(row.lo)
              ? `, 95 % interval ${spec.value(row.lo)} to ${spec.value(row.hi)} over ${row.items ? "items" : "seeds"}`
              : ""),
        ),
      ),
    );
  const taskFigure = document.getElementById("fig-tasks");
  if (taskFigure) {
    const values = taskFigure.querySelector(".values");
    add(taskFigure, () => {
      const tasks = LR.shownTasks();
      const specs = tasks.map(LR.taskSpec);
      const hosts = cells(taskFigure.querySelector(".grid"), tasks, (task) => html("h4", {}, LR.taskTitle(task)));
      hosts.forEach((host, i) => strip(host, specs[i]));
      values.replaceChildren(...specs.flatMap((spec, i) => [html("p", {}, LR.taskTitle(tasks[i])), said(spec)]));
    });
    csvButton(taskFigure, "tasks.csv", "Scores by task", () => [
      ["task", "metric", "chance", "method", "run", "step", "value", "ci_low", "ci_high"],
      ...LR.shownTasks().flatMap((task) =>
        LR.shownRuns()
          .filter((run) => run.tasks[task.id])
          .map((run) => {
            const [value, low, high, step] = run.tasks[task.id];
            return [
              task.task,
              task.metric,
              task.chance,
              DATA.methods[run.method].name,
              run.name,
              step,
              value,
              low,
              high,
            ];
          }),
      ),
    ]);
  }
  const scatterFigure = document.getElementById("fig-scatter");
  if (scatterFigure) {
    const pick = scatterFigure.querySelector("select");
    options(pick, [["", "Mean above chance"], ...DATA.tasks.map((task) => [task.id, LR.taskTitle(task)])]);
    const host = plotBox(scatterFigure.querySelector(".chart"), "Loss against downstream score");
    const spec = () => LR.scatterSpec(pick.value);
    const retable = tools(scatterFigure, "loss-downstream", "Loss against downstream score", spec);
    const figure = add(scatterFigure, () => {
      scatter(host, spec());
      retable();
    });
    pick.addEventListener("change", () => refresh(figure));
  }

  /* The study: predicted against actual scores, and the sweep. */
  for (const figure of document.querySelectorAll("figure.prediction")) {
    const question = figure.dataset.question;
    add(figure, () => {
      const panels = LR.predictionSpecs(question);
      const hosts = cells(
        figure.querySelector(".grid"),
        panels.map((p) => p.title),
        (title, host) => {
          plotBox(host, `Predicted and actual scores: ${title}`);
          return html("h4", {}, title);
        },
      );
      hosts.forEach((host, i) => scatter(host, panels[i].spec));
    });
    csvButton(figure, `prediction-${question}.csv`, "Predicted and actual scores", () => {
      const found = DATA.predictions.find((prediction) => prediction.question === question);
      const rows = (found?.observed ?? []).map((observed, i) => [
        ...(found.rows[i] || ["", ""]),
        observed,
        found.predicted_perplexity[i],
        found.predicted_both[i],
      ]);
      return [["run", "step", "observed", "predicted_perplexity", "predicted_both"], ...rows];
    });
  }
  const sweepFigure = document.getElementById("fig-sweep");
  if (sweepFigure) {
    const host = plotBox(sweepFigure.querySelector(".chart"), "Loss by learning rate");
    const retable = tools(sweepFigure, "sweep", "Loss by learning rate", LR.sweepSpec);
    add(sweepFigure, () => {
      draw(host, LR.sweepSpec());
      retable();
    });
  }
  document.getElementById("saveclaims")?.addEventListener("click", () => {
    LR.download(
      "claims.csv",
      LR.csvText([
        ["claim", "statement", "verdict", "part", "comparison", "effect", "ci_low", "ci_high", "unit", "p_value", "n"],
        ...DATA.claims,
      ]),
    );
  });
})();
