retrograd.panel("tamper", (root, data) => {
  const pick = root.querySelector(".configuration"), shown = root.querySelector(".model"), why = root.querySelector(".why");
  for (const [name, readable] of Object.entries(data.configurations)) pick.append(retrograd.element("option", { value: name }, readable));
  for (const name of new Set(data.curves.filter((one) => one.role === "model").map((one) => one.model))) shown.append(retrograd.element("option", {}, name));
  function fill() {
    const mine = data.curves.filter((one) => one.configuration === pick.value && (one.role !== "model" || !shown.value || one.model === shown.value)), invalid = data.invalid[pick.value];
    why.hidden = !invalid;
    why.textContent = invalid ? `No valid attack: ${invalid}. What it leaves is no resistance.` : "";
    const strong = mine.some((one) => one.points.some((point) => point.strength !== null));
    const at = (point) => strong ? point.strength : point.tokens;
    for (const side of ["forget", "retain"]) {
      const series = mine.map((one, k) => ({ name: one.model, kind: "line", dash: one.role === "model" ? null : "5 3", colour: `var(--s${k % 8})`, x: one.points.map(at), y: one.points.map((point) => point[side]), low: side === "forget" ? one.points.map((point) => point.forget_interval?.[0] ?? null) : undefined, high: side === "forget" ? one.points.map((point) => point.forget_interval?.[1] ?? null) : undefined }));
      retrograd.chart(root.querySelector(`.${side}`), { title: side === "forget" ? "Right answers about what was to go. Dashed: controls." : "Right answers about what was to stay.", keys: true, x: { label: strong ? "strength of the attack" : "tokens that the attack trained on" }, y: { label: `${side}: share right`, range: [0, 1] }, series });
    }
  }
  for (const one of [pick, shown]) one.addEventListener("change", fill);
  fill();
});
