"""A WordPiece vocabulary from texts, or a domain's frequent words into the vocabulary that a model has.

Words are counted in parts, on either engine, each with its receipt; a run that is stopped by anything is gone on with
by the same command. What is made of the counts takes seconds.

A new vocabulary is a function of the texts. The library's trainer by itself gives other tokens at each run: it numbers
characters in the order of a hash table, and among pairs of one frequency the smaller numbers win. So the characters are
counted and numbered here beforehand.

Shapes: V tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

from bert_ray import __version__
from bert_ray.errors import BertRayError, JobError, LakeError
from bert_ray.lake.files import sync, sync_tree
from bert_ray.lake.journal import FOLDER, Journal, output_errors
from bert_ray.lake.lock import exclusive
from bert_ray.lake.outputs import check_apart
from bert_ray.lake.progress import Progress
from bert_ray.lake.tables import local_path, local_target
from bert_ray.model.bundle import Bundle, load_bundle, make_room, put_in_place, save_bundle, save_tokenizer
from bert_ray.model.vocabulary import add_tokens, is_wordpiece, stands_alone, whole_texts
from bert_ray.training.corpus.cleaning import clean
from bert_ray.training.corpus.counting import COUNTING, add_up, characters
from bert_ray.training.corpus.engines import engine
from bert_ray.training.corpus.job import VocabularyJob
from bert_ray.training.corpus.sources import Part, Source, open_sources, parts_of
from bert_ray.training.corpus.stages import do_stage, failure_lines, reconcile
from bert_ray.training.corpus.work import Task, Work

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PREFIX = "##"
# Rows of BERT's tokens: what its tokenizer says where nobody asks for more or less.
_MAX_LENGTH = 512
# Longer words are unknown to WordPiece, whatever the vocabulary.
_LONGEST_WORD = 100
# What a domain's word is made of: letters and their marks, the vowels of Hindi and Thai among them.
_LETTERS = regex.compile(r"\p{L}[\p{L}\p{M}]*")
# The texts come in units of about so many rows, or so many bytes.
_UNIT_ROWS, _UNIT_BYTES = 50_000, 64 * 2**20
# What the summary measures on: so many texts, and so many characters of each.
_JUDGED_TEXTS, _JUDGED_CHARACTERS = 2_000, 2_000
# For which no more is cleaned of a text, and no more read in all.
_READ_CHARACTERS, _READ_IN_ALL = 50_000, 2**28
# The library's trainer is handed words as often as they stand in the texts, but no more than so many in all (half a
# minute a hundred million on one core): of a larger lake the counts are divided by what makes it so many.
_MOST_WORDS = 300_000_000
# Characters that it is handed at once.
_HANDED_CHARACTERS = 2**16
# How counts that are being taken away are called.
_GONE = ".counts-gone"
# So few units are added up before anybody asks how far it is.
_QUICK = 100
# Words that become Python's at once.
_BATCH_WORDS = 2**18
# Tasks whose bundles are nothing but an encoder and its language-model head: no labels or index hang on the old tokens.
_EXTENDABLE = ("embedding", "similarity", "fill-mask")
# The spread of an embedding that has no old pieces: drawn with this seed.
_SEED = 0


@dataclasses.dataclass(slots=True, kw_only=True)
class Summary:
    """What came out.

    Attributes:
        tokens: V; 0: the vocabulary is not made yet.
        added: tokens that the model's vocabulary had not; empty for a new vocabulary.
        pieces_per_word: on some of the texts; `before`: with the vocabulary as it was, None for a new one.
        unknown: share of the tokens, on the same texts.
        failures: each file that could not be read, and why.
        stopped: why the run ended before its end, "" where it did not.
        replaced: documents with bytes in whose place U+FFFD stands.
        skippable: whether `on_error=skip` would leave out what failed.
    """

    output: str
    tokens: int = 0
    seconds: float = 0.0
    pieces_per_word: float = 0.0
    unknown: float = 0.0
    added: list[str] = dataclasses.field(default_factory=list)
    before: float | None = None
    failures: list[str] = dataclasses.field(default_factory=list)
    stopped: str = ""
    replaced: int = 0
    skippable: bool = True

    @property
    def exit_status(self) -> int:
        """0: the vocabulary is made, of all files; 1: files could not be read, or counts not be written."""
        return int(not self.tokens or bool(self.failures))

    def __str__(self) -> str:
        lines = [f"vocabulary {self.output} is not made yet"]
        if self.tokens:
            what = (
                f"{len(self.added):,} tokens added, {self.tokens:,} in all" if self.added else f"{self.tokens:,} tokens"
            )
            was = f" (before: {self.before:.2f})" if self.before is not None else ""
            lines = [
                f"vocabulary {self.output}: {what} ({self.seconds:.1f} s)",
                f"  {self.pieces_per_word:.2f} tokens a word{was}, {self.unknown:.2%} of them unknown",
            ]
        if self.added:
            lines.append(f"  added: {', '.join(self.added[:12])}{', …' if len(self.added) > 12 else ''}")
        if self.replaced:
            lines.append(f"  {self.replaced:,} documents had bytes that are no text")
        lines += failure_lines(self.failures, self.stopped, finished=bool(self.tokens), skippable=self.skippable)
        return "\n".join(lines)


def run(job: VocabularyJob) -> Summary:
    """Make a vocabulary, or a bundle with a wider one; prints progress to standard error and a summary at the end.

    Raises:
        BertRayError: the job or the input is at fault, the output holds something else, or another process works on it.
    """
    clock = time.monotonic()
    output = local_target(job.output)
    _check_output(job, output)
    sources = open_sources(job.inputs, job.columns, job.reading)
    for source in job.inputs:
        check_apart(output, local_path(source))
    bundle = _to_extend(job.extend) if job.extend else None
    make_room(output)
    place = output.with_name(f"{output.name}.run")
    # As a training run of the same output, which would have its checkpoints there.
    with exclusive(output.with_name(f".{output.name}.lock"), f"the vocabulary {output}"):
        _check_counts(place)
        summary = Summary(output=str(output), skippable=job.on_error != "skip")
        try:
            _make(job, output, place, sources, bundle, summary)
        except BertRayError:
            for text in summary.failures:
                print(f"left out: {text}", file=sys.stderr, flush=True)
            raise
        finally:
            with contextlib.suppress(LakeError):  # The counts cannot be listed now: they stay.
                if summary.tokens or not Journal(place).receipts():
                    _remove(place)
    summary.seconds = time.monotonic() - clock
    print(summary, flush=True)
    return summary


def _make(
    job: VocabularyJob, output: Path, place: Path, sources: Sequence[Source], bundle: Bundle | None, summary: Summary
) -> None:
    from tokenizers import Tokenizer, models

    old = bundle.tokenizer() if bundle else None
    backend = old.backend_tokenizer if old else _bert(Tokenizer(models.WordPiece(unk_token="[UNK]")), job.lowercase)
    # First, so that what stands there is told from anything else, whenever this is killed.
    told = {"version": __version__, "kind": "vocabulary", "job": dataclasses.asdict(job)}
    Journal(place).write_run(told | {"settings": {"counts of the vocabulary": str(output)}})
    work = _work(job, place, sources, backend)
    parts = _count(job, work, sources, summary)
    if summary.stopped or (summary.failures and (not parts or job.on_error != "skip")):
        return
    texts = _some(sources, parts, job.markup)
    files = [work.place("count", part.id) for part in parts]
    if len(files) < _QUICK:
        counts = add_up(files)
    else:
        with Progress(what="add up", units=len(files), rows=None) as progress:
            counts = add_up(files, progress)
    if not counts.num_rows or not texts:
        raise JobError("input: there is no text in it: name other columns, or another input")
    _check_output(job, output)  # Counting may have taken hours.
    if bundle and old:
        tokenizer, summary.added = _extend(job, bundle, old, counts, output)
        summary.before = _measure(old, texts)[0]
    else:
        tokenizer = _train(job, backend, counts)
        _put(tokenizer, place / "vocabulary", output)
    with output_errors(output):  # Before the counts go.
        sync_tree(output)
        sync(output.parent)
    summary.tokens = len(tokenizer)
    summary.pieces_per_word, summary.unknown = _measure(tokenizer, texts)


def _work(job: VocabularyJob, place: Path, sources: Sequence[Source], backend: Backend) -> Work:
    """What all parts are counted by, with its tokenizer written for the workers."""
    state = backend.to_str()
    told = {
        "counting": COUNTING,
        "tokenizer": state,
        "input": [source.name for source in sources],
        "columns": job.columns,
        "reading": dataclasses.asdict(job.reading),
        "markup": job.markup,
    }
    work = Work(
        session=uuid.uuid4().hex[:12],
        engine=job.engine,
        output=str(place),
        readers=tuple(source.reader() for source in sources),
        markup=job.markup,
        digest=hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12],
    )
    with output_errors(place):
        work.tokenizer.parent.mkdir(parents=True, exist_ok=True)
        fresh = work.tokenizer.with_name(f"{work.tokenizer.name}.{os.getpid()}.new")
        fresh.write_text(state, "utf-8")
        os.replace(fresh, work.tokenizer)
    return work


def _count(job: VocabularyJob, work: Work, sources: Sequence[Source], summary: Summary) -> list[Part]:
    """Count the words of all parts that are not counted yet; returns the parts that are."""
    journal = Journal(work.output)
    reconcile(journal)
    parts = parts_of(sources, _UNIT_ROWS, _UNIT_BYTES)
    names = {part.id: work.name("count", part.id) for part in parts}
    tasks = [Task(stage="count", part=part) for part in parts]
    if receipts := journal.receipts():
        counted = len(receipts & set(names.values()))
        print(f"{counted:,} of {len(parts):,} units are counted already", file=sys.stderr, flush=True)
    # No cluster is asked for where all is counted.
    left = set(names.values()) - receipts
    with engine(job if left else dataclasses.replace(job, engine="local")) as on:
        ended = do_stage(on, work, tasks, "count words", stop_at_failure=job.on_error == "fail")
    summary.failures, summary.stopped = ended.failures, ended.stopped
    counted_parts = [part for part in parts if names[part.id] in ended.done]
    summary.replaced = sum(journal.receipt(names[part.id])["replaced"] for part in counted_parts)
    return counted_parts


def _some(sources: Sequence[Source], parts: Sequence[Part], markup: str) -> list[str]:
    """The heads of the first texts: what the summary measures on."""
    readers = [source.reader() for source in sources]
    found: list[str] = []
    read, gone = 0, None
    for part in parts:
        try:
            for texts, _ in readers[part.source].read(part):
                for text in texts:
                    read += len(text or "")
                    if text and (body := clean(text[:_READ_CHARACTERS], markup)):
                        found.append(body[:_JUDGED_CHARACTERS])
                if len(found) >= _JUDGED_TEXTS or (found and read > _READ_IN_ALL):
                    return found[:_JUDGED_TEXTS]
        except LakeError as error:  # A file that has gone since it was counted: others tell as much.
            gone = error
    if gone is not None and not found:
        raise gone
    return found


def _train(job: VocabularyJob, backend: Backend, counts: pa.Table) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = _alphabet(backend, characters(counts), job)
    if len(SPECIAL) + len(alphabet) >= job.size:
        raise JobError(
            f"size {job.size:,} has no room for words beside the {len(alphabet):,} characters: give a larger size, or "
            "a smaller alphabet"
        )
    divisor = max(1, -(-pc.sum(counts["count"]).as_py() // _MOST_WORDS))
    trainer = trainers.WordPieceTrainer(
        vocab_size=job.size,
        min_frequency=max(1, job.min_count // divisor),
        # Numbered in this order, whatever order the trainer meets them in.
        special_tokens=[*SPECIAL, *alphabet],
        initial_alphabet=[token for token in alphabet if not token.startswith(_PREFIX) or token == _PREFIX],
        limit_alphabet=sum(not token.startswith(_PREFIX) for token in alphabet),
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(_repeated(counts, divisor), trainer)
    return _bert_tokenizer(words.get_vocab(with_added_tokens=True), job.lowercase)


def _repeated(counts: pa.Table, divisor: int) -> Iterator[str]:
    """Each word as often as it was counted, blanks between them: the library counts, and takes no counts."""
    held: list[str] = []
    size = 0
    for batch in counts.filter(pc.greater_equal(counts["count"], divisor)).to_batches(max_chunksize=_BATCH_WORDS):
        for word, count in zip(batch.column("word").to_pylist(), batch.column("count").to_pylist(), strict=True):
            left = count // divisor
            while left:
                times = min(left, max(1, (_HANDED_CHARACTERS - size) // (len(word) + 1)))
                held.append(f"{word} " * times)
                size += len(held[-1])
                left -= times
                if size >= _HANDED_CHARACTERS - len(word):
                    yield "".join(held)
                    held, size = [], 0
    if held:
        yield "".join(held)


def _alphabet(backend: Backend, often: Counter[str], job: VocabularyJob) -> list[str]:
    """The characters of a vocabulary, in a fixed order: by themselves, and where they go on a word."""
    found = sorted((-count, character) for character, count in often.items() if not character.isspace())
    kept = sorted(character for count, character in found[: job.alphabet] if -count >= job.min_count)
    return [*kept, *(_PREFIX + character for character in kept if not stands_alone(backend, character))]


def _bert(backend: Backend, lowercase: bool) -> Backend:
    """BERT's way to part a text into words: Chinese characters apart, marks apart, case as told."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_PREFIX)
    return backend


def _bert_tokenizer(known: dict[str, int], lowercase: bool) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, processors
    from transformers import BertTokenizerFast

    backend = _bert(Tokenizer(models.WordPiece(known, unk_token="[UNK]")), lowercase)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, known[token]) for token in ("[CLS]", "[SEP]")],
    )
    return BertTokenizerFast(tokenizer_object=backend, model_max_length=_MAX_LENGTH, do_lower_case=lowercase)


def _to_extend(reference: str) -> Bundle:
    """A bundle whose vocabulary can grow."""
    bundle = load_bundle(reference)
    if bundle.card.task not in _EXTENDABLE:
        raise JobError(
            f"extend: {bundle.reference} is a model of task {bundle.card.task}: extend the encoder that it was trained "
            "from, and train it again"
        )
    if not is_wordpiece(bundle.tokenizer()):
        raise JobError(f"extend: the vocabulary of {bundle.reference} is not one of WordPiece, and spells every text")
    return bundle


def _extend(
    job: VocabularyJob, bundle: Bundle, old: PreTrainedTokenizerFast, counts: pa.Table, output: Path
) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Write a bundle whose vocabulary has the texts' frequent words; returns its tokenizer and what was added."""
    from bert_ray.model.tasks.translation_start import spelling

    # Characters first: a word with one that is unknown would be unknown whole.
    tokenizer, added = spelling(old, characters(counts), job.min_count)
    if chosen := _frequent(tokenizer, counts, job):
        tokenizer = add_tokens(tokenizer, chosen)
        added = [*added, *chosen]
    if not added:
        raise JobError(
            f"extend: no word stands {job.min_count} times in the texts that {bundle.reference} has to spell in pieces:"
            " its vocabulary suits them as it is"
        )
    model = bundle.model()
    _widen(model, old, added)
    card = dataclasses.replace(
        bundle.card,
        metrics={},
        files={},
        fingerprint="",
        provenance={
            **bundle.card.provenance,
            "vocabulary": {
                "base": bundle.reference,
                "base_fingerprint": bundle.fingerprint,
                "input": job.inputs,
                "added": len(added),
                "version": __version__,
            },
        },
    )
    save_bundle(output, model, tokenizer, card, task=bundle.task)
    return tokenizer, added


def _frequent(tokenizer: PreTrainedTokenizerFast, counts: pa.Table, job: VocabularyJob) -> list[str]:
    """The most frequent words that take several tokens.

    Of letters alone: numbers and codes are not a domain's words.
    """
    known, found = tokenizer.get_vocab(), list[str]()
    often = counts.filter(pc.greater_equal(counts["count"], job.min_count))
    for batch in often.to_batches(max_chunksize=_BATCH_WORDS):
        for word in batch.column("word").to_pylist():
            if 1 < len(word) <= _LONGEST_WORD and word not in known and _LETTERS.fullmatch(word):
                found.append(word)
                if len(found) == job.words:
                    return found
    return found


def _widen(model: Any, old: PreTrainedTokenizerFast, added: Sequence[str]) -> None:
    """Embeddings of the added tokens: the mean of those of the pieces they were spelt with.

    What could not be spelt is drawn with the spread of the others. The head's bias, where there is one, is likewise the
    mean, or stays 0.
    """
    import torch

    names = [token.removeprefix(_PREFIX) for token in added]
    spelt = whole_texts(old).encode_batch(names, add_special_tokens=False)
    special = set(old.all_special_ids)
    rows = model.get_input_embeddings().weight.detach().clone()
    first = max(old.get_vocab().values()) + 1
    # Some models have more rows than tokens: those without a token are not asked for.
    model.resize_token_embeddings(max(len(rows), first + len(added)), mean_resizing=False)
    draw = torch.Generator().manual_seed(_SEED)
    weight = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    with torch.no_grad():
        for number, encoding in enumerate(spelt, first):
            if encoding.ids and special.isdisjoint(encoding.ids):
                weight[number] = rows[encoding.ids].mean(0)
                if bias is not None:
                    bias[number] = bias[encoding.ids].mean()
            else:
                weight[number] = torch.randn(rows.shape[1], generator=draw) * rows.std()
    model.tie_weights()


def _measure(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[float, float]:
    """Tokens a word, and the share of them that is unknown."""
    encodings = whole_texts(tokenizer).encode_batch(texts, add_special_tokens=False)
    ids = np.concatenate([np.array(encoding.ids, np.int64) for encoding in encodings])
    words = sum(len(set(encoding.word_ids)) for encoding in encodings)
    return len(ids) / max(1, words), float((ids == tokenizer.unk_token_id).mean()) if len(ids) else 0.0


def _check_output(job: VocabularyJob, output: Path) -> None:
    """What stands there already may be replaced if it is of the same kind."""
    mark = "config.json" if job.extend else "tokenizer.json"
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / mark).exists())):
        raise JobError(f"the output {output} holds something else: choose another directory")
    if mark == "tokenizer.json" and (output / "config.json").exists():
        raise JobError(f"the output {output} is a model, whose vocabulary it must keep: choose another directory")


def _check_counts(place: Path) -> None:
    """Where the counts go, there may be those of an earlier run, and nothing else."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*{_GONE}"):
        shutil.rmtree(left, ignore_errors=True)
    if not place.exists():
        return
    ours = False
    if place.is_dir() and not place.is_symlink():
        journal = Journal(place)
        begun = journal.read_run()
        # A run that was killed at its very start leaves directories alone.
        empty = not {path.name for path in place.iterdir()} - {FOLDER} and not journal.receipts()
        ours = begun["kind"] == "vocabulary" if "kind" in begun else not begun and empty
        ours = ours and not (journal.root / "lock").exists()  # Of another command, which works there.
    if not ours:
        raise JobError(f"{place} holds something else, and the counts of words would go there: choose another output")


def _remove(place: Path) -> None:
    """Take the counts away: by another name first, so that what a kill leaves of them is not in the way."""
    gone = place.with_name(f".{place.name}.{os.getpid()}{_GONE}")
    with contextlib.suppress(OSError):
        os.replace(place, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _put(tokenizer: PreTrainedTokenizerFast, fresh: Path, output: Path) -> None:
    """Write a tokenizer so that it becomes visible whole.

    Args:
        tokenizer: to write.
        fresh: where it is written, on the output's file system.
        output: where it is to stand.
    """
    with output_errors(output):
        shutil.rmtree(fresh, ignore_errors=True)
        save_tokenizer(tokenizer, fresh)
        put_in_place(fresh, output)
