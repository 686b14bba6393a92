"""Packed against padded: the gradient of the same documents, MiniLM on IMDB's texts, one step of masked tokens:

    python benchmarks/gradients.py

Ours packs the documents into one batch without padding; transformers' BertForMaskedLM has the same weights, documents
and masks as padded rows. Both without dropout, in fp32. Of a tiny model that is a test,
tests/unit/training/test_pretraining.py. Results: benchmarks/results/gradients.json and gradients.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common
from pretrain import make

TOKENS = 8192
MAX_LENGTH = 256


def measure(scratch: Path) -> dict[str, Any]:
    """The cosine of both gradients and the losses."""
    import torch
    from transformers import BertForMaskedLM

    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import prepare
    from bert_ray.training.loop import new_module

    make(common.reviews(400, split="train")[0].to_pylist(), scratch / "corpus")
    job = TrainJob(
        task="pretraining",
        model=common.MODEL,
        output=str(scratch / "model"),
        engine="local",
        data=DataOptions(train=str(scratch / "corpus")),
        steps=1,
        batch_tokens=TOKENS,
        max_length=MAX_LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
    )
    base = load_bundle(job.model)
    card, data, _ = prepare(job, base)
    device = torch.device("cpu")
    module = new_module(job, base, card, device, None, data.learning)
    rows, _ = data.sources(job, base, card, device)
    samples = rows.select(0)
    batch, targets = rows.batch(samples, 0)
    module.train()
    loss, _, _ = module(module.task.narrowed(batch, targets), targets, 1.0 / rows.weigh(samples))
    loss.backward()
    ours = {name: weight.grad for name, weight in module.model.named_parameters() if weight.grad is not None}

    peer = BertForMaskedLM(module.model.config).train()
    peer.load_state_dict(module.model.state_dict())
    longest = max(batch.lengths)
    ids, labels, mask = (torch.full((len(samples), longest), fill) for fill in (0, -100, 0))
    for row, length in enumerate(batch.lengths):
        here = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        ids[row, :length], labels[row, :length], mask[row, :length] = batch.input_ids[here], targets[here], 1
    padded = peer(input_ids=ids, attention_mask=mask, labels=labels).loss
    padded.backward()
    theirs = {name: weight.grad for name, weight in peer.named_parameters() if weight.grad is not None}
    assert ours.keys() == theirs.keys()
    one, other = (torch.cat([found[name].flatten().double() for name in sorted(ours)]) for found in (ours, theirs))
    return {
        "documents": len(samples),
        "tokens": int(sum(batch.lengths)),
        "padded_tokens": len(samples) * longest,
        "loss": {"packed": loss.item(), "padded": padded.item()},
        "cosine": torch.nn.functional.cosine_similarity(one, other, dim=0).item(),
        "length_ratio": (one.norm() / other.norm()).item(),
    }


def main() -> None:
    """Measure, compare, keep."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    common.set_threads(1)
    with tempfile.TemporaryDirectory(prefix="bert_ray-bench-") as scratch:
        found = measure(Path(scratch))
    path = common.keep("gradients", found)
    title = f"Packed against padded: MiniLM, {found['documents']} pieces of IMDB's texts, masked language modelling"
    header = ("", "tokens of the step", "loss")
    lines = [
        ("packed", f"{found['tokens']:,}", f"{found['loss']['packed']:.6f}"),
        ("padded, transformers", f"{found['padded_tokens']:,}", f"{found['loss']['padded']:.6f}"),
    ]
    common.table(title, header, lines)
    close = f"Cosine of the two gradients {found['cosine']:.9f}, their lengths' ratio {found['length_ratio']:.7f}."
    print(close)
    body = f"{common.markdown(header, lines)}\n\n{close}"
    common.page(path, title, "fp32, without dropout", ("torch", "transformers"), body)


if __name__ == "__main__":
    main()
