"""Two nodes of a Ray cluster on one machine: each in a network namespace of its own, with a wire between them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HEAD, OTHER = "10.213.7.1", "10.213.7.2"
PORT = 6379

# The head looks every second whether a node answers, and gives it up after eight times that it did not.
_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # a node that was cut off ends itself
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # of 60: workers on a node that is gone by then do not come
}


# What tells how many nodes there are: it ends once they are so many.
_COUNT = """
import sys, time
import ray

ray.init(log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[1]):
    time.sleep(0.2)
"""


def possible() -> bool:
    """Whether this process may make network namespaces and a wire into one."""
    name = f"bert-ray-{os.getpid()}-try"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    wire = ["ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other"]
    made = subprocess.run(wire, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], check=True)
    return made


class Nodes:
    """A head and another node, of one CPU each; every process of theirs and their drivers' is in one of two namespaces.

    The nodes see the same files. Nothing outside them can be reached.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.spaces = {HEAD: f"bert-ray-{os.getpid()}-a", OTHER: f"bert-ray-{os.getpid()}-b"}
        self._directories: list[str] = []
        token = scratch / "token"
        token.write_text(secrets.token_hex(32))
        # gloo would else look for the machine's own address, which no namespace has.
        self.environment = os.environ | _QUICK | {"GLOO_SOCKET_IFNAME": "wire"}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def lay_wire(self) -> None:
        """Make the namespaces and what joins them."""
        for space in self.spaces.values():
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        one, other = self.spaces.values()
        _ip("link", "add", "wire", "netns", one, "type", "veth", "peer", "name", "wire", "netns", other)
        for address, space in self.spaces.items():
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "wire")
            _ip("-n", space, "link", "set", "wire", "up")

    def cut(self) -> None:
        """Take the wire down."""
        _ip("-n", self.spaces[OTHER], "link", "set", "wire", "down")

    def mend(self) -> None:
        """Put it up again."""
        _ip("-n", self.spaces[OTHER], "link", "set", "wire", "up")

    def start(self, address: str) -> None:
        """Start a node: the head, or one that joins it."""
        # Ray's sockets have long names under this directory and a limit of 107 bytes.
        directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        self._directories.append(directory)
        role = ["--head", "--port", str(PORT)] if address == HEAD else ["--address", f"{HEAD}:{PORT}"]
        command = [
            *[sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--node-ip-address", address],
            *["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats"],
            *(["--include-dashboard", "false", "--temp-dir", directory] if address == HEAD else []),
        ]
        log = self.scratch / f"node-{len(self._directories)}.log"
        with log.open("wb") as handle:
            status = subprocess.run(
                self._inside(address, command), env=self.environment, stdout=handle, stderr=handle, timeout=120
            ).returncode
        assert status == 0, log.read_text(errors="replace")[-2000:]

    def kill(self, address: str) -> int:
        """SIGKILL everything on a node; how many processes that were."""
        killed: set[int] = set()
        until = time.monotonic() + 30
        while pids := [int(word) for word in _ip("netns", "pids", self.spaces[address]).split()]:
            assert time.monotonic() < until
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.update(pids)
            time.sleep(0.1)
        return len(killed)

    def wait_until_alive(self, count: int) -> None:
        """Until the head takes so many nodes for alive."""
        with self.driver([sys.executable, "-c", _COUNT, str(count)]) as process:
            assert process.wait(120) == 0, process.communicate()[1]

    @contextlib.contextmanager
    def driver(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        """A command on the head, killed at the end of the block; what it says on standard error can be read."""
        process = subprocess.Popen(
            self._inside(HEAD, command),
            env=self.environment | {"RAY_ADDRESS": f"{HEAD}:{PORT}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(30)

    def close(self) -> None:
        """End every process and take the namespaces away."""
        for address, space in self.spaces.items():
            if space in _ip("netns", "list"):
                with contextlib.suppress(AssertionError):  # The other goes all the same.
                    self.kill(address)
                _ip("netns", "del", space)
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)

    def _inside(self, address: str, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.spaces[address], *command]


@contextlib.contextmanager
def two_nodes(scratch: Path) -> Iterator[Nodes]:
    """Both nodes, started, until the block ends."""
    nodes = Nodes(scratch)
    try:
        nodes.lay_wire()
        nodes.start(HEAD)
        nodes.start(OTHER)
        yield nodes
    finally:
        nodes.close()


def _ip(*words: str) -> str:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert result.returncode == 0, f"ip {' '.join(words)}: {result.stderr}"
    return result.stdout
