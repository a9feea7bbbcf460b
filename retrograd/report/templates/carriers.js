retrograd.panel("carriers", (root, data, section) => {
  const { element, signed } = retrograd;
  const titles = ["Negative: training on these lowers the query loss", "Positive: training on these raises the query loss"];
  const shown = (text) => element("code", {}, text.replace(/\n/g, "⏎").replace(/^ /, "␣") || "∅");
  const build = (title, heads, rows) => element("div", { class: "scroll" }, element("table", {}, element("caption", {}, title),
    element("tr", {}, ...heads.map((head, k) => element("th", { scope: "col", class: k ? "n" : null }, head))), ...rows));
  section.each((query) => {
    const one = data.lists[query];
    if (!one) return;
    root.querySelector(".gini").textContent = one.gini === null ? "" : `Inequality of |score| over tokens (Gini): ${one.gini.toFixed(2)}; 0 all alike, 1 one token has all.`;
    root.querySelector(".types").replaceChildren(...one.types.map((types, side) => build(titles[side], ["token", "times", "Σ score", "mean"], types.slice(0, 20).map(([text, count, total, mean]) => element("tr", {}, element("td", {}, shown(text)), element("td", { class: "n" }, String(count)), element("td", { class: `n ${total < 0 ? "negative" : "positive"}` }, signed(total)), element("td", { class: "n" }, signed(mean)))))));
    root.querySelector(".single").replaceChildren(...one.single.map((tokens, side) => build(titles[side], ["token", "document", "position", "score"], tokens.map(([text, document, position, value]) => element("tr", {}, element("td", {}, shown(text)), element("td", { class: "n" }, String(document)), element("td", { class: "n" }, String(position)), element("td", { class: `n ${value < 0 ? "negative" : "positive"}` }, signed(value)))))));
  });
});
