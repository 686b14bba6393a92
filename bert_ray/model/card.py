"""The card of a bundle, `bert_ray.json`: what it says of itself, and the hashes that tell whether it was altered."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bert_ray.errors import BundleError, why

CARD_FILE = "bert_ray.json"
CARD_FORMAT = 1

# What decides a model's answers, and so its fingerprint. README, logs and the like may change freely.
_FINGERPRINTED = (".safetensors", ".json", ".txt", ".model", ".parquet")


@dataclass(kw_only=True, slots=True)
class Card:
    """What a bundle says of itself (`bert_ray.json`).

    Attributes:
        task: the kind of task, a key of `bert_ray.model.tasks.TASKS` ("classification", "embedding").
        name: what the annotation is called where the job does not say; None: the task's own name.
        labels: class names in the order of the logits; empty where the task has none.
        inputs: the task's input columns.
        max_length: longest row in tokens, special tokens included; longer rows are cut.
        pooling: "mean" or "cls" where the task pools tokens to one vector.
        normalize: whether a pooled vector is scaled to unit length.
        options: the task's options (a threshold, what becomes of long texts) unless a call gives others.
        metrics: name -> value on the validation data.
        provenance: where it came from: base model, data, job, seed, versions, date, history.
        files: file name -> sha256 of every fingerprinted file; empty on an inferred card.
        fingerprint: sha256 over `files` and the rest of the card.
    """

    task: str
    name: str | None = None
    labels: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=lambda: ["text"])
    max_length: int = 512
    pooling: str | None = None
    normalize: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    format: int = CARD_FORMAT

    def __post_init__(self) -> None:
        if self.format > CARD_FORMAT:
            raise BundleError(
                f"{CARD_FILE} has format {self.format}; this version reads up to {CARD_FORMAT}: upgrade bert_ray"
            )
        if self.max_length < 3:
            raise BundleError(f"{CARD_FILE}: max_length is {self.max_length}; a row needs at least 3 tokens")
        if len(set(self.labels)) != len(self.labels):
            raise BundleError(f"{CARD_FILE}: labels repeat: {self.labels}")


def save_card(directory: Path, card: Card) -> None:
    """Write the card of a bundle that is not in its place yet; its `files` and `fingerprint` are filled in here."""
    card.files = hash_files(directory)
    card.fingerprint = fingerprint(card.files, card)
    fresh = directory / f".{CARD_FILE}.new"
    fresh.write_text(json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(fresh, directory / CARD_FILE)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A file's JSON object; a BundleError says of `what` why there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{what} is missing in {path.parent}: not a model directory") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{what} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{what} is not a JSON object")
    return value


def read_card(reference: str, path: Path) -> Card:
    """The card as it was written.

    Raises:
        BundleError: it cannot be read, or a newer version wrote it.
    """
    raw = read_json(path, what=f"{reference}: {CARD_FILE}")
    unknown = sorted(set(raw) - {item.name for item in fields(Card)})
    if unknown or "task" not in raw:
        what = f"unknown keys {unknown}" if unknown else "no task"
        raise BundleError(f"{reference}: {CARD_FILE} has {what}; was it written by a newer version?")
    try:
        return Card(**raw)
    except TypeError as error:
        raise BundleError(f"{reference}: {CARD_FILE} has a value of a wrong type: {error}") from error


def verify(reference: str, directory: Path, card: Card) -> None:
    """Hold a bundle's files against its card.

    Raises:
        BundleError: one is missing, was added or was altered, or the card was.
    """
    found = hash_files(directory)
    if found == card.files and fingerprint(card.files, card) == card.fingerprint:
        return
    missing = sorted(set(card.files) - set(found))
    altered = sorted(name for name in found if card.files.get(name) != found[name])
    what = [f"missing: {', '.join(missing)}"] if missing else []
    what += [f"altered or added: {', '.join(altered)}"] if altered else []
    raise BundleError(
        f"{reference}: the bundle does not match its fingerprint ({'; '.join(what) or f'altered: {CARD_FILE}'}); "
        f"restore it or train it again (to use the files as they are, delete {directory / CARD_FILE})"
    )


def hash_files(directory: Path) -> dict[str, str]:
    """File name -> sha256 of all that decides the answers, sub-folders of sentence-transformers' layout included."""
    hashes = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.suffix in _FINGERPRINTED and path.is_file() and name != CARD_FILE and not name.startswith("."):
            try:
                with path.open("rb") as handle:
                    hashes[name] = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {why(error)}") from error
    return hashes


def fingerprint(files: dict[str, str], card: Card | None) -> str:
    """Sha256 (hex) over the files' hashes and what the card says; `card` is None where it was inferred."""
    said = {key: value for key, value in asdict(card).items() if key != "fingerprint"} if card else {}
    if not said.get("options"):  # Cards of before there were options keep their fingerprint.
        said.pop("options", None)
    return hashlib.sha256(json.dumps([files, said], sort_keys=True).encode()).hexdigest()
