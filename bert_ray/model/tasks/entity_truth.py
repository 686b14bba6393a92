"""What a table says of entities: tags of words or spans of texts, read into spans, checked, compared.

Inside, the truth is always list<struct<start: int64, end: int64, label: string>>, code points of the row's text. A row
whose tags cannot be read as spans holds one span with a negative start that says why, for `faults` to report.

Shapes: B rows, W words of all rows, E entities of all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import ColumnError
from bert_ray.model.tasks.spans import entity_runs, is_tag, plain, read_tags
from bert_ray.model.tokenization import is_list, is_text, to_python_strings

_SPAN = pa.struct([("start", pa.int64()), ("end", pa.int64()), ("label", pa.string())])

# Starts that stand for a fault, far from any that a table might hold by mistake.
_OTHER_LENGTH, _NO_TAG = -(2**62), -(2**62) - 1


@dataclass(kw_only=True, slots=True)
class Flat:
    """The spans of all rows, end to end.

    Attributes:
        row, start, end: int64 (E,).
        label: string (E,).
    """

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    label: pa.Array

    def kinds(self, types: Sequence[str]) -> np.ndarray:
        """Each span's position in `types`, int64 (E,).

        Raises:
            ColumnError: a label that is none of them.
        """
        found = pc.index_in(self.label, pa.array(types, pa.string()))
        if found.null_count:
            strange = pc.unique(self.label.filter(pc.is_null(found))).to_pylist()[:5]
            raise ColumnError(f"unknown entity types {strange}; the model's are {list(types)}")
        return found.to_numpy(zero_copy_only=False).astype(np.int64)


def is_words(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of strings."""
    return is_list(kind) and is_text(kind.value_type)


def _is_spans(kind: pa.DataType) -> bool:
    return is_list(kind) and pa.types.is_struct(kind.value_type)


def read_truth(truth: pa.Array, texts: pa.Array, known: Collection[str] = ()) -> pa.Array:
    """A column of tags or of spans as spans.

    Args:
        truth: list<string>, the tag of each word; or list<struct<start, end, label>>, code points.
        texts: the text column: lists of words, where the truth is tags.
        known: entity types that are known to be some.

    Raises:
        ColumnError: any other types.
    """
    if pa.types.is_null(truth.type):
        return pa.nulls(len(truth), pa.list_(_SPAN))
    if _is_spans(truth.type):
        return _from_spans(truth)
    if not is_words(truth.type):
        raise ColumnError(
            f"the entities' column is {truth.type}; give list<string> (the tag of each word: O, B-TYPE, I-TYPE; write "
            "numbered tags out as such names) or list<struct<start, end, label>> (code points of the text)"
        )
    if not is_words(texts.type):
        raise ColumnError(
            f"the tags stand one a word, but the text column is {texts.type}; give the words as list<string>, or the "
            "entities as list<struct<start, end, label>>"
        )
    return _from_tags(truth, texts, known)


def _from_spans(truth: pa.Array) -> pa.Array:
    names = [field.name for field in truth.type.value_type]
    if missing := [name for name in ("start", "end", "label") if name not in names]:
        raise ColumnError(f"the entities' column has no field {missing[0]!r}, only {', '.join(names)}")
    flat = truth.flatten()
    try:
        columns = [pc.struct_field(flat, field.name).cast(field.type) for field in _SPAN]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ColumnError(
            f"the entities' column is {truth.type}; start and end are whole numbers, label is a string ({error})"
        ) from None
    counts = pc.fill_null(pc.list_value_length(truth), 0).to_numpy(zero_copy_only=False)
    return _lists(counts, pa.StructArray.from_arrays(columns, fields=list(_SPAN)), truth)


def _lists(counts: np.ndarray, spans: pa.Array, like: pa.Array) -> pa.Array:
    """Spans, `counts` of them a row, null where `like` is."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    mask = pc.is_null(like) if like.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets), spans, mask=mask)


def _from_tags(truth: pa.Array, words: pa.Array, known_types: Collection[str]) -> pa.Array:
    rows = len(truth)
    tag_counts, word_counts = (
        pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        for array in (truth, words)
    )
    known = (pc.and_(truth.is_valid(), words.is_valid())).to_numpy(zero_copy_only=False)
    encoded = truth.flatten().cast(pa.string()).dictionary_encode()
    names = encoded.dictionary.to_pylist()
    code = pc.fill_null(encoded.indices, len(names)).to_numpy(zero_copy_only=False)
    good = np.array([*map(is_tag, names), False])
    bad_row = np.zeros(rows, bool)
    bad_row[np.repeat(np.arange(rows), tag_counts)[~good[code]]] = True
    other_length = known & (tag_counts != word_counts)
    bad_row &= known & ~other_length
    kept = known & ~other_length & ~bad_row
    # The words that stay, their tags, and where they stand in their row's text: each word and one blank after it.
    code = code[np.repeat(kept, tag_counts)]
    row = np.repeat(np.arange(rows), np.where(kept, word_counts, 0))
    length = pc.fill_null(pc.utf8_length(words.flatten().cast(pa.large_string())), 0)
    length = length.to_numpy(zero_copy_only=False).astype(np.int64)[np.repeat(kept, word_counts)]
    ends = np.cumsum(length + 1)
    starts = ends - length - 1
    first = np.searchsorted(row, row)
    shift = starts[first] if len(row) else starts
    tags = read_tags(["O" if not is_tag(name) else name for name in names], known_types)
    begin, last = entity_runs(tags, code, row)
    start, end, owner = (starts - shift)[begin], (ends - 1 - shift)[last], row[begin]
    label = pa.array(tags.types, pa.string()).take(pa.array(tags.kind[code[begin]]))
    # A fault is a span of its own kind.
    wrong = np.flatnonzero(other_length | bad_row)
    reason = np.where(other_length[wrong], _OTHER_LENGTH, _NO_TAG)
    order = np.argsort(np.concatenate([owner, wrong]), kind="stable")
    columns = [
        pa.array(np.concatenate([start, reason])[order]),
        pa.array(np.concatenate([end, reason])[order]),
        pa.concat_arrays([label, pa.nulls(len(wrong), pa.string())]).take(pa.array(order)),
    ]
    counts = np.bincount(np.concatenate([owner, wrong]), minlength=rows)
    return _lists(counts, pa.StructArray.from_arrays(columns, fields=list(_SPAN)), truth)


def flat(truth: pa.Array | pa.ChunkedArray) -> Flat:
    """The spans of truth, or of annotations; without those that are null."""
    if isinstance(truth, pa.ChunkedArray):
        truth = pa.concat_arrays(truth.chunks) if truth.num_chunks else pa.array([], truth.type)
    counts = pc.fill_null(pc.list_value_length(truth), 0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(truth)), counts)
    spans = truth.flatten()
    start, end, label = (pc.struct_field(spans, name) for name in ("start", "end", "label"))
    known = pc.and_(pc.and_(start.is_valid(), end.is_valid()), label.is_valid())
    keep = known.to_numpy(zero_copy_only=False).astype(bool)
    return Flat(
        row=row[keep],
        start=start.filter(known).to_numpy(zero_copy_only=False).astype(np.int64),
        end=end.filter(known).to_numpy(zero_copy_only=False).astype(np.int64),
        label=label.filter(known).cast(pa.string()),
    )


def types_in(truth: pa.Array) -> list[str]:
    """The distinct labels, sorted."""
    return sorted(pc.unique(flat(truth).label).to_pylist())


def faults(texts: pa.Array, truth: pa.Array) -> dict[str, np.ndarray]:
    """Reason -> which rows, bool (B,).

    Args:
        texts: texts as the task reads them.
        truth: of `read_truth`; no nulls.
    """
    rows = len(truth)
    counts = pc.fill_null(pc.list_value_length(truth), 0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(rows), counts)
    spans = truth.flatten()
    fields = [pc.struct_field(spans, name) for name in ("start", "end", "label")]
    start, end = (pc.fill_null(field, 0).to_numpy(zero_copy_only=False) for field in fields[:2])
    coded = (start == _OTHER_LENGTH) | (start == _NO_TAG)
    null = np.zeros(len(row), bool)
    for field in fields:
        null |= ~field.is_valid().to_numpy(zero_copy_only=False).astype(bool)
    lengths = np.array([len(plain(text)) for text in to_python_strings(texts)], np.int64)
    plainly = ~coded & ~null
    outside = plainly & ((start < 0) | (end > (lengths[row] if len(row) else 0)) | (start >= end))
    order = np.lexsort((start, row))
    over = np.zeros(len(row), bool)
    over[order[1:]] = (row[order][1:] == row[order][:-1]) & (start[order][1:] < end[order][:-1])

    def where(which: np.ndarray) -> np.ndarray:
        found = np.zeros(rows, bool)
        found[row[which]] = True
        return found

    return {
        "tags and words of different lengths": where(start == _OTHER_LENGTH),
        "a tag that is none of O, B-TYPE, I-TYPE": where(start == _NO_TAG),
        "an entity without start, end or label (null)": where(null & ~coded),
        "an entity that is empty or reaches outside the text": where(outside),
        "entities that overlap": where(over & plainly),
    }


def scores(annotations: pa.Array, truth: pa.Array) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Precision, recall and F1 of whole entities by seqeval, over all types and for each.

    seqeval compares tags of words. Two spans are one there if both ends and the type are equal, whatever the words
    are; so each row is cut at all ends of its spans, said or true, and the pieces stand in as words.
    """
    from seqeval.metrics import classification_report

    said, so = flat(annotations), flat(truth)
    if not len(so.row) and not len(said.row):
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0}, {}
    rows = len(truth)
    cuts: list[set[int]] = [set() for _ in range(rows)]
    for spans in (said, so):
        for row, start, end in zip(spans.row.tolist(), spans.start.tolist(), spans.end.tolist(), strict=True):
            cuts[row].update((start, end))
    places = [{cut: place for place, cut in enumerate(sorted(found))} for found in cuts]
    report = classification_report(_tags(so, places), _tags(said, places), output_dict=True, zero_division=0)
    names = ("f1-score", "precision", "recall")
    whole = dict(zip(("f1", "precision", "recall"), (float(report["micro avg"][name]) for name in names), strict=True))
    by_type = {
        label: {
            "precision": float(found["precision"]),
            "recall": float(found["recall"]),
            "f1": float(found["f1-score"]),
            "entities": float(found["support"]),
        }
        for label, found in report.items()
        if label not in ("micro avg", "macro avg", "weighted avg")
    }
    return whole, by_type


def _tags(spans: Flat, places: Sequence[dict[int, int]]) -> list[list[str]]:
    """Spans as tags of the pieces between the cuts."""
    tags = [["O"] * max(1, len(found)) for found in places]
    labels = spans.label.to_pylist()
    for row, start, end, label in zip(
        spans.row.tolist(), spans.start.tolist(), spans.end.tolist(), labels, strict=True
    ):
        first, last = places[row][start], places[row][end]
        tags[row][first] = f"B-{label}"
        tags[row][first + 1 : last] = [f"I-{label}"] * (last - first - 1)
    return tags
