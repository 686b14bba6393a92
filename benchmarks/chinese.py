"""A Chinese BERT for quality.py's Chinese lines: 6 layers of 384, from the texts of pretrain_proof.py's Chinese part:

    python benchmarks/chinese.py

1.8 million tokens, read 44 times: three minutes on an H200, a night on two CPU cores. The bundle lands in
out/chinese/bert. Whatever is there already is not made again.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
from pretrain_proof import RUNS, chinese_texts, command, prepared


def main() -> None:
    """Vocabulary, corpus, pretraining."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    texts, place = RUNS / "chinese-texts", common.CHINESE.parent
    chinese_texts(texts)
    prepared(place, texts, words="jieba")
    keys: dict[str, Any] = {
        "task": "pretraining",
        "model": "new",
        "engine": "local",
        "data.train": place / "corpus",
        "output": common.CHINESE,
        "architecture.layers": 6,
        "architecture.hidden_size": 384,
        "architecture.heads": 6,
        "architecture.max_positions": 256,
        "architecture.start": "cooccurrence",
        "steps": 5000,
        "batch_tokens": 16_384,
        "learning_rate": 1e-3,
        "max_length": 64,
        "dropout": 0.1,
        "warmup": 0.05,
        "schedule": "trapezoidal",
        "pretraining.mask_rate": 0.3,
        "pretraining.validation_rows": 1000,
    }
    command("train", *(f"{key}={value}" for key, value in keys.items()))


if __name__ == "__main__":
    main()
