/* One line chart with bands, for every picture that has an x axis.

   spec = { x: {label, write?, ticks?, log?}, y: {label, write?, zero?}, refs: [{y, label}], height?,
            series: [{label, method, x, y, lo?, hi?, points?, faint?, loose?: marks without a line,
                      rings?: places marked by a ring}],
            ends?: label the lines' ends }                                                                         */
(() => {
  const { svg, html, number, ticks, DATA, csvText, download } = LR;
  const WIDTH = 1.9;

  /** The path of a marker of radius r around (x, y): one shape per method, told apart without colour. */
  function marker(shape, x, y, r) {
    const polygon = (n, turn, radius = r * 1.18) =>
      "M" +
      Array.from({ length: n }, (_, i) => {
        const a = turn + (2 * Math.PI * i) / n;
        return `${(x + radius * Math.cos(a)).toFixed(1)},${(y + radius * Math.sin(a)).toFixed(1)}`;
      }).join("L") +
      "Z";
    const bar = (a) => {
      const c = Math.cos(a),
        s = Math.sin(a),
        w = r * 0.42,
        l = r * 1.3;
      return (
        "M" +
        [
          [l, w],
          [-l, w],
          [-l, -w],
          [l, -w],
        ]
          .map(([p, q]) => `${(x + p * c - q * s).toFixed(1)},${(y + p * s + q * c).toFixed(1)}`)
          .join("L") +
        "Z"
      );
    };
    const up = -Math.PI / 2;
    switch (shape) {
      case "square":
        return polygon(4, Math.PI / 4, r * 1.25);
      case "diamond":
        return polygon(4, 0, r * 1.35);
      case "up":
        return polygon(3, up, r * 1.4);
      case "down":
        return polygon(3, -up, r * 1.4);
      case "hexagon":
        return polygon(6, 0);
      case "pentagon":
        return polygon(5, up);
      case "plus":
        return bar(0) + bar(Math.PI / 2);
      case "cross":
        return bar(Math.PI / 4) + bar(-Math.PI / 4);
      case "star":
        return bar(up) + bar(up + Math.PI / 3) + bar(up - Math.PI / 3);
      default:
        return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
    }
  }

  /** A small sample of a method's line and marker, for legends and tooltips. */
  function swatch(method, width = 26) {
    const look = DATA.methods[method];
    const node = svg("svg", { width, height: 12, viewBox: `0 0 ${width} 12`, class: "swatch", "aria-hidden": "true" });
    node.append(
      svg("path", {
        d: `M1 6H${width - 1}`,
        stroke: `var(--c${method})`,
        "stroke-width": 2,
        fill: "none",
        "stroke-dasharray": look.dash.map((d) => d * 1.6).join(" ") || null,
      }),
      svg("path", { d: marker(look.marker, width / 2, 6, 3.4), fill: `var(--c${method})` }),
    );
    return node;
  }

  const finite = (v) => v !== null && v !== undefined && Number.isFinite(v);

  function extent(series, refs, zero) {
    let low = Infinity,
      high = -Infinity;
    const take = (v) => {
      if (finite(v)) {
        if (v < low) low = v;
        if (v > high) high = v;
      }
    };
    for (const s of series) {
      s.y.forEach(take);
      if (s.lo) {
        s.lo.forEach(take);
        s.hi.forEach(take);
      }
    }
    refs.forEach((r) => take(r.y));
    if (zero) take(0);
    if (low > high) return [0, 1];
    const [below, above] = LR.padded(low, high, 0.05);
    return [zero && low === 0 ? 0 : below, above];
  }

  /** Moves labels apart, at least `gap` between neighbours, none below `bottom`. */
  function spread(labels, gap, bottom) {
    labels.sort((a, b) => a.y - b.y);
    for (let i = 1; i < labels.length; i++) labels[i].at = Math.max(labels[i].at, labels[i - 1].at + gap);
    const over = labels.length ? labels[labels.length - 1].at - bottom : 0;
    if (over > 0) {
      labels[labels.length - 1].at -= over;
      for (let i = labels.length - 2; i >= 0; i--) labels[i].at = Math.min(labels[i].at, labels[i + 1].at - gap);
    }
    return labels;
  }

  /** Draws `spec` into `host`, replacing what was there. */
  function draw(host, spec) {
    const previous = host.querySelector(".plot");
    const width = Math.max(LR.widthOf(host), 240);
    const height = spec.height || Math.round(Math.min(Math.max(width * 0.46, 240), 430));
    const series = spec.series.filter((s) => s.y.some(finite));
    const refs = spec.refs || [];
    if (!series.length) {
      host.replaceChildren(html("p", { className: "empty" }, spec.empty || "Nothing to draw for this selection."));
      return;
    }
    const ends = spec.ends !== false && width >= 560 && series.length <= 12;
    const longest = ends ? Math.max(...series.map((s) => s.label.length)) : 0;
    const [low, high] = extent(series, refs, spec.y.zero);
    const plotHeight = height - 46;
    const yTicks = ticks(low, high, Math.max(Math.round(plotHeight / 46), 4));
    const yWrite = spec.y.write || yTicks.write;
    const left = 10 + 6.6 * Math.max(...yTicks.values.map((v) => yWrite(v).length), 2);
    const right = ends ? Math.min(26 + longest * 6.7, width * 0.26) : 14;
    const top = spec.y.title ? 34 : 14,
      bottom = height - 32;
    let x0 = Infinity,
      x1 = -Infinity;
    for (const s of series)
      s.x.forEach((v, i) => {
        if (finite(s.y[i])) {
          x0 = Math.min(x0, v);
          x1 = Math.max(x1, v);
        }
      });
    if (x0 === x1) [x0, x1] = spec.x.log ? [x0 / 2, x1 * 2] : [x0 - 0.5, x1 + 0.5];
    const along = spec.x.log ? (v) => Math.log(v / x0) / Math.log(x1 / x0) : (v) => (v - x0) / (x1 - x0);
    const X = (v) => left + along(v) * (width - left - right);
    const Y = (v) => bottom - ((v - low) / (high - low)) * (bottom - top);

    const root = svg("svg", { class: "plot", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const back = svg("g", { class: "axes" });
    for (const v of yTicks.values) {
      back.append(svg("line", { x1: left, x2: width - right, y1: Y(v), y2: Y(v), class: v === 0 ? "zero" : "grid" }));
      back.append(svg("text", { x: left - 7, y: Y(v) + 4, "text-anchor": "end" }, yWrite(v)));
    }
    const xTicks = spec.x.ticks
      ? { values: spec.x.ticks, write: spec.x.write }
      : ticks(x0, x1, Math.max(Math.round((width - left - right) / 92), 2));
    const xWrite = spec.x.write || xTicks.write;
    back.append(svg("line", { x1: left, x2: width - right, y1: bottom, y2: bottom, class: "base" }));
    for (const v of xTicks.values) {
      back.append(svg("line", { x1: X(v), x2: X(v), y1: bottom, y2: bottom + 4, class: "base" }));
      back.append(svg("text", { x: X(v), y: bottom + 17, "text-anchor": "middle" }, xWrite(v)));
    }
    back.append(svg("text", { x: width - right, y: height - 1, "text-anchor": "end", class: "title" }, spec.x.label));
    if (spec.y.title) back.append(svg("text", { x: 0, y: 12, class: "title" }, spec.y.label));
    for (const r of refs) {
      back.append(svg("line", { x1: left, x2: width - right, y1: Y(r.y), y2: Y(r.y), class: "ref" }));
      back.append(svg("text", { x: left + 4, y: Y(r.y) - 5, class: "reftext" }, r.label));
    }
    root.append(back);

    const bands = svg("g"),
      lines = svg("g"),
      names = svg("g", { class: "ends" });
    const marks = [];
    series.forEach((s, index) => {
      const look = DATA.methods[s.method];
      const colour = `var(--c${s.method})`;
      if (s.lo && s.lo.some(finite)) {
        // Every unbroken stretch that has a band gets its own outline.
        let stretch = [];
        const flush = () => {
          if (stretch.length > 1) {
            const there = stretch.map((i) => `${X(s.x[i]).toFixed(1)},${Y(s.lo[i]).toFixed(1)}`);
            const back_ = stretch
              .slice()
              .reverse()
              .map((i) => `${X(s.x[i]).toFixed(1)},${Y(s.hi[i]).toFixed(1)}`);
            bands.append(
              svg("path", {
                d: `M${there.join("L")}L${back_.join("L")}Z`,
                fill: colour,
                class: "band",
                "data-i": index,
              }),
            );
          } else if (stretch.length === 1) {
            const i = stretch[0];
            bands.append(
              svg("path", {
                d: `M${X(s.x[i])} ${Y(s.lo[i])}V${Y(s.hi[i])}`,
                stroke: colour,
                "stroke-width": 5,
                class: "band whisker",
                "data-i": index,
              }),
            );
          }
          stretch = [];
        };
        s.x.forEach((_, i) => (finite(s.lo[i]) && finite(s.hi[i]) ? stretch.push(i) : flush()));
        flush();
      }
      let d = "",
        pen = false;
      s.x.forEach((v, i) => {
        if (finite(s.y[i]) && !s.loose) {
          d += `${pen ? "L" : "M"}${X(v).toFixed(1)},${Y(s.y[i]).toFixed(1)}`;
          pen = true;
        } else pen = false;
      });
      lines.append(
        svg("path", {
          d,
          stroke: colour,
          class: s.faint ? "line faint" : "line",
          "data-i": index,
          "stroke-width": s.faint ? 1.1 : WIDTH,
          "stroke-dasharray": look.dash.map((v) => v * WIDTH).join(" ") || null,
        }),
      );
      const drawn = s.x.map((_, i) => i).filter((i) => finite(s.y[i]));
      const dots =
        s.points === false
          ? [drawn[drawn.length - 1]]
          : drawn.length <= 24
            ? drawn
            : drawn.filter((_, i) => i % Math.ceil(drawn.length / 12) === 0 || i === drawn.length - 1);
      if (!s.faint) {
        lines.append(
          svg("path", {
            d: dots.map((i) => marker(look.marker, X(s.x[i]), Y(s.y[i]), 3.1)).join(""),
            fill: colour,
            class: "dots",
            "data-i": index,
          }),
        );
      }
      for (const i of s.rings || [])
        lines.append(
          svg("circle", {
            cx: X(s.x[i]),
            cy: Y(s.y[i]),
            r: 7.5,
            fill: "none",
            stroke: colour,
            "stroke-width": 1.6,
            "data-i": index,
          }),
        );
      const last = drawn[drawn.length - 1];
      marks.push({ index, label: s.label, method: s.method, x: X(s.x[last]), y: Y(s.y[last]), at: Y(s.y[last]) });
    });
    if (ends) {
      for (const m of spread(marks, 14.5, bottom)) {
        const x = width - right + 12;
        if (Math.abs(m.at - m.y) > 3 || x - m.x > 16)
          names.append(
            svg("path", { d: `M${m.x + 5},${m.y}L${x - 3},${m.at}`, class: "leader", stroke: `var(--c${m.method})` }),
          );
        names.append(svg("text", { x, y: m.at + 4, fill: `var(--c${m.method})`, "data-i": m.index }, m.label));
      }
    }
    const cursor = svg("g", { class: "cursor", visibility: "hidden" });
    root.append(bands, lines, names, cursor);
    host.replaceChildren(root);
    if (!previous) listen(host);
    host.plot = {
      spec,
      series,
      X,
      Y,
      left,
      right,
      top,
      bottom,
      width,
      height,
      x0,
      x1,
      cursor,
      root,
      xWrite,
      xs: positions(series),
    };
  }

  function positions(series) {
    const all = new Set();
    for (const s of series)
      s.x.forEach((v, i) => {
        if (finite(s.y[i])) all.add(v);
      });
    return [...all].sort((a, b) => a - b);
  }

  /** The value of a series at x: its own point, or none when the nearest lies elsewhere. */
  function at(series, x, reach) {
    let best = -1,
      distance = Infinity;
    for (let i = 0; i < series.x.length; i++) {
      const d = Math.abs(series.x[i] - x);
      if (d < distance && finite(series.y[i])) {
        best = i;
        distance = d;
      }
    }
    return distance <= reach ? best : -1;
  }

  const tip = html("div", { className: "tip", hidden: true });
  tip.setAttribute("role", "presentation");
  document.body.append(tip);
  /** Shows the tooltip next to the pointer, within the window. */
  function tipAtPointer(event) {
    tip.hidden = false;
    const rightmost = window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 6;
    tip.style.left = `${Math.max(Math.min(event.pageX + 14, rightmost), 4)}px`;
    tip.style.top = `${event.pageY + 15}px`;
  }
  const announcer = document.getElementById("live");

  function show(host, x, pointerY, say) {
    const p = host.plot;
    const reach = p.spec.x.log ? x * 1e-6 : ((p.x1 - p.x0) / Math.max(p.width - p.left - p.right, 1)) * 14 + 1e-12;
    const found = p.series.map((s, index) => ({ s, index, i: at(s, x, reach) })).filter((f) => f.i >= 0);
    if (!found.length) return hide(host);
    found.sort((a, b) => b.s.y[b.i] - a.s.y[a.i]);
    let near = null;
    if (pointerY !== null) {
      near = found.reduce((a, b) =>
        Math.abs(p.Y(b.s.y[b.i]) - pointerY) < Math.abs(p.Y(a.s.y[a.i]) - pointerY) ? b : a,
      );
      if (Math.abs(p.Y(near.s.y[near.i]) - pointerY) > 40) near = null;
    }
    const px = p.X(x);
    p.cursor.replaceChildren(svg("line", { x1: px, x2: px, y1: p.top, y2: p.bottom }));
    for (const f of found) {
      p.cursor.append(
        svg("path", {
          d: marker(DATA.methods[f.s.method].marker, p.X(f.s.x[f.i]), p.Y(f.s.y[f.i]), 4.6),
          fill: `var(--c${f.s.method})`,
        }),
      );
    }
    p.cursor.setAttribute("visibility", "visible");
    for (const node of p.root.querySelectorAll("[data-i]"))
      node.classList.toggle("dim", near !== null && +node.dataset.i !== near.index);
    let listed = found;
    if (found.length > 12) {
      const centre = near ? found.indexOf(near) : 0;
      const start = Math.min(Math.max(centre - 6, 0), found.length - 12);
      listed = found.slice(start, start + 12);
    }
    const write = p.spec.y.value || ((v) => number(v, 4));
    const body = html("table", {});
    for (const f of listed) {
      const value = html("td", {}, write(f.s.y[f.i]));
      if (f.s.lo && finite(f.s.lo[f.i]))
        value.append(html("small", {}, ` ${write(f.s.lo[f.i])} – ${write(f.s.hi[f.i])}`));
      const name = html("td", {}, swatch(f.s.method, 20), f.s.label);
      body.append(html("tr", { className: f === near ? "near" : "" }, name, value));
    }
    const head = `${p.spec.x.label} ${(p.spec.x.value || p.xWrite)(x)}`;
    tip.replaceChildren(html("b", {}, head), body);
    if (found.length > listed.length) tip.append(html("small", {}, `and ${found.length - listed.length} more`));
    tip.hidden = false;
    const box = p.root.getBoundingClientRect();
    const side =
      box.left + px + tip.offsetWidth + 24 < document.documentElement.clientWidth ? px + 14 : px - tip.offsetWidth - 14;
    tip.style.left = `${Math.max(window.scrollX + box.left + side, 6)}px`;
    const wish = box.top + (pointerY === null ? p.top : pointerY - tip.offsetHeight / 2);
    tip.style.top = `${window.scrollY + Math.min(Math.max(wish, 60), window.innerHeight - tip.offsetHeight - 8)}px`;
    if (say) announcer.textContent = head + ": " + found.map((f) => `${f.s.label} ${write(f.s.y[f.i])}`).join(", ");
  }

  function hide(host) {
    tip.hidden = true;
    if (!host.plot) return;
    host.plot.cursor.setAttribute("visibility", "hidden");
    host.plot.root.querySelectorAll(".dim").forEach((node) => node.classList.remove("dim"));
  }

  function listen(host) {
    if (host.listening) return;
    host.listening = true;
    host.addEventListener("pointermove", (event) => {
      const p = host.plot;
      if (!p || !p.root.isConnected) return;
      const box = p.root.getBoundingClientRect();
      const wanted = event.clientX - box.left;
      const x = p.xs.reduce((a, b) => (Math.abs(p.X(b) - wanted) < Math.abs(p.X(a) - wanted) ? b : a));
      p.place = p.xs.indexOf(x);
      show(host, x, event.clientY - box.top, false);
    });
    host.addEventListener("pointerleave", () => hide(host));
    host.addEventListener("blur", () => hide(host));
    host.addEventListener("keydown", (event) => {
      const p = host.plot;
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
      if (event.key === "Escape") return hide(host);
      if (move === undefined || !p) return;
      event.preventDefault();
      const from = p.place === undefined ? (move > 0 ? -1 : p.xs.length) : p.place;
      p.place = Math.min(Math.max(from + move, 0), p.xs.length - 1);
      show(host, p.xs[p.place], null, true);
    });
  }

  /** What a chart shows, as rows for a CSV file or a table. */
  function rowsOf(spec) {
    const head = ["series", "method", spec.x.label, spec.y.label, "ci_low", "ci_high"];
    const rows = [];
    for (const s of spec.series) {
      s.x.forEach((x, i) => {
        if (finite(s.y[i]))
          rows.push([s.label, DATA.methods[s.method].title, x, s.y[i], s.lo ? s.lo[i] : null, s.hi ? s.hi[i] : null]);
      });
    }
    return [head, ...rows];
  }
  const saveChart = (name, spec) => download(name + ".csv", csvText(rowsOf(spec)));

  Object.assign(LR, { draw, swatch, marker, rowsOf, saveChart, finite, tip, tipAtPointer });
})();
