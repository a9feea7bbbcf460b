// Small charts as SVG. series: {name, x, y, kind: line | points | bars, low, high, hint, colour}; x.names: a text for each of 0, 1, 2, …
retrograd.chart = (() => {
  const L = 76, R = 14, T = 12, B = 44;
  const { number } = retrograd;
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  function ticks(low, high, log, count = 5) {
    if (log) {
      const found = [], first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
      const step = Math.max(1, Math.ceil((last - first) / count));
      for (let k = first; k <= last; k += step) if (10 ** k >= low * 0.999 && 10 ** k <= high * 1.001) found.push(10 ** k);
      return found.length > 1 ? found : [low, high];
    }
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= raw);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
    return found;
  }
  function scale(values, log, from, to, whole) {
    let good = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
    if (!good.length) good = [log ? 1 : 0, log ? 10 : 1];
    let low = good.reduce((a, b) => Math.min(a, b)), high = good.reduce((a, b) => Math.max(a, b));
    if (whole !== undefined) { low = Math.min(low, whole[0]); high = Math.max(high, whole[1]); }
    if (low === high) { low = log ? low / 2 : low - Math.abs(low || 1) / 2; high = log ? high * 2 : high + Math.abs(high || 1) / 2; }
    else if (!log && whole === undefined) { const pad = 0.04 * (high - low); low -= pad; high += pad; }
    const f = log ? Math.log10 : (x) => x;
    const at = (value) => from + (f(value) - f(low)) / (f(high) - f(low)) * (to - from);
    return { at, low, high, log, ticks: ticks(low, high, log), crosses: !log && good.some((value) => value < 0) };
  }
  function draw(into, chart) {
    const W = Math.max(300, Math.min(560, into.clientWidth || into.parentElement.clientWidth || 560));  // text keeps its size on a narrow screen
    const H = chart.height ?? 260, series = chart.series, all = (name) => series.flatMap((one) => one[name] ?? []).filter((value) => value !== null);
    const x = scale([...all("x"), ...all("left"), ...all("right")], chart.x.log, L, W - R, chart.x.range), y = scale([...all("y"), ...all("low"), ...all("high")], chart.y.log, H - B, T, chart.y.range);
    const parts = [];
    for (const value of y.ticks) parts.push(svg("line", { class: "grid", x1: L, x2: W - R, y1: y.at(value), y2: y.at(value) }), svg("text", { x: L - 6, y: y.at(value) + 4, "text-anchor": "end" }, number(value)));
    for (const value of chart.x.names ? chart.x.names.keys() : x.ticks) parts.push(svg("line", { class: "axis", x1: x.at(value), x2: x.at(value), y1: H - B, y2: H - B + 4 }), svg("text", { x: x.at(value), y: H - B + 17, "text-anchor": "middle" }, chart.x.names ? chart.x.names[value] : number(value)));
    for (const box of chart.boxes ?? []) {
      const [x0, x1, y0, y1] = [x.at(box.x[0]), x.at(box.x[1]), y.at(box.y[0]), y.at(box.y[1])];
      parts.push(svg("rect", { x: Math.min(x0, x1), y: Math.min(y0, y1), width: Math.abs(x1 - x0), height: Math.abs(y1 - y0), fill: box.colour, opacity: box.opacity ?? 0.15 }));
    }
    const inside = (value, axis) => value >= axis.low && value <= axis.high;
    if (x.crosses && inside(0, x)) parts.push(svg("line", { class: "zero", x1: x.at(0), x2: x.at(0), y1: T, y2: H - B }));
    if (y.crosses && inside(0, y)) parts.push(svg("line", { class: "zero", x1: L, x2: W - R, y1: y.at(0), y2: y.at(0) }));
    for (const line of chart.lines ?? []) {
      const points = line.x !== undefined ? [x.at(line.x), T, x.at(line.x), H - B] : line.y !== undefined ? [L, y.at(line.y), W - R, y.at(line.y)] : null;
      const [x1, y1, x2, y2] = points ?? [x.at(Math.max(x.low, y.low)), y.at(Math.max(x.low, y.low)), x.at(Math.min(x.high, y.high)), y.at(Math.min(x.high, y.high))];
      parts.push(svg("line", { class: "zero", x1, y1, x2, y2 }));
      if (line.name) parts.push(svg("text", line.x !== undefined ? { x: x1 > W - 70 ? x1 - 3 : x1 + 3, y: H - B - 4, "text-anchor": x1 > W - 70 ? "end" : "start" } : { x: x2, y: y2 - 4, "text-anchor": "end" }, line.name));
    }
    const labels = [];
    series.forEach((one, k) => parts.push(...mark(one, one.colour ?? `var(--s${k % 8})`, x, y, [W, H], labels)));
    parts.push(svg("line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B }));
    parts.push(svg("text", { class: "label", x: (L + W - R) / 2, y: H - 8, "text-anchor": "middle" }, chart.x.label));
    parts.push(svg("text", { class: "label", x: -(T + H - B) / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, chart.y.label));
    const keys = series.filter((one) => one.name).length > 1 || chart.keys ? retrograd.element("ul", { class: "keys" }, ...series.filter((one) => one.name).map((one, k) => retrograd.element("li", {}, retrograd.element("i", { style: `background:${one.colour ?? `var(--s${series.indexOf(one) % 8})`}` }), one.name))) : null;
    const told = `${chart.title}. ${chart.x.label} against ${chart.y.label}.`;
    into.replaceChildren(retrograd.element("figure", {}, svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": told }, ...parts), ...(keys ? [keys] : []), retrograd.element("figcaption", {}, chart.title)));
  }
  function mark(one, colour, x, y, [W, H], labels) {
    const parts = [], shown = one.x.map((value, k) => [value, one.y[k], k]).filter(([a, b]) => a !== null && b !== null && Number.isFinite(b) && (!y.log || b > 0) && (!x.log || a > 0));
    if (one.kind === "bars") {
      for (const [, value, k] of shown) {
        const from = x.at(one.edges[k]), to = x.at(one.edges[k + 1]), top = y.at(value), middle = (one.edges[k] + one.edges[k + 1]) / 2;
        parts.push(svg("rect", { x: from, width: Math.max(0.6, to - from - 0.6), y: top, height: Math.max(0, H - B - top), fill: one.colours ? one.colours[k] : colour }, svg("title", {}, `${value} with ${number(middle)}`)));
      }
      return parts;
    }
    if (one.low) for (const [at, , k] of shown) if (one.low[k] !== null) parts.push(svg("line", { x1: x.at(at), x2: x.at(at), y1: y.at(one.low[k]), y2: y.at(one.high[k]), stroke: colour, "stroke-width": 1.2, opacity: 0.6 }));
    if (one.left) for (const [, value, k] of shown) if (one.left[k] !== null) parts.push(svg("line", { x1: x.at(one.left[k]), x2: x.at(one.right[k]), y1: y.at(value), y2: y.at(value), stroke: colour, "stroke-width": 1.2, opacity: 0.6 }));
    if (one.kind === "line") parts.push(svg("path", { d: shown.map(([a, b], k) => `${k ? "L" : "M"}${x.at(a).toFixed(1)} ${y.at(b).toFixed(1)}`).join(""), fill: "none", stroke: colour, "stroke-width": 1.6, "stroke-dasharray": one.dash }));
    if (one.kind === "points" || (one.kind === "line" && shown.length < 60)) {
      for (const [a, b, k] of shown) {
        const size = one.size ?? (one.kind === "line" ? 2 : 3.6), told = one.hint ? one.hint[k] : `${one.name ? one.name + ": " : ""}${number(a)}, ${number(b)}`;
        const hollow = one.hollow?.[k];
        parts.push(svg("circle", { cx: x.at(a), cy: y.at(b), r: size, fill: hollow ? "var(--card)" : colour, stroke: colour, "stroke-width": hollow ? 1.6 : 0, opacity: 0.9 }, svg("title", {}, told)));
        if (!one.labels) continue;
        const place = [x.at(a) + 6, y.at(b) - 5], wide = 7 * one.labels[k].length + 8, right = place[0] + wide > W;
        while (labels.some(([u, v]) => Math.abs(u - place[0]) < wide && Math.abs(v - place[1]) < 13)) place[1] += 13;
        labels.push(place);
        parts.push(svg("text", { class: "label", x: right ? place[0] - 12 : place[0], y: place[1], "text-anchor": right ? "end" : "start" }, one.labels[k]));
      }
    }
    return parts;
  }
  return draw;
})();
