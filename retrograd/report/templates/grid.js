retrograd.panel("grid", (root, data) => {
  const pick = root.querySelector(".axis"), { element, number } = retrograd, names = Object.keys(data.axes);
  names.forEach((name) => pick.append(element("option", {}, name)));
  const cells = data.cells.filter((one) => one.lds !== null);
  const told = (one, but) => names.filter((name) => name !== but).map((name) => `${name.split(".").pop()} ${one.place[name]}`).join(", ");
  const hint = (one) => `${told(one)}: LDS ${number(one.lds)}, metasmoothness ${number(one.smoothness)}`;
  const interval = (ones) => ({ low: ones.map((one) => one.low), high: ones.map((one) => one.high) });
  function fill() {
    const axis = pick.value, values = data.axes[axis], numeric = values.every((value) => typeof value === "number");
    const at = (one) => numeric ? one.place[axis] : values.indexOf(one.place[axis]);
    const log = numeric && values.every((value) => value > 0) && Math.max(...values) >= 4 * Math.min(...values);
    const series = [...new Set(cells.map((one) => told(one, axis)))].map((name) => {
      const mine = cells.filter((one) => told(one, axis) === name).sort((a, b) => at(a) - at(b));
      return { name, kind: "line", x: mine.map(at), y: mine.map((one) => one.lds), ...interval(mine), hint: mine.map(hint) };
    });
    if (series.length) retrograd.chart(root.querySelector(".lds"), { title: `LDS along ${axis}, a line for each combination of the other settings.`, keys: true, x: { label: axis, log, names: numeric ? undefined : values.map(String), range: numeric ? undefined : [-0.3, values.length - 0.7] }, y: { label: "LDS" }, series });
  }
  const measured = cells.filter((one) => one.smoothness !== null);
  if (measured.length) retrograd.chart(root.querySelector(".both"), { title: "Does metasmoothness tell which recipes' scores predict retraining?", x: { label: "metasmoothness" }, y: { label: "LDS" }, series: [{ name: "recipes", kind: "points", x: measured.map((one) => one.smoothness), y: measured.map((one) => one.lds), ...interval(measured), hint: measured.map(hint) }] });
  pick.addEventListener("change", fill);
  fill();
});
