"""Writes the checkpoints of this folder, with TensorFlow itself; nothing else in the repository needs it.

    pip install -c constraints.txt -e '.[tensorflow]'
    python tests/data/tensorflow/write.py [another folder to write to]

Two tiny BERTs of random weights, and what TensorFlow computes with them:

    uncased_L-2_H-16_A-2/   name-based, as google-research/bert wrote them (tf.compat.v1.train.Saver), with Adam's slots
    garden_L-2_H-16_A-2/    object-based, as the TensorFlow model garden wrote them (tf.train.Checkpoint)

expected.npz holds ids, mask and types (B, L), and of a forward written out here: hidden (B, L, D), pooled (B, D),
tokens (B, L, V) and parts (B, 2); with `_tanh` the same by the tanh form of GELU.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

HERE = Path(__file__).resolve().parent
LAYERS, HIDDEN, HEADS, WIDE, POSITIONS, TYPES = 2, 16, 2, 32, 24, 2
WORDS = (
    "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] . , a the good bad film food was is and not ##s ##ed very 好 e n t"
).split()
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "directionality": "bidi",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": WIDE,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pooler_fc_size": HIDDEN,
    "pooler_type": "first_token_transform",
    "type_vocab_size": TYPES,
    "vocab_size": len(WORDS),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Google's names, without the leading `bert/`, and their shapes."""
    found: dict[str, tuple[int, ...]] = {
        "embeddings/word_embeddings": (len(WORDS), HIDDEN),
        "embeddings/position_embeddings": (POSITIONS, HIDDEN),
        "embeddings/token_type_embeddings": (TYPES, HIDDEN),
    }

    def dense(name: str, wide_in: int, wide_out: int) -> None:
        found.update({f"{name}/kernel": (wide_in, wide_out), f"{name}/bias": (wide_out,)})

    def norm(name: str) -> None:
        found.update({f"{name}/gamma": (HIDDEN,), f"{name}/beta": (HIDDEN,)})

    norm("embeddings/LayerNorm")
    for layer in range(LAYERS):
        prefix = f"encoder/layer_{layer}"
        for part in ("query", "key", "value"):
            dense(f"{prefix}/attention/self/{part}", HIDDEN, HIDDEN)
        dense(f"{prefix}/attention/output/dense", HIDDEN, HIDDEN)
        norm(f"{prefix}/attention/output/LayerNorm")
        dense(f"{prefix}/intermediate/dense", HIDDEN, WIDE)
        dense(f"{prefix}/output/dense", WIDE, HIDDEN)
        norm(f"{prefix}/output/LayerNorm")
    dense("pooler/dense", HIDDEN, HIDDEN)
    dense("cls/predictions/transform/dense", HIDDEN, HIDDEN)
    norm("cls/predictions/transform/LayerNorm")
    found["cls/predictions/output_bias"] = (len(WORDS),)
    found["cls/seq_relationship/output_weights"] = (2, HIDDEN)
    found["cls/seq_relationship/output_bias"] = (2,)
    return found


def weights(seed: int) -> dict[str, np.ndarray]:
    """Random weights, wide enough that every one of them moves the output."""
    random = np.random.default_rng(seed)
    made = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes().items()}
    return {name: value + 1 if name.endswith("gamma") else value for name, value in made.items()}


def forward(w: dict[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, types: np.ndarray, tanh: bool) -> dict:
    """BERT as in the paper, in TensorFlow."""

    def dense(x: tf.Tensor, name: str) -> tf.Tensor:
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def norm(x: tf.Tensor, name: str) -> tf.Tensor:
        mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
        return tf.nn.batch_normalization(x, mean, variance, w[f"{name}/beta"], w[f"{name}/gamma"], 1e-12)

    def gelu(x: tf.Tensor) -> tf.Tensor:
        return tf.nn.gelu(x, approximate=tanh)

    rows, length = ids.shape
    x = tf.gather(w["embeddings/word_embeddings"], ids) + tf.gather(w["embeddings/token_type_embeddings"], types)
    x = norm(x + w["embeddings/position_embeddings"][None, :length], "embeddings/LayerNorm")
    for layer in range(LAYERS):
        prefix = f"encoder/layer_{layer}"

        def heads(part: str, x: tf.Tensor = x, prefix: str = prefix) -> tf.Tensor:
            split = tf.reshape(dense(x, f"{prefix}/attention/self/{part}"), (rows, length, HEADS, HIDDEN // HEADS))
            return tf.transpose(split, (0, 2, 1, 3))

        scores = tf.matmul(heads("query"), heads("key"), transpose_b=True) / math.sqrt(HIDDEN // HEADS)
        scores += (1.0 - mask[:, None, None, :].astype(np.float32)) * -10000.0
        mixed = tf.matmul(tf.nn.softmax(scores), heads("value"))
        mixed = tf.reshape(tf.transpose(mixed, (0, 2, 1, 3)), (rows, length, HIDDEN))
        x = norm(x + dense(mixed, f"{prefix}/attention/output/dense"), f"{prefix}/attention/output/LayerNorm")
        wide = gelu(dense(x, f"{prefix}/intermediate/dense"))
        x = norm(x + dense(wide, f"{prefix}/output/dense"), f"{prefix}/output/LayerNorm")
    pooled = tf.tanh(dense(x[:, 0], "pooler/dense"))
    told = norm(gelu(dense(x, "cls/predictions/transform/dense")), "cls/predictions/transform/LayerNorm")
    tokens = tf.matmul(told, w["embeddings/word_embeddings"], transpose_b=True) + w["cls/predictions/output_bias"]
    parts = tf.matmul(pooled, w["cls/seq_relationship/output_weights"], transpose_b=True)
    parts += w["cls/seq_relationship/output_bias"]
    return {"hidden": x, "pooled": pooled, "tokens": tokens, "parts": parts}


def write_named(prefix: Path, w: dict[str, np.ndarray]) -> None:
    """As google-research/bert: `bert/…` and `cls/…`, the slots of its AdamWeightDecayOptimizer, the global step."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in w.items():
            full = name if name.startswith("cls/") else f"bert/{name}"
            tf.compat.v1.get_variable(full, initializer=value)
            for slot in ("adam_m", "adam_v"):
                tf.compat.v1.get_variable(f"{full}/{slot}", initializer=np.full_like(value, 0.5))
        tf.compat.v1.get_variable("global_step", initializer=np.int64(1000))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(prefix), write_meta_graph=False, write_state=False)


def write_objects(prefix: Path, w: dict[str, np.ndarray]) -> None:
    """As the model garden's BertPretrainerV2, with its checkpoint_items: names are paths through attributes."""

    def node(**variables: np.ndarray | tf.Module) -> tf.Module:
        made = tf.Module()
        for name, value in variables.items():
            setattr(made, name, tf.Variable(value) if isinstance(value, np.ndarray) else value)
        return made

    def dense(name: str, *shape: int) -> tf.Module:
        kernel, bias = w[f"{name}/kernel"], w[f"{name}/bias"]
        return node(kernel=kernel.reshape(shape or kernel.shape), bias=bias)

    def headed(name: str) -> tf.Module:
        size = HIDDEN // HEADS
        return node(
            kernel=w[f"{name}/kernel"].reshape(HIDDEN, HEADS, size), bias=w[f"{name}/bias"].reshape(HEADS, size)
        )

    def norm(name: str) -> tf.Module:
        return node(gamma=w[f"{name}/gamma"], beta=w[f"{name}/beta"])

    layers = []
    for layer in range(LAYERS):
        prefix_of = f"encoder/layer_{layer}"
        attention = {
            f"_{part}_dense": headed(f"{prefix_of}/attention/self/{part}") for part in ("query", "key", "value")
        }
        attention["_output_dense"] = dense(f"{prefix_of}/attention/output/dense", HEADS, HIDDEN // HEADS, HIDDEN)
        layers.append(
            node(
                _attention_layer=node(**attention),
                _attention_layer_norm=norm(f"{prefix_of}/attention/output/LayerNorm"),
                _intermediate_dense=dense(f"{prefix_of}/intermediate/dense"),
                _output_dense=dense(f"{prefix_of}/output/dense"),
                _output_layer_norm=norm(f"{prefix_of}/output/LayerNorm"),
            )
        )
    words = tf.Variable(w["embeddings/word_embeddings"])
    parts = [
        node(embeddings=words),
        node(embeddings=w["embeddings/position_embeddings"]),
        node(embeddings=w["embeddings/token_type_embeddings"]),
        norm("embeddings/LayerNorm"),
        *layers,
        # The encoder's own pooler, which this kind of pretraining does not train.
        node(kernel=np.zeros((HIDDEN, HIDDEN), np.float32), bias=np.zeros(HIDDEN, np.float32)),
    ]
    encoder = node(**{f"layer_with_weights-{place}": part for place, part in enumerate(parts)})
    head = node(dense=dense("cls/predictions/transform/dense"), layer_norm=norm("cls/predictions/transform/LayerNorm"))
    head.embedding_table = words
    setattr(head, "output_bias/bias", tf.Variable(w["cls/predictions/output_bias"]))
    answer = node(kernel=w["cls/seq_relationship/output_weights"].T.copy(), bias=w["cls/seq_relationship/output_bias"])
    model = node()
    model.classification_heads = [node(out_proj=answer)]
    optimizer = tf.compat.v1.train.AdamOptimizer()
    # A step without a gradient makes the slots; of a few variables, which keeps the file small.
    optimizer.apply_gradients([(tf.zeros_like(variable), variable) for variable in encoder.trainable_variables[:6]])
    items = {"encoder": encoder, "masked_lm": head, "next_sentence.pooler_dense": dense("pooler/dense"), "model": model}
    tf.train.Checkpoint(optimizer=optimizer, **items).write(str(prefix))


def main(place: Path) -> None:
    """Write both folders into `place`."""
    ids = np.array([[3, 9, 12, 14, 10, 4, 0, 0, 0], [3, 9, 5, 15, 11, 4, 13, 18, 4], [3, 8, 5, 13, 6, 4, 0, 0, 0]])
    mask, types = (ids != 0).astype(np.int64), np.zeros_like(ids)
    types[1, 6:] = 1
    for seed, (name, write) in enumerate((("uncased", write_named), ("garden", write_objects))):
        folder = place / f"{name}_L-{LAYERS}_H-{HIDDEN}_A-{HEADS}"
        folder.mkdir(exist_ok=True)
        w = weights(seed)
        write(folder / "bert_model.ckpt", w)
        (folder / "bert_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS), "utf-8")
        said = {key: value.numpy() for key, value in forward(w, ids, mask, types, tanh=False).items()}
        said |= {f"{key}_tanh": value.numpy() for key, value in forward(w, ids, mask, types, tanh=True).items()}
        np.savez_compressed(folder / "expected.npz", ids=ids, mask=mask, types=types, **said)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
