"""Embedding: one vector of D numbers for each text.

Output: fixed_size_list<float32>[D]. Pooling as the card says: the mean over all tokens of a row, or its first token;
scaled to unit length where the card says so. A blank text has the vector of its special tokens alone, as in
sentence-transformers. Its directories load here with their pooling, length and default prompt, and it loads ours.

Learns from pairs of texts that belong together, against the other pairs of a batch; or from pairs with scores. Is
measured by how high a text's own pair stands among all of a table; with scores, as task similarity.

Shapes: B rows, P pieces, S pairs of a training batch (two pieces each), T tokens of a packed batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.examples import Examples, Targets
from bert_ray.model.tasks.base import Learning, Options, Outputs, set_dropout
from bert_ray.model.tasks.numbers import correlations, not_finite, numbers
from bert_ray.model.tasks.pooled import PooledTask, PromptOptions, unit, unit_vectors
from bert_ray.model.tasks.retrieval import Ranking, digests_of, ranking, ranking_report
from bert_ray.model.tokenization import Pieces, is_blank

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.sections import Section
    from bert_ray.model.tokenization import Tokenizer

# What cosines are multiplied by before they are compared: sentence-transformers' default in both losses.
_SCALE = 20.0


@dataclass(kw_only=True, frozen=True, slots=True)
class EmbeddingOptions(PromptOptions):
    """What may be chosen per call.

    Attributes:
        loss: what training compares: `contrastive`, pairs of texts that belong together; or `cosine`, pairs with a
            `label` that is higher the more alike they are, on any scale.
    """

    loss: Literal["contrastive", "cosine"] = "contrastive"


class Embedding(PooledTask):
    """One vector for each text."""

    kind: ClassVar[str] = "embedding"
    truths: ClassVar[tuple[str, ...]] = ("text_pair",)
    measured_as: ClassVar[str | None] = "similarity"
    metric_by_rows: ClassVar[bool] = True
    headline: ClassVar[str] = "puts a text's own pair first of all for {recall@1:.1%} of rows"
    options_type: ClassVar[type[Options]] = EmbeddingOptions

    _annotator: Annotator | None = None
    _ranked: tuple[pa.Array, Ranking] | None = None

    def __init__(
        self, card: Card, config: PretrainedConfig | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """See Task."""
        super().__init__(card, config, options)
        if self.options.loss == "cosine":  # What it has learned from are scores, which similarity is measured by.
            self.truths = ()  # type: ignore[misc]  # Over that of the class.

    def output_type(self) -> pa.DataType:
        """fixed_size_list<float32>[D]."""
        if self.config is None:
            raise BundleError("the width of an embedding is known only with the model's configuration")
        return pa.list_(pa.float32(), self.config.hidden_size)

    def encode(self, tokenize: Tokenizer, inputs: Sequence[pa.Array]) -> Pieces:
        """Texts as pieces; of pairs (in training) each text is a piece of its own, the first before the second."""
        if len(inputs) == 1:
            return super().encode(tokenize, inputs)
        rows = len(inputs[0])
        turns = np.arange(2 * rows).reshape(2, rows).T.reshape(-1)
        pieces = super().encode(tokenize, [pa.concat_arrays(list(inputs)).take(pa.array(turns))])
        return Pieces(tokens=pieces.tokens, rows=pieces.rows // 2)

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Vectors float32 (P, D) -> fixed-size lists."""
        vectors = self.vectors(outputs, pieces)
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])

    # Evaluation.

    def prepare(self, annotator: Annotator) -> None:
        """Keep what embeds the texts to compare with."""
        super().prepare(annotator)
        self._annotator = annotator

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """How high a text's own pair, in `text_pair`, stands among those of all rows; see `retrieval.Ranking`."""
        return self._ranking(annotations, truth[0]).metrics()

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """How far one has to look for a text's own pair, and those that another one is nearer to."""
        return ranking_report(self._ranking(annotations, truth[0]), inputs[0], truth[0], most)

    def _ranking(self, annotations: pa.Array, pairs: pa.Array) -> Ranking:
        """Of vectors (B,), and what should be nearest to each, (B,)."""
        if self._ranked is None or self._ranked[0] is not annotations:
            assert self._annotator is not None, "prepare comes first"
            texts = pairs.dictionary_encode()
            vectors, codes = unit_vectors(self._annotator.annotate([texts.dictionary])), texts.indices.to_numpy()
            self._ranked = annotations, ranking(unit_vectors(annotations), vectors[codes], codes)
        return self._ranked[1]

    # Training.

    def choose_inputs(self, named: Collection[str]) -> None:
        """Pairs of texts; with loss cosine also their scores.

        Raises:
            JobError: a text would be read in windows, which the losses do not compare.
        """
        if self.options.overflow == "windows":
            raise JobError(
                "options.overflow is 'windows', but training compares texts that are read at once: give truncate or "
                "head_tail; what is trained can embed in windows all the same"
            )
        self.inputs = ("text", "text_pair")  # type: ignore[misc]  # While training, over that of the class.
        self.truths = ("label",) if self.options.loss == "cosine" else ()  # type: ignore[misc]

    @property
    def annotates(self) -> tuple[str, ...]:
        """A text alone."""
        return ("text",)

    @property
    def metric(self) -> str:  # type: ignore[override]  # A property, because the loss decides.
        """Spearman's correlation with the scores; or the mean reciprocal rank of a text's own pair."""
        return "spearman" if self.options.loss == "cosine" else "mrr"

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """The scores as float64; what is to be found as texts.

        Raises:
            ColumnError: they are no numbers, or no texts.
        """
        so, texts = super().read_truth(truth, inputs)
        if self.truths == ("label",):
            return [numbers(array, self.kind) for array in so], texts
        return [self.read(name, array, name) for name, array in zip(self.truths, so, strict=True)], texts

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """Scores that are no numbers; without scores, blank texts and pairs of a text with itself."""
        if self.truths == ("label",):
            return not_finite(truth[0])
        first, second = (*inputs, *truth)
        blank = pc.or_(is_blank(first), is_blank(second))
        same = pc.and_not(pc.equal(first, second), blank)
        return {
            what: pc.fill_null(where, False).to_numpy(zero_copy_only=False)
            for what, where in (("a blank text", blank), ("the same text twice", same))
        }

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """None; but scores must differ.

        Raises:
            ColumnError: they are all the same.
            JobError: the job lists labels.
        """
        if self.card.labels:
            raise JobError(f"labels: task {self.kind} has no labels; leave them out")
        if truth and pc.count_distinct(truth[0]).as_py() < 2:
            raise ColumnError(
                f"it is {truth[0][0]} in all {len(truth[0])} rows; a model learns from scores that differ"
            )
        return []

    def learning_for(
        self, label_smoothing: float, class_weights: str | Mapping[str, float], truth: Sequence[pa.Array]
    ) -> Learning:
        """Neither smoothing nor weights: there are no labels.

        Raises:
            JobError: the job asks for either.
        """
        if label_smoothing:
            raise JobError(f"label_smoothing: task {self.kind} has no labels to smooth; leave it out")
        return super().learning_for(label_smoothing, class_weights, truth)

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base's encoder; its pooler, which no vector passes through, stays as it is."""
        from transformers import AutoConfig

        from bert_ray.model.bundle import read_model

        config = AutoConfig.from_pretrained(base.directory)
        set_dropout(config, dropout, attention_dropout)
        model, _ = read_model(self.auto_class(), base.directory, config=config)
        if (pooler := getattr(model, "pooler", None)) is not None:
            pooler.requires_grad_(False)
        return model

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """The scores, float32 (S,); without scores what tells equal texts, int64 (S, 2)."""
        if truth:
            return Targets(values=truth[0].to_numpy(zero_copy_only=False).astype(np.float32))
        return Targets(values=np.stack([digests_of(array) for array in inputs], axis=1))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Loss of each pair, (S,); outputs (2S, D).

        Where several workers share a batch, or it is computed in pieces, each compares the pairs of its own part.
        """
        assert batch.samples is not None
        # A piece's number in the table is even for the first text of a pair.
        second = torch.from_numpy(batch.rows % 2).to(outputs.device)
        order = (2 * batch.samples + second).argsort()
        first, other = F.normalize(outputs[order], dim=1).view(len(targets), 2, -1).unbind(1)
        return in_batch_loss(first, other, targets) if targets.dim() == 2 else cosent_loss(first, other, targets)

    def validate(self, outputs: Outputs, examples: Examples) -> dict[str, float]:
        """With scores the correlation; without, how high a text's own pair stands among all validation pairs."""
        vectors = unit(outputs.values)
        first, second = vectors[0::2], vectors[1::2]
        if examples.truth:
            return correlations(np.einsum("bd,bd->b", first, second), examples.truth[0])
        return ranking(first, second, examples.targets.values[:, 1]).metrics()


def in_batch_loss(first: torch.Tensor, second: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
    """Loss of each pair against the others of the batch, (S,): cross-entropy of its own second text among all.

    Henderson et al., Efficient Natural Language Response Suggestion for Smart Reply, arXiv 1705.00652, section 4.4; in
    sentence-transformers MultipleNegativesRankingLoss. Other than there, a pair that has either text in common with
    this one is no negative to it.

    Args:
        first: vectors of the first texts, (S, D), of unit length.
        second: of the second.
        digests: int64 (S, 2), equal for equal texts.
    """
    scores = _SCALE * first @ second.T
    same = (digests[:, None, :, None] == digests[None, :, None, :]).flatten(2).any(2)
    same.fill_diagonal_(False)
    own = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores.masked_fill(same, float("-inf")), own, reduction="none")


def cosent_loss(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """CoSENT, (S,), the batch's loss in each place: log(1 + sum of exp(s_j - s_i)) over all i that score above j.

    s is the scaled cosine. Only the order of the scores counts, so their scale is free. Su, CoSENT (2022); in
    sentence-transformers CoSENTLoss.

    Args:
        first: vectors of the first texts, (S, D), of unit length.
        second: of the second.
        scores: (S,).
    """
    cosines = _SCALE * (first * second).sum(1)
    gaps = (cosines[None, :] - cosines[:, None])[scores[:, None] > scores[None, :]]
    return F.pad(gaps, (1, 0)).logsumexp(0).expand(len(scores))
