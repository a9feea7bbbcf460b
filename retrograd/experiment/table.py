"""The results as one table, results.parquet and results.md, with the claims and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.evaluate.answers import write_table
from retrograd.evaluate.crossed import crossed, crossed_position
from retrograd.evaluate.intervals import Estimate
from retrograd.evaluate.metrics import Given, by_name, estimated
from retrograd.evaluate.verdict import counted
from retrograd.experiment.claims import Claim, Comparison, compared, decided
from retrograd.experiment.plan import Plan, Results
from retrograd.experiment.results import ArmResult, Measured, collected, read_model, sides
from retrograd.runs.files import write_atomic
from retrograd.settings.experiment import ExperimentSpec

__all__ = ["Line", "lines", "write_results"]

DROP = 0.03  # of retain accuracy, for an arm to be marked as reaching the model that never knew
_QUANTITIES = ("forget", "retain", "position", "kl")


class Line(NamedTuple):
    """What the table says of an arm, over its seeds; None where it is missing."""

    result: ArmResult
    forget: Estimate | None
    retain: Estimate | None
    position: Estimate | None
    kl: Estimate | None
    drop: float | None
    perplexity: dict[str, float]
    metrics: dict[str, Estimate | str]
    claim: Claim | None
    comparisons: list[Comparison]

    @property
    def reaches(self) -> bool:
        """Whether the position's interval reaches the model that never knew, no model is destroyed, and the retain drop
        is at most DROP."""
        if "destroyed" in self.result.verdicts.values():
            return False
        return self.position is not None and self.drop is not None and self.position.low <= 0 and self.drop <= DROP


def write_results(
    spec: ExperimentSpec, plan: Plan, results: Results, out: Path, title: str, attacked: Sequence[str] = ()
) -> str:
    """Write results.parquet and results.md, of what is there; returns the Markdown.

    Args:
        attacked: What attacks found, as lines of Markdown.
    """
    base, never = (read_model(spec, results, name) for name in (plan.base, plan.never))
    arm_lines = lines(spec, collected(spec, plan, results), base, never)
    markdown = [
        *_markdown(spec, plan, results, arm_lines, base, never, title),
        *attacked,
        *_missing(plan, results, arm_lines, base, never),
    ]
    text = "\n".join(markdown) + "\n"
    write_atomic(out / "results.md", lambda temporary: temporary.write_text(text, encoding="utf8"))
    rows = [row for line in arm_lines for row in _rows(spec, line)]
    rows += [row for name, model in (("base", base), ("never", never)) if model for row in _model_rows(name, model)]
    columns = {name: [row.get(name) for row in rows] for name in _COLUMNS}
    write_table(out / "results.parquet", columns, _types(), {"kind": "Experiment", "title": title})
    return text


def lines(spec: ExperimentSpec, arms: list[ArmResult], base: Measured | None, never: Measured | None) -> list[Line]:
    """The table, arm by arm."""
    table = []
    for arm in arms:
        key, seeds = arm.plan.arm, sorted(arm.seeds)
        others = [other for other in arms if other.plan.arm[:2] == key[:2] and other is not arm]
        forget, retain = (arm.matrix(sides(spec.report.tasks, role), seeds) for role in ("forget", "retain"))
        knows = base.side(sides(spec.report.tasks, "forget")) if base else None
        floor = never.side(sides(spec.report.tasks, "forget")) if never else None
        kept = base.side(sides(spec.report.tasks, "retain")) if base else None
        kl = arm.divergence(seeds)
        between = forget is not None and knows is not None and floor is not None
        weighting = spec.weightings[key.weighting]
        by_scores = bool(weighting.scores) and weighting.control is None
        table.append(Line(
            arm,
            None if forget is None else crossed(forget),
            None if retain is None else crossed(retain),
            crossed_position(forget, knows, floor) if between else None,  # type: ignore[arg-type]
            None if kl is None else crossed(*kl),
            None if retain is None or kept is None else float(kept.mean() - retain.mean()),
            _perplexities(arm),
            _metrics(spec, [arm.seeds[seed] for seed in seeds], never),
            decided(spec, arm, others),
            [compared(spec, arm, other) for other in others] if by_scores and arm.seeds else [],
        ))  # fmt: skip
    return table


def _metrics(spec: ExperimentSpec, models: list[Measured], never: Measured | None) -> dict[str, Estimate | str]:
    """The columns asked for, over models of one arm; why, where one is missing."""
    metrics: dict[str, Estimate | str] = {}
    floor = None if never is None else never.evaluated.results
    for column in spec.columns:
        name, _, task = column.partition(":")
        each = [
            by_name(name).sampled(Given(task, spec.report.tasks, model.evaluated.results, floor)) for model in models
        ]
        reasons = [sampled for sampled in each if isinstance(sampled, str)]
        there = [sampled for sampled in each if not isinstance(sampled, str)]
        metrics[column] = reasons[0] if reasons else estimated(there) if there else "no model is measured yet"
    return metrics


def _perplexities(arm: ArmResult) -> dict[str, float]:
    each = [measured.perplexity for measured in arm.seeds.values()]
    return {name: float(np.mean([perplexity[name] for perplexity in each])) for name in (each[0] if each else {})
            if all(name in perplexity for perplexity in each)}  # fmt: skip


def _markdown(
    spec: ExperimentSpec, plan: Plan, results: Results, arm_lines: list[Line], base: Measured | None,
    never: Measured | None, title: str,
) -> Iterator[str]:  # fmt: skip
    yield f"# {title}"
    yield ""
    yield f"Base `{spec.base}`{f', never knew `{spec.never}`' if spec.never else ''}; seeds {list(spec.seeds)}."
    yield (
        "Accuracies in % with intervals that draw seeds and questions again; position: 0 the model that never knew, 1 "
        "the base; KL from the base in nats per token of held-out rows. * reaches the model that never knew at a "
        f"retain drop of at most {100 * DROP:g} points, undestroyed."
    )
    for match in spec.match if arm_lines else ():
        own = [line for line in arm_lines if line.result.plan.arm.match == match]
        yield from ("", f"## {_matched(spec, match)}", "")
        yield from _main(spec, own, base, never)
        yield from _claims(own)
        yield from _differences(own)
    for name, tasks in plan.analyses.items():
        yield from ("", f"## Analysis: {name}", "")
        for outcome in filter(None, map(results.result, tasks)):
            yield from _analysis(outcome)


def _missing(
    plan: Plan, results: Results, arm_lines: list[Line], base: Measured | None, never: Measured | None
) -> Iterator[str]:
    gone = [f"* `{name}`: {reason}" for name, reason in plan.lost(results).items()]
    gone += _unmeasured(arm_lines, base, never)
    metrics = [pair for line in arm_lines for pair in line.metrics.items()]
    lost = Counter((column, reason) for column, reason in metrics if isinstance(reason, str))
    gone += [f"* column `{column}` of {count} arms: {reason}" for (column, reason), count in lost.items()]
    if gone:
        yield from ("", "## Missing", "", *gone)


def _unmeasured(arm_lines: list[Line], base: Measured | None, never: Measured | None) -> Iterator[str]:
    """What could not be measured, a line for each task and reason with the number of models."""
    models = [*(line.result.seeds[seed] for line in arm_lines for seed in line.result.seeds), base, never]
    reasons = Counter(pair for model in models if model is not None for pair in model.missing.items())
    for (task, reason), count in reasons.items():
        yield f"* `{task}` of {count} models: {reason}"


def _matched(spec: ExperimentSpec, match: str) -> str:
    if match == "none":
        return "Settings as given"
    tunes = {method.tune for method in spec.methods.values()}
    bounds = {(tune.measure, tune.budget) if match == "utility" else ("accuracy", tune.target) for tune in tunes}
    if match == "utility":
        what = " or ".join(f"retain {'KL' if how == 'kl' else 'accuracy drop'} ≤ {bound:g}" for how, bound in bounds)
        return f"At equal utility: {what} on the tuning's split"
    return f"At equal forgetting: forget accuracy ≤ {' or '.join(f'{b:g}' for _, b in bounds)} on the tuning's split"


def _main(spec: ExperimentSpec, own: list[Line], base: Measured | None, never: Measured | None) -> Iterator[str]:
    more = "".join(f" {column.replace(':', ' ')} |" for column in spec.columns)
    yield f"| method | weighting | setting | seeds | forget | position | retain | KL | perplexity |{more} verdict | s |"
    yield f"|---|---|---|---|---|---|---|---|---|{'---|' * len(spec.columns)}---|---|"
    for name, model in (("base", base), ("never knew", never)):
        if model is not None:
            yield _model_row(spec, name, model, never)
    for line in own:
        arm = line.result.plan.arm
        setting = spec.methods[arm.method].tune.setting
        chosen = line.result.plan.chosen
        tuned = (
            ""
            if chosen is None
            else f"{setting} {chosen.setting:.3g}{'' if chosen.close else ' (budget not met closely)'}"
        )
        count = f"{len(line.result.seeds)}/{len(spec.seeds)}"
        seconds = list(line.result.seconds.values())
        cells = (
            arm.method, arm.weighting + (" *" if line.reaches else ""), tuned, count, _cell(line.forget, 100),
            _position(line), _cell(line.retain, 100), _cell(line.kl, 1, 4),
            ", ".join(f"{value:.3g}" for value in line.perplexity.values()),
            *(_column(metric) for metric in line.metrics.values()), _verdicts(line.result),
            f"{np.mean(seconds):.0f}" if seconds else "",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _column(metric: Estimate | str) -> str:
    return "missing" if isinstance(metric, str) else metric.told(1, 3)


def _model_row(spec: ExperimentSpec, name: str, model: Measured, never: Measured | None) -> str:
    rights = [model.side(sides(spec.report.tasks, role)) for role in ("forget", "retain")]
    forget, retain = ("missing" if right is None else f"{100 * right.mean():.1f}" for right in rights)
    perplexity = ", ".join(f"{value:.3g}" for value in model.perplexity.values())
    kl = "" if model.kl is None or model.targets is None else f"{model.kl.sum() / model.targets.sum():.4f}"
    more = "".join(f" {_column(metric)} |" for metric in _metrics(spec, [model], never).values())
    return f"| {name} | | | | {forget} | | {retain} | {kl} | {perplexity} |{more} | |"


def _position(line: Line) -> str:
    """Nothing where the two models do not differ."""
    return "" if line.position is None and line.forget is not None else _cell(line.position, 1, 2)


def _verdicts(arm: ArmResult) -> str:
    counts = counted(arm.verdicts.values())
    return ", ".join(f"{count} {verdict}" if len(arm.verdicts) > 1 else verdict for verdict, count in counts.items())


def _claims(own: list[Line]) -> Iterator[str]:
    there = [line for line in own if line.claim is not None]
    if not there:
        return
    yield from ("", "### Is attribution-guided better?", "")
    for line in there:
        assert line.claim is not None
        word = "**attribution-guided better**" if line.claim.better else "no claim"
        yield f"* {line.result.plan.arm.label}: {word}: {line.claim.reason}"


def _differences(own: list[Line]) -> Iterator[str]:
    pairs = [(line, comparison) for line in own for comparison in line.comparisons]
    if not pairs:
        return
    yield from ("", "### Arms by scores minus the others, paired", "")
    yield "| method | weighting | minus | seeds | forget | retain | KL |"
    yield "|---|---|---|---|---|---|---|"
    for line, comparison in pairs:
        arm = line.result.plan.arm
        cells = (arm.method, arm.weighting, comparison.other, str(len(comparison.seeds)), _cell(comparison.forget, 100),
                 _cell(comparison.retain, 100), _cell(comparison.kl, 1, 4))  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _analysis(outcome: dict[str, Any]) -> Iterator[str]:
    yield f"`{outcome['corpus']}`, {outcome['count']} {outcome['items']}:"
    yield ""
    for name in ("pearson", "spearman", "purely_forget", "magnitude_ratio"):
        estimate = Estimate(*(outcome[name][key] for key in Estimate._fields))
        yield f"* {name.replace('_', ' ')} {estimate.told(digits=3)}"
    for kind, said in outcome["verdict"].items():
        yield f"* a selection of {kind} is {said}"
    yield ""


def _cell(estimate: Estimate | None, scale: float, digits: int = 1) -> str:
    return "missing" if estimate is None else estimate.told(scale, digits)


_COLUMNS = ("match", "method", "weighting", "setting", "chosen", "seed", "quantity", "value", "low", "high", "verdict",
            "missing")  # fmt: skip


def _types() -> dict[str, Any]:
    import pyarrow

    numbers = {name: pyarrow.float64() for name in ("chosen", "value", "low", "high")}
    texts = {
        name: pyarrow.string() for name in ("match", "method", "weighting", "setting", "quantity", "verdict", "missing")
    }
    return {**numbers, **texts, "seed": pyarrow.int64()}


def _rows(spec: ExperimentSpec, line: Line) -> Iterator[dict[str, Any]]:
    """A row for each quantity over all seeds, and for each of every seed."""
    plan, arm = line.result.plan, line.result.plan.arm
    chosen = plan.chosen.setting if plan.chosen else None
    where = {**arm._asdict(), "setting": spec.methods[arm.method].tune.setting if chosen else None, "chosen": chosen}
    for name in _QUANTITIES:
        estimate: Estimate | None = getattr(line, name)
        yield {**where, "quantity": name, **({} if estimate is None else estimate._asdict()), "missing": plan.reason}
    for column, metric in line.metrics.items():
        figures = {"missing": metric} if isinstance(metric, str) else metric._asdict()
        yield {**where, "quantity": column, **figures}
    for seed, reason in line.result.missing.items():
        yield {**where, "seed": seed, "missing": reason}
    for seed, model in line.result.seeds.items():
        here = {**where, "seed": seed, "verdict": line.result.verdicts.get(seed)}
        yield {**here, "quantity": "seconds", "value": line.result.seconds[seed]}
        for row in _model_rows(arm.method, model):
            yield {**row, **here}


def _model_rows(name: str, model: Measured) -> Iterator[dict[str, Any]]:
    for task, right in model.right.items():
        yield {"method": name, "quantity": f"accuracy {task}", "value": float(right.mean())}
    for task, value in model.perplexity.items():
        yield {"method": name, "quantity": f"perplexity {task}", "value": value}
    if model.kl is not None and model.targets is not None:
        yield {"method": name, "quantity": "kl", "value": float(model.kl.sum() / model.targets.sum())}
    for task, reason in model.missing.items():
        yield {"method": name, "quantity": task, "missing": reason}
