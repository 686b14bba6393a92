"""What a setting may be is said once, by its type."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from bert_ray.errors import JobError
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.inference.job import AnnotateJob
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.tasks import TASKS, TRAINED_ONLY
from bert_ray.model.tensorflow import ConvertJob
from bert_ray.options import check_choices
from bert_ray.planning.job import PlanJob
from bert_ray.training.corpus.job import CorpusJob, ReadingOptions, VocabularyJob
from bert_ray.training.job import ArchitectureOptions, DataOptions, PretrainingOptions, TrainJob

TABLE = {"input": "in", "output": "out"}
SETTINGS: dict[type, dict[str, Any]] = {
    AnnotateJob: {**TABLE, "model": "m"},
    AnnotatorSpec: {"model": "m"},
    ArchitectureOptions: {},
    ConvertJob: {"checkpoint": "c", "output": "o"},
    CorpusJob: {**TABLE, "tokenizer": "t"},
    DataOptions: {"train": "t"},
    EvaluateJob: {"model": "m", "table": "d"},
    PlanJob: {"job": "j"},
    PretrainingOptions: {},
    ReadingOptions: {},
    TrainJob: {"model": "m", "output": "o", "data": DataOptions(train="t")},
    VocabularyJob: TABLE,
    **{kind.options_type: {} for kind in (TASKS | TRAINED_ONLY).values()},
}


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_job_refuses_what_its_types_do_not_list(kind: type) -> None:
    given = SETTINGS[kind]
    kind(**given)
    for name, hint in get_type_hints(kind).items():
        listed = get_args(hint)[0] if get_origin(hint) is list else hint
        if get_origin(listed) is Literal:
            value: Any = ["another"] if get_origin(hint) is list else "another"
            with pytest.raises(JobError, match=rf"{name} is 'another'; give one of {get_args(listed)[0]}"):
                kind(**{**given, name: value})


def test_lists_numbers_and_true() -> None:
    @dataclass
    class Settings:
        stage: Literal[0, 1] = 0
        names: list[Literal["a", "b"]] = dataclasses.field(default_factory=list)
        other: str = ""

    check_choices(Settings(stage=1, names=["b", "a"], other="c"))
    with pytest.raises(JobError, match=r"x\.stage is True; give one of 0, 1"):
        check_choices(Settings(stage=True), "x.")
    with pytest.raises(JobError, match="names is 'c'; give one of a, b"):
        check_choices(Settings(names=["a", "c"]))  # type: ignore[list-item]
