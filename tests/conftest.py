"""What tests share: one Ray and one Spark for the whole session, tiny models made on the spot, the bundled data.

    def test_agree(ray_session, spark, tiny_bundle, uci_sample): ...

Everything runs offline and small: two cores, no hub, no GPU. A fixture whose means are missing on this machine (Java,
../shared/data) skips its tests and says why.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "jobs" / "demo"

# Set before anyone imports torch, ray or pyspark: they read their environment at import, and their workers inherit it.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers' threads and forked workers do not mix
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # several processes share two cores
        "DS_ACCELERATOR": "cpu",
        # A GPU would compute in bf16 what is compared with a CPU: test_gpu.py alone is for it, run by itself.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0") if "test_gpu" in " ".join(sys.argv) else "",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the behaviour to come; unset, every worker warns about it
        "RAY_worker_niceness": "0",  # else whatever else runs here (Spark, another pytest) goes before Ray's workers
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # of 30, for one that waits for a dead worker
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of 2: how long Ray Train's end, or a death, may go unnoticed
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        # Workers and the processes that tests start find bert_ray and tests as this process does.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
)

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:
    from tests.tiny_tasks import Tiny

# Spark's Python workers are forked from a process that has imported what takes seconds, instead of each doing so.
SPARK_DAEMON = "tests.preloaded"

TINY_SEED = 20
TINY_HIDDEN = 32
TINY_MAX_LENGTH = 512
TINY_LABELS = ["negative", "positive"]

# The tiny vocabulary: every ASCII letter, digit and mark alone and as a continuation, so that English never falls to
# [UNK] whole; some words and endings, so that a text has fewer tokens than letters.
TINY_WORDS = """
the a an and or but not no of to in on at for with from by as is was are were be been it its this that these i you he
she we they my your his her our their me him us them very so too all any some more most good great best excellent love
loved nice well bad poor worst terrible awful hate never ever again film movie phone food place service product time
quality price work works worked make made get got go went see saw watch like really just only also if when what who how
why there here than then out up down over one two first last new old back day way don can could would should will do
does did have has had recommend happy disappointed waste money battery sound story acting staff waiter delicious bland
""".split()
TINY_PIECES = ["##s", "##ed", "##ing", "##er", "##est", "##ly", "##y", "##tion", "##ness", "##ment", "##able", "##ful"]


# Files that take about a minute, though none of their tests does.
_LONG = {
    "test_loop",
    "test_pretraining",
    "test_train_zero",
    "test_train_half",
    "test_choose",
    "test_cli",
    "test_translation",
}


def needs(package: str, extra: str) -> None:
    """Skip a test module where a package is missing. It is not imported: that may take seconds, for a test or none."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'bert-ray[{extra}]'", allow_module_level=True)


def _engine(item: pytest.Item) -> str | None:
    """On which session's engine a test runs: by its fixtures, or its last parameter where it asks for them itself."""
    fixtures = getattr(item, "fixturenames", ())
    if "spark" in fixtures:
        return "spark"
    if "ray_session" in fixtures:
        return "ray"
    if "request" not in inspect.signature(getattr(item, "function", _engine)).parameters:
        return None
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    words = [value for value in parameters if isinstance(value, str) and value in ("ray", "spark")]
    return words[-1] if words else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each process where to note its tests' engines: whoever shares them out knows no more than their names."""
    if not hasattr(node.config, "engines"):
        node.config.engines = tempfile.TemporaryDirectory(prefix="bert-ray-tests-")
    node.workerinput["engines"] = node.config.engines.name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Two processes (`make test`): one has the tests on its Ray, one those on its Spark, so that each starts once.

    All others stay together with their file.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        @cached_property
        def engines(self) -> dict[str, str]:
            notes = list(Path(config.engines.name).iterdir())
            assert notes, "no process has noted its tests' engines"
            found: dict[str, str] = json.loads(notes[0].read_text())
            return found

        def _split_scope(self, nodeid: str) -> str:
            return self.engines.get(nodeid, nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return Together(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In two processes, what takes longest goes first, so that they end at about the same time."""
    if not hasattr(config, "workerinput"):
        return
    engines = {item.nodeid: engine for item in items if (engine := _engine(item))}
    Path(config.workerinput["engines"], config.workerinput["workerid"]).write_text(json.dumps(engines))
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.stem in _LONG}

    def rank(item: pytest.Item) -> int:
        if item.nodeid in engines:
            return ("ray", "spark").index(engines[item.nodeid])
        return 2 if item.path.name == "test_demo.py" else 3 if item.path in slow else 4

    items.sort(key=rank)


@pytest.fixture(autouse=True, scope="module")
def no_process_is_left() -> Iterator[None]:
    """Processes of `tests.processes` end with the module that started them."""
    from tests.processes import end_all

    yield
    end_all()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs, started at first use and stopped at the end of the session."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A local SparkSession of two cores without UI, stopped at the end of the session."""
    sql = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java: install a Java 17 runtime (Debian: openjdk-17-jre-headless)")
    scratch = tmp_path_factory.mktemp("spark")
    session = (
        sql.SparkSession.builder.master("local[2]")
        .appName("bert_ray tests")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.driver.memory", "1g")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.sql.warehouse.dir", str(scratch / "warehouse"))
        .config("spark.local.dir", str(scratch / "local"))
        .config("spark.python.daemon.module", SPARK_DAEMON)
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of full data sets beside the checkout; skips where there is none."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no full data sets at {path}")
    return path


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a real file system of a size ("300k"); skips where this process may not mount one."""
    where = tmp_path / "disk"

    def mount(size: str) -> Path:
        where.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
        return where

    yield mount
    if where.is_mount():
        subprocess.run(["umount", where], check=True)


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server on loopback (moto), empty, and keys for it: yields its address, host:port."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    # Buckets belong to the process, not to the server: an earlier test's would still be there.
    urllib.request.urlopen(urllib.request.Request(f"http://{address}/moto-api/reset", method="POST")).close()
    yield address
    server.stop()


@pytest.fixture(scope="session")
def uci_lake() -> Path:
    """The demo's bundled lake: source=amazon|imdb|yelp, two files each, columns id, text, label. Read only."""
    return DEMO / "lake"


@pytest.fixture(scope="session")
def uci_train() -> Path:
    """The demo's bundled training table: 1,000 rows, columns id, text, label (negative, positive), source."""
    return DEMO / "train.parquet"


@pytest.fixture(scope="session")
def uci_sample(uci_lake: Path) -> pa.Table:
    """300 rows of the bundled lake, 100 of each source: columns id, text, label, source."""
    tables = []
    for folder in sorted(uci_lake.glob("source=*")):
        table = pq.read_table(folder / "part-0.parquet", partitioning=None).slice(0, 100)
        source = pa.array([folder.name.removeprefix("source=")] * table.num_rows, pa.string())
        tables.append(table.append_column("source", source))
    return pa.concat_tables(tables)


def tiny_tokenizer() -> object:
    """A BERT tokenizer (lower case, WordPiece) over the tiny vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    marks = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    letters = [f"##{mark}" for mark in marks if mark.isalnum()]
    # dict.fromkeys: a one-letter word is a mark already.
    tokens = list(dict.fromkeys(special + marks + letters + TINY_WORDS + TINY_PIECES))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece()
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=TINY_MAX_LENGTH)


def tiny_config(vocabulary_size: int, **more: object) -> object:
    """Two layers of 32, two heads. The wide initial weights make texts differ, as those of a trained model do."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=TINY_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * TINY_HIDDEN,
        max_position_embeddings=TINY_MAX_LENGTH,
        initializer_range=0.2,
        **more,
    )


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face BERT directory (no card): two layers, hidden 32, own vocabulary, fixed seed."""
    import torch
    from transformers import BertModel

    directory = tmp_path_factory.mktemp("models") / "tiny_encoder"
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = BertModel(tiny_config(len(tokenizer)), add_pooling_layer=True).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, uci_sample: pa.Table) -> Path:
    """A sentiment bundle (labels negative, positive) on the tiny encoder. Untrained, yet it says both labels."""
    import torch
    from transformers import BertForSequenceClassification

    from bert_ray.model.bundle import save_bundle
    from bert_ray.model.card import Card

    directory = tmp_path_factory.mktemp("bundles") / "sentiment"
    tokenizer = tiny_tokenizer()
    config = tiny_config(
        len(tokenizer),
        id2label=dict(enumerate(TINY_LABELS)),
        label2id={label: number for number, label in enumerate(TINY_LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = BertForSequenceClassification(config).eval()
    # The head's bias is set so that a real text's logits are zero on average: about half the texts get each label.
    texts = uci_sample["text"].to_pylist()[::10]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits
        model.classifier.bias -= logits.mean(dim=0)
    card = Card(task="classification", name="sentiment", labels=list(TINY_LABELS), max_length=TINY_MAX_LENGTH)
    save_bundle(directory, model, tokenizer, card)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Callable[[str], Tiny]:
    """Makes each task's tiny bundle, by the task's kind, once."""
    from tests.tiny_tasks import MAKERS

    root, made = tmp_path_factory.mktemp("tasks"), {}

    def make(kind: str) -> Tiny:
        if kind not in made:
            (root / kind).mkdir()
            made[kind] = MAKERS[kind](root / kind, str(tiny_encoder))
        return made[kind]

    return make
