"""Entities: the same as transformers' pipeline on the same weights; words, windows, tags, bad rows, training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import ColumnError, JobError
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.base import Outputs
from bert_ray.model.tasks.entities import Entities
from bert_ray.model.tasks.entity_truth import scores
from bert_ray.model.tasks.spans import entity_runs, marked_texts, plain_texts, read_tags
from tests.conftest import TINY_SEED, tiny_config, tiny_tokenizer

TAGS = ["O", "B-thing", "I-thing", "B-place", "I-place"]
ENTITIES = get_task(Card(task="entities"))


def make_bundle(
    directory: Path, tags: list[str], max_length: int = 512, vocabulary: Any = None, **options: Any
) -> Path:
    """A tiny model that says every tag somewhere."""
    import torch
    from transformers import BertForTokenClassification

    tokenizer = vocabulary or tiny_tokenizer()
    names = {"id2label": dict(enumerate(tags)), "label2id": {tag: index for index, tag in enumerate(tags)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = BertForTokenClassification(tiny_config(len(tokenizer), **names)).eval()
    labels = sorted(read_tags(tags).types)
    card = Card(task="entities", labels=labels, max_length=max_length, options=options)
    save_bundle(directory, model, tokenizer, card)
    return directory


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("entities") / "bundle", TAGS)


@pytest.fixture(scope="module")
def texts(uci_sample: pa.Table) -> list[str]:
    odd = [
        "émoji 🎬🍿 𝔘 and more",
        "x",
        "U.S. and U.K., don't!",
        "a@b.org (me)",
        "tabs\tand\nlines",
        "中文字 mixed in 中文",
    ]
    return [text for text in uci_sample["text"].to_pylist() if text][:200] + odd


def annotate(model: Path, column: list[Any], kind: pa.DataType | None = None, **options: Any) -> list[Any]:
    annotator = AnnotatorSpec(model=str(model), options=options).build()
    return annotator(pa.table({"text": pa.array(column, kind or pa.string())}))["entities"].to_pylist()


def spans(entities: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [(entity["start"], entity["end"], entity["label"]) for entity in entities]


# Beside transformers.


def test_spans_are_those_of_the_pipeline(bundle: Path, texts: list[str]) -> None:
    """With aggregation_strategy="first".

    Where ours differs by design: a word of whose pieces one is unknown is still one word, and in scripts without
    blanks each token is a word of its own; neither occurs in these texts.
    """
    from transformers import pipeline

    pipe = pipeline("token-classification", model=str(bundle), aggregation_strategy="first", device="cpu")
    found = annotate(bundle, texts)
    assert sum(map(len, found)) > 500
    assert {entity["label"] for entities in found for entity in entities} == {"thing", "place"}
    for text, ours, theirs in zip(texts, found, pipe(texts), strict=True):
        assert spans(ours) == [(entity["start"], entity["end"], entity["entity_group"]) for entity in theirs], text
        assert [entity["text"] for entity in ours] == [text[start:end] for start, end, _ in spans(ours)]
        for one, other in zip(ours, theirs, strict=True):
            assert one["score"] == pytest.approx(float(other["score"]), abs=1e-4)


@pytest.mark.parametrize("tags", [["O", "thing", "place"], ["B-thing", "O", "I-thing", "S-thing", "E-thing"]])
def test_a_plain_directory_of_other_schemes(tmp_path: Path, tags: list[str], texts: list[str]) -> None:
    model = make_bundle(tmp_path / "model", tags)
    (model / "bert_ray.json").unlink()
    found = load_bundle(model)
    assert found.card.task == "entities"
    assert found.card.labels == [tag for tag in dict.fromkeys(tag.split("-")[-1] for tag in tags) if tag != "O"]
    annotated = annotate(model, texts[:30])
    assert {entity["label"] for entities in annotated for entity in entities} == set(found.card.labels)
    for text, entities in zip(texts[:30], annotated, strict=True):
        assert [text[entity["start"] : entity["end"]] for entity in entities] == [entity["text"] for entity in entities]


def test_targets_are_those_of_run_ner(bundle: Path, shared_data: Path) -> None:
    """The first piece of each given word carries its tag."""
    from transformers import AutoTokenizer

    table = pq.read_table(shared_data / "wnut17" / "validation.parquet").slice(0, 200)
    card = Card(
        task="entities", labels=sorted({tag[2:] for tags in table["tags"].to_pylist() for tag in tags if tag != "O"})
    )
    task = Entities(card)
    truth, inputs = task.read_truth([table["tags"].combine_chunks()], [table["tokens"].combine_chunks()])
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    examples = task.examples(task.tokenizer(tokenizer), inputs, truth)
    expected = tokenizer(table["tokens"].to_pylist(), is_split_into_words=True)
    names = task.tags(1 + 2 * len(card.labels)).names
    assert examples.pieces.tokens.ids.tolist() == [item for ids in expected["input_ids"] for item in ids]
    labels = []
    for row, tags in enumerate(table["tags"].to_pylist()):
        before = None
        for word in expected.word_ids(row):
            labels.append(-100 if word is None or word == before else names.index(tags[word]))
            before = word
    assert examples.targets.values.tolist() == labels
    assert examples.weights.tolist() == [float(len(tags)) for tags in table["tags"].to_pylist()]


def test_loss_is_transformers_own(bundle: Path, texts: list[str]) -> None:
    import torch

    from bert_ray.model.encoder import encode
    from bert_ray.model.packing import pack_rows

    loaded = load_bundle(bundle)
    task, model = loaded.task, loaded.model()
    rows = [text for text in texts if " " in text][:8]
    truth = pa.array([[{"start": 0, "end": text.index(" "), "label": "thing"}] for text in rows])
    truth, inputs = task.read_truth([truth], [pa.array(rows)])
    examples = task.examples(task.tokenizer(loaded.tokenizer()), inputs, truth)
    which = np.arange(len(rows))[::-1].copy()
    batch = pack_rows(examples.pieces.tokens, which)
    losses, outputs = task.losses(model, encode(model, batch), batch, torch.from_numpy(examples.targets.take(which)))
    assert outputs is not None and outputs.shape == (len(batch.input_ids), len(TAGS))
    for row, loss in zip(which, losses, strict=True):
        tokens = slice(*examples.pieces.tokens.offsets[row : row + 2])
        ids = torch.from_numpy(examples.pieces.tokens.ids[tokens].astype(np.int64))[None]
        expected = model(input_ids=ids, labels=torch.from_numpy(examples.targets.values[tokens])[None]).loss
        assert loss.item() / examples.weights[row] == pytest.approx(expected.item(), abs=1e-4)
    losses.sum().backward()
    assert torch.isfinite(model.classifier.weight.grad).all()


# Words and tags.


def test_words_of_raw_text_are_the_tokenizers(bundle: Path, texts: list[str]) -> None:
    """In scripts with blanks, a word is what BERT's own pre-tokeniser cuts."""
    from bert_ray.model.tasks.spans import read_texts, text_tokens, word_begins

    task, tokenizer = load_bundle(bundle).task, load_bundle(bundle).tokenizer()
    # Marks that the tokenizer drops, behind punctuation, letters, blanks and nothing.
    texts = [*texts, "a\u203c\ufe0fLondon is", "Zoe\u0308\u0301s Jose\u0301-x", "\ufe0fx \ufe0fy", "x", "\u0301"]
    pieces = task.encode(task.tokenizer(tokenizer), [pa.array(texts, pa.large_string())])
    known = read_texts(texts)
    tokens = text_tokens(pieces, known)
    begins = word_begins(tokens, known, tokens.row)
    expected = []
    for text in texts:
        words = [word for word in tokenizer(text).word_ids() if word is not None]
        expected += [place == 0 or word != words[place - 1] for place, word in enumerate(words)]
    assert begins.tolist() == expected


def test_chinese_without_blanks(tmp_path: Path) -> None:
    """Each character is a word, whether the text comes whole or as a list of characters."""
    model = make_bundle(tmp_path / "model", TAGS)
    text = "我在北京工作2年了。"
    (whole,) = annotate(model, [text])
    (listed,) = annotate(model, [list(text)], pa.list_(pa.string()))
    assert whole and [(2 * start, 2 * end - 1, label) for start, end, label in spans(whole)] == spans(listed)
    joined = " ".join(text)
    assert [entity["text"] for entity in listed] == [joined[start:end] for start, end, _ in spans(listed)]


def spelling(text: str) -> Any:
    """A BERT tokenizer that knows each character of a text, alone and within a word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"{mark}{char}" for char in set(text) for mark in ("", "##")),
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return BertTokenizerFast(tokenizer_object=backend, model_max_length=512)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("我在北京工作2年了。", ["北京"]),
        ("明日は東京タワーとスカイツリーに行きます。", ["東京タワー", "スカイツリー"]),
        ("ฉันทำงานที่กรุงเทพ", ["กรุงเทพ"]),
        ("ຂ້ອຍຢູ່ວຽງຈັນ", ["ວຽງຈັນ"]),
        ("I moved from New York to Paris.", ["New York", "Paris"]),
    ],
)
def test_names_within_unbroken_writing_come_back(text: str, names: list[str]) -> None:
    """What the truth says, as tags of tokens, decodes to the same spans: no name takes in what stands around it."""
    task = Entities(Card(task="entities", labels=["place"]))
    truth = [{"start": text.index(name), "end": text.index(name) + len(name), "label": "place"} for name in names]
    read, inputs = task.read_truth([pa.array([truth])], [pa.array([text])])
    examples = task.examples(task.tokenizer(spelling(text)), inputs, read)
    tags = np.maximum(examples.targets.values, 0)  # Tokens without a tag of their own: O.
    outputs = Outputs(values=np.eye(3, dtype=np.float32)[tags] * 9, offsets=examples.pieces.tokens.offsets)
    (found,) = task.decode(outputs, examples.pieces, inputs).to_pylist()
    assert [entity["text"] for entity in found] == names
    assert spans(found) == [(span["start"], span["end"], "place") for span in truth]


def test_given_words_are_kept(bundle: Path) -> None:
    words = [["U.S.", "and", "New York", "don't"], [], None, ["x", "", "y"], ["a\u205fb", None, "(c)"]]
    marked = marked_texts(pa.array(words, pa.list_(pa.string())))
    assert plain_texts(marked).to_pylist() == ["U.S. and New York don't", "", None, "x  y", "a b  (c)"]
    found = annotate(bundle, words, pa.list_(pa.string()))
    assert found[1] == [] and found[2] is None
    edges = {0, 4, 5, 8, 9, 17, 18, 23}
    assert {edge for start, end, _ in spans(found[0]) for edge in (start, end)} <= edges
    sliced = marked_texts(pa.array([["no"], *words], pa.large_list(pa.string())).slice(1))
    assert sliced.to_pylist() == marked.to_pylist()


def test_runs_are_seqevals() -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    rng = random.Random(7)
    tags = read_tags(["O", "B-x-1", "I-x-1", "B-y", "I-y", "E-y", "S-y"])
    assert tags.types == ("x-1", "y")
    for _ in range(200):
        said = np.array([rng.randrange(len(tags.names)) for _ in range(rng.randrange(1, 12))])
        first, last = entity_runs(tags, said, np.zeros(len(said)))
        ours = [(tags.types[tags.kind[said[one]]], one, other) for one, other in zip(first, last, strict=True)]
        assert ours == get_entities([tags.names[tag] for tag in said])


def test_tags_of_other_forms() -> None:
    assert read_tags(["O", "E-MAIL", "PERSON"]).types == ("E-MAIL", "PERSON")
    tags = read_tags(["I-a", "O", "B-a", "b"])
    assert tags.types == ("a", "b")
    assert tags.ids(begin=True).tolist() == [2, 3]
    assert tags.ids(begin=False).tolist() == [0, 3]
    # A letter that is another type's prefix is one; so is any before a type that is known, but not one of its own name.
    assert read_tags(["O", "B-a", "E-a", "S-a", "S-b", "U-c"]).types == ("a", "b", "U-c")
    assert read_tags(["O", "S-b", "E-MAIL"], known=["b", "E-MAIL"]).types == ("b", "E-MAIL")


# Windows.


def test_no_entity_reaches_across_a_middle_that_is_left_out(tmp_path: Path) -> None:
    """A model that says I-thing of every word: one entity before the middle, one behind it."""
    import torch
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(make_bundle(tmp_path / "any", TAGS))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
    place = tmp_path / "bundle"
    save_bundle(place, model, tiny_tokenizer(), Card(task="entities", labels=["place", "thing"], max_length=16))
    text = " ".join(["good"] * 40)
    for column, kind in (([text], None), ([text.split()], pa.list_(pa.string()))):
        (found,) = annotate(place, column, kind, overflow="head_tail")
        assert [entity["label"] for entity in found] == ["thing", "thing"]
        assert found[0]["start"] == 0
        assert found[0]["end"] < found[1]["start"]
        assert found[1]["end"] == len(text)
        # Nothing left out: one.
        (short,) = annotate(place, [column[0][:34] if kind is None else column[0][:7]], kind, overflow="head_tail")
        assert spans(short) == [(0, 34, "thing")]


def test_no_window_changes_what_fits(bundle: Path, texts: list[str]) -> None:
    assert annotate(bundle, texts) == annotate(bundle, texts, overflow="truncate")


@pytest.mark.parametrize(("max_length", "overlap"), [(24, 8), (23, 11), (10, 64), (16, 0)])
def test_each_token_stands_once(tmp_path: Path, texts: list[str], max_length: int, overlap: int) -> None:
    from bert_ray.model.tasks.spans import read_texts, text_tokens

    model = load_bundle(make_bundle(tmp_path / "model", TAGS, max_length=max_length, overlap=overlap))
    task, tokenizer = model.task, model.tokenizer()
    pieces = task.encode(task.tokenizer(tokenizer), [pa.array(texts, pa.large_string())])
    assert len(pieces) > 1.5 * len(texts)
    tokens = text_tokens(pieces, read_texts(texts), overlap)
    whole = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
    assert pieces.tokens.ids[tokens.number].tolist() == [item for ids in whole["input_ids"] for item in ids]
    starts = (tokens.start - read_texts(texts).offsets[tokens.row]).tolist()
    assert starts == [start for offsets in whole["offset_mapping"] for start, _ in offsets]
    # Where a token is shared, it stands at least half the shared stretch from its window's edge, or at the text's own.
    room = max_length - 2
    shared = min(overlap, room // 2)
    begins, lengths = pieces.tokens.offsets[:-1][tokens.piece], pieces.tokens.lengths[tokens.piece]
    place = tokens.number - begins - 1
    window = tokens.piece - pieces.starts[:-1][tokens.row]
    last = np.diff(pieces.starts)[tokens.row] - 1
    left, right = place[window > 0], (lengths - 3 - place)[window < last]
    assert left.min() >= shared // 2 and right.min() >= shared // 2 - (shared % 2 == 0)


# The truth.


def read(tmp_path: Path, **columns: Any) -> Any:
    from bert_ray.training.data import read_labelled

    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(columns), path)
    return read_labelled(str(path), ENTITIES)


def test_tags_become_spans(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        text=[["I", "saw", "New", "York", ",", "Bo"], ["北", "京", "好"], [], ["a"]],
        label=[["O", "O", "B-place", "I-place", "O", "I-name"], ["B-place", "I-place", "O"], [], ["thing"]],
    )
    assert [[tuple(span.values()) for span in row] for row in table.truth[0].to_pylist()] == [
        [(6, 14, "place"), (17, 19, "name")],
        [(0, 3, "place")],
        [],
        [(0, 1, "thing")],
    ]
    assert ENTITIES.labels_in(table.truth) == ["name", "place", "thing"]
    assert table.notes == []


def test_bad_tags_are_left_out_and_counted(tmp_path: Path) -> None:
    words = ["New", "York"]
    table = read(
        tmp_path,
        text=[words, words, words, None, words, words, words],
        label=[["B-p", "I-p"], ["B-p"], ["B-", "O"], ["O"], None, ["B", "O"], ["B-p", None]],
    )
    assert len(table.truth[0]) == 1
    (note,) = table.notes
    assert "6 of 7 rows left out" in note
    assert "1 with tags and words of different lengths (first: row 1)" in note
    assert "3 with a tag that is none of O, B-TYPE, I-TYPE (first: row 2)" in note
    assert "1 with no text (null)" in note and "1 with no label (null)" in note


def test_bad_spans_are_left_out_and_counted(tmp_path: Path) -> None:
    text = "🎬 in New York"
    rows: list[list[tuple[Any, Any, Any]]] = [
        [(5, 13, "p")],
        [(5, 14, "p")],
        [(-1, 3, "p")],
        [(5, 5, "p")],
        [(5, 8, "p"), (7, 13, "q")],
        [(9, 13, "q"), (5, 8, "p")],
        [(None, 3, "p")],
        [(2, 4, None)],
        [],
    ]
    kind = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("label", pa.string())]))
    label = [[dict(zip(("start", "end", "label"), span, strict=True)) for span in row] for row in rows]
    table = read(tmp_path, text=[text] * len(rows), label=pa.array(label, kind))
    assert [len(row) for row in table.truth[0].to_pylist()] == [1, 2, 0]
    (note,) = table.notes
    assert "3 with an entity that is empty or reaches outside the text (first: row 1)" in note
    assert "1 with entities that overlap (first: row 4)" in note
    assert "2 with an entity without start, end or label (null) (first: row 6)" in note


@pytest.mark.parametrize(
    ("text", "label", "says"),
    [
        (["a b"], [["O", "O"]], "give the words as list<string>"),
        ([["a", "b"]], [[0, 1]], "write numbered tags out"),
        (["a b"], [[{"start": 0, "stop": 1}]], "no field 'end'"),
        (["a b"], [[{"start": "0", "end": "x", "label": "p"}]], "whole numbers"),
        (["a b"], ["O"], "list<string>"),
    ],
)
def test_columns_of_other_types(tmp_path: Path, text: list[Any], label: list[Any], says: str) -> None:
    with pytest.raises(ColumnError, match=says):
        read(tmp_path, text=text, label=label)


def test_no_entity_at_all(tmp_path: Path) -> None:
    table = read(tmp_path, text=[["a"], ["b"]], label=[["O"], ["O"]])
    with pytest.raises(ColumnError, match="no entity"):
        ENTITIES.labels_in(table.truth)


def test_metrics_are_seqevals() -> None:
    from seqeval.metrics import classification_report, f1_score

    rng = random.Random(3)
    names = ["O", "O", "O", "B-x", "I-x", "B-y", "I-y"]
    so, said = ([[rng.choice(names) for _ in range(9)] for _ in range(60)] for _ in range(2))
    said[:20] = so[:20]
    words = pa.array([["ab", "c", "def"] * 3] * 60)
    truth, _ = ENTITIES.read_truth([pa.array(so)], [words])
    annotations, _ = ENTITIES.read_truth([pa.array(said)], [words])
    whole, by_type = scores(annotations[0], truth[0])
    assert whole["f1"] == pytest.approx(f1_score(so, said))
    assert ENTITIES.metrics(annotations[0], [], truth) == whole
    report = classification_report(so, said, output_dict=True)
    assert by_type["x"]["recall"] == pytest.approx(report["x"]["recall"])
    assert by_type["y"]["entities"] == report["y"]["support"]
    nothing = pa.array([[], None], truth[0].type)
    assert scores(nothing, nothing)[0]["f1"] == 0.0


# The whole way.


def test_odd_rows(bundle: Path) -> None:
    found = annotate(bundle, [None, "", "  \t", "good food", "\u200b", "�" * 3])
    assert found[0] is None
    assert found[1] == found[2] == []
    raw = pa.array([b"good \xff food", b"bad"], pa.binary()).view(pa.string())
    annotator = AnnotatorSpec(model=str(bundle)).build()
    assert annotator(pa.table({"text": raw}))["entities"].to_pylist()[1] == annotate(bundle, ["bad"])[0]


def test_a_name_keeps_its_last_accent(tmp_path: Path) -> None:
    """The tokenizer drops accents; what stands in the text is told."""
    text = "Jose\u0301 saw Zoe\u0308"
    (found,) = annotate(make_bundle(tmp_path / "bundle", ["B-name", "I-name"]), [text])
    ends = {entity["end"] for entity in found}
    assert ends and ends <= {5, 9, 14}
    assert all(text[entity["start"] : entity["end"]] == entity["text"] for entity in found)


def test_types_of_other_names_are_told_before_annotating(bundle: Path) -> None:
    task = AnnotatorSpec(model=str(bundle)).build().task

    def truth(*types: str) -> list[pa.Array]:
        spans = [{"start": 0, "end": 1, "label": name} for name in types]
        return [pa.array([spans], pa.list_(pa.struct({"start": pa.int64(), "end": pa.int64(), "label": pa.string()})))]

    with pytest.raises(ColumnError, match=r"entity types \(LOC, PER\) is one of the model's \(place, thing\)"):
        task.check_truth(truth("PER", "LOC"))
    task.check_truth(truth("PER", "place"))
    task.check_truth(truth())


def test_options_are_checked(bundle: Path) -> None:
    for options, says in (({"overlap": -1}, "overlap"), ({"overflow": "fold"}, "windows"), ({"over": 1}, "over")):
        with pytest.raises(JobError, match=says):
            annotate(bundle, ["x"], **options)


@pytest.fixture(scope="module")
def trained(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A price and the digits after it are an amount, a phone (with its battery) is a thing."""
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    directory = tmp_path_factory.mktemp("trained")
    rng = random.Random(5)
    table: dict[str, list[Any]] = {"words": [], "tags": []}
    for _ in range(400):
        words, tags = [], []
        while len(words) < 3 or rng.random() < 0.9:
            kind = rng.choice(("amount", "thing", None, None))
            if kind == "amount":
                entity = ["price", *(str(rng.randrange(10)) for _ in range(rng.randrange(4)))]
            else:
                entity = rng.choice((["phone"], ["phone", "battery"])) if kind else []
            words += [*entity, rng.choice("film food staff story service good bad".split())]
            tags += [*(f"{'I' if place else 'B'}-{kind}" for place in range(len(entity))), "O"]
        table["words"].append(words)
        table["tags"].append(tags)
    pq.write_table(pa.table(table), directory / "train.parquet")
    job = TrainJob(
        model=str(tiny_encoder),
        output=str(directory / "out"),
        task="entities",
        max_length=24,
        options={"overlap": 10},
        engine="local",
        threads=1,
        data=DataOptions(
            train=str(directory / "train.parquet"),
            validation_fraction=0.2,
            columns={"text": "words", "label": "tags"},
        ),
        epochs=6,
        batch_size=16,
        learning_rate=5e-3,
    )
    return train(job, tell=lambda _: None)


def test_training_finds_entities(trained: Any) -> None:
    assert trained.metrics["f1"] > 0.95
    assert {"f1", "precision", "recall"} == set(trained.metrics)
    config = json.loads((trained.bundle / "config.json").read_text())
    assert config["id2label"]["1"] == "B-amount"
    (found,) = annotate(trained.bundle, ["good film price 7 8 food phone"])
    assert [(entity["text"], entity["label"]) for entity in found] == [("price 7 8", "amount"), ("phone", "thing")]
    assert all(0.5 < entity["score"] <= 1.0 for entity in found)


def test_validation_rows_without_a_word_end_no_training(trained: Any, tmp_path: Path) -> None:
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    row = {"words": [["phone", "bad"]], "tags": [["B-thing", "O"]]}
    pq.write_table(pa.table(row), tmp_path / "train.parquet")
    kinds = pa.schema([("words", pa.list_(pa.string())), ("tags", pa.list_(pa.string()))])
    pq.write_table(pa.table({"words": [[]], "tags": [[]]}, kinds), tmp_path / "validation.parquet")
    data = DataOptions(
        train=str(tmp_path / "train.parquet"),
        validation=str(tmp_path / "validation.parquet"),
        columns={"text": "words", "label": "tags"},
    )
    job = TrainJob(
        model=str(trained.bundle), output=str(tmp_path / "out"), task="entities", engine="local", threads=1, data=data,
        epochs=1,
    )  # fmt: skip
    assert train(job, tell=lambda _: None).history[0]["validation_loss"] == 0.0


def test_an_entity_on_a_seam_is_found_once_whole(trained: Any) -> None:
    """A window holds 22 words: the entity stands at every place of a text of three windows."""
    rows, places = [], []
    for lead in range(60):
        before = " ".join([("good", "food", "staff")[place % 3] for place in range(lead)] + [""]).lstrip()
        rows.append(f"{before}price 1 2 3 film staff " + "food good " * 6)
        places.append((len(before), len(before) + len("price 1 2 3"), "amount"))
    found = [spans(entities) for entities in annotate(trained.bundle, rows)]
    assert found == [[place] for place in places]


def test_training_goes_on_with_the_same_tags(trained: Any, tmp_path: Path) -> None:
    """A base that has the card's types keeps its head, in its own order of tags."""
    import torch

    base = load_bundle(trained.bundle)
    task = get_task(Card(task="entities", labels=["thing", "amount"]), base.config)
    model = task.new_model(base)
    assert model.config.id2label[1] == "B-amount"
    assert torch.equal(model.classifier.weight, base.model().classifier.weight)
    other = get_task(Card(task="entities", labels=["thing"]), base.config).new_model(base)
    assert other.config.id2label == {0: "O", 1: "B-thing", 2: "I-thing"}
