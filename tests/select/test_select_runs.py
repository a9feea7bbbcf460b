"""`retrograd select` on real runs: every rule, control and kind of source, end to end; refusals."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import typing
from pathlib import Path

import pytest
import quiz
import tiny
import torch
import yaml
from selecting import ROWS, TAU
from torch import Tensor, tensor

from retrograd.cli import main
from retrograd.data.rows import Rows
from retrograd.durable import LOCK
from retrograd.runs.files import read_tensors
from retrograd.runs.lock import locked
from retrograd.select import weights as files
from retrograd.select.files import Stated, file_scores
from retrograd.select.places import places_of
from retrograd.select.rules import Weighing, weigh
from retrograd.settings.select import Control, Rule

MODEL = "model"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the same rows: by token with three queries, by document with one; and one on other rows."""
    folder = tmp_path_factory.mktemp("select")
    quiz.save(folder / MODEL)
    texts = tiny.sentences(14)
    texts[3] = ""  # no target: ids are unchanged
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "fewer.jsonl", texts[:9])
    tiny.save_jsonl(folder / "go.jsonl", tiny.sentences(2, seed=1))
    (folder / "stay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz.questions(3)))
    queries = {
        "go": {"dataset": str(folder / "go.jsonl"), "reduction": "none"},
        "stay": {"dataset": str(folder / "stay.jsonl"), "form": "cloze"},
        "gap": {"contrast": ["stay", "stay2"]}, "stay2": {"dataset": str(folder / "stay.jsonl"), "form": "letter"},
    }  # fmt: skip
    (folder / "queries.yaml").write_text(yaml.safe_dump(queries))
    assert magic(folder, "tokens", "train", "--query_file", str(folder / "queries.yaml"), "--attribute", "tokens") == 0
    one = ("--query.dataset", str(folder / "go.jsonl"))
    assert magic(folder, "documents", "train", *one) == 0
    assert magic(folder, "fewer", "fewer", *one, "--attribute", "tokens") == 0
    return folder


def magic(world: Path, run: str, data: str, *more: str) -> int:
    return main([
        "magic", str(world / run), "--model", str(world / MODEL), "--data.dataset", str(world / f"{data}.jsonl"),
        "--train.lr", "1e-2", "--train.batch_size", "7", "--train.eps_root", "1e-6", "--dtype", "float64", *more,
    ])  # fmt: skip


def call(world: Path, out: Path, scores: str, *more: str) -> int:
    return main(["select", str(out), "--scores", f"{world}/{scores}", *more])


def run_scores(world: Path, query: str) -> Tensor:
    return torch.load(world / "tokens/queries" / query / "scores.pt", weights_only=True).double()


def rows_of(world: Path, run: str = "tokens") -> Rows:
    from retrograd.runs.run_folder import open_run

    return open_run(world / run).loaded.rows


CONTROLS = [
    "random_count", "random_position", "random_class", "permuted_in_row", "sign_flipped", "retain_only",
    "gradient_norm", "gradient_cosine", "bm25", "keyword", "uniform",
]  # fmt: skip


def test_end_to_end_with_every_control(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.txt").write_text("cat\nred\n")
    out, against = tmp_path / "out", f"{world}/tokens:stay"
    more = ("--against", against, "--rule", "two_objective", "--alpha", "0.5", "--controls", *CONTROLS, "--keywords",
            str(tmp_path / "words.txt"), "--seeds", "2", "--original", "prediction")  # fmt: skip
    assert call(world, out, "tokens:go", *more) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "negative = proponent, training on it lowers the query's loss" in told
    assert "Selecting tokens is" in told
    rows = rows_of(world)
    go, stay = run_scores(world, "go").mean(-1), run_scores(world, "stay")
    mixed = go - 0.5 * stay
    found = files.read(out, rows)
    torch.testing.assert_close(found, (mixed / mixed.abs().sum() * rows.targets).float(), rtol=1e-5, atol=1e-7)
    info = json.loads((out / "info.json").read_text())
    assert info["scores"][0]["columns"] == 2
    assert info["scores"][0]["rows"] == "equal by hash"
    assert info["analysis"]["count"] == rows.targets == info["counts"]["real_tokens"]
    names = {path.name.split("-")[0] for path in (out / "controls").iterdir()}
    assert names == set(CONTROLS)
    assert (out / "controls/random_count-1").exists()
    for path in (out / "controls").iterdir():
        control = files.read(path, rows)
        if path.name == "uniform":
            assert control.sum() == rows.targets
        else:
            assert torch.equal(control.flatten().sort().values, found.flatten().sort().values), path.name
            assert not torch.equal(control, found), path.name
    theirs = torch.load(out / "original/per_token_scores.pt", weights_only=True)
    torch.testing.assert_close(theirs[:, :-1], go[:, 1:].float())
    saved = torch.load(out / "original/eval_grads.pt", weights_only=True)
    query = json.loads((world / "tokens/queries/go/query.json").read_text())
    assert saved["avg_loss"] == pytest.approx(sum(query["values_nats"]) / 2)
    stored = read_tensors(world / "tokens/queries/go/gradient.safetensors")[0]
    assert {f"gradient.{name}" for name in saved["param_grads"]} == stored.keys() - {"values"}
    for name, g in saved["param_grads"].items():
        torch.testing.assert_close(g, stored[f"gradient.{name}"].mean(0).float())
    before = (out / "weights.safetensors").read_bytes()
    assert call(world, out, "tokens:go", *more) == 0
    assert "is done" in " ".join(capsys.readouterr().out.split())
    assert (out / "weights.safetensors").read_bytes() == before
    assert call(world, out, "tokens:go", *more, "--rule", "value") == 2
    assert "rule: 'two_objective' → 'value'" in capsys.readouterr().err
    assert call(world, tmp_path / "again", "tokens:go", *more[:6]) == 0  # controls change no weight
    assert (tmp_path / "again/weights.safetensors").read_bytes() == before


def test_documents_end_to_end(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--against", f"{world}/tokens:stay", "--rule", "documents", "--k", "3", "--alpha", "0.1", "--use", "removal",
            "--controls", "random_count", "sign_flipped", "retain_only", "gradient_norm", "gradient_cosine",
            "bm25")  # fmt: skip
    assert call(world, out, "tokens:go/1", *more) == 0
    documents = torch.load(world / "tokens/doc_ids.pt", weights_only=True)
    go, stay = run_scores(world, "go")[..., 1], run_scores(world, "stay")
    strength = (-go).clamp_min(0) - 0.1 * (-stay).clamp_min(0)
    totals = torch.zeros(14, dtype=torch.float64).index_add_(0, documents.flatten(), strength.flatten())
    kept = sorted(totals.argsort(descending=True)[:3].tolist())
    assert files.documents(out) == kept
    rows = rows_of(world)
    found = files.read(out, rows, signed=False)
    assert float(found.sum()) == pytest.approx(rows.targets, rel=1e-6)
    assert {int(d) for d in documents[found > 0]} == set(kept)
    lines = (out / "documents.jsonl").read_text().splitlines()
    sources = (world / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(sources[one]) for one in kept]
    for path in (out / "controls").iterdir():
        assert len(files.documents(path)) == 3, path.name
    assert magic(world, f"{tmp_path}/kept", "train", "--data.dataset", str(out / "documents.jsonl"), "--query.dataset",
                 str(world / "go.jsonl")) == 0  # fmt: skip


def test_gradient_rivals_are_the_gradients(world: Path, tmp_path: Path) -> None:
    """Norms and cosines of tokens against plain autograd on the trained model's own loss."""
    from torch.nn.functional import cosine_similarity, cross_entropy

    from retrograd.runs.run_folder import open_run
    from retrograd.select.rivals import gradients, query_gradient

    run = open_run(world / "tokens")
    places = places_of(run.loaded.rows)
    found = gradients(run, places, query_gradient(run.folder, "stay", slice(0, 1))[1], by_document=False)
    summed = gradients(run, places, query_gradient(run.folder, "stay", slice(0, 1))[1], by_document=True)
    model, params = run.loaded.model.module, run.trajectory().train().params
    model.eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if name in params:
                leaf.copy_(params[name])
    live = {name: leaf for name, leaf in model.named_parameters() if name in params}
    query = torch.cat([query_gradient(run.folder, "stay", slice(0, 1))[1][name].flatten() for name in live])
    total: dict[int, Tensor] = {}
    for number in range(12):
        row, column = int(places.row[number]), int(places.column[number])
        ids = torch.from_numpy(run.loaded.rows.input_ids[row])[None]
        loss = cross_entropy(model(input_ids=ids).logits[0, column - 1], ids[0, column])
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(live.values()))]).double()
        assert float(found.norm[number]) == pytest.approx(float(flat.norm()), rel=1e-8)
        assert float(found.cosine[number]) == pytest.approx(float(cosine_similarity(flat, query, 0)), abs=1e-8)
        total[int(places.document[number])] = total.get(int(places.document[number]), 0) + flat
    first = int(places.document[0])
    assert int((places.document == first).sum()) <= 12
    assert float(summed.norm[0]) == pytest.approx(float(total[first].norm()), rel=1e-8)
    # for descent, what steps like the query's own gradient is a proponent: the most negative weight; norms have no sign
    assert (
        call(world, tmp_path / "out", "tokens:stay", "--controls", "gradient_cosine", "gradient_norm", "--seeds", "1")
        == 0
    )
    control = {
        path.name.split("-")[0]: places.gather(files.read(path, run.loaded.rows))
        for path in (tmp_path / "out/controls").iterdir()
    }
    for larger, weights in ((found.cosine, -control["gradient_cosine"]), (found.norm, control["gradient_norm"].abs())):
        surely = larger[:, None] > larger + 1e-12  # tokens in the same context are tied
        assert surely.sum() > len(places)
        assert (weights[:, None] >= weights)[surely].all()


def test_gradients_of_documents_that_span_rows(world: Path) -> None:
    from retrograd.runs.run_folder import open_run
    from retrograd.select.rivals import gradients, query_gradient

    assert magic(world, "packed", "fewer", "--query.dataset", str(world / "go.jsonl"), "--data.chunk_length", "7") == 0
    run = open_run(world / "packed")
    places, direction = places_of(run.loaded.rows), query_gradient(run.folder, "query", slice(0, 1))[1]
    spans = [document for document in places.present() if len(places.row[places.document == document].unique()) > 1]
    assert spans
    whole, parts = (gradients(run, places, direction, by_document=by) for by in (True, False))
    # ⟨Σ g, q⟩ = Σ ⟨g, q⟩
    along = places.per_document(parts.norm * parts.cosine)
    torch.testing.assert_close(whole.norm * whole.cosine, along, rtol=1e-8, atol=1e-10)


def test_scores_of_documents_end_to_end(world: Path, tmp_path: Path) -> None:
    assert call(world, tmp_path / "out", "documents", "--use", "removal") == 0
    scores = torch.load(world / "documents/scores.pt", weights_only=True).double()
    documents = torch.load(world / "tokens/doc_ids.pt", weights_only=True)
    rows = rows_of(world, "documents")
    mask = torch.zeros(len(rows), rows.max_length, dtype=torch.bool)
    for number, one in enumerate(rows.target_mask):
        mask[number, : len(one)] = torch.from_numpy(one)
    wanted = torch.where(mask, (-scores).clamp_min(0)[documents], torch.zeros((), dtype=torch.float64))
    found = files.read(tmp_path / "out", rows)
    torch.testing.assert_close(found, (wanted * rows.targets / wanted.sum()).float(), rtol=1e-5, atol=1e-7)
    names = {path.name.split("-")[0] for path in (tmp_path / "out/controls").iterdir()}
    assert names == {"random_count", "sign_flipped", "uniform"}


def test_statistics_ignore_padding(world: Path, tmp_path: Path) -> None:
    """The same tokens with more padding have the same weights: a longer row of another document only adds zeros."""
    places = places_of(ROWS)
    wide = torch.zeros(3, 50)
    wide[:, :4] = places.scatter(TAU)
    torch.save(wide, tmp_path / "wide.pt")
    tau = file_scores(tmp_path / "wide.pt", None, places, Stated("negative", "target"))[0]
    for rule in ("value", "rank", "top_q", "soft_sign"):
        assert torch.equal(weigh(Weighing(rule), places, tau, None), weigh(Weighing(rule), places, TAU, None))  # type: ignore[arg-type]


def test_means_of_queries_and_files_beside_runs(world: Path, tmp_path: Path) -> None:
    several = [
        "select",
        str(tmp_path / "mean"),
        "--scores",
        f"{world}/tokens:stay",
        f"{world}/tokens:stay2",
        "--controls",
    ]
    assert main(several) == 0
    mean = (run_scores(world, "stay") + run_scores(world, "stay2")) / 2
    rows = rows_of(world)
    wanted = (mean / mean.abs().sum() * rows.targets).float()
    torch.testing.assert_close(files.read(tmp_path / "mean", rows), wanted, rtol=1e-5, atol=1e-7)
    assert not (tmp_path / "mean/controls").exists()
    torch.save(-mean, tmp_path / "mine.pt")
    mine = ["select", str(tmp_path / "mine"), "--scores", str(tmp_path / "mine.pt"), "--rows", str(world / "tokens"),
            "--sign", "positive", "--alignment", "target", "--controls", "random_count"]  # fmt: skip
    assert main(mine) == 0
    assert torch.equal(files.read(tmp_path / "mine", rows), files.read(tmp_path / "mean", rows))
    table = ["select", str(tmp_path / "table"), "--scores", f"{world}/tokens/scores.parquet:score_stay", "--rows",
             str(world / "tokens"), "--controls"]  # fmt: skip
    assert main(table) == 0  # our own table says its sign and alignment
    stay = run_scores(world, "stay")
    wanted = (stay / stay.abs().sum() * rows.targets).float()
    torch.testing.assert_close(files.read(tmp_path / "table", rows), wanted, rtol=1e-5, atol=1e-7)
    settings = yaml.safe_load((world / "tokens/run_config.yaml").read_text())
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({name: settings[name] for name in ("model", "data")}))
    other = ["select", str(tmp_path / "yaml"), "--scores", str(tmp_path / "mine.pt"), "--rows",
             str(tmp_path / "rows.yaml"), "--sign", "positive", "--alignment", "target", "--controls"]  # fmt: skip
    assert main(other) == 0
    assert torch.equal(files.read(tmp_path / "yaml", rows), files.read(tmp_path / "mean", rows))


def test_a_query_that_was_added_later(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "documents", tmp_path / "run")
    assert main(["query", str(tmp_path / "run"), "--name", "late", "--query.dataset", str(world / "stay.jsonl"),
                 "--query.form", "cloze"]) == 0  # fmt: skip
    assert main(["select", str(tmp_path / "out"), "--scores", f"{tmp_path}/run:late", "--controls"]) == 0
    scores = torch.load(tmp_path / "run/queries/late/scores.pt", weights_only=True)
    documents = torch.load(world / "tokens/doc_ids.pt", weights_only=True)
    found = files.read(tmp_path / "out", rows_of(world, "documents"))
    there = found != 0
    assert torch.equal(found[there] > 0, scores[documents][there] > 0)
    torch.save(scores + 1, tmp_path / "run/queries/late/scores.pt")
    with pytest.raises(ValueError, match=r"it has changed since. Run again"):
        refuse("select", str(tmp_path / "two"), "--scores", f"{tmp_path}/run:late")


def refuse(*arguments: str) -> None:
    """Run the command, which has to fail as the user's fault, and raise what it says."""
    import os
    from unittest import mock

    assert main(list(arguments)) == 2
    with mock.patch.dict(os.environ, {"RETROGRAD_TRACEBACK": "1"}):
        main(list(arguments))


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "several queries": (("--scores", "W/tokens"), r"has several queries: .*Name one: .*tokens:"),
    "no such query": (("--scores", "W/tokens:none"), "has no query 'none'; it has"),
    "no such run": (("--scores", "W/nowhere:go"), "nothing exists at"),
    "no run": (("--scores", "W/model"), "scores from files do not say which rows they belong to"),
    "other folder": (("--scores", "W/model", "--rows", "W/tokens"), "is neither a run .* nor in the original layout"),
    "other rows": (
        ("--scores", "W/tokens:go", "--against", "W/fewer"),
        r"are of other rows \(hash \w+, 8 rows, \d+ targets\) than the data here \(hash \w+, 13 rows, \d+ targets\)",
    ),
    "mixed": (("--scores", "W/tokens:go", "W/documents"), r"scores of tokens and of documents do not mix"),
    "levels": (("--scores", "W/tokens:go", "--against", "W/documents"), "--scores are of tokens and --against of doc"),
    "sign of a run": (("--scores", "W/tokens:go", "--sign", "positive"), "its scores are negative for proponents"),
    "alignment of a run": (
        ("--scores", "W/tokens:go", "--against", "W/tokens:stay", "--against_alignment", "prediction"),
        "--against_sign or --against_alignment says otherwise",
    ),
    "against nothing": (("--scores", "W/tokens:go", "--against_sign", "negative"), "speak of --against, which names"),
    "no scores": (("--scores",), "--scores names nothing"),
    "paired": (("--scores", "W/tokens:go", "--rule", "selective"), "give the other one with --against"),
    "k": (("--scores", "W/tokens:go", "--k", "3"), "--k is for --rule documents, and the rule is value"),
    "too many": (("--scores", "W/documents", "--rule", "documents", "--k", "50"), "it keeps from 1 to 13 documents"),
    "q": (("--scores", "W/tokens:go", "--q", "0"), "--q is 0.0"),
    "alpha": (("--scores", "W/tokens:go", "--alpha", "nan"), "--alpha is nan"),
    "clip": (("--scores", "W/tokens:go", "--clip", "0"), "--clip is 0.0; it has to be above 0"),
    "seeds": (("--scores", "W/tokens:go", "--seeds", "0"), "--seeds is 0"),
    "original": (("--scores", "W/documents", "--original", "target"), "--original writes scores of tokens"),
    "retain only": (("--scores", "W/tokens:go", "--controls", "retain_only"), "give them with --against"),
    "keyword": (("--scores", "W/tokens:go", "--controls", "keyword"), "control keyword needs --keywords"),
    "no text": (("--scores", "W/tokens:gap", "--controls", "bm25"), "query 'gap' has no text for control bm25"),
    "positions": (
        ("--scores", "W/documents", "--controls", "permuted_in_row"), "here whole documents are weighed",
    ),
    "file rival": (
        ("--scores", "W/tokens/scores.parquet:score_stay", "--rows", "W/tokens", "--controls", "gradient_norm"),
        "need a trained model, and .* is a file",
    ),
    "not finite": (("--scores", "W/nan.pt", "--rows", "W/tokens", "--sign", "negative"), "2 of 13 scores of .* NaN"),
    "no rows": (("--scores", "W/nan.pt", "--rows", "W/queries.yaml"), "names settings that do not exist"),
    "half of rows": (("--scores", "W/nan.pt", "--rows", "W/half.yaml"), r"has to name `model` and `data: {dataset: …}`"),
    "no model": (("--scores", "W/nan.pt", "--rows", "W/bad.yaml"), "cannot load a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(world: Path, tmp_path: Path, case: str) -> None:
    torch.save(torch.full((14,), float("nan")).index_fill_(0, torch.arange(1, 14), 1.0).index_fill_(
        0, tensor([5]), float("nan")), world / "nan.pt")  # fmt: skip
    settings = yaml.safe_load((world / "tokens/run_config.yaml").read_text())
    (world / "bad.yaml").write_text(yaml.safe_dump({"model": str(world / "nothing.d"), "data": settings["data"]}))
    (world / "half.yaml").write_text(yaml.safe_dump({"model": str(world / MODEL)}))
    arguments, told = BAD[case]
    with pytest.raises(ValueError, match=told):
        refuse("select", str(tmp_path / "out"), *(one.replace("W/", f"{world}/") for one in arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_original_layout_gives_what_the_run_gave(world: Path, tmp_path: Path) -> None:
    """Weights and gradient controls of a written layout, read again with the run's rows and model."""
    controls = ("--controls", "gradient_cosine", "gradient_norm")
    assert call(world, tmp_path / "ours", "tokens:go", "--original", "prediction", *controls) == 0
    shutil.copytree(tmp_path / "ours/original", tmp_path / "theirs")
    again = ("select", str(tmp_path / "again"), "--scores", str(tmp_path / "theirs"), "--rows", str(world / "tokens"))
    assert main([*again, *controls]) == 0
    rows = rows_of(world)
    for name in (".", "controls/gradient_cosine-0", "controls/gradient_norm-1"):
        found, expected = (files.read(tmp_path / out / name, rows) for out in ("again", "ours"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    source = json.loads((tmp_path / "again/info.json").read_text())["scores"][0]
    saved = torch.load(tmp_path / "theirs/eval_grads.pt", weights_only=True)
    assert source["query_gradient"]["avg_loss"] == saved["avg_loss"]
    sharded = {name.replace(".weight", ".parametrizations.weight.original"): g
               for name, g in saved["param_grads"].items()}  # fmt: skip
    torch.save({**saved, "param_grads": sharded}, tmp_path / "theirs/eval_grads.pt")
    with pytest.raises(ValueError, match=r"was selected from .*eval_grads\.pt with SHA-256"):
        refuse(*again, *controls)
    renamed = (*again[:1], str(tmp_path / "renamed"), *again[2:])
    assert main([*renamed, *controls]) == 0
    same = "controls/gradient_cosine-0"
    assert torch.equal(files.read(tmp_path / "renamed" / same, rows), files.read(tmp_path / "again" / same, rows))
    first = next(iter(sharded))
    bad = {
        "one process's share of a sharded run": {**saved, "param_grads": {**sharded, first: sharded[first][:1]}},
        "is not finite": {**saved, "param_grads": {**sharded, first: sharded[first] * float("nan")}},
        "has no gradient of": {**saved, "param_grads": {}},
        "is not in the original layout": {"param_grads": sharded},
    }
    for message, content in bad.items():
        torch.save(content, tmp_path / "theirs/eval_grads.pt")
        with pytest.raises(ValueError, match=message):
            refuse("select", str(tmp_path / "bad"), *again[2:], *controls)
    (tmp_path / "theirs/eval_grads.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cannot read .*eval_grads\.pt"):
        refuse("select", str(tmp_path / "bad"), *again[2:], *controls)
    (tmp_path / "theirs/eval_grads.pt").unlink()
    with pytest.raises(ValueError, match=r"has no eval_grads\.pt"):
        refuse("select", str(tmp_path / "bad"), *again[2:], *controls)
    assert not (tmp_path / "bad").exists()


def test_two_writers_of_one_selection_do_not_meet(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out):
        with pytest.raises(ValueError, match="is in use by process"):
            refuse("select", str(out), "--scores", f"{world}/tokens:go")
        assert not {path.name for path in out.iterdir()} - {LOCK}
    assert call(world, out, "tokens:go") == 0
    assert not (out / LOCK).exists()
    info = (out / "info.json").read_bytes()

    def finish(*_: object) -> None:  # another process writes it while this one reads
        shutil.copytree(out, tmp_path / "late", dirs_exist_ok=True)

    from retrograd.commands import select as module

    with pytest.MonkeyPatch.context() as patch:
        arms = module.Arms
        patch.setattr(module, "Arms", lambda *given: (finish(), arms(*given))[1])
        patch.setattr(module, "_write", lambda *_: pytest.fail("written twice"))
        assert call(world, tmp_path / "late", "tokens:go") == 0
    assert (tmp_path / "late/info.json").read_bytes() == info


def test_what_a_killed_call_left_is_written_again(world: Path, tmp_path: Path) -> None:
    arguments = ("tokens:go", "--controls", "random_count", "--seeds", "2", "--original", "target")
    assert call(world, tmp_path / "whole", *arguments) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/info.json").unlink()  # it comes last
    (tmp_path / "cut/controls/random_count-0/weights.safetensors").write_bytes(b"half")
    (tmp_path / "cut/.weights.safetensors.12-0123abcd.tmp").write_bytes(b"half")
    assert call(world, tmp_path / "cut", *arguments) == 0
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path


def test_code_that_a_run_names_is_run_when_trusted(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "fewer", tmp_path / "run")
    (tmp_path / "mine.py").write_text(
        'def total(model, tokenizer):\n    return model(input_ids=tokenizer("cat", return_tensors="pt")["input_ids"]).logits.square().mean()\n'
    )
    asked = ("--name", "mine", "--query.function", f"{tmp_path}/mine.py:total")
    assert main(["query", str(tmp_path / "run"), *asked]) == 0
    arguments = ("select", str(tmp_path / "out"), "--scores", f"{tmp_path}/run:mine", "--controls", "gradient_cosine")
    with pytest.raises(ValueError, match="--trust_code"):
        refuse(*arguments)
    assert main([*arguments, "--trust_code"]) == 0


def test_folders_that_hold_something_else(world: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no selection"):
        refuse("select", str(tmp_path / "other"), "--scores", f"{world}/tokens:go")
    shutil.copytree(world / "documents", tmp_path / "run")
    arguments = ("select", str(tmp_path / "out"), "--scores", str(tmp_path / "run"), "--controls")
    assert main(list(arguments)) == 0
    scores = torch.load(tmp_path / "run/scores.pt", weights_only=True)
    torch.save(scores * 2, tmp_path / "run/scores.pt")
    with pytest.raises(ValueError, match=r"was selected from .* with SHA-256"):
        refuse(*arguments)
    with pytest.raises(ValueError, match=r"it has changed since. Run again"):
        refuse("select", str(tmp_path / "two"), *arguments[2:])


def test_the_commands_of_the_page_are_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `retrograd select` of docs/select.md has settings that exist and go together."""
    from retrograd.cli import _parse
    from retrograd.commands.select import _check
    from retrograd.settings.select import SelectConfig

    text = (Path(__file__).parents[2] / "docs/select.md").read_text(encoding="utf8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    calls = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    selections = [_parse("select", one[2:]) for one in calls if one[1] == "select"]
    assert len(selections) == 5
    for config in selections:
        assert isinstance(config, SelectConfig)
        _check(config)
    named = set(re.findall(r"^\| `([a-z_0-9]+)`", text, re.MULTILINE)) | set(re.findall(r"`([a-z_]+)`", text))
    assert named >= {*typing.get_args(Rule), *typing.get_args(Control)}
