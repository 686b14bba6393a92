"""What an evaluation is told. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bert_ray.errors import JobError
from bert_ray.options import Dtype, check_choices


@dataclass(kw_only=True, slots=True)
class EvaluateJob:
    """Measure a model on a labelled table: its task's metrics beside a baseline, warnings, and report.html.

    Attributes:
        model: a bundle reference.
        table: Parquet file or directory (hive partitions become columns), or Delta table, with texts and their labels.
        column: the text column, for a task of one input; default: the input's name, `text`.
        columns: table columns by the task's inputs and truths (`label`, `answer_text`, …), where their names differ.
        task: another task to run with the model than its own: `similarity` or `zero-shot` on an encoder, say.
        options: of the task, over those on the model's card.
        label: the column that holds what is so, where the task compares with one: labels (the model's names, also as
            integers; or integers and booleans that are positions among them), numbers, entities, ids.
        output: directory for report.html and metrics.json; made where it is missing, those two files replaced.
        mistakes: how many mistakes the report shows; a quarter as many rows that are right.
        batch_tokens: tokens in a packed batch; default: what suits the device.
        threads: torch threads; default: torch's own choice.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (fp32 on a CPU, bf16 or fp16 on a GPU), "fp32", "bf16" (on a CPU with AMX two to three times as
            fast), "fp16".
    """

    model: str
    table: str
    column: str | None = None
    columns: dict[str, str] | None = None
    task: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    label: str = "label"
    output: str = "evaluation"
    mistakes: int = 20
    batch_tokens: int | None = None
    threads: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.column is not None and self.columns:
            raise JobError("column and columns are both given: column is for a task of one input, columns for several")
        if self.mistakes < 0:
            raise JobError(f"mistakes is {self.mistakes}: it is 0 or more")
        for key in ("batch_tokens", "threads"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise JobError(f"{key} is {value}: it is at least 1")
