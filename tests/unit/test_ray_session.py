"""What everything on Ray shares."""

from __future__ import annotations

import socket

import pyarrow as pa
import pytest
import ray.data

from bert_ray.errors import EngineError
from bert_ray.options import RayOptions
from bert_ray.ray_session import each_done, knock, quiet_data, session


def test_an_item_may_take_longer_than_ray_waits() -> None:
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_no_progress_timeout_s
    with quiet_data():
        assert (context.enable_progress_bars, context.execution_no_progress_timeout_s) == (False, -1)
    assert (context.enable_progress_bars, context.execution_no_progress_timeout_s) == before


def test_each_item_is_done_and_one_that_fails_ends_the_work(ray_session: None) -> None:
    def do(batch: pa.Table) -> pa.Table:
        return pa.table({"outcome": [f"{int(item)} done" for item in batch["item"].to_pylist()]})

    with session(RayOptions()), quiet_data():
        assert ray.is_initialized()
        assert sorted(each_done(["2", "1"], do)) == ["1 done", "2 done"]
        with pytest.raises(
            EngineError, match=r"^Ray gave up: ValueError: invalid literal for int.. with base 10: 'one'$"
        ):
            list(each_done(["one"], do))
    assert ray.is_initialized(), "a session that was there before is not closed"


def test_a_host_where_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        knock(f"127.0.0.1:{port}")
        knock(f"ray://127.0.0.1:{port}")
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(OSError, match="refused"):
            knock(address)
    knock("auto")
    knock("local")
