/* Figures are drawn when they come near the window, and again when what they show changes; and the controls that all
   figures have. */
(() => {
  const { listeners, html, number, saveChart, rowsOf, forgetWidths } = LR;

  const figures = new Map();
  const watch = (key, rootMargin) =>
    new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const figure = figures.get(entry.target);
          figure[key] = entry.isIntersecting;
          if (entry.isIntersecting && figure.stale) refresh(figure);
        }
      },
      { rootMargin },
    );
  const near = watch("near", "400px");
  const seen = watch("seen", "0px");
  function refresh(figure) {
    figure.stale = false;
    figure.render();
  }
  function add(node, render) {
    const figure = { node, render, stale: true, near: false, seen: false };
    figures.set(node, figure);
    near.observe(node);
    seen.observe(node);
    return figure;
  }
  /* What the reader sees is drawn at once, what lies just outside follows, the rest waits until it is near. */
  let later = 0;
  function redraw(force = false) {
    const all = [...figures.values()];
    for (const figure of all) figure.stale = true;
    for (const figure of all) if (force || figure.seen) refresh(figure);
    clearTimeout(later);
    const follow = () => {
      const next = all.find((figure) => figure.near && figure.stale);
      if (!next) return;
      refresh(next);
      later = setTimeout(follow);
    };
    later = setTimeout(follow, 60);
  }
  listeners.push(() => redraw());
  let width = window.innerWidth,
    waiting = 0;
  addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      forgetWidths();
      redraw();
    }, 120);
  });
  addEventListener("beforeprint", () => {
    forgetWidths();
    redraw(true);
  });
  addEventListener("afterprint", () => {
    forgetWidths();
    redraw();
  });

  /** The hosts of a grid's pictures by name, kept from one drawing to the next; `make(name)` gives their headings. */
  function cells(grid, names, make) {
    grid.cells ??= new Map();
    const kept = names.map((name) => {
      if (!grid.cells.has(name)) {
        const host = html("div", { className: "chart" });
        grid.cells.set(name, { host, box: html("div", { className: "multiple" }, make(name, host), host) });
      }
      return grid.cells.get(name);
    });
    const boxes = kept.map((cell) => cell.box);
    if (boxes.length !== grid.childElementCount || boxes.some((box, i) => grid.children[i] !== box))
      grid.replaceChildren(...boxes);
    kept.forEach((cell) => LR.widthOf(cell.host));
    return kept.map((cell) => cell.host);
  }

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
  /** The values of a chart as a table. */
  function valuesTable(spec, title) {
    const [head, ...rows] = rowsOf(spec);
    const write = (value) =>
      typeof value === "number" ? number(value, 5) : value === null || value === undefined ? "–" : String(value);
    const shown = rows.slice(0, 500);
    const names = ["Series", "Method", spec.x.label, spec.y.label, "95 % from", "95 % to"];
    const table = html(
      "table",
      {},
      html("caption", { className: "out" }, title),
      html("thead", {}, html("tr", {}, ...head.map((_, i) => html("th", { scope: "col" }, names[i])))),
      html(
        "tbody",
        {},
        ...shown.map((row) =>
          html(
            "tr",
            {},
            ...row.map((value, i) =>
              i === 0 ? html("th", { scope: "row" }, write(value)) : html("td", {}, write(value)),
            ),
          ),
        ),
      ),
    );
    const box = html("div", { className: "scroll", tabIndex: 0 }, table);
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", title);
    return rows.length > shown.length
      ? [box, html("p", { className: "quiet" }, `${rows.length - shown.length} more values are in the CSV.`)]
      : [box];
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
      if (open) fill();
      else values.replaceChildren();
    });
    const save = html("button", { type: "button", className: "plainbutton" }, "CSV");
    save.setAttribute("aria-label", `${title}: download as CSV`);
    save.addEventListener("click", () => saveChart(name, specOf()));
    bar.append(tableButton, save);
    return () => {
      if (!values.hidden) fill();
    };
  }

  /** A button for the CSV of what `rows` gives at that moment. */
  function csvButton(figure, name, title, rows) {
    const save = html("button", { type: "button", className: "plainbutton" }, "CSV");
    save.setAttribute("aria-label", `${title}: download as CSV`);
    save.addEventListener("click", () => LR.download(typeof name === "string" ? name : name(), LR.csvText(rows())));
    figure.querySelector(".tools").append(save);
  }

  Object.assign(LR, { figures, add, refresh, redraw, cells, options, plotBox, tools, csvButton });
})();
