"""Settings that several jobs share. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, slots=True)
class RayOptions:
    """Where Ray runs.

    Attributes:
        address: of a running cluster ("auto", "ray://host:10001", "host:6379"). None: the cluster that RAY_ADDRESS
            names or the process is a job of, else a Ray of its own on this machine, for as long as the run lasts.
    """

    address: str | None = None

    def init(self, cpus: int | None = None) -> dict[str, Any]:
        """Arguments of `ray.init` for it, quiet but for errors; `cpus`: of a Ray of our own, None: the machine's."""
        if (address := self.cluster()) is not None:
            return {"address": address, "log_to_driver": False}
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        return {"address": "local", "num_cpus": cpus, **quiet}

    def cluster(self) -> str | None:
        """Which cluster it is: its address; None: a Ray of its own on this machine."""
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        return None if address == "local" else address

    @staticmethod
    def unreachable(address: str, error: Exception) -> str:
        """What to say when `ray.init` failed."""
        return f"Ray at {address!r} cannot be reached: {' '.join(str(error).split())[:300]}"
