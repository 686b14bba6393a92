"""Every setting has a check whose message names the remedy; what may change between sessions is not part of a run."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from bert_ray import submission
from bert_ray.errors import JobError
from bert_ray.options import RayOptions
from bert_ray.training.job import AugmentationOptions, CheckpointOptions, DataOptions, TrainJob


def job(**settings: object) -> TrainJob:
    return TrainJob(**({"model": "m", "output": "o", "data": DataOptions(train="t.parquet")} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "bundle reference"),
        ({"output": ""}, "output is empty"),
        ({"name": ""}, "name is empty"),
        ({"engine": "spark"}, "give one of local, ray"),
        ({"schedule": "step"}, "linear, cosine, constant"),
        ({"precision": "int8"}, "auto, fp32"),
        ({"zero_stage": 4}, "0, 1, 2, 3"),
        ({"workers": 0}, "workers is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"engine": "ray", "workers": 3, "micro_batches": 2}, "give micro_batches=3 or more"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"schedule": "trapezoidal", "warmup": 0.5, "cooldown": 0.6}, "no room for both"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"class_weights": "even"}, "give none, balanced, or a weight by label"),
        ({"class_weights": {"spam": 0}}, "class_weights.spam is 0"),
        ({"class_weights": {"spam": float("inf")}}, "class_weights.spam is inf"),
        ({"l1": -1.0}, "l1 is -1.0"),
        ({"max_length": 2}, "at least 3 tokens"),
        ({"threads": 0}, "threads is 0"),
        ({"labels": [], "task": "entities"}, "labels is an empty list"),
        ({"labels": ["a", "a"]}, "repeat"),
        ({"early_stopping": 1, "data": DataOptions(train="t", validation_fraction=0.0)}, "validation rows"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(settings: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        job(**settings)


def test_local_paths_become_absolute_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train's workers have other working directories, and so has the driver of a submitted job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "filler").mkdir()
    data = DataOptions(train="t", validation="v", replay="r")
    local = job(
        model="filler",
        data=data,
        augmentation=AugmentationOptions(model="filler"),
        checkpoint=CheckpointOptions(directory="../checkpoints"),
    )
    stored = job(
        model="s3://bucket/model",
        output="s3://bucket/output",
        data=DataOptions(train="s3://bucket/t", validation="gs://bucket/v", replay="s3://bucket/r"),
        augmentation=AugmentationOptions(model="pkg:some/model"),
        checkpoint=CheckpointOptions(directory="s3://bucket/run?endpoint_override=host:1&scheme=http"),
    )
    for absolute in (TrainJob.absolute, submission._absolute):
        found = absolute(local)
        assert found.data == DataOptions(train=f"{tmp_path}/t", validation=f"{tmp_path}/v", replay=f"{tmp_path}/r")
        assert (found.model, found.augmentation.model) == (f"{tmp_path}/filler", f"{tmp_path}/filler")
        assert found.output == f"{tmp_path}/o"
        assert found.checkpoint.directory == f"{tmp_path.parent}/checkpoints"
        assert absolute(stored) == stored
        assert absolute(job()).checkpoint.directory is None


def test_a_wrong_nested_setting_is_an_error() -> None:
    with pytest.raises(JobError, match="validation_fraction"):
        DataOptions(train="t", validation_fraction=0.9)
    with pytest.raises(JobError, match=r"data\.train is empty"):
        DataOptions(train="")
    with pytest.raises(JobError, match="keep at least 1"):
        CheckpointOptions(keep=0)
    with pytest.raises(JobError, match="every_steps"):
        CheckpointOptions(every_steps=-1)


def test_identity_holds_what_decides_the_model_and_nothing_else() -> None:
    moved = job(
        output="elsewhere",
        engine="local",
        workers=7,
        threads=3,
        zero_stage=3,
        max_failures=9,
        ray=RayOptions(address="auto"),
        checkpoint=CheckpointOptions(every_steps=1),
    )
    assert moved.identity() == job().identity()
    assert job(learning_rate=1.0).identity() != job().identity()
    assert job(class_weights="balanced").identity() != job().identity()
    assert job(data=DataOptions(train="other")).identity() != job().identity()


def test_keys_that_may_change_are_those_that_the_page_names() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "train.md").read_text("utf-8")
    named = page.partition("Keys that say where and how fast (")[2].partition(")")[0]
    free = {"output", *re.findall(r"`([a-z_]+)`", named)}
    assert {item.name for item in fields(TrainJob)} - set(job().identity()) == free


def test_a_job_pickles() -> None:
    assert pickle.loads(pickle.dumps(job())) == job()


def test_job_data_and_loop_import_neither_ray_nor_deepspeed() -> None:
    code = (
        "import sys, bert_ray.training, bert_ray.training.job\n"
        "assert not {'torch', 'ray', 'deepspeed'} & set(sys.modules), 'job.py is light'\n"
        "import bert_ray.training.data, bert_ray.training.loop, bert_ray.training.launch\n"
        "assert not {'ray', 'deepspeed', 'pyspark'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
