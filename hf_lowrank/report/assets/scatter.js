/* Points in a plane, for what has no line through it: loss against downstream, predicted against actual scores.

   spec = { x: {label}, y: {label}, series: [{label, method, x, y, names?, big?: indices of the large marks}],
            equal?: same range on both axes, and the line on which they agree, refs: [{y, label}], height? }  */
(() => {
  const { svg, html, number, ticks, padded, finite, marker, swatch, tip, DATA } = LR;
  const announcer = document.getElementById("live");

  function range(values) {
    return padded(Math.min(...values), Math.max(...values), 0.06);
  }

  function scatter(host, spec) {
    const points = spec.series
      .flatMap((s, index) =>
        s.x.map((x, i) => ({
          x,
          y: s.y[i],
          s,
          index,
          big: !s.big || s.big.includes(i),
          name: s.names ? s.names[i] : "",
        })),
      )
      .filter((p) => finite(p.x) && finite(p.y));
    if (!points.length) {
      host.scatter = null;
      host.replaceChildren(html("p", { className: "empty" }, spec.empty || "Nothing to draw for this selection."));
      return;
    }
    const width = Math.max(LR.widthOf(host), 240);
    const height = spec.height || Math.round(Math.min(Math.max(width * 0.5, 260), 430));
    let [x0, x1] = range(points.map((p) => p.x));
    let [y0, y1] = range([...points.map((p) => p.y), ...(spec.refs || []).map((r) => r.y)]);
    if (spec.equal) [x0, x1] = [y0, y1] = [Math.min(x0, y0), Math.max(x1, y1)];
    const top = 34,
      bottom = height - 34,
      right = 12;
    const yTicks = ticks(y0, y1, Math.max(Math.round((bottom - top) / 52), 3));
    const left = 10 + 6.6 * Math.max(...yTicks.values.map((v) => yTicks.write(v).length), 2);
    const xTicks = ticks(x0, x1, Math.max(Math.round((width - left - right) / 92), 2));
    const X = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
    const Y = (v) => bottom - ((v - y0) / (y1 - y0)) * (bottom - top);
    const root = svg("svg", { class: "plot", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const inside = (v, low, high) => v >= low && v <= high;
    for (const v of yTicks.values.filter((tick) => inside(tick, y0, y1))) {
      root.append(
        svg("line", { x1: left, x2: width - right, y1: Y(v), y2: Y(v), class: "grid" }),
        svg("text", { x: left - 7, y: Y(v) + 4, "text-anchor": "end" }, yTicks.write(v)),
      );
    }
    for (const v of xTicks.values.filter((tick) => inside(tick, x0, x1))) {
      root.append(
        svg("line", { x1: X(v), x2: X(v), y1: bottom, y2: bottom + 4, class: "base" }),
        svg("text", { x: X(v), y: bottom + 17, "text-anchor": "middle" }, xTicks.write(v)),
      );
    }
    root.append(svg("line", { x1: left, x2: width - right, y1: bottom, y2: bottom, class: "base" }));
    root.append(
      svg("text", { x: 0, y: 12, class: "title" }, spec.y.label),
      svg("text", { x: width - right, y: height - 1, "text-anchor": "end", class: "title" }, spec.x.label),
    );
    if (spec.equal) root.append(svg("line", { x1: X(x0), y1: Y(x0), x2: X(x1), y2: Y(x1), class: "ref" }));
    for (const r of spec.refs || []) {
      root.append(
        svg("line", { x1: left, x2: width - right, y1: Y(r.y), y2: Y(r.y), class: "ref" }),
        svg("text", { x: left + 4, y: Y(r.y) - 5, class: "reftext" }, r.label),
      );
    }
    // One path for each method and size: a node for every point would be slow to lay out.
    for (const s of spec.series) {
      for (const big of [false, true]) {
        const own = points.filter((p) => p.s === s && p.big === big);
        if (!own.length) continue;
        const d = own.map((p) => marker(DATA.methods[s.method].marker, X(p.x), Y(p.y), big ? 5 : 2.6)).join("");
        root.append(svg("path", { d, fill: `var(--c${s.method})`, class: big ? "dots" : "dots small" }));
      }
    }
    const cursor = svg("g", { class: "cursor", visibility: "hidden" });
    root.append(cursor);
    host.replaceChildren(root);
    points.sort((a, b) => a.x - b.x || a.y - b.y);
    host.scatter = { spec, points, X, Y, root, cursor, place: -1 };
    listen(host);
  }

  function show(host, point, say) {
    const { spec, X, Y, root, cursor } = host.scatter;
    cursor.replaceChildren(
      svg("path", {
        d: marker(DATA.methods[point.s.method].marker, X(point.x), Y(point.y), 7),
        fill: `var(--c${point.s.method})`,
      }),
    );
    cursor.setAttribute("visibility", "visible");
    const rows = [
      [spec.x.label, point.x],
      [spec.y.label, point.y],
    ].map(([label, v]) => html("tr", {}, html("td", {}, label), html("td", {}, number(v, 4))));
    const name = point.name ? `${point.s.label}, ${point.name}` : point.s.label;
    tip.replaceChildren(html("b", {}, swatch(point.s.method, 20), ` ${name}`), html("table", {}, ...rows));
    tip.hidden = false;
    const box = root.getBoundingClientRect();
    const wish = box.left + X(point.x) + 14;
    const over = wish + tip.offsetWidth + 8 > document.documentElement.clientWidth;
    tip.style.left = `${Math.max(window.scrollX + (over ? wish - tip.offsetWidth - 28 : wish), 6)}px`;
    tip.style.top = `${window.scrollY + Math.max(box.top + Y(point.y) - tip.offsetHeight - 10, 6)}px`;
    if (say)
      announcer.textContent = `${name}: ${spec.x.label} ${number(point.x, 4)}, ${spec.y.label} ${number(point.y, 4)}`;
  }

  function hide(host) {
    tip.hidden = true;
    host.scatter?.cursor.setAttribute("visibility", "hidden");
  }

  function listen(host) {
    if (host.listening) return;
    host.listening = true;
    host.addEventListener("pointermove", (event) => {
      const plot = host.scatter;
      if (!plot) return;
      const box = plot.root.getBoundingClientRect();
      const far = (p) => (plot.X(p.x) - event.clientX + box.left) ** 2 + (plot.Y(p.y) - event.clientY + box.top) ** 2;
      const nearest = plot.points.reduce((a, b) => (far(b) < far(a) ? b : a));
      if (far(nearest) > 900) return hide(host);
      plot.place = plot.points.indexOf(nearest);
      show(host, nearest, false);
    });
    host.addEventListener("pointerleave", () => hide(host));
    host.addEventListener("blur", () => hide(host));
    host.addEventListener("keydown", (event) => {
      const plot = host.scatter;
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
      if (event.key === "Escape") return hide(host);
      if (move === undefined || !plot) return;
      event.preventDefault();
      plot.place = Math.min(Math.max(plot.place + move, 0), plot.points.length - 1);
      show(host, plot.points[plot.place], true);
    });
  }

  LR.scatter = scatter;
})();
