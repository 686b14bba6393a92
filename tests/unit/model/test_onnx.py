"""Exported models give what the annotator gives; what cannot be exported says why, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import bert_ray
from bert_ray import cli
from bert_ray.errors import BundleError, JobError
from bert_ray.model import onnx as exporting
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.onnx import Exported, ExportJob, export
from tests.conftest import TINY_LABELS, TINY_SEED, tiny_tokenizer
from tests.tiny_tasks import Tiny, names

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TEXTS = ["a great film", "the food was bad and the staff was never nice to us, not once", "", "x " * 700]


def run(model: object, output: Path, **options: object) -> Exported:
    return export(ExportJob(model=str(model), output=str(output), **options))


def session_of(path: Path) -> Any:
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def outputs(path: Path, model: object, texts: list[str], max_length: int = 512) -> dict[str, np.ndarray]:
    """What ONNX Runtime says of texts, padded to one batch, as a user of the file would ask it."""
    session, tokenizer = session_of(path), load_bundle(str(model)).tokenizer()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="np")
    wanted = [item.name for item in session.get_inputs()]
    said = session.run(None, {name: batch[name].astype(np.int64) for name in wanted})
    return dict(zip([item.name for item in session.get_outputs()], said, strict=True))


def test_a_classifier_s_logits_are_the_annotator_s(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "sentiment.onnx"
    done = run(tiny_bundle, path)
    assert done.deviation <= exporting.MOST_DEVIATION
    assert done.inputs == {key: ["batch", "sequence"] for key in ("input_ids", "attention_mask", "token_type_ids")}
    assert done.outputs == {"logits": ["batch", 2]}
    assert done.batches == (8, 2, 512)
    assert [item.name for item in path.parent.iterdir()] == ["sentiment.onnx"]
    assert done.size == path.stat().st_size
    texts = [TEXTS[0], TEXTS[1], TEXTS[3]]  # To a blank text the annotator gives no label.
    logits = outputs(path, tiny_bundle, texts)["logits"]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = bert_ray.load(str(tiny_bundle))(pa.table({"text": texts}))["sentiment"].combine_chunks()
    assert [TINY_LABELS[place] for place in logits.argmax(axis=1)] == wanted.field("label").to_pylist()
    np.testing.assert_allclose(scores.max(axis=1), wanted.field("score").to_numpy(), atol=1e-5)
    # What a reader needs to know stands in the file.
    said = json.loads(session_of(path).get_modelmeta().custom_metadata_map["bert_ray"])
    bundle = load_bundle(tiny_bundle)
    assert (said["task"], said["labels"], said["max_length"]) == ("classification", TINY_LABELS, 512)
    assert said["fingerprint"] == bundle.fingerprint
    assert (said["options"]["overflow"], said["lower_case"]) == ("truncate", False)
    # A model in training mode would have brought its dropout.
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "MatMul" in operators or "Gemm" in operators
    assert "Dropout" not in operators


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), pytest.param("cls", False, marks=pytest.mark.slow)])
def test_an_embedding_is_pooled_as_the_annotator_does(
    tiny_encoder: Path, pooling: str, normalize: bool, tmp_path: Path
) -> None:
    base = load_bundle(tiny_encoder)
    card = Card(task="embedding", pooling=pooling, normalize=normalize, max_length=40)
    save_bundle(tmp_path / "bundle", base.model(), base.tokenizer(), card)
    done = run(tmp_path / "bundle", tmp_path / "model.onnx")
    assert done.outputs == {"sentence_embedding": ["batch", 32]}
    found = outputs(tmp_path / "model.onnx", tmp_path / "bundle", TEXTS, max_length=40)["sentence_embedding"]
    wanted = bert_ray.load(str(tmp_path / "bundle"))(pa.table({"text": TEXTS}))["embedding"].combine_chunks()
    np.testing.assert_allclose(found, np.stack(wanted.to_numpy(zero_copy_only=False)), atol=1e-5)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5) == normalize


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "shapes"),
    [
        ("entities", {}, {"logits": ["batch", "sequence", 5]}),
        ("answer", {}, {"start_logits": ["batch", "sequence"], "end_logits": ["batch", "sequence"]}),
        ("fill-mask", {}, {"logits": ["batch", "sequence", "V"]}),
        ("faq", {"task": "embedding"}, {"sentence_embedding": ["batch", 32]}),
        ("classification", {"task": "embedding"}, {"sentence_embedding": ["batch", 32]}),
    ],
)
def test_other_tasks_are_exported_with_their_heads(
    tiny: Callable[[str], Tiny], kind: str, options: dict[str, str], shapes: dict[str, list[object]], tmp_path: Path
) -> None:
    model = tiny(kind).model
    vocabulary = load_bundle(model).config.vocab_size
    shapes = {name: [vocabulary if size == "V" else size for size in shape] for name, shape in shapes.items()}
    done = run(model, tmp_path / "model.onnx", **options)
    assert done.outputs == shapes
    assert done.deviation <= exporting.MOST_DEVIATION
    # The labels are those of the outputs.
    said = json.loads(session_of(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map["bert_ray"])
    assert len(said["labels"]) == (5 if kind == "entities" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DistilBert", "Roberta"])
def test_other_architectures_have_no_token_types(kind: str, tmp_path: Path) -> None:
    import torch
    import transformers

    tokenizer = tiny_tokenizer()
    settings = {"vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.2, **names("a", "b")}
    sizes: dict[str, int] = {
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
        "Roberta": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 65,
            "type_vocab_size": 1,
        },
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**settings, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    card = Card(task="classification", labels=["a", "b"], max_length=64)
    save_bundle(tmp_path / "bundle", model, tokenizer, card)
    done = run(tmp_path / "bundle", tmp_path / "model.onnx")
    assert list(done.inputs) == ["input_ids", "attention_mask"]
    assert done.deviation <= exporting.MOST_DEVIATION


@pytest.mark.slow
def test_weights_of_a_large_model_stand_beside_it(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_MOST_BYTES", 0)
    done = run(tiny_bundle, tmp_path / "new" / "model.onnx")
    written = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert sorted(written) == ["model.onnx", "model.onnx.data"]
    assert done.size == sum(written.values())
    # They are still found where they were moved to.
    assert outputs(tmp_path / "new" / "model.onnx", tiny_bundle, TEXTS)["logits"].shape == (4, 2)


# What cannot be exported.


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("translation", {}, r"task translation writes its text word by word.*not exported"),
        ("faq", {}, r"task faq compares embeddings.*--task embedding"),
        ("zero-shot", {"task": "zero-shot"}, r"task zero-shot compares embeddings.*--task embedding"),
        ("embedding", {"task": "few-shot"}, r"task few-shot compares embeddings"),
        ("embedding", {"task": "sentiment"}, r"unknown task 'sentiment'"),
        ("translation", {"task": "embedding"}, r"task 'embedding' wants a plain encoder"),
    ],
)
def test_what_cannot_be_exported_says_so(
    tiny: Callable[[str], Tiny], kind: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = tiny(kind).model
    with pytest.raises(BundleError, match=message):
        run(model, tmp_path / "out" / "model.onnx", **options)
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_weights_lack_is_told(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the weights lack .*entities"):
        run(tiny_encoder, tmp_path / "out" / "model.onnx", task="entities")


@pytest.mark.parametrize("deviation", [2e-4, float("nan"), float("inf")])
def test_a_model_that_deviates_leaves_no_file(
    tiny_bundle: Path, deviation: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(model: object, batch: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"a model")
        written.append(file)

    monkeypatch.setattr(exporting, "_write", write)
    monkeypatch.setattr(exporting, "_compare", lambda *_, **__: ({}, {}, deviation))
    with pytest.raises(BundleError, match=r"is off by \S+ beside torch, more than 1e-04; nothing was written"):
        run(tiny_bundle, tmp_path / "out" / "model.onnx")
    assert written  # It was there, and is no longer.
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_full_is_told_and_nothing_is_left(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(exporting, "_write", full)
    with pytest.raises(JobError, match=r"output \S*model\.onnx cannot be written: No space left on device; make room"):
        export(ExportJob(model=str(tiny_bundle), output=str(tmp_path / "out" / "model.onnx")))
    assert not list((tmp_path / "out").iterdir())


def test_deviation_is_a_share_of_what_is_large() -> None:
    ones = np.ones((2, 3), np.float32)
    assert exporting._deviation(ones, ones) == 0
    assert exporting._deviation(ones + 0.5, ones) == pytest.approx(0.5)
    assert exporting._deviation(100 * ones + 1, 100 * ones) == pytest.approx(0.01)
    assert exporting._deviation(ones, ones[:1]) == float("inf")
    assert np.isnan(exporting._deviation(ones * np.nan, ones))


def test_an_output_that_is_there_stays(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(JobError, match=r"already exists"):
        run(tiny_bundle, path)
    assert path.read_text() == "mine"
    path.rename(tmp_path / "model.onnx.data")
    with pytest.raises(JobError, match=r"model\.onnx\.data already exists"):
        run(tiny_bundle, path)
    with pytest.raises(JobError, match=r"ends in \.onnx"):
        run(tiny_bundle, tmp_path / "model")


# The command.


def test_the_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    shown = capsys.readouterr().out
    assert "usage: bert-ray export MODEL OUTPUT" in shown
    assert "bert-ray export models/sentiment sentiment.onnx" in shown


def test_a_missing_package_names_its_extra(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(exporting.importlib, "import_module", lacking)
    assert cli.main(["export", str(tiny_bundle), str(tmp_path / "model.onnx")]) == cli.AT_FAULT
    assert "pip install 'bert-ray[onnx]'" in capsys.readouterr().err


def test_the_command_prints_what_it_checked(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"input_ids": ["batch", "sequence"]}, {"logits": ["batch", 2]}
    monkeypatch.setattr(exporting, "_write", lambda model, batch, file, metadata: file.write_bytes(b"a model"))
    monkeypatch.setattr(exporting, "_compare", lambda *_, **__: (*shapes, 2e-6))
    assert cli.main(["export", str(tiny_bundle), str(tmp_path / "model.onnx")]) == cli.DONE
    told = capsys.readouterr().out
    assert "8 batches of 2 to 512 tokens: largest deviation 2.0e-06 (at most 1e-04)" in told
    assert "inputs   input_ids (batch, sequence)" in told
