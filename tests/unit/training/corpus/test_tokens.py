from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from bert_ray.errors import BundleError, JobError
from bert_ray.training.corpus import tokens
from bert_ray.training.corpus.job import CorpusJob
from bert_ray.training.corpus.run import run
from bert_ray.training.corpus.tokens import Tokeniser, pretraining_tokenizer
from bert_ray.training.shards import Documents, read_tokenizer
from tests.conftest import tiny_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    tokenizer.save_pretrained(directory)
    state = json.loads((directory / "tokenizer.json").read_text())
    for character in "味道好":
        state["model"]["vocab"][character] = len(state["model"]["vocab"])
    (directory / "tokenizer.json").write_text(json.dumps(state))
    return directory / "tokenizer.json"


def spelt(tokeniser: Tokeniser, texts: list[str]) -> list[list[str]]:
    """Each text's tokens, a bar before those that begin a word."""
    found = tokeniser(texts)
    names = [tokeniser._backend.id_to_token(int(number)) for number in found.ids]
    marked = [f"|{name}" if start else name for name, start in zip(names, found.word_starts, strict=True)]
    ends = np.cumsum(found.lengths)
    return [marked[end - length : end] for end, length in zip(ends, found.lengths, strict=True)]


def test_whole_texts_without_special_tokens(file: Path) -> None:
    texts = ["the film was recommended.", "", "[SEP] good"]
    assert spelt(Tokeniser(file, 300, "tokenizer"), texts) == [
        ["|the", "|film", "|was", "|recommend", "##ed", "|."],
        [],
        ["|[", "|s", "##e", "##p", "|]", "|good"],
    ]
    assert Tokeniser(file, 300, "tokenizer")(texts).ids.dtype == np.uint16
    assert Tokeniser(file, 70_000, "tokenizer")(texts).ids.dtype == np.uint32


def test_chinese_words_by_jieba(file: Path) -> None:
    pytest.importorskip("jieba")
    text = "味道好 goods 味道"
    assert spelt(Tokeniser(file, 300, "tokenizer"), [text]) == [["|味", "|道", "|好", "|good", "##s", "|味", "|道"]]
    assert spelt(Tokeniser(file, 300, "jieba"), [text, ""]) == [
        ["|味", "道", "|好", "|good", "##s", "|味", "道"],
        [],
    ]


def test_a_long_text_in_slices(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the film was recommended. " * 40, "good", "bad " * 100]
    tokeniser = Tokeniser(file, 300, "tokenizer")
    whole = tokeniser(texts)
    monkeypatch.setattr(tokens, "_SLICE_CHARACTERS", 64)
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 200)
    sliced = tokeniser(texts)
    assert all((one == other).all() for one, other in zip(whole, sliced, strict=True))


def test_words_of_other_kinds_of_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.train_from_iterator(["a story of stories"], trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=300))
    backend.save(str(tmp_path / "tokenizer.json"))
    found = Tokeniser(tmp_path / "tokenizer.json", 300, "tokenizer")(["a story of", "story"])
    assert found.word_starts.sum() == 4
    assert found.word_starts[0]
    assert found.word_starts[found.lengths[0]]


def test_a_vocabulary_without_mask_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: n for token, n in state["model"]["vocab"].items() if token != "[MASK]"}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "[MASK]"]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("mask_token")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(JobError, match=r"has no \[MASK\].*bert-ray vocabulary"):
        pretraining_tokenizer(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"empty: the tokenizer cannot be read"):
        pretraining_tokenizer(str(tmp_path / "empty"))


def test_another_tokenizer_in_the_same_place_is_read_anew(
    job_for: Callable[..., CorpusJob], tiny_encoder: Path, tmp_path: Path
) -> None:
    """In one process, where a tokenizer is made once for many parts."""
    job = job_for()
    run(job)
    first = Documents(Path(job.output), "train")
    ids = {word: read_tokenizer(Path(job.output)).convert_tokens_to_ids(word) for word in ("good", "bad")}
    before = first.take(np.array([0]), np.array([0]), first.lengths[:1].astype(np.int64))[0].copy()
    assert ids["good"] in before or ids["bad"] in before
    shutil.rmtree(job.output)
    other = tmp_path / "other"
    shutil.copytree(tiny_encoder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["vocab"] |= {"good": ids["bad"], "bad": ids["good"]}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    run(job_for(tokenizer=str(other)))
    second = Documents(Path(job.output), "train")
    after = second.take(np.array([0]), np.array([0]), second.lengths[:1].astype(np.int64))[0]
    swapped = {ids["good"]: ids["bad"], ids["bad"]: ids["good"]}
    assert after.tolist() == [swapped.get(token, token) for token in before.tolist()]


@pytest.mark.parametrize("name", ["[CLS]", "[SEP]", "[MASK]"])
def test_a_tokenizer_that_lacks_a_token_is_refused_before_the_corpus_is_made(tmp_path: Path, name: str) -> None:
    backend = tiny_tokenizer().backend_tokenizer
    roles = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    known = {role: token for role, token in roles.items() if token != name}
    PreTrainedTokenizerFast(tokenizer_object=backend, **known).save_pretrained(tmp_path)
    with pytest.raises(JobError, match=rf"has no \{name}"):
        pretraining_tokenizer(str(tmp_path))


def test_a_tokenizer_that_wants_texts_in_lower_case_has_them_so(tiny_encoder: Path, tmp_path: Path) -> None:
    """sentence-transformers says so beside the tokenizer, not in it."""
    shutil.copytree(tiny_encoder, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_lower_case": False}))
    assert pretraining_tokenizer(str(tmp_path / "model")).tokenize("GOOD") != ["good"]
    (tmp_path / "model" / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert pretraining_tokenizer(str(tmp_path / "model")).tokenize("GOOD") == ["good"]
