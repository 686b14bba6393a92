"""What importing costs: each room pulls in only the heavy packages it needs. Told by processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "tokenizers", "huggingface_hub", "ray", "pyspark", "deepspeed", "pandas", "sklearn"}
ENGINES = {"ray", "pyspark", "deepspeed"}

# Imports one module after another, all that lies under it too, and tells after each which heavy ones are there by then.
PROBE = """
import importlib, json, pkgutil, sys
told = []
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(found.name)
    told.append(sorted(set(json.loads(sys.argv[1])) & set(sys.modules)))
print(json.dumps(told))
"""


def imported(*modules: str) -> list[set[str]]:
    """The heavy packages that a fresh process holds after importing each of the modules, and all that lies under it."""
    command = [sys.executable, "-c", PROBE, json.dumps(sorted(HEAVY)), *modules]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [set(found) for found in json.loads(result.stdout.splitlines()[-1])]


def test_light_modules_pull_in_nothing_heavy() -> None:
    code = "import bert_ray, bert_ray.cli, bert_ray.submission, bert_ray.inference.job, bert_ray.training.job, sys\n"
    code += f"print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_the_lake_is_light() -> None:
    assert imported("bert_ray.lake", "bert_ray.config", "bert_ray.errors") == [set()] * 3


def test_the_model_knows_no_engine_and_each_engine_no_other() -> None:
    """What has come does not go: of modules in a row each adds what it may."""
    model, local, ray = imported("bert_ray.model", "bert_ray.inference.local", "bert_ray.inference.ray_data")
    assert "torch" in model, "the probe sees nothing: it would pass whatever was imported"
    assert (model & ENGINES, local & ENGINES, ray & ENGINES) == (set(), set(), {"ray"})


def test_spark_and_its_functions_know_no_other_engine() -> None:
    assert [found & ENGINES for found in imported("bert_ray.inference.spark", "bert_ray.inference.functions")] == [
        {"pyspark"},
        {"pyspark"},
    ]
