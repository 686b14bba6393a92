"""TensorFlow's BERT checkpoints -> bundles, without TensorFlow.

    bert-ray convert uncased_L-12_H-768_A-12 models/bert-base

    uncased_L-12_H-768_A-12/
      bert_model.ckpt.index  bert_model.ckpt.data-00000-of-00001   the weights
      bert_config.json                                             the architecture
      vocab.txt                                                    WordPiece, a token a line

Read are Google's original releases (github.com/google-research/bert) and what their code trains, and the object-based
checkpoints of the TensorFlow model garden. With the masked-language-model head comes a bundle of task fill-mask, which
every other task can be trained from; with the encoder alone an embedding bundle.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bert_ray.errors import BundleError, JobError
from bert_ray.model import tensorflow_names as names
from bert_ray.model.tensor_bundle import TensorBundle, checkpoints_in
from bert_ray.options import check_choices

if TYPE_CHECKING:
    import numpy as np
    from transformers import BertConfig, PreTrainedModel, PreTrainedTokenizerFast

_CONFIG, _VOCABULARY = "bert_config.json", "vocab.txt"
_USUAL = "bert_model.ckpt"
_FROM_RELEASE = "take it from the release that the checkpoint belongs to, and put it beside the checkpoint"

# The model garden's own words for what bert_config.json says.
_ALSO = {
    "num_layers": "num_hidden_layers",
    "hidden_activation": "hidden_act",
    "dropout_rate": "hidden_dropout_prob",
    "attention_dropout_rate": "attention_probs_dropout_prob",
    "max_sequence_length": "max_position_embeddings",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_SETTINGS = (*_SIZES, "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
_SHOWN = {"gelu": "gelu, exact", "gelu_pytorch_tanh": "gelu, tanh"}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(kw_only=True, slots=True)
class ConvertJob:
    """Make a bundle of a BERT checkpoint that TensorFlow wrote; TensorFlow is not needed.

    Attributes:
        checkpoint: the release's directory, with bert_model.ckpt.*, bert_config.json and vocab.txt in it or one folder
            deeper; or one checkpoint of several in it, as TensorFlow names it (DIR/model.ckpt-20000).
        output: the bundle's directory.
        lower_case: whether texts are lower-cased and lose their accents before they are cut into tokens. Default: as
            the directory's name says (uncased, cased), else as the vocabulary does.
        gelu: "exact", or "tanh", the approximation by a tanh, at most 5e-4 off; "auto": exact for Google's original
            checkpoints, as transformers has them all, tanh for those of the model garden, whose code has no other.
    """

    checkpoint: str
    output: str
    lower_case: bool | None = None
    gelu: Literal["auto", "exact", "tanh"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        output = Path(self.output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise JobError(f"output {self.output} already exists: choose another directory, or delete it first")


@dataclass(kw_only=True, slots=True)
class Converted:
    """What became of a checkpoint.

    Attributes:
        checkpoint: its prefix.
        objects: whether it is object-based.
        weights: how many were taken over.
        left_out: how many entries were not: optimizer slots, counters, an untrained pooler.
        architecture: the transformers class that was saved.
        parameters: numbers in all weights.
        lower_case: whether texts are lower-cased.
        why: what decided that.
        activation: "gelu, exact", "gelu, tanh", or another one's name.
        task: of the bundle.
        output: the bundle's directory.
    """

    checkpoint: Path
    objects: bool
    weights: int
    left_out: int
    architecture: str
    parameters: int
    lower_case: bool
    why: str
    activation: str
    task: str
    output: str

    def text(self) -> str:
        """What `bert-ray convert` prints."""
        return "\n".join(
            [
                f"converted {self.checkpoint} ({'object-based' if self.objects else 'name-based'})",
                f"  weights  {self.weights}; left out: {self.left_out} other entries (optimizer slots, counters)",
                f"  model    {self.architecture}, {self.parameters:,} parameters, activation {self.activation}",
                f"  texts    {'lower-cased' if self.lower_case else 'as they are'} ({self.why})",
                f"  bundle   {self.output} (task {self.task})",
            ]
        )


def convert(job: ConvertJob) -> Converted:
    """Make the bundle.

    Raises:
        BundleError: a file is missing, cut short or damaged; a weight is missing, unknown or of another shape; the
            vocabulary is not the model's.
    """
    from bert_ray.model.bundle import save_bundle
    from bert_ray.model.card import Card

    prefix = find_checkpoint(job.checkpoint)
    config_path, vocabulary_path = (_beside(prefix, job.checkpoint, name) for name in (_CONFIG, _VOCABULARY))
    config = _read_config(config_path)
    vocabulary = _read_vocabulary(vocabulary_path, config.vocab_size, config_path)
    bundle = TensorBundle(prefix)
    objects = any(name.endswith(names.VALUE) for name in bundle.entries)
    if config.hidden_act == "gelu" and (job.gelu == "tanh" or (job.gelu == "auto" and objects)):
        config.hidden_act = "gelu_pytorch_tanh"
    config.pad_token_id = vocabulary["[PAD]"]
    weights = _read_weights(bundle, config, objects, config_path)
    model = _fill(config, weights)
    if job.lower_case is not None:
        lower_case, why = job.lower_case, "as told"
    else:
        lower_case, why = _lower_case(prefix, job.checkpoint, vocabulary)
    tokenizer = _tokenizer(vocabulary, lower_case, config.max_position_embeddings)
    masked_lm = any(name.startswith(names.MASKED_LM) for name in weights)
    activation = _SHOWN.get(config.hidden_act, config.hidden_act)
    card = Card(
        task="fill-mask" if masked_lm else "embedding",
        max_length=config.max_position_embeddings,
        pooling=None if masked_lm else "mean",
        provenance={
            "checkpoint": str(prefix),
            "form": "TensorFlow, object-based" if objects else "TensorFlow, name-based",
            "lower_case": lower_case,
            "activation": activation,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )
    save_bundle(job.output, model, tokenizer, card)
    return Converted(
        checkpoint=prefix,
        objects=objects,
        weights=len(weights),
        left_out=len(bundle.entries) - len(weights),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        lower_case=lower_case,
        why=why,
        activation=activation,
        task=card.task,
        output=job.output,
    )


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory without config.json holds a BERT that TensorFlow wrote, or its rests."""
    return (directory / _CONFIG).exists() or any(checkpoints_in(folder) for folder in _folders(directory))


def find_checkpoint(reference: str) -> Path:
    """The prefix of the checkpoint that a directory, or a prefix, stands for.

    Raises:
        BundleError: there is none, or there are several.
    """
    path = Path(os.path.expanduser(reference))
    if not path.is_dir():
        stem = path.with_name(re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name))
        if path.parent.is_dir() and stem in checkpoints_in(path.parent):
            return stem
        raise BundleError(f"no TensorFlow checkpoint at {reference}: no such directory, and no {path.name}.index")
    for folders in ([path], _folders(path)[1:]):
        found = [prefix for folder in folders for prefix in checkpoints_in(folder)]
        usual = [prefix for prefix in found if prefix.name == _USUAL]
        if len(found) > 1 and len(usual) != 1:
            listed = ", ".join(str(prefix) for prefix in found[:4]) + (", …" if len(found) > 4 else "")
            raise BundleError(
                f"{reference} holds {len(found)} checkpoints ({listed}): name one, bert-ray convert {found[-1]} OUT"
            )
        if found:
            return usual[0] if usual else found[0]
    raise BundleError(
        f"{reference} holds no TensorFlow checkpoint ({_USUAL}.index and {_USUAL}.data-00000-of-00001), here or one "
        "folder deeper"
    )


def _folders(directory: Path) -> list[Path]:
    """A directory and those in it."""
    return [directory, *sorted(item for item in directory.iterdir() if item.is_dir() and not item.name.startswith("."))]


def _beside(prefix: Path, reference: str, name: str) -> Path:
    """A file of the release: where the checkpoint is, or in the directory that was given."""
    places = dict.fromkeys([prefix.parent, Path(os.path.expanduser(reference))])
    for place in places:
        if (place / name).is_file():
            return place / name
    raise BundleError(f"{prefix.parent / name} is missing: {_FROM_RELEASE}")


def _read_config(path: Path) -> BertConfig:
    """bert_config.json as transformers' configuration.

    Raises:
        BundleError: it is no JSON object, lacks a size, or describes no BERT.
    """
    from transformers import BertConfig

    try:
        said = json.loads(path.read_text("utf-8"))
        if not isinstance(said, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}; {_FROM_RELEASE}") from error
    said = {_ALSO.get(key, key): value for key, value in said.items()}
    strange = [key for key in _SIZES if not isinstance(said.get(key), int) or isinstance(said[key], bool)]
    if strange or min(said[key] for key in _SIZES) < 1 or said["hidden_size"] % said["num_attention_heads"]:
        what = f"has no {strange[0]}" if strange else "has sizes that no BERT has"
        raise BundleError(f"{path} {what}; {_FROM_RELEASE}")
    if said.get("embedding_size", said["hidden_size"]) not in (None, said["hidden_size"]):
        raise BundleError(f"{path}: embeddings narrower than the model (ALBERT, ELECTRA) are not supported; BERT's are")
    activation = said.get("hidden_act", "gelu")
    if activation not in ("gelu", "relu", "tanh"):
        raise BundleError(f"{path}: hidden_act is {activation!r}; known are gelu, relu and tanh")
    return BertConfig(**{key: said[key] for key in _SETTINGS if key in said})


def _read_vocabulary(path: Path, size: int, config_path: Path) -> dict[str, int]:
    """Token -> id, its line; of a token that stands twice the last one counts, as in Google's tokenization.py.

    Raises:
        BundleError: it is no text, has not as many lines as the embeddings have rows, or lacks a special token.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}; {_FROM_RELEASE}") from error
    if not lines[-1]:
        lines.pop()
    if len(lines) != size:
        raise BundleError(
            f"{path} has {len(lines):,} tokens, but {config_path.name} says {size:,} (vocab_size): one of the two "
            f"belongs to another model; {_FROM_RELEASE}"
        )
    vocabulary = {line.strip(): number for number, line in enumerate(lines)}
    if missing := [token for token in _SPECIAL if token not in vocabulary]:
        raise BundleError(f"{path} has no {missing[0]}, which every BERT needs; {_FROM_RELEASE}")
    return vocabulary


def _read_weights(bundle: TensorBundle, config: BertConfig, objects: bool, config_path: Path) -> dict[str, np.ndarray]:
    """All weights by Google's names, in Google's shapes.

    Raises:
        BundleError: one is missing, unknown, of another shape, not made of floating-point numbers, or damaged.
    """
    own = [name for name in bundle.entries if not names.beside(name)]
    google = {name: name for name in own}
    if objects:
        google = names.from_objects(own, config.num_hidden_layers)
        own = [name for name in own if name not in names.untrained_poolers(own, config.num_hidden_layers)]
    shapes = names.expected(config)
    if unknown := [name for name in own if google.get(name) not in shapes]:
        raise BundleError(
            f"{bundle.prefix}: unknown weight {unknown[0]}{_others(unknown)}: not that of a BERT of "
            f"{config.num_hidden_layers} layers, as {config_path.name} says, with the heads of its pretraining"
        )
    found: dict[str, np.ndarray] = {}
    for name in own:
        shape, entry = shapes[google[name]], bundle.entries[name]
        if entry.shape not in (shape, *_other_shapes(google[name], shape, config)):
            raise BundleError(
                f"{bundle.prefix}: weight {name} has shape {_shown(entry.shape)}, but after {config_path.name} it is "
                f"{_shown(shape)}: one of the two belongs to another model"
            )
        value = bundle[name]
        if value.dtype.kind != "f":
            raise BundleError(f"{bundle.prefix}: weight {name} is {value.dtype}, not floating-point numbers")
        if google[name].endswith("output_weights") and entry.shape != shape:
            value = value.T
        value = value.astype("f4").reshape(shape)
        if google[name] in found and not (found[google[name]] == value).all():
            raise BundleError(
                f"{bundle.prefix}: {name} differs from the encoder's word embeddings, which BERT's head shares"
            )
        found[google[name]] = value
    wanted = [name for name in shapes if _needed(name, found)]
    if missing := [name for name in wanted if name not in found]:
        raise BundleError(
            f"{bundle.prefix}: weight {missing[0]}{_others(missing)} is missing, which a BERT of "
            f"{config.num_hidden_layers} layers has; is {config_path.name} that of another model?"
        )
    return found


def _other_shapes(name: str, shape: tuple[int, ...], config: BertConfig) -> list[tuple[int, ...]]:
    """How the model garden shapes a weight: the attention by heads, the last head as a layer of Keras."""
    if name.endswith("output_weights"):
        return [shape[::-1]]
    return [names.split_by_heads(name, shape, config.num_attention_heads)]


def _needed(name: str, found: Iterable[str]) -> bool:
    """Whether a weight must be there: a head may be missing as a whole, and the pooler where no head reads it."""
    optional = (names.MASKED_LM, names.PARTS, names.POOLER)
    there = {head for head in optional if any(key.startswith(head) for key in found)}
    if names.PARTS in there:
        there = set(optional)
    return not name.startswith(optional) or name.startswith(tuple(there))


def _others(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _fill(config: BertConfig, weights: dict[str, np.ndarray]) -> PreTrainedModel:
    """A transformers model with the heads that there are."""
    import torch
    from transformers import BertForMaskedLM, BertForPreTraining, BertModel

    def has(head: str) -> bool:
        return any(name.startswith(head) for name in weights)

    state = {
        # TensorFlow's kernels are (in, out), torch's weights (out, in).
        names.in_transformers(name): torch.from_numpy((value.T if name.endswith("/kernel") else value).copy())
        for name, value in weights.items()
    }
    if not has(names.MASKED_LM):
        model: Any = BertModel(config, add_pooling_layer=has(names.POOLER))
        state = {name.removeprefix("bert."): value for name, value in state.items()}
    else:
        model = BertForPreTraining(config) if has(names.PARTS) else BertForMaskedLM(config)
        if has(names.POOLER) and not has(names.PARTS):
            # transformers leaves the pooler out of this class, but a classifier to come begins with it.
            model.bert = BertModel(config)
        # The head's matrix is that of the embeddings.
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
        model.tie_weights()
    model.load_state_dict(state)
    return model.eval()


def _lower_case(prefix: Path, reference: str, vocabulary: Iterable[str]) -> tuple[bool, str]:
    """Whether texts are to be lower-cased, and why."""
    for name in (prefix.absolute().parent.name, Path(os.path.expanduser(reference)).absolute().name):
        if said := re.search("uncased|(?<![a-z])cased", name.lower()):
            return said[0] == "uncased", f"the name {name} says {said[0]}"
    capitals = [token for token in vocabulary if re.search("[A-Z]", token) and not re.fullmatch(r"\[.*\]|<.*>", token)]
    if capitals:
        return False, f"the vocabulary has capitals: {capitals[0]}"
    return True, "the vocabulary has no capitals"


def _tokenizer(vocabulary: dict[str, int], lower_case: bool, max_length: int) -> PreTrainedTokenizerFast:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab=vocabulary, do_lower_case=lower_case, model_max_length=max_length)
