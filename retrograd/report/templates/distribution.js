retrograd.panel("distribution", (root, data, section) => {
  section.each((query) => {
    for (const level of ["documents", "tokens"]) {
      if (!data[level]) continue;
      const one = data[level][query], middles = one.counts.map((_, k) => (one.edges[k] + one.edges[k + 1]) / 2);
      const colours = middles.map((at) => Math.abs(at) < 1e-12 * one.edges.at(-1) ? "var(--soft)" : `rgb(var(--${at < 0 ? "negative" : "positive"}))`);
      const beyond = one.beyond ? ` ${one.beyond} lie beyond the edges and are counted in the outermost bars.` : "";
      retrograd.chart(root.querySelector(`.histogram-${level}`), { title: `Scores of ${one.count.toLocaleString("en")} ${level}, how many of which size (counts on a log scale).${beyond}`, x: { label: "score, nats · negative lowers the loss", range: [one.edges[0], one.edges.at(-1)] }, y: { label: `${level}`, log: true, range: [0.5, Math.max(1, ...one.counts)] }, series: [{ kind: "bars", x: middles, y: one.counts, edges: one.edges, colours }] });
      retrograd.chart(root.querySelector(`.curve-${level}`), { title: `Scores of ${level} by rank, the lowest first.`, x: { label: "rank" }, y: { label: "score, nats · negative lowers" }, series: [{ kind: "line", x: one.ranks, y: one.curve }] });
    }
  });
});
