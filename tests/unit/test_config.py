"""Job files, flags and key=value: what they give, and where a mistake is said to stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from bert_ray.config import dump_job, help_text, load_job
from bert_ray.errors import JobError
from bert_ray.inference.job import AnnotateJob
from bert_ray.submission import SubmitOptions
from bert_ray.training.corpus.job import CorpusJob
from bert_ray.training.job import TrainJob

ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True, slots=True)
class Cluster:
    """Where it runs.

    Attributes:
        address: of the cluster; None: this machine.
        config: free settings.
    """

    address: str | None = None
    config: dict[str, str | int | bool] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Sample:
    """A sample job.

    Attributes:
        input: what to read, at 100 % speed.
        engine: where to run.
        keep: columns to keep; None: all.
    """

    input: str
    engine: Literal["local", "ray", "spark"] = "local"
    keep: list[str] | None = None
    columns: dict[str, str] | None = None
    rows: int = 5
    rate: float = 1e-4
    scores: bool = False
    name: str | None = None
    level: Literal[0, 1, 2] = 0
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it is at least 1")
        if self.cluster.address == "":
            raise JobError("cluster.address is empty")


def load(*argv: str) -> Sample:
    return load_job(Sample, list(argv), command="bert-ray sample")


def from_file(tmp_path: Path, text: str, *more: str) -> Sample:
    path = tmp_path / "job.yaml"
    path.write_text(text, "utf-8")
    return load(str(path), *more)


def error_of(tmp_path: Path, text: str, *more: str) -> str:
    with pytest.raises(JobError) as caught:
        from_file(tmp_path, text, *more)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_flags_and_key_value_mean_the_same() -> None:
    by_flags = load("--input", "x", "--cluster.address", "a", "--rows=7", "--keep", "a,b", "--scores")
    by_keys = load("input=x", "cluster.address=a", "rows=7", "keep=[a, b]", "scores=true")
    assert by_flags == by_keys
    assert by_keys == Sample(input="x", rows=7, keep=["a", "b"], scores=True, cluster=Cluster(address="a"))


def test_the_last_one_wins_over_the_file(tmp_path: Path) -> None:
    job = from_file(tmp_path, "input: a\nrows: 3\nrate: 1e-5\n", "rows=4", "--rows", "5", "engine=ray")
    assert (job.input, job.rows, job.rate, job.engine) == ("a", 5, 1e-5, "ray")


def test_lists_mappings_and_null(tmp_path: Path) -> None:
    text = "input: a\nkeep: [c]\nname: n\ncluster:\n  config: {spark.a.b: c, n: 3}\n"
    job = from_file(tmp_path, text, "--keep+=d", "--columns.my-text=t", "cluster.config.spark.x.y=z", "name=null")
    assert job.keep == ["c", "d"]
    assert job.columns == {"my-text": "t"}
    assert job.cluster.config == {"spark.a.b": "c", "n": 3, "spark.x.y": "z"}
    assert job.name is None


def test_words_that_yaml_1_1_turns_into_booleans_stay_words(tmp_path: Path) -> None:
    assert from_file(tmp_path, "input: no\nname: on\nkeep: [yes, off]\n") == Sample(
        input="no", name="on", keep=["yes", "off"]
    )


def test_an_empty_group_is_its_defaults(tmp_path: Path) -> None:
    assert from_file(tmp_path, "input: a\ncluster:\n  # address: auto\n") == Sample(input="a")


def test_a_dumped_job_reads_back_equal(tmp_path: Path) -> None:
    many = [f"column_{number}" for number in range(100)]  # Longer than a file's name may be.
    assert load("input=x", f"keep={','.join(many)}").keep == many
    # As YAML 1.2 has it.
    assert [load("input=x", f"rows={word}").rows for word in ("010", "1_000", "+7")] == [10, 1000, 7]
    # Every list is one of text, whatever its words look like; quoted ones may hold a comma.
    assert load("input=x", "keep=no,1, null,{x}").keep == ["no", "1", "null", "{x}"]
    assert load("input=x", "keep='a,b',c").keep == ["a,b", "c"]
    assert load("input=x", "keep=").keep == []
    assert load("input=x", "keep=a, b,").keep == ["a", "b"]
    job = load("input=ä", "keep=a,b", "cluster.config.spark.a.b=c", "rate=3e-5", "name=12", "scores=true", "level=2")
    path = tmp_path / "dumped.yaml"
    for one in (job, load("input=1e5", "name=7e1"), load("input=true", "name=null")):
        path.write_text(dump_job(one), "utf-8")
        assert load(str(path)) == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: a\nengnie: ray\n", "job.yaml:2: unknown key 'engnie'; did you mean engine?"),
        (
            "input: a\ncluster:\n  adress: x\n",
            "job.yaml:3: unknown key 'cluster.adress'; did you mean cluster.address?",
        ),
        ("address: x\ninput: a\n", "job.yaml:1: unknown key 'address'; did you mean cluster.address?"),
        ("input: a\nrows: many\n", "job.yaml:2: rows takes an integer, not 'many' (text)"),
        ("input: a\nrows: 1.5\n", "job.yaml:2: rows takes an integer, not 1.5 (a number)"),
        ("input: a\nrows: true\n", "job.yaml:2: rows takes an integer, not true (a boolean)"),
        ("input: a\nname: 12\n", "job.yaml:2: name takes text or null, not 12 (an integer): put it in quotes"),
        ("input: a\nengine: rya\n", "one of local, ray, spark, not 'rya' (text); did you mean ray?"),
        ("input: a\nkeep: a\n", "job.yaml:2: keep takes a list of text ([a, b]) or null, not 'a' (text): write [a]"),
        ("input: a\ncluster: 3\n", "job.yaml:2: cluster is a group of keys (address, config)"),
        ("input: a\ncluster:\n  address: 3\n", "job.yaml:3: cluster.address takes text or null, not 3"),
        ("input: a\ninput: b\n", "job.yaml:2: input stands twice, first in line 1"),
        ("input: a\ncolumns: {a: b, a: c}\n", "job.yaml:2: columns has 'a' twice"),
        ("input: a\nrows: 0\n", "job.yaml:2: rows is 0; it is at least 1"),
        ("input: a\ncluster: {address: ''}\n", "job.yaml:2: cluster.address is empty"),
        ("rows: 3\n", "job.yaml: no input; give --input or set it in the job file"),
        ("input:\n", "job.yaml: no input"),
        ("", "job.yaml is empty"),
        ("# only a comment\n", "job.yaml is empty"),
        ("- a\n- b\n", "job.yaml holds a list, not keys"),
        ("hello\n", "job.yaml holds text, not keys"),
        ("input: [a\nrows: 3\n", "job.yaml:2: not YAML:"),
        ("input: a\nrows: 3\x1b[0m\n", "job.yaml:2: not YAML: it holds the character 0x1b, which is no text"),
        ("input: a\n\0\0\0", "job.yaml:2: not YAML: it holds the character 0x00, which is no text"),
        ("input: a\n---\ninput: b\n", "job.yaml:2: not YAML:"),
        (f"input: {'[' * 5000}{']' * 5000}\n", "job.yaml has values in values in values, deeper than can be read"),
        (f"input: a\nrows: {'1' * 5000}\n", "job.yaml has a value that cannot be read: Exceeds the limit"),
        ("input: a\nzzz: 1\n", "unknown key 'zzz'; the keys here are input, engine,"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(tmp_path, text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inptu", "x"], "--inptu: no such key; did you mean --input?"),
        (["enigne=ray"], "enigne=ray: no such key; did you mean engine?"),
        (["--rows", "many"], "--rows many: rows takes an integer"),
        (["engine=rya"], "engine=rya: engine takes one of local, ray, spark; did you mean ray?"),
        (["level=3"], "level=3: level takes one of 0, 1, 2"),
        (["rows=0"], "rows is 0; it is at least 1"),
        (["--cluster", "x"], "--cluster: cluster is a group of keys; set one of --cluster.address, --cluster.config"),
        (["--name"], "--name needs a value: text or null"),
        (["--name", "--scores"], "--name needs a value"),
        (["-n", "x"], "-n: flags have two dashes"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_as_it_was_typed(argv: list[str], message: str) -> None:
    with pytest.raises(JobError) as caught:
        load("input=a", *argv)
    assert message in str(caught.value)


def test_a_flag_over_a_wrong_value_of_the_file_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert error_of(tmp_path, "input: a\nrows: 3\n", "rows=0") == "rows is 0; it is at least 1"


def test_a_missing_job_file_is_named_with_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "annotate.yaml").write_text("input: a\n")
    with pytest.raises(JobError, match=r"no job file .*anotate\.yaml .*did you mean .*/annotate\.yaml\?"):
        load(str(tmp_path / "anotate.yaml"))
    with pytest.raises(JobError, match="is a directory, not a job file"):
        load(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match=r"binary\.yaml cannot be read as a job file"):
        load(str(tmp_path / "binary.yaml"))


def test_two_job_files_are_refused(tmp_path: Path) -> None:
    assert "b.yaml: unexpected; the job file is" in error_of(tmp_path, "input: a\n", "b.yaml")


def test_help_teaches_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: bert-ray sample [JOB.yaml] [--key value | key=value ...] A sample job.")
    assert "--input TEXT what to read, at 100 % speed. (required)" in text
    assert "--engine local|ray|spark where to run. (default: local)" in text
    assert "columns to keep; null: all." in text
    assert "cluster: Where it runs." in text


@pytest.mark.parametrize("cls", [AnnotateJob, TrainJob])
def test_every_key_of_the_real_jobs_is_documented(cls: type) -> None:
    from bert_ray.config.keys import list_keys

    assert not [key.name for key in list_keys(cls) if not key.help]
    assert help_text(cls, "bert-ray")


def test_the_job_files_in_jobs_load() -> None:
    assert load_job(AnnotateJob, [str(ROOT / "jobs" / "annotate.yaml")]).engine == "local"
    train = load_job(TrainJob, [str(ROOT / "jobs" / "finetune.yaml"), "data.train=my.parquet", "output=models/mine"])
    assert (train.data.train, train.output, train.labels) == ("my.parquet", "models/mine", None)
    pretrain = load_job(TrainJob, [str(ROOT / "jobs" / "pretrain.yaml"), "data.train=corpora/mine", "workers=4"])
    assert (pretrain.task, pretrain.model, pretrain.architecture.start) == ("pretraining", "new", "cooccurrence")
    assert load_job(CorpusJob, [str(ROOT / "jobs" / "corpus.yaml"), "input=lake", "output=corpus"]).inputs == ["lake"]


def test_what_a_task_is_told_is_read_as_yaml_once(tmp_path: Path) -> None:
    """A text in quotes is text, whatever it would be without them."""
    told = {"mark": "[MASKED]", "template": "Topic: {}", "prompt": "2024", "labels": ["a", "b"], "threshold": 0.5}
    file = tmp_path / "job.yaml"
    file.write_text(dump_job(AnnotateJob(input="i", model="m", output="o", options=told)))
    job = load_job(AnnotateJob, [str(file)])
    assert job.options == told
    changed = [
        str(file),
        "--options.threshold",
        "0.25",
        "options.labels=[c, d]",
        "options.prompt='7'",
        "options.top.k=3",
    ]
    job = load_job(AnnotateJob, changed)
    assert job.options == told | {"threshold": 0.25, "labels": ["c", "d"], "prompt": "7", "top.k": 3}
    assert load_job(AnnotateJob, [str(file), "options={mark: x}"]).options == {"mark": "x"}
    with pytest.raises(JobError, match="options takes"):
        load_job(AnnotateJob, [str(file), "options=3"])
    file.write_text("input: i\nmodel: m\noutput: o\noptions: [a]\n")
    with pytest.raises(JobError, match=r"job\.yaml:4: options takes"):
        load_job(AnnotateJob, [str(file)])


def test_lists_and_mappings_typed_are_yaml_1_2() -> None:
    words = ["input=i", "model=m", "output=o"]
    job = load_job(AnnotateJob, [*words, "keep=[no, on]", "columns={text: no, context: 'y'}"])
    assert (job.keep, job.columns) == (["no", "on"], {"text": "no", "context": "y"})
    assert load_job(AnnotateJob, [*words, "keep='a b',no"]).keep == ["a b", "no"]
    assert load_job(AnnotateJob, [*words, "keep=a", "keep+=[no]", "keep+=1", "keep+=b,c"]).keep == [
        "a",
        "no",
        "1",
        "b,c",
    ]
    assert load_job(AnnotateJob, [*words, "columns.text={review}"]).columns == {"text": "{review}"}
    assert load_job(AnnotateJob, [*words, "keep=[a]", "keep=null"]).keep is None


def test_sparks_master_has_one_name() -> None:
    job = load_job(AnnotateJob, ["input=i", "model=m", "output=o", "spark.config.spark.master=local[3]"])
    assert (job.spark.master, job.spark.config) == ("local[3]", {})
    with pytest.raises(JobError, match=r"spark.master is local, but local\[3\] in spark.config: give one"):
        load_job(
            AnnotateJob,
            ["input=i", "model=m", "output=o", "spark.master=local", "spark.config.spark.master=local[3]"],
        )


@pytest.mark.parametrize("value", ['{"a": 1}', "Authorization: x", "#hush", "null", "[a]", "007", "true", ""])
def test_texts_of_a_mapping_stay_as_they_were_typed(value: str) -> None:
    words = ["--to", "ray", f"--env.A={value}", "--env.B", "b"]
    assert load_job(SubmitOptions, words, job_file=False).env == {"A": value, "B": "b"}
    words = ["--env.A=lost", "--env={C: c}", f"env.D={value}"]
    assert load_job(SubmitOptions, ["--to", "ray", *words], job_file=False).env == {"C": "c", "D": value}
    job = load_job(AnnotateJob, ["input=a", "model=m", "output=o", f"columns.text={value}"])
    assert job.columns == {"text": value}
