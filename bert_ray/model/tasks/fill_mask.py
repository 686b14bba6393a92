"""Fill-mask: the likeliest tokens in the place of a mask token, `[MASK]` in BERT.

Output: list<struct<token: string, score: float32>>, `top_k` of them, likeliest first; the scores are probabilities over
the whole vocabulary. Of several masks the first counts. Null where a text has none, or none within the model's length.

Shapes: B rows, P pieces, T tokens of a packed batch, D hidden size, V vocabulary, K = top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bert_ray.errors import BundleError, JobError
from bert_ray.model.tasks.base import Options, Outputs, Task
from bert_ray.model.tasks.sections import Case, Cases, Section, Table, texts_at
from bert_ray.model.tokenization import as_strings, to_python_strings
from bert_ray.model.vocabulary_head import vocabulary_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.annotator import Annotator
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tokenization import Pieces


@dataclass(kw_only=True, frozen=True, slots=True)
class FillMaskOptions(Options):
    """What may be chosen per call.

    Attributes:
        top_k: how many tokens to give, 1 to 100.
    """

    top_k: int = 5

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if not 1 <= self.top_k <= 100:
            raise JobError(f"options.top_k is {self.top_k}; give a number from 1 to 100")


# What stands for tokens and probabilities of a piece without a mask.
_NO_MASK = -1.0


class FillMask(Task):
    """The likeliest tokens in a mask's place."""

    kind: ClassVar[str] = "fill-mask"
    truths: ClassVar[tuple[str, ...]] = ("token",)
    metric: ClassVar[str] = "accuracy"
    blank_is_null: ClassVar[bool] = True
    options_type: ClassVar[type[Options]] = FillMaskOptions
    architecture: ClassVar[str | None] = "ForMaskedLM"
    headline: ClassVar[str] = "fills in the right token in {accuracy:.1%} of rows"

    _mask: int = -1
    _tokens: list[str] | None = None
    _tokenizer: PreTrainedTokenizerFast | None = None

    def output_type(self) -> pa.DataType:
        """list<struct<token: string, score: float32>>."""
        return pa.list_(pa.struct([("token", pa.string()), ("score", pa.float32())]))

    def auto_class(self) -> Any:
        """AutoModelForMaskedLM."""
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def prepare(self, annotator: Annotator) -> None:
        """Ask the tokenizer for its mask, and for how each token reads.

        Raises:
            BundleError: it has no mask token.
        """
        tokenizer = annotator.bundle.tokenizer()
        if tokenizer.mask_token_id is None:
            raise BundleError(f"{annotator.bundle.reference}: the tokenizer has no mask token to fill")
        self._mask = tokenizer.mask_token_id
        self._tokens = tokenizer.batch_decode([[index] for index in range(annotator.bundle.config.vocab_size)])
        self._tokenizer = tokenizer

    def tokens_read(self, batch: PackedBatch, targets: torch.Tensor | None = None) -> torch.Tensor | None:
        """Each piece's first mask; where there is none, its first token."""
        read = batch.first_tokens
        pieces, places = self._masks(batch)
        read[pieces] = places
        return read

    def _masks(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The pieces that have a mask, and where each one's first is, both int64."""
        places = (batch.input_ids == self._mask).nonzero().squeeze(1)
        pieces = torch.searchsorted(batch.cu_seqlens.long(), places, right=True) - 1
        first = torch.ones_like(pieces, dtype=torch.bool)
        first[1:] = pieces[1:] != pieces[:-1]
        return pieces[first], places[first]

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The K likeliest token ids and their probabilities, (P, 2K), fp32; -1 where a piece has no mask."""
        top_k = min(self.options.top_k, model.config.vocab_size)
        found = hidden.new_full((len(batch.lengths), 2 * top_k), _NO_MASK, dtype=torch.float32)
        pieces, places = self._masks(batch)
        if len(pieces):
            asked = hidden[places if batch.read is None else pieces]
            best = vocabulary_logits(model, asked).float().softmax(1).topk(top_k, dim=1)
            # Ids below 2^24 are exact in fp32, and no vocabulary is larger.
            found[pieces] = torch.cat((best.indices.float(), best.values), dim=1)
        return found

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Ids and probabilities float32 (P, 2K) -> lists; of a text in windows the first with a mask counts."""
        assert self._tokens is not None, "prepare comes first"
        masked = np.flatnonzero(outputs.values[:, 0] != _NO_MASK)
        rows, which = np.unique(pieces.rows[masked], return_index=True)
        values, top_k = outputs.values[masked[which]], outputs.values.shape[1] // 2
        ids = values[:, :top_k].astype(np.int64).reshape(-1)
        offsets = np.zeros(len(inputs[0]) + 1, np.int32)
        offsets[rows + 1] = top_k
        structs = pa.StructArray.from_arrays(
            [
                pa.array([self._tokens[index] for index in ids], pa.string()),
                pa.array(np.ascontiguousarray(values[:, top_k:]).reshape(-1)),
            ],
            names=["token", "score"],
        )
        known = np.zeros(len(inputs[0]), bool)
        known[rows] = True
        return pa.ListArray.from_arrays(pa.array(np.cumsum(offsets, dtype=np.int32)), structs, mask=pa.array(~known))

    # Evaluation.

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """The right tokens as the vocabulary has them: `Paris` is `paris` to a model that knows no capitals.

        A word that is no single token of it stays as it is.

        Raises:
            BundleError: this is a training; its task is pretraining.
            ColumnError: they are no texts.
        """
        if self._tokenizer is None:
            raise BundleError("task 'fill-mask' has nothing to train by rows: pretrain on a corpus (task: pretraining)")
        words = as_strings(truth[0], "token").dictionary_encode()
        spelt = [self._spelt(word) for word in to_python_strings(words.dictionary)]
        return [pa.array(spelt, pa.large_string()).take(words.indices)], super().read_truth(truth, inputs)[1]

    def _spelt(self, word: str) -> str:
        """A word as its one token reads: as the tokenizer spells it (in lower case, say), or behind a blank (RoBERTa).

        One that has none, or is a piece of a word, as it stands.
        """
        assert self._tokens is not None and self._tokenizer is not None, "prepare comes first"
        for text in (word, f" {word}"):
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id:
                return self._tokens[ids[0]].strip()
        return word.strip()

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """Words that the model cannot say at all."""
        assert self._tokens is not None, "prepare comes first"
        known = pc.is_in(truth[0], pa.array([token.strip() for token in self._tokens], pa.large_string()))
        return {"a word that is no single token of the vocabulary": ~known.to_numpy(zero_copy_only=False)}

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Whether the right token comes first, or among the K; and 1 / its place, 0 where it is not among them.

        A row without an annotation counts as wrong.
        """
        places = _places(annotations, truth[0])
        found = places > 0
        reciprocal = np.divide(1.0, places, out=np.zeros(len(places)), where=found)
        return {
            "accuracy": float((places == 1).mean()),
            f"recall@{self.options.top_k}": float(found.mean()),
            "mrr": float(reciprocal.mean()),
        }

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """How often the right token stood in which place, and what was said in its stead, the surest first."""
        places, rows = _places(annotations, truth[0]), len(annotations)
        counts = [(f"place {place}", int((places == place).sum())) for place in range(1, self.options.top_k + 1)]
        counts.append((f"not among {self.options.top_k}", int((places == 0).sum())))
        table = Table(
            key="places",
            title="Where the right token stood",
            header=("place", "rows", "share"),
            rows=tuple((name, count, count / rows) for name, count in counts),
        )
        said, so = annotations.to_pylist(), pc.cast(truth[0], pa.string()).to_pylist()
        surest = np.array([items[0]["score"] if items else 0.0 for items in said])
        found: list[Section] = [table]
        wrong, right = np.flatnonzero(places != 1), np.flatnonzero(places == 1)
        for key, title, chosen, count in (
            ("mistakes", "Most confident mistakes", wrong, most),
            ("right", "Filled in rightly", right, -(-most // 4)),
        ):
            order = chosen[np.argsort(-surest[chosen], kind="stable")][:count].tolist()
            cases = tuple(
                Case(
                    row=row,
                    texts=texts,
                    said=", ".join(f"{item['token']} {item['score']:.2f}" for item in said[row] or ()) or "nothing",
                    so=so[row],
                    right=key == "right",
                )
                for row, texts in zip(order, texts_at(self.inputs, inputs, order), strict=True)
            )
            if cases:
                found.append(Cases(key=key, title=title, cases=cases, long=True))
        return found


def _places(annotations: pa.Array, truth: pa.Array) -> np.ndarray:
    """The right token's place among those that were said, from 1, int64 (B,); 0 where it is not among them."""
    places = np.zeros(len(annotations), np.int64)
    for row, (items, token) in enumerate(
        zip(annotations.to_pylist(), pc.cast(truth, pa.string()).to_pylist(), strict=True)
    ):
        tokens = [item["token"].strip() for item in items or ()]
        if token in tokens:
            places[row] = tokens.index(token) + 1
    return places
