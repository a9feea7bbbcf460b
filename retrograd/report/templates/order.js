retrograd.panel("order", (root, data, section) => {
  const both = (one) => [{ name: "mean score (negative lowers the query loss)", kind: "line", colour: "var(--s2)", x: one.at, y: one.mean }, { name: "mean |score|", kind: "line", colour: "var(--s6)", dash: "4 3", x: one.at, y: one.size }];
  section.each((query) => {
    if (data.step) retrograd.chart(root.querySelector(".by-step"), { title: "Documents by the step they were trained at.", x: { label: "training step" }, y: { label: "score, nats" }, series: both(data.step[query]) });
    if (data.sweep && data.sweep.size[query]) retrograd.chart(root.querySelector(".by-sweep"), { title: "Mean |score| of what a step trained on, from the sweep's journal.", x: { label: "training step" }, y: { label: "mean |score|, nats", log: true }, series: [{ kind: "line", colour: "var(--s6)", x: data.sweep.step, y: data.sweep.size[query] }] });
    if (data.position) retrograd.chart(root.querySelector(".by-position"), { title: "Tokens by their position in the row.", x: { label: "position" }, y: { label: "score, nats" }, series: both(data.position[query]) });
    retrograd.chart(root.querySelector(".by-length"), { title: "Documents by their length.", x: { label: "targets in the document" }, y: { label: "score, nats" }, series: both(data.length[query]) });
  });
});
