"""`retrograd unlearn --attribute`: the scores of forget and retain rows for the unlearned model's queries."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from killing import kill_after
from test_unlearn_methods import Mutated, side_directions

from retrograd.cli import main
from retrograd.core import check
from retrograd.core.sweep import metagradient
from retrograd.runs.files import read_tensors
from retrograd.runs.kinds import assemble, read_settings
from retrograd.runs.run_folder import open_run
from retrograd.runs.scores import read_scores
from retrograd.trust.ensemble import train_many
from retrograd.unlearn.methods import METHODS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    for name, count, seed in (("forget", 5, 3), ("more", 3, 5), ("retain", 4, 4), ("other", 5, 6), ("query", 2, 1)):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(count, seed=seed))
    tiny.save_jsonl(folder / "gap.jsonl", [*tiny.sentences(2, seed=7), "", *tiny.sentences(2, seed=8)])
    return folder


def command(world: Path, run: Path, method: str, *more: str) -> list[str]:
    alternative = ["--alternative", str(world / "other.jsonl")] if method == "dpo" else []
    return [
        "unlearn", method, str(run), "--model", str(world / "model"), "--forget", str(world / "forget.jsonl"),
        "--retain", str(world / "retain.jsonl"), "--train.batch_size", "2", "--train.lr", "2e-3",
        "--train.eps_root", "1e-4", "--attribute", "tokens", "--query.dataset", str(world / "query.jsonl"),
        *alternative, *more,
    ]  # fmt: skip


def scores(run: Path) -> torch.Tensor:
    return torch.load(run / "scores.pt", weights_only=True)


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    """Two sets to forget, not linear in the weights, with a reference."""
    more = ("--forget", str(world / "gap.jsonl"), "--objective.retain_term", "kl", "--train.epochs", "2")
    assert main(command(world, world / "done", "npo", *more, "--replay.keep")) == 0
    return world / "done"


RUNS = [
    ("npo", "kl", ()), ("orth_circuit_breakers", "l2", ()), ("grad_diff", "ce", ("--lora.rank", "2")),
    ("grad_diff", "l2", ()), ("simnpo", "ce", ()), ("dpo", "kl", ("--train.micro_batch_size", "3")),
    ("max_entropy", "ce", ("--train.optimizer", "sgd", "--train.lr", "0.1")), ("weighted_sft", "kl", ()), ("undial", "l2", ()),
    ("rmu", "mse", ("--objective.forget", "1e4", "--objective.retain", "1e6", "--train.lr", "0.03")), ("task_arithmetic", "ce", ("--objective.retain", "0.5")), ("two_phase", "ce", ()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "term", "more"),
    [pytest.param(*run, marks=[] if place < 2 else pytest.mark.slow) for place, run in enumerate(RUNS)],
)
def test_scores_of_a_run_are_what_retraining_measures(
    method: str, term: str, more: tuple[str, ...], world: Path, tmp_path: Path
) -> None:
    """Of forget and of retain tokens apart, in float64; a pullback that is 0.1 % wrong is seen."""
    arguments = command(world, tmp_path / "run", method, "--dtype", "float64", "--objective.retain_term", term, *more)
    assert main(arguments) == 0
    loaded = open_run(tmp_path / "run").loaded
    training, params, found = loaded.training, loaded.initial.params, scores(tmp_path / "run")
    assert found.dtype == torch.float64
    assert found.shape == training.weights.shape
    directions = side_directions(loaded.stream)  # type: ignore[arg-type]
    measured = [check.central_difference(training, params, loaded.queries, v, 1e-4)[0] for v in directions]
    assert all(check.relative_error(torch.sum(found * v), slope) < 1e-6 for v, slope in zip(directions, measured))
    for fault in ("slopes", "curvature"):
        wrong = training._replace(engine=Mutated(loaded.objective, fault))
        mutated = metagradient(wrong, params, loaded.queries)[1][0]
        errors = [check.relative_error(torch.sum(mutated * v), slope) for v, slope in zip(directions, measured)]
        assert max(errors) > 1e-6, fault


@pytest.mark.parametrize("method", ["grad_diff", pytest.param("npo", marks=pytest.mark.slow)])
def test_a_document_has_the_score_of_its_tokens(method: str, world: Path, tmp_path: Path) -> None:
    """Whatever its tokens weigh, and whether or not the objective is linear in the weights."""
    weights = selected(world, tmp_path)
    more = ("--weights", str(tmp_path / "weights"), "--dtype", "float64", "--export", "false")
    assert main(command(world, tmp_path / "tokens", method, *more)) == 0
    assert main(command(world, tmp_path / "documents", method, *more, "--attribute", "examples")) == 0
    tokens, documents = scores(tmp_path / "tokens"), scores(tmp_path / "documents")
    expected = torch.ones_like(tokens)
    expected[: len(weights), : weights.shape[1]] = weights
    assert check.relative_error(documents, (tokens * expected).sum(1)) < 1e-10


def selected(world: Path, folder: Path) -> torch.Tensor:
    """Token weights of the forget rows, from the scores of an unlearning of them alone."""
    assert main(command(world, folder / "single", "grad_diff", "--export", "false")) == 0
    arguments = ["--scores", str(folder / "single"), "--rule", "rank", "--use", "removal"]
    assert main(["select", str(folder / "weights"), *arguments]) == 0
    return read_tensors(folder / "weights/weights.safetensors")[0]["weights"].double()


@pytest.mark.parametrize(("phase", "step"), [pytest.param("train", 2, marks=pytest.mark.slow), ("reverse", 3)])
def test_a_killed_run_ends_with_the_same_bits(phase: str, step: int, done: Path, world: Path, tmp_path: Path) -> None:
    more = ("--forget", str(world / "gap.jsonl"), "--objective.retain_term", "kl", "--train.epochs", "2",
            "--heartbeat", "0")  # fmt: skip
    arguments = command(world, tmp_path / "run", "npo", *more)
    kill_after(arguments, tmp_path / "run", phase, step)
    assert not (tmp_path / "run/scores.pt").exists()
    assert main(arguments) == 0
    for name in ("scores.pt", "scores.parquet", "doc_ids.pt", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (done / name).read_bytes(), name


def test_the_files_say_which_side_and_file_a_row_is_from(done: Path, world: Path) -> None:
    manifest = json.loads((done / "manifest.json").read_text())
    assert [(part["side"], Path(part["dataset"]).name) for part in manifest["parts"]] == [
        ("forget", "forget.jsonl"), ("forget", "gap.jsonl"), ("retain", "retain.jsonl"),
    ]  # fmt: skip
    assert [part["first_document"] for part in manifest["parts"]] == [0, 5, 10]
    assert [part["first_row"] for part in manifest["parts"]] == [0, 5, 9]  # a document of the second has no target
    table = pq.read_table(done / "scores.parquet").to_pandas()
    found, ids = scores(done), torch.load(done / "doc_ids.pt", weights_only=True)
    places = (table["row"].tolist(), table["position"].tolist())
    assert table["score"].tolist() == found[places].tolist()
    assert table["doc_id"].tolist() == ids[places].tolist()
    lines = {name: (world / f"{name}.jsonl").read_text().splitlines() for name in ("forget", "gap", "retain")}
    for (side, dataset, document), tokens in table.groupby(["side", "dataset", "document"]):
        assert side == ("retain" if "retain" in dataset else "forget")
        assert "".join(tokens["token"]).strip() == json.loads(lines[Path(dataset).stem][document])["text"]
    examples = json.loads((done / "all_scores.json").read_text())["examples"]
    assert {(one["side"], Path(one["dataset"]).stem, one["document"]) for one in examples} >= {
        ("forget", "gap", 3), ("retain", "retain", 0)
    }  # fmt: skip


def test_verify_certifies_it(done: Path) -> None:
    assert main(["verify", str(done), "--steps", "2", "--directions", "1"]) == 0
    found = json.loads((done / "verify.json").read_text())
    verdicts = {one["name"]: one["verdict"] for one in found["checks"]}
    assert found["verdict"] == "certified", verdicts
    assert verdicts["float64 retraining"] == verdicts["replay"] == verdicts["adjoint"] == "passed"


def test_verify_sees_a_changed_score(world: Path, tmp_path: Path) -> None:
    assert main(command(world, tmp_path / "run", "npo", "--export", "false")) == 0
    torch.save(1.01 * scores(tmp_path / "run"), tmp_path / "run/scores.pt")
    assert main(["verify", str(tmp_path / "run"), "--steps", "0", "--directions", "0"]) == 1
    assert {"scores file", "adjoint"} <= set(json.loads((tmp_path / "run/verify.json").read_text())["failed"])


def test_it_is_validated_asked_again_and_tried_for_smoothness(done: Path, world: Path) -> None:
    assert main(["validate", str(done), "--subsets", "3", "--fraction", "0.2", "--tokens"]) == 0
    assert len((done / "validation.csv").read_text().splitlines()) == 4
    assert main(["query", str(done), "--name", "second", "--query.dataset", str(world / "more.jsonl")]) == 0
    assert read_scores(done / "queries/second/scores.pt", True)[0].shape == scores(done).shape
    assert main(["metasmoothness", str(done), "--h", "0.05"]) == 0
    assert list((done / "metasmoothness").glob("*.json"))


def test_a_stack_of_retrainings_descends_the_methods_objective(done: Path) -> None:
    """And not the model's own cross-entropy."""
    loaded = open_run(done).loaded
    weights = loaded.training.weights.clone()
    weights[0] = 0
    alone = check.train(loaded.training, loaded.initial.params, weights).params
    stack = torch.stack([loaded.training.weights, weights])
    many = train_many(loaded.training, loaded.initial.params, stack, objective=loaded.objective)
    assert all(torch.allclose(theta[1], alone[name], atol=1e-5) for name, theta in many.items())


def test_scores_select_rows_of_one_of_its_data_sets(
    done: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{done}:query"
    assert main(["select", str(tmp_path / "a"), "--scores", source, "--rule", "value"]) == 2
    assert "forgets 2 data sets" in capsys.readouterr().err
    rows = tmp_path / "rows.yaml"
    for name, first in (("gap", 5), ("retain", 9)):
        rows.write_text(f"model: {world}/model\ndata: {{dataset: {world}/{name}.jsonl}}\n")
        arguments = ["--scores", source, "--rule", "value", "--rows", str(rows)]
        assert main(["select", str(tmp_path / name), *arguments]) == 0
        weights = read_tensors(tmp_path / name / "weights.safetensors")[0]["weights"]
        ours = scores(done)[first : first + len(weights), : weights.shape[1]]
        assert torch.corrcoef(torch.stack([weights.flatten(), ours.flatten()]))[0, 1] > 0.99
        assert json.loads((tmp_path / name / "info.json").read_text())["scores"][0]["part"]["dataset"].endswith(
            f"{name}.jsonl"
        )
    rows.write_text(f"model: {world}/model\ndata: {{dataset: {world}/more.jsonl}}\n")
    assert main(["select", str(tmp_path / "b"), "--scores", source, "--rule", "value", "--rows", str(rows)]) == 2
    assert "are none of those of" in capsys.readouterr().err


def test_several_queries_in_one_sweep(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "queries.yaml"
    file.write_text(
        f"gone: {{dataset: {world}/query.jsonl}}\nkept: {{dataset: {world}/more.jsonl}}\n"
        "gap: {contrast: [gone, kept]}\n"
    )
    arguments = command(world, tmp_path / "run", "grad_diff", "--query_file", str(file))
    place = arguments.index("--query.dataset")
    del arguments[place : place + 2]
    assert main([*arguments, "--export", "false"]) == 0
    gone, kept, gap = scores(tmp_path / "run").unbind(-1)
    assert check.relative_error(gone - kept, gap) < 1e-4
    assert (tmp_path / "run/queries/kept/scores.pt").exists()


MINE = '''"""Ascent, by a loss that {0}."""
import torch
from retrograd.unlearn.method import Method
from retrograd.unlearn.settings import Settings
from retrograd.unlearn.terms import forget_term

def forget(settings, view, side):
    return forget_term(settings, view, -torch.sum(side.c * {1}))

METHOD = Method(name="mine", formula="mine", source="a test", defaults=Settings(), forget=forget{2})
'''


@pytest.mark.parametrize(("named", "loss", "declared", "told"), [
    ("says that it is no gradient", "side.ce", ", no_gradient='it overwrites weights between steps'",
     "mine cannot be attributed: it overwrites weights between steps"),
    pytest.param("hides what it does", "side.ce * side.ce.detach()", "", "scores would be wrong",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_what_is_no_gradient_is_refused_by_name(
    named: str, loss: str, declared: str, told: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(named, loss, declared))
    arguments = command(world, tmp_path / "run", str(file))
    assert main(arguments) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
    place = arguments.index("--attribute")
    assert main([*arguments[:place], *arguments[place + 4 :], "--export", "false"]) == 0  # trained it can be


def test_a_method_of_ones_own_is_verified_once_its_code_is_trusted(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.format("is smooth", "torch.tanh(side.ce)", ""))
    assert main(command(world, tmp_path / "run", str(file))) == 0
    checked = ["verify", str(tmp_path / "run"), "--steps", "1", "--directions", "0"]
    assert main(checked) == 2
    assert "names Python code: its method is" in capsys.readouterr().err
    assert main([*checked, "--trust_code"]) == 0
    assert main(["metasmoothness", str(tmp_path / "run")]) == 2
    assert "--trust_code" in capsys.readouterr().err
    file.write_text(MINE.format("is another one", "torch.tanh(2 * side.ce)", ""))
    assert main([*checked, "--trust_code"]) == 1


def test_attribution_that_was_not_asked_for_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(world, tmp_path / "run", "grad_diff")
    place = arguments.index("--attribute")
    without = [*arguments[:place], *arguments[place + 2 :]]
    for given, told in (
        (without, "--query belong to a run that is attributed"),
        ([*without[:-2], "--replay.keep"], "--replay belong to a run that is attributed"),
        (arguments[:-2], "no query"),
        ([*arguments, "--replay.heartbeat", "3"], "takes --heartbeat"),
    ):
        assert main(given) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*without[:-2], "--export", "false"]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 2
    assert "without --attribute, which has no scores" in capsys.readouterr().err


def test_settings_come_back_from_the_folder(done: Path) -> None:
    settings = read_settings(done)
    loaded = assemble(settings)
    assert getattr(loaded.objective, "settings") == METHODS["npo"].defaults.__class__(retain_term="kl")  # noqa: B009
    assert loaded.identity == json.loads((done / "manifest.json").read_text())["identity"]
