retrograd.panel("answers", (root, data) => {
  const { element } = retrograd, pick = (name) => root.querySelector(`.${name}`);
  data.tasks.forEach((task, k) => pick("task").append(element("option", { value: k }, task.name)));
  for (const name of ["before", "after"]) data.models.forEach((model) => pick(name).append(element("option", {}, model)));
  const cloze = data.tasks.findIndex((task) => task.role === "forget" && task.name.includes("cloze"));
  if (cloze >= 0) pick("task").value = cloze;
  pick("after").value = data.models[1] ?? data.models[0];
  const shown = (question, choice) => choice === null || choice === undefined ? "not finite" : question.choices ? question.choices[choice] : "ABCDEFGHIJ"[choice];
  function fill() {
    const task = data.tasks[Number(pick("task").value)], before = task.chosen[pick("before").value], after = task.chosen[pick("after").value], kind = pick("kind").value;
    if (!before || !after) { pick("list").replaceChildren(); pick("count").textContent = "one of the two was not asked"; return; }
    const rows = task.questions.map((question, k) => ({ question, gold: task.gold[k], a: before[k], b: after[k] })).filter(({ gold, a, b }) => kind === "all" || (kind === "lost" ? a === gold && b !== gold : kind === "won" ? a !== gold && b === gold : a !== b));
    pick("count").textContent = `${rows.length} of ${task.questions.length} questions${task.missing ? `; ${task.missing}` : ""}`;
    const cell = (row, choice) => element("td", { class: choice === row.gold ? "right" : "wrong" }, `${choice === row.gold ? "✓" : "✗"} ${shown(row.question, choice)}`);
    pick("list").replaceChildren(element("tr", {}, ...["question", "right answer", pick("before").value, pick("after").value].map((name) => element("th", { scope: "col" }, name))),
      ...rows.slice(0, 300).map((row) => element("tr", {}, element("td", {}, row.question.question), element("td", {}, shown(row.question, row.gold)), cell(row, row.a), cell(row, row.b))));
  }
  for (const name of ["task", "before", "after", "kind"]) pick(name).addEventListener("change", fill);
  fill();
});
