"""The way from a lake to a corpus, on both engines, and every kind of bad input."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import JobError, LakeError
from bert_ray.inference.runs import status
from bert_ray.lake.lock import exclusive
from bert_ray.training.corpus import work as work_room
from bert_ray.training.corpus.job import CorpusJob, NearOptions, ReadingOptions
from bert_ray.training.corpus.run import run
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train
from bert_ray.training.order import held_out
from bert_ray.training.shards import Documents, read_manifest, read_tokenizer
from tests.lakes import journal_names
from tests.unit.training.corpus.conftest import sentence

Make = Callable[..., CorpusJob]


def files(output: str | Path) -> dict[str, str]:
    """The hashes of all that a corpus is made of."""
    paths = [path for path in sorted(Path(output).rglob("*.arrow")) if "_bert_ray" not in path.parts]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def texts(output: str | Path, split: str) -> list[str]:
    """The documents of a split, as their tokens spell them."""
    documents = Documents(Path(output), split)
    tokenizer = read_tokenizer(Path(output))
    found = []
    for number, length in enumerate(documents.lengths.astype(np.int64)):
        ids, _ = documents.take(np.array([number]), np.array([0]), np.array([length]))
        found.append(tokenizer.decode(ids))
    return found


def test_a_lake_becomes_a_corpus(job_for: Make) -> None:
    job = job_for()
    summary = run(job)
    assert summary.exit_status == 0
    manifest = read_manifest(Path(job.output))
    assert manifest.dropped == {"empty": 3, "null": 3}
    assert manifest.provenance["documents_read"] == 120
    expected = [sentence(40 * file + row) for file in range(3) for row in range(38)]
    judged = held_out(expected, 0.2)
    assert texts(job.output, "train") == [text for text, held in zip(expected, judged, strict=True) if not held]
    assert texts(job.output, "validation") == [text for text, held in zip(expected, judged, strict=True) if held]
    assert len(manifest.splits["train"].shards) > 1
    assert manifest.splits["train"].words == 30 * (~judged).sum()
    assert Documents(Path(job.output), "train").verify() == {}
    shard = pa.ipc.open_file(pa.memory_map(f"{job.output}/train/00000.arrow"))
    assert shard.num_record_batches == 1, "a reader would copy it"
    first = expected[int(np.argmin(judged))]
    assert shard.get_batch(0).column("id")[0].as_py() == hashlib.blake2b(first.encode()).digest()[:16]
    assert sorted(os.listdir(Path(job.output, "_bert_ray"))) == ["failures", "receipts", "run.json", "started", "tmp"]
    assert f"{len(expected):,} documents" in str(summary)
    assert "6 null" not in str(summary)
    assert "3 empty, 3 null" in str(summary)


def test_a_finished_corpus_is_left_alone(job_for: Make, lake: Path, capsys: pytest.CaptureFixture) -> None:
    job = job_for()
    first = run(job)
    before = {path: path.stat().st_mtime_ns for path in Path(job.output).rglob("*.arrow")}
    again = run(job)
    assert "finished already" in capsys.readouterr().err
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in Path(job.output).rglob("*.arrow")} == before
    pq.write_table(pa.table({"text": ["more"]}), lake / "f9.parquet")
    with pytest.raises(JobError, match="is finished, and its input has changed since: choose another output"):
        run(job)
    with pytest.raises(JobError, match="is a corpus: `bert-ray corpus` with its job"):
        status(job.output)


def test_another_job_into_the_same_output_is_refused(job_for: Make) -> None:
    run(job_for())
    with pytest.raises(
        JobError, match=r"another job \(near: threshold was 0\.8, is 0\.7; min_characters was 1, is 5\)"
    ):
        run(job_for(min_characters=5, near=NearOptions(threshold=0.7)))


def test_an_output_that_is_something_else_is_refused(job_for: Make, tmp_path: Path, lake: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "precious").write_text("")
    with pytest.raises(JobError, match="not empty and not of an earlier run"):
        run(job_for())
    with pytest.raises(JobError, match="lies inside the input"):
        run(job_for(output=str(lake / "corpus")))


def test_a_second_run_at_the_same_time_is_refused(job_for: Make, tmp_path: Path) -> None:
    job = job_for()
    lock = tmp_path / "corpus" / "_bert_ray" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("process 1 on elsewhere")  # What a killed process left is no obstacle.
    with (
        exclusive(lock, "the corpus"),
        pytest.raises(LakeError, match=rf"another process works on the corpus .*process {os.getpid()} on"),
    ):
        run(job)
    assert run(job).exit_status == 0


def test_duplicates_and_short_ones_are_dropped_and_counted(job_for: Make, tmp_path: Path) -> None:
    long = sentence(0, 400)
    like = " ".join([*long.split()[:-1], "other"])
    rows = [long, "  " + long, like, "so", "So!", "it", *(sentence(n) for n in range(1, 9))]
    place = tmp_path / "some.parquet"
    pq.write_table(pa.table({"text": rows}), place)
    summary = run(job_for(input=str(place), min_characters=3))
    assert summary.manifest.dropped == {"exact duplicate": 1, "near duplicate": 1, "too short": 2}
    summary = run(job_for(input=str(place), duplicates="exact", output=str(tmp_path / "exact")))
    assert summary.manifest.dropped == {"exact duplicate": 1}
    summary = run(job_for(input=str(place), duplicates="none", output=str(tmp_path / "none")))
    assert summary.manifest.dropped == {}


def test_duplicates_across_files_and_inputs(job_for: Make, tmp_path: Path, lake: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "f.parquet").write_bytes((lake / "f0.parquet").read_bytes())
    os.utime(twin / "f.parquet", ns=(0, (lake / "f0.parquet").stat().st_mtime_ns))
    summary = run(job_for(input=[str(lake), str(twin)]))
    assert summary.manifest.dropped == {"empty": 4, "exact duplicate": 38, "null": 4}
    alone = run(job_for(output=str(tmp_path / "alone")))
    assert summary.manifest.fingerprint == alone.manifest.fingerprint


@pytest.mark.parametrize("rows", [[], [None], ["", " \n"]])
def test_a_corpus_of_no_documents_is_an_error(job_for: Make, tmp_path: Path, rows: list[str | None]) -> None:
    place = tmp_path / "none.parquet"
    pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), place)
    with pytest.raises(LakeError, match=f"no document is left to train on, of {len(rows)} that were read"):
        run(job_for(input=str(place)))


def test_a_corpus_of_one_document(job_for: Make, tmp_path: Path) -> None:
    place = tmp_path / "one.parquet"
    pq.write_table(pa.table({"text": [sentence(0)]}), place)
    summary = run(job_for(input=str(place), validation_fraction=0.0))
    assert texts(summary.output, "train") == [sentence(0)]
    assert texts(summary.output, "validation") == []
    # All of them set apart: the hash decides, and the error says what to do.
    held = next(text for text in map(sentence, range(100)) if held_out([text], 0.5)[0])
    pq.write_table(pa.table({"text": [held]}), place)
    with pytest.raises(LakeError, match="give validation_fraction=0"):
        run(job_for(input=str(place), validation_fraction=0.5, output=str(tmp_path / "held")))


def numbered(lines: int) -> tuple[list[str], np.ndarray]:
    """Distinct lines, and how many tokens each has: known words, one digit after the other, and a mark."""
    some = [sentence(number, 50) for number in range(500)]
    texts = [f"{some[number % len(some)]} {number} ." for number in range(lines)]
    return texts, np.array([50 + len(str(number)) + 1 for number in range(lines)])


@pytest.mark.parametrize("megabytes", [2.5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_document_longer_than_any_batch(
    job_for: Make, pretraining_for: Callable[..., TrainJob], tmp_path: Path, megabytes: float
) -> None:
    """It is cleaned, signed and tokenised in slices; what comes out is the whole, and is learned from."""
    lines, sizes = numbered(int(megabytes * 1e6 / 275))
    place = tmp_path / "long.txt"
    place.write_text("\n".join(lines) + "\n\nshort one", "utf-8")
    assert place.stat().st_size > megabytes * 1e6
    summary = run(
        job_for(
            input=str(place),
            validation_fraction=0.0,
            reading=ReadingOptions(documents="paragraph"),
        )
    )
    documents = Documents(Path(summary.output), "train")
    assert documents.lengths.tolist() == [sizes.sum(), 6]
    # A thousand of its lines, the first and the last among them.
    chosen = np.unique(np.linspace(0, len(lines) - 1, 1000).astype(int))
    stops = np.cumsum(sizes)
    ids, starts = documents.take(np.zeros(len(chosen), np.int64), stops[chosen] - sizes[chosen], stops[chosen])
    tokenizer = read_tokenizer(Path(summary.output))
    expected = tokenizer([lines[number] for number in chosen], add_special_tokens=False)["input_ids"]
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))
    assert starts.sum() == 52 * len(chosen)
    job = pretraining_for(data=DataOptions(train=summary.output), steps=1, evaluate_every=1)
    [entry] = train(job, tell=lambda _: None).history
    assert 0 < entry["train_loss"] < 100


def test_a_vocabulary_that_cannot_spell_the_text_is_told(
    job_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = tmp_path / "zh.txt"
    place.write_text("味道很好\n非常好吃\n下次再来\n", "utf-8")
    summary = run(job_for(input=str(place), validation_fraction=0.0))
    assert summary.exit_status == 0
    assert summary.warnings[0].startswith("100% of the tokens are unknown to the vocabulary")
    assert "warning: 100%" in capsys.readouterr().err


def test_a_file_that_cannot_be_read(job_for: Make, lake: Path, tmp_path: Path) -> None:
    good = (lake / "f1.parquet").read_bytes()
    (lake / "f1.parquet").write_bytes(good[:-20])
    job = job_for()
    summary = run(job)
    assert (summary.exit_status, summary.manifest) == (1, None)
    assert "f1.parquet cannot be read" in summary.failures[0]
    assert "on_error=skip" in str(summary)
    assert len(journal_names(Path(job.output), "receipts")) == 4, "the others go on"
    stopped = run(job_for(on_error="fail", output=str(tmp_path / "fail")))
    assert stopped.stopped
    assert stopped.exit_status == 1
    without = run(job_for(on_error="skip", output=str(tmp_path / "skip")))
    assert without.exit_status == 1
    assert without.manifest.provenance["documents_read"] == 80
    assert "f1.parquet" in without.manifest.provenance["skipped_files"][0]
    # Mended, the first one goes on.
    (lake / "f1.parquet").write_bytes(good)
    assert run(job).exit_status == 0
    whole = run(job_for(output=str(tmp_path / "whole")))
    assert files(job.output) == files(whole.output)


def test_an_input_that_changes_before_the_end(
    job_for: Make, lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and shards of the old one do not survive."""
    job = job_for()

    def full(*arguments: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("bert_ray.training.corpus.assemble.Manifest.write", full)
    with pytest.raises(LakeError, match=r"cannot write to .*the same command goes on"):
        run(job)
    monkeypatch.undo()
    assert len(files(job.output)) > 2
    (lake / "f2.parquet").unlink()
    run(job)
    assert files(job.output) == files(run(job_for(output=str(tmp_path / "fresh"))).output)


def test_on_ray_the_same_bytes(job_for: Make, tmp_path: Path, ray_session: None) -> None:
    local = run(job_for())
    ray = run(job_for(engine="ray", output=str(tmp_path / "ray")))
    assert files(ray.output) == files(local.output)
    assert read_manifest(Path(ray.output)).fingerprint == local.manifest.fingerprint


def test_a_part_over_which_workers_die_is_given_up(job_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_room.Journal, "start", lambda self, unit, session: 3)
    summary = run(job_for())
    assert "3 workers died over f0.parquet" in summary.failures[0]
    assert "on_error=skip" in str(summary)


def test_what_was_read_is_not_left_out_later(job_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody is told to."""
    monkeypatch.setattr(work_room.Journal, "start", lambda self, unit, session: 3 * unit.startswith("tokens"))
    summary = run(job_for(on_error="skip"))
    assert (summary.manifest, summary.exit_status) == (None, 1)
    assert "3 workers died over f0.parquet" in summary.failures[0]
    assert "give the same command" in str(summary)
    assert "on_error=skip" not in str(summary)


def test_a_file_whose_name_is_no_utf_8(job_for: Make, tmp_path: Path) -> None:
    place = tmp_path / "texts"
    place.mkdir()
    (Path(os.fsdecode(os.fsencode(place) + b"/caf\xe9.txt"))).write_text("\n".join(sentence(row) for row in range(9)))
    assert "9 documents" in str(run(job_for(input=str(place))))
    Path(os.fsdecode(os.fsencode(place) + b"/bad\xe9.txt")).write_bytes(b"caf\xe9\n")
    summary = run(job_for(input=str(place), output=str(tmp_path / "other")))
    assert summary.exit_status == 1
    assert str(summary).encode() and "bad\\xe9.txt: byte 3" in str(summary)
