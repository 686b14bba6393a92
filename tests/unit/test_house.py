"""The house keeps its word: bundled data, commands named in the README, nothing tied to one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import bert_ray
from bert_ray.model.tasks import TASKS, TRAINED_ONLY

ROOT = Path(__file__).resolve().parents[2]


def tracked() -> list[Path]:
    """The files of the checkout; skips where it is none (an unpacked archive)."""
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    """The text files of the checkout with their contents."""
    found = []
    for path in tracked():
        try:
            found.append((path, path.read_text("utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def read_lake(path: Path) -> pa.Table:
    return ds.dataset(path, partitioning="hive").to_table()


def test_bundled_rows_are_all_there_once(uci_train: Path, uci_lake: Path) -> None:
    train, lake = pq.read_table(uci_train), read_lake(uci_lake)
    assert (train.num_rows, lake.num_rows) == (1_000, 2_001)
    ids = train["id"].to_pylist() + lake["id"].to_pylist()
    assert sorted(ids) == list(range(3_001))


def test_nothing_trained_on_stands_in_the_lake(uci_train: Path, uci_lake: Path) -> None:
    normal = [
        {text.strip().lower() for text in table["text"].to_pylist()}
        for table in (pq.read_table(uci_train), read_lake(uci_lake))
    ]
    assert normal[0] & normal[1] == set()


def test_training_rows_are_balanced(uci_train: Path) -> None:
    train = pq.read_table(uci_train)
    groups = Counter(zip(train["source"].to_pylist(), train["label"].to_pylist(), strict=True))
    assert len(groups) == 6
    assert max(groups.values()) - min(groups.values()) <= 1


def test_the_lake_is_hive_partitioned(uci_lake: Path) -> None:
    files = sorted(path.relative_to(uci_lake).as_posix() for path in uci_lake.rglob("*.parquet"))
    assert files == [f"source={source}/part-{part}.parquet" for source in ("amazon", "imdb", "yelp") for part in (0, 1)]
    for name in files:
        file = pq.ParquetFile(uci_lake / name)
        assert file.schema_arrow.names == ["id", "text", "label"]
        assert file.metadata.num_row_groups == 2


def test_bundled_data_is_what_the_split_makes(
    shared_data: Path, uci_train: Path, uci_lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("demo_split", ROOT / "jobs" / "demo" / "split.py")
    split = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(split)
    monkeypatch.setattr(split, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["split.py", str(shared_data / "uci_sentences" / "all.parquet")])
    split.main()
    assert pq.read_table(tmp_path / "train.parquet").equals(pq.read_table(uci_train))
    assert read_lake(tmp_path / "lake").sort_by("id").equals(read_lake(uci_lake).sort_by("id"))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_make_targets_named_in_the_documents_exist() -> None:
    named = set()
    for path, text in texts():
        if path.suffix == ".md":
            named |= set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", text, re.MULTILINE))
            named |= set(re.findall(r"`make ([a-z-]+)", text))
    assert {"demo", "test"} <= named
    assert named <= make_targets()


def test_relative_links_of_the_documents_lead_somewhere() -> None:
    broken = []
    for path, text in texts():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            place = target.partition("#")[0]
            if place and "://" not in place and not (path.parent / place).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


# Who names a task, and why; what carries tasks (engines, bulk writer, training loop, evaluation) names none.
NAMES_A_TASK = {
    "inference/functions.py": "the SQL function of sentiment wants a classifier",
    "model/inferred_card.py": "a directory of sentence-transformers is an embedding",
    "model/onnx.py": "of the tasks on pooled vectors two are a single pass",
    "model/tensorflow.py": "a checkpoint with a vocabulary head is a fill-mask, another an embedding",
    "planning/choose.py": "chooses among classifiers",
    "planning/trial.py": "chooses among classifiers",
    "training/augmentation.py": "has words filled in",
    "training/corpus/vocabulary.py": "bundles whose vocabulary can grow",
    "training/job.py": "the task that is trained where none is named",
    "training/pretraining.py": "what pretraining leaves behind",
}


def test_who_knows_a_task_by_name() -> None:
    """A new task is one file: no engine and no training loop has to learn of it."""
    classes, found = {kind.__name__ for kind in (*TASKS.values(), *TRAINED_ONLY.values())}, set()
    for path in sorted((ROOT / "bert_ray").rglob("*.py")):
        where = path.relative_to(ROOT / "bert_ray").as_posix()
        if not where.startswith("model/tasks/"):
            nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
            words = {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
            imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
            if words & set(TASKS) or imported & classes:
                found.add(where)
    assert found == set(NAMES_A_TASK)


def test_the_readme_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    rooms = [path.name for path in (ROOT / "bert_ray").iterdir() if (path / "__init__.py").is_file()]
    assert rooms
    assert [room for room in rooms if f"{room}/" not in readme] == []


def test_no_file_is_tied_to_one_machine() -> None:
    # Spelt in pieces, or this file would find itself.
    homes = re.compile("|".join(["/ho" + r"me/\w+/", "/Us" + r"ers/\w+/", "/wo" + "rk/", "/ro" + "ot/"]))
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path, text in texts() if (match := homes.search(text))]
    assert found == []


def test_pins_are_exact_and_free_of_cuda() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))] == []
    assert all(re.fullmatch(r"[\w.!]+", version) for version in pins.values())


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.match(r"[\w-]+", item)[0].lower().replace("_", "-") for item in wanted} - {"bert-ray"}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    assert names - pinned == set()


def test_the_version_is_told_by_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", bert_ray.__version__)
