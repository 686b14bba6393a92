"""A card for a model's directory that was made elsewhere: transformers' or sentence-transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.errors import BundleError
from bert_ray.model.architectures import max_positions
from bert_ray.model.card import Card, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Modules of sentence-transformers that task embedding has.
_MODULES = ("Transformer", "Pooling", "Normalize")

# Where sentence-transformers says what is done to a text before it is tokenised.
LIMITS_FILE = "sentence_bert_config.json"


def infer_card(directory: Path, raw: dict[str, Any], config: PretrainedConfig) -> Card:
    """A card for a directory that was made elsewhere: transformers' or sentence-transformers' layout."""
    max_length = max_positions(config)
    from bert_ray.model.tasks import TASKS

    # Whatever the weights were before: many of sentence-transformers' directories keep ...ForMaskedLM in their config.
    made = (directory / "modules.json").exists()
    architecture = "" if made else (raw.get("architectures") or [""])[0]
    for task in TASKS.values():
        if task.architecture is not None and architecture.endswith(task.architecture) and task.fits(config):
            return Card(task=task.kind, inputs=list(task.inputs), max_length=max_length, labels=task.labels_of(config))
    pooling, normalize = "mean", False
    if made:
        for module in json.loads((directory / "modules.json").read_text("utf-8")):
            name = module["type"].rpartition(".")[2]
            if name not in _MODULES:
                raise BundleError(
                    f"{directory}: modules.json has a module {name}, without which its vectors would be others; known "
                    f"are {', '.join(_MODULES)}"
                )
            normalize |= name == "Normalize"
            settings = directory / module["path"] / "config.json"
            if name == "Pooling" and settings.exists():
                pooling = _pooling(json.loads(settings.read_text("utf-8")), directory)
        max_length = min(max_length, read_limits(directory).get("max_seq_length") or max_length)
    card = Card(task="embedding", max_length=max_length, pooling=pooling, normalize=normalize)
    prompts = directory / "config_sentence_transformers.json"
    if prompts.exists():
        said = json.loads(prompts.read_text("utf-8"))
        if prompt := (said.get("prompts") or {}).get(said.get("default_prompt_name") or ""):
            card.options = {"prompt": prompt}
    return card


def read_limits(directory: Path) -> dict[str, Any]:
    """What sentence-transformers says of a text before it is tokenised: `max_seq_length`, `do_lower_case`."""
    path = directory / LIMITS_FILE
    return read_json(path, what=f"{path.parent}: {LIMITS_FILE}") if path.exists() else {}


def lowers_first(normalizer: Any) -> bool:
    """Whether texts are made lower-case before anything else is done to them."""
    from tokenizers import normalizers

    try:
        return isinstance(normalizer, normalizers.Sequence) and isinstance(normalizer[0], normalizers.Lowercase)
    except IndexError:  # A sequence of none.
        return False


def _pooling(settings: dict[str, Any], directory: Path) -> str:
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    chosen = [modes.get(key, key) for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    if isinstance(settings.get("pooling_mode"), str):
        chosen = [settings["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in ("mean", "cls"):
        raise BundleError(f"{directory}: pooling {chosen} is not supported; known are mean and cls")
    return chosen[0]
