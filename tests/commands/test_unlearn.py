"""`retrograd unlearn`: every method from the command to a model that loads, resume after a kill, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quiz
import tiny
import torch
from killing import kill_after
from test_train import final

from retrograd.cli import main
from retrograd.data.rows import Rows, build_rows
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.select import weights as weights_file
from retrograd.select.places import places_of
from retrograd.settings.unlearn import UnlearnConfig, parse_source
from retrograd.unlearn.methods import METHODS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    quiz.save(folder / "model", positions=128)
    for name, count, seed in (("forget", 6, 3), ("more", 3, 5), ("retain", 7, 4), ("other", 6, 6), ("query", 2, 1)):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(count, seed=seed))
    rows = quiz.questions(9, 1)
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(
        f"asked: {{dataset: {folder}/asked.jsonl, role: forget}}\nprose: {{dataset: {folder}/query.jsonl, form: text}}\n"
    )
    weigh(folder, "signed", torch.tensor([1.0, -1.0]), "descent")
    weigh(folder, "shares", torch.tensor([2.0, 0.0]), "removal")
    weigh(folder, "nothing", torch.tensor([0.0, 0.0]), "removal")
    weigh(folder, "ones", torch.tensor([1.0, 1.0]), "removal")
    return folder


def rows_of(world: Path) -> Rows:
    documents = [json.loads(line) for line in (world / "forget.jsonl").read_text().splitlines()]
    import datasets

    tokenizer = load_tokenizer(str(world / "model"))
    return build_rows(datasets.Dataset.from_list(documents), tokenizer, max_length=128, vocab_size=len(tokenizer))


def weigh(world: Path, name: str, alternating: torch.Tensor, use: str) -> None:
    places = places_of(rows_of(world))
    weights = alternating.repeat(len(places))[: len(places)]
    weights_file.write(world / name, weights, None, places, {"use": use, "rule": "made here"})


def command(world: Path, run: Path, method: str, *more: str) -> list[str]:
    return [
        "unlearn", method, str(run), "--model", str(world / "model"), "--forget", str(world / "forget.jsonl"),
        "--retain", str(world / "retain.jsonl"), "--train.batch_size", "4", "--train.epochs", "2", "--train.lr", "1e-2",
        *more,
    ]  # fmt: skip


def alternatives(world: Path, method: str) -> list[str]:
    return ["--alternative", str(world / "other.jsonl")] if METHODS[method].alternatives else []


QUICK = ("grad_diff", "npo", "dpo", "orth_circuit_breakers", "rmu")  # one of each kind
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("method", EVERY)
def test_every_method_leaves_a_changed_model(method: str, world: Path, tmp_path: Path) -> None:
    more = ["--lora.rank", "0"] if METHODS[method].adapters else []
    assert main(command(world, tmp_path / "run", method, *alternatives(world, method), *more)) == 0
    before, after = load_causal_lm(str(world / "model")), load_causal_lm(str(tmp_path / "run/model"))
    state = final(tmp_path / "run")
    left = {name: state.get(f"params.{name}", x) for name, x in before.params.items()}
    assert all(torch.equal(x, left[name]) for name, x in after.params.items())
    changed = {name for name, x in before.params.items() if not torch.equal(x, after.params[name])}
    trained = METHODS[method].trained
    assert changed == set(before.params if trained is None else trained(METHODS[method].defaults, before.module))
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["method"] == method
    assert manifest["pairs"]["forget"] == 6


def test_it_is_evaluated_on_its_way_and_judged(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--evaluate.tasks",
        str(world / "tasks.yaml"),
        "--evaluate.every",
        "2",
        "--evaluate.keep_best",
        "min:prose",
    ]
    more = ["--forget", str(world / "more.jsonl"), "--objective.forget", "0.5", *asked]
    arguments = command(world, tmp_path / "run", "grad_diff", *more)
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "evaluate"] == [0, 2, 4, 5]
    assert (tmp_path / "run/best/best.json").exists()
    summary = json.loads((tmp_path / "run/evaluation/summary.json").read_text())
    assert set(summary["sources"]) == {"run", "model"}  # after the run, not after its folder
    capsys.readouterr()
    assert main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "is done" in told
    assert "run: " in told  # its verdict


MADE_BEFORE = (
    "rmu",
    "sequential",
    "tuned_lens",
    "checkpoint_transfer",
    "task_arithmetic",
    "repselect",
)  # what is made again


@pytest.mark.parametrize("method", ["npo", *(pytest.param(name, marks=pytest.mark.slow) for name in MADE_BEFORE)])
def test_a_killed_one_goes_on_to_the_same_bits(method: str, world: Path, tmp_path: Path) -> None:
    _killed_and_resumed(method, world, tmp_path)


def _killed_and_resumed(method: str, world: Path, tmp_path: Path, *variant: str) -> None:
    more = ["--heartbeat", "0", "--train.epochs", "6", *variant]
    arguments = command(world, tmp_path / "run", method, *more)
    kill_after(arguments, tmp_path / "run", "train", 4)
    assert main(arguments) == 0
    assert main(command(world, tmp_path / "whole", method, *more)) == 0
    ours, whole = final(tmp_path / "run"), final(tmp_path / "whole")
    assert all(torch.equal(x, whole[name]) for name, x in ours.items())


VARIANTS = {
    "circuit_breakers": ["--lora.rank", "0", "--objective.lat_steps", "2"],
    "sequential": ["--lora.rank", "0", "--objective.l2_sp", "0.01"],
    "two_phase": ["--objective.budget", "0.01", "--objective.forget", "10"],
}


@pytest.mark.parametrize("method", [
    "circuit_breakers", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "circuit_breakers")
])  # fmt: skip
def test_a_killed_variant_goes_on_to_the_same_bits(method: str, world: Path, tmp_path: Path) -> None:
    _killed_and_resumed(method, world, tmp_path, *VARIANTS[method])


OF_EACH_FAMILY = {"npo": [], "circuit_breakers": ["--lora.rank", "0"], "task_arithmetic": []}


@pytest.mark.slow
@pytest.mark.parametrize("method", OF_EACH_FAMILY)
def test_killed_three_times_it_ends_with_the_bits_of_the_undisturbed_run(
    method: str, world: Path, tmp_path: Path
) -> None:
    more = ["--heartbeat", "0", "--train.epochs", "8", *OF_EACH_FAMILY[method]]
    arguments = command(world, tmp_path / "run", method, *more)
    for step in (2, 6, 10):
        kill_after(arguments, tmp_path / "run", "train", step)
        assert not (tmp_path / "run/model").exists()
    assert main(arguments) == 0
    assert main(command(world, tmp_path / "whole", method, *more)) == 0
    ours, whole = final(tmp_path / "run"), final(tmp_path / "whole")
    assert all(torch.equal(x, whole[name]) for name, x in ours.items())
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(14))


def test_the_families_are_all_there() -> None:
    assert {METHODS[name].family for name in OF_EACH_FAMILY} == {method.family for method in METHODS.values()}


def test_a_run_under_a_latent_attack_is_not_attributed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--attribute", "tokens", "--query.dataset", str(world / "query.jsonl")]
    assert main(command(world, tmp_path / "run", "circuit_breakers", *VARIANTS["circuit_breakers"], *asked)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "runs of circuit_breakers cannot be attributed: its latent attack" in told
    assert not (tmp_path / "run").exists()


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted((line for line in lines if line["phase"] == "train"), key=lambda line: line["step"])


def test_the_journal_tells_terms_apart_however_it_was_cut_and_killed(world: Path, tmp_path: Path) -> None:
    """Σ coefficient·value is the loss, in one batch, in micro-batches, and after a kill that replays steps."""
    more = ["--heartbeat", "0", "--train.epochs", "6", "--objective.forget", "0.5", "--objective.retain", "0.25"]
    assert main(command(world, tmp_path / "whole", "grad_diff", *more)) == 0
    expected = lines_of(tmp_path / "whole")
    assert len(expected) == 11
    for line in expected:
        assert line["terms"].keys() == {"forget", "retain"}
        total = 0.5 * line["terms"]["forget"] + 0.25 * line["terms"]["retain"]
        assert total == pytest.approx(line["loss"], rel=1e-5)
    assert len({line["terms"]["forget"] for line in expected}) == 11
    assert main(command(world, tmp_path / "cut", "grad_diff", *more, "--train.micro_batch_size", "2")) == 0
    for line, other in zip(lines_of(tmp_path / "cut"), expected, strict=True):
        assert line["terms"] == pytest.approx(other["terms"], rel=1e-3)
    arguments = command(world, tmp_path / "run", "grad_diff", *more)
    kill_after(arguments, tmp_path / "run", "train", 4)
    assert main(arguments) == 0
    assert [line["terms"] for line in lines_of(tmp_path / "run")] == [line["terms"] for line in expected]


def test_weights_of_one_are_no_weights_and_others_are_not(world: Path, tmp_path: Path) -> None:
    found = {}
    for name, more in (("none", []), ("ones", ["--weights", str(world / "ones")]), ("word", ["--weights", "ones"]),
                       ("shares", ["--weights", str(world / "shares")])):  # fmt: skip
        assert main(command(world, tmp_path / name, "wga", "--export", "false", *more)) == 0
        found[name] = final(tmp_path / name)
    assert all(torch.equal(x, found["ones"][name]) for name, x in found["none"].items())
    assert all(torch.equal(x, found["word"][name]) for name, x in found["none"].items())
    assert not all(torch.equal(x, found["shares"][name]) for name, x in found["none"].items())


def test_adapters_are_merged(world: Path, tmp_path: Path) -> None:
    more = ["--lora.rank", "2", "--objective.retain_term", "kl"]
    assert main(command(world, tmp_path / "run", "npo", *more)) == 0
    before, after = load_causal_lm(str(world / "model")), load_causal_lm(str(tmp_path / "run/model"))
    assert before.params.keys() == after.params.keys()


@pytest.mark.slow
def test_a_method_whose_source_trains_adapters_does(world: Path, tmp_path: Path) -> None:
    """Rank and scale are its own for the model's width; those that are named, and 0, are taken instead."""
    found = {}
    for name, more in (("own", []), ("named", ["--lora.rank", "2", "--lora.alpha", "2"]),
                       ("four", ["--lora.rank", "4"])):  # fmt: skip
        assert (
            main(command(world, tmp_path / name, "orth_circuit_breakers", "--export", str(name == "own"), *more)) == 0
        )
        found[name] = final(tmp_path / name)
    adapters = {name: x for name, x in found["own"].items() if name.startswith("params.") and ".lora_A." in name}
    assert len(adapters) == 2
    assert {min(x.shape) for x in adapters.values()} == {2}  # a 64th of a width of 16, and at least 2
    assert all(torch.equal(x, found["named"][name]) for name, x in found["own"].items())
    assert {min(x.shape) for name, x in found["four"].items() if ".lora_A." in name} == {4}
    again = ["unlearn", "orth_circuit_breakers", str(tmp_path / "again"), "--config"]
    assert main([*again, str(tmp_path / "own/run_config.yaml"), "--export", "False"]) == 0
    assert all(torch.equal(x, found["own"][name]) for name, x in final(tmp_path / "again").items())
    before, after = load_causal_lm(str(world / "model")), load_causal_lm(str(tmp_path / "own/model"))
    changed = {name for name, x in before.params.items() if not torch.equal(x, after.params[name])}
    assert changed == {f"gpt_neox.layers.{layer}.attention.query_key_value.weight" for layer in (0, 1)}


def test_a_model_whose_modules_to_adapt_are_unknown_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_model(tmp_path / "model", "olmo2")  # peft has no choice for it
    arguments = command(world, tmp_path / "run", "orth_circuit_breakers", "--model", str(tmp_path / "model"))
    assert main(arguments) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "LoRA cannot be added" in told
    assert "Linear layers of this model: down_proj, gate_proj" in told
    assert "--lora.target_modules, or train the whole model with --lora.rank 0" in told
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--lora.target_modules", "q_proj", "--export", "False"]) == 0


@pytest.mark.parametrize("method,more,told", [
    ("npo", ["--weights", "{0}/signed"], "and this method takes none"),
    ("grad_diff", ["--weights", "{0}/signed"], "select with --use removal"),  # its ascent would teach the proponents
    ("task_arithmetic", ["--weights", "{0}/signed"], "select with --use removal"),
    ("weighted_sft", ["--weights", "{0}/shares"], "Select with --use descent"),  # it would teach the proponents
    ("npo", ["--weights", "{0}/nothing"], "the forget set is empty"),
    ("npo", ["--weights", "{0}/ones", "--max_length", "3"], "weighs another data set"),
    ("npo", ["--weights", "{0}/ones", "--weights", "ones"], "2 --weights for 1 --forget"),
    ("npo", ["--lora.rank", "2", "--lora.target_modules", "absent"], "absent"),
    ("npo", ["--train.micro_batch_size", "3"], "takes pairs apart"),
    ("npo", ["--train.batch_size", "0"], "train.batch_size is 0"),
    ("npo", ["--forget", "{0}/more.jsonl,limit=x"], "limit"),
    ("dpo", [], "needs an alternative row"),
    ("dpo", ["--alternative", "{0}/more.jsonl"], "do not pair"),
    ("npo", ["--alternative", "{0}/other.jsonl"], "takes no alternative rows"),
    ("orth_circuit_breakers", ["--train.micro_batch_size", "2"], "needs at least 2"),
    ("orth_circuit_breakers", ["--objective.blocks", "9"], "there is no block 9"),
    ("unheard", [], "unknown method"),
])  # fmt: skip
def test_bad_input_is_refused_in_words_and_nothing_is_left(
    method: str, more: list[str], told: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(world, tmp_path / "run", method, *(word.format(world) for word in more))) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_method_is_another_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(world, tmp_path / "run", "simnpo", "--export", "false")) == 0
    assert main(command(world, tmp_path / "run", "wga", "--export", "false")) == 2
    assert "method: 'simnpo' → 'wga'" in capsys.readouterr().err


def test_help_has_one_blank_line_between_paragraphs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["unlearn", "--help"])
    head = capsys.readouterr().out.partition("positional")[0]
    assert "With `--attribute tokens" in head
    assert "\n\n\n" not in head


def test_help_names_every_method_and_a_source_may_be_narrowed() -> None:
    assert all(name in str(UnlearnConfig.__doc__) for name in METHODS)
    source = parse_source("hub/name,subset=a,split=train[:8],text_column=page,limit=3", UnlearnConfig(max_length=9))
    assert (source.dataset, source.subset, source.split) == ("hub/name", "a", "train[:8]")
    assert (source.text_column, source.limit, source.max_length) == ("page", 3, 9)
    chats = parse_source("a.jsonl,messages=talk,limit=2,assistant_only_loss=true,tools=given", UnlearnConfig())
    assert (chats.columns, chats.limit, chats.assistant_only_loss) == (("messages=talk", "tools=given"), 2, True)
    with pytest.raises(ValueError, match="a setting 'limt' that does not exist; there are subset, split"):
        parse_source("a.jsonl,limt=3,limit=2", UnlearnConfig())


def test_a_file_whose_name_looks_like_settings_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a,b=c.jsonl"
    path.write_text("")
    assert parse_source(f"{path},limit=2", UnlearnConfig()).dataset == str(path)
    assert parse_source(str(path), UnlearnConfig()).limit is None
