"""Settings that several jobs share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class RayOptions:
    """Where Ray runs.

    Attributes:
        address: of a running cluster ("auto", "ray://host:10001", "host:6379"). None: the cluster that RAY_ADDRESS
            names or the process is a job of, else a Ray of its own on this machine, for as long as the run lasts.
    """

    address: str | None = None
