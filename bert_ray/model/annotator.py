"""Arrow in, Arrow out: the one way a row is ever annotated.

    Annotator(table) -> read -> encode -> pack -> forward -> decode -> the annotation as a column

Identical texts of one call are computed once. Tokenising runs in a thread of its own, a window of texts ahead of the
forward pass (the tokenizer is Rust and lets go of Python's lock).

Shapes: B rows, U distinct rows, P pieces of tokens, T tokens of all of them, C width of a task's output.
"""

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bert_ray.errors import BundleError, ColumnError, JobError, meant
from bert_ray.model.bundle import Bundle, load_bundle
from bert_ray.model.examples import ranges
from bert_ray.model.inference_encoder import InferenceEncoder
from bert_ray.model.packing import pack_rows, plan
from bert_ray.model.peak import multiplies_bf16
from bert_ray.model.tasks import Task
from bert_ray.model.tasks.base import Outputs
from bert_ray.model.tokenization import Pieces, is_blank
from bert_ray.options import Dtype, check_choices

# Texts tokenised at a time. The first windows are small, so that the forward pass starts at once; later ones are wide
# enough that the last, half-filled batch of a window is a small part of it.
_FIRST_WINDOW_TEXTS, _LAST_WINDOW_TEXTS = 64, 2048
# A table's rows are annotated so many at a time, and at about so much text.
_CALL_ROWS, _CALL_BYTES = 2**16, 2**28
# A window also ends at this much text, which bounds memory where rows are huge.
_WINDOW_BYTES = 16 * 2**20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True, frozen=True, slots=True)
class AnnotatorSpec:
    """A small, picklable description of an annotator: what travels to a worker.

    Attributes:
        model: a bundle reference; resolved again on the worker.
        columns: (task input, table column) pairs; an input that is not named reads the column of its own name.
        name: the annotation's column name; None: the card's, else the task's.
        scores: also give every label's score, where the task has labels.
        task: another task to run on the bundle than its card's ("similarity" on an encoder); None: the card's.
        options: of the task, over those on the card; a mapping, kept as JSON.
        batch_tokens: tokens of a packed batch; None: what suits the device.
        threads: torch threads of the process; None leaves them as they are.
        device: "cpu", "cuda", "cuda:1", …; "auto": a GPU where there is one.
        dtype: "fp32", "bf16" or "fp16"; "auto": fp32 on a CPU, bf16 (or fp16 where the GPU lacks it) on a GPU.
        fingerprint: when given, the bundle found must have it, so that no worker annotates with another model.
    """

    model: str
    columns: tuple[tuple[str, str], ...] = ()
    name: str | None = None
    scores: bool = False
    task: str | None = None
    options: str | Mapping[str, Any] = ""
    batch_tokens: int | None = None
    threads: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.columns, Mapping):
            object.__setattr__(self, "columns", tuple(self.columns.items()))
        if isinstance(self.options, Mapping):
            # A description is hashed and compared: JSON is both, and says the same on every worker. In the order that
            # was given: labels have one.
            try:
                object.__setattr__(self, "options", json.dumps(self.options) if self.options else "")
            except TypeError as error:
                raise JobError(f"options are {self.options!r}: give what JSON has, such as lists ({error})") from error
        check_choices(self)
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise JobError(f"batch_tokens is {self.batch_tokens}; it is at least 1")

    def task_of(self, bundle: Bundle) -> Task:
        """The task to run on a bundle, with the options of this description.

        Raises:
            BundleError: no such task.
            JobError: an option that the task does not have.
        """
        options = json.loads(str(self.options)) if self.options else {}
        if self.scores:
            options["scores"] = True
        return bundle.bind(kind=self.task, options=options)

    def build(self) -> Annotator:
        """The annotator of this description, built once per process, anew when its directory holds another bundle."""
        return _build(self, _stamp(self.model))


def _stamp(reference: str) -> tuple[tuple[str, int, int], ...]:
    """What tells the bundle in a directory from one that took its place; the same for all that is no directory."""
    place = os.path.expanduser(os.fspath(reference).removeprefix("file://"))
    if not os.path.isdir(place):
        return ()
    found = []
    with os.scandir(place) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # It is being replaced, or is a link to nothing.
                found.append((entry.name, (status := entry.stat()).st_mtime_ns, status.st_ino))
    return tuple(sorted(found))


@lru_cache(maxsize=16)
def _build(spec: AnnotatorSpec, stamp: tuple[tuple[str, int, int], ...]) -> Annotator:
    return Annotator(load_bundle(spec.model), spec)


def forget_built() -> None:
    """Let go of the annotators that this process has built, and of the memory of a GPU that they had."""
    _build.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Annotator:
    """Appends a bundle's annotation to Arrow tables.

    Attributes:
        bundle: the bundle.
        task: what is done with it.
        tokenizer: the bundle's, as the task uses it.
        model: its weights, with the task's head.
        output_field: name and Arrow type of the annotation, as the task declares it.
        input_columns: the columns read, one per task input.
        precision: what the model computes in: "fp32", "bf16" or "fp16".
    """

    def __init__(self, bundle: Bundle, spec: AnnotatorSpec | None = None) -> None:
        spec = spec or AnnotatorSpec(model=bundle.reference)
        if spec.fingerprint and spec.fingerprint != bundle.fingerprint:
            raise BundleError(
                f"{bundle.reference}: fingerprint {bundle.fingerprint[:12]} is not the expected "
                f"{spec.fingerprint[:12]}: the model changed, or this machine holds another one under that name"
            )
        self.bundle = bundle
        self.task = spec.task_of(bundle)
        renamed = dict(spec.columns)
        if strange := sorted(set(renamed) - set(self.task.inputs)):
            raise ColumnError(f"{self.task.kind} has no input {strange[0]!r}; its inputs are {self.task.inputs}")
        self.input_columns = tuple(renamed.get(name, name) for name in self.task.inputs)
        self.output_field = pa.field(spec.name or self.task.name, self.task.output_type())
        if spec.threads:
            torch.set_num_threads(spec.threads)
        self.device, self.precision = _device_and_precision(spec.device, spec.dtype)
        self.dtype = _DTYPES[self.precision]
        self.tokenizer = self.task.tokenizer(bundle.tokenizer())
        self.model = bundle.model(self.task)
        exact = [copy.deepcopy(layer) for layer in self.task.exact_layers(self.model)]
        self.model.to(self.device, self.dtype)
        for layer, whole in zip(self.task.exact_layers(self.model), exact, strict=True):
            layer.to(torch.float32).load_state_dict(whole.state_dict())
        self._encoder = InferenceEncoder(self.model)
        self.batch_tokens = spec.batch_tokens or self.task.tiles * self._encoder.batch_tokens
        self.task.prepare(self)

    @property
    def fingerprint(self) -> str:
        """The bundle's fingerprint."""
        return self.bundle.fingerprint

    def __call__(self, table: pa.Table | pa.RecordBatch) -> pa.Table | pa.RecordBatch:
        """Append the annotation: same rows in the same order, input columns untouched.

        Raises:
            ColumnError: an input column is missing or not text, or the annotation's name is taken.
        """
        self.check(table.schema)
        inputs = [table.column(name) for name in self.input_columns]
        if isinstance(table, pa.RecordBatch):
            return table.append_column(self.output_field, self.annotate(inputs))
        # Some rows at a time: an array of Arrow's strings, or of lists, holds at most 2 GiB.
        rows = min(_CALL_ROWS, max(1, table.num_rows * _CALL_BYTES // max(1, sum(map(_bytes, inputs)))))
        starts = range(0, table.num_rows, rows) or [0]
        parts = [self.annotate([array.slice(start, rows) for array in inputs]) for start in starts]
        return table.append_column(self.output_field, pa.chunked_array(parts, self.output_field.type))

    def check(self, schema: pa.Schema) -> None:
        """Raise a ColumnError that names the remedy where a table of this schema cannot be annotated."""
        for task_input, name in zip(self.task.inputs, self.input_columns, strict=True):
            found = schema.get_all_field_indices(name)
            flag = "--column" if len(self.task.inputs) == 1 else f"--columns.{task_input}"
            if not found:
                hint = meant(name, schema.names)
                raise ColumnError(f"no column {name!r} for the task's input {task_input!r}; {hint} Name it with {flag}")
            if len(found) > 1:
                raise ColumnError(f"column {name!r} stands {len(found)} times in the table; rename all but one")
            if not self.task.readable(task_input, kind := schema.field(found[0]).type):
                raise ColumnError(f"column {name!r} is {kind}, not text: cast it, or name another with {flag}")
        for name in schema.names:
            # Spark, and SQL at large, do not tell capitals apart.
            if self.output_field.name.casefold() == name.casefold():
                raise ColumnError(
                    f"the table already has a column {name!r}; give the annotation another name than "
                    f"{self.output_field.name!r} with --name (name: in a job file)"
                )

    def annotate(self, inputs: Sequence[pa.Array | pa.ChunkedArray]) -> pa.Array:
        """Annotate arrays, one per task input and of equal length.

        Returns:
            An array of `output_field.type`; null where any input is null.
        """
        arrays = [
            self.task.read(task_input, array, column)
            for task_input, array, column in zip(self.task.inputs, inputs, self.input_columns, strict=True)
        ]
        known = pa.array(np.ones(len(arrays[0]), bool))
        for array in arrays:
            known = pc.and_(known, array.is_valid())
            if self.task.blank_is_null:
                known = pc.and_(known, pc.invert(pc.fill_null(is_blank(array), True)))
        which = np.flatnonzero(known.to_numpy(zero_copy_only=False))
        if not len(which):
            return pa.nulls(len(known), self.output_field.type)
        distinct, codes = _distinct([array.take(pa.array(which)) for array in arrays])
        annotations = self._annotations(distinct)
        indices = np.zeros(len(known), np.int64)
        indices[which] = codes
        take = pa.array(indices, mask=~known.to_numpy(zero_copy_only=False))
        return annotations.take(take)

    def _annotations(self, distinct: list[pa.Array]) -> pa.Array:
        """The annotations of U distinct rows, none of them null in an input."""
        parts = []
        for start, size, pieces in self._encoded(distinct):
            inputs = [array.slice(start, size) for array in distinct]
            part = self.task.decode(self.outputs_of(pieces), pieces, inputs)
            parts.append(part if part.type == self.output_field.type else part.cast(self.output_field.type))
        return pa.concat_arrays(parts)

    def outputs(self, inputs: Sequence[pa.Array]) -> Outputs:
        """What the model says of rows none of which is null: the task's outputs, not yet decoded."""
        return self.outputs_of(self.task.encode(self.tokenizer, inputs))

    def _encoded(self, distinct: list[pa.Array]) -> Iterator[tuple[int, int, Pieces]]:
        """Stretches of encoded rows (start, size, pieces), the next one made while the caller works on this one."""
        # A search takes far longer than tokenising, and a small batch of it nearly as many steps as a full one.
        windows = _windows(distinct, _LAST_WINDOW_TEXTS if self.task.generates else _FIRST_WINDOW_TEXTS)
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
            pending = None
            for start, size in windows:
                inputs = [array.slice(start, size) for array in distinct]
                upcoming = (start, size, thread.submit(self.task.encode, self.tokenizer, inputs))
                if pending:
                    yield pending[0], pending[1], pending[2].result()
                pending = upcoming
            if pending:
                yield pending[0], pending[1], pending[2].result()

    @torch.inference_mode()
    def outputs_of(self, pieces: Pieces) -> Outputs:
        """The task's outputs for P pieces that are encoded already.

        Raises:
            BundleError: some are no numbers, and would be taken for rows in which there is nothing to find.
        """
        tokens = pieces.tokens
        batches = plan(tokens.lengths, self._encoder.even(int(tokens.lengths.sum()), self.batch_tokens))

        def outputs(which: np.ndarray) -> torch.Tensor:
            batch = self.task.narrowed(pack_rows(tokens, which)).to(self.device)
            return self.task.forward(self.model, self._encoder(batch), batch).float()

        # One copy from the device at the end, so that no batch waits for the one before it.
        found = torch.cat(self._encoder.map(outputs, batches)).cpu().numpy()
        if not np.isfinite(found).all():
            raise BundleError(
                f"{self.bundle.reference} gives scores that are no numbers (NaN): train it again, or if it computes in "
                "fp16 here, give dtype fp32 (--dtype fp32)"
            )
        order = np.concatenate(batches)
        offsets = None
        if self.task.level == "token":
            order, offsets = ranges(tokens.offsets[order], tokens.offsets[order + 1]), tokens.offsets
        values = np.empty_like(found)
        values[order] = found
        return Outputs(values=values, offsets=offsets)


def _bytes(array: pa.ChunkedArray) -> int:
    """How large a column is, about: of a dictionary that chunks share, and of a slice, what is its own."""
    whole = array.get_total_buffer_size()
    try:
        return min(whole, array.nbytes)
    except pa.ArrowTypeError:  # Of views, until pyarrow tells their bytes.
        return whole


def _distinct(arrays: list[pa.Array]) -> tuple[list[pa.Array], np.ndarray]:
    """Distinct rows of the given columns, and for each row which of them it is, int64 (B,)."""
    encoded = [array.dictionary_encode() for array in arrays]
    codes = [array.indices.to_numpy().astype(np.int64) for array in encoded]
    if len(arrays) == 1:
        return [encoded[0].dictionary], codes[0]
    joined = codes[0]
    for code in codes[1:]:
        # Numbered anew after each column, so that the product stays below the square of the rows.
        _, joined = np.unique(joined, return_inverse=True)
        joined = joined * (int(code.max()) + 1) + code
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    return [array.take(pa.array(first)) for array in arrays], inverse


def _windows(distinct: list[pa.Array], most: int) -> Iterator[tuple[int, int]]:
    """(start, size) of the windows that are tokenised at a time, the first of at most `most` texts."""
    total = len(distinct[0])
    ends = np.cumsum(sum(pc.binary_length(array).to_numpy(zero_copy_only=False) for array in distinct))
    start = 0
    while start < total:
        before = int(ends[start - 1]) if start else 0
        by_bytes = int(np.searchsorted(ends, before + _WINDOW_BYTES, side="right")) - start
        size = min(most, total - start, max(1, by_bytes))
        yield start, size
        start += size
        most = min(most * 4, _LAST_WINDOW_TEXTS)


def _device_and_precision(device: str, dtype: str) -> tuple[torch.device, str]:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError(f"nothing here computes on {chosen.type}")
    except RuntimeError as error:
        raise JobError(f"device is {device!r}: it is one of auto, cpu, cuda, or cuda:1 and the like") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"device is {device!r}, but torch finds no GPU here: use device: cpu or auto")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BundleError(
            f"device is {device!r}, but torch finds {torch.cuda.device_count()} GPUs here, from cuda:0 on"
        )
    if dtype == "auto":
        half = "bf16" if multiplies_bf16(chosen) else "fp16"
        dtype = half if chosen.type == "cuda" else "fp32"
    return chosen, dtype
