retrograd.panel("way", (root, data) => {
  const which = root.querySelector(".which"), groups = { all: () => true };
  for (const word of ["forget", "retain", "letter", "cloze"]) if (data.tasks.some((task) => task.name.includes(word))) groups[word] = (task) => task.name.includes(word) || task.unit === "nats";
  Object.keys(groups).forEach((name) => which.append(retrograd.element("option", {}, name)));
  if (groups.cloze) which.value = "cloze";
  function fill() {
    const mine = data.tasks.filter(groups[which.value]);
    for (const unit of ["accuracy", "nats"]) {
      const series = mine.filter((task) => task.unit === unit).slice(0, 8).map((task) => ({ name: task.name, kind: "line", x: data.steps, y: task.values, low: task.intervals.map((one) => one?.[0] ?? null), high: task.intervals.map((one) => one?.[1] ?? null) }));
      const into = root.querySelector(`.${unit}`);
      if (!series.length) { into.replaceChildren(); continue; }
      const lines = data.best ? [{ x: data.best.step, name: "best" }] : [];
      retrograd.chart(into, { title: unit === "accuracy" ? "Share of right answers by step." : "Mean loss on texts by step, nats per token.", keys: true, x: { label: "training step" }, y: unit === "accuracy" ? { label: "accuracy", range: [0, 1] } : { label: "nats per token" }, series, lines });
    }
  }
  which.addEventListener("change", fill);
  fill();
});
