retrograd.panel("compare", (root, data) => {
  const pick = root.querySelector(".shown"), sign = root.querySelector(".sign"), rows = [...root.querySelectorAll(".cells tr")].slice(1), { element, percent } = retrograd;
  const points = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(0)}`, share = (value) => (100 * value).toFixed(1);
  const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  function fill() {
    const latent = pick.value === "latent", say = latent ? points : share;
    sign.hidden = !latent;
    data.groups.forEach((group, k) => group.cells.forEach((cell, j) => {
      const box = rows[k].querySelectorAll("td")[j + 1], one = cell && cell[pick.value];
      box.replaceChildren(one ? say(one[0]) : cell && cell.lost && !latent ? "ability lost" : "–", ...(one ? [element("span", { class: "soft" }, `${say(one[1])} to ${say(one[2])}`)] : []));
      box.title = one ? `${count(cell.models, "model")}, ${count(cell.seeds.length, "seed")} of the attack` : "";
      box.style.background = one ? `rgba(var(--${latent && one[0] < 0 ? "negative" : "positive"}), ${Math.min(1, Math.abs(one[0])) * 0.45})` : "";
    }));
  }
  const colour = (k) => data.groups[k].role === "model" ? `var(--s${k % 8})` : "var(--soft)", name = (k) => `${k + 1} ${data.groups[k].name}`;
  const series = data.groups.flatMap((group, k) => {
    const whens = ["before", "after"].filter((when) => group[when]), found = whens.map((when) => group[when]);
    const path = found.length === 2 ? [{ kind: "line", dash: "2 3", size: 0, colour: colour(k), x: found.map((one) => one.forget[0]), y: found.map((one) => one.retain[0]), hint: ["", ""] }] : [];
    return [...path, ...found.map((one, j) => ({
      name: j ? null : name(k), kind: "points", size: 5, colour: colour(k), labels: [String(k + 1)], x: [one.forget[0]], y: [one.retain[0]], left: [one.forget[1]], right: [one.forget[2]], hollow: [whens[j] === "before"],
      hint: [`${name(k)} ${whens[j]}: ${percent(one.forget[0])} to go, ${percent(one.retain[0])} to stay`],
    }))];
  });
  if (series.length) retrograd.chart(root.querySelector(".fronts"), { title: "Before attack (hollow) and after the worst one (filled), by the table's numbers. The best place is the upper left. Grey: controls.", keys: true, height: 380, x: { label: "forget: share of right answers", range: [0, 1] }, y: { label: "retain: share right", range: [0, 1] }, series });
  const shown = [...data.groups.keys()].filter((k) => data.groups[k].latent);
  if (shown.length) retrograd.chart(root.querySelector(".latents"), { title: "Latent recovery of each group, by the table's numbers: above 0, hidden knowledge came back.", height: 380, x: { label: "group", range: [-0.5, shown.length - 0.5], names: shown.map((k) => String(k + 1)) }, y: { label: "rise beyond the model that never knew" }, series: shown.map((k, at) => ({ kind: "points", size: 5, colour: colour(k), x: [at], y: [data.groups[k].latent[0]], low: [data.groups[k].latent[1]], high: [data.groups[k].latent[2]], hint: [`${name(k)}: ${points(data.groups[k].latent[0])} points`] })) });
  pick.addEventListener("change", fill);
  fill();
});
