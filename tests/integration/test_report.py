"""The report in a real browser: headless Chromium renders it, with the network cut off."""

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.evaluation.evaluate import Evaluation, evaluate
from bert_ray.evaluation.job import EvaluateJob

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EVIL = "<script>document.title='ran'</script><b onmouseover=alert(1)>so nice</b> \U0001f600 \x00 العربية"


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, uci_sample: pa.Table) -> Evaluation:
    """The tiny bundle with a history, measured on the bundled reviews and one hostile text of either label."""
    from dataclasses import replace

    from bert_ray.model.bundle import load_bundle, save_bundle

    folder = tmp_path_factory.mktemp("report")
    bundle = load_bundle(str(tiny_bundle))
    history = [
        {
            "epoch": epoch,
            "step": 9 * epoch,
            "train_loss": 0.7 / epoch,
            "validation_loss": 0.6,
            "accuracy": 0.5 + epoch / 10,
        }
        for epoch in (1, 2, 3)
    ]
    card = replace(bundle.card, provenance={"history": history, "base": "tiny"}, metrics={"accuracy": 0.8})
    save_bundle(folder / "model", bundle.model(), bundle.tokenizer(), card)
    table = uci_sample.select(["text", "label"])
    hostile = pa.table({"text": [EVIL, EVIL], "label": ["negative", "positive"]}, schema=table.schema)
    pq.write_table(pa.concat_tables([table, hostile]), folder / "test.parquet")
    job = EvaluateJob(
        model=str(folder / "model"), table=str(folder / "test.parquet"), output=str(folder / "out"), mistakes=500
    )
    return evaluate(job)


@pytest.fixture(scope="module")
def entities(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """A tiny entities bundle on texts one of which is hostile, its name for an entity too."""
    from tests.tiny_tasks import entities_bundle

    folder = tmp_path_factory.mktemp("entities")
    texts = ["Ann was in Rome", EVIL.replace("\x00", ""), "nothing here", "a great place " * 90]
    spans = [[(0, 3, "thing"), (11, 15, "place")], [(0, 8, "thing")], [], [(2, 7, "place")]]
    truth = [[{"start": start, "end": end, "label": label} for start, end, label in row] for row in spans]
    pq.write_table(pa.table({"text": texts, "label": truth}), folder / "test.parquet")
    return evaluate(
        EvaluateJob(model=entities_bundle(folder), table=str(folder / "test.parquet"), output=str(folder / "out"))
    )


def browse(chromium: str, scratch: Path, page: Path, *more: str) -> str:
    command = [
        *[chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
        *["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"],
        # Every name resolves to nothing: what the page would fetch, it does not get.
        *["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={scratch / 'profile'}"],
        *[*more, page.absolute().as_uri()],
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_rendered_page_shows_the_figures(chromium: str, evaluation: Evaluation, tmp_path: Path) -> None:
    page = browse(chromium, tmp_path, evaluation.report, "--dump-dom")
    assert f"{100 * evaluation.figures['accuracy']:.1f} %" in re.search(r"<title>(.*?)</title>", page)[1]
    cells = re.search(r'<table class="matrix" id="confusion">(.*?)</table>', page, re.S)[1]
    counts = [int(count) for count in re.findall(r"<td[^>]*>(\d+)<small>", cells)]
    assert counts == evaluation.section("confusion").counts.flatten().tolist()
    assert page.count("<svg") == 3
    drawn = re.search(r'id="curves">(.*?)<h2>', page, re.S)[1]
    assert all(f">{name}</text>" in drawn for name in ("training", "validation", "accuracy"))
    assert ">positive " in re.search(r'id="precision-recall">(.*?)</figure>', page, re.S)[1]
    assert f"Majority baseline: {100 * evaluation.constant.figures['accuracy']:.1f} %" in page
    assert len(re.findall(r"<blockquote", page)) == len(evaluation.section("mistakes").cases) > 10
    assert re.search(r'id="fit"><b>It .*?</b>', page)


def test_a_hostile_review_is_text(chromium: str, evaluation: Evaluation, tmp_path: Path) -> None:
    assert any("<script>" in item.texts[0][1] for item in evaluation.section("mistakes").cases)
    page = browse(chromium, tmp_path, evaluation.report, "--dump-dom")
    assert "<script" not in page
    assert "<title>ran" not in page
    quoted = [html.unescape(text) for text in re.findall(r"<blockquote[^>]*>(.*?)</blockquote>", page, re.S)]
    assert any("<script>document.title='ran'</script>" in text and "العربية" in text for text in quoted)


@pytest.mark.parametrize("width", [1200, 420])
def test_it_is_drawn_in_light_and_dark(chromium: str, evaluation: Evaluation, tmp_path: Path, width: int) -> None:
    pictures = {}
    for name, setting in (("light", "1"), ("dark", "0")):
        target = tmp_path / f"{name}.png"
        scheme = f"--blink-settings=preferredColorScheme={setting}"
        browse(
            chromium, tmp_path / name, evaluation.report, scheme, f"--window-size={width},900", f"--screenshot={target}"
        )
        pictures[name] = target.read_bytes()
        assert struct.unpack(">II", pictures[name][16:24]) == (width, 900)
        assert len(pictures[name]) > 15_000  # A blank page of that size has about 5 kB.
    assert pictures["light"] != pictures["dark"]


def test_entities_are_marked_where_they_stand(chromium: str, entities: Evaluation, tmp_path: Path) -> None:
    page = browse(chromium, tmp_path, entities.report, "--dump-dom")
    assert "<script" not in page
    assert "<title>ran" not in page
    types = re.search(r'<table class="table" id="types">(.*?)</table>', page, re.S)[1]
    assert re.findall(r'<th scope="row">(\w+)</th><td>(\d+)</td>', types) == [("place", "2"), ("thing", "2")]
    marked = re.findall(r'<mark class="(right|wrong|missed)">(.*?)<sub>(\w+)</sub></mark>', page)
    cases = [case for item in entities.sections if item.key in ("mistakes", "right") for case in item.cases]
    expected = [
        (mark.kind, case.texts[0][1][mark.start : mark.end], mark.label) for case in cases for mark in case.marks
    ]
    assert [(kind, html.unescape(text), label) for kind, text, label in marked] == expected
    assert any(kind == "missed" for kind, _, _ in marked)


def test_another_report_is_drawn_in_light_and_dark(chromium: str, entities: Evaluation, tmp_path: Path) -> None:
    pictures = set()
    for setting in ("1", "0"):
        target = tmp_path / f"{setting}.png"
        scheme = f"--blink-settings=preferredColorScheme={setting}"
        browse(
            chromium, tmp_path / setting, entities.report, scheme, "--window-size=1000,900", f"--screenshot={target}"
        )
        pictures.add(target.read_bytes())
    assert len(pictures) == 2
    assert min(map(len, pictures)) > 15_000
