retrograd.panel("compare", (root, data) => {
  const pick = root.querySelector(".shown"), rows = [...root.querySelectorAll(".heat tr")].slice(1), { percent } = retrograd;
  const points = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(0)}`;
  function fill() {
    const latent = pick.value === "latent";
    data.groups.forEach((group, k) => group.cells.forEach((cell, j) => {
      const box = rows[k].querySelectorAll("td")[j + 1], one = cell && cell[pick.value];
      box.textContent = one ? (latent ? points(one[0]) : (100 * one[0]).toFixed(1)) : cell && cell.lost && !latent ? "ability lost" : "–";
      box.title = one ? `${(100 * one[1]).toFixed(1)} to ${(100 * one[2]).toFixed(1)}; ${cell.models} models, ${cell.seeds.length} seeds of the attack` : "";
      box.style.background = one ? `rgba(var(--${latent && one[0] < 0 ? "negative" : "positive"}), ${Math.min(1, Math.abs(one[0])) * 0.6})` : "";
    }));
  }
  const series = data.groups.flatMap((group, k) => [["before", true], ["after", false]].filter(([when]) => group[when]).map(([when, hollow]) => ({
    name: hollow ? null : group.name, kind: "points", size: 5, colour: group.role === "model" ? `var(--s${k % 8})` : "var(--soft)", x: [group[when].forget[0]], y: [group[when].retain[0]], left: [group[when].forget[1]], right: [group[when].forget[2]], hollow: [hollow],
    hint: [`${group.name} ${when}: ${percent(group[when].forget[0])} to go, ${percent(group[when].retain[0])} to stay`],
  })));
  if (series.length) retrograd.chart(root.querySelector(".fronts"), { title: "Before attack (hollow) and after the worst one.", keys: true, height: 380, x: { label: "forget: share of right answers", range: [0, 1] }, y: { label: "retain: share right", range: [0, 1] }, series });
  const shown = data.groups.filter((group) => group.latent);
  if (shown.length) retrograd.chart(root.querySelector(".latents"), { title: "Latent recovery: what came back and was never shown.", keys: true, height: 380, x: { label: "group, in the table's order" }, y: { label: "rise beyond the model that never knew" }, series: shown.map((group, k) => ({ name: group.name, kind: "points", size: 5, colour: `var(--s${k % 8})`, x: [k + 1], y: [group.latent[0]], low: [group.latent[1]], high: [group.latent[2]], hint: [`${group.name}: ${points(group.latent[0])} points`] })) });
  pick.addEventListener("change", fill);
  fill();
});
