"""bert_ray: annotate the text in data lakes with BERT, and train the BERT that does it.

    annotator = bert_ray.load("models/sentiment")
    annotated = annotator(table)          # pyarrow.Table in, pyarrow.Table out, the annotation appended

`import bert_ray` is light: torch and transformers are imported by `load`, Ray and Spark by their own modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(reference: str, **options: Any) -> Annotator:
    """Load a bundle as an annotator.

    Args:
        reference: a local directory, `pkg:NAME/path` inside an installed package, a URI of a store that pyarrow.fs
            reads (`s3://…`), or a Hugging Face hub id.
        **options: the fields of `bert_ray.model.annotator.AnnotatorSpec` (`columns`, `name`, `scores`, `device`, …).

    Raises:
        BundleError: the reference resolves to nothing, or to a bundle that is unsafe, altered or of an unknown kind.
    """
    # Imported here: `import bert_ray` alone must not pull in torch or transformers.
    from bert_ray.model.annotator import AnnotatorSpec

    return AnnotatorSpec(model=reference, **options).build()
