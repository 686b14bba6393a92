"""Zero-shot labels: one label of C for each text, the labels given per call; nothing is trained.

Runs on any embedding bundle. Each label's name (or its description) is put into a template, "This text is about
sports.", and embedded once, as texts are; a text gets the label whose vector is nearest to its own (the embedding
baseline of Yin et al., Benchmarking Zero-shot Text Classification, arXiv 1909.00161, with a sentence encoder).

Output: struct<label: string, score: float32>; with scores also scores: map<string, float32>. The score is the softmax
of cosine / temperature over the labels. With multilabel: list<struct<label: string, score: float32>>, the labels whose
score, the same softmax, reaches the threshold, the best first. A blank text has nothing to judge and gives null.

Shapes: B rows, P pieces, D hidden size, C labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import ColumnError, JobError
from bert_ray.model.tasks.base import Options, Outputs
from bert_ray.model.tasks.classification import Classification, label_indices
from bert_ray.model.tasks.label_report import SCORED_LABELS, label_sets_report, majority, one_label_report
from bert_ray.model.tasks.pooled import PooledTask, PromptOptions, unit
from bert_ray.model.tokenization import Pieces, Ragged, is_list

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.tasks.sections import Constant, Section

# Those of hosted ai_classify functions.
_MOST_LABELS, _LABEL_CHARACTERS, _DESCRIPTION_CHARACTERS = 500, 100, 1000

# Chosen on AG News' training rows with MiniLM; benchmarks/zero_shot.py has the others.
TEMPLATE = "This text is about {}."
TEMPERATURE = 0.05
# Of less, a cosine over it is beyond what fp32 holds; long before that one label has all.
_LEAST_TEMPERATURE = 1e-6
# A share of the scores: four labels at most. On texts about one topic and about two it does about as well on both;
# judging each label alone, against a template about "something", did worse.
_MULTILABEL_THRESHOLD = 0.25


class LabelsByEmbedding(PooledTask):
    """One label of C for each text, told from its embedding: what zero-shot and few-shot share."""

    inputs: ClassVar[tuple[str, ...]] = ("text",)
    truths: ClassVar[tuple[str, ...]] = ("label",)
    metric: ClassVar[str] = "accuracy"
    blank_is_null: ClassVar[bool] = True
    split_by: ClassVar[str] = "text"
    architecture: ClassVar[str | None] = None
    headline: ClassVar[str] = "says the right label for {accuracy:.1%} of rows"

    @property
    def names(self) -> list[str]:
        """The labels."""
        return self.card.labels

    @property
    def judge(self) -> Classification:
        """Classification with these labels: it turns logits into annotations, and labels into indices."""
        card = replace(self.card, task=Classification.kind, labels=list(self.names), options={})
        return Classification(card, self.config, {"scores": self.options.scores})

    def output_type(self) -> pa.DataType:
        """That of classification."""
        return self.judge.output_type()

    def annotations(self, logits: np.ndarray, inputs: Sequence[pa.Array]) -> pa.Array:
        """Logits float32 (B, C) -> structs, as classification does it."""
        rows = len(logits)
        tokens = Ragged(ids=np.zeros(0, np.int32), types=None, offsets=np.zeros(rows + 1, np.int64))
        return self.judge.decode(Outputs(values=logits), Pieces(tokens=tokens, rows=np.arange(rows)), inputs)

    def indices(self, labels: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Labels -> their positions, as classification reads them, int64."""
        return self.judge.indices(labels)

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Accuracy and macro F1 (the unweighted mean over labels); a null annotation counts as wrong.

        Raises:
            ColumnError: a label that is none of these.
        """
        said = pc.index_in(pc.struct_field(annotations, "label"), pa.array(self.names, pa.string()))
        missing = pa.scalar(-1, said.type)
        return figures(self.indices(truth[0]), pc.fill_null(said, missing).to_numpy(zero_copy_only=False), self.names)

    def baseline(self, train: Sequence[pa.Array], truth: Sequence[pa.Array]) -> float | None:
        """Accuracy of always saying the most frequent label."""
        return self.judge.baseline(train, truth)

    def check_truth(self, truth: Sequence[pa.Array]) -> None:
        """The labels are these."""
        self.indices(truth[0])

    def measuring(self) -> dict[str, Any]:
        """With every label's score."""
        return {"scores": True} if len(self.names) <= SCORED_LABELS else {}

    def constant(self, truth: Sequence[pa.Array]) -> Constant | None:
        """Always the most frequent label."""
        return majority(self.names, self.indices(truth[0]))

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """As of classification."""
        return one_label_report(self.names, annotations, self.indices(truth[0]), self.inputs, inputs, most)


@dataclass(kw_only=True, frozen=True, slots=True)
class ZeroShotOptions(PromptOptions):
    """What may be chosen per call.

    Attributes:
        labels: 2 to 500 labels of 1 to 100 characters: a list of names; or a mapping of name to description, which then
            stands for the name in the template; or either of them as JSON.
        template: how a label is put, `{}` standing for it; of several the mean of their vectors counts.
        multilabel: give every label that reaches the threshold instead of the best one.
        threshold: the score that a label has to reach; a text none of whose labels reaches it gets null (multilabel: an
            empty list). None: 0, so that every text gets a label; with multilabel 0.25.
        temperature: what cosines are divided by; the smaller, the surer the scores. The order of labels stays.
    """

    labels: Any = None
    template: Any = TEMPLATE
    multilabel: bool = False
    threshold: float | None = None
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        PromptOptions.__post_init__(self)
        if self.labels is not None:
            parse_labels(self.labels)
        for template in self.templates():
            if not isinstance(template, str) or template.count("{}") != 1:
                raise JobError(
                    f"options.template has {template!r}; give a text with one {{}} for the label, such as {TEMPLATE!r}"
                )
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise JobError(f"options.threshold is {self.threshold}; a score is from 0 to 1")
        if not _LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise JobError(
                f"options.temperature is {self.temperature}; give a number from {_LEAST_TEMPERATURE} on, such as "
                f"{TEMPERATURE}"
            )
        if self.multilabel and self.scores:
            raise JobError("options.scores and options.multilabel do not go together; threshold: 0 gives every label")

    def templates(self) -> list[Any]:
        """The templates, one or several."""
        found = [self.template] if isinstance(self.template, str) else self.template
        if not isinstance(found, Sequence) or not found:
            raise JobError(f"options.template is {self.template!r}; give a text with one {{}}, or a list of such texts")
        return list(found)


class ZeroShot(LabelsByEmbedding):
    """One label of those that the call names."""

    kind: ClassVar[str] = "zero-shot"
    options_type: ClassVar[type[Options]] = ZeroShotOptions

    _labels: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """The labels, as the options name them.

        Raises:
            JobError: they name none.
        """
        if self.options.labels is None:
            raise JobError(
                "options.labels is missing: task zero-shot needs the labels to choose from, for example "
                "options: {labels: [sports, politics]}"
            )
        return list(parse_labels(self.options.labels))

    def output_type(self) -> pa.DataType:
        """See the module's first lines."""
        kind = super().output_type()
        return pa.list_(kind) if self.options.multilabel else kind

    def prepare(self, annotator: Annotator) -> None:
        """Embed the labels.

        Raises:
            JobError: two labels are the same tokens to the model.
        """
        super().prepare(annotator)
        phrases = list(parse_labels(self.options.labels).values())
        templates = self.options.templates()
        texts = [template.replace("{}", phrase) for template in templates for phrase in phrases]
        pieces = self.encode(annotator.tokenizer, [pa.array(texts, pa.large_string())])
        self._check_distinct(pieces)
        vectors = unit(self.vectors(annotator.outputs_of(pieces), pieces))
        self._labels = unit(vectors.reshape(len(templates), len(phrases), -1).mean(axis=0))

    def _check_distinct(self, pieces: Pieces) -> None:
        """Labels that differ in case alone, or in letters that the vocabulary lacks, cannot be told apart."""
        seen: dict[bytes, str] = {}
        starts, offsets = pieces.starts, pieces.tokens.offsets
        for row, name in enumerate(self.names):
            ids = pieces.tokens.ids[offsets[starts[row]] : offsets[starts[row + 1]]].tobytes()
            if ids in seen:
                raise JobError(
                    f"options.labels: {seen[ids]!r} and {name!r} are the same to this model's vocabulary; leave one "
                    "out, or give descriptions that differ in words it knows"
                )
            seen[ids] = name

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Vectors float32 (P, D) -> structs, or lists of structs."""
        assert self._labels is not None, "prepare comes first"
        logits = unit(self.vectors(outputs, pieces)) @ self._labels.T / np.float32(self.options.temperature)
        if self.options.multilabel:
            return self._lists(logits)
        found, threshold = self.annotations(logits, inputs), self.options.threshold or 0.0
        far = found.field("score").to_numpy(zero_copy_only=False) < threshold
        return found.take(pa.array(np.arange(len(found)), mask=far)) if far.any() else found

    def _lists(self, logits: np.ndarray) -> pa.Array:
        """Logits float32 (B, C) -> the labels above the threshold."""
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
        threshold = _MULTILABEL_THRESHOLD if self.options.threshold is None else self.options.threshold
        order = np.argsort(-scores, axis=1, kind="stable")
        ranked = np.take_along_axis(scores, order, axis=1)
        keep = ranked >= np.float32(threshold)
        offsets = np.zeros(len(scores) + 1, np.int32)
        np.cumsum(keep.sum(axis=1), out=offsets[1:])
        labels = pa.array(self.names, pa.string()).take(pa.array(order[keep]))
        kind = self.output_type()
        values = pa.StructArray.from_arrays([labels, pa.array(ranked[keep])], fields=list(kind.value_type))
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)

    def indices(self, labels: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """By name alone: a call's labels have no numbers that a table could mean."""
        return label_indices(labels, self.names, by_position=False)

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """Refuses: there is nothing to train."""
        raise JobError(
            "task zero-shot has nothing to train: annotate with it, the labels given as options.labels; to learn from "
            "examples, train task few-shot (8 to 64 a label) or classification"
        )

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """As classification's; with multilabel, the truth being lists of labels: exact matches, micro and macro F1."""
        if not self.options.multilabel:
            return super().metrics(annotations, inputs, truth)
        from sklearn.metrics import accuracy_score, f1_score

        so, said = self._sets(truth[0]), self._sets(pc.list_flatten(annotations).field("label"), annotations)
        found = {"accuracy": float(accuracy_score(so, said))}
        for average in ("micro", "macro"):
            found[f"{average}_f1"] = float(f1_score(so, said, average=average, zero_division=0.0))
        return found

    def _sets(self, labels: pa.Array, lists: pa.Array | None = None) -> np.ndarray:
        """Lists of labels as int8 (B, C), 1 where the label is in the list; a null list is an empty one."""
        lists = labels if lists is None else lists
        if not is_list(lists.type):
            raise ColumnError(f"the label column is {lists.type}; with multilabel, it holds lists of labels")
        flat = pc.list_flatten(labels) if lists is labels else labels
        rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        found = np.zeros((len(lists), len(self.names)), np.int8)
        if len(flat):
            found[rows, self.indices(flat)] = 1
        return found

    def baseline(self, train: Sequence[pa.Array], truth: Sequence[pa.Array]) -> float | None:
        """Accuracy of always saying the most frequent label; None with multilabel."""
        return None if self.options.multilabel else super().baseline(train, truth)

    def check_truth(self, truth: Sequence[pa.Array]) -> None:
        """The labels are these."""
        if self.options.multilabel:
            self._sets(truth[0])
        else:
            super().check_truth(truth)

    def measuring(self) -> dict[str, Any]:
        """As of classification; several labels come without the other ones' scores."""
        return {} if self.options.multilabel else super().measuring()

    def constant(self, truth: Sequence[pa.Array]) -> Constant | None:
        """As of classification; None with multilabel."""
        return None if self.options.multilabel else super().constant(truth)

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """As of classification, or of multi-label."""
        if not self.options.multilabel:
            return super().report(annotations, inputs, truth, most)
        so, said = self._sets(truth[0]), self._sets(pc.list_flatten(annotations).field("label"), annotations)
        return label_sets_report(self.names, so, said, None, self.inputs, inputs, most)


def parse_labels(labels: Any) -> dict[str, str]:
    """Label -> what is put into the template for it: its description, where it has one, else itself.

    Args:
        labels: a list of names, a mapping of name to description (None or blank: none), or either as JSON.

    Raises:
        JobError: it is none of these, or the labels are too few, too many, too long, blank or not distinct.
    """
    if isinstance(labels, str):
        try:
            labels = json.loads(labels, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError):
            raise JobError(
                f"options.labels is {labels[:60]!r}, which is not JSON; give a list of labels, a mapping of label to "
                'description, or either as JSON: ["sports", "politics"]'
            ) from None
    if isinstance(labels, Mapping):
        labels = _Pairs(labels.items())
    if not isinstance(labels, Sequence) or isinstance(labels, str | bytes):
        raise JobError(
            f"options.labels is {type(labels).__name__}; give a list of labels or a mapping of label to description"
        )
    if not 2 <= len(labels) <= _MOST_LABELS:
        count = len(labels) or "no"
        raise JobError(
            f"options.labels has {count} label{'' if count == 1 else 's'}; give 2 to {_MOST_LABELS} to choose from"
        )
    found: dict[str, str] = {}
    for place, item in enumerate(labels):
        name, description = item if isinstance(labels, _Pairs) else (item, None)
        if not isinstance(name, str):
            raise JobError(f"options.labels: label {place} is {name!r}, a {type(name).__name__}; labels are text")
        if not name.strip() or len(name) > _LABEL_CHARACTERS:
            what = f"has {len(name)} characters" if name.strip() else f"is {name!r}, which is blank"
            raise JobError(f"options.labels: label {place} {what}; give each 1 to {_LABEL_CHARACTERS} characters")
        if name in found:
            raise JobError(f"options.labels: {name!r} stands twice; labels are distinct")
        if description is not None and not isinstance(description, str):
            raise JobError(f"options.labels: the description of {name!r} is {description!r}; descriptions are text")
        if description and len(description) > _DESCRIPTION_CHARACTERS:
            raise JobError(
                f"options.labels: the description of {name!r} has {len(description)} characters; give up to "
                f"{_DESCRIPTION_CHARACTERS}"
            )
        found[name] = (description or "").strip() or name.strip()
    return found


class _Pairs(list[Any]):
    """The items of a mapping, repeated keys of a JSON object kept."""


def figures(so: np.ndarray, said: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Classification's metrics of labels given by position, int (N,) each; -1 in `said`, none, counts as wrong."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    present = list(range(len(names)))
    precision, recall, f1, _ = precision_recall_fscore_support(so, said, labels=present, zero_division=0.0)
    found = {"accuracy": float(accuracy_score(so, said)), "macro_f1": float(np.mean(f1))}
    if len(present) == 2:
        found |= {"f1": float(f1[1]), "precision": float(precision[1]), "recall": float(recall[1])}
    return found
