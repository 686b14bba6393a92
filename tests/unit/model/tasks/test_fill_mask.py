"""Fill-mask: transformers' own tokens and scores, several masks, none, masks beyond the model's length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BertRayError, BundleError
from bert_ray.evaluation.evaluate import evaluate
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.inference import local
from bert_ray.model.bundle import load_bundle
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train
from tests.conftest import TINY_SEED, tiny_config, tiny_tokenizer
from tests.tiny_tasks import save

TEXTS = ["the [MASK] was good", "a great film", "[MASK] food [MASK]", "bad " * 30 + "[MASK]", None, " "]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("mask"), "BertForMaskedLM", {"task": "fill-mask"})


def fill(model: str, texts: list[str | None], **options: Any) -> list[Any]:
    found = local.annotate(pa.table({"text": pa.array(texts, pa.string())}), model, options=options)
    return found["fill-mask"].to_pylist()


def test_tokens_and_scores_are_the_pipelines(bundle: str) -> None:
    from transformers import pipeline

    pipe = pipeline("fill-mask", model=bundle, top_k=3, device="cpu")
    for text, found in zip(TEXTS, fill(bundle, TEXTS, top_k=3), strict=True):
        if text is None or "[MASK]" not in text:
            assert found is None
            continue
        expected = pipe(text)
        if isinstance(expected[0], list):  # Of several masks the first counts.
            expected = expected[0]
        assert [item["token"] for item in found] == [item["token_str"] for item in expected]
        assert [item["score"] for item in found] == pytest.approx([item["score"] for item in expected], abs=1e-5)


def test_a_mask_beyond_the_limit_is_found_in_windows(bundle: str) -> None:
    text = "bad " * 700 + "[MASK]"
    assert fill(bundle, [text]) == [None]
    assert len(fill(bundle, [text], overflow="windows")[0]) == 5


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_the_heads_of_other_architectures(kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast, pipeline

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    if kind == "roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        sizes |= {"max_position_embeddings": 70, "type_vocab_size": 1}
    torch.manual_seed(TINY_SEED)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=0, **sizes)
    AutoModelForMaskedLM.from_config(config).eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # Without a card: the architecture says what it is for.
    assert load_bundle(str(tmp_path)).card.task == "fill-mask"
    expected = pipeline("fill-mask", model=str(tmp_path), top_k=5, device="cpu")("the [MASK] was good")
    found = fill(str(tmp_path), ["the [MASK] was good"])[0]
    assert [item["token"] for item in found] == [item["token_str"] for item in expected]
    assert [item["score"] for item in found] == pytest.approx([item["score"] for item in expected], abs=1e-5)


def test_evaluate_counts_the_right_token(bundle: str, tmp_path: Path) -> None:
    texts = ["the [MASK] was good", "a [MASK] film", "no mask"]
    said = fill(bundle, texts, top_k=2)
    # In capitals, which the vocabulary does not know; and a word that it has no single token for.
    truth = [said[0][0]["token"].upper(), said[1][1]["token"], "good", "qzqz"]
    texts.append("one [MASK]")
    pq.write_table(pa.table({"text": texts, "token": truth}), tmp_path / "test.parquet")
    job = EvaluateJob(
        model=bundle, table=str(tmp_path / "test.parquet"), output=str(tmp_path / "out"), options={"top_k": 2}
    )
    text = evaluate(job).text()
    assert "accuracy 0.3333" in text
    assert "recall@2 0.6667" in text
    assert "mrr 0.5000" in text
    assert "rows_left_out_for_faults 1" in text


@pytest.mark.parametrize("top_k", [0, 101, 1.5, True])
def test_top_k_is_checked(bundle: str, top_k: Any) -> None:
    with pytest.raises(BertRayError, match=r"options\.top_k"):
        fill(bundle, ["a [MASK]"], top_k=top_k)


def test_a_tiny_vocabulary_has_no_more_to_give(bundle: str) -> None:
    vocabulary = tiny_config(len(tiny_tokenizer())).vocab_size
    assert len(fill(bundle, ["a [MASK]"], top_k=100)[0]) == min(100, vocabulary)


def test_it_is_not_trained_by_rows(bundle: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a [MASK]"], "token": ["film"]}), tmp_path / "train.parquet")
    job = TrainJob(
        model=bundle,
        output=str(tmp_path / "model"),
        task="fill-mask",
        engine="local",
        data=DataOptions(train=str(tmp_path / "train.parquet")),
    )
    with pytest.raises(BundleError, match="nothing to train by rows: pretrain on a corpus"):
        train(job, tell=lambda _: None)
