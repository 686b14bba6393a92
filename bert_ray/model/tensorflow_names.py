"""What the weights of BERT are called in TensorFlow's checkpoints, and in transformers.

Three ways of naming them:

    bert/encoder/layer_0/attention/self/query/kernel                        google-research/bert, name-based
    encoder/layer_with_weights-4/_attention_layer/_query_dense/kernel/…     the model garden, object-based
    encoder/_transformer_layers/0/_attention_layer/_query_dense/kernel/…      the same of other versions
    bert.encoder.layer.0.attention.self.query.weight                        transformers

An object-based name is a path through the attributes of Python objects; of several that lead to one weight the shortest
is written. The first way of naming is what the others are brought to here.

Sources: google-research/bert modeling.py, run_pretraining.py and optimization.py; tensorflow/models
official/nlp/modeling: networks/bert_encoder.py, layers/transformer_encoder_block.py, layers/masked_lm.py,
layers/cls_head.py, models/bert_pretrainer.py with its checkpoint_items.

Shapes: D hidden size, H heads, F width of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BertConfig

# The end of an object-based name.
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"

MASKED_LM, PARTS, POOLER = "cls/predictions/", "cls/seq_relationship/", "bert/pooler/"

# What training keeps beside the weights: moments of Adam and LAMB, counters, the description of the objects.
_BESIDE = re.compile(
    r"""
    (?: .*/(?:adam_[mv] | lamb_[mv] | Adam(?:_1)?) | global_step | beta[12]_power        # name-based
      | .*/\.OPTIMIZER_SLOT/.* | optimizer/.* | save_counter.* | global_step/.* | _CHECKPOINTABLE_OBJECT_GRAPH
    )""",
    re.VERBOSE,
)

_LAYER_PARTS = {
    "_attention_layer/_query_dense": "attention/self/query",
    "_attention_layer/_key_dense": "attention/self/key",
    "_attention_layer/_value_dense": "attention/self/value",
    "_attention_layer/_output_dense": "attention/output/dense",
    "_attention_output_dense": "attention/output/dense",  # before 2021, when it became part of the attention
    "_attention_layer_norm": "attention/output/LayerNorm",
    "_intermediate_dense": "intermediate/dense",
    "_output_dense": "output/dense",
    "_output_layer_norm": "output/LayerNorm",
}
_WORDS = "bert/embeddings/word_embeddings"
_EMBEDDINGS = (_WORDS, "bert/embeddings/position_embeddings", "bert/embeddings/token_type_embeddings")
_FIRST_LAYER = len(_EMBEDDINGS) + 1  # layer_with_weights-3 is the embeddings' layer norm.
_ATTRIBUTES = ("_embedding_layer", "_position_embedding_layer", "_type_embedding_layer")
_HEAD = {
    "dense": "transform/dense",
    "layer_norm": "transform/LayerNorm",
    "output_bias.Sbias": "output_bias",  # TensorFlow writes a slash inside one name as .S, and a dot as two.
    "bias": "output_bias",
}


def beside(name: str) -> bool:
    """Whether a name is no weight of the model, but what training keeps beside it."""
    return _BESIDE.fullmatch(name) is not None


def expected(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Google's names of all weights that a model of this configuration may have, and their shapes."""
    hidden, wide = config.hidden_size, config.intermediate_size
    found: dict[str, tuple[int, ...]] = dict(
        zip(
            _EMBEDDINGS,
            ((rows, hidden) for rows in (config.vocab_size, config.max_position_embeddings, config.type_vocab_size)),
            strict=True,
        )
    )

    def dense(name: str, columns: int = hidden, rows: int = hidden) -> None:
        found.update({f"{name}/kernel": (rows, columns), f"{name}/bias": (columns,)})

    def norm(name: str) -> None:
        found.update({f"{name}/gamma": (hidden,), f"{name}/beta": (hidden,)})

    norm("bert/embeddings/LayerNorm")
    for layer in range(config.num_hidden_layers):
        prefix = f"bert/encoder/layer_{layer}"
        for part in ("query", "key", "value"):
            dense(f"{prefix}/attention/self/{part}")
        dense(f"{prefix}/attention/output/dense")
        norm(f"{prefix}/attention/output/LayerNorm")
        dense(f"{prefix}/intermediate/dense", columns=wide)
        dense(f"{prefix}/output/dense", rows=wide)
        norm(f"{prefix}/output/LayerNorm")
    dense("bert/pooler/dense")
    dense("cls/predictions/transform/dense")
    norm("cls/predictions/transform/LayerNorm")
    found["cls/predictions/output_bias"] = (config.vocab_size,)
    found |= {"cls/seq_relationship/output_weights": (2, hidden), "cls/seq_relationship/output_bias": (2,)}
    return found


def split_by_heads(name: str, shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """The shape that the model garden gives a weight of the attention: its heads are an axis of their own.

    (D, D) -> (D, H, D / H) for queries, keys and values, (H, D / H, D) for what mixes them, (D,) -> (H, D / H).
    """
    if re.search(r"attention/self/\w+/kernel$", name):
        return (shape[0], heads, shape[1] // heads)
    if re.search(r"attention/self/\w+/bias$", name):
        return (heads, shape[0] // heads)
    if name.endswith("attention/output/dense/kernel"):
        return (heads, shape[0] // heads, shape[1])
    return shape


def in_transformers(name: str) -> str:
    """Google's name -> transformers'."""
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name)
    name = re.sub(r"_embeddings$", "_embeddings/weight", name)
    name = re.sub(r"/(kernel|gamma|output_weights)$", "/weight", name)
    return re.sub(r"/(beta|output_bias)$", "/bias", name).replace("/", ".")


def from_objects(names: Iterable[str], layers: int) -> dict[str, str]:
    """Object-based names -> Google's; a name that is not understood is left out.

    Args:
        names: of the weights, with `VALUE` at their ends.
        layers: of the encoder; what follows them is the pooler.
    """
    paths = {name.removesuffix(VALUE): name for name in names}
    # Where the encoder hangs in the tree differs; its embeddings' layer norm tells.
    roots = [
        path.removesuffix(end)
        for path in paths
        for end in (f"layer_with_weights-{_FIRST_LAYER - 1}/gamma", "_embedding_norm_layer/gamma")
        if path.endswith(end)
    ]
    root = min(roots, key=len, default="encoder/")
    heads = _heads_beside(root, paths)
    found = {}
    for path, name in paths.items():
        google = _of_head(path) or heads.get(path)
        if google is None and path.startswith(root):
            google = _of_encoder(path.removeprefix(root), layers)
        if google is not None:
            found[name] = google
    # A pooler that next-sentence prediction has trained counts, and not the encoder's own, which it leaves untouched.
    if any(path.startswith("next_sentence..pooler_dense/") for path in paths):
        own = (f"{root}layer_with_weights-{_FIRST_LAYER + layers}/", f"{root}_pooler_layer/")
        found = {name: google for name, google in found.items() if not name.startswith(own)}
    return found


def untrained_poolers(names: Iterable[str], layers: int) -> set[str]:
    """The names that `from_objects` leaves out on purpose."""
    names = list(names)
    without = [name for name in names if not name.startswith("next_sentence..pooler_dense/")]
    if len(without) == len(names):
        return set()
    kept = from_objects(names, layers)
    return {name for name, google in from_objects(without, layers).items() if name not in kept and POOLER in google}


def _of_encoder(path: str, layers: int) -> str | None:
    """A path below the encoder -> Google's name."""
    part, _, rest = path.partition("/")
    if found := re.fullmatch(r"layer_with_weights-(\d+)", part):
        place = int(found[1])
    elif part == "_transformer_layers":
        number, _, rest = rest.partition("/")
        if not number.isdecimal():
            return None
        place = _FIRST_LAYER + int(number)
        if place >= _FIRST_LAYER + layers:
            return None
    elif part in _ATTRIBUTES:
        place = _ATTRIBUTES.index(part)
    elif part in ("_embedding_norm_layer", "_pooler_layer"):
        place = _FIRST_LAYER - 1 if part == "_embedding_norm_layer" else _FIRST_LAYER + layers
    else:
        return None
    if place < len(_EMBEDDINGS):
        return _EMBEDDINGS[place] if rest in ("embeddings", "position_embeddings", "_position_embeddings") else None
    if place == _FIRST_LAYER - 1:
        return f"bert/embeddings/LayerNorm/{rest}" if rest in ("gamma", "beta") else None
    if place == _FIRST_LAYER + layers:
        return f"bert/pooler/dense/{rest}" if rest in ("kernel", "bias") else None
    inside, _, leaf = rest.rpartition("/")
    if place > _FIRST_LAYER + layers or inside not in _LAYER_PARTS:
        return None
    return f"bert/encoder/layer_{place - _FIRST_LAYER}/{_LAYER_PARTS[inside]}/{leaf}"


def _of_head(path: str) -> str | None:
    """A path to a head that has a name of its own -> Google's name."""
    if found := re.fullmatch(r"(?:.*/)?masked_lm/(.+)", path):
        return _of_masked_lm(found[1])
    if found := re.fullmatch(r"next_sentence\.\.pooler_dense/(kernel|bias)", path):
        return f"bert/pooler/dense/{found[1]}"
    if found := re.fullmatch(r"(?:.*/)?classification_heads/0/out_proj/(kernel|bias)", path):
        return f"cls/seq_relationship/{_PARTS[found[1]]}"
    return None


_PARTS = {"kernel": "output_weights", "bias": "output_bias"}


def _of_masked_lm(path: str) -> str | None:
    if path == "embedding_table":  # The encoder's word embeddings, which the head shares.
        return _WORDS
    part, _, leaf = path.partition("/")
    return f"cls/predictions/{_HEAD[part]}/{leaf}".rstrip("/") if part in _HEAD else None


def _heads_beside(root: str, paths: Iterable[str]) -> dict[str, str]:
    """Heads that are numbered as the encoder is: model/layer_with_weights-0/ the encoder, -1 and -2 the heads."""
    parent = re.fullmatch(r"(.*?)layer_with_weights-0/", root)
    if parent is None:
        return {}
    groups: dict[str, dict[str, str]] = {}
    for path in paths:
        if path.startswith(parent[1]) and not path.startswith(root):
            group, _, rest = path.removeprefix(parent[1]).partition("/")
            groups.setdefault(group, {})[re.sub(r"^layer_with_weights-0/", "", rest)] = path
    found = {}
    for members in groups.values():
        masked_lm = any(rest.startswith("dense/") for rest in members)
        for rest, path in members.items():
            google = _of_masked_lm(rest) if masked_lm else _PARTS.get(rest) and PARTS + _PARTS[rest]
            if google:
                found[path] = google
    return found
