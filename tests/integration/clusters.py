"""Real clusters of one machine, on loopback and free ports, each in a directory of its own, ended by process id."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_START_SECONDS = 180.0
_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Cluster:
    """How to reach a cluster: its address, its web address and the environment its client needs."""

    address: str
    web: str
    environment: dict[str, str]


def bert_ray(
    *argv: object, cwd: Path, environment: dict[str, str], timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """The real command as a process, with the client's environment."""
    command = [sys.executable, "-m", "bert_ray", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout)


@contextlib.contextmanager
def ray_head(scratch: Path) -> Iterator[Cluster]:
    """A real `ray start --head` with token authentication, of two CPUs."""
    token = scratch / "token"
    token.write_text(secrets.token_hex(32))
    client = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    # The cluster must not find bert_ray by the test's own path: it has to come with the submission.
    own = {key: value for key, value in client.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])
    # Ray's sockets have long names under this directory and a limit of 107 bytes, which pytest's own would break.
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    web = _free_port()
    ports = ["port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
    ports += ["runtime-env-agent-port", "ray-client-server-port", "node-manager-port", "object-manager-port"]
    command = [
        *[sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2"],
        *["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(web)],
        *["--object-store-memory", "200000000", "--temp-dir", directory, "--disable-usage-stats"],
        *[word for name in ports for word in (f"--{name}", str(_free_port()))],
    ]
    address = f"http://127.0.0.1:{web}"
    try:
        with _process(command, scratch / "ray.log", own, lambda log: _answers(f"{address}/api/version")):
            yield Cluster(address, address, client)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def spark_cluster(scratch: Path) -> Iterator[Cluster]:
    """A real standalone master and a worker of two cores."""
    import importlib.util

    home = Path(importlib.util.find_spec("pyspark").submodule_search_locations[0])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"SPARK_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_WORKER_DIR": str(scratch / "work")}
    port, web = _free_port(), _free_port()
    address = f"spark://127.0.0.1:{port}"
    start = [str(home / "bin" / "spark-class")]
    master = [*start, "org.apache.spark.deploy.master.Master", "--host", "127.0.0.1"]
    worker = [*start, "org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1", "--cores", "2", "--memory", "2g"]
    master += ["--port", str(port), "--webui-port", str(web)]
    worker += ["--port", str(_free_port()), "--webui-port", str(_free_port()), address]
    with (
        _process(master, scratch / "master.log", environment, lambda log: "New state: ALIVE" in log),
        _process(worker, scratch / "worker.log", environment, lambda log: "registered with master" in log),
    ):
        client = os.environ | {"SPARK_LOCAL_IP": "127.0.0.1"}
        yield Cluster(address, f"http://127.0.0.1:{web}", client)


@contextlib.contextmanager
def _process(
    command: list[str], log: Path, environment: dict[str, str], ready: Callable[[str], bool]
) -> Iterator[None]:
    """A process of ours, from when it is ready until the block ends."""
    with log.open("wb") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle, env=environment, cwd=log.parent)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not ready(log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:5]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.3)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:  # `ray start --block` often: its own processes end with it all the same.
            process.kill()
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401  # It asks for the token, so it is there.
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
