/* One row for each method: every run a mark, the mean over seeds a line with its interval, the value at the end.

   spec = { rows: [{label, method, values: [{name, value}], mean, lo, hi, n}], label, value, ref?: {at, label} }   */
(() => {
  const { svg, html, ticks, padded, finite, marker, DATA, tip, tipAtPointer } = LR;

  function strip(host, spec) {
    const width = Math.max(LR.widthOf(host), 240);
    const narrow = width < 560;
    const rowHeight = narrow ? 46 : 34;
    const left = narrow ? 0 : 30 + 7.4 * Math.max(...spec.rows.map((r) => r.label.length), 4);
    const right = narrow ? 12 : 92;
    const top = 8,
      bottom = top + rowHeight * spec.rows.length;
    const height = bottom + 42;
    const all = spec.rows
      .flatMap((r) => [...r.values.map((v) => v.value), r.lo, r.hi])
      .concat(spec.ref ? spec.ref.at : [])
      .filter(finite);
    if (!all.length) {
      host.replaceChildren(html("p", { className: "empty" }, "No value of these runs."));
      return;
    }
    const least = Math.min(...all);
    let [low, high] = padded(least, Math.max(...all), 0.06);
    if (least >= 0) low = Math.max(low, 0);
    const X = (v) => left + 8 + ((v - low) / (high - low)) * (width - left - right - 16);
    const root = svg("svg", {
      class: "plot strip",
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      "aria-hidden": "true",
    });
    const axis = ticks(low, high, Math.max(Math.round((width - left - right) / 110), 2));
    for (const v of axis.values) {
      if (v < low) continue;
      root.append(svg("line", { x1: X(v), x2: X(v), y1: top, y2: bottom, class: "grid" }));
      root.append(svg("text", { x: X(v), y: bottom + 17, "text-anchor": "middle" }, axis.write(v)));
    }
    root.append(svg("line", { x1: left, x2: width - right, y1: bottom, y2: bottom, class: "base" }));
    root.append(svg("text", { x: width - right, y: height - 3, "text-anchor": "end", class: "title" }, spec.label));
    if (spec.ref && finite(spec.ref.at)) {
      const crossed = narrow
        ? spec.rows.map((_, i) => [top + rowHeight * (i + 0.5) - 1, top + rowHeight * (i + 0.5) + 19])
        : [[top, bottom]];
      for (const [y1, y2] of crossed)
        root.append(svg("line", { x1: X(spec.ref.at), x2: X(spec.ref.at), y1, y2, class: "ref" }));
      root.append(svg("text", { x: left, y: height - 3, class: "reftext" }, `┊ ${spec.ref.label}`));
    }
    spec.rows.forEach((row, i) => {
      const colour = `var(--c${row.method})`;
      const y = top + rowHeight * (i + 0.5) + (narrow ? 9 : 0);
      const said = spec.value(row.mean);
      if (narrow) {
        root.append(svg("text", { x: 0, y: y - 14, class: "who" }, row.label));
        root.append(svg("text", { x: width - 2, y: y - 14, "text-anchor": "end", class: "amount" }, said));
      } else {
        root.append(svg("text", { x: 0, y: y + 4, class: "who" }, row.label));
        root.append(svg("text", { x: width - 2, y: y + 4, "text-anchor": "end", class: "amount" }, said));
      }
      root.append(svg("line", { x1: left, x2: width - right, y1: y, y2: y, class: "grid" }));
      if (finite(row.lo))
        root.append(
          svg("line", {
            x1: X(row.lo),
            x2: X(row.hi),
            y1: y,
            y2: y,
            stroke: colour,
            "stroke-width": 7,
            "stroke-linecap": "round",
            opacity: 0.28,
          }),
        );
      const several = row.values.length > 1;
      const marks = row.values
        .map((v) => marker(DATA.methods[row.method].marker, X(v.value), y, several ? 3.2 : 5))
        .join("");
      root.append(svg("path", { d: marks, fill: colour, class: "dots", opacity: several ? 0.75 : 1 }));
      if (row.n > 1)
        root.append(
          svg("line", { x1: X(row.mean), x2: X(row.mean), y1: y - 9, y2: y + 9, stroke: colour, "stroke-width": 2.4 }),
        );
    });
    host.replaceChildren(root);
    host.onpointermove = (event) => {
      const row = spec.rows[Math.floor((event.clientY - root.getBoundingClientRect().top - top) / rowHeight)];
      if (!row) {
        tip.hidden = true;
        return;
      }
      const lines = row.values
        .slice(0, 12)
        .map((v) => html("tr", {}, html("td", {}, v.name), html("td", {}, spec.value(v.value))));
      const interval = finite(row.lo)
        ? `mean ${spec.value(row.mean)}, 95 % ${spec.value(row.lo)} – ${spec.value(row.hi)}`
        : row.n > 1
          ? ""
          : "one run, no interval";
      tip.replaceChildren(html("b", {}, row.label), html("table", {}, ...lines), html("small", {}, interval));
      tipAtPointer(event);
    };
    host.onpointerleave = () => {
      tip.hidden = true;
    };
  }

  LR.strip = strip;
})();
