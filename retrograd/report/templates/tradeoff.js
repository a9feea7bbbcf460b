retrograd.panel("tradeoff", (root, data) => {
  const { element, percent } = retrograd;
  const select = Object.fromEntries(["forget", "retain"].map((side) => {
    const made = root.querySelector(`.${side}`);
    data.sides[side].forEach((key) => made.append(element("option", {}, key)));
    made.value = data.best[side];
    made.addEventListener("change", fill);
    return [side, made];
  }));
  const colours = { untouched: "var(--s5)", healthy: "var(--s2)", damaged: "var(--s1)", destroyed: "var(--bad)" };
  function fill() {
    const [f, r] = [select.forget.value, select.retain.value], series = [], boxes = [];
    for (const point of data.points) {
      const x = point.values[f], y = point.values[r];
      if (!x || !y) continue;
      const destroyed = point.verdict === "destroyed", name = `${point.model}${point.role && point.role !== point.model ? ` (${point.role})` : ""}`;
      if (destroyed) boxes.push({ x: [x.value - 0.03, x.value + 0.03], y: [y.value - 0.05, y.value + 0.05], colour: "var(--bad)" });
      series.push({ name: `${name}: ${point.verdict ?? "no verdict"}`, kind: "points", size: point.role ? 6 : 5, colour: point.role ? "var(--ink)" : colours[point.verdict] ?? "var(--soft)", x: [x.value], y: [y.value], low: [y.interval[0]], high: [y.interval[1]], left: [x.interval[0]], right: [x.interval[1]], hollow: [destroyed], labels: [name], hint: [`${name}, ${point.verdict ?? "no verdict"}: ${percent(x.value)} of ${x.questions} to go, ${percent(y.value)} of ${y.questions} to stay`] });
    }
    const lines = [];
    if (data.chance[f] !== undefined) lines.push({ x: data.chance[f], name: "chance" });
    if (data.chance[r] !== undefined) lines.push({ y: data.chance[r], name: "chance" });
    retrograd.chart(root.querySelector(".chart"), { title: "Right answers about what is to go, and about what is to stay.", height: 380, keys: true, x: { label: `${f}: share of right answers`, range: [0, 1] }, y: { label: `${r}: share right`, range: [0, 1] }, series, lines, boxes });
  }
  fill();
});
