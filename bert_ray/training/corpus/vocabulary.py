"""A WordPiece vocabulary from texts, or a domain's frequent words into the vocabulary that a model has.

A new vocabulary is a function of the texts. The library's trainer by itself gives other tokens at each run: it numbers
characters in the order of a hash table, and among pairs of one frequency the smaller numbers win. So the characters are
counted and numbered here beforehand.

Shapes: V tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from bert_ray import __version__
from bert_ray.errors import JobError
from bert_ray.lake.journal import output_errors
from bert_ray.lake.progress import Progress
from bert_ray.lake.tables import local_target
from bert_ray.model.bundle import put_in_place
from bert_ray.model.vocabulary import add_tokens, is_wordpiece, stands_alone, whole_texts
from bert_ray.training.corpus.cleaning import clean, slices
from bert_ray.training.corpus.job import VocabularyJob
from bert_ray.training.corpus.sources import Source, open_sources

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PREFIX = "##"
# Rows of BERT's tokens: what its tokenizer says where nobody asks for more or less.
_MAX_LENGTH = 512
# Words of one length only are counted, as WordPiece has it: longer ones are unknown whatever the vocabulary.
_LONGEST_WORD = 100
# What a domain's word is made of: letters and their marks, the vowels of Hindi and Thai among them.
_LETTERS = regex.compile(r"\p{L}[\p{L}\p{M}]*")
# The texts come in units of about so many rows, or so many bytes.
_UNIT_ROWS, _UNIT_BYTES = 50_000, 64 * 2**20
# What the summary measures on: so many texts, and so many characters of each.
_JUDGED_TEXTS, _JUDGED_CHARACTERS = 2_000, 2_000
_SLICE_CHARACTERS = 2**18
# Tasks whose bundles are nothing but an encoder and its language-model head: no labels or index hang on the old tokens.
_EXTENDABLE = ("embedding", "similarity", "fill-mask")
# The spread of an embedding that has no old pieces: drawn with this seed.
_SEED = 0


@dataclasses.dataclass(slots=True, kw_only=True)
class Summary:
    """What came out.

    Attributes:
        tokens: V.
        added: tokens that the model's vocabulary had not; empty for a new vocabulary.
        pieces_per_word: on some of the texts; `before`: with the vocabulary as it was, None for a new one.
        unknown: share of the tokens, on the same texts.
    """

    output: str
    tokens: int
    seconds: float
    pieces_per_word: float
    unknown: float
    added: list[str] = dataclasses.field(default_factory=list)
    before: float | None = None

    def __str__(self) -> str:
        what = f"{len(self.added):,} tokens added, {self.tokens:,} in all" if self.added else f"{self.tokens:,} tokens"
        was = f" (before: {self.before:.2f})" if self.before is not None else ""
        lines = [
            f"vocabulary {self.output}: {what} ({self.seconds:.1f} s)",
            f"  {self.pieces_per_word:.2f} tokens a word{was}, {self.unknown:.2%} of them unknown",
        ]
        if self.added:
            lines.append(f"  added: {', '.join(self.added[:12])}{', …' if len(self.added) > 12 else ''}")
        return "\n".join(lines)


def run(job: VocabularyJob) -> Summary:
    """Make a vocabulary, or a bundle with a wider one; prints progress to standard error and a summary at the end.

    Raises:
        BertRayError: the job or the input is at fault, or the output holds something else.
    """
    clock = time.monotonic()
    output = local_target(job.output)
    _check_output(output, "config.json" if job.extend else "tokenizer.json")
    texts = _Texts(open_sources(job.inputs, job.columns, job.reading), job.markup)
    if job.extend:
        old, tokenizer, added = _extend(job, texts, output)
        before = _measure(old, texts.some)[0]
    else:
        tokenizer, added, before = _train(job, texts), [], None
        _put(tokenizer, output)
    pieces, unknown = _measure(tokenizer, texts.some)
    summary = Summary(
        output=str(output),
        tokens=len(tokenizer),
        seconds=time.monotonic() - clock,
        pieces_per_word=pieces,
        unknown=unknown,
        added=added,
        before=before,
    )
    print(summary, flush=True)
    return summary


class _Texts:
    """The texts of some sources, cleaned, as often as they are asked for; of long ones a slice at a time.

    Attributes:
        some: the heads of the first of them, once they were read.
    """

    def __init__(self, sources: Sequence[Source], markup: str) -> None:
        self._sources, self._markup = sources, markup
        self._parts = [
            part for number, source in enumerate(sources) for part in source.parts(number, _UNIT_ROWS, _UNIT_BYTES)
        ]
        self.some: list[str] = []

    def read(self, what: str) -> Iterator[str]:
        """All of them."""
        readers = [source.reader() for source in self._sources]
        rows = [part.unit.rows for part in self._parts]
        total = None if None in rows else sum(row or 0 for row in rows)
        self.some = []
        with Progress(what=what, units=len(self._parts), rows=total) as progress:
            for part in self._parts:
                clock, count = time.monotonic(), 0
                for texts, _ in readers[part.source].read(part):
                    count += len(texts)
                    for text in texts:
                        if text and (body := clean(text, self._markup)):
                            if len(self.some) < _JUDGED_TEXTS:
                                self.some.append(body[:_JUDGED_CHARACTERS])
                            yield from slices(body, _SLICE_CHARACTERS)
                    progress.watch(count)
                progress.ended(count, time.monotonic() - clock, failed=False)
        if not self.some:
            raise JobError("input: there is no text in it: name other columns, or another input")


def _train(job: VocabularyJob, texts: _Texts) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, trainers

    backend = _bert(Tokenizer(models.WordPiece(unk_token="[UNK]")), job.lowercase)
    often: Counter[str] = Counter()
    for text in texts.read("count characters"):
        often.update(backend.normalizer.normalize_str(text))
    alphabet = _alphabet(backend, often, job)
    if len(SPECIAL) + len(alphabet) >= job.size:
        raise JobError(
            f"size {job.size:,} has no room for words beside the {len(alphabet):,} characters: give a larger size, or "
            "a smaller alphabet"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=job.size,
        min_frequency=job.min_count,
        # Numbered in this order, whatever order the trainer meets them in.
        special_tokens=[*SPECIAL, *alphabet],
        initial_alphabet=[token for token in alphabet if not token.startswith(_PREFIX) or token == _PREFIX],
        limit_alphabet=sum(not token.startswith(_PREFIX) for token in alphabet),
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    backend.train_from_iterator(texts.read("count words"), trainer)
    return _bert_tokenizer(backend.get_vocab(with_added_tokens=True), job.lowercase)


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


def _extend(
    job: VocabularyJob, texts: _Texts, output: Path
) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast, list[str]]:
    """Write a bundle whose vocabulary has the texts' frequent words; returns the tokenizers and what was added."""
    from bert_ray.model.bundle import load_bundle, save_bundle
    from bert_ray.model.tasks.translation_start import spelling

    bundle = load_bundle(job.extend or "")
    if bundle.card.task not in _EXTENDABLE:
        raise JobError(
            f"extend: {bundle.reference} is a model of task {bundle.card.task}: extend the encoder that it was trained "
            "from, and train it again"
        )
    old = bundle.tokenizer()
    if not is_wordpiece(old):
        raise JobError(f"extend: the vocabulary of {bundle.reference} is not one of WordPiece, and spells every text")
    words, characters = _count_words(old.backend_tokenizer, texts)
    # Characters first: a word with one that is unknown would be unknown whole.
    tokenizer, added = spelling(old, characters, job.min_count)
    if chosen := _frequent(tokenizer, words, job):
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
    return old, tokenizer, added


def _count_words(backend: Backend, texts: _Texts) -> tuple[Counter[str], Counter[str]]:
    """How often each word that may be added stands in the texts, as the tokenizer parts them; and each character.

    Of letters alone, for numbers and codes are not a domain's, and their number grows with the texts.
    """
    words: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for text in texts.read("count words"):
        if backend.normalizer:
            text = backend.normalizer.normalize_str(text)
        characters.update(text)
        parts = (word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
        words.update(word for word in parts if 1 < len(word) <= _LONGEST_WORD and _LETTERS.fullmatch(word))
    return words, characters


def _frequent(tokenizer: PreTrainedTokenizerFast, words: Counter[str], job: VocabularyJob) -> list[str]:
    """The most frequent words that take several tokens."""
    known = tokenizer.get_vocab()
    found = sorted((-count, word) for word, count in words.items() if count >= job.min_count and word not in known)
    return [word for _, word in found[: job.words]]


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


def _check_output(output: Path, mark: str) -> None:
    """What stands there already may be replaced if it is of the same kind."""
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / mark).exists())):
        raise JobError(f"the output {output} holds something else: choose another directory")
    if mark == "tokenizer.json" and (output / "config.json").exists():
        raise JobError(f"the output {output} is a model, whose vocabulary it must keep: choose another directory")


def _put(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a tokenizer so that it becomes visible whole."""
    fresh = output.parent / f".{output.name}.{os.getpid()}.new"
    with output_errors(output):
        try:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(fresh)
            put_in_place(fresh, output)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
