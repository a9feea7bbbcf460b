retrograd.panel("setup", (root, data, section) => {
  const { element, signed } = retrograd;
  const list = (title, kind, entries) => element("div", { class: "scroll" }, element("table", {},
    element("caption", {}, title),
    element("tr", {}, element("th", { scope: "col", class: "n" }, "document"), element("th", { scope: "col", class: "n" }, "score"), element("th", { scope: "col" }, "text")),
    ...entries.map((one) => element("tr", {}, element("td", { class: "n" }, String(one.id)), element("td", { class: `n ${one.score < 0 ? "negative" : "positive"}` }, signed(one.score)), element("td", {}, one.text.slice(0, 160))))));
  section.each((query) => {
    const ends = data.ends[query], name = data.columns.length > 1 ? ` for “${data.columns[query]}”` : "";
    root.querySelector(".ends").replaceChildren(
      list(`The ten lowest${name}: negative ones lower the query loss (proponents)`, "negative", ends.lowest),
      list(`The ten highest${name}: positive ones raise the query loss (detractors)`, "positive", ends.highest));
  });
});
