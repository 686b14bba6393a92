"""Every task that can be measured writes a report with what fits it, and one without is refused with a way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError
from bert_ray.evaluation.evaluate import Evaluation, evaluate
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.model.tasks import TASKS, Task
from bert_ray.model.tasks.sections import text_cases
from tests.tiny_tasks import MAKERS, Tiny

DOCS = Path(__file__).parents[3] / "docs"
EVIL = "<script>alert(1)</script><img src=http://x/y.png>"
TEXTS = [
    *[
        f"{text} {EVIL}"
        for text in ("the film was good", "terrible service", "a great place", "bad food", "émoji 🎬🍿 𝔘")
    ],
    "long " * 400,
]
SPANS = [[], [(0, 8, "thing")], [(8, 13, "place")], [(0, 3, "thing"), (4, 8, "place")], [], [(0, 4, "thing")]]
SPAN_TYPE = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("label", pa.string())]))
NUMBERS = [0.0, 1.5, 2.0, 3.0, 4.5, 5.0]

# Task -> the columns of a table that it can be measured on, and the keys of the sections its report must hold.
TABLES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "answer": (
        {
            "question": [f"what {text.split()[0]}?" for text in TEXTS],
            "context": TEXTS,
            "answer_text": ["the film", None, "place", "bad", None, "long"],
            "answer_start": [0, None, 8, 0, None, 0],
        },
        {"answers", "mistakes"},
    ),
    "classification": (
        {"text": TEXTS, "label": ["a", "b", "c", "a", "b", "c"]},
        {"confusion", "labels", "precision-recall", "mistakes"},
    ),
    "embedding": ({"text": TEXTS, "text_pair": TEXTS[::-1]}, {"places", "mistakes"}),
    "entities": (
        {
            "text": TEXTS,
            "label": pa.array(
                [[{"start": s, "end": e, "label": kind} for s, e, kind in spans] for spans in SPANS], SPAN_TYPE
            ),
        },
        {"types", "mistakes"},
    ),
    "few-shot": (
        {"text": TEXTS, "label": ["good", "bad", "good", "bad", "good", "bad"]},
        {"confusion", "labels", "precision-recall", "mistakes"},
    ),
    "faq": (
        {"question": TEXTS, "id": ["0", "1", "2", "0", "1", "here"]},
        {"thresholds", "threshold-curve", "mistakes"},
    ),
    "fill-mask": (
        {"text": [f"{text} [MASK]" for text in TEXTS], "token": ["good"] * 6},
        {"places", "mistakes"},
    ),
    "multi-label": (
        {"text": TEXTS, "label": [["a"], ["a", "b"], [], ["c"], ["b"], ["a", "b", "c"]]},
        {"labels", "precision-recall", "mistakes"},
    ),
    "regression": ({"text": TEXTS, "text_pair": TEXTS[::-1], "label": NUMBERS}, {"scatter", "scale", "mistakes"}),
    "similarity": ({"text": TEXTS, "text_pair": TEXTS[::-1], "label": NUMBERS}, {"scatter", "scale", "mistakes"}),
    "translation": ({"text": TEXTS, "translation": TEXTS[::-1]}, {"mistakes"}),
    "zero-shot": (
        {"text": TEXTS, "label": ["film", "food", "phone", "food", "film", "phone"]},
        {"confusion", "labels", "precision-recall", "mistakes"},
    ),
}
# Without truths or metrics: what to measure their bundles as.
UNMEASURED = {"mask": "entities"}
MEASURED = sorted(set(TABLES) & set(MAKERS))

Measure = Callable[[str], Evaluation]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Tiny]) -> Measure:
    """Measures each task's tiny bundle once."""
    root, made = tmp_path_factory.mktemp("reports"), {}

    def measure(kind: str) -> Evaluation:
        if kind not in made:
            it = tiny(kind)
            path = root / f"{kind}.parquet"
            pq.write_table(pa.table(TABLES[kind][0]), path)
            made[kind] = evaluate(
                EvaluateJob(
                    model=it.model,
                    table=str(path),
                    task=it.task,
                    options=it.options,
                    output=str(root / kind),
                    threads=1,
                )
            )
        return made[kind]

    return measure


def test_every_task_is_measured_or_says_how() -> None:
    known = {kind for kind, task in TASKS.items() if task.truths and task.metrics is not Task.metrics}
    assert sorted(known) == MEASURED
    assert set(TASKS) - known == set(UNMEASURED)


@pytest.mark.parametrize(("page", "kinds"), [("annotate", sorted(TASKS)), ("evaluate", MEASURED)])
def test_the_page_s_table_has_every_task(page: str, kinds: list[str]) -> None:
    text = (DOCS / f"{page}.md").read_text("utf-8")
    table = text.split("\n| task |")[1].partition("\n\n")[0]
    first = " ".join(line.split("|")[1] for line in table.splitlines()[1:] if line.startswith("|"))
    assert set(kinds) <= set(re.findall(r"[a-z]+(?:-[a-z]+)*", first))


@pytest.mark.parametrize("kind", MEASURED)
def test_the_report_holds_its_sections(kind: str, measured: Measure) -> None:
    result = measured(kind)
    page = result.report.read_text("utf-8")
    assert page.startswith("<!doctype html>")
    keys = {section.key for section in result.sections}
    assert keys
    assert TABLES[kind][1] <= keys
    for key in keys:
        assert page.count(f'id="{key}"') == 1, key
    assert result.rows == 6
    for name, value in result.figures.items():
        assert f"{name} {value:.4f}" in result.text()
    assert result.text().splitlines()[-1] == f"report {result.report}"
    assert 'id="fit"' in page
    assert "no history of epochs" in result.fit.words
    assert len(page) < 200_000


@pytest.mark.parametrize("kind", MEASURED)
def test_texts_are_shown_never_run_and_nothing_is_fetched(kind: str, measured: Measure) -> None:
    page = measured(kind).report.read_text("utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert not re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["'](?!#)[^"']*""", page)
    assert not re.findall(r"url\((?!#)", page)
    plain = unescape(re.sub(r"</?mark[^>]*>|<sub>.*?</sub>", "", page))
    assert EVIL[:25] in plain
    assert "long " * 300 not in plain


@pytest.mark.parametrize("kind", MEASURED)
def test_metrics_json_has_the_figures(kind: str, measured: Measure) -> None:
    result = measured(kind)
    found = json.loads(result.metrics.read_text("utf-8"))
    assert {name: found[name] for name in result.figures} == result.figures
    assert found["fit"]["verdict"] == "unknown"
    assert found["rows"] == 6


@pytest.mark.parametrize("kind", sorted(UNMEASURED))
def test_a_task_without_metrics_says_what_to_measure_instead(
    kind: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    it = tiny(kind)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "test.parquet")
    with pytest.raises(BundleError, match=f"measure it with --task {UNMEASURED[kind]}"):
        evaluate(EvaluateJob(model=it.model, table=str(tmp_path / "test.parquet"), task=it.task))


def test_answers_are_told_apart_by_whether_there_is_one(measured: Measure) -> None:
    rows = {row[0]: row for row in measured("answer").section("answers").rows}
    assert (rows["has an answer"][1], rows["has none"][1], rows["all"][1]) == (4, 2, 6)
    assert rows["all"][3] == pytest.approx(measured("answer").figures["f1"])


def test_entities_are_marked_in_their_texts(measured: Measure) -> None:
    result = measured("entities")
    figures = {row[0]: row for row in result.section("types").rows}
    assert (figures["thing"][1], figures["place"][1]) == (3, 2)
    marked = [case for case in result.section("mistakes").cases if any(mark.kind == "missed" for mark in case.marks)]
    assert marked
    for case in marked:
        for mark in case.marks:
            if mark.kind == "missed":
                assert case.texts[0][1][mark.start : mark.end] in case.so
    assert '<mark class="missed">' in result.report.read_text("utf-8")


def test_faq_shows_the_right_answer_beside_the_wrong_one(measured: Measure) -> None:
    result = measured("faq")
    answers = {"0": "yes", "1": "no", "2": "here", "here": "here"}
    ids = TABLES["faq"][0]["id"]
    for case in result.section("mistakes").cases:
        assert case.so == answers[ids[case.row]] != case.said


def test_mistakes_are_limited_and_bear_the_table_s_row_numbers(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    it = tiny("regression")
    columns = {"text": [None, *TEXTS], "text_pair": ["x", *TEXTS], "label": [1.0, *NUMBERS]}
    pq.write_table(pa.table(columns), tmp_path / "test.parquet")
    job = EvaluateJob(model=it.model, table=str(tmp_path / "test.parquet"), output=str(tmp_path), mistakes=2)
    cases = evaluate(job).section("mistakes").cases
    assert len(cases) == 2
    for case in cases:
        assert columns["text"][case.row].startswith(case.texts[0][1][:10])


def test_texts_beside_references_worst_first() -> None:
    """What a task that writes texts shows: translation."""
    texts = pa.array(["a", "b", "c"])
    sections = text_cases(["text"], [texts], ["x", "y", "z" * 2000], ["x", "Y", "Z"], [1.0, 0.2, 0.5], 20, "chrF")
    assert [section.key for section in sections] == ["mistakes", "right"]
    assert [case.row for case in sections[0].cases] == [1, 2]
    assert [case.row for case in sections[1].cases] == [0]
    assert len(sections[0].cases[1].said) < 1000
