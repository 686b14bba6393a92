"""SQuAD's exact match and F1 of answers, and the threshold below which no answer is better than the best one.

After the official scripts of SQuAD (Rajpurkar et al., arXiv 1606.05250 and 1806.03822, evaluate-v2.0.py). One step is
added: in scripts without spaces each character counts as a word, and what Unicode calls punctuation is none, as in
MLQA's script for Chinese (Lewis et al., arXiv 1910.07475). On text in Latin script the figures are those of the
official script.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "，。、；：？！（）《》「」『』【】")
# Han, kana: the characters that stand for themselves.
_WITHOUT_SPACES = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def words_of(answer: str | None) -> list[str]:
    """What is compared: lower case, without punctuation and articles. None, no answer, has no words."""
    if not answer:
        return []
    plain = _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION))
    if _WITHOUT_SPACES.search(plain):
        plain = "".join(sign for sign in plain if not unicodedata.category(sign).startswith("P"))
    return _WITHOUT_SPACES.sub(r" \1 ", plain).split()


def exact_match(said: str | None, so: str | None) -> float:
    """1 where both have the same words, else 0; "no answer" equals "no answer" alone."""
    return float((said is None) == (so is None) and words_of(said) == words_of(so))


def f1(said: str | None, so: str | None) -> float:
    """Harmonic mean of precision and recall over words; 1 or 0 where either is no answer."""
    if said is None or so is None:
        return float(said is so)
    one, other = words_of(said), words_of(so)
    if not one or not other:
        return float(one == other)
    same = sum((Counter(one) & Counter(other)).values())
    return 2.0 * same / (len(one) + len(other))


def best_threshold(differences: np.ndarray, answered: np.ndarray, unanswered: np.ndarray) -> float:
    """The threshold with the best sum of gains: rows with a difference above it are not answered.

    As `find_best_thresh` of evaluate-v2.0.py, but half-way between two rows, so that new rows fall evenly.

    Args:
        differences: float64 (B,), the score of no answer minus that of the best one; inf where there is none.
        answered: float64 (B,), what answering the row gains.
        unanswered: float64 (B,), what not answering it gains.
    """
    order = np.argsort(differences, kind="stable")
    sorted_ = np.nan_to_num(differences[order], posinf=1e4, neginf=-1e4)
    # gains[k]: the first k rows are answered.
    gains = np.concatenate([[0.0], np.cumsum((answered - unanswered)[order])])
    edges = np.concatenate([[sorted_[0] - 2.0], sorted_, [sorted_[-1] + 2.0]])
    gains[1:-1][np.diff(sorted_) == 0] = -np.inf  # Equal rows cannot be told apart.
    best = int(gains.argmax())
    return float((edges[best] + edges[best + 1]) / 2)


def mean_scores(said: Sequence[str | None], so: Sequence[str | None]) -> dict[str, float]:
    """Mean F1 and exact match; with unanswerable rows also F1 of the others, and how often null was right.

    Returns:
        f1, exact_match; and, where some of `so` are None: answerable_f1 (where any has an answer), null_accuracy (the
        share of all rows for which whether there is an answer was judged rightly).
    """
    matches = [f1(one, other) for one, other in zip(said, so, strict=True)]
    exact = [exact_match(one, other) for one, other in zip(said, so, strict=True)]
    found = {"f1": float(np.mean(matches)), "exact_match": float(np.mean(exact))}
    has = np.array([other is not None for other in so])
    if not has.all():
        if has.any():
            found["answerable_f1"] = float(np.array(matches)[has].mean())
        found["null_accuracy"] = float((np.array([one is not None for one in said]) == has).mean())
    return found
