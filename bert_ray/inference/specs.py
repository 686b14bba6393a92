"""From what a user says about a model and its columns to the description of an annotator that travels to workers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bert_ray.errors import ColumnError, JobError

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator, AnnotatorSpec


def annotator_of(
    model: str | os.PathLike[str],
    *,
    column: str | None = None,
    columns: Mapping[str, str] | None = None,
    elsewhere: bool = True,
    **options: Any,
) -> tuple[AnnotatorSpec, Annotator]:
    """The description for workers, and this process's own annotator of it, which tells types and checks columns.

    Args:
        model: a bundle reference. A local directory is made absolute: a worker may run elsewhere.
        column: the table column of a task with one input.
        columns: table columns by task input.
        elsewhere: the work is done by other processes. Device, dtype and threads are then theirs alone: the annotator
            given back works on the CPU and leaves torch's threads as they are.
        **options: other fields of `AnnotatorSpec`.

    Returns:
        The spec, with the bundle's fingerprint, so that no worker annotates with another model; and the annotator.

    Raises:
        BundleError: the reference resolves to nothing usable.
        JobError: an option has no such value.
        ColumnError: `column` for a task of several inputs, or `columns` names an input that the task does not have.
    """
    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.model.bundle import load_bundle

    reference = os.fspath(model)
    if os.path.isdir(os.path.expanduser(reference)):
        reference = os.path.realpath(os.path.expanduser(reference))
    bundle = load_bundle(reference)
    pairs = dict(columns or {})
    try:
        spec = AnnotatorSpec(model=reference, fingerprint=bundle.fingerprint, **options)
    except (ValueError, TypeError) as error:
        raise JobError(str(error)) from error
    if column is not None:
        inputs = spec.task_of(bundle).inputs
        if pairs or len(inputs) != 1:
            raise ColumnError(
                f"the task reads {len(inputs)} columns ({', '.join(inputs)}): say with columns which column is which"
            )
        pairs = {inputs[0]: column}
    spec = dataclasses.replace(spec, columns=tuple(pairs.items()))
    here = dataclasses.replace(spec, device="cpu", dtype="auto", threads=None) if elsewhere else spec
    return spec, here.build()
