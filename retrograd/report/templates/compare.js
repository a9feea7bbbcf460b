retrograd.panel("compare", (root, data) => {
  const pick = root.querySelector(".shown"), sign = root.querySelector(".sign"), rows = [...root.querySelectorAll(".cells tr")].slice(1), { element, percent } = retrograd;
  const points = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(0)}`, share = (value) => (100 * value).toFixed(1);
  const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  const answers = data.questions.length ? behind(root, data, () => pick.value === "latent") : null;
  function fill() {
    const latent = pick.value === "latent", say = latent ? points : share;
    sign.hidden = !latent;
    data.groups.forEach((group, k) => group.cells.forEach((cell, j) => {
      const box = rows[k].querySelectorAll("td")[j + 1], one = cell && cell[pick.value];
      const told = [one ? say(one[0]) : cell && cell.lost && !latent ? "ability lost" : "–", ...(one ? [element("span", { class: "soft" }, `${say(one[1])} to ${say(one[2])}`)] : [])];
      box.replaceChildren(...(answers && cell && cell.runs.length ? [answers.button(k, j, told)] : told));
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
  pick.addEventListener("change", () => { answers?.close(); fill(); });
  fill();

  // ---- the answers behind a cell ----
  function behind(root, data, latent) {
    const place = root.querySelector(".behind"), $ = (name) => place.querySelector(`.${name}`), STEP = 100;
    const starts = [], total = data.questions.length;
    data.tasks.reduce((at, task) => { starts.push(at); return at + task.count; }, 0);
    const side = data.tasks.flatMap((task) => Array(task.count).fill(task.side));
    const halves = data.questions.some((one) => one.first === 1);
    let packed = null, cell = null, attack = null, opener = null, many = STEP;
    const parts = {  // which questions, by the words of the switch
      number: (one, k) => side[k] === "forget" && (latent() ? hidden(one) : one.told === 1),
      forget: (one, k) => side[k] === "forget", first: (one) => one.first === 1, second: (one) => one.first === 0,
      retain: (one, k) => side[k] === "retain",
    };
    const hidden = (one) => attack.unseen === "all" || (attack.unseen !== null && (attack.unseen === "first") === (one.first === 1));
    const options = (select, pairs, value) => { select.replaceChildren(...pairs.map(([key, text]) => element("option", { value: key }, text))); if (value !== undefined) select.value = value; };
    const say = (question, chosen) => chosen === 254 ? "not finite" : chosen === 255 ? "not asked" : question.choices ? question.choices[chosen] : "ABCDEFGHIJ"[chosen];
    function answer(question, k, row) {
      const chosen = packed.chosen[row * total + k], level = packed.probability[row * total + k], right = chosen === question.right;
      return element("td", { class: right ? "right" : "wrong" }, `${right ? "✓" : "✗"} ${say(question, chosen)}`, element("span", { class: "soft" }, level === 255 ? "" : ` ${percent(level / 250, 0)}`));
    }
    function moments() {
      const run = cell.runs[Number($("run").value)], there = ["after", "last"].filter((moment) => run[moment]);
      options($("moment"), there.map((moment) => [moment, `${run[moment].at}, ${moment === "after" ? "the worst for the model" : "the last"}`]), there.includes(latent() ? "last" : "after") ? (latent() ? "last" : "after") : there[0]);
    }
    function fill() {
      const run = cell.runs[Number($("run").value)], then = run[$("moment").value], kind = $("kind").value, part = parts[$("part").value];
      if (!run.before || !then) { $("list").replaceChildren(); $("more").hidden = true; $("count").textContent = "these answers are not there any more"; return; }
      const at = (row, k) => packed.chosen[row * total + k], mine = data.questions.map((one, k) => [one, k]).filter(([one, k]) => part(one, k) && at(then.row, k) !== 255);
      const kinds = { all: () => true, won: (right, now) => !right && now, lost: (right, now) => right && !now, wrong: (right, now) => !now };
      const shown = mine.filter(([one, k]) => kind === "changed" ? at(run.before.row, k) !== at(then.row, k) : kinds[kind](at(run.before.row, k) === one.right, at(then.row, k) === one.right));
      const rights = (row) => mine.filter(([one, k]) => at(row, k) === one.right).length, told = (row) => mine.length ? `${rights(row)} (${percent(rights(row) / mine.length)})` : "0";
      const why = data.tasks.filter((task) => task.why).map((task) => `${task.name}: ${task.why}`).join("; ");
      $("count").textContent = `Of ${count(mine.length, "question")} ${told(run.before.row)} are right before the attack, ${told(then.row)} at ${then.at}; ${shown.length} listed.${why ? ` ${why}.` : ""}`;
      const half = (one) => one.first === undefined || !halves ? "" : one.first ? ", half A" : ", half B";
      $("list").replaceChildren(element("tr", {}, ...["question", "side", "right answer", "before", `at ${then.at}`].map((text) => element("th", { scope: "col" }, text))),
        ...shown.slice(0, many).map(([one, k]) => element("tr", {}, element("td", {}, one.question), element("td", {}, `${side[k]}${half(one)}`), element("td", {}, say(one, one.right)), answer(one, k, run.before.row), answer(one, k, then.row))));
      $("more").hidden = shown.length <= many;
    }
    function again() { many = STEP; fill(); }
    async function open(k, j, button) {
      if (button === opener && !place.hidden) { close(); return; }
      packed ??= await retrograd.arrays(root);
      close();
      [cell, attack, opener] = [data.groups[k].cells[j], data.attacks[j], button];
      button.setAttribute("aria-expanded", "true");
      $("controls h4").textContent = `${data.groups[k].name} under ${attack.name}: question by question`;
      options($("run"), cell.runs.map((run, at) => [at, `${run.model}, seed ${run.seed} of the attack`]));
      const number = latent() ? "what the attack never shows" : "the half that the cell is about";
      options($("part"), [...(data.questions.some(parts.number) ? [["number", number]] : []), ["forget", "forget"], ...(halves ? [["first", "forget, half A"], ["second", "forget, half B"]] : []), ["retain", "retain"]]);
      moments();
      place.hidden = false;
      again();
      place.focus();
      place.scrollIntoView({ block: "nearest" });
    }
    function close(focus = false) {
      if (place.hidden) return;
      place.hidden = true;
      opener.setAttribute("aria-expanded", "false");
      if (focus) opener.focus();
    }
    $("run").addEventListener("change", () => { moments(); again(); });
    for (const name of ["moment", "part", "kind"]) $(name).addEventListener("change", again);
    $("more").addEventListener("click", () => { many += STEP; fill(); });
    $("close").addEventListener("click", () => close(true));
    place.addEventListener("keydown", (event) => { if (event.key === "Escape") close(true); });
    const button = (k, j, told) => element("button", { type: "button", class: "open", "aria-expanded": "false", on: { click: (event) => open(k, j, event.currentTarget) } }, ...told);
    return { button, close };
  }
});
