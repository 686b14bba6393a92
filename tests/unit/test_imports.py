"""What importing costs: each room pulls in only the heavy packages it needs. Told by processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "huggingface_hub", "ray", "pyspark", "deepspeed", "pandas", "sklearn"}
ENGINES = {"ray", "pyspark", "deepspeed"}

# Imports every module of a package, then tells which heavy ones came along.
PROBE = """
import importlib, json, pkgutil, sys
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(found.name)
print(json.dumps(sorted(set(json.loads(sys.argv[1])) & set(sys.modules))))
"""


def imported(*modules: str) -> set[str]:
    """The heavy packages that a fresh process holds after importing the modules and all that lies under them."""
    command = [sys.executable, "-c", PROBE, json.dumps(sorted(HEAVY)), *modules]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def bare(statement: str) -> set[str]:
    """The heavy packages that a fresh process holds after one statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(set({sorted(HEAVY)!r}) & set(sys.modules))))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_light_modules_pull_in_nothing_heavy() -> None:
    # One process for all: what none of them pulls in, each one does not.
    modules = ["bert_ray", "bert_ray.cli", "bert_ray.submission", "bert_ray.inference.job", "bert_ray.training.job"]
    assert bare(f"import {', '.join(modules)}") == set()


def test_the_lake_is_light() -> None:
    assert imported("bert_ray.lake", "bert_ray.config", "bert_ray.errors") == set()


def test_the_model_knows_no_engine() -> None:
    found = imported("bert_ray.model")
    assert found & ENGINES == set()
    assert "torch" in found, "the probe sees nothing: it would pass whatever was imported"


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("local", set()), ("ray_data", {"ray"}), ("spark", {"pyspark"}), ("functions", {"pyspark"})],
)
def test_an_engine_pulls_in_no_other(module: str, allowed: set[str]) -> None:
    assert bare(f"import bert_ray.inference.{module}") & ENGINES <= allowed
