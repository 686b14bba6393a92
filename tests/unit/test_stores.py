from __future__ import annotations

import pytest

from bert_ray.errors import JobError
from bert_ray.model.bundle import load_bundle
from bert_ray.stores import open_store
from bert_ray.training.checkpoints import Checkpoints
from bert_ray.training.data import read_columns

SECRETS = [
    "s3://AKIA123:geheim@bucket/model",
    "abfs://container@account/model?client_secret=geheim",
    "abfs://container@account/model?sv=2024&sp=r&sig=geheim",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_a_secret_in_an_address_is_refused_and_not_repeated(uri: str) -> None:
    readers = (open_store, load_bundle, lambda place: Checkpoints(place, 1), lambda place: read_columns(place, {}))
    for read in readers:
        with pytest.raises(
            JobError, match=r"(s3://bucket|abfs://account)/model holds a secret.*AWS_ACCESS_KEY"
        ) as told:
            read(uri)
        assert "geheim" not in str(told.value)


def test_a_local_address_is_a_path(tmp_path: object) -> None:
    assert open_store(f"file://{tmp_path}")[1] == str(tmp_path)


def test_what_is_no_address_is_told() -> None:
    for read in (open_store, lambda place: Checkpoints(place, 1), lambda place: read_columns(place, {})):
        with pytest.raises(JobError, match=r"s3://\[x/run is no address of a store"):
            read("s3://[x/run")
