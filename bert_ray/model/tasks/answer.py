"""Answer: the passage of a context that answers a question, word for word, or null where none does.

Output: struct<text: string, start: int32, end: int32, score: float32>; start and end count code points of the context,
end exclusive, and text is what stands there. A context longer than the model is read in overlapping windows, the
question before each. score is the probability of the answer's first token times that of its last one, each normalised
over the context's tokens in the window and the first token ([CLS], "no answer here"), as in transformers' pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.utils.rnn import pad_sequence

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.examples import Examples, Targets
from bert_ray.model.tasks.answer_metrics import best_threshold, f1, mean_scores
from bert_ray.model.tasks.answer_report import answers_report
from bert_ray.model.tasks.answer_spans import Spans, best_spans, join_pieces, take_pieces, thinned, window_targets
from bert_ray.model.tasks.base import Options, Outputs, Task, set_dropout
from bert_ray.model.tasks.heads import exactly
from bert_ray.model.tokenization import Overflow, Pieces, Tokenizer, as_strings, is_blank, to_python_strings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.sections import Section

# Contexts are tokenised in stretches of about this size: the tokenizer's own objects take some hundred bytes a token.
_TOKENIZED_BYTES = 4 * 2**20


@dataclass(kw_only=True, frozen=True, slots=True)
class AnswerOptions(Options):
    """What may be chosen per call.

    Attributes:
        overflow: `windows` always: the answer may stand anywhere.
        overlap: tokens that neighbouring windows share; an answer no longer than this is whole in one of them.
        max_answer_tokens: longest answer.
        max_question_tokens: where a question is cut; in a short window at half of it.
        null_threshold: null where the log probability of "no answer" exceeds that of the best answer by more than
            this. None: always the best answer. Training sets it on the validation rows, where some have no answer.
        null_windows: share of the windows without the answer that training keeps. Of a long context's windows nearly
            all are such; a share brings their number, and the time, down (Alberti et al., A BERT Baseline for the
            Natural Questions, arXiv 1901.08634, section 3: 2 %). Validation sees all.
    """

    overflow: Overflow = "windows"
    overlap: int = 128
    max_answer_tokens: int = 30
    max_question_tokens: int = 64
    null_threshold: float | None = None
    null_windows: float = 1.0

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if self.overflow != "windows":
            raise JobError(f"options.overflow is {self.overflow!r}; task answer always reads a long context in windows")
        for name in ("max_answer_tokens", "max_question_tokens"):
            if getattr(self, name) < 1:
                raise JobError(f"options.{name} is {getattr(self, name)}; give 1 or more tokens")
        if not 0.0 < self.null_windows <= 1.0:
            raise JobError(f"options.null_windows is {self.null_windows}; give a share above 0, up to 1 (all)")


class QuestionTokenizer(Tokenizer):
    """Question and context as windows over the context; a long question is cut, so that each window has room."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, options: AnswerOptions) -> None:
        """Set up.

        Raises:
            BundleError: the model's rows are too short for a question and a context.
        """
        room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise BundleError(f"max_length {max_length} has no room for a question and a context: give a larger one")
        self.question_tokens = min(options.max_question_tokens, room // 2)
        # A window moves on by half its context at least.
        overlap = min(options.overlap, (room - self.question_tokens) // 2)
        super().__init__(tokenizer, max_length, overflow="windows", overlap=overlap, cut="only_second", spans=True)

    def __call__(self, inputs: Sequence[pa.Array]) -> Pieces:
        """Tokenise questions and contexts, none of them null."""
        question, context = self.cut(inputs[0], self.question_tokens), inputs[1]
        ends = np.cumsum(pc.binary_length(context).to_numpy(zero_copy_only=False).astype(np.int64))
        borders = [0, *(np.flatnonzero(np.diff(ends // _TOKENIZED_BYTES)) + 1).tolist(), len(context)]
        parts = []
        for start, end in pairwise(borders):
            rows = slice(start, end)
            parts.append(super().__call__([question[rows], context[rows]]))
        return parts[0] if len(parts) == 1 else join_pieces(parts)


class Answer(Task):
    """A passage of the context, or null."""

    kind: ClassVar[str] = "answer"
    inputs: ClassVar[tuple[str, ...]] = ("question", "context")
    truths: ClassVar[tuple[str, ...]] = ("answer_text", "answer_start")
    metric: ClassVar[str] = "f1"
    blank_is_null: ClassVar[bool] = True
    truth_may_be_null: ClassVar[bool] = True
    level: ClassVar[Literal["row", "token"]] = "token"
    spans: ClassVar[bool] = True
    piece_is_sample: ClassVar[bool] = True
    split_by: ClassVar[str] = "context"
    options_type: ClassVar[type[Options]] = AnswerOptions
    architecture: ClassVar[str | None] = "ForQuestionAnswering"
    headline: ClassVar[str] = "reaches an F1 of {f1:.1%}"

    def __init__(
        self, card: Card, config: PretrainedConfig | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(card, config, options)
        # A threshold that the job gives is not tuned.
        self._tunes = self.options.null_threshold is None

    def output_type(self) -> pa.DataType:
        """See the module's first lines."""
        return pa.struct(
            [
                pa.field("text", pa.string()),
                pa.field("start", pa.int32()),
                pa.field("end", pa.int32()),
                pa.field("score", pa.float32()),
            ]
        )

    def auto_class(self) -> Any:
        """AutoModelForQuestionAnswering."""
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
        """Windows over the context, the question before each."""
        return QuestionTokenizer(tokenizer, self.card.max_length, self.options)

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base's encoder with a fresh head; a base that answers already keeps its own."""
        from transformers import AutoConfig

        from bert_ray.model.bundle import read_model

        config = AutoConfig.from_pretrained(base.directory, num_labels=2)
        set_dropout(config, dropout, attention_dropout)
        model, _ = read_model(self.auto_class(), base.directory, config=config, ignore_mismatched_sizes=True)
        return model

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Start and end logits (T, 2)."""
        if model.config.model_type == "distilbert":
            hidden = model.dropout(hidden)
        return exactly(model.qa_outputs, hidden)

    def exact_layers(self, model: PreTrainedModel) -> list[torch.nn.Linear]:
        """The head: scores that half precision makes equal would be told apart by their place."""
        return [model.qa_outputs]

    # What comes out.

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Logits float32 (T, 2) -> structs; null where there is nothing to answer with, or the null wins."""
        found = best_spans(outputs.values, pieces, self.options.max_answer_tokens)
        said = np.isfinite(found.score)
        if self.options.null_threshold is not None:
            said &= ~(found.null - found.score > self.options.null_threshold)
        return self._structs(found, said, pieces, inputs[1])

    def _structs(self, found: Spans, said: np.ndarray, pieces: Pieces, contexts: pa.Array) -> pa.Array:
        assert pieces.spans is not None
        rows = len(said)
        texts: list[str | None] = [None] * rows
        starts, ends = pieces.spans[found.first, 0], pieces.spans[found.last, 1]
        known = to_python_strings(contexts)
        for row in np.flatnonzero(said).tolist():
            text = known[row][starts[row] : ends[row]]
            # Tokens of some tokenizers (SentencePiece) begin with the blank before the word.
            starts[row] += len(text) - len(text.lstrip())
            texts[row] = text = text.strip()
            ends[row] = starts[row] + len(text)
            said[row] = bool(text)
        columns = [
            pa.array(texts, pa.string()),
            pa.array(starts, pa.int32()),
            pa.array(ends, pa.int32()),
            pa.array(np.exp(found.score).astype(np.float32)),
        ]
        return pa.StructArray.from_arrays(columns, fields=list(self.output_type()), mask=pa.array(~said))

    # Training and evaluation.

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """answer_text as large_string, null where there is none or a blank one; answer_start as int64.

        Raises:
            ColumnError: a column of another type.
        """
        text = as_strings(truth[0], "answer_text")
        text = pc.if_else(pc.fill_null(is_blank(text), True), pa.scalar(None, text.type), text)
        kind = truth[1].type
        try:
            if pa.types.is_boolean(kind) or not (pa.types.is_primitive(kind) or pa.types.is_null(kind)):
                raise pa.ArrowInvalid(str(kind))
            start = truth[1].cast(pa.int64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise ColumnError(
                f"answer_start is {kind}, not whole numbers: give the answer's first code point in the context, "
                "counted from 0"
            ) from None
        return [text, start], super().read_truth(truth, inputs)[1]

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """Answers without an offset, outside the context, or that do not stand at their offset."""
        rows = len(inputs[0])
        missing, outside, elsewhere = (np.zeros(rows, bool) for _ in range(3))
        contexts, texts = to_python_strings(inputs[1]), to_python_strings(truth[0])
        for row, (context, text, start) in enumerate(zip(contexts, texts, truth[1].to_pylist(), strict=True)):
            if text is None:
                continue
            if start is None:
                missing[row] = True
            elif start < 0 or start + len(text) > len(context):
                outside[row] = True
            else:
                elsewhere[row] = context[start : start + len(text)] != text
        return {
            "an answer but no answer_start (null)": missing,
            "an answer that reaches outside the context": outside,
            "an answer that does not stand at answer_start": elsewhere,
        }

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """First and last token of the answer in each window, int64 (P, 2)."""
        texts = to_python_strings(truth[0])
        starts = pc.if_else(truth[0].is_valid(), truth[1], -1).to_numpy(zero_copy_only=False).astype(np.int64)
        # Blanks at its ends are no token's.
        starts = starts + np.array([len(text or "") - len((text or "").lstrip()) for text in texts], np.int64)
        ends = starts + np.array([len((text or "").strip()) for text in texts], np.int64)
        return Targets(values=window_targets(pieces, starts, ends))

    def for_training(self, examples: Examples) -> Examples:
        """All windows with the answer, and `null_windows` of the others."""
        if self.options.null_windows >= 1.0 or not len(examples):
            return examples
        which = thinned(examples.pieces, examples.targets.values, self.options.null_windows)
        targets = Targets(values=examples.targets.values[which])
        pieces = take_pieces(examples.pieces, which)
        return Examples(pieces=pieces, targets=targets, inputs=examples.inputs, truth=examples.truth)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Mean of the cross-entropies of first and last token over each window's own tokens, (P,)."""
        logits = pad_sequence(outputs.split(batch.lengths), batch_first=True, padding_value=-torch.inf)  # (P, L, 2)
        chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        if smoothing := self.learning.label_smoothing:
            lengths = torch.tensor(batch.lengths, device=outputs.device)
            even = logits.masked_fill(logits.isneginf(), 0.0).sum(dim=1) / lengths.unsqueeze(1)
            chosen = (1 - smoothing) * chosen + smoothing * even
        return (logits.logsumexp(dim=1) - chosen).mean(dim=1)

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """SQuAD's F1 and exact match, and how well null is told; see `answer_metrics.mean_scores`."""
        return mean_scores(_texts(annotations), to_python_strings(truth[0]))

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """Figures by whether there is an answer, and answers beside the truth."""
        return answers_report(annotations, inputs, truth, most)

    def baseline(self, train: Sequence[pa.Array], truth: Sequence[pa.Array]) -> float | None:
        """F1 of always saying null; None where every row has an answer."""
        return truth[0].null_count / len(truth[0]) if truth[0].null_count else None

    def tune(self, outputs: Outputs, examples: Examples) -> dict[str, Any]:
        """The null threshold with the best F1, where some validation rows have an answer and some have none."""
        so = to_python_strings(examples.truth[0])
        if not self._tunes or all(text is None for text in so) or all(text is not None for text in so):
            return {}
        pieces = examples.pieces
        found = best_spans(outputs.values, pieces, self.options.max_answer_tokens)
        said = _texts(self._structs(found, np.isfinite(found.score), pieces, examples.inputs[1]))
        answered = np.array([f1(one, other) for one, other in zip(said, so, strict=True)])
        unanswered = np.array([float(other is None) for other in so])
        return {"null_threshold": best_threshold(found.null - found.score, answered, unanswered)}


def _texts(annotations: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The answers' texts, None where there is none."""
    return to_python_strings(pc.struct_field(annotations, "text"))
