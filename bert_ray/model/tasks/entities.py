"""Entities: names of people, places, products, … as spans of the text.

Output: list<struct<start: int32, end: int32, text: string, label: string, score: float32>> in order of the text; start
and end count code points, end exclusive, and text is what stands there. score is the mean over the entity's words of
the probability of their tags. A blank text has an empty list. A text longer than the model is read in overlapping
windows; a token that two windows share is taken from the one in which it stands farther from the edge, before tags
become entities: an entity on a seam is found once, whole.

Each word has the tag of its first token (`spans.py` says what a word is). Where the column is a list of words, start
and end count in the words joined by one blank each.

Shapes: B rows, P pieces (windows), T tokens, D hidden size, C tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from bert_ray.errors import ColumnError
from bert_ray.model.examples import Examples, Targets, ranges
from bert_ray.model.tasks import entity_truth
from bert_ray.model.tasks.base import Options, Outputs, Task, set_dropout
from bert_ray.model.tasks.entity_report import entities_report
from bert_ray.model.tasks.spans import (
    Tags,
    entity_runs,
    marked_texts,
    plain,
    plain_texts,
    read_tags,
    read_texts,
    stretches,
    text_tokens,
    window_overlap,
    word_begins,
)
from bert_ray.model.tokenization import Overflow, Pieces, Tokenizer, is_text, to_python_strings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.sections import Section

# Tokens without a tag of their own, as torch's cross_entropy ignores them.
_IGNORED = -100


@dataclass(kw_only=True, frozen=True, slots=True)
class EntitiesOptions(Options):
    """What may be chosen per call.

    Attributes:
        overflow: what becomes of a text longer than the model: `windows` (read in overlapping parts), `truncate` (only
            its beginning is looked at) or `head_tail`.
        overlap: tokens that neighbouring windows share, at most half a window: what a name sees on each side where a
            window ends.
    """

    overflow: Overflow = "windows"


@dataclass(kw_only=True, slots=True)
class Found:
    """Entities of B rows, in order of row and text.

    Attributes:
        row, start, end: int64 (E,); code points of the row, end exclusive.
        kind: int64 (E,), a position in `types`.
        score: float32 (E,).
        types: the model's entity types.
    """

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    kind: np.ndarray
    score: np.ndarray
    types: tuple[str, ...]


class Entities(Task):
    """Spans with a type."""

    kind: ClassVar[str] = "entities"
    metric: ClassVar[str] = "f1"
    blank_is_null: ClassVar[bool] = False
    level: ClassVar[Literal["row", "token"]] = "token"
    spans: ClassVar[bool] = True
    piece_is_sample: ClassVar[bool] = True
    options_type: ClassVar[type[Options]] = EntitiesOptions
    architecture: ClassVar[str | None] = "ForTokenClassification"
    headline: ClassVar[str] = "reaches an F1 of {f1:.1%}"

    @classmethod
    def labels_of(cls, config: PretrainedConfig) -> list[str]:
        """The entity types of the tags in the configuration."""
        return list(read_tags([config.id2label[index] for index in range(config.num_labels)]).types)

    def output_type(self) -> pa.DataType:
        """See the module's first lines."""
        fields = [("start", pa.int32()), ("end", pa.int32()), ("text", pa.string())]
        return pa.list_(pa.struct([*fields, ("label", pa.string()), ("score", pa.float32())]))

    def auto_class(self) -> Any:
        """AutoModelForTokenClassification."""
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def readable(self, task_input: str, kind: pa.DataType) -> bool:
        """Text, or a list of words."""
        return is_text(kind) or entity_truth.is_words(kind)

    def read(self, task_input: str, array: pa.Array | pa.ChunkedArray, column: str) -> pa.Array:
        """A text column as it is; a column of words as marked texts (`spans.marked_texts`)."""
        if not entity_truth.is_words(array.type):
            return super().read(task_input, array, column)
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
        return marked_texts(array)

    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
        """Windows by default."""
        room = self.card.max_length - tokenizer.num_special_tokens_to_add(pair=False)
        return Tokenizer(
            tokenizer,
            self.card.max_length,
            overflow=self.options.overflow,
            overlap=window_overlap(self.options.overlap, max(1, room)),
            spans=True,
        )

    def encode(self, tokenize: Tokenizer, inputs: Sequence[pa.Array]) -> Pieces:
        """Texts as pieces; the model sees given words joined by blanks."""
        return tokenize([plain_texts(inputs[0])])

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base's encoder with a fresh head; a base that has these very tags keeps its own."""
        from transformers import AutoConfig

        from bert_ray.model.bundle import read_model

        names = self.tags(1 + 2 * len(self.card.labels)).names
        config = AutoConfig.from_pretrained(base.directory, num_labels=len(names))
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        set_dropout(config, dropout, attention_dropout)
        model, _ = read_model(self.auto_class(), base.directory, config=config, ignore_mismatched_sizes=True)
        return model

    def tags(self, count: int) -> Tags:
        """What `count` outputs stand for: the configuration's tags where they fit the card, else O, B-…, I-….

        In training the configuration is the base's, whose head may be another task's.
        """
        if self.config is not None and self.config.num_labels == count:
            tags = read_tags([self.config.id2label[index] for index in range(count)])
            if sorted(tags.types) == sorted(self.card.labels):
                return tags
        return read_tags(["O", *(f"{prefix}-{label}" for label in self.card.labels for prefix in "BI")])

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Logits (T, C): transformers' own head over every token."""
        return model.classifier(model.dropout(hidden))

    # What comes out.

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Logits float32 (T, C) -> lists of structs."""
        texts = to_python_strings(inputs[0])
        found = self.find(outputs, pieces, texts)
        known = [plain(text) for text in texts]
        spans = zip(found.row.tolist(), found.start.tolist(), found.end.tolist(), strict=True)
        columns = [
            pa.array(found.start.astype(np.int32)),
            pa.array(found.end.astype(np.int32)),
            pa.array([known[row][start:end] for row, start, end in spans], pa.string()),
            pa.array(found.types, pa.string()).take(pa.array(found.kind)),
            pa.array(found.score),
        ]
        kind = self.output_type()
        return as_lists(found.row, len(texts), pa.StructArray.from_arrays(columns, fields=list(kind.value_type)))

    def find(self, outputs: Outputs, pieces: Pieces, texts: Sequence[str]) -> Found:
        """The entities, as arrays."""
        known = read_texts(texts)
        tokens = text_tokens(pieces, known, self.options.overlap)
        first = np.flatnonzero(word_begins(tokens, known, tokens.row))
        logits = outputs.values[tokens.number[first]]
        tags = self.tags(outputs.values.shape[1])
        said = logits.argmax(axis=1)
        # Probability of the tag that is said: its exponential, 1 after the shift, over the sum of all.
        best = logits.max(axis=1, keepdims=True, initial=-np.inf)
        score = (1.0 / np.exp(logits - best).sum(axis=1)).astype(np.float32)
        row = tokens.row[first]
        # What stands before a middle that was left out and what stands behind it are not one entity.
        run = (
            stretches(tokens, pieces, known, self.card.max_length)[first]
            if self.options.overflow == "head_tail"
            else row
        )
        begin, end = entity_runs(tags, said, run)
        # A word ends with its last token: the one before the next word's first.
        last = np.append(first[1:], len(tokens.number)) - 1
        sums = np.append(0.0, np.cumsum(score, dtype=np.float64))
        shift = known.offsets[row[begin]]
        return Found(
            row=row[begin],
            start=tokens.start[first[begin]] - shift,
            end=tokens.end[last[end]] - shift,
            kind=tags.kind[said[begin]],
            score=((sums[end + 1] - sums[begin]) / (end + 1 - begin)).astype(np.float32),
            types=tags.types,
        )

    # Training and evaluation.

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """The entity types.

        Raises:
            ColumnError: there is no entity in the whole table.
        """
        found = entity_truth.types_in(truth[0])
        if not found:
            raise ColumnError(f"there is no entity in its {len(truth[0])} rows; a model needs some to learn from")
        return found

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """Tags of words, or spans of a text, as spans of a text: list<struct<start, end, label>>.

        Raises:
            ColumnError: the columns are neither.
        """
        texts = super().read_truth(truth, inputs)[1]
        return [entity_truth.read_truth(truth[0], inputs[0], self.card.labels or ())], texts

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """Tags that do not fit their words, spans outside the text or over each other."""
        return entity_truth.faults(inputs[0], truth[0])

    def check_truth(self, truth: Sequence[pa.Array]) -> None:
        """Types that the model does not have are missed ones; but not all of them.

        Raises:
            ColumnError: none of the table's types is the model's.
        """
        found = entity_truth.types_in(truth[0])
        if found and not set(found) & set(self.card.labels):
            raise ColumnError(
                f"none of its entity types ({', '.join(found[:5])}) is one of the model's "
                f"({', '.join(self.card.labels[:5])}): give them the model's names"
            )

    def examples(self, tokenize: Tokenizer, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Examples:
        """Windows to learn from; each counts for as many as it has words."""
        pieces = self.encode(tokenize, inputs)
        targets = self.targets(pieces, inputs, truth)
        piece = np.repeat(np.arange(len(pieces)), pieces.tokens.lengths)
        weights = np.bincount(piece[targets.values != _IGNORED], minlength=len(pieces)).astype(np.float64)
        return Examples(pieces=pieces, targets=targets, weights=weights, inputs=inputs, truth=truth)

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """Each token's tag, int64 (T,): that of the word that it begins, else -100. An entity's first word has the B.

        Words are tagged by their first code point. A token that stands in two windows has its tag in both.

        Raises:
            ColumnError: a type that is none of the card's.
        """
        texts = read_texts(to_python_strings(inputs[0]))
        tokens = text_tokens(pieces, texts)
        begins = word_begins(tokens, texts, tokens.piece)
        tags = self.tags(1 + 2 * len(self.card.labels))
        spans = entity_truth.flat(truth[0])
        kinds = spans.kinds(tags.types)
        # Paint each entity onto its code points; 0 stays where there is none.
        starts, limit = spans.start + texts.offsets[spans.row], texts.offsets[spans.row + 1]
        ends = np.minimum(spans.end + texts.offsets[spans.row], limit)
        entity = np.zeros(int(texts.offsets[-1]) + 1, np.int64)
        entity[ranges(starts, ends)] = np.repeat(np.arange(1, len(starts) + 1), ends - starts)
        # How many words begin before each code point: an entity's first word has none before it in the entity.
        word = np.zeros(len(entity) + 1, np.int64)
        word[tokens.start[begins] + 1] = 1
        np.cumsum(word, out=word)
        at = tokens.start[begins]
        which = entity[at] - 1
        said = np.full(len(at), tags.names.index("O"), np.int64)
        inside = which >= 0
        opened = word[at[inside]] == word[starts[which[inside]]]
        kind = kinds[which[inside]]
        said[inside] = np.where(opened, tags.ids(begin=True)[kind], tags.ids(begin=False)[kind])
        values = np.full(len(pieces.tokens.ids), _IGNORED, np.int64)
        values[tokens.number[begins]] = said
        return Targets(values=values, offsets=pieces.tokens.offsets)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Sum of the cross-entropies of each window's words, (P,)."""
        losses = F.cross_entropy(
            outputs, targets, reduction="none", ignore_index=_IGNORED, label_smoothing=self.learning.label_smoothing
        )
        lengths = torch.tensor(batch.lengths, device=outputs.device)
        owners = torch.repeat_interleave(torch.arange(len(lengths), device=outputs.device), lengths)
        return losses.new_zeros(len(lengths)).index_add(0, owners, losses)

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Precision, recall and F1 of whole entities (start, end and type equal) by seqeval, over all types."""
        return self.per_type(annotations, truth)[0]

    @staticmethod
    def per_type(
        annotations: pa.Array, truth: Sequence[pa.Array]
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Precision, recall and F1 over all types, and by type: also `entities`, how many there are."""
        return entity_truth.scores(annotations, truth[0])

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """Figures by type, and texts with what was found rightly, wrongly and not at all."""
        return entities_report(self.per_type(annotations, truth)[1], annotations, truth[0], inputs[0], most)


def as_lists(row: np.ndarray, rows: int, values: pa.Array) -> pa.ListArray:
    """Values, each with its row (ascending), as one list a row."""
    offsets = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
