"""Commands of several ranks: the scores of one process, one writer, refusals, and ranks that die or hang."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import command, forked, on_ranks
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from retrograd.cli import main
from retrograd.core import tree
from retrograd.parallel.group import Group, RankError, joined
from retrograd.parallel.split import Split
from retrograd.runs.arithmetic import Arithmetic
from retrograd.runs.files import read_tensors
from retrograd.runs.run_folder import open_run
from retrograd.runs.shares import refuse_unequal
from retrograd.runs.states.relay import relay
from retrograd.runs.trajectory import Trajectory

RECIPES = {
    # per-token scores, K queries, tied embeddings, clipping, accumulation, and a short last batch
    "tokens": "--model {w}/tied --attribute tokens --query.reduction none --train.batch_size 7 --train.max_grad_norm 0.5 "
    "--train.micro_batch_size 4 --engine double",
    "blocks": "--model {w}/llama --train.batch_size 6 --engine blocks --train.weight_decay 0.1 --train.epochs 2",
    "lora": "--model {w}/llama --lora.rank 2 --lora.target_modules q_proj v_proj --train.batch_size 5 "
    "--train.micro_batch_size 3 --engine blocks",
    "muon": "--model {w}/llama --train.optimizer muon --train.batch_size 8",
    "muon-blocks": "--model {w}/tied --train.optimizer muon --train.batch_size 6 --engine blocks "
    "--train.epochs 2 --train.weight_decay 0.1 --train.spare_norms --train.max_grad_norm 0.5 --query.reduction none",
}

SHARD = ["--parallel", "shard"]
MESH = [*SHARD, "--replicas", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and 16 documents of 8 to 128 tokens."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    kinds = {
        "tied": GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=160,
                           bos_token_id=0, eos_token_id=0),
        "llama": LlamaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=160),
    }  # fmt: skip
    for name, config in kinds.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tiny.save_tokenizer(folder / name)
    draw = random.Random(0)
    texts = [" ".join(draw.choice(tiny.WORDS) for _ in range(draw.choice((8, 11, 40, 128)))) for _ in range(16)]
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    return folder


def arguments(world: Path, run: Path, recipe: str, *more: str) -> list[str]:
    base = (
        f"--data.dataset {world}/train.jsonl --query.dataset {world}/query.jsonl --train.lr 1e-2 "
        f"--train.eps_root 1e-6 {RECIPES[recipe].format(w=world)}"
    )
    return ["magic", str(run), *base.split(), *more]


def scores(run: Path) -> torch.Tensor:
    return torch.load(run / "scores.pt", weights_only=True)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def alone(world: Path) -> torch.Tensor:
    assert main(arguments(world, world / "alone", "tokens", "--dtype", "float64")) == 0
    return scores(world / "alone")


def test_two_ranks_give_the_scores_of_one_and_go_on_with_the_bits_of_two(world: Path, alone: torch.Tensor) -> None:
    asked = ["--dtype", "float64", "--replay.heartbeat", "0"]
    two, one = world / "two", world / "one-of-two"
    assert command(2, arguments(world, two, "tokens", *asked)) == [0, 0]
    assert distance(scores(two), alone) < 1e-10
    assert main(arguments(world, one, "tokens", *asked, "--shards", "2")) == 0
    assert torch.equal(scores(one), scores(two))
    asked = [read_tensors(run / "queries/query/gradient.safetensors")[0] for run in (one, two)]
    assert tree.digest(asked[0]) == tree.digest(asked[1]), "three questions, asked by two ranks"
    manifest = json.loads((two / "manifest.json").read_text())
    assert (manifest["arithmetic"]["shards"], manifest["finished"]) == (2, True)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "train"] == list(range(3)), "one line a step"
    assert asked[0]["values"].shape == (3,)


def test_two_ranks_in_pieces_give_the_scores_of_one(world: Path) -> None:
    asked = ["--dtype", "float64", "--train.epochs", "1", "--data.dataset", str(world / "query.jsonl")]
    assert command(2, arguments(world, world / "in-two", "muon-blocks", *asked, *SHARD)) == [0, 0]
    assert main(arguments(world, world / "of-two", "muon-blocks", *asked, "--shards", "2")) == 0
    assert torch.equal(scores(world / "in-two"), scores(world / "of-two"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_world_gives_the_scores_of_one_process(world: Path, recipe: str) -> None:
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-4)):
        name = world / f"{recipe}-{dtype}"
        assert main(arguments(world, name, recipe, "--dtype", dtype)) == 0
        found = {}
        for ranks in (2, 3, 4):
            run = world / f"{recipe}-{dtype}-{ranks}"
            assert command(ranks, arguments(world, run, recipe, "--dtype", dtype)) == [0] * ranks
            found[ranks] = scores(run)
            assert distance(found[ranks], scores(name)) < tolerance, f"{ranks} ranks, {dtype}"
            pieces = world / f"{recipe}-{dtype}-{ranks}-pieces"
            assert command(ranks, arguments(world, pieces, recipe, "--dtype", dtype, *SHARD)) == [0] * ranks
            assert torch.equal(scores(pieces), found[ranks]), f"{ranks} ranks in pieces, {dtype}"
        mesh = world / f"{recipe}-{dtype}-2x2"
        assert command(4, arguments(world, mesh, recipe, "--dtype", dtype, *MESH)) == [0] * 4
        assert torch.equal(scores(mesh), found[4]), f"two replicas of two, {dtype}"
        run = world / f"{recipe}-{dtype}-2of4"
        assert command(2, arguments(world, run, recipe, "--dtype", dtype, "--shards", "4", *SHARD)) == [0, 0]
        assert torch.equal(scores(run), found[4])


def test_a_run_goes_on_in_a_world_that_divides_its_shards_and_in_no_other(
    world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, whole = world / "killed", world / "whole"
    asked = ["--replay.heartbeat", "0", "--shards", "2"]

    def dies(rank: int) -> int:
        before, count = Split.gradient, 0

        def gradient(self: Split, *given: object) -> object:
            nonlocal count
            count += 1
            if count == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(self, *given)  # type: ignore[arg-type]

        Split.gradient = gradient  # type: ignore[assignment,method-assign]
        return main(arguments(world, run, "blocks", *asked))

    first, second = forked(2, dies)
    assert (first, second) == (-signal.SIGKILL, 1), "a rank whose first one is gone ends, and says why"
    assert "rank 0" in capfd.readouterr().err
    assert command(3, arguments(world, run, "blocks"))[0] == 2
    assert "2 logical shards and this job has 3 processes" in capfd.readouterr().err
    assert main(arguments(world, run, "blocks", "--shards", "4")) == 2
    assert "begun with 2 logical shards, now --shards is 4" in capfd.readouterr().err
    assert main(arguments(world, run, "blocks", "--replay.heartbeat", "0")) == 0, "on one process"
    assert command(2, arguments(world, whole, "blocks", *asked)) == [0, 0]
    assert torch.equal(scores(run), scores(whole))


@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=[pytest.mark.slow] * (engine == "blocks")) for engine in ("double", "blocks")]
)
def test_two_replicas_of_two_give_the_scores_of_one_process(world: Path, engine: str) -> None:
    """Three rows of other lengths: one rank of four has none."""
    asked = ["--dtype", "float64", "--data.limit", "3", "--train.batch_size", "3", "--train.max_grad_norm", "0.5"]
    runs = [world / f"{engine}-three-{name}" for name in ("mesh", "shards", "alone")]
    given = [arguments(world, run, "blocks", *asked, "--engine", engine) for run in runs]
    assert command(4, [*given[0], *MESH]) == [0] * 4
    assert main([*given[1], "--shards", "4"]) == 0
    assert main(given[2]) == 0
    assert torch.equal(scores(runs[0]), scores(runs[1]))
    assert distance(scores(runs[0]), scores(runs[2])) < 1e-10
    assert main([*given[0], *MESH]) == 0, "it is done, for one process too"
    opened = open_run(runs[0]).loaded.training
    assert type(opened.engine) is Split, "as verify and validate read it"
    final = [read_tensors(run / "checkpoints/final.safetensors")[1]["digest"] for run in runs[:2]]
    assert final[0] == final[1]


def killed(world: int, rank: int, at: int, asked: list[str]) -> None:
    """A command of `world` ranks, one of which is killed when it comes to this number of passes over its rows."""

    def job(mine: int) -> int:
        seen = 0

        def counting(before: Any) -> Any:
            def pass_over(self: Split, *given: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return before(self, *given)

            return pass_over

        def train(self: Trajectory) -> Any:  # not the proofs before it
            for name in ("_gradient", "_linearize", "_pulled"):
                setattr(Split, name, counting(getattr(Split, name)))
            return plain(self)

        plain = Trajectory.train
        if mine == rank:
            Trajectory.train = train  # type: ignore[method-assign]
        return main(asked)

    assert -signal.SIGKILL in forked(world, job)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "at"), [("blocks", 5), ("muon-blocks", 7)])  # Muon has two passes a step of it
def test_a_run_in_pieces_goes_on_whole_and_again_in_pieces(world: Path, recipe: str, at: int) -> None:
    run, whole = world / f"moved-{recipe}", world / f"unmoved-{recipe}"
    asked = arguments(world, run, recipe, "--replay.heartbeat", "0", "--replay.memory", "0", "--shards", "4", *SHARD)
    killed(2, 1, 3, asked)
    assert list((run / "checkpoints/of-2/rank-1").glob("state-*.safetensors"))
    killed(4, 0, 4, asked)  # in training still
    killed(1, 0, at, asked)  # on the way back, whole: three steps were left at most, one at least
    assert (run / "checkpoints/reverse.safetensors").exists()
    killed(2, 0, 3, asked)
    assert (run / "checkpoints/of-2/rank-1/reverse.safetensors").exists()
    assert command(2, asked) == [0, 0]
    assert main(arguments(world, whole, recipe, "--shards", "4")) == 0
    assert torch.equal(scores(run), scores(whole))
    found = open_run(run).loaded
    relay(
        run / "checkpoints", found.initial, found.training.recipe, (1, 2), found.identity
    )  # as if killed before the end
    assert (run / "checkpoints/of-2/rank-0/final.safetensors").exists()
    assert main(asked) == 0
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["digests.txt", "final.safetensors"]
    assert main(["verify", str(run), "--steps", "2", "--strict"]) == 0


@pytest.mark.slow
def test_two_replicas_go_on_in_every_other_layout(world: Path) -> None:
    run, whole = world / "meshed", world / "unmeshed"
    asked = arguments(world, run, "blocks", "--replay.heartbeat", "0", "--replay.memory", "0", "--shards", "4")
    killed(4, 3, 3, [*asked, *MESH])
    assert list((run / "checkpoints/of-2x2/rank-3").glob("state-*.safetensors"))
    killed(2, 1, 3, [*asked, *SHARD])  # in training still
    killed(4, 2, 5, [*asked, *SHARD, "--replicas", "4"])  # on the way back
    assert (run / "checkpoints/of-4x1/rank-2/reverse.safetensors").exists()
    killed(4, 1, 3, [*asked, *MESH])
    assert (run / "checkpoints/of-2x2/rank-1/reverse.safetensors").exists()
    assert main(asked) == 0
    assert main(arguments(world, whole, "blocks", "--shards", "4")) == 0
    assert torch.equal(scores(run), scores(whole))


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.slow),
        pytest.param(None, id="fails", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_the_others_in_time_and_is_named(
    world: Path, tmp_path: Path, end: signal.Signals | None, capfd: pytest.CaptureFixture[str]
) -> None:
    pids = tmp_path / "pid"

    def job(rank: int) -> int:
        before = Split._pulled

        def pulled(self: Split, *given: object) -> object:
            if self.group.rank and end is None:
                raise MemoryError("no memory left")
            if self.group.rank and end is not None:
                pids.write_text(str(os.getpid()))
                os.kill(os.getpid(), end)
            return before(self, *given)  # type: ignore[arg-type]

        Split._pulled = pulled  # type: ignore[assignment,method-assign]
        return main(arguments(world, tmp_path / "run", "blocks", "--patience", "4"))

    if end is signal.SIGSTOP:
        found = forked(2, job, stopped=pids)
    else:
        found = forked(2, job)
    assert found[0] == 1
    error = capfd.readouterr().err
    assert "The same command resumes" in error
    assert {signal.SIGKILL: "rank 1 has stopped", signal.SIGSTOP: "rank 1 has stopped", None: "no memory left"}[
        end
    ] in error


def test_ranks_that_loaded_other_things_are_refused() -> None:
    kind = Arithmetic("float32", "double", False, False, "cpu", "x", 1)

    def apart(group: Group) -> str:
        try:
            refuse_unequal(group, {"model": f"bits {group.rank}", "rows": "same"}, kind)
        except ValueError as error:
            return str(error)
        return ""

    first, other = on_ranks(2, apart)
    assert "rank 1 has not loaded what rank 0 has" in first
    assert "model: bits 0 on rank 0, bits 1 there" in first
    assert "rows" not in first
    assert other == ""


def test_what_one_process_does_is_refused_in_a_job(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(2, ["verify", str(world / "alone")]) == [2, 2]
    assert "retrograd verify is one process, and this is one of 2" in capfd.readouterr().err
    assert command(2, arguments(world, world / "gpu", "blocks", "--device", "cuda:1"))[0] == 2
    assert "would be the device of every rank" in capfd.readouterr().err
    assert command(2, arguments(world, world / "none", "blocks", *SHARD, "--replicas", "3"))[0] == 2
    assert "--replicas is 3 and this job has 2 processes" in (error := capfd.readouterr().err)
    assert "Take --replicas 1, 2" in error
    assert main(arguments(world, world / "none", "blocks", "--replicas", "2")) == 2
    assert "--replicas 2 makes copies of the pieces of --parallel shard" in capfd.readouterr().err
    assert main(arguments(world, world / "none", "blocks", "--shards", "0")) == 2
    assert "--shards is 0" in capfd.readouterr().err
    assert main(arguments(world, world / "none", "blocks", "--patience", "0")) == 2
    assert "--patience is 0.0" in capfd.readouterr().err


def numbers(run: Path, *names: str) -> list[dict[str, Any]]:
    """What the lines of a run's journal say under these names."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names} for line in lines if all(name in line for name in names)]


def test_a_run_in_pieces_is_evaluated_on_its_way(world: Path) -> None:
    tasks = world / "tasks.yaml"
    tasks.write_text(f"prose: {{dataset: {world}/query.jsonl, form: text}}\n")
    asked = ["--evaluate.tasks", str(tasks), "--evaluate.every", "1", "--evaluate.keep_best", "min:prose"]
    asked += ["--replay.heartbeat", "0"]
    one, two = world / "asked-one", world / "asked-two"
    assert main(arguments(world, one, "blocks", *asked, "--shards", "2")) == 0
    killed(2, 0, 3, arguments(world, two, "blocks", *asked, *SHARD))
    assert command(2, arguments(world, two, "blocks", *asked, *SHARD)) == [0, 0]
    found = numbers(two, "step", "tasks")
    assert [line["step"] for line in found] == list(range(len(found)))
    assert len(found) > 3, "the first state, one on the way, the last"
    assert found == numbers(one, "step", "tasks")
    assert (two / "best/model.safetensors").read_bytes() == (one / "best/model.safetensors").read_bytes()
    assert torch.equal(scores(two), scores(one))


def test_tensors_of_every_kind_are_called_with() -> None:
    given = {
        "bool": torch.tensor([True, False, True]), "none": torch.zeros(0, 3), "one": torch.tensor(2.5),
        "bf16": torch.randn(5).bfloat16(), "int": torch.arange(7), "wide": torch.zeros(()).expand(2, 3),
        "across": torch.arange(12.0).view(3, 4).T,
    }  # fmt: skip

    def told(group: Group) -> str:
        found = {}
        if group.rank:
            group.serve({"keep": lambda text, tensors: found.update(tensors, text=text)})
            assert found.pop("text") == "x"
            return tree.digest(found)
        group.call("keep", "x", given)
        return tree.digest(given)

    first, other = on_ranks(2, told)
    assert first == other


def test_a_job_that_does_not_come_together_says_so() -> None:
    def lonely(rank: int) -> str:
        if rank:
            return ""
        with pytest.raises(RankError, match="did not come together within 2 s"), joined(2):
            pass
        return "refused"

    assert forked(2, lonely)[0] == "refused"


def test_whoever_finds_rank_0_gone_says_so() -> None:
    def asked(rank: int) -> str:
        with joined(5) as group:
            group.collected(None)  # both are there
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            with pytest.raises(RankError, match="the job's store is gone, and with it rank 0"):
                while True:
                    group.collected(None)
            with pytest.raises(RankError, match="the job's store is gone, and with it rank 0"):
                group.agreed(None)
            return "told"

    assert forked(2, asked) == [-signal.SIGKILL, "told"]


def test_an_unlearning_in_a_job_is_judged_by_rank_0(world: Path, tmp_path: Path) -> None:
    rows = [{"question": "a cat sat on", "choices": ["mat", "hill", "sun"], "answer": k % 3} for k in range(4)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"dataset": "asked.jsonl", "form": "cloze"}
    (tmp_path / "tasks.yaml").write_text(json.dumps({name: {**task, "role": name} for name in ("forget", "retain")}))
    for name, seed in (("forget", 3), ("retain", 4)):
        tiny.save_jsonl(tmp_path / f"{name}.jsonl", tiny.sentences(4, seed=seed))
    asked = ["unlearn", "grad_diff", str(tmp_path / "run"), "--model", str(world / "llama"), "--forget",
             str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl"), "--train.batch_size", "4",
             "--train.lr", "1e-2", "--evaluate.tasks", str(tmp_path / "tasks.yaml"), "--patience", "20"]  # fmt: skip
    assert command(2, asked) == [0, 0]
    summary = json.loads((tmp_path / "run/evaluation/summary.json").read_text())
    assert summary["missing"] == []
    assert len(list((tmp_path / "run/evaluation").rglob("*.parquet"))) == 4, "two models, two tasks"


def test_unlearning_in_a_job_keeps_pairs_together(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("forget", 3), ("retain", 4), ("other", 6)):
        tiny.save_jsonl(world / f"{name}.jsonl", tiny.sentences(6, seed=seed))

    def unlearn(method: str, run: str, *more: str) -> list[str]:
        sides = f"--forget {world}/forget.jsonl --retain {world}/retain.jsonl"
        recipe = "--lora.rank 0 --train.batch_size 3 --train.lr 1e-2 --dtype float64 --export False"
        return ["unlearn", method, str(world / run), "--model", str(world / "llama"), *sides.split(),
                *recipe.split(), *more]  # fmt: skip

    other = ["--alternative", str(world / "other.jsonl")]
    assert main(unlearn("dpo", "dpo", *other)) == 0
    assert command(2, unlearn("dpo", "dpo-2", *other)) == [0, 0]
    one, two = (
        [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("dpo", "dpo-2")
    )
    assert len(one) == len(two) > 1
    for step, again in zip(one, two):
        assert again["loss"] == pytest.approx(step["loss"], rel=1e-12)
        assert again["terms"] == pytest.approx(step["terms"], rel=1e-12)
    assert command(2, unlearn("dpo", "pieces", *other, *SHARD)) == [0, 0]
    assert numbers(world / "pieces", "loss", "terms") == numbers(world / "dpo-2", "loss", "terms")
    assert command(2, unlearn("orth_circuit_breakers", "orth"))[0] == 2
    assert "2 logical shards would part them" in capfd.readouterr().err
