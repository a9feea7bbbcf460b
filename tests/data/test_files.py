"""Files as people have them: packed, with a byte order mark, in another encoding, with blank lines."""

from __future__ import annotations

import gzip
from pathlib import Path

import datasets
import pyarrow
import pytest

from retrograd.data.documents import documents_of, load_documents
from retrograd.settings.question import Source

JSON = '{"text": "é one"}\n\n{"text": "two"}\n'.encode()
CONTENT = {
    ".jsonl": JSON,
    ".json": '[{"text": "é one"},\n {"text": "two"}]'.encode(),
    ".csv": 'n,text\n1,é one\n2,"two"\n'.encode(),
    ".tsv": "n\ttext\n1\té one\n2\ttwo\n".encode(),
    ".txt": "é one\ntwo\n".encode(),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


PACK = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", CONTENT)
def test_packed_files_are_what_they_hold(tmp_path: Path, suffix: str, packing: str) -> None:
    file = tmp_path / f"train{suffix}{packing}"
    file.write_bytes(PACK[packing](CONTENT[suffix]))
    assert load_documents(str(file))["text"][:] == ["é one", "two"]
    assert load_documents(str(tmp_path), split="train[1:]")["text"][:] == ["two"]  # as a folder


@pytest.mark.parametrize("packing", PACK)
def test_several_members_follow_each_other_and_a_cut_file_is_refused(tmp_path: Path, packing: str) -> None:
    packed = PACK[packing](JSON)
    (tmp_path / f"a.jsonl{packing}").write_bytes(packed * 2)
    assert load_documents(str(tmp_path / f"a.jsonl{packing}"))["text"][:] == ["é one", "two"] * 2
    for content in (packed[:-6], b"no such file" + packed):
        (tmp_path / f"b.jsonl{packing}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"b.jsonl{packing} cannot be decompressed, it is damaged or cut short"):
            load_documents(str(tmp_path / f"b.jsonl{packing}"))


def test_a_packed_table_of_parquet_and_a_packed_nothing_are_refused(tmp_path: Path) -> None:
    for name in ("a.parquet.gz", "a.doc.gz", "a.gz"):
        (tmp_path / name).write_bytes(gzip.compress(JSON))
        with pytest.raises(ValueError, match=r"is of no known kind; documents come from .*with \.gz or \.zst behind"):
            load_documents(str(tmp_path / name))
    with pytest.raises(ValueError, match="looks like a local path, and nothing exists there"):
        load_documents("gone.jsonl.zst")


@pytest.mark.parametrize("suffix", CONTENT)
def test_a_byte_order_mark_is_no_part_of_anything(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"d{suffix}"
    file.write_bytes(b"\xef\xbb\xbf" + CONTENT[suffix])
    found = load_documents(str(file))
    assert found["text"][:] == ["é one", "two"]
    assert found.column_names[0] in ("text", "n")
    file.write_text(CONTENT[suffix].decode(), encoding="utf-16")
    with pytest.raises(ValueError, match=rf"d{suffix} is in UTF-16, and files are read as UTF-8"):
        load_documents(str(file))


@pytest.mark.parametrize("suffix", CONTENT)
def test_latin_1_is_refused_with_its_line(tmp_path: Path, suffix: str) -> None:
    place = 1 if suffix in (".jsonl", ".json", ".txt") else 2
    file = tmp_path / f"d{suffix}"
    file.write_bytes(CONTENT[suffix].decode().encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"d{suffix}, line {place} is not UTF-8: byte 0xe9 at .*'.*é one.*iconv -f latin1"
    ):
        load_documents(str(file))
    (tmp_path / "late.txt").write_bytes(b"a\n" * 20000 + b"\xe9\n")
    with pytest.raises(ValueError, match=r"late.txt, line 20001 is not UTF-8: byte 0xe9 at 0"):
        load_documents(str(tmp_path / "late.txt"))


def test_blank_lines_of_a_table(tmp_path: Path) -> None:
    """An empty cell where there is one column, as spreadsheets write it; no row where there are several."""
    (tmp_path / "one.csv").write_text('\ntext\na\n\n""\nb\n')
    assert load_documents(str(tmp_path / "one.csv"))["text"][:] == ["a", "", "", "b"]
    (tmp_path / "two.csv").write_text('n,text\n\n1,a\n   \n2,""\r\n\r\n3,b\n\n')
    assert load_documents(str(tmp_path / "two.csv")).to_dict() == {"n": ["1", "2", "3"], "text": ["a", "", "b"]}


def test_fields_of_a_table(tmp_path: Path) -> None:
    long = "x" * 200_000  # more than the csv module's own limit
    (tmp_path / "a.csv").write_text(f',text\n0,"a ""b"",\nc"\n1,{long}\n')
    found = load_documents(str(tmp_path / "a.csv"))
    assert (found.column_names, found["text"][:]) == (["Unnamed: 0", "text"], ['a "b",\nc', long])
    for content, message in (
        ("n,text\n1,a\n2\n", r"line 3 has fewer fields than the header: 1, not 2 \(n, text\)"),
        ("n,text\n1,a,b\n", "line 2 has more fields than the header: 3, not 2"),
        ('n,text\n1,"a\n2,b\n', "line 3 cannot be read: unexpected end of data"),
        ("text,text\na,b\n", "the header has column 'text' twice"),
    ):
        (tmp_path / "b.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_documents(str(tmp_path / "b.csv"))


def test_the_same_bytes_under_another_suffix_are_other_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(JSON)
    assert len(load_documents(str(tmp_path / "a.txt"))) == 3
    assert len(load_documents(str(tmp_path / "a.jsonl"))) == 2


def test_a_source_names_its_text_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CONTENT[".csv"])
    source = Source(str(tmp_path / "a.csv"), text_column="text", columns=("text=n",))
    with pytest.raises(ValueError, match="text_column 'text' and columns text=n: give one of them"):
        documents_of(source)
