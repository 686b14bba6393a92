"""The peers of the annotator's engine: token ids in memory -> unit vectors, (B, D) in the order given.

Every one of them pools and normalises as the model's card says, and may sort rows by length where its name says so.

Shapes: B rows, L length of a padded batch, D hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

# Rows of a padded batch: 16 was the fastest of 8, 16 and 32 for sorted rows on two cores.
_BATCH = 16
_FILE_ORDER_BATCH = 32


def contestants(directory: Path, rows: list[np.ndarray], dtype: str = "fp32") -> dict[str, Callable[[], np.ndarray]]:
    """Name -> a call that embeds all rows, in fp32 or bf16; ONNX Runtime always in fp32."""
    from transformers import AutoModel

    full = AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval()
    model = full
    if dtype == "bf16":
        model = AutoModel.from_pretrained(directory, attn_implementation="sdpa", dtype="bfloat16").eval()
    in_order = np.arange(len(rows))
    by_length = np.argsort([-len(row) for row in rows], kind="stable")

    def transformers(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.float().numpy()

    found = {
        "transformers, file order": lambda: _embed(transformers, rows, in_order, _FILE_ORDER_BATCH),
        "transformers, sorted": lambda: _embed(transformers, rows, by_length, _BATCH),
    }
    onnx = _exported(full)
    onnxruntime = _onnxruntime(onnx, full.config)
    found["ONNX Runtime fp32 fused, sorted"] = lambda: _embed(onnxruntime, rows, by_length, _BATCH)
    openvino = _openvino(onnx, "f32" if dtype == "fp32" else dtype)
    found[f"OpenVINO {dtype}, sorted"] = lambda: _embed(openvino, rows, by_length, _BATCH)
    return found


def _embed(
    hidden: Callable[[np.ndarray, np.ndarray], np.ndarray], rows: list[np.ndarray], order: np.ndarray, batch: int
) -> np.ndarray:
    """Pad, run, pool the real tokens, normalise."""
    vectors: np.ndarray | None = None
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(rows[row]) for row in chosen)
        ids, mask = np.zeros((len(chosen), longest), np.int64), np.zeros((len(chosen), longest), np.int64)
        for place, row in enumerate(chosen):
            ids[place, : len(rows[row])] = rows[row]
            mask[place, : len(rows[row])] = 1
        states = hidden(ids, mask)
        pooled = np.einsum("bld,bl->bd", states, mask.astype(np.float32), optimize=True)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        if vectors is None:
            vectors = np.empty((len(rows), pooled.shape[1]), np.float32)
        vectors[chosen] = pooled
    assert vectors is not None
    return vectors


def _exported(model: torch.nn.Module) -> Path:
    """The model as ONNX: ids, mask (B, L) -> hidden states (B, L, D)."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    path = Path(tempfile.mkdtemp(prefix="bert_ray-onnx-")) / "model.onnx"
    example = torch.ones(2, 8, dtype=torch.long)
    model.set_attn_implementation("eager")  # ONNX Runtime's optimiser knows attention by this form.
    torch.onnx.export(
        # Evaluation mode: the exporter puts the module back into the mode it found, and with it the model's dropout.
        Encoder().eval(),
        (example, example),
        str(path),
        input_names=["ids", "mask"],
        output_names=["hidden"],
        dynamic_axes={name: {0: "rows", 1: "tokens"} for name in ("ids", "mask", "hidden")},
        opset_version=17,
        dynamo=False,
    )
    model.set_attn_implementation("sdpa")
    return path


def _onnxruntime(path: Path, config: object) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import onnxruntime
    from onnxruntime.transformers import optimizer

    fused = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    counts = fused.get_fused_operator_statistics()
    print(f"ONNX Runtime's fusions: { {name: count for name, count in counts.items() if count} }", flush=True)
    fused.save_model_to_file(str(path.with_name("fused.onnx")))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(path.with_name("fused.onnx")), options, providers=["CPUExecutionProvider"]
    )
    return lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})[0]


def _openvino(path: Path, precision: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import openvino

    compiled = openvino.Core().compile_model(
        openvino.convert_model(str(path)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    return lambda ids, mask: request.infer({"ids": ids, "mask": mask})[compiled.output(0)]
