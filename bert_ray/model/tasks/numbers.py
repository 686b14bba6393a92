"""What tasks share that say numbers: reading them, and how well they agree with the truth."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import ColumnError


def numbers(column: pa.Array | pa.ChunkedArray, task: str) -> pa.Array:
    """A column of numbers as float64; whole numbers beyond 2**53 are rounded.

    Raises:
        ColumnError: it is something else.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if not any(is_so(kind) for is_so in known):
        raise ColumnError(f"the label column is {kind}; task {task} goes by numbers: cast it, or name another")
    return pc.cast(column, pa.float64(), safe=False)


def correlations(said: np.ndarray, so: pa.Array) -> dict[str, float]:
    """Spearman's and Pearson's correlation, float (B,) each.

    0 where it is not defined: fewer than two rows, or the same number in all of them.
    """
    from scipy.stats import pearsonr, spearmanr

    truth = so.to_numpy(zero_copy_only=False).astype(float)
    defined = len(truth) > 1 and all(np.isfinite(values).all() and np.ptp(values) > 0 for values in (said, truth))
    return {
        "spearman": float(spearmanr(said, truth).statistic) if defined else 0.0,
        "pearson": float(pearsonr(said, truth).statistic) if defined else 0.0,
    }
