"""What pretraining learns from: the job's corpora, opened and checked, and the bundle of a new model.

`corpus_source.py` makes rows, steps and batches of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bert_ray.errors import JobError
from bert_ray.model.tasks.base import Learning
from bert_ray.training.corpus_source import CorpusSource, Rows, marks_of
from bert_ray.training.shards import SPLITS, Documents, is_corpus, read_manifest

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.training.job import TrainJob
    from bert_ray.training.sources import Source


@dataclass(kw_only=True, slots=True)
class CorpusPart:
    """A corpus that was opened and checked.

    Attributes:
        directory: where it lies.
        fingerprint: of its manifest.
        vocabulary: of its tokenizer, in words: how many tokens, and the beginning of its hash.
        skipped: shards that are left out, with what is wrong with them.
        counts: by split, documents in the other shards.
    """

    directory: Path
    fingerprint: str
    vocabulary: str
    skipped: dict[str, str]
    counts: dict[str, int]

    def documents(self, split: str) -> Documents:
        """Those of a split."""
        return Documents(self.directory, split, skip=self.skipped)


@dataclass(kw_only=True, slots=True)
class CorpusData:
    """A corpus to learn from: small, and the same on every worker, which opens it for itself.

    Attributes:
        corpus: what is learned.
        replay: general text that is learned between; None: none.
        train_rows, validation_rows: documents of `corpus` that are learned from, and of those that it is judged by at
            most `pretraining.validation_rows`.
        baseline: None: no constant answer is worth the name.
        learning: what the loss goes by.
    """

    corpus: CorpusPart
    replay: CorpusPart | None
    train_rows: int
    validation_rows: int
    baseline: float | None = None
    learning: Learning = field(default_factory=Learning)

    def identity(self) -> dict[str, Any]:
        """Tells these corpora, without what is left out of them, from others."""
        parts = [part for part in (self.corpus, self.replay) if part]
        told = [word for part in parts for word in (part.fingerprint, *sorted(part.skipped))]
        rows = hashlib.sha256(" ".join(told).encode()).hexdigest()[:16]
        return {"rows": rows, "vocabulary": self.corpus.vocabulary}

    def sources(self, job: TrainJob, base: Bundle, card: Card, device: torch.device) -> tuple[Source, Source]:
        """What to train on, and what to be judged by."""
        marks = marks_of(base.tokenizer(), base.reference)
        two = job.pretraining.sentences != "none"
        room = card.max_length - (3 if two else 2)
        if two and room < 2:
            raise JobError(
                f"max_length is {card.max_length}; a row of two sentences needs 5 tokens, three of them special"
            )
        parts = [part.documents("train") for part in (self.corpus, self.replay) if part]
        train, validation = Rows(Documents.joined(parts), room), Rows(self.corpus.documents("validation"), room)
        own = train.before(len(parts[0]))
        return CorpusSource(train, marks, job, own=own), CorpusSource(validation, marks, job, judged=True)


def corpus_data(job: TrainJob, base: Bundle, seen: dict[str, list[Any]] | None = None) -> tuple[CorpusData, list[str]]:
    """Open and check the job's corpus, and the one that it replays.

    Args:
        job: names them.
        base: the bundle that training starts from.
        seen: shards that need not be read to be checked, as in `Documents.verify`.

    Returns:
        the data, and notes for the user.

    Raises:
        JobError: one is none, has no documents, or was tokenised for another model.
        LakeError: one is damaged, and the job does not say to skip what is.
    """
    notes: list[str] = []
    seen = {} if seen is None else seen
    corpus = _open(job, base, job.data.train, SPLITS, notes, seen)
    if job.data.validation is not None or job.data.columns:
        key = "columns" if job.data.columns else "validation"
        raise JobError(f"data.{key}: a corpus has its own; leave it out")
    replay = _open(job, base, job.data.replay, ("train",), notes, seen) if job.data.replay is not None else None
    if replay and replay.fingerprint == corpus.fingerprint:
        raise JobError(
            f"data.replay is the corpus that is learned, {job.data.train}: give another one, or leave it out"
        )
    validation = corpus.counts["validation"]
    data = CorpusData(
        corpus=corpus,
        replay=replay,
        train_rows=corpus.counts["train"],
        validation_rows=min(validation, job.pretraining.validation_rows),
        learning=Learning(parts=job.pretraining.sentences != "none"),
    )
    if not data.validation_rows and job.early_stopping:
        why = (
            f"{corpus.directory} has none: make it with a larger share"
            if not validation
            else "pretraining.validation_rows is 0: give some"
        )
        raise JobError(f"early_stopping needs validation rows, and {why}")
    return data, notes


def _open(
    job: TrainJob, base: Bundle, path: str, splits: Sequence[str], notes: list[str], seen: dict[str, list[Any]]
) -> CorpusPart:
    """A corpus, of which these splits are read and therefore checked; what is left out is added to the notes."""
    directory = Path(path)
    if not is_corpus(directory):
        raise JobError(
            f"{directory} holds no finished corpus, which task pretraining learns from: make it with `bert-ray corpus`"
        )
    manifest = read_manifest(directory)
    _check_vocabulary(directory, base)
    skipped: dict[str, str] = {}
    for split in splits:
        skipped |= Documents(directory, split).verify(job.data.on_bad_shard, seen)
    counts = {
        split: sum(shard.documents for shard in manifest.splits[split].shards if shard.path not in skipped)
        for split in splits
    }
    if not counts["train"]:
        raise JobError(f"{directory} has no documents to train on")
    notes += [f"{directory / shard} {reason}: its documents are left out" for shard, reason in skipped.items()]
    vocabulary = f"{manifest.vocabulary:,} tokens, {manifest.tokenizer_sha256[:12]}"
    return CorpusPart(
        directory=directory,
        fingerprint=manifest.fingerprint,
        vocabulary=vocabulary,
        skipped=skipped,
        counts=counts,
    )


def _check_vocabulary(corpus: Path, base: Bundle) -> None:
    from bert_ray.training.shards import read_tokenizer

    one, other = read_tokenizer(corpus).get_vocab(), base.tokenizer().get_vocab()
    if one == other:
        return
    differing = sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
    raise JobError(
        f"{corpus} was tokenised with another vocabulary ({len(one):,} tokens) than {base.reference} has "
        f"({len(other):,}; {len(differing):,} differ, {differing[0]!r} is one): make the corpus with this model's "
        "tokenizer"
    )


def new_bundle(job: TrainJob, output: Path, documents: Documents | None = None) -> int:
    """Write a bundle of random weights in the job's architecture, with its corpus's tokenizer.

    Args:
        job: says the shape.
        output: where; a bundle there is replaced.
        documents: the embeddings start from what stands near what in these; None: from random weights too.

    Returns:
        how many tokens were counted for that.
    """
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    from bert_ray.model.bundle import save_bundle
    from bert_ray.model.card import Card
    from bert_ray.training.shards import read_tokenizer

    shape, tokenizer = job.architecture, read_tokenizer(Path(job.data.train))
    config = BertConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size or 4 * shape.hidden_size,
        max_position_embeddings=shape.max_positions,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    torch.manual_seed(job.seed)
    card = Card(task="fill-mask", name=None, labels=[], inputs=["text"], max_length=shape.max_positions)
    kind = BertForMaskedLM if job.pretraining.sentences == "none" else BertForPreTraining
    model = kind(config)
    tokens = 0
    if documents is not None:
        from bert_ray.training.cooccurrence import start_from_cooccurrences

        tokens = start_from_cooccurrences(model, documents, job.seed)
    save_bundle(output, model, tokenizer, card)
    return tokens
