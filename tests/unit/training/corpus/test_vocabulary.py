from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bert_ray.errors import BertRayError, JobError, LakeError
from bert_ray.inference import bulk
from bert_ray.inference.job import AnnotateJob
from bert_ray.lake.journal import Journal
from bert_ray.lake.lock import exclusive
from bert_ray.model.bundle import load_bundle, save_bundle, save_tokenizer
from bert_ray.model.card import Card
from bert_ray.model.vocabulary_head import head_of
from bert_ray.training.corpus import counting, vocabulary
from bert_ray.training.corpus.counting import SCHEMA, WordCounter, add_up, characters
from bert_ray.training.corpus.job import ReadingOptions, VocabularyJob
from bert_ray.training.corpus.vocabulary import run
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train
from tests.conftest import TINY_HIDDEN, TINY_MAX_LENGTH, tiny_config, tiny_tokenizer
from tests.corpora import make_corpus
from tests.unit.training.corpus.conftest import sentence


@pytest.fixture
def place(tmp_path: Path) -> Path:
    lines = [sentence(number) for number in range(50)] + ["味道很好，下次再来。Ünal café", "味道不错"] * 3 + ["罕 x2y7"]
    (tmp_path / "texts.txt").write_text("\n".join(lines), "utf-8")
    return tmp_path / "texts.txt"


def make(place: Path, output: Path, **settings: Any) -> VocabularyJob:
    return VocabularyJob(**({"input": str(place), "output": str(output), "size": 200} | settings))


def test_a_new_vocabulary(place: Path, tmp_path: Path) -> None:
    summary = run(make(place, tmp_path / "v"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "v")
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(tokenizer) == summary.tokens <= 200
    assert tokenizer.tokenize("The FILM 味道 ünal unala") == ["the", "film", "味", "道", "unal", "unal", "##a"]
    assert "##味" not in tokenizer.get_vocab()
    assert tokenizer.tokenize("罕") == ["[UNK]"], "it stands there once"
    assert tokenizer("a film")["input_ids"][0] == 2
    assert summary.unknown < 0.01


def test_the_same_texts_give_the_same_vocabulary(place: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        run(make(place, tmp_path / name, size=120))
    one, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "other"))
    assert one == other


def test_case_is_kept_where_it_is_asked_for(place: Path, tmp_path: Path) -> None:
    run(make(place, tmp_path / "v", lowercase=False))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "v")
    assert "".join(tokenizer.tokenize("Ünal café")).replace("##", "") == "Ünalcafé"


def test_a_size_without_room_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 200))) * 2, "utf-8")
    with pytest.raises(JobError, match="size 150 has no room for words beside the 200 characters"):
        run(make(tmp_path / "many.txt", tmp_path / "v", size=150))
    run(make(tmp_path / "many.txt", tmp_path / "v", size=150, alphabet=100))


def test_an_output_that_is_something_else_is_refused(place: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(JobError, match="holds something else"):
        run(make(place, tmp_path))
    with pytest.raises(JobError, match="is a model"):
        run(make(place, tiny_bundle))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(JobError, match="there is no text in it"):
        run(make(tmp_path / "empty.txt", tmp_path / "v"))


def test_a_models_vocabulary_is_extended(tmp_path: Path, tiny_encoder: Path) -> None:
    texts = ["the remdesivir dose was good, remdesivir works 好", "ebola and remdesivir 42x42 好 once"] * 3
    (tmp_path / "medical.txt").write_text("\n".join(texts), "utf-8")
    output = tmp_path / "wider"
    summary = run(make(tmp_path / "medical.txt", output, extend=str(tiny_encoder), words=2))
    assert summary.added == ["好", "remdesivir", "dose"]
    assert summary.pieces_per_word < summary.before
    old, new = load_bundle(str(tiny_encoder)), load_bundle(str(output))
    before, after = old.tokenizer(), new.tokenizer()
    assert after.tokenize("the Remdesivir dose 好 works") == ["the", "remdesivir", "dose", "好", "works"]
    weights, wider = (bundle.model().get_input_embeddings().weight.detach() for bundle in (old, new))
    assert wider.shape[0] == len(after) == len(before) + 3 == new.config.vocab_size
    assert (wider[: len(before)] == weights).all()
    pieces = before.convert_tokens_to_ids(before.tokenize("remdesivir"))
    assert len(pieces) > 1
    assert wider[after.convert_tokens_to_ids("remdesivir")].allclose(weights[pieces].mean(0), atol=1e-6)
    # What could not be spelt is as spread as the others.
    fresh = wider[after.convert_tokens_to_ids("好")]
    assert 0.5 < float(fresh.std() / weights.std()) < 2
    assert new.card.provenance["vocabulary"]["added"] == 3
    assert json.loads((output / "bert_ray.json").read_text())["task"] == "embedding"


def masked_model(kind: str, place: Path) -> Path:
    """A fill-mask bundle with a random head, whose bias says something."""
    from transformers import BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            model = BertForMaskedLM(tiny_config(len(tokenizer)))
        else:
            sizes = {"dim": TINY_HIDDEN, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
            model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(tokenizer), **sizes))
        torch.nn.init.normal_(head_of(model).words.bias)
    save_bundle(place, model.eval(), tokenizer, Card(task="fill-mask", max_length=TINY_MAX_LENGTH))
    return place


def assert_tied(model: Any, tokens: int) -> None:
    """The head compares with the embeddings themselves, and has one bias, of all tokens."""
    words = head_of(model).words
    assert words.weight is model.get_input_embeddings().weight
    assert words.weight.shape[0] == words.out_features == len(words.bias) == model.config.vocab_size == tokens
    if model.config.model_type == "bert":
        assert model.cls.predictions.bias is words.bias


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_masked_models_vocabulary_is_extended_with_its_head(
    tmp_path: Path, pretraining_for: Callable[..., TrainJob], kind: str
) -> None:
    texts = ["the remdesivir dose was good, remdesivir works 好", "ebola and remdesivir 好 once"] * 3
    (tmp_path / "medical.txt").write_text("\n".join(texts), "utf-8")
    place, output = masked_model(kind, tmp_path / "narrow"), tmp_path / "wider"
    added = run(make(tmp_path / "medical.txt", output, extend=str(place), words=2)).added
    assert added == ["好", "remdesivir", "dose"]
    old, new = load_bundle(str(place)), load_bundle(str(output))
    model, before, after = new.model(), old.tokenizer(), new.tokenizer()
    assert new.card.task == "fill-mask"
    assert_tied(model, len(after))
    biases, wider = (head_of(found).words.bias.detach() for found in (old.model(), model))
    assert torch.equal(wider[: len(before)], biases)
    for word in ("remdesivir", "dose"):
        pieces = before.convert_tokens_to_ids(before.tokenize(word))
        assert len(pieces) > 1
        assert wider[after.convert_tokens_to_ids(word)].allclose(biases[pieces].mean(), atol=1e-6)
    # The old tokens are as likely as they were.
    batch = before("the film was [MASK] .", return_tensors="pt")
    with torch.no_grad():
        was, now = (found(**batch).logits for found in (old.model(), model))
    torch.testing.assert_close(now[..., : len(before)], was)

    # What comes out is trained on like any other, its new tokens too.
    corpus = make_corpus(tmp_path / "corpus", after, texts, texts)
    job = pretraining_for(model=str(output), data=DataOptions(train=str(corpus)), steps=2, evaluate_every=2)
    trained = load_bundle(train(job, tell=lambda _: None).bundle).model()
    assert_tied(trained, len(after))
    number = after.convert_tokens_to_ids("remdesivir")
    one, other = (head_of(found).words for found in (model, trained))
    assert not torch.equal(one.weight[number], other.weight[number])
    assert one.bias[number] != other.bias[number]


def test_what_cannot_be_extended_is_refused(place: Path, tmp_path: Path, tiny_bundle: Path, tiny_encoder: Path) -> None:
    with pytest.raises(JobError, match="is a model of task classification: extend the encoder"):
        run(make(place, tmp_path / "v", extend=str(tiny_bundle)))
    (tmp_path / "plain.txt").write_text("the film was good\n" * 3)
    with pytest.raises(JobError, match="suits them as it is"):
        run(make(tmp_path / "plain.txt", tmp_path / "v", extend=str(tiny_encoder)))


def test_an_extension_takes_what_stands_often_enough(tmp_path: Path, tiny_encoder: Path) -> None:
    """Characters as well as words; numbers and codes are counted by nobody."""
    texts = ["remdesivir 好 42x42"] * 5 + ["remdesivir 坏 ebola"] * 2
    (tmp_path / "medical.txt").write_text("\n".join(texts), "utf-8")
    summary = run(make(tmp_path / "medical.txt", tmp_path / "v", extend=str(tiny_encoder), min_count=3))
    assert summary.added == ["好", "remdesivir"]


def test_words_with_marks_are_words(tmp_path: Path, tiny_encoder: Path) -> None:
    (tmp_path / "hindi.txt").write_text("टीका का टीका\n" * 5, "utf-8")
    summary = run(make(tmp_path / "hindi.txt", tmp_path / "v", extend=str(tiny_encoder), min_count=3))
    assert {"टीका", "का"} <= set(summary.added)


def test_on_ray_the_same_vocabulary(lake: Path, tmp_path: Path, ray_session: None) -> None:
    for engine in ("local", "ray"):
        assert run(make(lake, tmp_path / engine, engine=engine)).exit_status == 0
    one, other = ((tmp_path / engine / "tokenizer.json").read_bytes() for engine in ("local", "ray"))
    assert one == other


def test_a_file_that_cannot_be_read_waits_or_is_left_out(lake: Path, tmp_path: Path) -> None:
    whole = (lake / "f1.parquet").read_bytes()
    (lake / "f1.parquet").write_bytes(whole[: len(whole) // 2])
    summary = run(make(lake, tmp_path / "v"))
    assert (summary.exit_status, summary.tokens, len(summary.failures)) == (1, 0, 1)
    assert "f1.parquet" in summary.failures[0]
    assert "is not made yet" in str(summary)
    assert not (tmp_path / "v").exists()
    skipping = run(make(lake, tmp_path / "v", on_error="skip"))
    assert skipping.exit_status == 1
    assert skipping.tokens > 0
    assert len(skipping.failures) == 1
    assert not (tmp_path / "v.run").exists()


def test_what_is_counted_is_counted_once(lake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another size takes the counts as they are; another way to count, or a file that has changed, does not."""

    def units(**settings: Any) -> list[str]:
        with pytest.raises(JobError, match="no room"):
            run(make(lake, tmp_path / "v", **({"size": 100, "min_count": 1} | settings)))
        return re.findall(r"count words on local: (\d+) units", capsys.readouterr().err)

    many = "".join(map(chr, range(0x4E00, 0x4E00 + 99)))
    pq.write_table(pa.table({"text": [many]}), lake / "f3.parquet")
    assert units() == ["4"]
    assert units(size=101) == []
    # A count that was cut short, or has gone, is made anew; of one that was altered the file is named.
    first = next(iter(tmp_path.glob("v.run/_bert_ray/count/*")))
    assert units(markup="html") == ["4"]
    (rule,) = set(tmp_path.glob("v.run/_bert_ray/count/*")) - {first}
    cut, gone, altered, _ = sorted(rule.iterdir())
    content = altered.read_bytes()
    altered.write_bytes(b"X" * len(content))
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    capsys.readouterr()
    with pytest.raises(LakeError, match=f"{altered.name} is damaged .* remove it"):
        run(make(lake, tmp_path / "v", markup="html"))
    altered.write_bytes(content)
    assert "count words on local: 2 units" in capsys.readouterr().err
    assert units() == [], "what was counted otherwise is still there"
    pq.write_table(pa.table({"text": [many, "more"]}), lake / "f3.parquet")
    assert units(markup="html") == ["1"]
    assert (tmp_path / "v.run").exists()
    assert run(make(lake, tmp_path / "v", markup="html", min_count=1)).tokens > 100
    assert "count words" not in capsys.readouterr().err
    assert not (tmp_path / "v.run").exists()


def test_counts_of_a_large_lake_are_scaled(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is frequent is a token still; the rarest words count for nothing."""
    place.write_text("film " * 900 + "music " * 90 + "rare " * 3, "utf-8")
    whole = set(AutoTokenizer.from_pretrained(run(make(place, tmp_path / "a", size=120)).output).get_vocab())
    assert {"film", "music", "rare"} <= whole
    handed: list[str] = []
    repeated = vocabulary._repeated
    monkeypatch.setattr(vocabulary, "_repeated", lambda *a: [handed.append(text) or text for text in repeated(*a)])
    monkeypatch.setattr(vocabulary, "_MOST_WORDS", 100)
    scaled = set(AutoTokenizer.from_pretrained(run(make(place, tmp_path / "b", size=120)).output).get_vocab())
    assert Counter("".join(handed).split()) == {"film": 90, "music": 9}
    assert scaled >= {"film", "music"}
    assert "rare" not in scaled


def test_words_are_handed_on_as_often_as_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_HANDED_CHARACTERS", 40)
    known = {"a": 100, "film": 7, "x" * 50: 3, "be": 1}
    counts = pa.table([list(known), list(known.values())], schema=SCHEMA)
    texts = list(vocabulary._repeated(counts, 1))
    assert Counter(" ".join(texts).split()) == known
    assert max(map(len, texts)) <= 40 + 51
    # No word runs into the next text's.
    assert all(text.endswith(" ") for text in texts)


def test_counts_of_parts_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_WAITING", 3)
    texts = ["a film, a film", "the film. 味道 a", "味 a"]
    for number, text in enumerate(texts):
        counter = WordCounter(tiny_tokenizer().backend_tokenizer)
        counter.add(text)
        pq.write_table(counter.table(), tmp_path / f"{number}.parquet")
    found = add_up([tmp_path / f"{number}.parquet" for number in range(3)])
    assert found.schema == SCHEMA
    expected = [("a", 4), ("film", 3), ("味", 2), (",", 1), (".", 1), ("the", 1), ("道", 1)]
    assert list(zip(*found.to_pydict().values(), strict=True)) == expected
    assert characters(found)["f"] == 3
    assert characters(found) == Counter("".join(word * count for word, count in expected))


def test_where_nothing_can_be_counted_it_says_so(place: Path, tmp_path: Path) -> None:
    summary = run(make(place, tmp_path / "v", reading=ReadingOptions(encoding="ascii"), on_error="skip"))
    assert (summary.exit_status, summary.tokens, len(summary.failures)) == (1, 0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt"]
    # Nor is anything left of a mistake.
    with pytest.raises(BertRayError, match="nothing"):
        run(make(place, tmp_path / "v", extend=str(tmp_path / "nothing")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt"]


def test_the_output_is_not_read_as_text(lake: Path) -> None:
    with pytest.raises(JobError, match="lies inside the input"):
        run(make(lake, lake / "vocabulary"))


def test_one_at_a_time(place: Path, lake: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    with (
        exclusive(tmp_path / ".v.lock", "it"),
        pytest.raises(LakeError, match="another process works on the vocabulary"),
    ):
        run(make(place, tmp_path / "v"))
    (tmp_path / "w.run").mkdir()
    (tmp_path / "w.run" / "mine.txt").write_text("mine")
    with pytest.raises(JobError, match=r"w\.run holds something else"):
        run(make(place, tmp_path / "w"))
    # What a kill at the very start leaves, and one while the counts were taken away, is in nobody's way.
    (tmp_path / "u.run" / "_bert_ray" / "tmp").mkdir(parents=True)
    (tmp_path / ".u.run.1.counts-gone" / "_bert_ray" / "count").mkdir(parents=True)
    assert run(make(place, tmp_path / "u")).exit_status == 0
    assert not list(tmp_path.glob("*u.run*"))
    # Nor are counts taken for another command's output.
    place.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 200))) * 2, "utf-8")
    with pytest.raises(JobError, match="no room"):
        run(make(place, tmp_path / "y", size=150))
    with pytest.raises(JobError, match="holds a run of another job"):
        bulk.run(AnnotateJob(input=str(lake), model=str(tiny_bundle), output=str(tmp_path / "y.run")))
    # A table that is begun, and has no receipt yet.
    begun = Journal(tmp_path / "z.run")
    begun.write_run({"settings": {}})
    with pytest.raises(JobError, match=r"z\.run holds something else"):
        run(make(place, tmp_path / "z"))
    assert begun.read_run()["settings"] == {}
    # Another run's table, which the counts would have taken back.
    table = tmp_path / "x.run"
    job = AnnotateJob(input=str(lake), model=str(tiny_bundle), output=str(table))
    assert bulk.run(job).exit_status == 0
    before = sorted(path for path in table.rglob("*") if path.is_file())
    with pytest.raises(JobError, match=r"x\.run holds something else"):
        run(make(place, tmp_path / "x"))
    assert sorted(path for path in table.rglob("*") if path.is_file()) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_told_as_the_tokenizers_library_tells_it() -> None:
    class Full(PreTrainedTokenizerFast):
        def save_pretrained(self, directory: Any, **more: Any) -> tuple[str]:
            self.backend_tokenizer.save(str(directory))
            return (str(directory),)

    tokenizer = Full(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(Exception, match=r"\(os error 28\)") as words:
        tokenizer.save_pretrained("/dev/full")
    assert not isinstance(words.value, OSError)
    with pytest.raises(OSError, match="No space left on device"):
        save_tokenizer(tokenizer, Path("/dev/full"))
