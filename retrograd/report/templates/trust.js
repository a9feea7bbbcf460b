retrograd.panel("trust", (root, data) => {
  const { train, reverse, named, findings } = data;
  const lines = findings.filter((one) => one.step !== null).map((one) => ({ x: one.step, name: one.kind }));
  const series = (values) => named.slice(0, 8).map((name, k) => ({ name: named.length > 1 ? name : null, kind: "line", x: reverse.step, y: values.map((each) => each[k]) }));
  const step = { label: "training step" };
  if (reverse.step.length) {
    retrograd.chart(root.querySelector(".chart-cotangent"), { title: "Cotangent: how much a change of the model at a step still matters for the query. It should neither explode nor vanish towards step 0.", x: step, y: { label: "cotangent norm", log: true }, series: series(reverse.cotangent_norm), lines });
    retrograd.chart(root.querySelector(".chart-size"), { title: "Size of the scores by the step at which data were seen. Decades of drift would make a ranking one of steps.", x: step, y: { label: "mean |score|, nats", log: true }, series: series(reverse.mean_abs_score), lines });
  }
  if (train.step.length) retrograd.chart(root.querySelector(".chart-loss"), { title: "Training loss.", x: step, y: { label: "loss, nats per token" }, series: [{ kind: "line", x: train.step, y: train.loss }] });
  if (reverse.lr_times_sharpness.some((value) => value !== null)) retrograd.chart(root.querySelector(".chart-sharpness"), { title: "Curvature: learning rate times the Hessian's largest eigenvalue.", x: step, y: { label: "lr·λmax" }, series: [{ kind: "line", x: reverse.step, y: reverse.lr_times_sharpness }] });
});
