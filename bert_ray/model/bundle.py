"""A trained model as one directory: a plain Hugging Face model directory plus `bert_ray.json`, its card.

    bundle/
      config.json  model.safetensors  tokenizer.json …   what transformers reads
      bert_ray.json                                      what transformers has no place for: the card

`transformers.AutoModelFor….from_pretrained(bundle)` loads it, and a directory that transformers saved loads here, its
card inferred. Weights are safetensors only: a pickle can run code when it is read (see the documentation of Python's
`pickle` module), and so can a repository with remote code; both are refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from bert_ray.errors import BundleError, JobError, why
from bert_ray.model.architectures import ARCHITECTURES, ENCODER_DECODER, encoder_config, max_positions
from bert_ray.model.card import CARD_FILE, Card, fingerprint, hash_files, read_card, read_json, save_card, verify
from bert_ray.model.inferred_card import LIMITS_FILE, infer_card, lowers_first, read_limits
from bert_ray.model.references import resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.tasks import Task

# What a full disk raises, under Python's files and under safetensors'.
WRITE_ERRORS = (OSError, SafetensorError)

# In which files the weights lie, where they are several.
_INDEX = "model.safetensors.index.json"


@dataclass(kw_only=True)
class Bundle:
    """A bundle on the local disk, checked, its weights not yet read.

    Attributes:
        reference: what the caller asked for; resolved again on every worker.
        directory: where it lies on this machine.
        card: read from `bert_ray.json`, or inferred from a plain Hugging Face directory.
        config: the transformers configuration.
    """

    reference: str
    directory: Path
    card: Card
    config: PretrainedConfig

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) over weights, tokenizer, configuration and card."""
        return self.card.fingerprint

    @cached_property
    def task(self) -> Task:
        """The task that the card names, bound to this card."""
        return self.bind()

    def bind(
        self, card: Card | None = None, *, kind: str | None = None, options: Mapping[str, Any] | None = None
    ) -> Task:
        """A task on this bundle's model and files.

        Args:
            card: of a bundle that is to be trained from this one; None: this one's.
            kind: another task than the card's.
            options: over those of the card.

        Raises:
            BundleError: no such task, or one that cannot run on this model.
            JobError: an option that the task does not have.
        """
        from bert_ray.model.tasks import get_task

        task = get_task(card or self.card, self.config, kind=kind, options=options)
        task.attach(self)
        return task

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The fast tokenizer.

        Raises:
            BundleError: there is none, or it has ids that the embeddings lack.
        """
        tokenizer = load_tokenizer(self.directory)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        rows = encoder_config(self.config).vocab_size
        if largest >= rows:
            raise BundleError(
                f"{self.directory}: the tokenizer has ids up to {largest}, the embeddings only {rows} rows: "
                "the tokenizer belongs to another model"
            )
        return tokenizer

    def model(self, task: Task | None = None) -> PreTrainedModel:
        """The model with the head of its own task (or of the given one), in fp32 on the CPU, in evaluation mode.

        Raises:
            BundleError: the weights are unreadable, or do not fit the configuration.
        """
        task = task or self.task
        model, report = read_model(task.auto_class(), self.directory)
        # A pooler that the task does not use may be missing.
        missing = [key for key in report["missing_keys"] if "pooler" not in key or task.reads_pooler]
        if missing:
            raise BundleError(
                f"{self.reference}: the weights lack {', '.join(sorted(missing)[:4])} that a "
                f"{task.kind} model needs; was the directory saved without its head?"
            )
        return model.eval()


def load_bundle(reference: str | os.PathLike[str]) -> Bundle:
    """Resolve a reference and check what lies there, without reading the weights into memory.

    Raises:
        BundleError: nothing there; a pickle, remote code or an unknown architecture; a file that is missing or was
            altered since the bundle was saved; a tokenizer that does not fit the embeddings.
    """
    from transformers import AutoConfig

    reference = os.fspath(reference)
    directory = resolve(reference)
    _refuse_tensorflow(reference, directory)
    raw = read_json(directory / "config.json", what=f"{reference}: config.json")
    _refuse_unsafe(reference, directory, raw)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise BundleError(f"{reference}: config.json is not a configuration transformers reads: {error}") from error
    card_path = directory / CARD_FILE
    if card_path.exists():
        card = read_card(reference, card_path)
        verify(reference, directory, card)
    else:
        try:
            card = infer_card(directory, raw, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{reference}: config.json, modules.json or another file beside them is malformed: "
                f"{type(error).__name__} {error}"
            ) from error
        card.fingerprint = fingerprint(hash_files(directory), None)
    limit = max_positions(config)
    if card.max_length > limit:
        raise BundleError(f"{reference}: max_length {card.max_length} exceeds the model's {limit} positions")
    return Bundle(reference=reference, directory=directory, card=card, config=config)


def save_bundle(
    directory: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    card: Card,
    add: Callable[[Path], None] | None = None,
    task: Task | None = None,
) -> Bundle:
    """Write a bundle so that it becomes visible whole: to a neighbour first, then renamed over what was there.

    Args:
        directory: the bundle's place; an existing bundle there is replaced, any other directory is refused.
        model: a transformers model with the task's head.
        tokenizer: its fast tokenizer.
        card: `files` and `fingerprint` are filled in here.
        add: writes further files of the bundle into the directory that it is given.
        task: writes the files that its bundles have besides; None: the card's, attached to no bundle.

    Raises:
        BundleError: `directory` holds something that is not a bundle.
        JobError: it cannot be written there; what was there before still is.
    """
    target = Path(directory).absolute()
    make_room(target)
    if target.exists() and any(target.iterdir()) and not (target / "config.json").exists():
        raise BundleError(f"{target} is not empty and holds no bundle: choose another directory")
    from bert_ray.model.tasks import get_task

    fresh = target.parent / f".{target.name}.{os.getpid()}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with _quiet_transformers():
            model.save_pretrained(fresh, safe_serialization=True)
        save_tokenizer(tokenizer, fresh)
        if add is not None:
            add(fresh)
        (task or get_task(card, model.config)).write_files(fresh)
        if lowers_first(tokenizer.backend_tokenizer.normalizer):  # transformers would build one anew that does not.
            (fresh / LIMITS_FILE).write_text(
                json.dumps(read_limits(fresh) | {"do_lower_case": True}, indent=2), "utf-8"
            )
        save_card(fresh, card)
        put_in_place(fresh, target)
    except WRITE_ERRORS as error:
        raise JobError(f"output {target} cannot be written: {why(error)}; make room, or choose another") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return load_bundle(target)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a tokenizer's files.

    Raises:
        OSError: they cannot be written. The library that writes them tells that in words alone, "… (os error 28)".
    """
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if type(error) is not Exception or not (told := re.search(r"\(os error (\d+)\)$", str(error))):
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1]))) from error


def make_room(target: Path) -> None:
    """Make the directory that a bundle's place is in, so that one that is written beside it can be renamed to it.

    Raises:
        JobError: that cannot be done there.
    """
    if target.exists() and not target.is_dir():
        raise JobError(f"output {target} is a file: choose another")
    if os.path.ismount(target):  # A rename does not reach over a file system's edge.
        raise JobError(f"output {target} is a mount point: name a directory in it, such as {target / 'model'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"output {target} cannot be made: {why(error)}; choose another") from error


def put_in_place(fresh: Path, target: Path) -> None:
    """Rename a directory over another; a kill in the midst of it leaves both on the disk."""
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(fresh, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refuse_tensorflow(reference: str, directory: Path) -> None:
    if (directory / "config.json").exists():
        return
    from bert_ray.model.tensorflow import is_checkpoint

    if is_checkpoint(directory):
        how = "copy it here, then bert-ray convert DIR" if "://" in reference else f"bert-ray convert {reference}"
        raise BundleError(
            f"{reference} is a checkpoint that TensorFlow wrote, not a bundle; make one of it, and give that: {how} OUT"
        )


def _refuse_unsafe(reference: str, directory: Path, raw: dict[str, Any]) -> None:
    if raw.get("auto_map"):
        raise BundleError(
            f"{reference}: config.json asks to run code from the repository (auto_map); remote code is refused"
        )
    encoder: Any = raw
    if raw.get("model_type") == ENCODER_DECODER:
        encoder, decoder = (part if isinstance(part := raw.get(name), dict) else {} for name in ("encoder", "decoder"))
        if decoder.get("model_type") != "bert":
            raise BundleError(
                f"{reference}: a decoder of architecture {decoder.get('model_type')!r} is not supported; known is bert"
            )
    kind, positions = encoder.get("model_type"), encoder.get("position_embedding_type") or "absolute"
    if kind not in ARCHITECTURES:
        raise BundleError(f"{reference}: architecture {kind!r} is not supported; known are {', '.join(ARCHITECTURES)}")
    if positions != "absolute":
        raise BundleError(f"{reference}: position_embedding_type {positions!r} is not supported; known is absolute")
    if encoder.get("is_decoder"):
        raise BundleError(f"{reference}: its tokens see those before them alone (is_decoder), as in no encoder")
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise BundleError(
                f"{reference}: the weights are a pickle ({pickles[0]}), which can run code when read, and are refused; "
                "where you trust them, convert them with transformers: "
                "model.save_pretrained(DIR, safe_serialization=True)"
            )
        raise BundleError(f"{reference}: no model.safetensors in {directory}")
    if (index := directory / _INDEX).exists():
        shards = read_json(index, what=f"{reference}: {_INDEX}").get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        for name in names:
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise BundleError(f"{reference}: {_INDEX} names weights in {name!r}, which is no safetensors file here")


def load_tokenizer(directory: Path, name: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model's directory, or of one that holds a tokenizer alone.

    Args:
        directory: where it lies.
        name: what errors call it; None: the directory.

    Raises:
        BundleError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, use_fast=True)
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise BundleError(f"{name or directory}: the tokenizer cannot be read: {told}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise BundleError(f"{name or directory}: no fast tokenizer (tokenizer.json); save one with transformers first")
    backend = tokenizer.backend_tokenizer
    if read_limits(directory).get("do_lower_case") and not lowers_first(backend.normalizer):
        from tokenizers import normalizers

        then = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *then])
    return tokenizer


def read_model(auto_class: Any, directory: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Read safetensors weights in fp32; returns the model and transformers' report of missing and unexpected keys."""
    import torch

    try:
        with _quiet_transformers():
            return auto_class.from_pretrained(
                directory,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise BundleError(f"{directory}: the weights cannot be read: {error}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and notes on fresh heads: both are meant here, and noise on each worker."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
