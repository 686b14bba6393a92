"""The Hugging Face Trainer as its examples set it up, and how long it trains."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any


def trainer_seconds(model: Any, rows: list[dict[str, Any]], collator: Any, scratch: Path, **settings: Any) -> float:
    """Train; seconds from the first step to the last, set-up left out.

    Args:
        model: of transformers.
        rows: to train on.
        collator: makes a batch of rows.
        scratch: for its files.
        settings: further TrainingArguments.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        start = seconds = 0.0

        def on_train_begin(self, *arguments: object, **more: object) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, *arguments: object, **more: object) -> None:
            self.seconds = time.perf_counter() - self.start

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
        **settings,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()
    return clock.seconds
