"""A corpus as something to learn from: rows of one document each, masked anew each time they are seen.

A document longer than a row is cut into rows of about equal length. A step takes rows by their tokens, not by their
number, and lays them end to end without padding; attention stays within each row, so no document sees another.

The rows of all passes over the corpus form one stream, each pass in an order of its own. Step s takes the rows that
begin between its first and its last token of that stream: a function of seed and step alone. General text that is
replayed is a second corpus with a stream of its own, of which each step takes its share.

Shapes: R rows of all corpora, D documents, S samples (rows as their stream numbers them: pass * R + row), T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from bert_ray.errors import JobError
from bert_ray.model.examples import ranges
from bert_ray.model.packing import PackedBatch
from bert_ray.training.masking import NOT_ASKED, Vocabulary, budget, keys, mask_rows, mix, special_ids, uniform
from bert_ray.training.order import SMALLEST_BATCH, epoch_order, mean_batch, smallest_step
from bert_ray.training.schedule import share_of
from bert_ray.training.shards import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bert_ray.model.examples import Examples
    from bert_ray.training.job import TrainJob

# Rows that are judged by get their masks from a seed of their own, the same after each round.
_JUDGED = 0x7E57
# So often another document's row is drawn before one stays as it is; and what the first draw's noise is mixed with.
_DRAWS, _FIRST_DRAW = 8, 32
# A row of two parts has this many tokens at least: one each.
_TWO_PARTS = 2
# Tokens that end a sentence, where a row may be parted.
_ENDS = (".", "!", "?", "。", "！", "？", "…")
_NO_PARTS, _AS_IT_IS, _CHANGED = -1, 0, 1


@dataclass(kw_only=True, slots=True)
class Marks:
    """What a row needs of the tokenizer.

    Attributes:
        begin, end: ids that stand before a row, and behind each of its parts.
        vocabulary: see masking.Vocabulary.
        ends: ids of tokens that end a sentence.
    """

    begin: int
    end: int
    vocabulary: Vocabulary
    ends: np.ndarray


def marks_of(tokenizer: PreTrainedTokenizerFast, name: str) -> Marks:
    """What pretraining needs of a tokenizer.

    Raises:
        JobError: see `special_ids`.
    """
    mask, begin, end = special_ids(tokenizer, name)
    special = set(tokenizer.all_special_ids)
    known = tokenizer.get_vocab()
    ordinary = np.array(sorted(value for value in known.values() if value not in special), np.int64)
    return Marks(
        begin=begin,
        end=end,
        vocabulary=Vocabulary(mask=mask, ordinary=ordinary),
        ends=np.array([known[token] for token in _ENDS if token in known], np.int64),
    )


class Rows:
    """The documents of a split, cut into rows.

    Attributes:
        lengths: content tokens of each row, int64 (R,), special tokens not counted.
    """

    def __init__(self, documents: Documents, room: int) -> None:
        """Cut every document into as few rows of at most `room` tokens as can be, of about equal length."""
        self.documents = documents
        sizes = documents.sizes
        counts = -(-sizes // room)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._sizes, self._counts = sizes, counts
        document = np.repeat(np.arange(len(sizes)), counts)
        start, stop = self._stretch(document, np.arange(len(document)))
        self.lengths = stop - start

    def __len__(self) -> int:
        return int(self._first[-1])

    def before(self, document: int) -> int:
        """How many rows the documents before one have."""
        return int(self._first[document])

    def document_of(self, rows: np.ndarray) -> np.ndarray:
        """The document that each row stems from, int64."""
        return np.searchsorted(self._first, rows, side="right") - 1

    def siblings(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first row of each row's document and the one behind its last, int64 each."""
        document = self.document_of(rows)
        return self._first[document], self._first[document + 1]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of rows end to end, int64 (T,), and whether each begins a word, bool (T,)."""
        document = self.document_of(rows)
        return self.documents.take(document, *self._stretch(document, rows))

    def _stretch(self, document: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in its document each row begins and ends."""
        part, parts, size = rows - self._first[document], self._counts[document], self._sizes[document]
        return part * size // parts, (part + 1) * size // parts


class _Stream:
    """Rows side by side, pass after pass, each pass in an order of its own."""

    def __init__(self, lengths: np.ndarray, first: int, rows: int, seed: int) -> None:
        """Set up.

        Args:
            lengths: tokens of its rows, int64.
            first: the number of the first of them.
            rows: how many there are in all streams: a sample is pass * rows + row.
            seed: of the order.
        """
        self._lengths, self._first, self._rows, self._seed = lengths, first, rows, seed
        self._order: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))
        self.pass_tokens = int(lengths.sum())

    def between(self, begin: int, end: int) -> np.ndarray:
        """The samples that begin between two tokens of the stream, the second not included."""
        chosen = [np.empty(0, np.int64)]
        while begin < end:
            number, inside = divmod(begin, self.pass_tokens)
            order, starts = self._pass(number)
            last = min(self.pass_tokens, inside + end - begin)
            low, high = np.searchsorted(starts, [inside, last])
            chosen.append(number * self._rows + self._first + order[low:high])
            begin += last - inside
        return np.concatenate(chosen)

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a pass in order, and where each begins in it, in tokens."""
        if self._order[0] != number:
            order = epoch_order(len(self._lengths), self._seed, number)
            lengths = self._lengths[order]
            self._order = number, order, np.cumsum(lengths) - lengths
        return self._order[1], self._order[2]


class CorpusSource:
    """Rows of a corpus as samples; see the module's first lines."""

    examples: Examples | None = None

    def __init__(self, rows: Rows, marks: Marks, job: TrainJob, judged: bool = False, own: int | None = None) -> None:
        """Set up.

        Args:
            rows: of one split.
            marks: of its tokenizer.
            job: says how much a step takes, and what is masked.
            judged: these rows are judged by: the first `validation_rows` in an order of their own, always the same.
            own: so many rows are the corpus's, those behind them are replayed; None: all are its own.
        """
        self._rows, self._marks, self._options, self._seed = rows, marks, job.pretraining, job.seed
        self._special = 2 if job.pretraining.sentences == "none" else 3
        self._lengths = rows.lengths + self._special
        self._all = len(rows)
        self._judged = None
        if judged:
            self._judged = epoch_order(self._all, _JUDGED, 0)[: job.pretraining.validation_rows]
        self._own = own = self._all if own is None else own
        streams = [_Stream(self._lengths[:own], 0, self._all, self._seed)]
        self._shares = [1.0]
        if own < self._all:
            streams.append(_Stream(self._lengths[own:], own, self._all, self._seed))
            self._shares = [1.0 - job.data.replay_share, job.data.replay_share]
        self._streams = streams
        if not judged and not all(stream.pass_tokens for stream in streams):
            raise JobError(f"{job.data.train if not streams[0].pass_tokens else job.data.replay} has no rows to learn")
        self._batch_tokens, self._warmup = job.batch_tokens, job.batch_warmup
        self._smallest = self._batch_tokens / SMALLEST_BATCH if judged else self._smallest_step(job)
        tokens = job.epochs * streams[0].pass_tokens / self._shares[0]
        mean_tokens = job.batch_tokens * mean_batch(self._warmup, self._smallest / job.batch_tokens)
        self.steps = job.steps or max(1, math.ceil(tokens / mean_tokens))
        self._rising = share_of(self._warmup, self.steps)
        while not job.steps and self._tokens_before(self.steps) < tokens:  # The line has corners.
            self.steps += 1
            self._rising = share_of(self._warmup, self.steps)
        self.round_steps = min(job.evaluate_every, self.steps)
        self.tokens = self._tokens_before(self.steps)

    def __len__(self) -> int:
        return self._all if self._judged is None else len(self._judged)

    def select(self, step: int) -> np.ndarray:
        """See Source."""
        begin, end = self._tokens_before(step), self._tokens_before(step + 1)
        return np.concatenate(
            [
                stream.between(round(share * begin), round(share * end))
                for share, stream in zip(self._shares, self._streams, strict=True)
            ]
        )

    def lengths_of(self, samples: np.ndarray) -> np.ndarray:
        """See Source."""
        return self._lengths[self._row_of(samples)]

    def squares_of(self, samples: np.ndarray) -> np.ndarray:
        """See Source."""
        return self.lengths_of(samples).astype(np.int64) ** 2

    def weigh(self, samples: np.ndarray) -> float:
        """See Source. The tokens that are to be guessed."""
        return float(budget(self._rows.lengths[self._row_of(samples)], self._options.mask_rate).sum())

    def batch(self, samples: np.ndarray, step: int | None = None) -> tuple[PackedBatch, torch.Tensor]:
        """See Source. Targets as `Pretraining.losses` wants them; its rows are the samples."""
        rows = self._row_of(samples)
        noise = keys(self._seed, samples) if self._judged is None else keys(_JUDGED, rows)
        sizes = self._rows.lengths[rows]
        ids, starts = self._rows.take(rows)
        whole = starts if self._options.whole_words else None
        split, changed = np.zeros(len(rows), np.int64), np.full(len(rows), _NO_PARTS)
        if self._special > 2:
            ids, whole, split, changed = self._in_parts(ids, whole, sizes, rows, noise)
        ids, targets = mask_rows(ids, sizes, noise, self._options.mask_rate, self._marks.vocabulary, whole)
        lengths = sizes + self._special
        ends = np.concatenate([[0], np.cumsum(lengths)])
        begin = ends[:-1]
        # Places of the content: all but those of the special tokens.
        content = np.ones(int(ends[-1]), bool)
        content[begin] = content[ends[1:] - 1] = False
        types = None
        if self._special > 2:
            middle = begin + 1 + split
            content[middle] = False
            kinds = np.zeros(len(content), np.int64)
            kinds[ranges(middle + 1, ends[1:])] = 1
            types = torch.from_numpy(kinds)
        laid, asked = np.full(len(content), self._marks.end), np.full(len(content), NOT_ASKED)
        laid[begin] = self._marks.begin
        laid[content], asked[content] = ids, targets
        batch = PackedBatch(
            input_ids=torch.from_numpy(laid),
            position_ids=torch.from_numpy(np.arange(len(content)) - np.repeat(begin, lengths)),
            token_type_ids=types,
            lengths=tuple(lengths.tolist()),
            cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
            rows=samples,
        )
        counts = budget(sizes, self._options.mask_rate)
        return batch, torch.from_numpy(np.concatenate([asked, changed, counts]))

    def where(self, samples: np.ndarray) -> str:
        """See Source."""
        shards = self._rows.documents.shard_of(self._rows.document_of(self._row_of(samples)))
        shown = ", ".join(shards[:5]) + (f" and {len(shards) - 5} more" if len(shards) > 5 else "")
        return f"{len(samples)} rows of {shown}"

    def _row_of(self, samples: np.ndarray) -> np.ndarray:
        return samples % self._all if self._judged is None else self._judged[samples]

    def _smallest_step(self, job: TrainJob) -> float:
        """Tokens of the first step of a batch-size warm-up: in as many as the longest row has, one begins.

        Raises:
            JobError: whole steps have fewer.
        """
        full, share, longest = job.batch_tokens, self._shares[0], int(self._lengths[: self._own].max())
        rounded = longest + (2 if len(self._shares) > 1 else 0)  # Shares of steps are rounded to whole tokens.
        if full * share < rounded:
            raise JobError(
                f"batch_tokens is {full}, but rows have up to {longest} tokens, and some steps would have none: give "
                f"batch_tokens={math.ceil(rounded / share)} or more, or a smaller max_length"
            )
        return smallest_step(full, longest, share)

    def _tokens_before(self, step: int) -> int:
        """Tokens of the stream that the steps before this one take."""
        full = self._batch_tokens
        if not self._rising:
            return step * full
        # The sum over the steps of a line.
        low, rising = self._smallest, min(step, self._rising)
        risen = rising * low + (full - low) * rising * (rising - 1) / 2 / self._rising
        return round(risen) + (step - rising) * full

    def _in_parts(
        self, ids: np.ndarray, whole: np.ndarray | None, sizes: np.ndarray, rows: np.ndarray, noise: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
        """Part each row in two near its middle, where a sentence ends if one does; change one row of two.

        Returns:
            ids, word starts, the first part's tokens of each row, and _AS_IT_IS or _CHANGED (_NO_PARTS for rows of
            one token).
        """
        first = np.cumsum(sizes) - sizes
        split = self._splits(ids, sizes, first)
        change = uniform(mix(noise ^ np.uint64(4))) < 0.5
        follows = self._options.sentences == "next"
        if follows:
            others, found = self._of_other_documents(rows, sizes - split, noise)
            change &= found
        changed = np.where(sizes < _TWO_PARTS, _NO_PARTS, np.where(change, _CHANGED, _AS_IT_IS))
        moved = changed == _CHANGED
        if not follows:
            # Rows to change begin with their second part.
            begins = np.where(moved, first + split, first)
            place = np.arange(len(ids)) - np.repeat(first, sizes)
            take = np.repeat(first, sizes) + (place + np.repeat(begins - first, sizes)) % np.repeat(sizes, sizes)
            split = np.where(moved, sizes - split, split)
            return ids[take], None if whole is None else whole[take], split, changed
        # The second part is as much of the other row as there was of its own: its beginning or its end, for one that
        # stays may end within a sentence, too.
        foreign, foreign_starts = self._rows.take(others)
        foreign_sizes = self._rows.lengths[others]
        foreign_first = np.cumsum(foreign_sizes) - foreign_sizes
        row = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(ids)) - first[row]
        second = moved[row] & (place >= split[row])
        at_end = uniform(mix(noise ^ np.uint64(16))) < 0.5
        begins = foreign_first + np.where(at_end, foreign_sizes - (sizes - split), 0)
        source = (begins[row] + place - split[row])[second]
        ids = ids.copy()
        ids[second] = foreign[source]
        if whole is not None:
            whole = whole.copy()
            whole[second] = foreign_starts[source]
        return ids, whole, split, changed

    def _of_other_documents(
        self, rows: np.ndarray, needed: np.ndarray, noise: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A row of another document for each row, of so many tokens at least, and whether there is any, bool.

        A shorter one would have to be repeated, which tells by itself that it does not follow. Of the same corpus:
        another one's would tell itself by its subject.
        """
        begin, stop = self._rows.siblings(rows)
        others, found = rows.copy(), np.zeros(len(rows), bool)
        # Among all that are of other documents; where rows are of about one length the first will do.
        lowest = np.where(rows < self._own, 0, self._own)
        count = np.where(rows < self._own, self._own, self._all - self._own) - (stop - begin)
        for draw in range(_DRAWS):
            at = mix(noise ^ np.uint64(_FIRST_DRAW + draw)) % np.maximum(1, count).astype(np.uint64)
            drawn = lowest + at.astype(np.int64)
            drawn = np.where(drawn >= begin, drawn + (stop - begin), drawn)
            drawn = np.where(count > 0, drawn, rows)
            fits = (count > 0) & (self._rows.lengths[drawn] >= needed) & ~found
            others, found = np.where(fits, drawn, others), found | fits
        if found.all():
            return others, found
        # Where few are as long: among those, of which some may be the row's own document's.
        for replayed, (lengths, order) in enumerate(self._by_length):
            here = np.flatnonzero(~found & ((rows >= self._own) == bool(replayed)))
            if not len(here):
                continue
            lowest = np.searchsorted(lengths, needed[here])
            count = (len(order) - lowest).astype(np.uint64)  # The row itself is one.
            for draw in range(_DRAWS, 2 * _DRAWS):
                drawn = order[lowest + (mix(noise[here] ^ np.uint64(_FIRST_DRAW + draw)) % count).astype(np.int64)]
                fits = ((drawn < begin[here]) | (drawn >= stop[here])) & ~found[here]
                others[here[fits]], found[here[fits]] = drawn[fits], True
        return others, found

    @cached_property
    def _by_length(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of the corpus, and of what is replayed: lengths of rows from short to long, and which rows they are."""
        ranked = []
        for first, last in ((0, self._own), (self._own, self._all)):
            lengths = self._rows.lengths[first:last]
            order = np.argsort(lengths, kind="stable")
            ranked.append((lengths[order], order + first))
        return ranked

    def _splits(self, ids: np.ndarray, sizes: np.ndarray, first: np.ndarray) -> np.ndarray:
        """After how many tokens each row is parted: behind the sentence's end nearest to its middle, else there."""
        split = np.maximum(1, sizes // 2)
        ends = np.flatnonzero(np.isin(ids, self._marks.ends))
        if not len(ends):
            return np.minimum(split, np.maximum(1, sizes - 1))
        row = np.searchsorted(first, ends, side="right") - 1
        after = ends - first[row] + 1
        inside = after < sizes[row]
        row, after = row[inside], after[inside]
        nearest = np.lexsort((np.abs(after - split[row]), row))
        row, after = row[nearest], after[nearest]
        leading = np.append(True, row[1:] != row[:-1])[: len(row)]
        split[row[leading]] = after[leading]
        return np.minimum(split, np.maximum(1, sizes - 1))
