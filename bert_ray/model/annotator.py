"""Arrow in, Arrow out: the one way a row is ever annotated.

    Annotator(table) -> tokenise -> pack -> forward -> decode -> the annotation as a column

Identical texts of one call are computed once. Tokenising runs in a thread of its own, a window of texts ahead of the
forward pass (the tokenizer is Rust and lets go of Python's lock).

Shapes: B rows, U distinct texts, T tokens of a packed batch, C width of a task's output.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.bundle import Bundle, load_bundle
from bert_ray.model.inference_encoder import InferenceEncoder
from bert_ray.model.packing import pack_rows, plan
from bert_ray.model.tokenization import Ragged, Tokenizer, as_strings, is_blank, is_text

# Texts tokenised at a time. The first windows are small, so that the forward pass starts at once; later ones are wide
# enough that the last, half-filled batch of a window is a small part of it.
_FIRST_WINDOW_TEXTS, _LAST_WINDOW_TEXTS = 64, 2048
# A window also ends at this much text, which bounds memory where rows are huge.
_WINDOW_BYTES = 16 * 2**20


@dataclass(kw_only=True, frozen=True, slots=True)
class AnnotatorSpec:
    """A small, picklable description of an annotator: what travels to a worker.

    Attributes:
        model: a bundle reference; resolved again on the worker.
        columns: (task input, table column) pairs; an input that is not named reads the column of its own name.
        name: the annotation's column name; None: the card's, else the task's.
        scores: also give every label's score, where the task has labels.
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
    batch_tokens: int | None = None
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.columns, Mapping):
            object.__setattr__(self, "columns", tuple(self.columns.items()))
        if self.dtype not in ("auto", "fp32", "bf16", "fp16"):
            raise JobError(f"dtype is {self.dtype!r}; it is one of auto, fp32, bf16, fp16")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise JobError(f"batch_tokens is {self.batch_tokens}; it is at least 1")

    def build(self) -> Annotator:
        """The annotator of this description, built once per process."""
        return _build(self)


@lru_cache(maxsize=16)
def _build(spec: AnnotatorSpec) -> Annotator:
    return Annotator(load_bundle(spec.model), spec)


class Annotator:
    """Appends a bundle's annotation to Arrow tables.

    Attributes:
        bundle: the bundle.
        output_field: name and Arrow type of the annotation, as the task declares it.
        input_columns: the columns read, one per task input.
    """

    def __init__(self, bundle: Bundle, spec: AnnotatorSpec | None = None) -> None:
        spec = spec or AnnotatorSpec(model=bundle.reference)
        if spec.fingerprint and spec.fingerprint != bundle.fingerprint:
            raise BundleError(
                f"{bundle.reference}: fingerprint {bundle.fingerprint[:12]} is not the expected "
                f"{spec.fingerprint[:12]}: the model changed, or this machine holds another one under that name"
            )
        self.bundle = bundle
        self.task = bundle.task
        self.scores = spec.scores
        renamed = dict(spec.columns)
        if strange := sorted(set(renamed) - set(self.task.inputs)):
            raise ColumnError(f"{self.task.kind} has no input {strange[0]!r}; its inputs are {self.task.inputs}")
        self.input_columns = tuple(renamed.get(name, name) for name in self.task.inputs)
        self.output_field = pa.field(spec.name or self.task.name, self.task.output_type(spec.scores))
        if spec.threads:
            torch.set_num_threads(spec.threads)
        self.device, self.dtype = _device_and_dtype(spec.device, spec.dtype)
        self._tokenizer = Tokenizer(bundle.tokenizer(), bundle.card.max_length)
        self._model = bundle.model().to(self.device, self.dtype)
        self._encoder = InferenceEncoder(self._model)
        self.batch_tokens = spec.batch_tokens or self._encoder.batch_tokens

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
        annotation = self.annotate([table.column(name) for name in self.input_columns])
        return table.append_column(self.output_field, annotation)

    def check(self, schema: pa.Schema) -> None:
        """Raise a ColumnError that names the remedy where a table of this schema cannot be annotated."""
        for task_input, name in zip(self.task.inputs, self.input_columns, strict=True):
            found = schema.get_all_field_indices(name)
            if not found:
                near = difflib.get_close_matches(name, schema.names, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {schema.names}."
                raise ColumnError(
                    f"no column {name!r} for the task's input {task_input!r}; {hint} Name it with --column"
                )
            if len(found) > 1:
                raise ColumnError(f"column {name!r} stands {len(found)} times in the table; rename all but one")
            if not is_text(kind := schema.field(found[0]).type):
                raise ColumnError(f"column {name!r} is {kind}, not text: cast it, or name another with --column")
        if self.output_field.name in schema.names:
            raise ColumnError(
                f"the table already has a column {self.output_field.name!r}; give the annotation another name "
                "with --name (name: in a job file)"
            )

    def annotate(self, inputs: Sequence[pa.Array | pa.ChunkedArray]) -> pa.Array:
        """Annotate arrays, one per task input and of equal length.

        Returns:
            An array of `output_field.type`; null where any input is null.
        """
        arrays = [as_strings(array, name) for array, name in zip(inputs, self.input_columns, strict=True)]
        known = pa.array(np.ones(len(arrays[0]), bool))
        for array in arrays:
            known = pc.and_(known, array.is_valid())
            if self.task.blank_is_null:
                known = pc.and_(known, pc.invert(pc.fill_null(is_blank(array), True)))
        which = np.flatnonzero(known.to_numpy(zero_copy_only=False))
        if not len(which):
            return pa.nulls(len(known), self.output_field.type)
        distinct, codes = _distinct([array.take(pa.array(which)) for array in arrays])
        annotations = self.task.decode(self._outputs(distinct), self.scores)
        indices = np.zeros(len(known), np.int64)
        indices[which] = codes
        take = pa.array(indices, mask=~known.to_numpy(zero_copy_only=False))
        return annotations.take(take).cast(self.output_field.type)

    def _outputs(self, distinct: list[pa.Array]) -> np.ndarray:
        """The task's outputs for U distinct rows: float32 (U, C)."""
        outputs: np.ndarray | None = None
        for start, ragged in self._tokenised(distinct):
            values = self.outputs_of_tokens(ragged)
            if outputs is None:
                outputs = np.empty((len(distinct[0]), values.shape[1]), np.float32)
            outputs[start : start + len(values)] = values
        assert outputs is not None  # There is at least one distinct row.
        return outputs

    def _tokenised(self, distinct: list[pa.Array]) -> Iterator[tuple[int, Ragged]]:
        """Windows of tokenised rows, the next one made while the caller works on this one."""
        windows = _windows(distinct)
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
            pending = None
            for start, size in windows:
                upcoming = (start, thread.submit(self._tokenizer, [array.slice(start, size) for array in distinct]))
                if pending:
                    yield pending[0], pending[1].result()
                pending = upcoming
            if pending:
                yield pending[0], pending[1].result()

    @torch.inference_mode()
    def outputs_of_tokens(self, ragged: Ragged) -> np.ndarray:
        """The task's outputs for rows that are tokenised already: float32 (B, C)."""
        batches = plan(ragged.lengths, self.batch_tokens)

        def outputs_of(rows: np.ndarray) -> torch.Tensor:
            batch = pack_rows(ragged, rows).to(self.device)
            return self.task.forward(self._model, self._encoder(batch), batch).float()

        # One copy from the device at the end, so that no batch waits for the one before it.
        values = torch.cat(self._encoder.map(outputs_of, batches)).cpu().numpy()
        outputs = np.empty_like(values)
        outputs[np.concatenate(batches)] = values
        return outputs


def _distinct(arrays: list[pa.Array]) -> tuple[list[pa.Array], np.ndarray]:
    """Distinct rows of the given columns, and for each row which of them it is, int64 (B,)."""
    encoded = [array.dictionary_encode() for array in arrays]
    codes = [array.indices.to_numpy().astype(np.int64) for array in encoded]
    if len(arrays) == 1:
        return [encoded[0].dictionary], codes[0]
    joined = codes[0] * len(encoded[1].dictionary) + codes[1]
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    return [array.take(pa.array(first)) for array in arrays], inverse


def _windows(distinct: list[pa.Array]) -> Iterator[tuple[int, int]]:
    """(start, size) of the windows that are tokenised at a time."""
    total = len(distinct[0])
    ends = np.cumsum(sum(pc.binary_length(array).to_numpy(zero_copy_only=False) for array in distinct))
    start, most = 0, _FIRST_WINDOW_TEXTS
    while start < total:
        before = int(ends[start - 1]) if start else 0
        by_bytes = int(np.searchsorted(ends, before + _WINDOW_BYTES, side="right")) - start
        size = min(most, total - start, max(1, by_bytes))
        yield start, size
        start += size
        most = min(most * 4, _LAST_WINDOW_TEXTS)


def _device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"device is {device!r}, but torch finds no GPU here: use device: cpu or auto")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype == "auto":
        half = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
        dtype = half if chosen.type == "cuda" else "fp32"
    return chosen, names[dtype]
