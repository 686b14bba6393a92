"""A training over two machines, of which one is killed, or cut off: it goes on, with one or when both are there."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bert_ray.model.bundle import load_bundle
from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import train
from tests.conftest import needs, tiny_tokenizer
from tests.corpora import make_corpus, random_texts
from tests.integration.nodes import OTHER, Nodes, possible, two_nodes

needs("deepspeed", "train")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="network namespaces need iproute2 and the rights of root"),
]

STEPS = 60


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("nodes")) as found:
        yield found


@pytest.fixture(scope="module")
def job(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A pretraining whose steps take long enough for a fault to find it under way."""
    root = tmp_path_factory.mktemp("job")
    texts = random_texts(510)
    return TrainJob(
        task="pretraining",
        model=str(tiny_encoder),
        output=str(root / "model"),
        data=DataOptions(train=str(make_corpus(root / "corpus", tiny_tokenizer(), texts[:500], texts[500:]))),
        engine="local",
        steps=STEPS,
        batch_tokens=2048,
        evaluate_every=STEPS // 2,
        micro_batches=2,
        learning_rate=1e-3,
        max_length=40,
        dropout=0.1,
        threads=1,
        timeout_minutes=0.5,
        checkpoint=CheckpointOptions(every_steps=4),
    )


@pytest.fixture(scope="module")
def undisturbed(job: TrainJob) -> list[float]:
    """Training and validation losses of a run in one process."""
    return [
        entry[name] for entry in train(job, tell=lambda _: None).history for name in ("train_loss", "validation_loss")
    ]


class Run:
    """`bert-ray train` on the head, over both nodes."""

    def __init__(self, process: subprocess.Popen[str], output: str) -> None:
        self.process, self.output = process, output
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._lines.extend(self.process.stderr)

    @property
    def said(self) -> str:
        """Up to now."""
        return "".join(self._lines)

    def under_way(self) -> None:
        """Until it has a checkpoint; it is far from its end then."""
        deadline = time.monotonic() + 180
        while not list(Path(f"{self.output}.run/checkpoints").glob("step-*")):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def end(self) -> list[float]:
        """Losses by the bundle, once the run has ended well."""
        status = self.process.wait(300)
        self._reader.join(30)
        assert status == 0, self.said
        history = load_bundle(self.output).card.provenance["history"]
        return [entry[name] for entry in history for name in ("train_loss", "validation_loss")]


@contextlib.contextmanager
def running(nodes: Nodes, job: TrainJob, output: Path, **settings: object) -> Iterator[Run]:
    """The job with both nodes there at its beginning."""
    nodes.wait_until_alive(2)
    keys = {
        "task": job.task,
        "model": job.model,
        "output": output,
        "data.train": job.data.train,
        "checkpoint.every_steps": job.checkpoint.every_steps,
        "engine": "ray",
        "workers": 2,
        "zero_stage": 2,
        **{name: getattr(job, name) for name in ("steps", "batch_tokens", "evaluate_every", "micro_batches")},
        **{name: getattr(job, name) for name in ("learning_rate", "max_length", "dropout", "threads")},
        "timeout_minutes": job.timeout_minutes,
        **settings,
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    with nodes.driver([sys.executable, "-m", "bert_ray", "train", *words]) as process:
        yield Run(process, str(output))


def test_a_node_is_killed_and_the_run_goes_on_with_one_worker(
    nodes: Nodes, job: TrainJob, undisturbed: list[float], tmp_path: Path
) -> None:
    try:
        with running(nodes, job, tmp_path / "model", min_workers=1) as run:
            run.under_way()
            assert nodes.kill(OTHER) > 2, "there was no node to kill"
            losses = run.end()
    finally:
        nodes.start(OTHER)
    assert "resumed from the checkpoint on 1 worker\n" in run.said
    assert losses == pytest.approx(undisturbed, abs=1e-4)


def test_a_node_is_cut_off_and_the_run_goes_on_when_it_is_back(
    nodes: Nodes, job: TrainJob, undisturbed: list[float], tmp_path: Path
) -> None:
    with running(nodes, job, tmp_path / "model") as run:
        run.under_way()
        nodes.cut()
        nodes.wait_until_alive(1)
        assert run.process.poll() is None, run.said
        assert "resumed" not in run.said
        # It comes back as a machine that was started anew.
        assert nodes.kill(OTHER) > 2, "there was no node any more"
        nodes.mend()
        nodes.start(OTHER)
        losses = run.end()
    assert "resumed from the checkpoint on 2 workers\n" in run.said
    assert losses == pytest.approx(undisturbed, abs=1e-4)
