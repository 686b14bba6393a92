"""TF-IDF with logistic regression: what a BERT has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bert_ray.errors import JobError
from bert_ray.model.tasks.spans import WITHOUT_BLANKS

# Share of CJK characters from which on a text is taken to have no blanks between words.
_UNSPACED = 0.2


def fit_tfidf(texts: Sequence[str], labels: Sequence[Any], seed: int = 0) -> Any:
    """Fit scikit-learn's pipeline: words and pairs of words, or one to three characters where words have no blanks.

    Args:
        texts: N texts.
        labels: N labels.
        seed: of the solver.

    Returns:
        A fitted pipeline: `predict(texts)`, `predict_proba(texts)`.

    Raises:
        JobError: the texts have no words, or the labels are all the same.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    kind: dict[str, Any] = {"analyzer": "char", "ngram_range": (1, 3)} if unspaced(texts) else {"ngram_range": (1, 2)}
    words = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(texts) > 999 else 1, **kind)
    # C=10: weaker regularisation than scikit-learn's default of 1, as sparse texts want it.
    pipeline = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000, random_state=seed))
    try:
        return pipeline.fit(texts, labels)
    except ValueError as error:  # scikit-learn says what is wrong: no word of two letters, one class only.
        raise JobError(f"{len(texts)} texts cannot be learned from by words: {error}") from error


def unspaced(texts: Sequence[str]) -> bool:
    """Whether these texts are mostly of a script without blanks between words."""
    sample = "".join(texts[:200])
    letters = sum(character.isalpha() for character in sample)
    found = sum(first <= ord(character) <= last for character in sample for first, last in WITHOUT_BLANKS)
    return found > _UNSPACED * max(1, letters)
