"""Promise 5, for a corpus and a vocabulary: SIGKILL in every stage, and the bytes are those of an undisturbed run.

Each test first asserts that the kill fell where it was meant to.
"""

from __future__ import annotations

import hashlib
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.training.corpus import vocabulary
from bert_ray.training.corpus.job import CorpusJob, VocabularyJob
from bert_ray.training.corpus.run import run
from bert_ray.training.shards import is_corpus, read_manifest
from tests.fault.test_annotate_kill import killer
from tests.lakes import journal_names, receipts
from tests.processes import begin, drive, ended, kill_at, wait_for

UNITS = 8


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus") / "lake"
    root.mkdir()
    words = "the film was good and bad service food phone money works well love story staff".split()
    draw = np.random.default_rng(0)
    for file in range(UNITS):
        texts = [" ".join(draw.choice(words, 400)) for _ in range(19)]
        # One exact duplicate of another file's in each.
        texts.append("the same text stands in every file")
        pq.write_table(pa.table({"text": texts}), root / f"f{file}.parquet")
    return root


def job(lake: Path, tokenizer: Path, output: Path, engine: str = "local") -> CorpusJob:
    return CorpusJob(
        input=str(lake), tokenizer=str(tokenizer), output=str(output), engine=engine, unit_rows=20, shard_tokens=20_000
    )


def made(output: Path) -> dict[str, str]:
    """The hashes of all that a reader of the corpus reads."""
    folders = [output / name for name in ("train", "validation", "tokenizer")]
    paths = [path for folder in folders for path in sorted(folder.glob("*"))]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def undisturbed(lake: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    summary = run(job(lake, tiny_encoder, output))
    assert summary.exit_status == 0
    assert summary.manifest.dropped == {"exact duplicate": UNITS - 1}
    assert len(summary.manifest.splits["train"].shards) >= 3
    return output


# Kind of file, which of them in that process, when; and what then stands: receipts of each stage.
FAULTS = [
    ("/clean/", 3, "before", {"clean": 2}),
    ("/clean/", 3, "after", {"clean": 4}),
    ("/duplicates/", 1, "before", {"clean": UNITS}),
    ("/tokens/", 3, "after", {"clean": UNITS, "duplicates": 1, "tokens": 2}),
    ("/train/0", 2, "after", {"clean": UNITS, "duplicates": 1, "tokens": UNITS, "shard": 1}),
    ("/corpus.json", 1, "before", {"clean": UNITS, "duplicates": 1, "tokens": UNITS, "shard": 4}),
    ("/corpus.json", 1, "after", {"clean": UNITS, "duplicates": 1, "tokens": UNITS, "shard": 4}),
]


@pytest.mark.slow
def test_one_run_killed_in_every_stage(lake: Path, tiny_encoder: Path, tmp_path: Path, undisturbed: Path) -> None:
    output = tmp_path / "out"
    for kind, number, when, expected in FAULTS:
        process = begin(drive, run, job(lake, tiny_encoder, output), partial(kill_at, kind, number, when))
        assert ended(process) == -signal.SIGKILL, kind
        stages = [name.split("-")[0] for name in journal_names(output, "receipts")]
        assert {stage: stages.count(stage) for stage in dict.fromkeys(stages)} == expected
        assert is_corpus(output) == ((kind, when) == ("/corpus.json", "after"))
        assert (output / "_bert_ray" / "lock").exists(), "what a crash leaves"
    assert (output / "_bert_ray" / "clean").exists(), "it was killed before it could tidy up"
    summary = run(job(lake, tiny_encoder, output))
    assert summary.exit_status == 0
    assert made(output) == made(undisturbed)
    assert read_manifest(output).splits == read_manifest(undisturbed).splits
    assert journal_names(output, "tmp") == journal_names(output, "started") == []
    assert not (output / "_bert_ray" / "clean").exists()
    # Not one unit was done twice that had its receipt: each kill left those of before as they were.
    sessions = {note["session"] for note in receipts(output) if note["unit"].startswith("clean-")}
    assert len(sessions) == 3


@pytest.mark.slow
def test_driver_killed_on_ray_and_finished_here(
    lake: Path, tiny_encoder: Path, tmp_path: Path, undisturbed: Path
) -> None:
    output = tmp_path / "out"
    process = begin(drive, run, job(lake, tiny_encoder, output, "ray"))
    wait_for(lambda: journal_names(output, "receipts"), process)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert not is_corpus(output), "the kill came too late"
    # Its workers may be at a unit still; what they finish now is as good.
    assert run(job(lake, tiny_encoder, output)).exit_status == 0
    assert made(output) == made(undisturbed)
    assert {note["engine"] for note in receipts(output) if "engine" in note} == {"ray", "local"}


@pytest.mark.slow
def test_ray_worker_killed_and_its_unit_done_again(
    lake: Path, tiny_encoder: Path, tmp_path: Path, undisturbed: Path, ray_session: None
) -> None:
    output = tmp_path / "out"
    with killer(output) as killed:
        summary = run(job(lake, tiny_encoder, output, "ray"))
    ((unit, pid),) = killed
    assert pid != os.getpid(), "that was the driver"
    assert summary.exit_status == 0, "Ray did not start another worker"
    assert {note["unit"]: note.get("pid") for note in receipts(output)}[unit] != pid
    assert made(output) == made(undisturbed)


def kill_when_it_is_put_in_place() -> None:
    vocabulary.put_in_place = lambda fresh, target: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_vocabulary_killed_while_it_counts_and_before_it_stands(lake: Path, tmp_path: Path) -> None:
    undisturbed, output = (VocabularyJob(input=str(lake), output=str(tmp_path / name), size=100) for name in "ab")
    assert vocabulary.run(undisturbed).exit_status == 0
    counts = tmp_path / "b.run"
    for fault, expected in (
        (partial(kill_at, "/count/", 3, "before"), 2),
        (partial(kill_at, "/count/", 3, "after"), 4),
        (kill_when_it_is_put_in_place, UNITS),
    ):
        process = begin(drive, vocabulary.run, output, fault)
        assert ended(process) == -signal.SIGKILL, fault
        assert len(journal_names(counts, "receipts")) == expected
        assert not Path(output.output).exists()
    sessions = {note["session"] for note in receipts(counts)}
    assert len(sessions) == 3, "the last one counted what was left, and no kill took back what another had counted"
    assert vocabulary.run(output).exit_status == 0
    one, other = (Path(job.output, "tokenizer.json").read_bytes() for job in (undisturbed, output))
    assert one == other
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "lake") == ["a", "b"]
