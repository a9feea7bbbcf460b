retrograd.panel("retraining", (root, data, section) => {
  section.each((query) => {
    const name = data.columns[query], sets = data.sets.filter((one) => one.query === name);
    const kinds = [...new Set(sets.map((one) => /^\d+$/.test(one.set) ? `random, ${retrograd.number(one.fraction)} left out` : "named sets"))];
    const series = kinds.map((kind) => {
      const mine = sets.filter((one) => (/^\d+$/.test(one.set) ? `random, ${retrograd.number(one.fraction)} left out` : "named sets") === kind);
      return { name: kind, kind: "points", x: mine.map((one) => one.predicted), y: mine.map((one) => one.measured), hint: mine.map((one) => `set ${one.set}: predicted ${retrograd.signed(one.predicted)}, measured ${retrograd.signed(one.measured)} nats`) };
    });
    const into = root.querySelector(".chart");
    if (!sets.length) { into.textContent = `“${name}” was not asked when the sets were retrained.`; return; }
    retrograd.chart(into, { title: `Query loss of “${name}” without a set of training data.`, height: 330, keys: true, x: { label: "predicted change, −Σ score (nats)" }, y: { label: "measured change (nats)" }, series, lines: [{}] });
  });
});
