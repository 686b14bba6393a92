"""One schema for a table whose files may differ: which differences are bridged, and how a batch is brought to it.

Bridged without loss: a column that only some files have (null elsewhere), a column of nulls, text in another layout
(string, large_string, string_view, dictionary), numbers of another width, structs with more fields. Any other
difference is a conflict, and the file that came later in path order is the one at fault.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pyarrow import types

# Iceberg and Spark number their columns; with the annotation beside them the numbers would no longer tell the truth.
_FIELD_ID = b"PARQUET:field_id"


def plain(schema: pa.Schema) -> pa.Schema:
    """The schema without the metadata of its writer (Spark's and pandas' describe the columns of their own file)."""
    fields = []
    for field in schema:
        kept = {key: value for key, value in (field.metadata or {}).items() if key != _FIELD_ID}
        fields.append(field.with_metadata(kept or None))
    return pa.schema(fields)


def merge(table: pa.Schema, file: pa.Schema) -> pa.Schema:
    """The table's schema with a file's brought in: new columns at the end, types widened, conflicts left alone."""
    fields = {field.name: field for field in table}
    for field in plain(file):
        known = fields.get(field.name)
        merged = field if known is None else merge_fields(known, field)
        fields[field.name] = merged if merged is not None else known
    return pa.schema(list(fields.values()))


def holds(field: pa.Field, other: pa.Field) -> bool:
    """Whether a field of a merged schema holds another's values without loss."""
    both = merge_fields(field, other)
    return both is not None and bool(both.type == field.type)


def merge_fields(one: pa.Field, other: pa.Field) -> pa.Field | None:
    """A field that holds the values of both without loss, None where there is none."""
    if one.type.equals(other.type):
        return one.with_nullable(one.nullable or other.nullable)
    if _is_text(one.type) and _is_text(other.type):
        large = types.is_large_string(one.type) or types.is_large_string(other.type)
        return one.with_type(pa.large_string() if large else pa.string())
    if not _goes_together(one.type, other.type):
        return None
    try:
        pair = [pa.schema([field.remove_metadata()]) for field in (one, other)]
        merged = pa.unify_schemas(pair, promote_options="permissive").field(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    return merged.with_metadata(one.metadata)


def conform(batch: pa.RecordBatch, target: pa.Schema, constants: Mapping[str, str | None]) -> pa.RecordBatch:
    """The batch with exactly the target's columns: cast, in order, constants for the partition, nulls for the rest.

    Raises:
        pa.ArrowInvalid: a value does not fit the target's type: a whole number beyond 2^53 where another file has the
            column as floats, a time beyond the years that nanoseconds reach.
    """
    columns = []
    for field in target:
        if field.name in batch.schema.names:
            column = batch.column(batch.schema.names.index(field.name))
            try:
                columns.append(column if column.type.equals(field.type) else column.cast(field.type))
            except pa.ArrowInvalid as error:
                raise pa.ArrowInvalid(
                    f"column {field.name!r} is {column.type}, but {field.type} in the table, for other files have it "
                    f"in another type, and a value does not fit ({error}): write those anew with {column.type}, or "
                    "leave the column out of what is kept"
                ) from error
        elif field.name in constants:
            # As the directory spells it; other files may hold the column as a number.
            columns.append(pa.repeat(pa.scalar(constants[field.name], pa.string()).cast(field.type), batch.num_rows))
        else:
            columns.append(pa.nulls(batch.num_rows, field.type))
    # Files disagree on what may be null; a column that is filled with nulls must be nullable in any case.
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema([field.with_nullable(True) for field in target]))


def _goes_together(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether what Arrow makes of both loses nothing: of text it would make bytes, of decimals floats."""
    if types.is_null(one) or types.is_null(other):
        return True
    if types.is_struct(one) and types.is_struct(other):
        shared = {field.name for field in one} & {field.name for field in other}
        return all(_goes_together(one.field(name).type, other.field(name).type) for name in shared)
    if types.is_map(one) and types.is_map(other):
        return _goes_together(one.key_type, other.key_type) and _goes_together(one.item_type, other.item_type)
    if _is_list(one) and _is_list(other):
        return _goes_together(one.value_type, other.value_type)
    if (types.is_decimal(one) and types.is_floating(other)) or (types.is_floating(one) and types.is_decimal(other)):
        return False
    return _is_bytes(one) == _is_bytes(other)


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
