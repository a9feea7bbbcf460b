"""Data sets in every format, and their rows: what stands where, which document each target belongs to, what is refused.

The guards named in the tests were failures of released tools: a packed document's first token charged to its
predecessor, loss averaged over positions that are no targets, an artefact reused after its source changed.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from retrograd.data.documents import load_documents
from retrograd.data.rows import Rows, build_rows, pad

BOS, EOS = 1, 2
WORDS = ["<unk>", "<s>", "</s>", "user", "bot", *"abcdefghij"]
CHAT = "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
CHAT += "{{ m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def tokenizer(bos: bool = False, eos: bool = True, chat: bool = False, longest: int = 1000) -> PreTrainedTokenizerFast:
    """One token per word: a is 5, b is 6, ..."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    named = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_max_length=longest, **named)
    fast.chat_template = CHAT if chat else None
    return fast


def of(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)


def lists(arrays: list[np.ndarray]) -> list[list[Any]]:
    return [array.tolist() for array in arrays]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# --- sources ---------------------------------------------------------------------------------------------------------

TEXTS = [f"document {i}" for i in range(20)]
TESTS = [f"question {i}" for i in range(10)]


def write_saved(folder: Path) -> Path:
    DatasetDict({"train": of(text=TEXTS), "test": of(text=TESTS)}).save_to_disk(str(folder))
    return folder


def write_files(folder: Path, suffix: str) -> Path:
    folder.mkdir()
    for split, texts in (("train", TEXTS), ("test", TESTS)):
        write_file(folder / f"{split}{suffix}", texts)
    return folder


def write_file(path: Path, texts: list[str]) -> Path:
    documents = of(text=texts)
    if path.suffix == ".jsonl":
        documents.to_json(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=1))
    elif path.suffix in (".csv", ".tsv"):
        documents.to_csv(str(path), sep="\t" if path.suffix == ".tsv" else ",", index=False)
    elif path.suffix == ".parquet":
        documents.to_parquet(str(path))
    else:
        path.write_text("\n".join(texts) + "\n")
    return path


SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]
SLICES = [("train", TEXTS), ("train[:8]", TEXTS[:8]), ("train[10%:20%]", TEXTS[2:4]), ("train[-3:]", TEXTS[-3:])]


@pytest.mark.parametrize("kind", ["saved", *SUFFIXES])
def test_split_expressions_on_every_folder(tmp_path: Path, kind: str) -> None:
    source = write_saved(tmp_path / "saved") if kind == "saved" else write_files(tmp_path / "folder", kind)
    for split, expected in [*SLICES, ("test", TESTS), ("train[:4]+test[:4]", TEXTS[:4] + TESTS[:4])]:
        assert load_documents(str(source), split=split)["text"][:] == expected


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_split_expressions_on_every_file(tmp_path: Path, suffix: str) -> None:
    source = write_file(tmp_path / f"documents{suffix}", TEXTS)
    for split, expected in [*SLICES, ("train[:2]+train[5:6]", [*TEXTS[:2], TEXTS[5]])]:
        assert load_documents(str(source), split=split)["text"][:] == expected


def test_a_single_saved_dataset_has_its_own_split_or_train(tmp_path: Path) -> None:
    plain, named, sliced = (of(text=TEXTS) for _ in range(3))
    plain.save_to_disk(str(tmp_path / "plain"))
    Dataset(named.data, split=datasets.Split("test")).save_to_disk(str(tmp_path / "named"))
    Dataset(sliced.data, split=datasets.Split("test[:20]")).save_to_disk(str(tmp_path / "sliced"))
    assert load_documents(str(tmp_path / "plain"), split="train[:3]")["text"][:] == TEXTS[:3]
    assert load_documents(str(tmp_path / "named"), split="test[50%:]")["text"][:] == TEXTS[10:]
    assert load_documents(str(tmp_path / "sliced"), split="test[:3]")["text"][:] == TEXTS[:3]
    with pytest.raises(ValueError, match=r'Unknown split "train".*Splits there: test\.'):
        load_documents(str(tmp_path / "named"))


def test_limit_takes_the_first(tmp_path: Path) -> None:
    source = str(write_file(tmp_path / "d.jsonl", TEXTS))
    assert load_documents(source, limit=3)["text"][:] == TEXTS[:3]
    assert load_documents(source, split="train[5:]", limit=1)["text"][:] == TEXTS[5:6]
    assert len(load_documents(source, limit=1000)) == 20
    with pytest.raises(ValueError, match="limit is 0"):
        load_documents(source, limit=0)


def test_shards_of_a_folder_follow_each_other_in_order_of_name(tmp_path: Path) -> None:
    for shard in (2, 0, 1):
        jsonl(tmp_path / f"part-{shard}.jsonl", TEXTS[shard * 5 : shard * 5 + 5])
    assert load_documents(str(tmp_path))["text"][:] == TEXTS[:15]


def test_blank_lines_of_text_keep_document_ids(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a b\n\n   \nc d\n")
    documents = load_documents(str(tmp_path / "d.txt"))
    assert documents["text"][:] == ["a b", "", "   ", "c d"]
    rows = build_rows(documents, tokenizer())
    assert rows.skipped == {1: "blank", 2: "blank"}
    assert [ids[0] for ids in rows.doc_ids] == [0, 3]


def test_csv_keeps_every_document_as_written(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('text,n\nNA,1\n007,2\n"one, two",3\nnull,4\n"",5\n')
    assert load_documents(str(tmp_path / "d.csv"))["text"][:] == ["NA", "007", "one, two", "null", ""]


def test_chat_logs_are_not_merged_into_one_document_per_file(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}]
    log = {"id": "x", "source": "y", "model": "z", "system_prompt": "s", "messages": chat}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(log | {"id": str(i)}) + "\n" for i in range(3)))
    assert load_documents(str(tmp_path / "d.jsonl"))["id"][:] == ["0", "1", "2"]


@pytest.mark.parametrize("folder", [False, True])
def test_stale_cache_same_path_size_and_time_but_other_bytes(tmp_path: Path, folder: bool) -> None:
    file = jsonl(tmp_path / "train.jsonl", ["old one", "old two"])
    before = file.stat()
    source = str(tmp_path if folder else file)
    assert load_documents(source)["text"][:] == ["old one", "old two"]
    jsonl(file, ["new one", "new two"])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert load_documents(source)["text"][:] == ["new one", "new two"]


def test_names_with_wildcards_and_links_are_plain_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "a1.jsonl", ["wrong"])
    file = jsonl(tmp_path / "a[1].jsonl", ["right"])
    assert load_documents(str(file))["text"][:] == ["right"]
    (tmp_path / "blob").write_text('{"text": "linked"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "blob")
    assert load_documents(str(tmp_path / "link.jsonl"))["text"][:] == ["linked"]


def test_home_is_expanded_and_a_local_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_saved(tmp_path / "owner" / "name")
    assert len(load_documents("~/owner/name")) == len(load_documents("owner/name")) == 20


def test_nothing_is_printed_and_settings_are_restored(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    datasets.logging.set_verbosity_warning()
    datasets.enable_progress_bars()
    load_documents(str(write_file(tmp_path / "good.jsonl", TEXTS)))
    capfd.readouterr()  # writing the file shows a bar
    load_documents(str(jsonl(tmp_path / "better.jsonl", TEXTS)))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2"):
        load_documents(str(tmp_path / "bad.jsonl"))
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")
    assert logging.getLogger("datasets").level == logging.WARNING
    assert not datasets.are_progress_bars_disabled()


def test_importing_the_loader_is_light() -> None:
    code = "import retrograd.data.documents, sys; print({'transformers', 'datasets', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- what the loader refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gone.jsonl", "./gone", "/no/where", "~/gone", "a/b/c", "some folder"])
def test_a_missing_local_path(source: str) -> None:
    with pytest.raises(ValueError, match="looks like a local path, and nothing exists there"):
        load_documents(source)


def test_hub_failures_name_the_source_and_the_next_move(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_with(error: Exception) -> None:
        def load_dataset(*args: Any, **options: Any) -> None:
            assert (args, options) == (("owner/name", "sub"), {"split": "train[:2]"})
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    fails_with(ConnectionError("Couldn't reach 'owner/name' on the Hub"))
    with pytest.raises(
        ValueError, match=r"'owner/name'.*Check the spelling and the network, or give a local"
    ) as caught:
        load_documents("owner/name", split="train[:2]", subset="sub")
    assert isinstance(caught.value.__cause__, ConnectionError)
    fails_with(ValueError("BuilderConfig 'sub' not found. Available: ['en', 'fr']"))
    with pytest.raises(ValueError, match=r"choose another subset.*'en', 'fr'"):
        load_documents("owner/name", split="train[:2]", subset="sub")
    fails_with(ValueError("""Unknown split "train". Should be one of ['test']."""))
    with pytest.raises(ValueError, match=r"choose another split.*'test'"):
        load_documents("owner/name", split="train[:2]", subset="sub")


def test_unknown_splits_and_expressions(tmp_path: Path) -> None:
    for source in (write_saved(tmp_path / "saved"), write_files(tmp_path / "files", ".jsonl")):
        with pytest.raises(ValueError, match=r"Unknown split .dev.*Splits there: train, test"):
            load_documents(str(source), split="train+dev[:3]")
        with pytest.raises(ValueError, match=r"split 'train\[3' of .*Unrecognized instruction"):
            load_documents(str(source), split="train[3")
        with pytest.raises(ValueError, match="rounding"):
            load_documents(str(source), split="train[:4%](up)")


def test_unknown_subsets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subset 'en' of folder .*not found. Available: \['default'\]"):
        load_documents(str(write_files(tmp_path / "files", ".jsonl")), subset="en")
    for source in (write_saved(tmp_path / "saved"), jsonl(tmp_path / "d.jsonl", TEXTS)):
        with pytest.raises(ValueError, match=r"subset 'en': .* has no subsets"):
            load_documents(str(source), subset="en")


def test_subsets_declared_by_a_folder(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: fr\n  data_files: fr.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    for name in ("en", "fr"):
        jsonl(tmp_path / f"{name}.jsonl", [name])
    assert load_documents(str(tmp_path), subset="fr")["text"][:] == ["fr"]
    with pytest.raises(ValueError, match=r"subset None of folder .*'en', 'fr'"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_empty_files(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"d{suffix}").write_text("")
    with pytest.raises(ValueError, match="is empty: 0 documents"):
        load_documents(str(tmp_path / f"d{suffix}"))


def test_empty_splits_and_data_sets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'train\[5:5\]' of .* is empty"):
        load_documents(str(jsonl(tmp_path / "d.jsonl", TEXTS)), split="train[5:5]")
    DatasetDict({"train": of(text=TEXTS), "test": of(text=[])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"cannot be read: empty, or damaged\. Save it again"):
        load_documents(str(tmp_path / "saved"), split="test")
    assert len(load_documents(str(tmp_path / "saved"))) == 20  # an unused split is not read


def test_an_empty_shard_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "part-0.jsonl").write_text("")
    jsonl(tmp_path / "part-1.jsonl", TEXTS)
    assert load_documents(str(tmp_path))["text"][:] == TEXTS


def test_malformed_json_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"\n{"text": "d"}\n')
    with pytest.raises(ValueError, match=r"cannot read d.jsonl in .*d.jsonl, line 3 is not valid JSON"):
        load_documents(str(tmp_path / "d.jsonl"))
    jsonl(tmp_path / "c.jsonl", TEXTS)
    with pytest.raises(
        ValueError, match=r"cannot read c.jsonl … d.jsonl \(2 files\) in .*d.jsonl, line 3 is not valid"
    ):
        load_documents(str(tmp_path))
    (tmp_path / "d.json").write_text('[{"text": "a"}, {"text": ]\n')
    with pytest.raises(ValueError, match=r"d.json, line 1 is not valid JSON: Expecting value.*column 26"):
        load_documents(str(tmp_path / "d.json"))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"cannot read d.parquet in .*: Arrow"):
        load_documents(str(tmp_path / "d.parquet"))
    (tmp_path / "d.csv").write_text("id,text\n1,hello, world\n")
    with pytest.raises(ValueError, match=r"cannot read d.csv.*line 2 has more fields than the header"):
        load_documents(str(tmp_path / "d.csv"))
    (tmp_path / "d.doc").write_text("hello")
    with pytest.raises(ValueError, match=r"d.doc is of no known kind; documents come from .jsonl"):
        load_documents(str(tmp_path / "d.doc"))
    folder = write_saved(tmp_path / "saved")
    (folder / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be read: empty, or damaged\. Save it again"):
        load_documents(str(folder))


def test_folders_without_usable_files(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no data files; put .jsonl"):
        load_documents(str(tmp_path / "none"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "page.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"holds page.xml; documents come from .jsonl"):
        load_documents(str(tmp_path / "other"))
    (tmp_path / "mixed").mkdir()
    for name in ("a.csv", "b.tsv"):
        write_file(tmp_path / "mixed" / name, TEXTS)
    with pytest.raises(ValueError, match=r"one split mixes a.csv and b.tsv"):
        load_documents(str(tmp_path / "mixed"))


def test_files_of_no_split_are_left_out_with_a_warning(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", TEXTS)
    jsonl(tmp_path / "more.jsonl", TESTS)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.warns(UserWarning, match=r"2 data files belong to no split and are left out \(more.jsonl first\)"):
        assert len(load_documents(str(tmp_path))) == 20


def test_parts_with_other_columns_join_and_who_reads_them_says_what_does_not_fit(tmp_path: Path) -> None:
    parts = {"train": of(text=["a b"], label=["x"], n=[1]), "test": of(text=["c d"], label=[0.5]), "bad": of(text=[1])}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    joined = load_documents(str(tmp_path / "saved"), split="test+train")
    assert (joined["text"][:], joined["label"][:], joined["n"][:]) == (["c d", "a b"], [0.5, "x"], [None, 1])
    assert lists(build_rows(joined, tokenizer()).input_ids) == [[7, 8], [5, 6]]
    with pytest.raises(ValueError, match="document 1 is int '1', not text"):
        build_rows(load_documents(str(tmp_path / "saved"), split="train+bad"), tokenizer())


def test_parts_whose_values_have_no_common_form_do_not_join(tmp_path: Path) -> None:
    parts = {"train": of(text=["a"], at=["now"]), "test": of(text=["b"], at=[datetime.datetime(1945, 5, 8)])}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="its parts have different columns"):
        load_documents(str(tmp_path / "saved"), split="train+test")
    assert len(load_documents(str(tmp_path / "saved"))) == 1


# --- rows: one document each -----------------------------------------------------------------------------------------


def test_plain_text_has_default_special_tokens_and_no_eos() -> None:
    rows = build_rows(of(text=["a b", "c d e"]), tokenizer(bos=True))
    assert lists(rows.input_ids) == [[BOS, 5, 6], [BOS, 7, 8, 9]]
    assert lists(rows.target_mask) == [[False, True, True], [False, True, True, True]]
    assert lists(rows.doc_ids) == [[0] * 3, [1] * 4]
    assert (len(rows), rows.documents, rows.targets, rows.max_length, rows.packed) == (2, 2, 5, 4, False)
    assert rows.lengths.tolist() == [3, 4]
    assert {array.dtype for array in rows.input_ids + rows.doc_ids} == {np.dtype(np.int64)}
    assert {array.dtype for array in rows.target_mask} == {np.dtype(bool)}


def test_one_token_documents_keep_ids() -> None:
    rows = build_rows(of(text=["a", "b c", None, " \n", "d", "e f g"]), tokenizer())
    assert rows.skipped == {0: "one token", 2: "blank", 3: "blank", 4: "one token"}
    assert lists(rows.input_ids) == [[6, 7], [9, 10, 11]]
    assert lists(rows.doc_ids) == [[1, 1], [5, 5, 5]]
    assert rows.documents == 6


def test_ids_are_right_across_tokeniser_batches() -> None:
    texts = [["a b", "", "c d e"][i % 3] for i in range(2500)]
    rows = build_rows(of(text=texts), tokenizer())
    assert [ids[0] for ids in rows.doc_ids] == [i for i in range(2500) if i % 3 != 1]
    assert all(len(ids) == (2 if documents[0] % 3 == 0 else 3) for ids, documents in zip(rows.input_ids, rows.doc_ids))


def test_min_chars_counts_raw_characters() -> None:
    rows = build_rows(of(text=["a b", "a b  ", "c d e f"]), tokenizer(), min_chars=5)
    assert rows.skipped == {0: "shorter than min_chars=5"}
    rows = build_rows(of(prompt=["a", "a b"], completion=["b", "c d"]), tokenizer(), min_chars=5)
    assert rows.skipped == {0: "shorter than min_chars=5"}
    rows = build_rows(of(input_ids=[[5, 6]]), None, min_chars=5)
    assert rows.skipped == {}


def test_max_length_cuts_and_counts() -> None:
    rows = build_rows(of(text=["a b c d", "a b", "a b c"]), tokenizer(), max_length=2)
    assert lists(rows.input_ids) == [[5, 6]] * 3
    assert rows.truncated == 2
    assert build_rows(of(text=["a b"]), tokenizer(), max_length=2).truncated == 0


def test_another_text_column() -> None:
    documents = of(input_ids=[[5, 6]], text=["a b"], body=["c d"])
    assert lists(build_rows(documents, tokenizer(), text_column="body").input_ids) == [[7, 8]]
    assert lists(build_rows(documents, tokenizer()).input_ids) == [[5, 6]]


def test_tokenizers_saved_with_truncation_and_padding_do_neither(tmp_path: Path) -> None:
    saved = tokenizer()
    saved.backend_tokenizer.enable_truncation(2)
    saved.backend_tokenizer.enable_padding(length=8)
    saved.save_pretrained(str(tmp_path))
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert lists(build_rows(of(text=["a b c", "a b"]), loaded).input_ids) == [[5, 6, 7], [5, 6]]


def test_long_documents_do_not_warn(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    short = tokenizer(chat=True, longest=2)
    short(["a b c"])
    assert "longer than" in caplog.text  # the warning this test is about
    caplog.clear()
    for short in (tokenizer(longest=2), tokenizer(chat=True, longest=2)):
        build_rows(of(text=["a b c"]), short)
        build_rows(of(prompt=["a b c"], completion=["a b c"]), short)
    build_rows(of(messages=[[{"role": "user", "content": "a b c"}]]), tokenizer(chat=True, longest=2))
    assert caplog.text == ""


def test_formatted_data_sets_read_the_same() -> None:
    plain = of(input_ids=[[5, 6], [7, 8]], n=[1, 2])
    shown = plain.with_format("torch", columns=["n"])
    assert build_rows(shown, None).digest() == build_rows(plain, None).digest()


# --- rows: tokens, completions, chats --------------------------------------------------------------------------------


def test_pretokenised_labels_mark_targets() -> None:
    documents = of(
        input_ids=[[5, 6, 7], [8, 9], [5, 6], [], None], labels=[[-100, -100, 7], [8, -100], [5, 6], [], None]
    )
    rows = build_rows(documents, None)
    assert rows.skipped == {1: "masked", 3: "blank", 4: "blank"}
    assert lists(rows.input_ids) == [[5, 6, 7], [5, 6]]
    assert lists(rows.target_mask) == [[False, False, True], [False, True]]
    assert lists(rows.doc_ids) == [[0] * 3, [2] * 2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [8, -100]]},
            "document 1: label 8 at token 0, where .* has 7",
        ),
        ({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [7]]}, r"document 1: labels of shape \(1,\) for .*\(2,\)"),
        ({"input_ids": [[5, 6]], "labels": [1]}, r"document 0: labels of shape \(\)"),
        ({"input_ids": [[5, 6], [7, None]]}, "document 1: input_ids must be a list of integers"),
        ({"input_ids": [[0.5, 6.0]]}, "document 0: input_ids must be a list of integers"),
        ({"input_ids": [5, 6]}, "document 0: input_ids must be a list of integers, not 5"),
        ({"input_ids": [[5, 6, 0]], "attention_mask": [[1, 1, 0]]}, "document 0: attention_mask hides some"),
    ],
)
def test_pretokenised_columns_that_do_not_fit(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_rows(of(**columns), None)


def test_an_attention_mask_of_ones_is_fine() -> None:
    assert len(build_rows(of(input_ids=[[5, 6]], attention_mask=[[1, 1]]), None)) == 1


def test_loss_on_completions_only() -> None:
    rows = build_rows(of(prompt=["a b", "", None], completion=[" c d", "e", "f"]), tokenizer(bos=True))
    assert lists(rows.input_ids) == [[BOS, 5, 6, 7, 8, EOS], [BOS, 9, EOS], [BOS, 10, EOS]]
    assert lists(rows.target_mask) == [[False] * 3 + [True] * 3, [False, True, True], [False, True, True]]
    rows = build_rows(of(prompt=["a "], completion=["c"]), tokenizer(eos=False))
    assert lists(rows.input_ids) == [[5, 7]]


def test_completions_without_context_or_content() -> None:
    rows = build_rows(of(prompt=["", "a", "a", "a"], completion=["b", None, " ", " b"]), tokenizer())
    assert rows.skipped == {1: "blank", 2: "blank"}
    assert lists(rows.target_mask) == [
        [False, True],
        [False, True, True],
    ]  # without BOS nothing precedes the first word


def test_a_completion_cut_away_is_skipped_not_trained_on_its_prompt() -> None:
    rows = build_rows(of(prompt=["a b c", "a b", "a"], completion=[" d", " d e", " d"]), tokenizer(), max_length=3)
    assert rows.skipped == {0: "masked"}
    assert lists(rows.input_ids) == [[5, 6, 8], [5, 8, EOS]]
    assert lists(rows.target_mask) == [[False, False, True], [False, True, True]]
    assert rows.truncated == 2


def test_chats_through_the_template() -> None:
    chats: list[Any] = [
        [{"role": "user", "content": "a"}, {"role": "bot", "content": "b c"}],
        [],
        None,
        [{"role": "user", "content": "d e"}],
    ]
    chatty = tokenizer(chat=True, bos=True)
    rows = build_rows(of(messages=chats, text=["a b"] * 4), chatty)
    assert rows.skipped == {1: "blank", 2: "blank"}
    assert lists(rows.input_ids) == [[3, 5, EOS, 4, 6, 7, EOS], [3, 8, 9, EOS]]
    encoded: Any = chatty.apply_chat_template(chats[0], tokenize=True)
    assert rows.input_ids[0].tolist() == encoded["input_ids"]
    assert lists(rows.doc_ids) == [[0] * 7, [3] * 4]


def test_a_chat_the_template_refuses_is_named() -> None:
    good, bad = [{"role": "user", "content": "a"}], [{"role": "bad", "content": "a"}]
    with pytest.raises(ValueError, match="document 2: the chat template refuses it: no such role"):
        build_rows(of(messages=[good, [], bad]), tokenizer(chat=True))
    with pytest.raises(ValueError, match="document 0 is str 'a chat as text', not a list of messages"):
        build_rows(of(messages=["a chat as text"]), tokenizer(chat=True))


# --- rows: packed ----------------------------------------------------------------------------------------------------


def test_packed_tokens_belong_to_their_own_document() -> None:
    rows = build_rows(of(text=["a b", "", "c", "d e f g h"]), tokenizer(), chunk_length=5)
    assert lists(rows.input_ids) == [[5, 6, EOS, 7, EOS], [8, 9, 10, 11, 12]]
    assert lists(rows.doc_ids) == [[0, 0, 0, 2, 2], [3, 3, 3, 3, 3]]
    # a document's first token is no target: nobody's context precedes it, least of all its predecessor's
    assert lists(rows.target_mask) == [[False, True, True, False, True], [False, True, True, True, True]]
    assert rows.skipped == {1: "blank"}
    assert (rows.packed, rows.documents, rows.skipped_chunks) == (True, 4, 1)  # the last chunk is a lone EOS


def test_packed_documents_continue_and_the_short_last_chunk_stays() -> None:
    rows = build_rows(of(text=["a b c", "d e"]), tokenizer(), chunk_length=3)
    assert lists(rows.input_ids) == [[5, 6, 7], [EOS, 8, 9]]
    assert rows.skipped_chunks == 1  # [EOS]
    rows = build_rows(of(text=["a b c", "d e f"]), tokenizer(), chunk_length=3)
    assert lists(rows.input_ids) == [[5, 6, 7], [EOS, 8, 9], [10, EOS]]
    assert lists(rows.doc_ids) == [[0, 0, 0], [0, 1, 1], [1, 1]]
    # EOS of document 0 opens the second chunk, so its context is gone
    assert lists(rows.target_mask) == [[False, True, True], [False, False, True], [False, True]]


def test_packed_one_token_documents_have_their_eos_as_target() -> None:
    rows = build_rows(of(text=["a", "b"]), tokenizer(), chunk_length=8)
    assert lists(rows.target_mask) == [[False, True, False, True]]
    assert rows.skipped == {}


def test_chunks_without_a_target_are_counted() -> None:
    documents = of(input_ids=[[5, 6, 7, 8, 9], [5, 6]], labels=[[5, 6, -100, -100, 9], [-100, -100]])
    rows = build_rows(documents, tokenizer(), chunk_length=2)
    assert lists(rows.input_ids) == [[5, 6], [9, EOS]]
    assert rows.skipped_chunks == 1
    assert rows.skipped == {1: "masked"}  # an added EOS does not undo the user's mask
    with pytest.raises(
        ValueError, match=r"no valid target in any of 1 documents \(none skipped; chunks without .*: 2\)"
    ):
        build_rows(of(input_ids=[[5, 6, EOS]], labels=[[-100, -100, EOS]]), tokenizer(), chunk_length=2)


def test_packing_adds_no_second_eos() -> None:
    rows = build_rows(of(input_ids=[[5, EOS], [6, 7], [EOS]]), tokenizer(), chunk_length=9)
    assert lists(rows.input_ids) == [[5, EOS, 6, 7, EOS]]
    assert rows.skipped == {2: "one token"}
    rows = build_rows(of(prompt=["a "], completion=["b"]), tokenizer(), chunk_length=9)
    assert lists(rows.input_ids) == [[5, 6, EOS]]
    assert lists(rows.target_mask) == [[False, True, True]]


def test_packing_loses_no_token_and_no_target_but_the_cut_ones() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), size=rng.integers(1, 30))) for _ in range(200)]
    whole, packed = (build_rows(of(text=texts), tokenizer(), chunk_length=length) for length in (10**6, 16))
    assert np.array_equal(np.concatenate(packed.input_ids), whole.input_ids[0][: packed.lengths.sum()])
    assert packed.skipped_chunks <= 1
    assert set(packed.lengths[:-1]) == {16}
    cut = sum(whole.doc_ids[0][k] == whole.doc_ids[0][k - 1] for k in range(16, whole.max_length, 16))
    assert whole.targets - packed.targets == cut


# --- what rows refuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a b"]}, {"max_length": 4, "chunk_length": 4}, "max_length=4 and chunk_length=4.*give one of them"),
        ({"text": ["a b"]}, {"max_length": 1}, "max_length is 1; a row needs at least 2 tokens"),
        ({"text": ["a b"]}, {"chunk_length": 0}, "chunk_length is 0; a row needs at least 2 tokens"),
        ({"text": ["a b"], "n": [1]}, {"text_column": "body"}, "no column 'body'; the data set has text, n"),
        (
            {"body": ["a b"], "n": [1]},
            {},
            "no column to read among body, n;.*prompt and completion, or text.*text_column",
        ),
        ({"prompt": ["a b"]}, {}, "no column to read among prompt"),
        ({"text": ["a b"], "n": [1]}, {"text_column": "n"}, "document 0 is int '1', not text"),
        ({"prompt": [["a"]], "completion": ["b"]}, {}, "document 0 is list .*, not text"),
        ({"messages": [[{"role": "user", "content": "a"}]]}, {}, "has no chat_template: set one"),
        ({"text": ["a b", "c j"]}, {"vocab_size": 14}, "document 1 has token id 14, outside the vocabulary of 14"),
        ({"input_ids": [[5, 6], [7, -1]]}, {}, "document 1 has token id -1, outside the vocabulary: data set"),
        (
            {"input_ids": [[5, 6], [7, 99]]},
            {"vocab_size": 99},
            "document 1 has token id 99, outside the vocabulary of 99",
        ),
        (
            {"text": ["a", "", " ", "b c"]},
            {"min_chars": 9},
            r"any of 4 documents \(shorter than min_chars=9: 2, blank: 2;",
        ),
        ({"text": ["a", ""]}, {"chunk_length": None}, r"any of 2 documents \(one token: 1, blank: 1;"),
        ({"text": ["", None]}, {"chunk_length": 4}, r"any of 2 documents \(blank: 2;"),
    ],
)
def test_refusals(columns: dict[str, list[Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_rows(of(**columns), tokenizer(), **options)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": [None] * 1500 + [3]},
        {"input_ids": [[5, 6]] * 1500 + [[5, -6]]},
        {"input_ids": [[5, 6]] * 1500 + [[5, 6]], "labels": [[5, 6]] * 1500 + [[5, 7]]},
        {"prompt": ["a"] * 1501, "completion": [None] * 1500 + [3]},
        {"messages": [[{"role": "user", "content": "a"}]] * 1500 + [[{"role": "bad", "content": "a"}]]},
    ],
)
def test_documents_are_named_right_after_the_first_batch(columns: dict[str, list[Any]]) -> None:
    with pytest.raises(ValueError, match="document 1500"):
        build_rows(of(**columns), tokenizer(chat=True))


def test_tokenizers_that_do_not_suffice() -> None:
    with pytest.raises(ValueError, match="column 'text' needs a tokenizer; only input_ids can do without"):
        build_rows(of(text=["a b"]), None)
    with pytest.raises(ValueError, match="there is no tokenizer to say which"):
        build_rows(of(input_ids=[[5, 6]]), None, chunk_length=4)
    with pytest.raises(ValueError, match="the tokenizer has no eos_token: set it"):
        build_rows(of(text=["a b"]), tokenizer(eos=False), chunk_length=4)


# --- digests and batches ---------------------------------------------------------------------------------------------

DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def test_digest_changes_with_any_token_mask_document_or_boundary() -> None:
    def digest(ids: list[list[int]], labels: list[list[int]] | None = None, **options: Any) -> str:
        columns = {"input_ids": ids} | ({} if labels is None else {"labels": labels})
        return build_rows(of(**columns), tokenizer(), **options).digest()

    seen = [digest(DOCUMENTS), digest(DOCUMENTS, chunk_length=12), digest(DOCUMENTS, chunk_length=4)]
    for row, ids in enumerate(DOCUMENTS):
        for k in range(len(ids)):
            changed = [list(document) for document in DOCUMENTS]
            changed[row][k] = 3
            seen.append(digest(changed))
            if k:
                masked = [list(document) for document in DOCUMENTS]
                masked[row][k] = -100
                seen.append(digest(DOCUMENTS, masked))
    seen += [digest([[1], *DOCUMENTS]), digest([*DOCUMENTS, [1]]), digest([[5, 6], [7, 8, 9], DOCUMENTS[2]])]
    assert len(set(seen)) == len(seen)
    assert digest(DOCUMENTS) == digest(DOCUMENTS, DOCUMENTS) == seen[0]


def test_digest_is_the_same_in_every_process() -> None:
    code = (
        "import datasets, retrograd.data.rows as r;"
        f"print(r.build_rows(datasets.Dataset.from_dict({{'input_ids': {DOCUMENTS}}}), None).digest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == build_rows(of(input_ids=DOCUMENTS), None).digest()


def test_padding_reaches_the_longest_row_of_the_batch_only() -> None:
    rows = build_rows(of(input_ids=[*DOCUMENTS, list(range(3, 13))]), None)
    batch = pad(rows, [2, 1], pad_id=9)
    assert set(batch) == {"input_ids", "target_mask", "doc_ids", "lengths"}
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [8, 9, 9, 9]]
    assert batch["target_mask"].tolist() == [[False, True, True, True], [False, True, False, False]]
    assert batch["doc_ids"].tolist() == [[2] * 4, [1] * 4]
    assert batch["lengths"].tolist() == [4, 2]
    assert {name: values.dtype for name, values in batch.items() if name != "target_mask"} == dict.fromkeys(
        ("input_ids", "doc_ids", "lengths"), torch.int64
    )
    assert batch["target_mask"].dtype == torch.bool


def test_padding_copies() -> None:
    rows = build_rows(of(input_ids=DOCUMENTS), None)
    before = rows.digest()
    batch = pad(rows, np.array([0]))
    batch["input_ids"].zero_()
    batch["target_mask"].zero_()
    assert rows.digest() == before


def test_no_target_is_lost_or_doubled_by_batching() -> None:
    rows = build_rows(of(text=["a b", "c d e f", "g", "h i j"]), tokenizer(bos=True))
    batches = [pad(rows, index) for index in ([0, 3], [1], [2])]
    assert sum(int(batch["target_mask"].sum()) for batch in batches) == rows.targets == 10


def test_packed_batches_restart_positions_at_documents() -> None:
    rows = build_rows(of(text=["a b", "c", "d e f g h i"]), tokenizer(), chunk_length=7)
    batch = pad(rows, [0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, EOS, 7, EOS, 8, 9], [10, 11, 12, 13, EOS, 0, 0]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 0]]
    assert batch["doc_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2], [2] * 7]
    # exactly the tokens at a position above 0 have context
    has_context = (batch["position_ids"] > 0) & (batch["segment_ids"] >= 0)
    assert torch.equal(has_context, batch["target_mask"])


def test_rows_are_frozen() -> None:
    rows = build_rows(of(input_ids=DOCUMENTS), None)
    assert isinstance(rows, Rows)
    with pytest.raises(AttributeError, match="packed"):
        rows.packed = True  # type: ignore[misc]
