"""Make a corpus: check the job, clean all parts, decide on duplicates, tokenise, lay out in shards, write the manifest.

    run(job) -> Summary

Every step leaves receipts: a run that is stopped by anything is gone on with by the same command, on either engine, and
gives the same bytes as an undisturbed one. Tokens and shards are named after the set of parts that they are made of, so
that an input that changes before the corpus is finished leads to what it is then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bert_ray import __version__
from bert_ray.errors import JobError
from bert_ray.lake.files import file_sha256
from bert_ray.lake.journal import FOLDER, Journal, output_errors, refuse_another_job
from bert_ray.lake.lock import exclusive
from bert_ray.lake.outputs import check_place
from bert_ray.lake.progress import Progress
from bert_ray.model.bundle import save_tokenizer
from bert_ray.model.tokenization import MOST_UNKNOWN
from bert_ray.training.corpus.assemble import decide_duplicates, write_manifest, write_shards
from bert_ray.training.corpus.engines import Run, engine
from bert_ray.training.corpus.job import CorpusJob
from bert_ray.training.corpus.sources import Part, Source, open_sources, parts_of
from bert_ray.training.corpus.stages import do_stage, failure_lines, reconcile
from bert_ray.training.corpus.tokens import pretraining_tokenizer
from bert_ray.training.corpus.work import Task, Work
from bert_ray.training.shards import TOKENIZER_FOLDER, Manifest, Split, is_corpus, read_manifest

# Sessions that run.json remembers.
_SESSIONS = 100
# What only the way to the corpus needs.
_SCAFFOLD = ("clean", "duplicates", "tokens")


@dataclass(slots=True, kw_only=True)
class Summary:
    """How a run ended.

    Attributes:
        manifest: of the finished corpus; None: it is not finished.
        failures: each file that could not be read, and why.
        skippable: whether `on_error=skip` would leave those files out.
        stopped: why the run ended before its end, "" where it did not.
        warnings: what makes the corpus doubtful.
    """

    output: str
    seconds: float = 0.0
    manifest: Manifest | None = None
    failures: list[str] = field(default_factory=list)
    skippable: bool = True
    stopped: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0: the corpus is finished, of all files; 1: files could not be read."""
        return int(self.manifest is None or bool(self.failures))

    def __str__(self) -> str:
        lines = [f"corpus {self.output} is not finished"]
        if self.manifest is not None:
            train, validation = (self.manifest.splits[name] for name in ("train", "validation"))
            documents, words = train.documents + validation.documents, train.words + validation.words
            tokens = train.tokens + validation.tokens
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.manifest.dropped.items())
            lines = [
                f"corpus {self.output}: {documents:,} documents, {words:,} words, {tokens:,} tokens "
                f"({self.seconds:.1f} s)",
                f"  train       {train.documents:,} documents, {train.tokens:,} tokens in {_shards(train)}",
                f"  validation  {validation.documents:,} documents ({validation.documents / documents:.1%}), "
                f"{validation.tokens:,} tokens in {_shards(validation)}",
                f"  dropped     {dropped or 'none'}",
                f"  vocabulary  {self.manifest.vocabulary:,} tokens; "
                f"{_unknown_share(self.manifest):.2%} of the text is unknown to it",
                f"  fingerprint {self.manifest.fingerprint}",
            ]
        lines += [f"  warning     {text}" for text in self.warnings]
        # What was read once is not left out any more: it is not skippable.
        finished = self.manifest is not None
        lines += failure_lines(self.failures, self.stopped, finished=finished, skippable=self.skippable)
        return "\n".join(lines)


def run(job: CorpusJob) -> Summary:
    """Make a corpus, or go on with making it; prints progress to standard error and a summary at the end.

    Raises:
        BertRayError: job, input or tokenizer is at fault, another process works on the same corpus, or there is
            nothing to train on.
    """
    clock = time.monotonic()
    for place in job.inputs:
        output = check_place(job.output, place)
    with output_errors(output):
        (output / FOLDER).mkdir(parents=True, exist_ok=True)
    with exclusive(output / FOLDER / "lock", f"the corpus {output}"):
        summary = _Run(job, output).go()
    summary.seconds = time.monotonic() - clock
    print(summary, flush=True)
    return summary


class _Run:
    """One session's work on a corpus."""

    def __init__(self, job: CorpusJob, output: Path) -> None:
        self.job, self.output, self.journal = job, output, Journal(output)
        self.summary = Summary(output=str(output))
        self.began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def go(self) -> Summary:
        job = self.job
        sources = open_sources(job.inputs, job.columns, job.reading)
        parts = parts_of(sources, job.unit_rows, job.unit_megabytes * 2**20)
        work = self._prepare(sources)
        if is_corpus(self.output):
            return self._finished(parts)
        reconcile(self.journal)
        with engine(job) as run:
            done = self._stage(run, work, [Task(stage="clean", part=part) for part in parts], "read and clean")
            if self.summary.stopped or (self.summary.failures and job.on_error != "skip"):
                return self.summary
            parts = [part for part in parts if work.name("clean", part.id) in done]
            work = dataclasses.replace(work, digest=_digest(parts))
            self._discard_others(work.digest)
            ids = [part.id for part in parts]
            decide_duplicates(work, ids, exact=job.duplicates != "none")
            clean = [self.journal.receipt(work.name("clean", part)) for part in ids]
            tasks, first, skipped = [], 0, len(self.summary.failures)
            for part, note in zip(parts, clean, strict=True):
                tasks.append(Task(stage="tokens", part=part, first=first))
                first += note["kept"]
            self.summary.skippable = False
            self._stage(run, work, tasks, "tokenise", [note["kept"] for note in clean])
            if self.summary.stopped or len(self.summary.failures) > skipped:
                return self.summary
        documents = sum(self.journal.receipt(work.name("tokens", part))["kept"] for part in ids)
        with Progress(what="write shards", units=1, rows=documents) as progress:
            splits = write_shards(work, ids, job.shard_tokens, progress.watch)
            progress.ended(documents, 0.0, failed=False)
        self.summary.manifest = write_manifest(
            work, splits, self.settings, clean, ids, skipped=self.summary.failures, began=self.began
        )
        return self._end()

    def _prepare(self, sources: Sequence[Source]) -> Work:
        """Check that the output is this job's, and put the tokenizer into it."""
        job, earlier = self.job, self.journal.read_run()
        _check_packages(job)
        tokenizer = pretraining_tokenizer(job.tokenizer)
        fresh = self.output / FOLDER / f"tokenizer.{os.getpid()}.new"
        try:
            with output_errors(self.output):
                save_tokenizer(tokenizer, fresh)
            self.settings = {
                "input": [source.name for source in sources],
                "tokenizer's sha256": file_sha256(fresh / "tokenizer.json")[:16],
                "columns": job.columns,
                "reading": dataclasses.asdict(job.reading),
                "near": dataclasses.asdict(job.near) if job.duplicates == "near" else None,
                **{
                    name: getattr(job, name)
                    for name in (
                        "markup",
                        "min_characters",
                        "duplicates",
                        "validation_fraction",
                        "words",
                        "shard_tokens",
                        "unit_rows",
                        "unit_megabytes",
                    )
                },
            }
            if earlier:
                refuse_another_job(self.output, earlier["settings"], self.settings)
            sessions = earlier.get("sessions", [])
            session = uuid.uuid4().hex[:12]
            self.journal.write_run(
                {
                    "version": __version__,
                    "kind": "corpus",
                    "job": dataclasses.asdict(job),
                    "settings": self.settings,
                    "sessions": [*sessions, {"session": session, "engine": job.engine, "began": self.began}][
                        -_SESSIONS:
                    ],
                }
            )
            self.began = sessions[0]["began"] if sessions else self.began  # The manifest says when all began.
            place = self.output / TOKENIZER_FOLDER
            with output_errors(self.output):
                if not is_corpus(self.output):
                    shutil.rmtree(place, ignore_errors=True)
                    os.replace(fresh, place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return Work(
            session=session,
            engine=job.engine,
            output=str(self.output),
            readers=tuple(source.reader() for source in sources),
            markup=job.markup,
            min_characters=job.min_characters,
            near=job.near if job.duplicates == "near" else None,
            validation_fraction=job.validation_fraction,
            vocabulary=max(tokenizer.get_vocab().values()) + 1,
            words=job.words,
        )

    def _stage(
        self, run: Run, work: Work, tasks: list[Task], what: str, sizes: Sequence[int] | None = None
    ) -> set[str]:
        """Do what has no receipt yet; returns the receipts of the stage's tasks."""
        names = {task.part.id: work.name(task.stage, task.part.id) for task in tasks}
        ended = do_stage(
            run,
            work,
            tasks,
            what,
            stop_at_failure=self.job.on_error == "fail",
            sizes=sizes,
            told=lambda outcome: self._judge(names[outcome.part]),
        )
        self.summary.failures += ended.failures
        self.summary.stopped = ended.stopped
        return ended.done

    def _judge(self, name: str) -> None:
        """Say at once where the vocabulary cannot spell the text: the rest of a long run may not be worth its time."""
        note = self.journal.receipt(name)
        if "unknown" in note and not self.summary.warnings and note["unknown"] > MOST_UNKNOWN * note["tokens"] > 0:
            self.summary.warnings.append(_unknown_note(note["unknown"] / note["tokens"]))
            print(f"warning: {self.summary.warnings[0]}", file=sys.stderr, flush=True)

    def _discard_others(self, digest: str) -> None:
        """Take back what was made of another set of parts."""
        for name in self.journal.receipts():
            stage, _, rest = name.partition("-")
            if stage != "clean" and not rest.startswith(digest):
                self.journal.discard(name)

    def _finished(self, parts: Sequence[Part]) -> Summary:
        """What there is to say of a corpus that stands already."""
        manifest = read_manifest(self.output)
        failed = {name.removeprefix("clean-") for name in self.journal.failed()}
        if _digest([part for part in parts if part.id not in failed]) != manifest.provenance["parts"]:
            raise JobError(
                f"the corpus {self.output} is finished, and its input has changed since: choose another output"
            )
        self.summary.manifest, self.summary.failures = manifest, list(manifest.provenance["skipped_files"])
        print(f"the corpus {self.output} is finished already", file=sys.stderr, flush=True)
        return self._end()

    def _end(self) -> Summary:
        manifest = self.summary.manifest
        assert manifest is not None
        self.summary.warnings = []
        if (share := _unknown_share(manifest)) > MOST_UNKNOWN:
            self.summary.warnings.append(_unknown_note(share))
        if self.job.validation_fraction and not manifest.splits["validation"].documents:
            self.summary.warnings.append(
                f"no document fell into the {self.job.validation_fraction:.1%} set apart for validation: nothing to "
                "judge a training by"
            )
        for name in _SCAFFOLD:
            shutil.rmtree(self.output / FOLDER / name, ignore_errors=True)
        return self.summary


def _digest(parts: Sequence[Part]) -> str:
    return hashlib.sha256(json.dumps([part.id for part in parts]).encode()).hexdigest()[:12]


def _shards(split: Split) -> str:
    return f"{len(split.shards)} shard{'s' * (len(split.shards) != 1)}"


def _unknown_share(manifest: Manifest) -> float:
    tokens = sum(split.tokens for split in manifest.splits.values())
    return manifest.provenance["unknown_tokens"] / max(1, tokens)


def _unknown_note(share: float) -> str:
    return (
        f"{share:.0%} of the tokens are unknown to the vocabulary, as of a language that it cannot spell: train one on "
        "this text with `bert-ray vocabulary`"
    )


def _check_packages(job: CorpusJob) -> None:
    """Name what is missing before the work begins."""
    from importlib.util import find_spec

    wanted = {"datasketch": job.duplicates == "near", "jieba": job.words == "jieba"}
    if missing := [name for name, needed in wanted.items() if needed and find_spec(name) is None]:
        raise JobError(f"{' and '.join(missing)} is not installed: pip install 'bert-ray[train]'")
