"""What a task is: inputs, Arrow output type, head, loss, metrics, decoding.

A row's way through a task: `read` (Arrow columns as texts) -> `encode` (texts -> pieces of tokens) -> the encoder ->
`forward` (hidden states -> outputs) -> `decode` (outputs -> the annotation). A row may become several pieces: windows
of a long text, or two texts that the model sees apart.

Shapes: B rows, P pieces, T tokens of a packed batch, D hidden size, C labels (or the width of another output),
S samples of a training batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from bert_ray.errors import BundleError, JobError, meant
from bert_ray.model.architectures import dropout_names
from bert_ray.model.examples import Examples, Targets
from bert_ray.model.tasks.sections import Case, Cases, Constant, Section, shown, texts_at
from bert_ray.model.tokenization import Overflow, Pieces, Tokenizer, as_strings, is_text
from bert_ray.options import check_choices

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch


@dataclass(kw_only=True, frozen=True, slots=True)
class Options:
    """What may be chosen per call; a bundle's card (`options`) holds its defaults.

    Attributes:
        scores: also give every label's score, where the task has labels.
        overflow: what becomes of a text longer than the model: `truncate`, `head_tail` (its beginning and its end) or
            `windows` (read in overlapping parts whose results are combined).
        overlap: tokens that neighbouring windows share.
    """

    scores: bool = False
    overflow: Overflow = "truncate"
    overlap: int = 64

    def __post_init__(self) -> None:
        for item in fields(self):
            _of_its_type(item.name, getattr(self, item.name), str(item.type).split(" | "))
        check_choices(self, "options.")
        if self.overlap < 0:
            raise JobError(f"options.overlap is {self.overlap}; give 0 or more tokens")


@dataclass(kw_only=True, slots=True)
class Learning:
    """What a training job says of the loss.

    Attributes:
        label_smoothing: share of a label's probability that is spread over all labels (Szegedy et al., Rethinking the
            Inception Architecture, arXiv 1512.00567, section 7).
        label_weights: weight of each label in the loss, C numbers; None: 1 each.
        parts: whether a pretraining also asks how a row's two parts belong together.
    """

    label_smoothing: float = 0.0
    label_weights: Sequence[float] | None = None
    parts: bool = False


@dataclass(kw_only=True, slots=True)
class Outputs:
    """What the model said of P pieces.

    Attributes:
        values: float32 (P, C), one entry a piece; or with `offsets` (T, C), one a token.
        offsets: int64 (P + 1,); piece p has `values[offsets[p]:offsets[p + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray | None = None


class Task(ABC):
    """A task bound to a bundle's card. Cheap to make and to pickle until it is prepared.

    Class attributes:
        kind: the name in `bert_ray.json`.
        inputs: the input columns.
        truths: the columns that training and evaluation compare with.
        metric: the metric that early stopping and the best bundle go by; higher is better.
        blank_is_null: whether an empty or blank text gives a null annotation; else the model sees the empty text.
        truth_may_be_null: whether a row whose truth is null counts (a question without an answer).
        level: whether `forward` gives one output a piece ("row") or one a token ("token").
        tiles: how many of the encoder's batches this task wants in one, where its head costs more than the encoder.
        generates: whether its model has a decoder beside the encoder.
        spans: whether decoding needs to know which code points a token stems from.
        least_labels: how many labels a job must name, if it names any: an entity's one type, or one label that a text
            has or not, is something to learn.
        reads_pooler: whether its head reads BERT's pooler; else the weights may lack that.
        piece_is_sample: whether training takes each piece as a sample of its own; else all pieces of a row are one.
        builds: the table columns that `build` reads, where a bundle is made from a table without training; else none.
        split_by: the input whose hash decides about validation; rows that share it stay on one side.
        options_type: the dataclass of its options.
        inherits: options that a bundle to train takes over from the bundle it starts from.
        architecture: how transformers' architectures with this task's head end ("ForTokenClassification"): a directory
            without a card that names one is taken for this task, if it `fits`; None: never.
        headline: what a report says first, with metrics by name: "says the right label for {accuracy:.1%} of rows";
            empty: the metric and its value.
        metric_by_rows: whether the metric falls with the number of rows measured together, so that those of two tables
            cannot be compared.
        plain_metrics: metrics that are no shares, and not shown as per cent.
        reads_corpus: whether it learns from a corpus instead of a labelled table.
        leaves: the task of the bundle that training makes; None: this one.
        measured_as: for a task without metrics, the one to measure its bundles as.

    Attributes:
        card: of the bundle.
        config: of the model, where one is there.
        options: the card's, and over them the call's.
        learning: what the training job says of the loss.
    """

    kind: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("text",)
    truths: ClassVar[tuple[str, ...]] = ("label",)
    metric: ClassVar[str]
    blank_is_null: ClassVar[bool]
    truth_may_be_null: ClassVar[bool] = False
    level: ClassVar[Literal["row", "token"]] = "row"
    tiles: ClassVar[int] = 1
    generates: ClassVar[bool] = False
    spans: ClassVar[bool] = False
    least_labels: ClassVar[int] = 1
    reads_pooler: ClassVar[bool] = False
    piece_is_sample: ClassVar[bool] = False
    builds: ClassVar[tuple[str, ...]] = ()
    split_by: ClassVar[str] = "text"
    options_type: ClassVar[type[Options]] = Options
    inherits: ClassVar[tuple[str, ...]] = ()
    architecture: ClassVar[str | None] = None
    headline: ClassVar[str] = ""
    metric_by_rows: ClassVar[bool] = False
    plain_metrics: ClassVar[tuple[str, ...]] = ()
    reads_corpus: ClassVar[bool] = False
    leaves: ClassVar[str | None] = None
    measured_as: ClassVar[str | None] = None

    def __init_subclass__(cls, **more: Any) -> None:
        """Have a class read all tokens that has a `forward` or `losses` of its own and does not say which it reads."""
        super().__init_subclass__(**more)
        own = vars(cls)
        if "tokens_read" not in own and ("forward" in own or "losses" in own):
            cls.tokens_read = Task.tokens_read  # type: ignore[method-assign]

    def __init__(
        self, card: Card, config: PretrainedConfig | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Bind to a card.

        Raises:
            JobError: an option that the task does not have, or a value that it does not take.
        """
        self.card = card
        self.config = config
        known = {item.name for item in fields(self.options_type)}
        # The card's options are those of its own task; another that runs on the same model takes what both have.
        own = {name: value for name, value in card.options.items() if card.task == self.kind or name in known}
        self.options = self._options({**own, **(options or {})})
        self.learning = Learning()

    @classmethod
    def inherited(cls, base: Card) -> dict[str, Any]:
        """Those of `inherits` that the card of the bundle to start from has."""
        return {name: base.options[name] for name in cls.inherits if name in base.options}

    def _options(self, chosen: Mapping[str, Any]) -> Any:
        known = [item.name for item in fields(self.options_type)]
        for name in chosen:
            if name not in known:
                raise JobError(f"options.{name}: task {self.kind} has no such option; {meant(name, known)}")
        return self.options_type(**chosen)

    @property
    def name(self) -> str:
        """What the annotation is called unless the job says otherwise."""
        return self.card.name or self.kind

    @classmethod
    def fits(cls, config: PretrainedConfig) -> bool:
        """Whether a plain transformers model of `architecture` is one for this task."""
        return True

    @classmethod
    def labels_of(cls, config: PretrainedConfig) -> list[str]:
        """The card's labels for a plain transformers model."""
        return []

    def choose_inputs(self, named: Collection[str]) -> None:  # noqa: B027 - most tasks have no choice
        """Decide what a training job reads, where a task leaves that to the job (one text, or two).

        Args:
            named: the inputs and truths that the job names a column for.
        """

    @property
    def annotates(self) -> tuple[str, ...]:
        """The inputs that a trained bundle reads: those it has learned from, unless the task says otherwise."""
        return self.inputs

    @property
    def distortable(self) -> bool:
        """Whether a row keeps its truth when words of it are left out or changed."""
        return self.level == "row" and not self.spans

    def attach(self, bundle: Bundle) -> None:  # noqa: B027 - most tasks need no further files
        """Called first of all with the bundle to annotate with, or to start training from: for what it holds besides.

        Must be cheap: on every worker, for every bundle that is looked at.
        """

    def write_files(self, directory: Path) -> None:  # noqa: B027 - most tasks need no further files
        """Write what other libraries want to find in a bundle of this task, besides what transformers writes."""

    # A row's way.

    @abstractmethod
    def output_type(self) -> pa.DataType:
        """The annotation's Arrow type, declared here once for every engine."""

    @abstractmethod
    def auto_class(self) -> Any:
        """The transformers Auto class that reads a bundle of this task, head included."""

    def readable(self, task_input: str, kind: pa.DataType) -> bool:
        """Whether a column of this type can stand as an input."""
        return is_text(kind)

    def read(self, task_input: str, array: pa.Array | pa.ChunkedArray, column: str) -> pa.Array:
        """An input column as large_string, nulls kept."""
        return as_strings(array, column)

    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
        """The tokenizer as this task uses it."""
        return Tokenizer(
            tokenizer,
            self.card.max_length,
            overflow=self.options.overflow,
            overlap=self.options.overlap,
            spans=self.spans,
        )

    def encode(self, tokenize: Tokenizer, inputs: Sequence[pa.Array]) -> Pieces:
        """Texts, one array per input and none null, as pieces."""
        return tokenize(inputs)

    def prepare(self, annotator: Annotator) -> None:  # noqa: B027 - most tasks have nothing to prepare
        """Called once when an annotator is built, last: to read further files of the bundle, or embed labels."""

    def exact_layers(self, model: PreTrainedModel) -> list[torch.nn.Linear]:
        """Layers that stay in fp32 where the model computes in half precision: those whose products are what is told.

        bf16 has 8 bits: of numbers above 1,024 multiples of 8, and a bias of 1,987 would be 1,984.
        """
        return []

    def tokens_read(self, batch: PackedBatch, targets: torch.Tensor | None = None) -> torch.Tensor | None:
        """Which tokens' hidden states `forward` and `losses` read, where they are not all: of others less is computed.

        For tasks whose outputs are one a piece.

        Args:
            batch: T tokens in P pieces, on the CPU.
            targets: what a batch to learn from, or to be judged by, should be; None: it is annotated.

        Returns:
            int64 (R,), ascending, at least one token of each piece: `hidden` is (R, D) then. None: all; it is (T, D).
        """
        return None

    def narrowed(self, batch: PackedBatch, targets: torch.Tensor | None = None) -> PackedBatch:
        """A batch on the CPU, told which of its tokens are read."""
        read = self.tokens_read(batch, targets)
        return batch if read is None else batch.reading(read)

    @abstractmethod
    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The head: hidden states (T, D) of a packed batch -> one output per piece (P, C), or per token (T, C).

        Hidden states are (R, D) of a batch that was told which of its tokens are read (`batch.read`), not of another.
        """

    @abstractmethod
    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Outputs -> annotations, an array of `output_type` (or castable to it), one per row of `inputs`."""

    def build(
        self, base: Bundle, columns: Mapping[str, pa.Array], output: Path, provenance: Mapping[str, Any]
    ) -> tuple[int, list[str]]:
        """Make a bundle from a table without gradient steps; for tasks with `builds`.

        `self.card` is that of the bundle to come, as the job says it: labels (if the job lists them), name, options.
        What calls this puts the bundle in its place, whole, after it was measured on validation rows (if there are
        any), whose `metrics` then replace those that the task leaves on the card.

        Args:
            base: any bundle with a supported encoder.
            columns: what the table has of `builds`, by these names; nulls and blanks are in there still.
            output: the bundle's directory, to be written with `save_bundle`.
            provenance: for its card; `provenance["seed"]` is the job's.

        Returns:
            rows used, and notes for the user.

        Raises:
            ColumnError: a column is missing or cannot be used; the caller puts the table's path before the message.
            JobError: no row can be used.
        """
        raise BundleError(f"task {self.kind!r} has nothing to build")

    # Training and evaluation.

    def start(self, base: Bundle, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], output: Path) -> bool:
        """Make the bundle that training starts from, where the base itself does not do (it has no decoder, say).

        What comes out is a function of the arguments alone: a run that goes on makes it again.

        Args:
            base: that the job names.
            inputs: of all rows, also of those that will be held out: what may be taken from them is how they are spelt.
            truth: likewise.
            output: the bundle's directory, to be written with `save_bundle`.

        Returns:
            whether it was made; False: training starts from `base`.
        """
        return False

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """The labels that stand in the truth columns of a table to train on; [] where the task has none.

        Raises:
            ColumnError: the column cannot be labels, or a model could not tell them apart.
        """
        return []

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """Truth and input columns as the task's own types: what `faults`, `examples` and `metrics` take."""
        return truth, [self.read(name, array, name) for name, array in zip(self.inputs, inputs, strict=True)]

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """What is wrong with single rows: reason -> bool (B,). Such rows are left out, and reported with the reason."""
        return {}

    def learning_for(
        self, label_smoothing: float, class_weights: str | Mapping[str, float], truth: Sequence[pa.Array]
    ) -> Learning:
        """What the loss goes by.

        Args:
            label_smoothing: see Learning.
            class_weights: of the job: "none", "balanced", or weights by label; a label that is not named has 1.
            truth: of the rows to train on.

        Raises:
            JobError: the task has no labels to weigh, or not those.
        """
        if class_weights != "none":
            raise JobError(f"class_weights: task {self.kind} does not weigh labels; leave it out")
        return Learning(label_smoothing=label_smoothing)

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """A model to train: the base's encoder with a fresh head.

        Args:
            base: any bundle with a supported encoder.
            dropout: rate for hidden states; None keeps the base's.
            attention_dropout: rate for attention weights; None keeps the base's.
        """
        raise BundleError(f"task {self.kind!r} has nothing to train")

    def examples(self, tokenize: Tokenizer, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Examples:
        """Rows to learn from or to be judged by."""
        pieces = self.encode(tokenize, inputs)
        starts = None
        if not self.piece_is_sample and len(pieces) != len(inputs[0]):
            starts = pieces.starts
        targets = self.targets(pieces, inputs, truth)
        return Examples(pieces=pieces, targets=targets, starts=starts, inputs=inputs, truth=truth)

    def for_training(self, examples: Examples) -> Examples:
        """What of `examples` a run trains on; validation sees all."""
        return examples

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """What the loss compares with, one entry or several per sample."""
        raise BundleError(f"task {self.kind!r} has nothing to train")

    def losses(
        self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss of each sample (S,), a sum over what its weight counts; and the outputs, None if they cost extra.

        Hidden states are as in `forward`.
        """
        outputs = self.forward(model, hidden, batch).float()
        return self.loss(outputs, targets, batch), outputs

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Loss of each sample, (S,)."""
        raise BundleError(f"task {self.kind!r} has no loss")

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Name -> value over a whole table: annotations beside what is so."""
        raise BundleError(f"task {self.kind!r} has no metrics")

    def baseline(self, train: Sequence[pa.Array], truth: Sequence[pa.Array]) -> float | None:
        """`metric` of the best constant answer, learned from the truth of `train`; None where there is none."""
        return None

    def check_truth(self, truth: Sequence[pa.Array]) -> None:  # noqa: B027 - most tasks take what read_truth gives
        """Called before a table is annotated to be measured, so that hours later nothing is found that stood there.

        Raises:
            ColumnError: a label that the model does not have.
        """

    def measuring(self) -> dict[str, Any]:
        """Options to annotate with where the annotations are to be measured: what `report` shows more by."""
        return {}

    def constant(self, truth: Sequence[pa.Array]) -> Constant | None:
        """The best answer that is always the same, on the very rows that are measured; None where there is none."""
        value = self.baseline(truth, truth)
        return None if value is None else Constant(figures={self.metric: value})

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """What a report shows beside the metrics; here the first rows and what is so.

        Args:
            annotations: what the model said, (B,).
            inputs: as `read` gives them, (B,) each.
            truth: as `read_truth` gives it, (B,) each.
            most: how many examples of a kind to show.
        """
        rows = range(min(most, len(annotations)))
        said = [shown(str(annotations[row].as_py())) for row in rows]
        so = [shown(", ".join(str(array[row].as_py()) for array in truth)) for row in rows]
        cases = tuple(
            Case(row=row, texts=texts, said=said[row], so=so[row], right=said[row] == so[row])
            for row, texts in zip(rows, texts_at(self.inputs, inputs, rows), strict=True)
        )
        return [Cases(key="examples", title="The first rows", cases=cases, long=True)]

    def validate(self, outputs: Outputs, examples: Any) -> dict[str, float]:
        """Name -> value over the validation rows."""
        annotations = self.decode(outputs, examples.pieces, examples.inputs)
        return self.metrics(annotations, examples.inputs, examples.truth)

    def tune(self, outputs: Outputs, examples: Any) -> dict[str, Any]:
        """Options for the card that validation rows decide (a threshold); called before `validate`."""
        return {}


# Scalar types as annotations name them: what an option of them may be given as, and what an error asks for.
_SCALARS: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "a text, in quotes where YAML would take it for something else"),
    "None": (type(None), "null"),
}


def _of_its_type(name: str, value: Any, kinds: Sequence[str]) -> None:
    """Check that an option's value is of one of its annotation's types, where these are scalars."""
    if not set(kinds) <= set(_SCALARS):
        return
    # A whole number will do for a number, but true for neither, though it is an int to Python.
    allowed = tuple(_SCALARS[kind][0] for kind in kinds) + ((int,) if "float" in kinds else ())
    if not isinstance(value, allowed) or (isinstance(value, bool) and "bool" not in kinds):
        raise JobError(f"options.{name} is {value!r}; give {' or '.join(_SCALARS[kind][1] for kind in kinds)}")


def set_dropout(config: PretrainedConfig, dropout: float | None, attention_dropout: float | None) -> None:
    """Put dropout rates into a configuration; None leaves the rate that is there."""
    for name, rate in zip(dropout_names(config), (dropout, attention_dropout), strict=True):
        if rate is not None:
            setattr(config, name, rate)
