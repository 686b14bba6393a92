"""Mask personal data: entities and patterns of a text replaced by marks such as [PERSON] and [EMAIL].

Output: struct<text: string, spans: list<struct<start: int32, end: int32, label: string, score: float32>>>: the text
with marks, and what was masked, in code points of the text before (end exclusive). The spans do not repeat what stood
there, so that the annotation holds no personal data. A blank text comes back as it is.

It runs on an entities bundle. With `kinds: []` it masks patterns alone, on any bundle, without a forward pass over the
texts. Finds that overlap are masked as one, from the first's start to the last's end, under the label of the longest:
nothing of what was found stays.

Shapes: P pieces, T tokens, D hidden size, C tags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from bert_ray.errors import BundleError, JobError
from bert_ray.model.patterns import PATTERNS, Match, Patterns
from bert_ray.model.tasks.base import Options, Outputs
from bert_ray.model.tasks.entities import Entities, EntitiesOptions, as_lists
from bert_ray.model.tasks.spans import plain
from bert_ray.model.tokenization import Pieces, Tokenizer, to_python_strings

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch

_LABEL = "{label}"


@dataclass(kw_only=True, frozen=True, slots=True)
class MaskOptions(EntitiesOptions):
    """What may be chosen per call.

    Attributes:
        kinds: entity types to mask; None: all that the bundle knows; []: none, patterns alone.
        patterns: of card, email, iban, ip, phone; []: none, entities alone.
        regions: countries whose phone numbers are known without a country code. Each one more costs time, and finds
            more figures that are none.
        mark: what stands for a find; {label} is its type in capitals.
        least_score: entities below this probability stay as they are.
    """

    kinds: Sequence[str] | None = None
    patterns: Sequence[str] = PATTERNS
    regions: Sequence[str] = ("US", "GB", "CN")
    mark: str = f"[{_LABEL}]"
    least_score: float = 0.0

    def __post_init__(self) -> None:
        EntitiesOptions.__post_init__(self)
        for name in ("kinds", "patterns", "regions"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) and not (name == "kinds" and value is None):
                raise JobError(f"options.{name} is {value!r}; give a list")
            if strange := [item for item in value or () if not isinstance(item, str)]:
                raise JobError(f"options.{name} has {strange[0]!r}; give a list of words")
        if strange := sorted(set(self.patterns) - set(PATTERNS)):
            raise JobError(f"options.patterns: {strange[0]!r} is none of {', '.join(PATTERNS)}")
        if not 0.0 <= self.least_score <= 1.0:
            raise JobError(f"options.least_score is {self.least_score}; give a probability, 0 to 1")
        if self.kinds is not None and not self.kinds and not self.patterns:
            raise JobError("options.kinds and options.patterns are both empty: there is nothing to mask")


class Mask(Entities):
    """The text without its personal data."""

    kind: ClassVar[str] = "mask"
    truths: ClassVar[tuple[str, ...]] = ()
    measured_as: ClassVar[str | None] = "entities"
    options_type: ClassVar[type[Options]] = MaskOptions
    architecture: ClassVar[str | None] = None

    def __init__(
        self, card: Card, config: PretrainedConfig | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(card, config, options)
        if card.labels and (strange := sorted(set(self.options.kinds or ()) - set(card.labels))):
            raise JobError(
                f"options.kinds: {strange[0]!r} is none of the bundle's entity types, {', '.join(card.labels)}"
            )
        self._patterns: Patterns | None = None

    @property
    def name(self) -> str:
        """Not the card's name, which is that of the bundle's own annotation."""
        return super().name if self.card.task == self.kind else self.kind

    @property
    def reads(self) -> bool:
        """Whether the model is asked; patterns alone need none."""
        return self.options.kinds is None or bool(self.options.kinds)

    def output_type(self) -> pa.DataType:
        """See the module's first lines."""
        span = [("start", pa.int32()), ("end", pa.int32()), ("label", pa.string()), ("score", pa.float32())]
        return pa.struct([("text", pa.string()), ("spans", pa.list_(pa.struct(span)))])

    def auto_class(self) -> Any:
        """As of entities; AutoModel for patterns alone.

        Raises:
            BundleError: the bundle finds no entities.
        """
        if not self.reads:
            from transformers import AutoModel

            return AutoModel
        architecture = (getattr(self.config, "architectures", None) or ["ForTokenClassification"])[0]
        if not architecture.endswith("ForTokenClassification"):
            raise BundleError(
                f"task mask needs a bundle that finds entities, this one is a {architecture}; give options.kinds: [] "
                "to mask patterns alone"
            )
        return super().auto_class()

    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
        """Windows always, whatever the bundle was trained with: what is not read is not masked."""
        self.options = replace(self.options, overflow="windows")
        return super().tokenizer(tokenizer)

    def prepare(self, annotator: Annotator) -> None:
        """Set up the patterns, so that what is missing is said at once."""
        self._patterns = Patterns(self.options.patterns, self.options.regions)

    def encode(self, tokenize: Tokenizer, inputs: Sequence[pa.Array]) -> Pieces:
        """As of entities; empty texts where the model is not asked."""
        return super().encode(tokenize, inputs if self.reads else [pa.array([""] * len(inputs[0]), pa.large_string())])

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """As of entities; (T, 1) of nothing where the model is not asked."""
        return super().forward(model, hidden, batch) if self.reads else hidden.new_zeros((len(hidden), 1))

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Logits float32 (T, C) -> structs."""
        if self._patterns is None:
            self._patterns = Patterns(self.options.patterns, self.options.regions)
        texts = to_python_strings(inputs[0])
        finds: list[list[Match]] = [[] for _ in texts]
        if self.reads:
            self._add_entities(finds, outputs, pieces, texts)
        masked, counts, spans = [], [], []
        for text, entities in zip(map(plain, texts), finds, strict=True):
            kept = merged(entities, self._patterns.find(text))
            masked.append(self._masked(text, kept))
            counts.append(len(kept))
            spans += kept
        columns = [
            pa.array([span.start for span in spans], pa.int32()),
            pa.array([span.end for span in spans], pa.int32()),
            pa.array([span.label for span in spans], pa.string()),
            pa.array([span.score for span in spans], pa.float32()),
        ]
        kind = self.output_type()
        structs = pa.StructArray.from_arrays(columns, fields=list(kind.field("spans").type.value_type))
        lists = as_lists(np.repeat(np.arange(len(texts)), counts), len(texts), structs)
        return pa.StructArray.from_arrays([pa.array(masked, pa.string()), lists], fields=list(kind))

    def _add_entities(self, finds: list[list[Match]], outputs: Outputs, pieces: Pieces, texts: Sequence[str]) -> None:
        found = self.find(outputs, pieces, texts)
        wanted = np.array([self.options.kinds is None or name in self.options.kinds for name in found.types], bool)
        keep = np.flatnonzero(wanted[found.kind] & (found.score >= self.options.least_score))
        columns = (found.row, found.start, found.end, found.kind, found.score)
        for row, start, end, kind, score in zip(*(column[keep].tolist() for column in columns), strict=True):
            finds[row].append(Match(start=start, end=end, label=found.types[kind], score=score))

    def _masked(self, text: str, spans: Sequence[Match]) -> str:
        parts, place = [], 0
        for span in spans:
            parts += [text[place : span.start], self.options.mark.replace(_LABEL, span.label.upper())]
            place = span.end
        return "".join([*parts, text[place:]])

    # A bundle that masks is one that finds entities: it is trained and measured as such.

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """Refused: see read_truth."""
        raise BundleError(_UNTRAINED)

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """Refused: see read_truth."""
        raise BundleError(_UNTRAINED)

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """Refused.

        Raises:
            BundleError: always.
        """
        raise BundleError(_UNTRAINED)

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Refused: see read_truth."""
        raise BundleError(_UNTRAINED)


_UNTRAINED = "task mask is neither trained nor measured: train and evaluate an entities bundle, and annotate with it"


def merged(entities: Sequence[Match], patterns: Sequence[Match]) -> list[Match]:
    """Finds in order of the text, those that overlap as one.

    The one reaches from the first's start to the last's end and has label and score of the longest. Of equally long
    ones a pattern goes before an entity (it was checked), the earlier before the later, then the alphabet decides.
    """
    ranked = [(find, 0) for find in patterns] + [(find, 1) for find in entities]
    result: list[tuple[Match, tuple[int, int, int, str]]] = []
    for find, place in sorted(ranked, key=lambda item: (item[0].start, item[0].end, item[1], item[0].label)):
        rank = (find.start - find.end, place, find.start, find.label)
        if result and find.start < result[-1][0].end:
            before, best = result.pop()
            winner, rank = (find, rank) if rank < best else (before, best)
            find = Match(start=before.start, end=max(before.end, find.end), label=winner.label, score=winner.score)
        result.append((find, rank))
    return [find for find, _ in result]
