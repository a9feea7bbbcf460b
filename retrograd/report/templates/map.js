// The two-score map: a density of all points on a canvas, drawn and selected through whole numbers of 16 bits.
class Plane {
  constructor(canvas) {
    this.canvas = canvas; this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.width = canvas.width; this.height = canvas.height;
    this.reset();
  }
  reset() { this.middle = [0, 0]; this.reach = [1.04, 1.04]; }  // what is shown: middle ± reach, of the largest score
  // u in [-1, 1] → pixel, as two factors: pixel = scale · u + shift
  factors() {
    const sx = this.width / (2 * this.reach[0]), sy = -this.height / (2 * this.reach[1]);
    return [sx, this.width / 2 - sx * this.middle[0], sy, this.height / 2 - sy * this.middle[1]];
  }
  zoom(by, px = this.width / 2, py = this.height / 2) {
    const [sx, tx, sy, ty] = this.factors(), at = [(px - tx) / sx, (py - ty) / sy];
    this.middle = this.middle.map((m, k) => at[k] + (m - at[k]) / by);
    this.reach = this.reach.map((r) => Math.min(1.04, Math.max(1e-4, r / by)));
  }
  move(dx, dy) { const [sx, , sy] = this.factors(); this.middle[0] -= dx / sx; this.middle[1] -= dy / sy; }
  // the pixel of every point, -1 out of view, and how many points each pixel has; two loops, for ten million points
  place(points, linear) {
    const { X, Y } = points, [sx, tx, sy, ty] = this.factors(), W = this.width, H = this.height, c = 1 / 32767;
    const at = new Int32Array(X.length), counts = new Uint32Array(W * H);
    let seen = 0;
    if (linear) {
      const ax = sx * c * c, ay = sy * c * c;
      for (let k = 0; k < at.length; k++) {
        const px = ax * X[k] * Math.abs(X[k]) + tx, py = ay * Y[k] * Math.abs(Y[k]) + ty;
        at[k] = px >= 0 && px < W && py >= 0 && py < H ? (py | 0) * W + (px | 0) : -1;
      }
    } else {
      const ax = sx * c, ay = sy * c;
      for (let k = 0; k < at.length; k++) {
        const px = ax * X[k] + tx, py = ay * Y[k] + ty;
        at[k] = px >= 0 && px < W && py >= 0 && py < H ? (py | 0) * W + (px | 0) : -1;
      }
    }
    for (let k = 0; k < at.length; k++) if (at[k] >= 0) { counts[at[k]]++; seen++; }
    return { at, counts, seen };
  }
}
retrograd.panel("map", async (root, data, section) => {
  const { element, number, percent, signed } = retrograd, pick = (name) => root.querySelector(`.${name}`);
  const table = await retrograd.table(data.table), canvas = root.querySelector("canvas"), plane = new Plane(canvas);
  const [x, y] = [pick("x"), pick("y")], chosen = new Uint8Array(table.count);
  table.labels.forEach((label, k) => { x.append(element("option", { value: k }, label)); y.append(element("option", { value: k }, label)); });
  y.value = 1;
  const targets = new Uint32Array(table.targets);
  for (let k = 0, n = 0; k < table.count; k++) if (table.isTarget(k)) targets[n++] = k;
  const documents = [...table.pieces.keys()];
  let points, placed = null, how = "", lassoing = true;

  // ---- points: of tokens, or of documents by their sums ----
  function gathered() {
    const [a, b] = [Number(x.value), Number(y.value)];
    if (pick("unit").value === "tokens") {
      const X = new Int16Array(targets.length), Y = new Int16Array(targets.length), [p, q] = [table.scores[a], table.scores[b]];
      for (let k = 0; k < targets.length; k++) { X[k] = p[targets[k]]; Y[k] = q[targets[k]]; }
      return { X, Y, largest: [table.largest[a], table.largest[b]], tokens: true };
    }
    const sums = [a, b].map((column) => documents.map((document) => {
      let total = 0;
      for (const [start, stop] of table.pieces.get(document)) for (let k = start; k < stop; k++) total += table.score(column, k);
      return total;
    }));
    const largest = sums.map((values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-300));
    const whole = sums.map((values, k) => Int16Array.from(values, (value) => Math.sign(value) * Math.round(32767 * Math.sqrt(Math.abs(value) / largest[k]))));
    return { X: whole[0], Y: whole[1], largest, tokens: false };
  }
  const linear = () => pick("axes").value === "linear";
  function pieceChosen(document) {
    for (const [start, stop] of table.pieces.get(document)) for (let k = start; k < stop; k++) if (chosen[k]) return 1;
    return 0;
  }

  // ---- drawing ----
  const rgb = (name) => { const probe = getComputedStyle(document.documentElement).getPropertyValue(name).trim(); const c = document.createElement("canvas").getContext("2d"); c.fillStyle = probe.includes(",") ? `rgb(${probe})` : probe; c.fillRect(0, 0, 1, 1); return c.getImageData(0, 0, 1, 1).data; };
  const moved = () => { placed = null; draw(); };
  function draw() {
    placed ??= plane.place(points, linear());
    const W = plane.width, H = plane.height, { at: where, counts, seen } = placed, lit = new Uint32Array(W * H);
    if (points.tokens) { for (let k = 0; k < where.length; k++) if (chosen[targets[k]] && where[k] >= 0) lit[where[k]]++; }
    else documents.forEach((name, k) => { if (where[k] >= 0) lit[where[k]] += pieceChosen(name); });
    const size = seen > 100000 ? 0 : seen > 10000 ? 1 : 2, most = counts.reduce((a, b) => Math.max(a, b), 1);
    const image = plane.context.createImageData(W, H), out = new Uint32Array(image.data.buffer);
    const colour = ([r, g, b], alpha) => ((Math.round(255 * alpha) << 24) | (b << 16) | (g << 8) | r) >>> 0;
    const base = rgb("--density"), light = rgb("--lit"), shades = Array.from({ length: 65 }, (_, k) => colour(base, 0.22 + 0.78 * k / 64));
    const put = (at, value, strong) => {
      const cx = at % W, cy = (at / W) | 0;
      for (let v = Math.max(0, cy - size); v <= Math.min(H - 1, cy + size); v++) for (let u = Math.max(0, cx - size); u <= Math.min(W - 1, cx + size); u++) if (strong || !out[v * W + u]) out[v * W + u] = value;
    };
    const scale = 64 / Math.log(1 + most), some = [];
    for (let at = 0; at < counts.length; at++) {
      if (!counts[at]) continue;
      if (lit[at]) some.push(at);
      put(at, shades[Math.round(scale * Math.log(1 + counts[at]))], false);
    }
    const glow = colour(light, 1);
    for (const at of some) put(at, glow, true);
    plane.context.putImageData(image, 0, 0);
    axes();
  }
  function axes() {
    const c = plane.context, [sx, tx, sy, ty] = plane.factors(), W = plane.width, H = plane.height, style = getComputedStyle(document.documentElement);
    const value = (u, largest) => (linear() ? u : u * Math.abs(u)) * largest;
    c.strokeStyle = style.getPropertyValue("--soft"); c.fillStyle = style.getPropertyValue("--soft"); c.font = "12px system-ui, sans-serif"; c.lineWidth = 1;
    c.setLineDash([4, 4]); c.beginPath(); c.moveTo(tx, 0); c.lineTo(tx, H); c.moveTo(0, ty); c.lineTo(W, ty); c.stroke(); c.setLineDash([]);
    for (let k = 1; k < 6; k++) {
      const px = k * W / 6, py = k * H / 6;
      c.textAlign = "center"; c.fillText(signed(value((px - tx) / sx, points.largest[0]), 2), px, H - 6);
      c.textAlign = "left"; c.fillText(signed(value((py - ty) / sy, points.largest[1]), 2), 4, py + 4);
    }
    const told = (k) => `score for ${table.labels[k]}, nats; negative: training on this lowers its loss`;
    pick("across").textContent = `→ across: ${told(x.value)}`;
    pick("up").textContent = `↑ up: ${told(y.value)}`;
  }

  // ---- selecting ----
  function select(told, fill) {  // fill(mark): calls mark(k) for every point k that is in it
    const started = performance.now(), mode = pick("how").value, found = new Uint8Array(table.count);
    if (points.tokens) fill((k) => { found[targets[k]] = 1; });
    else fill((k) => { for (const [start, stop] of table.pieces.get(documents[k])) found.fill(1, start, stop); });
    join(found, mode);
    how = mode === "new" || !how ? told : `${how}; ${told} ${mode === "add" ? "added" : mode === "cut" ? "cut out" : "in both"}`;
    refresh();
    canvas.dataset.ms = (performance.now() - started).toFixed(1);
  }
  function join(found, mode) {
    if (mode === "new") chosen.set(found);
    else if (mode === "add") for (let k = 0; k < chosen.length; k++) chosen[k] |= found[k];
    else if (mode === "cut") for (let k = 0; k < chosen.length; k++) chosen[k] &= 1 - found[k];
    else for (let k = 0; k < chosen.length; k++) chosen[k] &= found[k];
  }
  function lasso(path) {
    const mask = document.createElement("canvas"), W = plane.width;
    mask.width = W; mask.height = plane.height;
    const c = mask.getContext("2d", { willReadFrequently: true });
    c.beginPath(); path.forEach(([px, py], k) => k ? c.lineTo(px, py) : c.moveTo(px, py)); c.closePath(); c.fill();
    select("lasso", (mark) => {
      const inside = c.getImageData(0, 0, W, mask.height).data, where = placed.at;
      for (let k = 0; k < where.length; k++) if (where[k] >= 0 && inside[4 * where[k] + 3] > 127) mark(k);
    });
  }
  const quadrants = [
    ["lower both losses", (a, b) => a < 0 && b < 0], ["lower only the first", (a, b) => a < 0 && b >= 0],
    ["lower only the second", (a, b) => a >= 0 && b < 0], ["lower neither", (a, b) => a >= 0 && b >= 0],
  ];
  quadrants.forEach(([name, inside]) => pick("quadrants").append(element("button", { type: "button", on: { click: () => select(`quadrant: ${name}`, (mark) => { for (let k = 0; k < points.X.length; k++) if (inside(points.X[k], points.Y[k])) mark(k); }) } }, name)));
  function word(text) {  // all tokens that hold a part of the word
    const wanted = text.trim().toLowerCase(), found = new Uint8Array(table.count);
    if (!wanted) return;
    const started = performance.now();
    if (table.count > 3e6) {
      const known = Uint8Array.from(table.vocabulary, (piece) => piece.toLowerCase().includes(wanted) ? 1 : 0);
      for (const k of targets) found[k] = known[table.token[k]];
    } else for (const name of documents) {
      const whole = table.text(name).toLowerCase();
      for (let at = whole.indexOf(wanted); at >= 0; at = whole.indexOf(wanted, at + 1)) light(name, at, at + wanted.length, found);
    }
    join(found, pick("how").value);
    how = `tokens of “${text.trim()}”`;
    refresh();
    canvas.dataset.ms = (performance.now() - started).toFixed(1);
  }
  function light(name, from, to, found) {
    let at = 0;
    for (const [start, stop] of table.pieces.get(name)) for (let k = start; k < stop; k++) {
      const end = at + table.vocabulary[table.token[k]].length;
      if (end > from && at < to && table.isTarget(k)) found[k] = 1;
      at = end;
      if (at >= to) return;
    }
  }
  function show(name) {
    if (!table.pieces.has(name)) { pick("status").textContent = `no document ${name} here`; return; }
    const found = new Uint8Array(table.count);
    for (const [start, stop] of table.pieces.get(name)) for (let k = start; k < stop; k++) found[k] = table.isTarget(k);
    join(found, "new");
    how = `document ${name}`;
    refresh();
  }

  // ---- what is selected ----
  let listed = [], shown = 0, wanted = 5, limit = 0, growing = 0;
  function refresh() {
    draw();
    let count = 0;
    const sums = [0, 0], by = new Map(), [p, q] = [table.scores[x.value], table.scores[y.value]];
    table.arrays.start.forEach((start, piece) => {
      const stop = piece + 1 < table.arrays.start.length ? table.arrays.start[piece + 1] : table.count;
      let here = 0, size = 0;
      for (let k = start; k < stop; k++) {
        if (!chosen[k]) continue;
        if (!table.isTarget(k)) { chosen[k] = 0; continue; }
        here++;
        size += p[k] * p[k];
        sums[0] += p[k] * Math.abs(p[k]); sums[1] += q[k] * Math.abs(q[k]);
      }
      const name = table.arrays.document[piece], before = by.get(name) ?? [0, 0];
      if (here) by.set(name, [before[0] + here, before[1] + size]);
      count += here;
    });
    sums.forEach((_, k) => { sums[k] *= table.largest[[x, y][k].value] / 32767 ** 2; });
    const n = targets.length;
    pick("status").textContent = count ? `${count.toLocaleString("en")} of ${n.toLocaleString("en")} tokens selected (${percent(count / n, 2)}; ${how}), in ${by.size.toLocaleString("en")} documents. Σ score ${table.labels[x.value]} ${signed(sums[0])}, ${table.labels[y.value]} ${signed(sums[1])} nats. Weights it implies: 1 on these and 0 elsewhere for descent; ${number(n / count)} on each of these for removal.` : "Nothing is selected.";
    pick("save").disabled = !count;
    pick("command").textContent = count ? `then: retrograd select OUT --scores ${table.sources[x.value]} --rule selection --selection selection.json` : "";
    listed = [...by].sort((a, b) => b[1][1] - a[1][1] || a[0] - b[0]);  // by Σ |score| of what is selected
    limit = listed.slice(0, 20).reduce((most, [name]) => Math.max(most, table.largestIn(Number(x.value), name)), 0);
    root.querySelector(".legend").replaceChildren(...(listed.length ? [element("span", { class: "soft" }, `Colours: score for ${table.labels[x.value]}. `), retrograd.scaleOf(limit)] : []));
    pick("list").replaceChildren(); shown = 0; wanted = 5;
    clearTimeout(growing);
    growing = setTimeout(grow);  // numbers and points first, text after
  }
  function grow() {  // a document at a time, so that the page answers meanwhile
    if (shown < Math.min(wanted, listed.length)) {
      const [name, [count]] = listed[shown++];
      pick("list").append(element("div", { class: "document", "data-document": name }, element("p", { class: "soft" }, `document ${name}: ${count} selected`), table.heat(Number(x.value), name, limit, chosen)));
      growing = setTimeout(grow);
    }
    pick("more").hidden = shown >= listed.length;
  }
  function save() {
    const runs = [];
    let last = -2;
    table.arrays.start.forEach((start, piece) => {
      const stop = piece + 1 < table.arrays.start.length ? table.arrays.start[piece + 1] : table.count, base = table.arrays.row[piece] * table.length + table.arrays.first[piece] - start;
      for (let k = start; k < stop; k++) if (chosen[k]) { if (base + k === last + 1) runs[runs.length - 1]++; else runs.push(base + k, 1); last = base + k; }
    });
    const file = { kind: "retrograd selection", version: 1, rows: table.rows, length: table.length, how, x: table.sources[x.value], y: table.sources[y.value], runs };
    const link = element("a", { download: "selection.json", href: URL.createObjectURL(new Blob([JSON.stringify(file)], { type: "application/json" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  function numbers() {
    const [a, b] = [Number(x.value), Number(y.value)], one = data.numbers[`${a} ${b}`] ?? data.numbers[`${b} ${a}`], back = !data.numbers[`${a} ${b}`];
    const facts = [`${targets.length.toLocaleString("en")} tokens`];
    if (one && a !== b) {
      const ratio = one.ratio === null ? null : back ? 1 / one.ratio : one.ratio;
      facts.push(`Pearson ${number(one.pearson)}`, `Spearman ${number(one.spearman)}`, `separable: ${percent(back ? one.separable_back : one.separable, 2)} of tokens are strong for the first (above its ${percent(data.above, 0)} quantile) and not for the second (at or below its median)`, `mean |first| is ${number(ratio)} times mean |second|`);
    }
    pick("numbers").replaceChildren(...facts.map((fact) => element("li", {}, fact)));
  }
  function anew() { points = gathered(); placed = null; numbers(); refresh(); }

  // ---- hands ----
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [(event.clientX - box.left) * plane.width / box.width, (event.clientY - box.top) * plane.height / box.height]; };
  let path = null;
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); path = [at(event)]; });
  canvas.addEventListener("pointermove", (event) => {
    if (!path) return;
    const here = at(event), last = path[path.length - 1];
    if (!lassoing) { plane.move(here[0] - last[0], here[1] - last[1]); path = [here]; requestAnimationFrame(moved); return; }
    const c = plane.context;
    c.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--lit"); c.lineWidth = 1.5;
    c.beginPath(); c.moveTo(...last); c.lineTo(...here); c.stroke();
    path.push(here);
  });
  canvas.addEventListener("pointerup", () => { const done = path; path = null; if (done && lassoing && done.length > 2) lasso(done); });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); plane.zoom(event.deltaY < 0 ? 1.25 : 0.8, ...at(event)); requestAnimationFrame(moved); }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const does = { ArrowLeft: () => plane.move(40, 0), ArrowRight: () => plane.move(-40, 0), ArrowUp: () => plane.move(0, 40), ArrowDown: () => plane.move(0, -40), "+": () => plane.zoom(1.25), "-": () => plane.zoom(0.8), 0: () => plane.reset() }[event.key];
    if (does) { event.preventDefault(); does(); moved(); }
  });
  const mode = (value) => { lassoing = value; pick("lasso").setAttribute("aria-pressed", value); pick("move").setAttribute("aria-pressed", !value); canvas.style.cursor = value ? "crosshair" : "grab"; };
  const press = (name, does) => pick(name).addEventListener("click", does);
  press("lasso", () => mode(true)); press("move", () => mode(false));
  press("in", () => { plane.zoom(1.5); moved(); }); press("out", () => { plane.zoom(1 / 1.5); moved(); }); press("whole", () => { plane.reset(); moved(); });
  press("clear", () => { chosen.fill(0); how = ""; refresh(); }); press("save", save); press("more", () => { wanted += 5; grow(); });
  for (const name of ["x", "y", "unit", "axes"]) pick(name).addEventListener("change", anew);
  const search = root.querySelector("input[type=search]");
  search.addEventListener("change", () => word(search.value));
  pick("document-id").addEventListener("change", (event) => show(Number(event.target.value)));
  document.addEventListener("retrograd:document", (event) => { if (event.detail.table === data.table) { show(event.detail.document); root.scrollIntoView(); } });
  document.addEventListener("theme", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  anew();
});
