"""The report's text: complete, escaped, and with nothing to fetch."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bert_ray.evaluation.charts import curves, scatter, shares
from bert_ray.evaluation.evaluate import Evaluation
from bert_ray.evaluation.overfitting import Levers, judge
from bert_ray.evaluation.report import render as render_task
from bert_ray.evaluation.report import spelled
from bert_ray.model.bundle import Bundle, load_bundle
from bert_ray.model.tasks.label_report import majority, one_label_report
from bert_ray.model.tasks.sections import Case, Cases, Curve, Line, Mark, Scatter, Section, Table

HISTORY = [
    {"epoch": 1, "step": 10, "train_loss": 0.7, "validation_loss": 0.6, "accuracy": 0.7, "macro_f1": 0.69},
    {"epoch": 2, "step": 20, "train_loss": 0.4, "validation_loss": 0.5, "accuracy": 0.8, "macro_f1": 0.79},
]


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    found = load_bundle(str(tiny_bundle))
    card = replace(found.card, metrics={"accuracy": 0.8}, provenance={"history": HISTORY, "job": {"seed": 7}})
    return replace(found, card=card)


def render(evaluation: Evaluation, bundle: Bundle, table: str) -> str:
    return render_task(evaluation, bundle, bundle.task, table)


def evaluation(tmp_path: Path, labels: list[str], *more: Section, texts: str = "a text") -> Evaluation:
    """40 rows, the first five of which are mistaken for the next label."""
    so = np.arange(40) % len(labels)
    said = so.copy()
    said[:5] = (said[:5] + 1) % len(labels)
    names = pa.array([labels[label] for label in said])
    annotations = pa.StructArray.from_arrays([names, pa.array(np.full(40, 0.987, np.float32))], ["label", "score"])
    sections = one_label_report(labels, annotations, so, ["text"], [pa.array([texts] * 40)], 20)
    return Evaluation(
        figures={"accuracy": float((so == said).mean()), "macro_f1": 0.87, "precision": 0.5},
        constant=majority(labels, so),
        rows=40,
        sections=(*sections, *more),
        fit=judge(HISTORY, 2, "accuracy", Levers(), baseline=0.5),
        faulty={},
        without_label=3,
        without_text=2,
        seconds=1.5,
        report=tmp_path / "report.html",
        metrics=tmp_path / "metrics.json",
    )


def words(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))).split())


def test_the_report_says_everything(tmp_path: Path, bundle: Bundle) -> None:
    text = words(render(evaluation(tmp_path, ["negative", "positive"], texts="not bad"), bundle, "test.parquet"))
    for part in ("87.5 %", "Majority baseline: 50.0 %", "test.parquet", "Confusion matrix", "Loss", "training"):
        assert part in text
    for part in ("said positive, 98.7 %", "is negative , row 4", "not bad", bundle.fingerprint, "job.seed 7"):
        assert part in text
    assert "sentiment says the right label for 87.5 % of rows" in text
    assert "left out, no label 3" in text
    assert "It underfits" in text
    assert "not done learning" in text
    assert "Train loss best epoch 0.4000" in text


def test_markup_in_texts_labels_and_names_is_shown_not_run(tmp_path: Path, bundle: Bundle) -> None:
    evil = "<script>alert(1)</script>"
    case = Case(row=1, texts=((evil, evil), (evil, evil)), said=evil, so=evil + "x", right=False, detail=evil)
    marked = Case(
        row=1,
        texts=(("t", evil),),
        said=evil,
        so=evil,
        right=False,
        marks=(Mark(start=1, end=7, kind="wrong", label=evil),),
    )
    more: list[Section] = [
        Cases(key="long", title=evil, cases=(case,), long=True, note=evil),
        Cases(key="marked", title="marked", cases=(marked,)),
        Table(key="t", title=evil, header=(evil, evil), rows=((evil, 1), (evil, 0.5)), note=evil),
        Curve(key="c", title=evil, x=evil, y=evil, lines=(Line(name=evil, x=np.ones(2), y=np.ones(2)),), note=evil),
    ]
    found = evaluation(tmp_path, [evil, "b"], *more, texts=f'{evil}<img src="http://x/y.png">')
    found = replace(found, warnings=(evil,), faulty={evil: 2})
    card = replace(bundle.card, provenance={"history": HISTORY, evil: {evil: evil}}, labels=[evil, "b"], name=evil)
    page = render(found, replace(bundle, card=card), f"{evil}.parquet")
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 20


def test_nothing_is_fetched(tmp_path: Path, bundle: Bundle) -> None:
    page = render(evaluation(tmp_path, ["negative", "positive"]), bundle, "test.parquet")
    assert not re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["'](?!#)[^"']*""", page)
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    # XML name spaces are names, not addresses.
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))


def test_without_history_it_says_so(tmp_path: Path, bundle: Bundle) -> None:
    bare = replace(bundle, card=replace(bundle.card, provenance={}))
    found = replace(evaluation(tmp_path, ["negative", "positive"]), fit=judge([], None, "accuracy", Levers()))
    page = render(found, bare, "test.parquet")
    assert "The card has no history of epochs" in page
    assert 'id="curves"' not in page
    assert "Whether it overfits is not known" in page


def test_the_steps_are_drawn_where_the_card_has_their_curve(tmp_path: Path, bundle: Bundle) -> None:
    found = evaluation(tmp_path, ["negative", "positive"])
    titles = ("Loss of the steps", "Norm of the gradient")
    curve = [[10, 0.7, 2.5], [20, 0.4, 1.25], [30, 0.3, 1.0]]
    for points in (curve, [], None):
        more = {} if points is None else {"curve": points}
        card = replace(bundle.card, provenance={"history": HISTORY, **more})
        page = render(found, replace(bundle, card=card), "test.parquet")
        learned = page.partition('id="curves"')[2]
        figures = re.findall(r'<figure class="panel"[^>]*><h3>([^<]+)</h3>(<svg.*?</svg>)?', learned, flags=re.S)
        drawn = [svg for title, svg in figures if title in titles]
        assert [title for title, _ in figures] == [*(titles if points else ()), "Loss", "On the validation rows"]
        assert len(drawn) == (2 if points else 0)
        for svg, name, values in zip(drawn, ("training", "before it is clipped"), np.array(curve).T[1:], strict=False):
            assert f">{name}</text>" in svg
            assert ">step</text>" in svg
            assert drawn_heights(svg) == pytest.approx((values - values[-1]) / (values[0] - values[-1]), abs=1e-3)
        assert "curve [" not in words(page), "it stands among the card's values too"


def drawn_heights(svg: str) -> np.ndarray:
    """How high the points of a drawing's first line lie, as a share from its last to its first."""
    path = re.search(r'<path d="([^"]+)"[^>]*var\(--line-1\)', svg)
    assert path
    heights = np.array([float(y) for y in re.findall(r"[ML] \S+ (\S+)", path[1])])
    return (heights - heights[-1]) / (heights[0] - heights[-1])


def test_many_labels_are_listed_as_confusions(tmp_path: Path, bundle: Bundle) -> None:
    labels = [f"label {number}" for number in range(20)]
    wide = replace(bundle, card=replace(bundle.card, labels=labels))
    page = render(evaluation(tmp_path, labels), wide, "test.parquet")
    assert 'id="confusion-list"' in page
    assert 'id="confusion"' not in page


def test_no_better_than_the_baseline_is_said(tmp_path: Path, bundle: Bundle) -> None:
    poor = replace(evaluation(tmp_path, ["negative", "positive"]), figures={"accuracy": 0.5})
    assert "No better than the baseline" in words(render(poor, bundle, "test.parquet"))


def test_metrics_that_are_no_shares_are_no_per_cent(tmp_path: Path, bundle: Bundle) -> None:
    found = replace(evaluation(tmp_path, ["a", "b"]), figures={"accuracy": 0.9, "chrf": 50.5}, constant=None)
    text = words(render(found, bundle, "test.parquet"))
    assert "chrF 50.500" in text
    assert "5050" not in text


def test_marks_stand_in_their_text(tmp_path: Path, bundle: Bundle) -> None:
    marks = (Mark(start=0, end=3, kind="right", label="PER"), Mark(start=7, end=11, kind="missed", label="LOC"))
    case = Case(
        row=0, texts=(("text", "Ann in Rome"),), said="nothing wrong", so="Rome (LOC)", right=False, marks=marks
    )
    page = render(evaluation(tmp_path, ["a", "b"], Cases(key="m", title="m", cases=(case,))), bundle, "t")
    assert '<mark class="right">Ann<sub>PER</sub></mark> in <mark class="missed">Rome<sub>LOC</sub></mark>' in page


@pytest.mark.parametrize(
    ("name", "expected"),
    [("macro_f1", "Macro F1"), ("f1", "F1"), ("recall@1", "Recall@1"), ("train_loss", "Train loss")],
)
def test_metrics_are_spelled_as_people_write_them(name: str, expected: str) -> None:
    assert spelled(name) == expected


def test_drawings_take_any_name(recwarn: pytest.WarningsRecorder) -> None:
    names = ("costs $5 and $6", "体育 < & \" '", "<script>x</script>")
    lines = tuple(Line(name=name, x=np.linspace(0, 1, 3), y=np.full(3, place / 3)) for place, name in enumerate(names))
    svg = shares(Curve(key="pr", title="t", x="recall", y="precision", lines=lines))
    assert "costs $5 and $6</text>" in svg
    assert "体育 &lt; &amp;" in svg
    assert "<script" not in svg
    assert not recwarn.list
    points = Scatter(key="s", title="t", so=np.zeros(1), said=np.ones(1), same_units=True)
    assert scatter(points) == scatter(points)
    assert set(re.findall(r'\bid="(\w+)-', scatter(points))) == {"s"}


def test_curves_are_coloured_by_the_page_and_repeat_byte_for_byte() -> None:
    lines = {"train_loss": "training", "validation_loss": "validation", "absent": "absent"}
    svg = curves("loss", HISTORY, lines, floor=0.65)
    assert svg == curves("loss", HISTORY, lines, floor=0.65)
    assert svg.startswith("<svg")
    assert "var(--line-1)" in svg
    assert "#0a0001" not in svg
    assert ">training</text>" in svg
    assert ">majority baseline</text>" in svg
    assert ">absent</text>" not in svg
    assert set(re.findall(r'\bid="(\w+)-', svg)) == {"loss"}


def test_no_history_gives_no_drawing() -> None:
    assert curves("loss", [], {"train_loss": "training"}) == ""
    assert curves("loss", [{"epoch": 1, "train_loss": None}], {"train_loss": "training"}) == ""
    assert "<svg" in curves("loss", [{"train_loss": 0.5}], {"train_loss": "training"})
