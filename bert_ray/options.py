"""Settings that several jobs share. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bert_ray.errors import JobError

# What a model computes in; "auto": fp32 on a CPU, bf16 or fp16 on a GPU.
Dtype = Literal["auto", "fp32", "bf16", "fp16"]


def check_choices(settings: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass whose type lists what may be given: a Literal, or a list of one.

    Args:
        settings: the dataclass; what its annotations name is there at run time, too.
        prefix: of its fields' names as a user knows them, "reading." say.

    Raises:
        JobError: a field holds something else.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        values, listed = (value, get_args(kind)[0]) if get_origin(kind) is list else ([value], kind)
        if get_origin(listed) is not Literal:
            continue
        allowed = get_args(listed)
        # True is 1 to Python.
        if wrong := [item for item in values if item not in allowed or isinstance(item, bool)]:
            raise JobError(f"{prefix}{name} is {wrong[0]!r}; give one of {', '.join(map(str, allowed))}")


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
