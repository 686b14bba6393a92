"""Hand a job to a cluster, through the cluster's own command line.

    bert-ray submit jobs/annotate.yaml --to ray --address http://head:8265 --wait
    bert-ray submit jobs/annotate.yaml --to spark --master spark://master:7077 --wait

What travels: this bert_ray itself, so that the cluster runs the code that was submitted, and one job file with all
overrides resolved. Both lie in `runs/<submission id>/` as a record. What must be on the cluster already: Python with
bert_ray's dependencies, and the input, model and output under the same paths or URIs.

Ray and Spark are only called as programs here; neither is imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from bert_ray.config import dump_job, load_job, peek
from bert_ray.config.flags import Arguments
from bert_ray.config.keys import list_keys
from bert_ray.errors import JobError, why
from bert_ray.inference.job import AnnotateJob, SparkOptions
from bert_ray.inference.spark_settings import write_properties
from bert_ray.training.corpus.job import CorpusJob, VocabularyJob
from bert_ray.training.job import TrainJob, absolute, absolute_model
from bert_ray.training.notice import on_sigterm

_ENTRY = "bert_ray_job.py"
_EXAMPLES = """\
  bert-ray submit jobs/annotate.yaml --to ray --address http://head:8265 --wait
  bert-ray submit jobs/finetune.yaml --to ray --address http://head:8265 data.train=s3://bucket/train epochs=5
  bert-ray submit jobs/annotate.yaml --to spark --master spark://master:7077 --wait"""
# How long the cluster's answer about a job that has just ended is waited for.
_STATUS_TIMEOUT_SECONDS = 30.0
# How long a driver may take to stop after Ctrl-C: Spark ends its executors first.
_STOP_TIMEOUT_SECONDS = 60.0
# Within which spark-submit ends if it cannot begin: no Java, a word that it does not know.
_EARLY_SECONDS = 6.0
# How often it is looked whether SIGTERM has come.
_LOOK_SECONDS = 0.5


@dataclass(kw_only=True, slots=True)
class SubmitOptions:
    """Hand a job to a cluster: to Ray by its Jobs API, to Spark by spark-submit in client mode.

    All other keys are the job's own and win over its file, as with `bert-ray annotate`, `bert-ray train`
    and `bert-ray corpus`; which of them it is, they tell.

    Attributes:
        to: the kind of cluster. The job runs on that engine, whatever its file says.
        address: Ray's Jobs API (`http://head:8265`); default: the job's `ray.address`, else RAY_API_SERVER_ADDRESS.
        master: Spark's master URL (`spark://master:7077`, `yarn`); default: the job's `spark.master`.
        wait: show the job's log and end with its exit status. Without it, the submission id is printed and how to
            follow the job. With Spark the driver then runs on in the background of this machine.
        python: Python that runs the driver on a Ray cluster's head.
        env: environment variables of the job, on driver and workers (env.HF_HUB_OFFLINE=1).
        record: directory in which a directory per submission is made.
    """

    to: Literal["ray", "spark"]
    address: str | None = None
    master: str | None = None
    wait: bool = False
    python: str = "python"
    env: dict[str, str] = field(default_factory=dict)
    record: str = "runs"


# What only a vocabulary is told.
_VOCABULARY_KEYS = {item.name for item in fields(VocabularyJob)} - {
    item.name for cls in (AnnotateJob, CorpusJob) for item in fields(cls)
}


def submit(argv: Sequence[str]) -> int:
    """Submit a job as the command line says; returns the exit status.

    Returns:
        0 when submitted; with `wait` the job's own status.

    Raises:
        JobError: a key is wrong, the cluster is not named or does not answer, or the engine cannot run the job.
    """
    if any(word in ("-h", "--help") for word in argv):
        load_job(SubmitOptions, ["--help"], command="bert-ray submit", examples=_EXAMPLES)
    ours, theirs = _split(argv)
    options = load_job(SubmitOptions, ours, command="bert-ray submit", job_file=False)
    command, cls = _kind(theirs)
    job: Any = load_job(cls, theirs, command=f"bert-ray {command}")
    if command != "annotate" and options.to == "spark":
        what = {"train": "training runs", "corpus": "a corpus is made", "vocabulary": "a vocabulary is made"}[command]
        raise JobError(f"{what} on Ray: submit it --to ray")
    send = _to_ray if options.to == "ray" else _to_spark
    return send(options, command, job)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are submission's, and those that are the job's."""
    names = {item.name for item in fields(SubmitOptions)}

    def is_ours(word: str) -> bool:
        name = re.split(r"[=.]", word.removeprefix("--"), maxsplit=1)[0].replace("-", "_")
        # A path may look like a key (`env=prod/job.yaml`); what `env` itself takes is a mapping.
        path = word.startswith("env=") and not word.startswith("env={")
        return name in names and (word.startswith("--") or "=" in word) and not path

    ours: list[str] = []
    theirs: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if is_ours(word):
            ours.append(word)
            takes_next = "=" not in word and (word != "--wait" or words[:1] in (["true"], ["false"]))
            if takes_next and words and not words[0].startswith("--"):
                ours.append(words.pop(0))
        else:
            theirs.append(word)
            # What a flag without a value (`--scores`) stands before may be submission's again.
            if word.startswith("--") and "=" not in word and words and not is_ours(words[0]):
                theirs.append(words.pop(0))
    return ours, theirs


def _kind(words: list[str]) -> tuple[str, type]:
    """Which job it is: an annotation has an input, a training has data."""
    keys = {
        re.split(r"[=.]", word.removeprefix("--"), maxsplit=1)[0].replace("-", "_")
        for word in words
        if "=" in word or word[:2] == "--"
    }
    file = _job_file(words)
    if file:
        keys |= set(peek(file))
    if not words or not keys:
        raise JobError("no job: give a job file, as in bert-ray submit jobs/annotate.yaml --to ray")
    if ("input" in keys) == ("data" in keys):
        which = file or "the command"
        raise JobError(
            f"{which} is neither an annotate job (it has `input`) nor a train job (it has `data`), nor a corpus job "
            "(it has `input` and `tokenizer`) or a vocabulary job (it has `input` and `size` or `extend`)"
        )
    if "input" not in keys:
        return "train", TrainJob
    if "tokenizer" in keys:
        return "corpus", CorpusJob
    return ("vocabulary", VocabularyJob) if keys & _VOCABULARY_KEYS else ("annotate", AnnotateJob)


def _job_file(words: list[str]) -> str | None:
    """The job file among a job's words, told as the command of any of the jobs would."""
    for cls in (AnnotateJob, TrainJob, CorpusJob, VocabularyJob):
        with contextlib.suppress(JobError):  # The words are another job's; or of none, which its command will say.
            return Arguments(list_keys(cls), "bert-ray submit", (), True, words).file
    return next((word for word in words if word.endswith((".yaml", ".yml")) and os.path.isfile(word)), None)


def _to_ray(options: SubmitOptions, command: str, job: Any) -> int:
    ray = _program("ray")
    address = options.address or job.ray.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise JobError(
            "no Ray cluster: give --address http://HEAD:8265, ray.address in the job file, or RAY_API_SERVER_ADDRESS"
        )
    # On the cluster the driver is a job of it, which an address of None means.
    job = replace(_absolute(job), engine="ray", ray=replace(job.ray, address=None))
    name, stage = _stage(options, command, job)
    environment = {
        "working_dir": str(stage),
        "py_modules": [str(Path(__file__).parent)],
        "env_vars": options.env,
        "excludes": ["**/__pycache__"],
    }
    head = [*ray, "job"]
    where = ["--address", address]
    # In a file: the words of a command are for every user of this machine to see, variables may be secrets.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as runtime:
        json.dump(environment, runtime, ensure_ascii=False)  # JSON is YAML.
        runtime.flush()
        submission = subprocess.run(
            [
                *[*head, "submit", *where, "--submission-id", name, "--no-wait"],
                *["--runtime-env", runtime.name, "--"],
                *[options.python, _ENTRY, command, "job.yaml"],
            ],
            capture_output=True,
            text=True,
            env=_quiet_ray(address),
        )
    if submission.returncode:
        raise JobError(f"Ray at {address} did not take the job: {_reason(submission.stdout + submission.stderr)}")
    print(f"submitted {name} to Ray at {address}; what was sent is in {stage}", flush=True)
    if not options.wait:
        print(_follow_ray(name, address, job), flush=True)
        return 0
    try:
        subprocess.run([*head, "logs", "--follow", *where, name], env=_quiet_ray(address), check=False)
        return _ray_status(head, address, name)
    except KeyboardInterrupt:
        print(f"\nno longer following {name}; it goes on.\n{_follow_ray(name, address, job)}", file=sys.stderr)
        return 130


def _follow_ray(name: str, address: str, job: Any) -> str:
    # Ray's client takes another cluster that the environment names, whatever --address says.
    other = os.environ.get("RAY_API_SERVER_ADDRESS", os.environ.get("RAY_ADDRESS", address)) != address
    address = shlex.quote(address)
    ray = f"RAY_API_SERVER_ADDRESS={address} ray job" if other else "ray job"
    lines = [
        f"  follow  {ray} logs --follow --address {address} {name}",
        f"  status  {ray} status --address {address} {name}",
        f"  stop    {ray} stop --address {address} {name}",
    ]
    return "\n".join(lines + _progress(job))


def _ray_status(head: list[str], address: str, name: str) -> int:
    """The driver's exit status, as `ray job status` tells it.

    Ray's own client is asked, not the REST API behind it: it knows the cluster's token, TLS and proxies.

    Raises:
        JobError: the job failed without a driver's end, or Ray does not say how it ended.
    """
    began, told = time.monotonic(), False
    silent: float | None = None  # Since when no answer has been one.
    while True:
        said = _said([*head, "status", "--address", address, name], address)
        job = f"Job '{re.escape(name)}'"
        if re.search(rf"{job} succeeded", said):
            return 0
        # In the message's first line: behind it comes the end of the log, which may say anything.
        if code := re.search(r"Status message: [^\n]*failed with exit code (-?\d+)", said):
            return _exit_status(int(code[1]))
        if re.search(rf"{job} was stopped", said):
            return _exit_status(-signal.SIGTERM)
        if re.search(rf"{job} failed", said):
            why = re.search(r"Status message: ([^\n]*)", said)
            raise JobError(f"{name} failed, and not by its own end: {why[1] if why else _reason(said)}")
        now = time.monotonic()
        if re.search(r"RUNNING|PENDING", said):
            silent = None
            if now > began + _STATUS_TIMEOUT_SECONDS and not told:
                # The log's connection was cut (a proxy, a laptop asleep), the job was not.
                print(f"the log of {name} is no longer followed; waiting for its end", file=sys.stderr, flush=True)
                told = True
        elif silent is None:
            silent = now
        elif now > silent + _STATUS_TIMEOUT_SECONDS:
            raise JobError(f"Ray does not say how {name} ended: {_reason(said)}")
        time.sleep(1.0)


def _exit_status(code: int) -> int:
    """As a shell has it for a process that a signal ended."""
    return code if code >= 0 else 128 - code


def _said(words: list[str], address: str) -> str:
    """What a command of Ray's client says; how it failed is in it."""
    try:
        asked = subprocess.run(
            words, capture_output=True, text=True, env=_quiet_ray(address), timeout=2 * _STATUS_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "no answer"
    return asked.stdout + asked.stderr


def _to_spark(options: SubmitOptions, command: str, job: Any) -> int:
    spark = _program("spark")
    master = options.master or job.spark.master
    if not master:
        raise JobError("no Spark master: give --master spark://HOST:7077 (or yarn), or spark.master in the job file")
    if job.spark.config.get("spark.submit.deployMode", "client") != "client":
        raise JobError("spark.submit.deployMode: the driver runs where you submit (client mode); leave it out")
    for key, value in options.env.items():
        if value != value.strip():
            raise JobError(f"env.{key} is {value!r}: Spark takes blanks off the ends of what its executors get")
    # spark-submit says which master; the session that the driver makes then takes it from there.
    job = replace(_absolute(job), engine="spark", spark=replace(job.spark, master=None))
    name, stage = _stage(options, command, job)
    archive = _archive(stage)
    settings = job.spark.config | {f"spark.executorEnv.{key}": value for key, value in options.env.items()}
    # In a file: the words of a command are for every user of this machine to see.
    properties = write_properties(stage / "spark.properties", settings)
    words = [
        *[*spark, "--master", master, "--deploy-mode", "client", "--name", name, "--py-files", str(archive)],
        *["--properties-file", str(properties), "--load-spark-defaults"],
        *[str(stage / _ENTRY), command, str(stage / "job.yaml")],
    ]
    # Executors start the Python that the driver names; another one would lack what this one has.
    environment = {"PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable}
    environment |= {**os.environ, **options.env}
    print(f"submitted {name} to Spark at {master}; what was sent is in {stage}", flush=True)
    if options.wait:
        return _foreground(words, environment)
    log = stage / "log.txt"
    with log.open("wb") as handle:
        driver = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, start_new_session=True
        )
    with contextlib.suppress(subprocess.TimeoutExpired):
        if driver.wait(_EARLY_SECONDS):
            raise JobError(f"spark-submit ended at once: {_reason(log.read_text(errors='replace'))} (all in {log})")
    lines = [
        "The driver runs on in the background of this machine (Spark's client mode).",
        f"  follow  tail -f {shlex.quote(str(log))}",
        f"  stop    kill {driver.pid}",
    ]
    print("\n".join(lines + _progress(job)), flush=True)
    return 0


def _foreground(words: list[str], environment: dict[str, str]) -> int:
    """A program's exit status. Ctrl-C reaches it too, SIGTERM is passed on; it is given the time to stop cleanly."""
    terminated = threading.Event()
    with on_sigterm(terminated.set):
        driver = subprocess.Popen(words, env=environment)
        try:
            while not terminated.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return _exit_status(driver.wait(_LOOK_SECONDS))
            driver.terminate()
        except KeyboardInterrupt:
            pass
        try:
            driver.wait(_STOP_TIMEOUT_SECONDS)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            driver.kill()
        return 128 + (signal.SIGTERM if terminated.is_set() else signal.SIGINT)


def _progress(job: Any) -> list[str]:
    return [f"  done    bert-ray runs status {shlex.quote(job.output)}"] if isinstance(job, AnnotateJob) else []


def _program(engine: Literal["ray", "spark"]) -> list[str]:
    """The command line of ray, or spark-submit, of this Python; found without importing either."""
    package = {"ray": "ray", "spark": "pyspark"}[engine]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise JobError(f"submitting to {engine} needs {package} here too: pip install 'bert-ray[{engine}]'")
    if engine == "ray":
        return [sys.executable, "-m", "ray.scripts.scripts"]
    home = os.environ.get("SPARK_HOME") or found.submodule_search_locations[0]
    if not (program := Path(home) / "bin" / "spark-submit").is_file():
        raise JobError(f"SPARK_HOME is {home}, which has no bin/spark-submit: mend it, or unset it to use {package}'s")
    SparkOptions.check_java()
    return [str(program)]


def _absolute(job: Any) -> Any:
    """The job with local paths made absolute, as its driver starts in another directory."""
    if isinstance(job, TrainJob):
        return job.absolute()
    changed: dict[str, Any] = {"output": absolute(job.output)}
    if isinstance(job, AnnotateJob):
        changed["input"] = absolute(job.input)
    else:
        changed["input"] = [absolute(place) for place in job.inputs]
    model = {CorpusJob: "tokenizer", VocabularyJob: "extend"}.get(type(job), "model")
    if reference := getattr(job, model):
        changed[model] = absolute_model(reference)
    return replace(job, **changed)


def _stage(options: SubmitOptions, command: str, job: Any) -> tuple[str, Path]:
    """Make the submission's id and its directory with job file and entry point."""
    name = f"bert-ray-{command}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    stage = Path(options.record).absolute() / name
    try:
        stage.mkdir(mode=0o700, parents=True)  # The job may name a store's secret.
        (stage / "job.yaml").write_text(dump_job(job), "utf-8")
        shutil.copyfile(Path(__file__).parent / "__main__.py", stage / _ENTRY)
    except OSError as error:
        raise JobError(
            f"cannot write to {stage}: {why(error)}. Name a directory for what is sent with --record"
        ) from error
    return name, stage


def _archive(stage: Path) -> Path:
    """This bert_ray as the zip that spark-submit sends to driver and executors."""
    package = Path(__file__).parent
    archive = stage / "bert_ray.zip"
    # A reproducible build may date its files before 1980.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as handle:
        for path in sorted(package.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                handle.write(path, path.relative_to(package.parent))
    return archive


def _quiet_ray(address: str) -> dict[str, str]:
    """The environment of Ray's client: it would colour its lines, and ask about usage statistics.

    A cluster that the environment names wins over its `--address`.
    """
    usage = os.environ.get("RAY_USAGE_STATS_ENABLED", "0")
    return {**os.environ, "RAY_API_SERVER_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": usage, "NO_COLOR": "1"}


def _reason(text: str) -> str:
    """The last line of a program's complaint."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"
