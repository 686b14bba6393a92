"""The index of a FAQ bundle: question/answer pairs with their vectors, and the search in it.

`faq.parquet` holds id, question, answer (strings), question_vector and answer_vector (fixed_size_list<float32>[D], of
unit length), one row a pair.

Shapes: B asked questions, N pairs, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray.errors import BundleError

INDEX_FILE = "faq.parquet"

Match = Literal["question", "answer", "both"]

# Similarities held at a time, in numbers: 64 MiB of float32.
_BLOCK_NUMBERS = 2**24


@dataclass(kw_only=True, slots=True)
class FaqIndex:
    """The pairs.

    Attributes:
        id: string (N,).
        question: string (N,).
        answer: string (N,).
        question_vectors: float32 (N, D), of unit length.
        answer_vectors: float32 (N, D), of unit length.
    """

    id: pa.Array
    question: pa.Array
    answer: pa.Array
    question_vectors: np.ndarray
    answer_vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.id)

    def save(self, directory: Path) -> None:
        """Write `faq.parquet`."""
        columns: dict[str, pa.Array] = {"id": self.id, "question": self.question, "answer": self.answer}
        for name, vectors in (("question_vector", self.question_vectors), ("answer_vector", self.answer_vectors)):
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        pq.write_table(pa.table(columns), directory / INDEX_FILE, compression="zstd")

    @classmethod
    def load(cls, directory: Path, width: int) -> FaqIndex:
        """Read it.

        Args:
            directory: the bundle's.
            width: D of the model.

        Raises:
            BundleError: there is none, or it is damaged or of another model.
        """
        path = directory / INDEX_FILE
        if not path.exists():
            raise BundleError(f"{directory} has no {INDEX_FILE}: make a FAQ bundle with bert-ray train, task: faq")
        try:
            table = pq.read_table(path).combine_chunks()
            texts = [_whole(table.column(name)).cast(pa.string()) for name in ("id", "question", "answer")]
            vectors = []
            for name in ("question_vector", "answer_vector"):
                column = _whole(table.column(name))
                vectors.append(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size))
        except (KeyError, ValueError, AttributeError, OSError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        if vectors[0].shape[1] != width:
            raise BundleError(f"{path} has vectors of {vectors[0].shape[1]} numbers, the model of {width}")
        return cls(
            id=texts[0],
            question=texts[1],
            answer=texts[2],
            question_vectors=vectors[0],
            answer_vectors=vectors[1],
        )

    def similarities(self, vectors: np.ndarray, match: Match) -> np.ndarray:
        """Cosine of each asked question with each pair, float32 (B, N): its question, its answer or the better."""
        if match == "question":
            return vectors @ self.question_vectors.T
        found = vectors @ self.answer_vectors.T
        return np.maximum(found, vectors @ self.question_vectors.T) if match == "both" else found

    def blocks(self, rows: int) -> list[slice]:
        """Stretches of asked questions whose similarities fit memory."""
        size = max(1, _BLOCK_NUMBERS // max(1, len(self)))
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def best(self, vectors: np.ndarray, match: Match) -> tuple[np.ndarray, np.ndarray]:
        """For each row of `vectors`, float32 (B, D) of unit length: the nearest pair, int64 (B,), and its cosine."""
        pairs, scores = np.zeros(len(vectors), np.int64), np.zeros(len(vectors), np.float32)
        for rows in self.blocks(len(vectors)):
            found = self.similarities(vectors[rows], match)
            pairs[rows] = found.argmax(axis=1)
            scores[rows] = np.take_along_axis(found, pairs[rows][:, None], axis=1)[:, 0]
        return pairs, scores

    def ranks(self, vectors: np.ndarray, match: Match, right: pa.Array) -> np.ndarray:
        """The place, from 1, of the first pair whose id (else whose answer) is `right`; 0 where there is no such.

        Args:
            vectors: float32 (B, D), of unit length.
            match: what is compared.
            right: string (B,).
        """
        by_id, by_answer = _places(self.id), _places(self.answer)
        ranks = np.zeros(len(vectors), np.int64)
        names = right.to_pylist()
        for rows in self.blocks(len(vectors)):
            found = self.similarities(vectors[rows], match)
            for row, similarities in zip(range(rows.start, rows.stop), found, strict=True):
                wanted = by_id.get(names[row]) or by_answer.get(names[row])
                if wanted:
                    # Of equal similarities the first pair is nearer, as `best` has it.
                    best = wanted[int(similarities[wanted].argmax())]
                    ahead = (similarities > similarities[best]).sum()
                    ranks[row] = 1 + ahead + (similarities[:best] == similarities[best]).sum()
        return ranks


def _whole(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return pa.concat_arrays(found.chunks) if isinstance(found, pa.ChunkedArray) else found


def _places(names: pa.Array) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names.to_pylist()):
        found.setdefault(name, []).append(place)
    return found
