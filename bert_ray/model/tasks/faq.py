"""FAQ answer: a customer's question gets the best of the known answers, or null where none is near enough.

The bundle is an embedding model with an index of question/answer pairs (`faq.parquet`, see faq_index.py). The asked
question becomes a vector; the pair with the highest cosine answers it.

Input `question`: a string, or a list of strings, the turns of a dialogue so far with the question last. Of a dialogue
the question alone and the question followed by the earlier turns, newest first (so that what does not fit the model is
the oldest), are embedded, and the two vectors averaged; `history_weight` is the second one's share.

Output: struct<answer: string, score: float32, id: string, question: string>: the pair, and the cosine with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import ColumnError, JobError, meant
from bert_ray.model.tasks.base import Options, Outputs
from bert_ray.model.tasks.faq_index import FaqIndex, Match
from bert_ray.model.tasks.faq_report import faq_report
from bert_ray.model.tasks.pooled import PooledTask, PromptOptions, unit, unit_vectors
from bert_ray.model.tasks.sections import Section
from bert_ray.model.tokenization import Pieces, Tokenizer, as_strings, is_blank, is_list, is_text, to_python_strings

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle

# Stands between the turns of a dialogue on their way to the tokenizer: a code point that Unicode keeps out of texts.
_TURN = "\ufdd0"


@dataclass(kw_only=True, frozen=True, slots=True)
class FaqOptions(PromptOptions):
    """What may be chosen per call.

    Attributes:
        threshold: null where the best pair's cosine is below this; None: always the best pair.
        match: what of a pair the asked question is compared with: its `question`, its `answer`, or `both`: the nearer.
        history_weight: share of the earlier turns in a dialogue's vector, from 0 (the question alone) to 1.
    """

    overflow: Literal["truncate"] = "truncate"
    threshold: float | None = None
    match: Match = "question"
    history_weight: float = 0.5

    def __post_init__(self) -> None:
        PromptOptions.__post_init__(self)
        if self.threshold is not None and not -1.0 <= self.threshold <= 1.0:
            raise JobError(f"options.threshold is {self.threshold}; a cosine is from -1 to 1")
        if not 0.0 <= self.history_weight <= 1.0:
            raise JobError(f"options.history_weight is {self.history_weight}; give a share from 0 to 1")


class Faq(PooledTask):
    """The best of the known answers."""

    kind: ClassVar[str] = "faq"
    inputs: ClassVar[tuple[str, ...]] = ("question",)
    truths: ClassVar[tuple[str, ...]] = ("id",)
    metric: ClassVar[str] = "recall@1"
    blank_is_null: ClassVar[bool] = True
    split_by: ClassVar[str] = "question"
    builds: ClassVar[tuple[str, ...]] = ("question", "answer", "id")
    options_type: ClassVar[type[Options]] = FaqOptions
    headline: ClassVar[str] = "gives the right answer to {recall@1:.1%} of questions"
    architecture: ClassVar[str | None] = None

    index: FaqIndex | None = None
    _annotator: Annotator | None = None

    def output_type(self) -> pa.DataType:
        """See the module's first lines."""
        return pa.struct(
            [
                pa.field("answer", pa.string()),
                pa.field("score", pa.float32()),
                pa.field("id", pa.string()),
                pa.field("question", pa.string()),
            ]
        )

    def readable(self, task_input: str, kind: pa.DataType) -> bool:
        """Text, or lists of text."""
        return is_text(kind.value_type if is_list(kind) else kind)

    def read(self, task_input: str, array: pa.Array | pa.ChunkedArray, column: str) -> pa.Array:
        """Questions as large_string; a dialogue's turns joined, blank ones left empty. Null where the last is."""
        if not is_list(array.type):
            return super().read(task_input, array, column)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
        turns = pc.fill_null(as_strings(array.flatten(), column), "")
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        if not len(turns):
            return pa.nulls(len(lengths), pa.large_string())
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        joined = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(offsets), turns), pa.scalar(_TURN, turns.type))
        last = turns.take(pa.array(np.maximum(offsets[1:] - 1, 0)))
        known = pc.and_(pa.array(lengths > 0), pc.invert(is_blank(last)))
        return pc.if_else(known, joined, pa.scalar(None, pa.large_string()))

    def encode(self, tokenize: Tokenizer, inputs: Sequence[pa.Array]) -> Pieces:
        """The question as one piece; of a dialogue a second one, the question followed by the earlier turns."""
        if not pc.any(pc.match_substring(inputs[0], _TURN)).as_py():
            return super().encode(tokenize, inputs)
        texts, rows = [], []
        for row, text in enumerate(to_python_strings(inputs[0])):
            turns = [turn for turn in text.split(_TURN) if turn.strip()] or [""]
            texts.append(turns[-1])
            rows.append(row)
            if len(turns) > 1:
                texts.append(" ".join(reversed(turns)))
                rows.append(row)
        pieces = super().encode(tokenize, [pa.array(texts, pa.large_string())])
        pieces.rows = np.array(rows, np.int64)[pieces.rows]
        return pieces

    def prepare(self, annotator: Annotator) -> None:
        """Read the index."""
        super().prepare(annotator)
        self.index = FaqIndex.load(annotator.bundle.directory, annotator.bundle.config.hidden_size)
        self._annotator = annotator

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Vectors float32 (P, D) -> structs; null under the threshold."""
        assert self.index is not None, "prepare comes first"
        pairs, scores = self.index.best(self._vectors(outputs, pieces), self.options.match)
        take = pa.array(pairs)
        columns = [self.index.answer.take(take), pa.array(scores), self.index.id.take(take)]
        columns.append(self.index.question.take(take))
        far = np.zeros(len(scores), bool) if self.options.threshold is None else scores < self.options.threshold
        return pa.StructArray.from_arrays(columns, fields=list(self.output_type()), mask=pa.array(far))

    def _vectors(self, outputs: Outputs, pieces: Pieces) -> np.ndarray:
        """One vector of unit length a row, float32 (B, D)."""
        first, last = pieces.starts[:-1], pieces.starts[1:] - 1
        vectors = unit(outputs.values)
        weight = np.where(last > first, self.options.history_weight, 0.0)[:, None].astype(np.float32)
        return unit((1 - weight) * vectors[first] + weight * vectors[last])

    # Making the bundle, and evaluation.

    def build(
        self, base: Bundle, columns: Mapping[str, pa.Array], output: Path, provenance: Mapping[str, Any]
    ) -> tuple[int, list[str]]:
        """Embed question/answer pairs, and write the bundle.

        Args:
            base: an embedding model.
            columns: question, answer and, where there is one, id; without, the row's number from 0.
            output: the bundle's directory.
            provenance: for its card.

        Returns:
            pairs in the index, and notes on rows that were left out.

        Raises:
            ColumnError: a column is missing, or ids repeat.
            JobError: no row has both a question and an answer.
        """
        from bert_ray.model.annotator import Annotator, AnnotatorSpec
        from bert_ray.model.architectures import max_positions
        from bert_ray.model.bundle import save_bundle
        from bert_ray.model.card import Card

        if self.card.max_length > (limit := max_positions(base.config)):
            raise JobError(f"max_length is {self.card.max_length}, but {base.reference} has {limit} positions")
        pairs, notes = _pairs(columns)
        encoding = Card(
            task="embedding",
            max_length=self.card.max_length,
            pooling=base.card.pooling,
            normalize=base.card.normalize,
        )
        # The prompt stands before what is asked, so before the questions of the index, and not before answers.
        prompts = {"question": self.options.prompt, "answer": ""}
        found = {}
        for name, prompt in prompts.items():
            # fp32 wherever it is made: what is asked is compared in what the machine has then.
            spec = AnnotatorSpec(model=base.reference, options={"prompt": prompt}, dtype="fp32")
            annotator = Annotator(replace(base, card=encoding), spec)
            found[f"{name}_vectors"] = unit_vectors(annotator.annotate([pairs[name]]))
        index = FaqIndex(**found, **pairs)
        card = replace(
            self.card,
            inputs=list(self.inputs),
            pooling=base.card.pooling,
            normalize=base.card.normalize,
            provenance=dict(provenance),
        )
        save_bundle(output, base.model(annotator.task), base.tokenizer(), card, add=index.save)
        return len(index), notes

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """The right pair's id, or its answer, as string."""
        try:
            return [truth[0].cast(pa.string())], super().read_truth(truth, inputs)[1]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ColumnError(f"id is {truth[0].type}; give the ids of the right pairs, or their answers") from None

    def check_truth(self, truth: Sequence[pa.Array]) -> None:
        """The pairs are in the index.

        Raises:
            ColumnError: one is not.
        """
        assert self.index is not None, "prepare comes first"
        right = truth[0].cast(pa.string())
        strange = right.filter(
            pc.invert(pc.or_(pc.is_in(right, self.index.id), pc.is_in(right, self.index.answer)))
        ).to_pylist()
        if strange:
            raise ColumnError(f"{len(strange)} rows name a pair that the index does not have, the first {strange[0]!r}")

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """How often the best pair is the right one, and the mean of 1/rank of the right one, over all rows.

        `truth` holds ids, or answers. A null answer counts as wrong for recall@1; ranks do not heed the threshold.

        Raises:
            ColumnError: the truth names a pair that the index does not have.
        """
        assert self.index is not None and self._annotator is not None, "prepare comes first"
        self.check_truth(truth)
        right = truth[0].cast(pa.string())
        # The annotations hold the best pair alone; the right one's rank takes another look at the questions.
        pieces = self.encode(self._annotator.tokenizer, [pc.fill_null(inputs[0], "")])
        vectors = self._vectors(self._annotator.outputs_of(pieces), pieces)
        ranks = self.index.ranks(vectors, self.options.match, right)
        return {
            "recall@1": float(self.right(annotations, right).mean()),
            "mrr": float((1.0 / ranks).mean()),
        }

    def right(self, annotations: pa.Array, so: pa.Array) -> np.ndarray:
        """Where the right pair was said, bool (B,); `so` names it by its id, else by its answer."""
        assert self.index is not None, "prepare comes first"
        by_id = pc.is_in(so, self.index.id)
        said = pc.if_else(by_id, pc.struct_field(annotations, "id"), pc.struct_field(annotations, "answer"))
        return pc.fill_null(pc.equal(said, so), False).to_numpy(zero_copy_only=False).astype(bool)

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """What a threshold would do, and questions with a wrong answer beside the right one."""
        assert self.index is not None, "prepare comes first"
        so = truth[0].cast(pa.string())
        answers = pc.if_else(pc.is_in(so, self.index.id), self.index.answer.take(pc.index_in(so, self.index.id)), so)
        asked = pc.replace_substring(inputs[0], _TURN, " / ")
        return faq_report(annotations, self.right(annotations, so), answers, asked, most)


def build_index(
    model: str | os.PathLike[str],
    table: pa.Table,
    output: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    max_length: int | None = None,
) -> Bundle:
    """Make a FAQ bundle of a table of question/answer pairs; `bert-ray train` with `task: faq` does the same.

    Args:
        model: reference of an embedding model.
        table: one row a pair: question, answer, and where it has one, id.
        output: the bundle's directory; a bundle there is replaced.
        columns: the table's columns where they have other names: {"question": "q"}.
        options: of the task, kept on the card; see FaqOptions.
        name: what the annotation is called; None: faq.
        max_length: tokens to which texts are cut; None: the model's own limit.

    Raises:
        BundleError: the model cannot be used, or `output` holds something else.
        ColumnError: a column is missing or not text, or ids repeat.
        JobError: no row has both a question and an answer.
    """
    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.card import Card

    base, named = load_bundle(model), dict(columns or {})
    if strange := sorted(set(named) - set(Faq.builds)):
        raise ColumnError(f"columns names {strange[0]!r}; task faq reads {', '.join(Faq.builds)}")
    if lacking := [column for column in named.values() if column not in table.column_names]:
        raise ColumnError(f"the table has no column {lacking[0]!r}; {meant(lacking[0], table.column_names)}")
    names = {item: named.get(item, item) for item in Faq.builds}
    card = Card(
        task=Faq.kind,
        name=name,
        max_length=max_length or base.card.max_length,
        options=Faq.inherited(base.card) | dict(options or {}),
    )
    found = {item: table.column(column) for item, column in names.items() if column in table.column_names}
    provenance = {"base": {"reference": os.fspath(model), "fingerprint": base.fingerprint}}
    Faq(card, base.config).build(base, found, Path(output), provenance)
    return load_bundle(output)


def _pairs(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> tuple[dict[str, pa.Array], list[str]]:
    """id, question and answer of the pairs that can be used, string each, and notes on the others."""
    for name in ("question", "answer"):
        if name not in columns:
            raise ColumnError(f"there is no column {name!r}; name it with data.columns.{name}")
    texts = {name: as_strings(columns[name], name) for name in ("question", "answer")}
    rows = len(texts["question"])
    ids = columns.get("id", pa.array(range(rows)))
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    try:
        texts["id"] = ids.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ColumnError(f"the id column is {ids.type}; give a name or a number for each pair") from None
    blank = pa.array(np.zeros(rows, bool))
    for array in texts.values():
        blank = pc.or_(blank, pc.fill_null(is_blank(array), True))
    kept = {name: array.filter(pc.invert(blank)) for name, array in texts.items()}
    left = len(kept["id"])
    if not left:
        raise JobError(f"none of the {rows} rows has a question and an answer: there is nothing to make an index of")
    if len(pc.unique(kept["id"])) < left:
        counts = pc.value_counts(kept["id"])
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise ColumnError(f"id {twice['values']!r} stands {twice['counts']} times; an id names one pair")
    notes = []
    if left < rows:
        notes.append(f"{rows - left} of {rows} rows left out: without a question, an answer or an id")
    return kept, notes
