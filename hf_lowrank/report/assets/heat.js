/* Layer × step heat maps, and a square matrix of barriers: one hue, from the ground to full strength.

   spec = { rows: [label], columns: [label], values: [[row][column]], low, high, xLabel, yLabel }
   A triangle marks a value below `low` or above `high`.                                                           */
(() => {
  const { svg, html, number, finite, tip, tipAtPointer } = LR;

  const LEVELS = 32;

  /** Draws a heat map into `host`; a picture that is there already stays. */
  function heat(host, spec) {
    const width = Math.max(LR.widthOf(host), 200);
    if (host.heat && host.heat.spec === spec && host.heat.width === width) return;
    host.heat = { spec, width };
    const left = 8 + 6.8 * Math.min(Math.max(...spec.rows.map((r) => r.length), 2), 16);
    const cellWidth = Math.min(
      (width - left - 6) / spec.columns.length,
      spec.square ? 68 : spec.plane ? 240 / spec.columns.length : 90,
    );
    const cellHeight = spec.plane
      ? cellWidth
      : spec.square
        ? Math.min(cellWidth, 44)
        : Math.min(Math.max(200 / spec.rows.length, 9), 24);
    const top = 6;
    const height = top + cellHeight * spec.rows.length + 40;
    const span = spec.high - spec.low || 1;
    const root = svg("svg", {
      class: "plot heat",
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      "aria-hidden": "true",
    });
    const gap = spec.plane ? 0 : 1;
    const every = spec.plane ? (spec.rows.length - 1) / 2 || 1 : Math.max(1, Math.ceil(12 / cellHeight));
    spec.rows.forEach((label, i) => {
      if (i % every === 0)
        root.append(
          svg(
            "text",
            { x: left - 6, y: top + cellHeight * (i + 0.5) + 4, "text-anchor": "end" },
            label.length > 16 ? label.slice(0, 15) + "…" : label,
          ),
        );
    });
    const widest = Math.max(...spec.columns.map((c) => c.length)) * 6.6 + 8;
    const sparse = spec.plane ? (spec.columns.length - 1) / 2 || 1 : Math.max(1, Math.ceil(widest / cellWidth));
    spec.columns.forEach((label, j) => {
      if (j % sparse === 0)
        root.append(svg("text", { x: left + cellWidth * (j + 0.5), y: height - 22, "text-anchor": "middle" }, label));
    });
    root.append(
      svg(
        "text",
        { x: left + cellWidth * spec.columns.length, y: height - 4, "text-anchor": "end", class: "title" },
        spec.xLabel,
      ),
    );
    // One path for each shade: a node for every cell would be slow to lay out.
    const shades = new Map();
    const texts = [];
    const outliers = { below: [], above: [] };
    spec.values.forEach((row, i) =>
      row.forEach((value, j) => {
        const share = finite(value)
          ? Math.min(Math.max((value - spec.low) / span, 0), 1) ** (spec.plane ? 0.5 : 1)
          : null;
        const shade = share === null ? -1 : Math.round(share * LEVELS);
        const x = left + cellWidth * j + 0.5,
          y = top + cellHeight * i + 0.5,
          w = (cellWidth - gap).toFixed(2);
        if (!shades.has(shade)) shades.set(shade, []);
        shades.get(shade).push(`M${x.toFixed(2)} ${y.toFixed(2)}h${w}v${(cellHeight - gap).toFixed(2)}h-${w}z`);
        if (finite(value) && (value < spec.low || value > spec.high)) {
          const above = value > spec.high;
          const r = Math.min(cellWidth, cellHeight) / 4;
          const [cx, cy] = [left + cellWidth * (j + 0.5), top + cellHeight * (i + 0.5) + (above ? r / 2 : -r / 2)];
          outliers[above ? "above" : "below"].push(
            `M${(cx - r).toFixed(2)} ${cy.toFixed(2)}h${(2 * r).toFixed(2)}l${-r} ${above ? -1.5 * r : 1.5 * r}z`,
          );
        }
        if (spec.square && share !== null && cellWidth >= 40) {
          texts.push(
            svg(
              "text",
              {
                x: left + cellWidth * (j + 0.5),
                y: top + cellHeight * (i + 0.5) + 4,
                "text-anchor": "middle",
                class: share > 0.55 ? "onheat" : "",
              },
              number(value, 2),
            ),
          );
        }
      }),
    );
    for (const [shade, cells] of shades) {
      root.append(
        svg("path", {
          d: cells.join(""),
          class: shade < 0 ? "hole" : "heatcell",
          "fill-opacity": shade < 0 ? null : (0.05 + (0.95 * shade) / LEVELS).toFixed(3),
        }),
      );
    }
    for (const [side, cells] of Object.entries(outliers))
      if (cells.length) root.append(svg("path", { d: cells.join(""), class: `clipped ${side}` }));
    root.append(...texts);
    host.replaceChildren(root);
    host.onpointermove = (event) => {
      const at = root.getBoundingClientRect();
      const i = Math.floor((event.clientY - at.top - top) / cellHeight),
        j = Math.floor((event.clientX - at.left - left) / cellWidth);
      if (!spec.values[i] || j < 0 || j >= spec.columns.length) {
        tip.hidden = true;
        return;
      }
      tip.replaceChildren(
        html("b", {}, `${spec.rows[i]} · ${spec.xLabel} ${spec.columns[j]}`),
        html("div", {}, `${spec.what}: ${number(spec.values[i][j], 4)}`),
      );
      tipAtPointer(event);
    };
    host.onpointerleave = () => {
      tip.hidden = true;
    };
  }

  LR.heat = heat;
})();
