"""A bundle's model as ONNX, for runtimes without torch; checked with ONNX Runtime before it is there.

    bert-ray export models/sentiment sentiment.onnx

Inputs: input_ids, attention_mask and, where the model has more than one token type, token_type_ids, int64 (B, L), both
axes free. Outputs: what the transformers model with its head gives (logits (B, C), logits (B, L, C), start_logits and
end_logits (B, L)); of an embedding bundle the pooled vector, sentence_embedding (B, D), normalised where the card says
so. Texts are tokenised outside, with the bundle's tokenizer.json; under the key "bert_ray" the file's metadata say how,
and what the labels are.

Shapes: B rows, L tokens of the longest row, D hidden size, C labels or vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.errors import BundleError, JobError, why
from bert_ray.model.inferred_card import lowers_first

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.tasks import Task

# How far ONNX Runtime may be from torch, as a share of the largest output where that is above 1. In fp32 two ways of
# adding up differ by some 1e-6.
MOST_DEVIATION = 1e-4
# A protocol buffer is at most 2 GiB; the weights of a larger model stand in a file beside it.
_MOST_BYTES = 2**31 - 2**26

# As sentence-transformers calls it in its exports; "embedding" alone is what the exporter calls the look-up of words.
_EMBEDDING = "sentence_embedding"

# Short, long, and longer than the model; words that no vocabulary has; nothing at all.
_TEXTS = (
    "a",
    "",
    "The film was good, and the food was not bad.",
    "Ein schöner Film. 这部电影很好。 Zażółć gęślą jaźń 🎬",
    "What it is and what it was, and what it never will be again, is told here at some length. " * 4,
    "word " * 600,
)


@dataclass(kw_only=True, slots=True)
class ExportJob:
    """Write a model as ONNX, fp32 with free batch and sequence axes, and check it with ONNX Runtime against torch.

    Attributes:
        model: a bundle reference.
        output: the file, NAME.onnx; the weights of a model above 2 GB stand beside it in NAME.onnx.data.
        task: another task's model than the bundle's own: `embedding` for the encoder of any bundle, pooled.
    """

    model: str
    output: str
    task: str | None = None

    def __post_init__(self) -> None:
        if not self.output.endswith(".onnx"):
            raise JobError(f"output is {self.output}: name a file that ends in .onnx")
        for file in (self.output, f"{self.output}.data"):  # A large model's weights come to stand in the second.
            if Path(file).exists():
                raise JobError(f"output {file} already exists: choose another file, or delete it first")


@dataclass(kw_only=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        output: the file.
        size: bytes, of the file beside it too.
        inputs: name -> shape.
        outputs: likewise.
        deviation: the largest between ONNX Runtime and torch, see MOST_DEVIATION.
        batches: how many were compared, and from which length on to which (tokens).
        task: whose model it is.
    """

    output: str
    size: int
    inputs: dict[str, list[Any]]
    outputs: dict[str, list[Any]]
    deviation: float
    batches: tuple[int, int, int]
    task: str

    def text(self) -> str:
        """What `bert-ray export` prints."""
        count, shortest, longest = self.batches
        return "\n".join(
            [
                f"exported {self.output} (task {self.task}, {self.size / 1e6:,.1f} MB)",
                f"  inputs   {_shown(self.inputs)}",
                f"  outputs  {_shown(self.outputs)}",
                f"  checked  ONNX Runtime beside torch, {count} batches of {shortest} to {longest} tokens: largest "
                f"deviation {self.deviation:.1e} (at most {MOST_DEVIATION:.0e})",
            ]
        )


def _shown(shapes: dict[str, list[Any]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items())


def export(job: ExportJob) -> Exported:
    """Write the file, whole and checked, or none.

    Raises:
        BundleError: the bundle cannot be read, its task has no model that could be exported, or what ONNX Runtime
            computes is not what torch does.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        importlib.import_module(package)
    from bert_ray.model.bundle import load_bundle

    bundle = load_bundle(job.model)
    task = bundle.bind(kind=job.task)
    _refuse(bundle, task)
    model = exportable(bundle, task)
    output = Path(job.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"output {output} cannot be made: {why(error)}; choose another") from error
    # Beside the output, under the same name: a file of weights is found by the name that it had when it was written.
    scratch = output.parent / f".{output.name}.{os.getpid()}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        file = scratch / output.name
        batches = _batches(bundle, task)
        _write(model, batches[-1], file, _metadata(bundle, task))
        inputs, outputs, deviation = _compare(model, batches, file, of_tokens=_is_of_tokens(task))
        if not deviation <= MOST_DEVIATION:  # NaN is no small deviation.
            raise BundleError(
                f"{job.model}: what ONNX Runtime computes is off by {deviation:.1e} beside torch, more than "
                f"{MOST_DEVIATION:.0e}; nothing was written. Please report the model and the versions of torch and "
                "onnxruntime"
            )
        written = sorted(scratch.iterdir(), key=lambda path: path.name, reverse=True)
        size = sum(path.stat().st_size for path in written)
        for path in written:  # The weights first: a file that is there is whole.
            os.replace(path, output.parent / path.name)
    except OSError as error:
        raise JobError(f"output {output} cannot be written: {why(error)}; make room, or choose another") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    return Exported(
        output=job.output,
        size=size,
        inputs=inputs,
        outputs=outputs,
        deviation=deviation,
        batches=(len(batches), min(lengths), max(lengths)),
        task=task.kind,
    )


def _refuse(bundle: Bundle, task: Task) -> None:
    from bert_ray.model.architectures import ENCODER_DECODER
    from bert_ray.model.tasks.pooled import PooledTask

    if task.generates or bundle.config.model_type == ENCODER_DECODER:
        raise BundleError(
            f"{bundle.reference}: task {task.kind} writes its text word by word, with a search around the model, which "
            "is not exported; known are tasks of one forward pass (classification, entities, answer, embedding, …)"
        )
    if task.builds or (isinstance(task, PooledTask) and task.kind not in ("embedding", "similarity")):
        raise BundleError(
            f"{bundle.reference}: task {task.kind} compares embeddings with what stands in the bundle or the call, "
            "which ONNX has no place for; its encoder can be exported: --task embedding"
        )


def _is_of_tokens(task: Task) -> bool:
    """Whether the outputs have an axis of tokens, on which the places of padding mean nothing."""
    from bert_ray.model.tasks.heads import SequenceTask
    from bert_ray.model.tasks.pooled import PooledTask

    return not isinstance(task, PooledTask | SequenceTask)


def exportable(bundle: Bundle, task: Task) -> torch.nn.Module:
    """The model as it is exported, in evaluation mode: inputs by name, int64 (B, L) -> a dict of outputs by name."""
    import torch
    from torch.nn import functional as F

    from bert_ray.model.tasks.pooled import PooledTask

    model = bundle.model(task).eval()  # In training mode its dropout would be exported too.
    pooled, cls, normalize = isinstance(task, PooledTask), task.card.pooling == "cls", task.card.normalize

    class Exportable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> dict[str, torch.Tensor]:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            said = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
            if not pooled:
                return {name: said[name] for name in said}
            hidden = said.last_hidden_state
            if cls:
                vector = hidden[:, 0]
            else:
                mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
                vector = (hidden * mask).sum(1) / mask.sum(1)
            return {_EMBEDDING: F.normalize(vector, dim=1) if normalize else vector}

    return Exportable().eval()


def _batches(bundle: Bundle, task: Task) -> list[dict[str, torch.Tensor]]:
    """What the export is compared on: texts alone, all of them padded, and pairs, which it is traced with."""
    from bert_ray.model.architectures import encoder_config

    tokenizer = bundle.tokenizer()
    names = ["input_ids", "attention_mask"]
    # RoBERTa has a table of one row, and its tokenizer gives no types.
    if getattr(encoder_config(bundle.config), "type_vocab_size", 0) > 1:
        names.append("token_type_ids")

    def batch(texts: Sequence[str], seconds: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        made = tokenizer(
            list(texts),
            None if seconds is None else list(seconds),
            padding=True,
            truncation=True,
            max_length=task.card.max_length,
            return_token_type_ids="token_type_ids" in names,
            return_tensors="pt",
        )
        return {name: made[name] for name in names}

    alone = [batch([text]) for text in _TEXTS]
    # The last has both token types, padding, and neither axis of length 1, which torch.export takes for a constant.
    return [*alone, batch(_TEXTS), batch(_TEXTS[:2], _TEXTS[2:4])]


def _write(model: torch.nn.Module, batch: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    import torch

    with torch.inference_mode():
        outputs = list(model(**batch))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        # Of names of axes that two inputs share, of torch's own deprecations, of torchvision, which is not needed.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            kwargs=batch,
            dynamo=True,
            input_names=list(batch),
            output_names=outputs,
            dynamic_shapes=dict.fromkeys(batch, axes),
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(file, external_data=size > _MOST_BYTES)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _metadata(bundle: Bundle, task: Task) -> dict[str, str]:
    """What a reader of the file needs to know, as JSON under one key."""
    card = task.card
    said = {
        "task": task.kind,
        "name": task.name,
        "inputs": list(task.inputs),
        "labels": [bundle.config.id2label[index] for index in range(bundle.config.num_labels)]
        if card.labels and task.kind == bundle.card.task
        else [],
        "max_length": card.max_length,
        "prompt": getattr(task.options, "prompt", ""),
        # What becomes of long texts, and which scores count.
        "options": dataclasses.asdict(task.options),
        # Before anything else is done to a text; tokenizer.json does not say it.
        "lower_case": lowers_first(bundle.tokenizer().backend_tokenizer.normalizer),
        "fingerprint": bundle.fingerprint,
    }
    return {"bert_ray": json.dumps(said, ensure_ascii=False)}


def _compare(
    model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], file: Path, of_tokens: bool
) -> tuple[dict[str, list[Any]], dict[str, list[Any]], float]:
    """Shapes of inputs and outputs as ONNX Runtime sees them, and the largest deviation over all batches."""
    import numpy as np
    import torch

    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in batches:
        said = session.run(None, {name: value.numpy() for name, value in batch.items()})
        with torch.inference_mode():
            wanted = {name: value.numpy() for name, value in model(**batch).items()}
        real = batch["attention_mask"].numpy().astype(bool)
        for output, found in zip(session.get_outputs(), said, strict=True):
            one, other = (values[real] if of_tokens else values for values in (found, wanted[output.name]))
            # np.maximum, not max: a NaN stays one.
            largest = float(np.maximum(largest, _deviation(one, other)))
    inputs, outputs = (
        {item.name: list(item.shape) for item in items()} for items in (session.get_inputs, session.get_outputs)
    )
    return inputs, outputs, largest


def _deviation(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a share of the largest value where that is above 1; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(abs(found - wanted).max() / max(1.0, float(abs(wanted).max())))
