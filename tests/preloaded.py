"""What a process that works with a model imports from other packages: seconds, which processes forked from one that
has done it do not spend again. bert_ray itself is left out: each process still finds and imports it on its own.

    multiprocessing's fork server    tests/processes.py: drivers to kill, groups of training workers
    Spark's daemon                   python -m tests.preloaded, as spark.python.daemon.module: Spark's Python workers
"""

from __future__ import annotations

import pandas  # noqa: F401, as PySpark's own worker does at its first Arrow batch
import torch  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.bert.modeling_bert
import transformers.models.bert.tokenization_bert  # noqa: F401

if __name__ == "__main__":
    from pyspark.daemon import manager

    manager()
