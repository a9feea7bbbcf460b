retrograd.panel("rows", async (root, data, section) => {
  const { element, signed, number } = retrograd, page = 20;
  const table = data.table ? await retrograd.table(data.table) : null;
  const search = root.querySelector("input"), sign = root.querySelector(".sign"), sort = root.querySelector(".sort");
  const list = root.querySelector(".list"), more = root.querySelector(".more"), count = root.querySelector(".count");
  const text = (k) => data.texts[k] ?? (table ? table.text(data.ids[k]) : "");
  let order = [], shown = 0, query = 0;
  const keys = {
    lowest: (k) => data.scores[query][k], highest: (k) => -data.scores[query][k], size: (k) => -Math.abs(data.scores[query][k]),
    share: (k) => data.scores[query][k] / Math.max(1, data.targets[k]), id: (k) => data.ids[k], length: (k) => -data.targets[k],
  };
  function excerpt(k, word) {
    const whole = text(k).replace(/\s+/g, " "), at = word ? whole.toLowerCase().indexOf(word) : -1;
    if (at < 0) return [whole.slice(0, 180)];
    const from = Math.max(0, at - 60);
    return [(from ? "…" : "") + whole.slice(from, at), element("mark", {}, whole.slice(at, at + word.length)), whole.slice(at + word.length, at + 160)];
  }
  function entry(k, limit) {
    const value = data.scores[query][k], word = search.value.trim().toLowerCase();
    const made = element("details", { class: "document", "data-document": data.ids[k] },
      element("summary", {}, element("span", { class: "number" }, `#${data.ids[k]}`), element("span", { class: `number ${value < 0 ? "negative" : "positive"}`, title: retrograd.meaning(value) }, signed(value, 4)), element("span", { class: "excerpt" }, ...excerpt(k, word))));
    made.addEventListener("toggle", () => {
      if (!made.open || made.children.length > 1) return;
      const column = data.offset + query;
      const body = data.texts[k] || !table || column >= table.labels.length ? element("div", { class: "heat" }, text(k)) : table.heat(column, data.ids[k], limit);
      made.append(body, element("p", { class: "soft" }, `${data.targets[k]} targets, trained at step ${data.steps[k]}. ${data.columns.length > 1 ? data.columns.map((name, c) => `${name} ${signed(data.scores[c][k])}`).slice(0, 8).join(", ") : ""} `, table && document.querySelector("[data-panel=map]") ? element("button", { type: "button", on: { click: () => document.dispatchEvent(new CustomEvent("retrograd:document", { detail: { table: data.table, document: data.ids[k] } })) } }, "on the map") : null));
    });
    return made;
  }
  let limit = 0;
  function grow(open = 0) {
    const next = order.slice(shown, shown + page);
    list.append(...next.map((k) => entry(k, limit)));
    [...list.children].slice(0, open).forEach((one) => { one.open = true; });
    shown += next.length;
    more.hidden = shown >= order.length;
  }
  function refresh() {
    const word = search.value.trim().toLowerCase(), scores = data.scores[query];
    order = data.ids.map((_, k) => k).filter((k) => (sign.value === "all" || (sign.value === "negative" ? scores[k] < 0 : scores[k] > 0)) && (!word || text(k).toLowerCase().includes(word)));
    const key = keys[sort.value];
    order.sort((a, b) => key(a) - key(b) || a - b);
    const column = data.offset + query;
    limit = table && column < table.labels.length ? order.slice(0, page).reduce((most, k) => Math.max(most, table.largestIn(column, data.ids[k])), 0) : 0;
    const negative = order.filter((k) => scores[k] < 0).length, total = order.reduce((sum, k) => sum + scores[k], 0);
    count.textContent = `${order.length.toLocaleString("en")} of ${data.ids.length.toLocaleString("en")} documents, ${negative.toLocaleString("en")} of them negative; their scores sum to ${signed(total)} nats${data.of > data.ids.length ? `. Of ${data.of.toLocaleString("en")} documents, those of the largest scores for the first query are listed` : ""}`;
    root.querySelector(".legend").replaceChildren(...(limit ? [retrograd.scaleOf(limit)] : []));
    list.replaceChildren(); shown = 0;
    grow(3);
  }
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 120); });
  sign.addEventListener("change", refresh); sort.addEventListener("change", refresh);
  more.addEventListener("click", () => grow());
  section.each((chosen) => { query = chosen; refresh(); });
});
