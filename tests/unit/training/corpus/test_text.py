from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from bert_ray.errors import JobError, LakeError
from bert_ray.training.corpus.job import ReadingOptions
from bert_ray.training.corpus.sources import open_sources

LINES = "one\ntwo  \n\n \nthree\nfour\n\nfive"


def read(place: Path, unit_bytes: int = 2**20, **options: Any) -> tuple[list[str | None], int]:
    (source,) = open_sources([str(place)], ["text"], ReadingOptions(**options))
    reader, texts, replaced = source.reader(), [], 0
    for part in source.parts(0, 1000, unit_bytes):
        for some, bad in reader.read(part):
            texts += some
            replaced += bad
    return texts, replaced


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "_hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    return tmp_path


def test_lines_paragraphs_files(place: Path) -> None:
    assert [text.strip() for text in read(place)[0]] == ["one", "two", "", "", "three", "four", "", "five"]
    assert read(place, documents="paragraph")[0] == ["one\ntwo  \n", "three\nfour\n", "five"]
    assert read(place, documents="file")[0] == [LINES]


@pytest.mark.parametrize("documents", ["line", "paragraph"])
@pytest.mark.parametrize("size", range(1, 32))
def test_spans_have_each_document_once(place: Path, documents: str, size: int) -> None:
    whole = read(place, documents=documents)[0]
    assert read(place, documents=documents, unit_bytes=size)[0] == whole


def test_packed_files(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(LINES)
    assert len(read(tmp_path)[0]) == 8
    (tmp_path / "a.txt.gz").write_bytes((tmp_path / "a.txt.gz").read_bytes()[:-12])
    with pytest.raises(LakeError, match=r"a\.txt\.gz cannot be read: .*Replace the file"):
        read(tmp_path)


def test_wrong_encoding_is_an_error_with_the_byte_or_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain\ncaf\xe9 au lait\nplain\n")
    with pytest.raises(LakeError, match=r"a\.txt: byte 9 \(0xe9\) is no utf-8: give reading\.encoding"):
        read(tmp_path)
    assert read(tmp_path, bad_bytes="replace") == (["plain\n", "caf\ufffd au lait\n", "plain\n"], 1)
    assert read(tmp_path, encoding="latin-1") == (["plain\n", "café au lait\n", "plain\n"], 0)


def test_utf_16(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("好\n的\n", encoding="utf-16")
    assert read(tmp_path, encoding="utf-16", unit_bytes=2)[0] == ["好\n", "的\n"]
    with pytest.raises(LakeError, match=r"byte 0 \(0xff\) is no utf-8"):
        read(tmp_path)


def test_an_unknown_encoding_is_refused() -> None:
    for name in ("utf-9", "base64"):
        with pytest.raises(JobError, match="which Python does not know"):
            ReadingOptions(encoding=name)


def test_a_changed_file_is_told(place: Path) -> None:
    (source,) = open_sources([str(place)], ["text"], ReadingOptions())
    (part,) = source.parts(0, 1000, 2**20)
    (place / "a.txt").write_text("other")
    with pytest.raises(LakeError, match="changed after the run had begun"):
        list(source.reader().read(part))


def test_no_text_there(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="holds no Parquet files and none named"):
        read(tmp_path)
    with pytest.raises(LakeError, match=r"holds no files named \.txt"):
        read(tmp_path, format="text")


def test_links_are_followed_and_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, other = tmp_path / "lake", tmp_path / "other"
    for folder in (lake, other):
        folder.mkdir()
    (other / "b.txt").write_text("linked\n")
    (lake / "folder").symlink_to(other)
    assert read(lake) == (["linked\n"], 0)
    (lake / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LakeError, match=r"gone\.txt is gone"):
        read(lake)
    (lake / "gone.txt").unlink()
    walk = os.walk

    def unreadable(top: Path, onerror: Any, **more: Any) -> Any:
        onerror(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(lake / "closed")))
        return walk(top, **more)

    monkeypatch.setattr(os, "walk", unreadable)
    with pytest.raises(LakeError, match="closed cannot be listed: Permission denied"):
        read(lake)
