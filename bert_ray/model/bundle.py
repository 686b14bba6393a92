"""A trained model as one directory: a plain Hugging Face model directory plus `bert_ray.json`, its card.

    bundle/
      config.json  model.safetensors  tokenizer.json …   what transformers reads
      bert_ray.json                                      what transformers has no place for: the card

`transformers.AutoModelFor….from_pretrained(bundle)` loads it, and a directory that transformers saved loads here, its
card inferred. Weights are safetensors only: a pickle can run code when it is read (see the documentation of Python's
`pickle` module), and so can a repository with remote code; both are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from bert_ray.errors import BundleError, JobError, why
from bert_ray.model.references import resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.tasks import Task

CARD_FILE = "bert_ray.json"
CARD_FORMAT = 1

# The architectures whose layers `encoder.py` walks: post-norm encoders with learned absolute positions.
ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
# One of these as the encoder, and a decoder of BERT's layers that `decoder.py` walks.
ENCODER_DECODER = "encoder-decoder"

# What a full disk raises, under Python's files and under safetensors'.
WRITE_ERRORS = (OSError, SafetensorError)

# Modules of sentence-transformers that task embedding has.
_MODULES = ("Transformer", "Pooling", "Normalize")

# Where sentence-transformers says what is done to a text before it is tokenised.
_LIMITS = "sentence_bert_config.json"
# In which files the weights lie, where they are several.
_INDEX = "model.safetensors.index.json"

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
    raw = _read_json(directory / "config.json", what=f"{reference}: config.json")
    _refuse_unsafe(reference, directory, raw)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise BundleError(f"{reference}: config.json is not a configuration transformers reads: {error}") from error
    card_path = directory / CARD_FILE
    if card_path.exists():
        card = _read_card(reference, card_path)
        _verify(reference, directory, card)
    else:
        try:
            card = _infer_card(directory, raw, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{reference}: config.json, modules.json or another file beside them is malformed: "
                f"{type(error).__name__} {error}"
            ) from error
        card.fingerprint = _fingerprint(_hash_files(directory), None)
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
        if _lowers_first(tokenizer.backend_tokenizer.normalizer):  # transformers would build one anew that does not.
            (fresh / _LIMITS).write_text(json.dumps(_read_limits(fresh) | {"do_lower_case": True}, indent=2), "utf-8")
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


def save_card(directory: Path, card: Card) -> None:
    """Write the card of a bundle that is not in its place yet; its `files` and `fingerprint` are filled in here."""
    card.files = _hash_files(directory)
    card.fingerprint = _fingerprint(card.files, card)
    fresh = directory / f".{CARD_FILE}.new"
    fresh.write_text(json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(fresh, directory / CARD_FILE)


def encoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the encoder, also of one that has a decoder beside it."""
    return config.encoder if config.model_type == ENCODER_DECODER else config


def dropout_names(config: PretrainedConfig) -> tuple[str, str]:
    """What an encoder's configuration calls its rates of dropout: for hidden states, and for attention weights."""
    if config.model_type == "distilbert":
        return "dropout", "attention_dropout"
    return "hidden_dropout_prob", "attention_probs_dropout_prob"


def dropout_rates(config: PretrainedConfig) -> tuple[float, float]:
    """An encoder's rates of dropout: for hidden states, and for attention weights."""
    hidden, attention = (float(getattr(config, name)) for name in dropout_names(config))
    return hidden, attention


def max_positions(config: PretrainedConfig) -> int:
    """Longest row in tokens. RoBERTa's positions start behind the padding id, so its table holds two rows more."""
    config = encoder_config(config)
    limit = int(config.max_position_embeddings)
    return limit - config.pad_token_id - 1 if positions_follow_padding(config) else limit


def positions_follow_padding(config: PretrainedConfig) -> bool:
    """Whether position 0 is `pad_token_id + 1`, as in RoBERTa (transformers, `create_position_ids_from_input_ids`)."""
    return config.model_type in ("roberta", "xlm-roberta", "camembert")


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
        shards = _read_json(index, what=f"{reference}: {_INDEX}").get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        for name in names:
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise BundleError(f"{reference}: {_INDEX} names weights in {name!r}, which is no safetensors file here")


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{what} is missing in {path.parent}: not a model directory") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{what} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{what} is not a JSON object")
    return value


def _read_card(reference: str, path: Path) -> Card:
    raw = _read_json(path, what=f"{reference}: {CARD_FILE}")
    unknown = sorted(set(raw) - {item.name for item in fields(Card)})
    if unknown or "task" not in raw:
        what = f"unknown keys {unknown}" if unknown else "no task"
        raise BundleError(f"{reference}: {CARD_FILE} has {what}; was it written by a newer version?")
    try:
        return Card(**raw)
    except TypeError as error:
        raise BundleError(f"{reference}: {CARD_FILE} has a value of a wrong type: {error}") from error


def _verify(reference: str, directory: Path, card: Card) -> None:
    found = _hash_files(directory)
    if found == card.files and _fingerprint(card.files, card) == card.fingerprint:
        return
    missing = sorted(set(card.files) - set(found))
    altered = sorted(name for name in found if card.files.get(name) != found[name])
    what = [f"missing: {', '.join(missing)}"] if missing else []
    what += [f"altered or added: {', '.join(altered)}"] if altered else []
    raise BundleError(
        f"{reference}: the bundle does not match its fingerprint ({'; '.join(what) or f'altered: {CARD_FILE}'}); "
        f"restore it or train it again (to use the files as they are, delete {directory / CARD_FILE})"
    )


def _hash_files(directory: Path) -> dict[str, str]:
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


def _fingerprint(files: dict[str, str], card: Card | None) -> str:
    said = {key: value for key, value in asdict(card).items() if key != "fingerprint"} if card else {}
    if not said.get("options"):  # Cards of before there were options keep their fingerprint.
        said.pop("options", None)
    return hashlib.sha256(json.dumps([files, said], sort_keys=True).encode()).hexdigest()


def _infer_card(directory: Path, raw: dict[str, Any], config: PretrainedConfig) -> Card:
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
        max_length = min(max_length, _read_limits(directory).get("max_seq_length") or max_length)
    card = Card(task="embedding", max_length=max_length, pooling=pooling, normalize=normalize)
    prompts = directory / "config_sentence_transformers.json"
    if prompts.exists():
        said = json.loads(prompts.read_text("utf-8"))
        if prompt := (said.get("prompts") or {}).get(said.get("default_prompt_name") or ""):
            card.options = {"prompt": prompt}
    return card


def _read_limits(directory: Path) -> dict[str, Any]:
    """What sentence-transformers says of a text before it is tokenised: `max_seq_length`, `do_lower_case`."""
    path = directory / _LIMITS
    return _read_json(path, what=f"{path.parent}: {_LIMITS}") if path.exists() else {}


def _lowers_first(normalizer: Any) -> bool:
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
    if _read_limits(directory).get("do_lower_case") and not _lowers_first(backend.normalizer):
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
