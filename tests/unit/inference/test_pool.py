from __future__ import annotations

import pytest

from bert_ray.errors import JobError
from bert_ray.inference.ray_data import Pool, plan_pool


def plan(cpus: float, node: float | None = None, gpus: float = 0, **asked: object) -> Pool:
    given = {"workers": None, "threads": None, "device": "auto", "tasks": None, **asked}
    return plan_pool(cpus, node or cpus, gpus, **given)


def test_two_cores_hold_two_actors_that_leave_a_core() -> None:
    assert plan(2) == Pool(actors=2, cpus=0.5, gpus=0, threads=1)


def test_one_piece_of_work_has_both_cores() -> None:
    assert plan(2, tasks=1) == Pool(actors=1, cpus=1, gpus=0, threads=2)


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 6, 8, 16, 64, 500])
@pytest.mark.parametrize("workers", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("threads", [None, 1, 3])
@pytest.mark.parametrize("gpus", [0, 4])
def test_a_dataset_s_own_tasks_have_a_cpu(cpus: int, workers: int | None, threads: int | None, gpus: int) -> None:
    try:
        pool = plan(cpus, min(cpus, 16), gpus, workers=workers, threads=threads)
    except JobError as error:
        assert "the cluster has" in str(error)
        return
    assert pool.actors * pool.cpus <= cpus - 1
    assert pool.actors >= 1


@pytest.mark.parametrize("cpus", [2, 3, 4, 6, 8, 16, 64, 500])
def test_a_pool_of_our_own_choice_uses_no_more_threads_than_cpus(cpus: int) -> None:
    pool = plan(cpus, min(cpus, 16))
    assert pool.actors * (pool.threads or 1) <= cpus


def test_large_nodes_hold_actors_of_a_few_threads() -> None:
    assert plan(64, 16) == Pool(actors=16, cpus=3, gpus=0, threads=4)


def test_no_more_actors_than_work() -> None:
    assert plan(64, 16, tasks=3).actors == 3
    assert plan(64, 16, tasks=3, workers=8).actors == 3


def test_what_the_user_says_counts() -> None:
    assert plan(8, workers=2) == Pool(actors=2, cpus=3, gpus=0, threads=4)
    assert plan(8, workers=2, threads=1) == Pool(actors=2, cpus=1, gpus=0, threads=1)


def test_a_gpu_each() -> None:
    assert plan(32, 16, gpus=4) == Pool(actors=4, cpus=1, gpus=1, threads=None)
    assert plan(32, 16, gpus=4, device="cpu").gpus == 0
    assert plan(32, 16, gpus=4, device="cuda:0").gpus == 1
    with pytest.raises(JobError, match=r"device is 'cuda:1', but Ray gives each worker a GPU of its own"):
        plan(32, 16, gpus=4, device="cuda:1")


@pytest.mark.parametrize("asked", [{"workers": 9}, {"workers": 2, "device": "cuda"}, {"workers": 4, "threads": 4}])
def test_what_would_wait_for_ever_is_an_error(asked: dict) -> None:
    with pytest.raises(JobError, match="the cluster has"):
        plan(4, **asked)
