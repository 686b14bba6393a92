"""The watchdog ends what no longer gets on, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

from bert_ray.training.watchdog import watchdog


def test_who_gets_on_is_left_alone() -> None:
    ended: list[bool] = []
    with watchdog(2.0, lambda: ended.append(True)) as beat:
        time.sleep(2.5)  # Before the first beat nothing is counted: a model is being built.
        for _ in range(8):
            beat()
            time.sleep(0.4)
    assert not ended


def test_who_does_not_is_ended() -> None:
    ended: list[bool] = []
    with watchdog(0.2, lambda: ended.append(True)) as beat:
        beat()
        time.sleep(0.8)
    assert ended == [True]


def test_the_process_ends_and_says_where_it_stood() -> None:
    script = (
        "import time\n"
        "from bert_ray.training.watchdog import watchdog\n"
        "def stuck():\n"
        "    time.sleep(60)\n"
        "with watchdog(0.2) as beat:\n"
        "    beat()\n"
        "    stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "no progress for 0 s" in done.stderr
    assert "in stuck" in done.stderr
