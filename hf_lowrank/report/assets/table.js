/* The tables of runs: sorting by any column, choosing columns by dimension, hiding methods, CSV of what is shown. */
(() => {
  const { state, listeners, csvText, download } = LR;
  const tables = [...document.querySelectorAll("table.runs")];

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
      const less = typeof a.value === "string" ? a.value.localeCompare(b.value, "en", { numeric: true }) : a.value - b.value;
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

  function filter() {
    for (const table of tables) {
      for (const row of table.tBodies[0].rows) row.hidden = state.hidden.has(+row.dataset.method);
    }
    for (const block of document.querySelectorAll("[data-group]")) block.hidden = +block.dataset.group !== state.group;
    for (const row of document.querySelectorAll(".methods [data-method]")) row.hidden = state.hidden.has(+row.dataset.method);
  }
  listeners.push(filter);

  for (const choice of document.querySelectorAll("select.columns")) {
    const block = choice.closest("[data-group]");
    const choose = () => {
      block.querySelector("table.runs").dataset.shows = choice.value;
      for (const cell of block.querySelectorAll("table.runs [data-d]")) {
        cell.classList.toggle("away", !["all", cell.dataset.d].includes(choice.value) && cell.dataset.d !== "id");
      }
    };
    choice.addEventListener("change", choose);
    choose();
  }

  for (const button of document.querySelectorAll("button.savetable")) {
    button.addEventListener("click", () => {
      const table = button.closest("[data-group]").querySelector("table.runs");
      const used = [...table.tHead.rows[0].cells].map((_, i) => i).filter((i) => !table.tHead.rows[0].cells[i].classList.contains("away"));
      const head = used.flatMap((i) => {
        const id = table.tHead.rows[0].cells[i].dataset.id;
        return table.querySelector(`tbody td[data-id="${CSS.escape(id)}"][data-lo]`) ? [id, id + "_ci_low", id + "_ci_high"] : [id];
      });
      const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => used.flatMap((i) => {
        const cell = row.cells[i], id = cell.dataset.id;
        return head.includes(id + "_ci_low") ? [raw(cell), cell.dataset.lo ?? null, cell.dataset.hi ?? null] : [raw(cell)];
      }));
      download("runs.csv", csvText([head, ...rows]));
    });
  }
})();
