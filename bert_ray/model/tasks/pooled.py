"""What tasks share whose outputs are vectors of texts: prompt, pooling, and the layout of sentence-transformers.

Shapes: B rows, P pieces, T tokens of a packed batch, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from bert_ray.errors import BundleError
from bert_ray.model.card import read_json
from bert_ray.model.tasks.base import Options, Task
from bert_ray.model.tasks.heads import by_row, of_first

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.base import Outputs
    from bert_ray.model.tokenization import Pieces, Tokenizer


@dataclass(kw_only=True, frozen=True, slots=True)
class PromptOptions(Options):
    """What may be chosen per call.

    Attributes:
        prompt: what a model wants to read before every text, such as "query: ".
    """

    prompt: str = ""


class PooledTask(Task):
    """A task over one vector of each text.

    Pooling as the card says: the mean over all tokens of a piece, or its first token; scaled to unit length where the
    card says so.
    """

    blank_is_null: ClassVar[bool] = False
    options_type: ClassVar[type[Options]] = PromptOptions
    inherits: ClassVar[tuple[str, ...]] = ("prompt",)

    def auto_class(self) -> Any:
        """AutoModel."""
        from transformers import AutoModel

        return AutoModel

    def attach(self, bundle: Bundle) -> None:
        """Check that a prompt may be pooled.

        Raises:
            BundleError: sentence-transformers would leave it out of the mean.
        """
        super().attach(bundle)
        settings = bundle.directory / "1_Pooling" / "config.json"
        if self.options.prompt and self.card.pooling == "mean" and settings.exists():
            if read_json(settings, what=str(settings)).get("include_prompt", True):
                return
            raise BundleError(
                f"{bundle.reference}: 1_Pooling leaves the prompt {self.options.prompt!r} out of the mean "
                "(include_prompt: false), which is not supported: the vectors would be others"
            )

    def encode(self, tokenize: Tokenizer, inputs: Sequence[pa.Array]) -> Pieces:
        """Texts, each behind the prompt, as pieces."""
        return tokenize(self.prompted(inputs))

    def prompted(self, inputs: Sequence[pa.Array]) -> Sequence[pa.Array]:
        """The inputs behind the prompt."""
        if not self.options.prompt:
            return inputs
        prompt, nothing = (pa.scalar(text, pa.large_string()) for text in (self.options.prompt, ""))
        return [pc.binary_join_element_wise(prompt, array.cast(prompt.type), nothing) for array in inputs]

    def tokens_read(self, batch: PackedBatch, targets: torch.Tensor | None = None) -> torch.Tensor | None:
        """The first token of each piece, or all, as the pooling has it."""
        return batch.first_tokens if self.card.pooling == "cls" else None

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Pooled vectors (P, D), fp32."""
        if self.card.pooling == "cls":
            pooled = of_first(hidden, batch).float()
        else:
            lengths = torch.tensor(batch.lengths, device=hidden.device)
            pooled = torch.segment_reduce(hidden.float(), "mean", lengths=lengths)
        return F.normalize(pooled, dim=1) if self.card.normalize else pooled

    def vectors(self, outputs: Outputs, pieces: Pieces) -> np.ndarray:
        """One vector a row, float32 (B, D): the mean of its windows', of unit length where the card says so."""
        found = by_row(outputs, pieces)
        return unit(found) if self.card.normalize and len(found) < len(pieces) else found

    def write_files(self, directory: Path) -> None:
        """What sentence-transformers reads besides: modules, pooling, length and prompt."""
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        if self.card.normalize:
            modules.append(("2_Normalize", "Normalize"))
        prompt = self.options.prompt
        files: dict[str, Any] = {
            "modules.json": [
                {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
                for place, (path, name) in enumerate(modules)
            ],
            "sentence_bert_config.json": {"max_seq_length": self.card.max_length, "do_lower_case": False},
            "1_Pooling/config.json": {
                "word_embedding_dimension": self.config.hidden_size if self.config else None,
                "pooling_mode_cls_token": self.card.pooling == "cls",
                "pooling_mode_mean_tokens": self.card.pooling != "cls",
            },
            "config_sentence_transformers.json": {
                "prompts": {"default": prompt} if prompt else {},
                "default_prompt_name": "default" if prompt else None,
                "similarity_fn_name": "cosine",
            },
        }
        for path, _ in modules[1:]:
            (directory / path).mkdir(exist_ok=True)
        for name, value in files.items():
            (directory / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (B, D) scaled to unit length; a zero vector stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def unit_vectors(embeddings: pa.Array) -> np.ndarray:
    """Embeddings, lists of D numbers and none null, as vectors of unit length, float32 (B, D)."""
    return unit(embeddings.flatten().to_numpy(zero_copy_only=False).reshape(len(embeddings), -1))
