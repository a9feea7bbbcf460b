retrograd.panel("experiment", (root, data) => {
  const pick = root.querySelector(".match"), { element, percent } = retrograd;
  [...new Set(data.arms.map((arm) => arm.match))].forEach((match) => pick.append(element("option", { value: match }, { utility: "at equal utility", forgetting: "at equal forgetting", none: "as given" }[match] ?? match)));
  function fill() {
    const arms = data.arms.filter((arm) => arm.match === pick.value && arm.forget && arm.retain);
    const series = arms.map((arm, k) => ({ name: `${k + 1} ${arm.method}, ${arm.weighting}`, kind: "points", size: 4.5, colour: `var(--s${k % 8})`, labels: [String(k + 1)], x: [arm.forget.value], y: [arm.retain.value], left: [arm.forget.low], right: [arm.forget.high], low: [arm.retain.low], high: [arm.retain.high], hollow: [Boolean(arm.verdicts.destroyed)], hint: [`${arm.method}, ${arm.weighting}: ${percent(arm.forget.value)} to go, ${percent(arm.retain.value)} to stay, ${arm.seeds.length} seeds`] }));
    for (const model of data.models) if (model.forget !== undefined && model.retain !== undefined) series.push({ name: model.name, kind: "points", size: 6, colour: "var(--ink)", x: [model.forget], y: [model.retain], labels: [model.name] });
    if (series.length) retrograd.chart(root.querySelector(".chart"), { title: "What each arm knows of what is to go, and of what is to stay. Hollow: a seed is destroyed.", height: 380, keys: true, x: { label: "forget: share of right answers" }, y: { label: "retain: share right" }, series });
  }
  pick.addEventListener("change", fill);
  fill();
});
