"""The SQL functions.

    functions.register(session, models="models/")
    session.sql("SELECT source, bert_sentiment(text).label, count(*) FROM reviews GROUP BY ALL")

Each is an Arrow UDF over iterators: a Python worker builds the model once and keeps it. To the planner they are
nondeterministic, so that it never writes one into a query twice; a price is that Spark then refuses them inside an
aggregate or a join condition, where the remedy is to compute the column in a subquery.

| function | gives |
|---|---|
| `bert_sentiment(text)` | STRUCT<label: STRING, score: FLOAT, scores: MAP<STRING, FLOAT>> |
| `ai_analyze_sentiment(text)` | STRING: the label, as the hosted lakehouses' function of this name |

NULL in, NULL out; blank text gives NULL as well.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import SparkSession
from pyspark.sql.functions import arrow_udf
from pyspark.sql.pandas.types import from_arrow_type

from bert_ray.errors import BundleError, JobError, why
from bert_ray.inference.spark import on_gpu, spark_array, worker_threads
from bert_ray.inference.specs import annotator_of

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator, AnnotatorSpec

_CARD = "bert_ray.json"
_SENTIMENT = "sentiment"
# What Arrow and SQL spell alike.
_SPELT_ALIKE = (pa.types.is_null, pa.types.is_integer, pa.types.is_boolean, pa.types.is_date)


def register(
    session: SparkSession,
    models: str | os.PathLike[str] | Mapping[str, str],
    *,
    threads: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Make the SQL functions callable in a session, by every query and by every user of it.

    Args:
        session: the SparkSession, used as it is.
        models: a directory of bundles (each is known by its card's name, else by its directory's), one bundle, or
            references by name: {"sentiment": "models/sentiment"}.
        threads: torch threads per Python worker; default: the cores among the tasks that run at a time.
        **options: `batch_tokens`, `device`, `dtype` (see `AnnotatorSpec`).

    Returns:
        The functions by name, to be called on columns: `functions["bert_sentiment"]("text")`.

    Raises:
        JobError: there is no sentiment model among `models`.
        BundleError: it cannot be used.
    """
    references = models if isinstance(models, Mapping) else _bundles(Path(models))
    if _SENTIMENT not in references:
        raise JobError(
            f"no model named {_SENTIMENT!r} among {sorted(references) or 'the models (there are none)'}: train one "
            f"(bert-ray train), or name one: register(session, {{{_SENTIMENT!r}: REFERENCE}})"
        )
    spec, annotator = annotator_of(references[_SENTIMENT], scores=True, **options)
    if annotator.task.kind != "classification":
        raise JobError(f"{references[_SENTIMENT]} is a model for {annotator.task.kind}; sentiment wants classification")
    if len(annotator.task.inputs) != 1:
        raise JobError(f"{references[_SENTIMENT]} reads {', '.join(annotator.task.inputs)}; sentiment is of one text")
    spec = dataclasses.replace(spec, threads=threads or worker_threads(session))
    kinds: dict[str, tuple[Callable[[pa.Array], pa.Array], pa.DataType]] = {
        "bert_sentiment": (spark_array, annotator.output_field.type),
        "ai_analyze_sentiment": (_label, pa.string()),
    }
    made = {}
    for name, (finish, kind) in kinds.items():
        function = arrow_udf(_on_arrays(spec, finish), from_arrow_type(kind)).asNondeterministic()
        made[name] = session.udf.register(name, function)
    return made


def _on_arrays(
    spec: AnnotatorSpec, finish: Callable[[pa.Array], pa.Array]
) -> Callable[[Iterator[pa.Array]], Iterator[pa.Array]]:
    """The function that runs on the workers; Spark reads its kind off the annotations."""

    def annotate(arrays: Iterator[pa.Array]) -> Iterator[pa.Array]:
        annotator = on_gpu(spec).build()  # The same object for all tasks and all functions of this process.
        for array in arrays:
            yield finish(annotator.annotate([_as_text(array, annotator)]))

    return annotate


def _as_text(array: pa.Array, annotator: Annotator) -> pa.Array:
    """Whole numbers, dates and booleans as SQL spells them, which casts them into a STRING argument.

    Of bytes that are no UTF-8 the annotator makes U+FFFD, as in a STRING.
    """
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return array.cast(pa.large_string(), safe=False)
    if any(spelt(kind) for spelt in _SPELT_ALIKE):
        return array.cast(pa.string())
    # Fractions, times and what is nested Arrow would spell otherwise than SQL does.
    raise TypeError(f"{annotator.output_field.name} reads text, not {kind}: pass CAST(… AS STRING)")


def _label(annotation: pa.Array) -> pa.Array:
    return pc.struct_field(annotation, "label")


def _bundles(directory: Path) -> dict[str, str]:
    """References to the bundles in a directory, or to the directory if it is one, by name."""
    if not directory.expanduser().is_dir():
        raise JobError(f"there is no directory {directory}: give a directory of bundles, or references by name")
    from bert_ray.model.bundle import load_bundle

    directory = directory.expanduser()
    if _is_bundle(directory):
        return {load_bundle(directory).card.name or directory.name: str(directory)}
    found: dict[str, str] = {}
    unusable = []
    # Names with a dot in front are of directories that are being made, or were when their process was killed.
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise JobError(f"{directory} cannot be listed: {why(error)}; give references by name instead") from error
    for path in (directory / name for name in names if name[0] != "." and _is_bundle(directory / name)):
        try:
            name = load_bundle(path).card.name or path.name
        except BundleError as error:
            unusable.append(error)
            continue
        if name in found:
            raise JobError(f"{found[name]} and {path} are both named {name!r}: give references by name instead")
        found[name] = str(path)
    if unusable and _SENTIMENT not in found:
        raise unusable[0]
    return found


def _is_bundle(path: Path) -> bool:
    # Not Path.exists: of a directory that may not be entered it raises.
    return any(os.path.exists(path / name) for name in (_CARD, "config.json"))
