"""How well embeddings find what belongs to a text: the place of its own second text among those of all pairs.

Shapes: B pairs, D hidden size, M distinct second texts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bert_ray.model.tasks.sections import Case, Cases, Section, Table, shown, strings_at
from bert_ray.model.tokenization import to_python_strings

# Cosines that are held at a time: 256 MB.
_COSINES = 2**26
# Places that the report's table names.
_PLACES = (1, 3, 5, 10, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Where each pair's second text stands by the cosine with its first.

    Equal second texts count as one. Of equal cosines the worst place counts, so that a model which gives all texts one
    vector does not look good.

    Attributes:
        places: int64 (B,), from 1.
        own: float32 (B,), the cosine of the pair's own second text.
        nearest: int64 (B,), the pair whose second text is the nearest of all others; the pair itself if there is none.
        other: float32 (B,), the cosine with that one; -inf if there is none.
        candidates: M.
    """

    places: np.ndarray
    own: np.ndarray
    nearest: np.ndarray
    other: np.ndarray
    candidates: int

    def metrics(self) -> dict[str, float]:
        """mrr, the mean of 1 / place; and recall@1, the share in the first place."""
        return {"mrr": float((1 / self.places).mean()), "recall@1": float((self.places == 1).mean())}


def ranking(first: np.ndarray, second: np.ndarray, digests: np.ndarray) -> Ranking:
    """Rank all second texts for each first one.

    Args:
        first: vectors of the first texts, float32 (B, D), of unit length.
        second: of the second.
        digests: whole numbers (B,), equal for equal second texts.
    """
    _, distinct, own = np.unique(digests, return_index=True, return_inverse=True)
    candidates, rows = second[distinct], len(first)
    places, nearest = np.empty(rows, np.int64), np.empty(rows, np.int64)
    mine, other = np.empty(rows, np.float32), np.empty(rows, np.float32)
    step = max(1, _COSINES // max(1, len(candidates)))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        # A vector of an overflow is near to nothing, its own pair neither.
        cosines = np.nan_to_num(first[some] @ candidates.T, nan=-np.inf)
        at = np.arange(len(cosines)), own[some]
        mine[some] = cosines[at]
        places[some] = (cosines >= mine[some, None]).sum(1)
        cosines[at] = -np.inf
        best = cosines.argmax(1)
        other[some] = cosines[at[0], best]
        nearest[some] = np.where(np.isfinite(other[some]), distinct[best], np.arange(rows)[some])
    return Ranking(places=places, own=mine, nearest=nearest, other=other, candidates=len(candidates))


def digests_of(texts: pa.Array) -> np.ndarray:
    """A number for each text, equal for equal ones, int64 (B,); the same in every table and process."""
    digest = (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8) for text in to_python_strings(texts)
    )
    return np.fromiter((int.from_bytes(item.digest(), "big", signed=True) for item in digest), np.int64, len(texts))


def ranking_report(found: Ranking, texts: pa.Array, pairs: pa.Array, most: int) -> list[Section]:
    """How many texts find their own pair among the first so many, and those that another one is nearer to.

    Args:
        found: of `ranking`.
        texts: the first texts, (B,).
        pairs: the second, (B,).
        most: mistakes to show, the surest first; and a quarter as many right ones.
    """
    rows = [(f"{place}", float((found.places <= place).mean())) for place in _PLACES if place < found.candidates]
    table = Table(
        key="places",
        title="How far one has to look",
        header=("its own pair is among the first", "share of texts"),
        rows=(*rows, ("all", 1.0)),
        note=f"Of {found.candidates:,} different texts: the more there are, the harder it is to be first.",
    )
    sections: list[Section] = [table]
    ahead = found.own - found.other
    for key, title, chosen, count in (
        ("mistakes", "Texts that another one is nearest to, the farthest off first", found.places > 1, most),
        ("right", "Texts that their own pair is nearest to", found.places == 1, -(-most // 4)),
    ):
        numbers = np.flatnonzero(chosen)
        numbers = numbers[np.argsort(ahead[numbers] * (1 if key == "mistakes" else -1), kind="stable")][:count]
        said = np.where(found.places[numbers] > 1, found.nearest[numbers], numbers)
        columns = (strings_at(array, at.tolist()) for array, at in ((texts, numbers), (pairs, said), (pairs, numbers)))
        cases = tuple(
            Case(
                row=int(row),
                texts=(("text", shown(text)),),
                said=shown(nearest),
                so=shown(own),
                right=key == "right",
                detail=f"cosine {found.own[row]:.2f} with its own, place {found.places[row]:,}; "
                f"{found.other[row]:.2f} with the nearest other",
            )
            for row, text, nearest, own in zip(numbers.tolist(), *columns, strict=True)
        )
        if cases:
            sections.append(Cases(key=key, title=title, cases=cases, long=True))
    return sections
