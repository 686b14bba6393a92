"""Translation: the decoder and its search beside transformers' own, the start from an encoder, training, odd input."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sacrebleu
import torch

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import Bundle, load_bundle
from bert_ray.model.card import Card
from bert_ray.model.decoder import decode_targets, decoder_of
from bert_ray.model.encoder import encode, encoder_of
from bert_ray.model.generation import Generator, _Search
from bert_ray.model.packing import pack_rows
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.translation import TranslationOptions, sentences
from bert_ray.model.tasks.translation_start import (
    BEGIN,
    END,
    PAD,
    UNKNOWN,
    characters_of,
    make_start,
    spelling,
    target_vocabulary,
)
from bert_ray.model.tokenization import Ragged
from bert_ray.training.job import AugmentationOptions, DataOptions, TrainJob
from bert_ray.training.launch import train
from tests.conftest import tiny_tokenizer

WORDS = {
    "good": "好", "bad": "坏", "film": "电影", "food": "食物", "phone": "手机", "place": "地方",
    "the": "这", "was": "是", "very": "很", "not": "不", "service": "服务", "story": "故事",
}  # fmt: skip


def pairs(rows: int, seed: int = 0) -> pa.Table:
    """Sentences of a language whose words are translated one by one, with a full stop."""
    draw = np.random.default_rng(seed)
    texts, said = [], []
    for _ in range(rows):
        words = draw.choice(list(WORDS), size=int(draw.integers(1, 5)))
        texts.append(" ".join(words) + ".")
        said.append("".join(WORDS[word] for word in words) + "。")
    return pa.table({"text": texts, "translation": said})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Bundle:
    """An encoder-decoder with random attention to the source, wide enough that what is said depends on it."""
    table = pairs(100)
    directory = tmp_path_factory.mktemp("translation") / "start"
    base = load_bundle(tiny_encoder)
    columns = table["text"].combine_chunks(), table["translation"].combine_chunks()
    return make_start(base, *columns, layers=2, vocabulary=200, output=directory)


@pytest.fixture(scope="module")
def model(start: Bundle) -> Any:
    found = start.model()
    torch.manual_seed(0)
    with torch.no_grad():
        for _, over in decoder_of(found).layers:
            for module in (over.query, over.key, over.value, over.mix):
                module.weight.normal_(0.0, 0.4)
    return found


def rows_of(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> Ragged:
    draw = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = draw.integers(5, vocabulary, int(offsets[-1])).astype(np.int32)
    return Ragged(ids=ids, types=None, offsets=offsets)


def padded(ragged: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = ragged.lengths
    ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(ragged.ids[ragged.offsets[row] : ragged.offsets[row + 1]].astype(np.int64))
    return ids, torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]


# Beside transformers.


def both_say(model: Any, ragged: Ragged, beams: int, penalty: float) -> set[int]:
    """Search by our generator and by transformers', see that they say the same, and how long their texts are."""
    batch, end, longest = pack_rows(ragged, np.arange(len(ragged))), model.config.eos_token_id, 40
    with torch.inference_mode():
        generator = Generator(model, model.config.decoder_start_token_id, end)
        found = generator(encode(model, batch), batch.lengths, beams=beams, longest=longest, length_penalty=penalty)
    ids, mask = padded(ragged)
    more = {"early_stopping": True, "length_penalty": penalty} if beams > 1 else {}
    wanted = model.generate(
        input_ids=ids, attention_mask=mask.long(), num_beams=beams, max_new_tokens=longest, do_sample=False, **more
    )[:, 1:]
    lengths = set()
    for one, other in zip(found.tolist(), wanted.tolist(), strict=True):
        said = [token for token in one if token >= 0]
        stop = other.index(end) + 1 if end in other else len(other)
        assert said == other[:stop]
        lengths.add(len(said))
    return lengths


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
def test_says_what_transformers_generate_says(trained: Any, beams: int, penalty: float) -> None:
    bundle = load_bundle(trained.bundle)
    draw = np.random.default_rng(1)
    texts = [" ".join(draw.choice(list(WORDS), size=size)) + "." for size in (1, 9, 3, 1, 5, 2, 12, 4, 2, 7)]
    lists = bundle.tokenizer()(texts)["input_ids"]
    offsets = np.cumsum([0, *map(len, lists)])
    ragged = Ragged(ids=np.concatenate(lists).astype(np.int32), types=None, offsets=offsets)
    # Rows end at different steps, so that some leave the batch while others go on.
    assert len(both_say(bundle.model(), ragged, beams, penalty)) > 3


@pytest.mark.parametrize("beams", [1, 3])
def test_what_a_row_says_depends_on_no_other(beams: int) -> None:
    """A row that is done stays in the batch until others are: it goes on saying nothing."""
    rows, words, longest, end = 12, 9, 14, 1
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (longest, rows, beams, words)).astype(np.float32)
    logits[:, 1:, :, end] -= 8.0  # The others take long,
    logits[2, 0, :, end] += 9.0  # the first one ends soon,
    logits[3:, 0, :, 2] += 12.0  # and would be ever surer afterwards.

    def said(which: list[int]) -> list[list[int]]:
        search = _Search(len(which), beams, longest, 0, end, 1.0, torch.device("cpu"))
        alive = np.array(which)
        for position in range(longest):
            search.step(torch.from_numpy(logits[position, alive].reshape(-1, words).copy()), position)
            if search.done:
                break
            if (left := search.shrink()) is not None:
                alive = alive[left.numpy()]
        return search.result.tolist()

    together = said(list(range(rows)))
    assert together == [said([row])[0] for row in range(rows)]
    assert together[0].index(end) < 5 < min(row.index(-1) if -1 in row else longest for row in together[1:])


@pytest.mark.parametrize("beams", [1, 3])
def test_says_long_texts_as_transformers_does(model: Any, beams: int) -> None:
    ragged = rows_of((3, 40, 7, 12, 1, 25, 9), model.config.encoder.vocab_size)
    # To the last token allowed; more than the caches have room for at first.
    assert both_say(model, ragged, beams, 1.0) == {40}


def test_whole_targets_give_transformers_logits_and_gradient(model: Any) -> None:
    source, target = rows_of((5, 30, 2), 100), rows_of((4, 9, 20), 24, seed=1)
    batch, said = pack_rows(source, np.arange(3)), pack_rows(target, np.arange(3))
    decoder = decoder_of(model)
    states = decode_targets(decoder, encode(model, batch), batch.lengths, said.input_ids, said.lengths, training=False)
    found = decoder.head(states)
    (ids, mask), (out_ids, out_mask) = padded(source), padded(target)
    wanted = model(
        input_ids=ids, attention_mask=mask.long(), decoder_input_ids=out_ids, decoder_attention_mask=out_mask.long()
    ).logits[out_mask]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    weights = torch.randn_like(found)
    parameters = [weight for name, weight in model.named_parameters() if "pooler" not in name]
    mine = torch.autograd.grad((found * weights).sum(), parameters)
    theirs = torch.autograd.grad((wanted * weights).sum(), parameters)
    for one, other in zip(mine, theirs, strict=True):
        if float(other.norm()) > 1e-3:
            assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99999


def test_a_bundle_is_a_transformers_directory(start: Bundle) -> None:
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(start.directory)
    assert type(model).__name__ == "EncoderDecoderModel"
    assert model.decoder.get_output_embeddings().weight is model.decoder.get_input_embeddings().weight


def test_a_directory_of_transformers_is_a_bundle(start: Bundle, model: Any, tmp_path: Path) -> None:
    """Without a card and with one tokenizer for both sides, as BERT2BERT checkpoints come."""
    from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

    tokenizer = start.tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 64}
    decoder = BertLMHeadModel(BertConfig(**settings, is_decoder=True, add_cross_attention=True))
    both = EncoderDecoderModel(encoder=BertModel(BertConfig(**settings)), decoder=decoder)
    both.config.decoder_start_token_id, both.config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    both.config.pad_token_id = tokenizer.pad_token_id
    both.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    annotator = AnnotatorSpec(model=str(tmp_path / "plain"), options={"max_target_tokens": 8}).build()
    assert annotator.task.kind == "translation"
    said = annotator(pa.table({"text": ["the film", None]}))["translation"]
    assert said.type == pa.string()
    assert said.null_count == 1


# The start from an encoder.


def test_the_decoder_starts_from_the_encoder(start: Bundle, tiny_encoder: Path) -> None:
    from transformers import AutoModel

    base = encoder_of(AutoModel.from_pretrained(tiny_encoder))
    decoder = decoder_of(start.model())
    for (own, over), layer in zip(decoder.layers, base.layers, strict=True):
        for name in ("query", "key", "value", "mix", "up", "down"):
            torch.testing.assert_close(getattr(own, name).weight, getattr(layer, name).weight)
        assert not torch.allclose(over.query.weight, layer.query.weight)


def test_tokens_that_the_base_can_spell_start_as_the_mean_of_its_pieces(tiny_encoder: Path, tmp_path: Path) -> None:
    base = load_bundle(tiny_encoder)
    texts = pa.array(["good film film"] * 5)
    bundle = make_start(base, texts, texts, layers=1, vocabulary=100, output=tmp_path / "start")
    model, tokenizer = bundle.model(), base.tokenizer()
    backend = get_task(bundle.card, bundle.config)
    backend.attach(bundle)
    index = backend.target_tokenizer.token_to_id("▁film")
    words = encoder_of(model).words.weight
    piece = tokenizer.convert_tokens_to_ids("film")
    torch.testing.assert_close(decoder_of(model).words.weight[index], words[piece])


def test_the_same_start_each_time(start: Bundle, tiny_encoder: Path, tmp_path: Path) -> None:
    table = pairs(100)
    columns = table["text"].combine_chunks(), table["translation"].combine_chunks()
    again = make_start(load_bundle(tiny_encoder), *columns, layers=2, vocabulary=200, output=tmp_path / "again")
    assert again.fingerprint == start.fingerprint


def test_characters_that_the_source_lacks_are_added(tiny_encoder: Path) -> None:
    tokenizer = load_bundle(tiny_encoder).tokenizer()
    text = "电影 good жж film"
    assert tokenizer.unk_token_id in tokenizer(text)["input_ids"]
    wider, added = spelling(tokenizer, characters_of(tokenizer, [text, text]))
    # Chinese characters always stand alone; a Cyrillic letter may also go on a word.
    assert set(added) == {"电", "影", "ж", "##ж"}
    assert wider.unk_token_id not in wider(text)["input_ids"]
    assert wider("good film")["input_ids"] == tokenizer("good film")["input_ids"]
    assert spelling(tokenizer, characters_of(tokenizer, ["a good film", "电"]))[1] == []


def test_a_vocabulary_gives_texts_back() -> None:
    texts = ["Tom's 12 friends don't know \"why\"; do you?", "他說：「不，這是3隻貓。」", "Ärger über  zwei Blanks"] * 3
    backend = target_vocabulary(texts, 300)
    back = backend.decode_batch([encoding.ids for encoding in backend.encode_batch(texts)])
    assert [text.strip() for text in back] == [" ".join(text.split()) for text in texts]


def test_marks_that_a_text_spells_itself_are_no_marks() -> None:
    """Else a row of them would be cut in two."""
    texts = [f"{a}<s>{b}</s> {b}<unk>{a}" for a, b in itertools.product("abcdefghij", "klmnopqrst")]
    backend = target_vocabulary(texts, 60)
    backend.encode_special_tokens = True
    own = {backend.token_to_id(mark) for mark in (BEGIN, END, PAD, UNKNOWN)}
    assert len(own) == 4
    for text in [*texts, "a<s> b", "a<unk> b"]:
        assert own.isdisjoint(backend.encode(text).ids), text


@pytest.mark.parametrize("penalty", [float("nan"), 400.0])
def test_a_length_penalty_beyond_all_numbers_is_refused(penalty: float) -> None:
    with pytest.raises(JobError, match=r"options\.length_penalty is .*; give a number from -10 to 10"):
        TranslationOptions(length_penalty=penalty)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_starts_from_other_encoders(kind: str, tmp_path: Path) -> None:
    """Rows of another architecture go through encoder and decoder as transformers would have them."""
    from transformers import AutoConfig, AutoModel

    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.2}
    if kind == "distilbert":
        settings |= {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
    else:
        settings |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts = pairs(20)
    columns = texts["text"].combine_chunks(), texts["translation"].combine_chunks()
    bundle = make_start(load_bundle(tmp_path / "base"), *columns, layers=1, vocabulary=100, output=tmp_path / "start")
    lists = bundle.tokenizer()(texts["text"].to_pylist()[:3])["input_ids"]
    offsets = np.cumsum([0, *map(len, lists)])
    both_say(bundle.model(), Ragged(ids=np.concatenate(lists).astype(np.int32), types=None, offsets=offsets), 2, 1.0)


# Training.


def job(tmp_path: Path, model: Path | str, **more: Any) -> TrainJob:
    table = tmp_path / "pairs.parquet"
    if not table.exists():
        pq.write_table(pairs(500), table)
    settings: dict[str, Any] = {
        "task": "translation",
        "engine": "local",
        "epochs": 16,
        "batch_size": 16,
        "learning_rate": 6e-3,
        "dropout": 0.0,
        "threads": 1,
        "options": {"decoder_layers": 2, "vocabulary": 200, "source_language": "en", "target_language": "zh"},
        "data": DataOptions(train=str(table), validation_fraction=0.2),
    }
    return TrainJob(model=str(model), output=str(tmp_path / "model"), **(settings | more))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Any:
    root = tmp_path_factory.mktemp("trained")
    return train(job(root, tiny_encoder), tell=lambda _: None)


def test_learns_to_translate(trained: Any) -> None:
    assert trained.metrics["bleu"] > 70
    assert trained.history[0]["bleu"] < trained.metrics["bleu"]
    bundle = load_bundle(trained.bundle)
    assert bundle.card.task == "translation"
    assert bundle.card.provenance["base"]["reference"].endswith("tiny_encoder")
    assert not Path(f"{trained.bundle}.run").exists()
    annotator = AnnotatorSpec(model=str(trained.bundle)).build()
    others = pairs(100, seed=7)
    said = annotator.annotate([others["text"]])
    columns = [others[name].combine_chunks() for name in ("text", "translation")]
    assert annotator.task.metrics(said, columns[:1], columns[1:])["bleu"] > 70


def test_a_text_is_translated_by_sentences(trained: Any) -> None:
    text = "the film was good. the food was bad."
    spec = AnnotatorSpec(model=str(trained.bundle))
    table = pa.table({"text": [text, "the film was good.", "the food was bad."]})
    whole, first, second = spec.build()(table)["translation"].to_pylist()
    assert whole == first + second


def test_goes_on_from_a_translation_model(trained: Any, tmp_path: Path) -> None:
    result = train(job(tmp_path, trained.bundle, epochs=1, learning_rate=1e-5), tell=lambda _: None)
    assert result.history[0]["bleu"] > 70
    card = load_bundle(result.bundle).card
    assert (card.options["source_language"], card.options["target_language"]) == ("en", "zh")


def test_a_run_that_was_cut_off_gives_the_same(tmp_path: Path, tiny_encoder: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.step == 40:
            raise Stop

    same = job(tmp_path, tiny_encoder, epochs=3, dropout=0.1)
    undisturbed = train(dataclasses.replace(same, output=str(tmp_path / "other")), tell=lambda _: None)
    with pytest.raises(Stop):
        train(same, tell=lambda _: None, callbacks=[stop])
    assert (Path(f"{same.output}.run") / "start").is_dir()
    result = train(same, tell=lambda _: None)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses == [entry["train_loss"] for entry in undisturbed.history]
    assert not train(same, tell=lambda _: None).trained
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".start")] == []


def test_two_workers_on_ray_at_zero_stage_3_give_the_same(
    tmp_path: Path, tiny_encoder: Path, ray_session: None
) -> None:
    losses = []
    for number, more in enumerate(({"engine": "local"}, {"engine": "ray", "workers": 2, "zero_stage": 3})):
        place = tmp_path / str(number)
        place.mkdir()
        result = train(job(place, tiny_encoder, epochs=1, **more), tell=lambda _: None)
        losses.append([(entry["train_loss"], entry["validation_loss"]) for entry in result.history])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


# What odd input gives.


def test_null_blank_and_long(trained: Any) -> None:
    texts = [None, "", "  \n", "the film was good.", "film " * 3000, "好" * 2000, "\x00", "🎬"]
    annotator = AnnotatorSpec(model=str(trained.bundle), options={"beams": 1, "max_target_tokens": 20}).build()
    said = annotator(pa.table({"text": pa.array(texts, pa.string())}))["translation"].to_pylist()
    assert said[:3] == [None, "", ""]
    assert said[3]  # Learned by heart: whatever the others are, it says something.
    assert None not in said[1:]


def test_a_long_run_of_blanks_takes_time_by_its_length() -> None:
    started = time.perf_counter()
    assert sentences("x" + " " * 1_000_000 + "y. z") == ["x" + " " * 1_000_000 + "y.", "z"]
    assert sentences("a" + "\n " * 100_000 + "b") == ["a", "b"]
    assert time.perf_counter() - started < 20


def test_rows_that_teach_nothing_are_left_out(tmp_path: Path, tiny_encoder: Path) -> None:
    table = pa.concat_tables(
        [pairs(60), pa.table({"text": ["a", None, " ", "b"], "translation": ["", "x", "x", None]})]
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    told: list[dict[str, Any]] = []
    result = train(job(tmp_path, tiny_encoder, epochs=1), tell=told.append)
    assert result.train_rows + result.validation_rows == 60
    assert any("4 of 64 rows left out" in event.get("text", "") for event in told)


def test_bleu_splits_as_the_language_does() -> None:
    so, said = pa.array(["猫は魚を食べる", "犬が好き"]), pa.array(["猫は魚を食べた", "犬が好き"])
    scores = {}
    for language in ("ja", "th", "zh-TW", "en", ""):
        task = get_task(Card(task="translation"), options={"target_language": language})
        scores[language] = task.metrics(said, [], [so])["bleu"]
    assert scores["ja"] == scores["th"] > 50 > scores["en"]
    assert scores["zh-TW"] > 50 and scores[""] > 50


def test_scores_are_sacrebleu_s() -> None:
    task = get_task(Card(task="translation"), options={"target_language": "en"})
    said, so = ["the film was good", "a phone", "bad food there"], ["the film was great", "a phone", "the food was bad"]
    found = task.metrics(pa.array([*said, None]), [], [pa.array([*so, "a nice film"])])
    said, so = [*said, ""], [*so, "a nice film"]
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [so]).score)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [so]).score)
    # Which is said and which is right is not the same.
    assert found["chrf"] != pytest.approx(sacrebleu.corpus_chrf(so, [said]).score)


def test_wrong_settings(tmp_path: Path, tiny_encoder: Path) -> None:
    make: Callable[..., TrainJob] = lambda **more: job(tmp_path, tiny_encoder, **more)  # noqa: E731
    with pytest.raises(JobError, match=r"decoder_layers is 9, but .* has 2 layers"):
        train(make(options={"decoder_layers": 9}))
    with pytest.raises(JobError, match=r"options\.beams is 0; give 1 or more"):
        train(make(options={"beams": 0}))
    with pytest.raises(JobError, match="augmentation"):
        train(make(augmentation=AugmentationOptions(swap=0.1)))
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "translation": [1, 2]}), numbers)
    with pytest.raises(ColumnError, match="translation"):
        train(make(data=DataOptions(train=str(numbers))))
    assert not (tmp_path / "model").exists()


def test_targets_are_cut_at_the_decoders_positions(start: Bundle, tmp_path: Path) -> None:
    """More tokens than the decoder has positions for are neither learned nor said."""
    positions = start.config.decoder.max_position_embeddings
    long = {"text": ["the film was good."] * 8, "translation": ["好" * (2 * positions)] * 8}
    pq.write_table(pa.table(long), tmp_path / "long.parquet")
    data = DataOptions(train=str(tmp_path / "long.parquet"), validation_fraction=0.0)
    options = {"max_target_tokens": 3 * positions}
    task = get_task(start.card, start.config, options=options)
    task.attach(start)
    columns = [pa.array(long[name], pa.large_string()) for name in ("text", "translation")]
    examples = task.examples(task.tokenizer(start.tokenizer()), columns[:1], columns[1:])
    # The token that begins a translation and the last but one go in; the one that ends it only comes out.
    assert set(np.diff(examples.targets.offsets)) == {positions + 1}
    result = train(
        job(tmp_path, start.directory, epochs=1, batch_size=8, data=data, options=options), tell=lambda _: None
    )
    assert result.trained


def test_a_translation_may_spell_a_special_token(start: Bundle) -> None:
    task = get_task(start.card, start.config)
    task.attach(start)
    columns = [pa.array(["the film was good.", "no"], pa.large_string()) for _ in range(2)]
    spelled = pa.array(["[CLS] old [SEP] new <s> </s>", "好"], pa.large_string())
    found = task.examples(task.tokenizer(start.tokenizer()), columns[:1], [spelled]).targets
    begin, end = task._ends
    rows = np.split(found.values, found.offsets[1:-1])
    assert len(rows) == 2
    for row in rows:
        assert (row[0], row[-1]) == (begin, end)
        assert not set(row[1:-1].tolist()) & {begin, end}


def test_other_tasks_want_a_plain_encoder(start: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"embedding.*wants a plain encoder"):
        AnnotatorSpec(model=str(start.directory), task="embedding").build()
    with pytest.raises(BundleError, match="wants a plain encoder"):
        train(dataclasses.replace(job(tmp_path, start.directory), task="classification", options={}))


def test_sentences() -> None:
    assert sentences('He said "go." Then? Yes!\nA new line') == ['He said "go."', "Then?", "Yes!", "A new line"]
    assert sentences("他來了。「好！」再見") == ["他來了。", "「好！」", "再見"]
    assert sentences("真的吗？！太好了！！！走吧") == ["真的吗？！", "太好了！！！", "走吧"]
    assert sentences('他说："好。"走了。') == ['他说："好。"', "走了。"]
    assert sentences('他说："好。"') == ['他说："好。"']
    assert sentences("Well... !!\n--\nGo") == ["Well... !!\n--", "Go"]
    assert sentences("!!! Go") == ["!!! Go"]
    inches = 'He has a 27" screen. "Nice," she said.'
    assert sentences(inches) == ['He has a 27" screen.', '"Nice," she said.']
    assert sentences('"First.\n"Second."\nThird.') == ['"First.', '"Second."', "Third."]
    assert sentences('He said: " Hello. " She left.') == ['He said: " Hello. "', "She left."]
    # No time of the square of what is read.
    assert len(sentences("-\n" * 100_000)) == 1
    assert len(sentences('"a", "b"\n' * 100_000)) == 100_000
    assert sentences("version 1.2 is out") == ["version 1.2 is out"]
    assert sentences("  ") == ["  "]
    assert sentences("") == [""]
