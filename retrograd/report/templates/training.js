retrograd.panel("training", (root, data) => {
  if (data.steps.length) retrograd.chart(root.querySelector(".chart"), { title: "Objective by training step.", x: { label: "training step" }, y: { label: "objective, nats" }, series: [{ kind: "line", x: data.steps, y: data.loss }] });
});
