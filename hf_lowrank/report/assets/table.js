/* The tables of methods and of runs: sorting by any column, choosing columns, hiding methods, CSV of what is shown. */
(() => {
  const { state, listeners, csvText, download } = LR;
  const tables = [...document.querySelectorAll("table.sortable")];

  const raw = (cell) => {
    const value = cell.dataset.v;
    if (value === undefined || value === "") return null;
    return cell.dataset.kind === "text" ? value : Number(value);
  };

  function sort(table, index, direction) {
    const body = table.tBodies[0];
    const sign = direction === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row, order) => ({ row, order, value: raw(row.cells[index]) }));
    rows.sort((a, b) => {
      // What has no value stands last whichever way the column is sorted.
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.order - b.order;
      const less =
        typeof a.value === "string" ? a.value.localeCompare(b.value, "en", { numeric: true }) : a.value - b.value;
      return sign * less || a.order - b.order;
    });
    body.append(...rows.map((entry) => entry.row));
    for (const heading of table.tHead.rows[0].cells) heading.removeAttribute("aria-sort");
    table.tHead.rows[0].cells[index].setAttribute("aria-sort", direction);
  }

  for (const table of tables) {
    [...table.tHead.rows[0].cells].forEach((heading, index) => {
      heading.querySelector("button").addEventListener("click", () => {
        const now = heading.getAttribute("aria-sort");
        sort(table, index, now === "ascending" ? "descending" : "ascending");
      });
    });
  }

  const rowsOfMethods = [...document.querySelectorAll("tr[data-method]")];
  const blocks = [...document.querySelectorAll("[data-group]")];
  function filter() {
    for (const row of rowsOfMethods) {
      const hidden = state.hidden.has(+row.dataset.method);
      if (row.hidden !== hidden) row.hidden = hidden;
    }
    for (const block of blocks) block.hidden = +block.dataset.group !== state.group;
  }
  listeners.push(filter);

  /* Values, or differences from the baseline. */
  for (const radio of document.querySelectorAll("input[name^=against-]")) {
    radio.checked = radio.value === "values";
    radio.addEventListener("change", () =>
      radio
        .closest("[data-group]")
        .querySelector("table.methods")
        .classList.toggle("versus", radio.value === "beside"),
    );
  }

  function show(table, wanted) {
    for (const cell of table.querySelectorAll("[data-d]"))
      cell.classList.toggle("away", cell.dataset.d !== "id" && !wanted(cell.dataset));
  }
  const choices = [...document.querySelectorAll("select.columns")];
  for (const choice of choices) {
    const choose = () =>
      show(choice.closest("[data-group]").querySelector("table.runs"), (cell) =>
        ["all", cell.d].includes(choice.value),
      );
    choice.addEventListener("change", choose);
    choose();
  }
  /** The columns of one metric or of one dimension in the tables of runs; all that were chosen there without either. */
  LR.chooseColumns = (metric, dimension) => {
    for (const choice of choices) {
      if (dimension && [...choice.options].some((option) => option.value === dimension)) choice.value = dimension;
      choice.dispatchEvent(new Event("change"));
      const table = choice.closest("[data-group]").querySelector("table.runs");
      const id = metric === "loss" ? "validation_loss" : metric;
      if (metric && [...table.tHead.rows[0].cells].some((cell) => cell.dataset.id === id))
        show(table, (cell) => cell.id === id);
    }
  };

  for (const button of document.querySelectorAll("button.savemethods")) {
    button.addEventListener("click", () => {
      const table = button.closest("[data-group]").querySelector("table.methods");
      const ids = [...table.tHead.rows[0].cells].map((cell) => cell.dataset.id);
      const head = ids.flatMap((id, i) => (i === 0 ? [id] : [id, `${id}_ci_low`, `${id}_ci_high`, `${id}_rank`]));
      const rows = [...table.tBodies[0].rows]
        .filter((row) => !row.hidden)
        .map((row) =>
          [...row.cells].flatMap((cell, i) =>
            i === 0
              ? [raw(cell)]
              : [raw(cell), cell.dataset.lo ?? null, cell.dataset.hi ?? null, cell.dataset.rank ?? null],
          ),
        );
      download("methods.csv", csvText([head, ...rows]));
    });
  }

  for (const button of document.querySelectorAll("button.savetable")) {
    button.addEventListener("click", () => {
      const table = button.closest("[data-group]").querySelector("table.runs");
      const used = [...table.tHead.rows[0].cells]
        .map((_, i) => i)
        .filter((i) => !table.tHead.rows[0].cells[i].classList.contains("away"));
      const head = used.flatMap((i) => {
        const id = table.tHead.rows[0].cells[i].dataset.id;
        return table.querySelector(`tbody td[data-id="${CSS.escape(id)}"][data-lo]`)
          ? [id, id + "_ci_low", id + "_ci_high"]
          : [id];
      });
      const rows = [...table.tBodies[0].rows]
        .filter((row) => !row.hidden)
        .map((row) =>
          used.flatMap((i) => {
            const cell = row.cells[i],
              id = cell.dataset.id;
            return head.includes(id + "_ci_low")
              ? [raw(cell), cell.dataset.lo ?? null, cell.dataset.hi ?? null]
              : [raw(cell)];
          }),
        );
      download("runs.csv", csvText([head, ...rows]));
    });
  }
})();
