retrograd.panel("harden", (root, data) => {
  const steps = data.iterations.map((one) => one.iteration), of = (name) => data.iterations.map((one) => one[name] ?? null);
  const line = (name, y, dash) => ({ name, kind: "line", x: steps, y, dash });
  const draw = (place, title, label, series, more = {}) => retrograd.chart(root.querySelector(place), { title, keys: true, x: { label: "iteration" }, y: { label }, series, ...more });
  draw(".objective", "The objective under the attacks that are learnt against, and under held-out ones.", "nats", [line("learnt against", of("objective")), line("held out", of("held_out"), "5 3")], { lines: [{ x: data.best, name: "best" }] });
  if (steps.length > 1) draw(".change", "Change of the objective: what the step before predicted, and what was measured.", "nats", [line("measured", of("measured_change")), line("predicted", of("expected_change"), "5 3")]);
  draw(".losses", "Forget loss after attack: the mean of those learnt against, and each held-out one (dashed); retain KL before.", "nats", [line("learnt against", data.forget), ...data.held.map((one, k) => line(`held out ${k + 1}`, one, "5 3")), line("retain KL", of("retain_kl"))]);
  if (of("metasmoothness").some((value) => value !== null)) draw(".smooth", "Metasmoothness of the chain along a random direction: 1 is smooth.", "metasmoothness", [line("metasmoothness", of("metasmoothness"))]);
});
