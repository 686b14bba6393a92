from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bert_ray.config import help_text, load_job
from bert_ray.errors import JobError
from bert_ray.training.corpus.job import CorpusJob, NearOptions, VocabularyJob

ROOT = Path(__file__).resolve().parents[4]


def test_inputs_are_one_or_several() -> None:
    rest = ["--tokenizer", "t", "--output", "o"]
    assert load_job(CorpusJob, ["--input", "lake/", *rest]).inputs == ["lake/"]
    assert load_job(CorpusJob, ["--input", "a,b", *rest]).inputs == ["a", "b"]
    assert load_job(CorpusJob, ["input=[a, b]", "columns=text,body", *rest]).columns == ["text", "body"]


def test_the_job_file_is_whole() -> None:
    job = load_job(CorpusJob, [str(ROOT / "jobs" / "corpus.yaml")])
    assert job == CorpusJob(input=job.input, tokenizer=job.tokenizer, output=job.output, columns=job.columns)
    made = load_job(VocabularyJob, [str(ROOT / "jobs" / "vocabulary.yaml")])
    assert made == VocabularyJob(input=made.input, output=made.output)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"input": " "}, "input is empty"),
        ({"input": ["a", "a"]}, "input names a place twice"),
        ({"columns": []}, "columns is empty"),
        ({"validation_fraction": 0.9}, "validation_fraction is 0.9"),
        ({"shard_tokens": 0}, "shard_tokens is 0; give 1 or more"),
        ({"duplicates": "some"}, "duplicates is 'some'; give one of none, exact, near"),
        ({"tokenizer": ""}, "tokenizer is empty: give a directory that `bert-ray vocabulary` made"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(JobError, match=told.replace(".", r"\.")):
        CorpusJob(**({"input": "a", "tokenizer": "t", "output": "o"} | settings))


def test_what_is_refused_elsewhere() -> None:
    for wrong in ({"threshold": 1.0}, {"words": 0}, {"permutations": 8}):
        with pytest.raises(JobError, match=f"near.{next(iter(wrong))} is"):
            NearOptions(**wrong)
    with pytest.raises(JobError, match="size is 10; give 100 or more"):
        VocabularyJob(input="a", output="o", size=10)


def test_every_key_is_explained() -> None:
    for job in (CorpusJob, VocabularyJob):
        text = help_text(job, "bert-ray")
        assert "  --reading.bad-bytes" in text
        assert "\n   \n" not in text
