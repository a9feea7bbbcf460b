retrograd.panel("questions", (root, data) => {
  const { element, number, percent } = retrograd, body = root.querySelector(".body");
  for (const query of data.queries) {
    const list = element("div"), wrong = element("input", { type: "checkbox", on: { change: () => fill() } });
    const entry = (one, k) => {
      const options = (one.choices ?? one.probabilities.map((_, c) => "ABCDEFGHIJ"[c])).map((choice, c) => element("li", { class: c === one.right ? "right" : c === one.chosen ? "wrong" : null },
        `${c === one.right ? "✓ " : c === one.chosen ? "✗ " : ""}${choice}`, element("span", { class: "soft" }, ` ${one.probabilities[c] === null ? "not finite" : percent(one.probabilities[c])}${c === one.chosen ? ", the model's answer" : ""}`)));
      return element("details", { class: "document" }, element("summary", {}, element("span", {}, `${one.chosen === one.right ? "✓" : "✗"} ${k + 1}`), element("span", { class: "number" }, `${number(one.loss)} nats`), element("span", {}, one.question)), element("ol", { type: "A" }, ...options), one.subject ? element("p", { class: "soft" }, one.subject) : null);
    };
    const fill = () => {
      const shown = query.entries.map((one, k) => [one, k]).filter(([one]) => !wrong.checked || one.chosen !== one.right);
      list.replaceChildren(...shown.slice(0, 200).map(([one, k]) => entry(one, k)), ...(shown.length > 200 ? [element("p", { class: "soft" }, `the first 200 of ${shown.length}`)] : []));
    };
    const box = element("details", { open: data.queries.length === 1 && query.entries.length <= 20 },
      element("summary", {}, `“${query.name}”: ${query.questions} questions by ${query.form}, ${percent(query.accuracy)} right; ${query.values_nats.length === 1 ? `query loss ${number(query.values_nats[0], 4)} nats (${query.loss})` : "a score for each"}`),
      query.missing ? element("p", { class: "note" }, query.missing) : null,
      element("label", { class: "controls" }, wrong, " wrong answers only"), list);
    fill();
    body.append(box);
  }
});
