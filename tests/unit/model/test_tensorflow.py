"""Checkpoints that TensorFlow wrote (tests/data/tensorflow, made by its write.py) give what TensorFlow computes; broken
ones, written by tests/checkpoints.py, are named.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import bert_ray
from bert_ray import cli
from bert_ray.errors import BundleError, JobError
from bert_ray.model import tensor_bundle
from bert_ray.model.bundle import load_bundle
from bert_ray.model.checksum import crc32c
from bert_ray.model.tensor_bundle import TensorBundle
from bert_ray.model.tensorflow import Converted, ConvertJob, convert, find_checkpoint
from bert_ray.model.tensorflow_names import VALUE, beside
from tests.checkpoints import write_checkpoint

DATA = Path(__file__).resolve().parents[2] / "data" / "tensorflow"
NAMED, GARDEN = DATA / "uncased_L-2_H-16_A-2", DATA / "garden_L-2_H-16_A-2"
CKPT = "bert_model.ckpt"


def run(checkpoint: Path, output: Path, **options: object) -> Converted:
    return convert(ConvertJob(checkpoint=str(checkpoint), output=str(output), **options))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the name-based release, to be damaged; its name does not tell the case."""
    return Path(shutil.copytree(NAMED, tmp_path / "release"))


def weights(directory: Path) -> dict[str, np.ndarray]:
    bundle = TensorBundle(directory / CKPT)
    return {name: bundle[name] for name in bundle.entries if not beside(name)}


Edited = Callable[[dict[str, np.ndarray]], None]


def rewritten(release: Path, edit: Edited, **options: object) -> Path:
    """The release with its weights edited and without the slots."""
    kept = weights(release)
    edit(kept)
    for path in release.glob(f"{CKPT}.*"):
        path.unlink()
    write_checkpoint(release / CKPT, kept, **options)
    return release


# What TensorFlow computes.


@pytest.mark.parametrize(
    ("source", "gelu", "form"),
    [(NAMED, "auto", ""), (NAMED, "tanh", "_tanh"), (GARDEN, "auto", "_tanh"), (GARDEN, "exact", "")],
)
def test_a_bundle_gives_what_tensorflow_gives(source: Path, gelu: str, form: str, tmp_path: Path) -> None:
    done = run(source, tmp_path / "bundle", gelu=gelu)
    assert (done.weights, done.task, done.objects) == (46, "fill-mask", source == GARDEN)
    assert_as_tensorflow(tmp_path / "bundle", source, form)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorflow") is None, reason="the extra `tensorflow` is not installed")
@pytest.mark.parametrize("name", [NAMED.name, GARDEN.name])
def test_checkpoints_that_the_installed_tensorflow_writes(name: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, DATA / "write.py", tmp_path], check=True, capture_output=True)
    assert (tmp_path / name / f"{CKPT}.index").exists()
    run(tmp_path / name, tmp_path / "bundle", gelu="exact")
    assert_as_tensorflow(tmp_path / "bundle", tmp_path / name, "")


def assert_as_tensorflow(bundle: Path, source: Path, form: str) -> None:
    """Encoder and both heads compute what TensorFlow computed when it wrote the checkpoint."""
    from transformers import AutoModel, BertForPreTraining

    said = np.load(source / "expected.npz")
    batch = {
        "input_ids": torch.tensor(said["ids"]),
        "attention_mask": torch.tensor(said["mask"]),
        "token_type_ids": torch.tensor(said["types"]),
    }
    real = said["mask"].astype(bool)
    with torch.inference_mode():
        encoder = AutoModel.from_pretrained(bundle).eval()(**batch)
        heads = BertForPreTraining.from_pretrained(bundle).eval()(**batch)
    for found, name in (
        (encoder.last_hidden_state[real], "hidden"),
        (encoder.pooler_output, "pooled"),
        (heads.prediction_logits[real], "tokens"),
        (heads.seq_relationship_logits, "parts"),
    ):
        wanted = said[name + form]
        np.testing.assert_allclose(found.numpy(), wanted[real] if wanted.ndim == 3 else wanted, atol=1e-5, rtol=0)


def test_the_two_forms_of_gelu_are_told_apart() -> None:
    # Else the test above would pass with the wrong one.
    said = np.load(NAMED / "expected.npz")
    assert abs(said["hidden"] - said["hidden_tanh"]).max() > 1e-4


def test_the_annotator_fills_a_mask_as_tensorflow_does(tmp_path: Path) -> None:
    run(NAMED, tmp_path / "bundle")
    words = (NAMED / "vocab.txt").read_text("utf-8").split()
    said = np.load(NAMED / "expected.npz")
    assert [words[token] for token in said["ids"][2][:6]] == ["[CLS]", "a", "[MASK]", "food", ".", "[SEP]"]
    logits = said["tokens"][2, 2]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    filled = bert_ray.load(str(tmp_path / "bundle"))(pa.table({"text": ["A [MASK] food.", None]}))["fill-mask"]
    best = np.argsort(-probabilities)[:5]
    assert [item["token"] for item in filled[0].as_py()] == [words[token] for token in best]
    np.testing.assert_allclose([item["score"] for item in filled[0].as_py()], probabilities[best], atol=1e-5)
    assert filled[1].as_py() is None


def test_classification_can_start_from_it(tmp_path: Path) -> None:
    from bert_ray.model.card import Card

    run(GARDEN, tmp_path / "bundle")
    base = load_bundle(tmp_path / "bundle")
    task = base.bind(Card(task="classification", labels=["a", "b"]), kind="classification")
    pooler = task.new_model(base).bert.pooler.dense.weight
    kernel = TensorBundle(GARDEN / CKPT)[f"next_sentence..pooler_dense/kernel{VALUE}"]
    assert np.array_equal(pooler.detach().numpy(), kernel.T)


# Tokenizer.


def test_the_tokenizer_is_the_vocabulary_s(tmp_path: Path) -> None:
    done = run(NAMED, tmp_path / "bundle")
    assert done.lower_case
    assert "uncased" in done.why
    tokenizer = load_bundle(tmp_path / "bundle").tokenizer()
    words = (NAMED / "vocab.txt").read_text("utf-8").split()
    assert [tokenizer.convert_ids_to_tokens(number) for number in range(len(words))] == words
    assert tokenizer.tokenize("The FÍLMS was好") == ["the", "film", "##s", "was", "好"]
    assert tokenizer("good", "bad")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert load_bundle(tmp_path / "bundle").config.pad_token_id == 0


@pytest.mark.parametrize(
    ("name", "capital", "told", "lower", "why"),
    [
        ("multi_cased_L-12", False, None, False, "says cased"),
        ("release", False, None, True, "no capitals"),
        ("release", True, None, False, "has capitals: Film"),
        ("release", None, None, True, "no capitals"),
        ("uncased_L-12", False, False, False, "as told"),
        ("bert-lowercased", False, None, True, "no capitals"),
    ],
)
def test_case(
    release: Path, name: str, capital: bool | None, told: bool | None, lower: bool, why: str, tmp_path: Path
) -> None:
    source = release.rename(tmp_path / name)
    if capital is not False:
        words = (source / "vocab.txt").read_text("utf-8")
        # None: a mark of the Chinese release, which is no word.
        other = "Film" if capital else "<S>"
        (source / "vocab.txt").write_text(words.replace("\nfilm\n", f"\n{other}\n"), "utf-8")
    done = run(source, tmp_path / "bundle", lower_case=told)
    assert (done.lower_case, why in done.why) == (lower, True)
    assert load_bundle(tmp_path / "bundle").tokenizer().tokenize("The")[0] == ("the" if lower else "[UNK]")


# Where the checkpoint is.


def test_a_release_may_lie_one_folder_deeper(release: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    release.rename(outer / "uncased_L-2")
    assert find_checkpoint(str(outer)) == outer / "uncased_L-2" / CKPT
    assert run(outer, tmp_path / "bundle").lower_case


def test_configuration_and_vocabulary_may_lie_above_the_checkpoint(release: Path, tmp_path: Path) -> None:
    (release / "checkpoints").mkdir()
    for path in release.glob(f"{CKPT}.*"):
        path.rename(release / "checkpoints" / path.name)
    assert run(release, tmp_path / "bundle").weights == 46


def test_of_several_checkpoints_one_is_to_be_named(release: Path, tmp_path: Path) -> None:
    for step in ("10", "20"):
        for path in release.glob(f"{CKPT}.*"):
            shutil.copy(path, release / path.name.replace(CKPT, f"model.ckpt-{step}"))
    assert find_checkpoint(str(release)).name == CKPT
    for path in release.glob(f"{CKPT}.*"):
        path.unlink()
    with pytest.raises(BundleError, match=r"2 checkpoints .*ckpt-10.*name one, bert-ray convert .*ckpt-20 OUT"):
        find_checkpoint(str(release))
    one = release / "model.ckpt-10"
    assert run(one, tmp_path / "bundle").checkpoint == one
    assert find_checkpoint(f"{one}.index") == find_checkpoint(f"{one}.data-00000-of-00001") == one


def test_a_place_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no TensorFlow checkpoint"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(BundleError, match=r"no such directory"):
        find_checkpoint(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("deeper", [False, True])
def test_a_release_given_as_a_model_says_the_command(release: Path, deeper: bool) -> None:
    reference = release.parent if deeper else release
    with pytest.raises(BundleError, match=rf"TensorFlow wrote.*: bert-ray convert {reference} OUT"):
        bert_ray.load(str(reference))


def test_a_prefix_given_as_a_model_says_the_command(release: Path) -> None:
    with pytest.raises(BundleError, match=rf"bert-ray convert {release / CKPT} OUT"):
        bert_ray.load(str(release / CKPT))


# What is missing or broken.


@pytest.mark.parametrize("name", ["vocab.txt", "bert_config.json", f"{CKPT}.index", f"{CKPT}.data-00000-of-00001"])
def test_a_missing_file_is_named(release: Path, name: str, tmp_path: Path) -> None:
    (release / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing.*(beside the checkpoint|again, whole)"):
        run(release, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_data_cut_short_is_told(release: Path, tmp_path: Path) -> None:
    data = release / f"{CKPT}.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"data-00000-of-00001 is cut short: it has 71,080 bytes, .* 71,180"):
        run(release, tmp_path / "bundle")


@pytest.mark.parametrize("keep", [0, 10, 47, 48, 2000, -1])
def test_an_index_cut_short_is_told(release: Path, keep: int, tmp_path: Path) -> None:
    index = release / f"{CKPT}.index"
    index.write_bytes(index.read_bytes()[:keep])
    with pytest.raises(BundleError, match=r"\.index is no index of a TensorFlow checkpoint, or is cut short"):
        run(release, tmp_path / "bundle")


def test_any_altered_byte_is_found(release: Path) -> None:
    """Of the index every one of a sample, and of the data one in each of three weights."""
    index, data = release / f"{CKPT}.index", release / f"{CKPT}.data-00000-of-00001"
    whole = index.read_bytes()
    for place in range(0, len(whole) - 48, 97):
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(BundleError, match=r"\.index .*again, whole"):
            TensorBundle(release / CKPT)
    index.write_bytes(whole)
    bundle, content = TensorBundle(release / CKPT), bytearray(data.read_bytes())
    for name in ("bert/pooler/dense/bias", "bert/embeddings/word_embeddings", "cls/predictions/output_bias"):
        content[bundle.entries[name].offset + 5] ^= 1
        data.write_bytes(content)
        with pytest.raises(BundleError, match=rf"data-00000-of-00001: the bytes of {name} are not those"):
            bundle[name]


def edit_config(release: Path, **changes: object) -> None:
    path = release / "bert_config.json"
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"weight bert/encoder/layer_2/\S+ \(and 15 more\) is missing"),
        ({"num_hidden_layers": 1}, r"unknown weight bert/encoder/layer_1/\S+ \(and 15 more\)"),
        ({"intermediate_size": 64}, r"layer_0/intermediate/dense/bias has shape 32, but .* is 64"),
        ({"max_position_embeddings": 512}, r"position_embeddings has shape 24 x 16, but .* 512 x 16"),
        ({"vocab_size": 30522}, r"vocab.txt has 25 tokens, but bert_config.json says 30,522"),
        ({"hidden_size": None}, r"bert_config.json has no hidden_size"),
        ({"num_attention_heads": 3}, r"bert_config.json has sizes that no BERT has"),
        ({"hidden_act": "swish"}, r"hidden_act is 'swish'"),
        ({"embedding_size": 8}, r"narrower than the model"),
    ],
)
def test_a_configuration_of_another_model_is_told(
    release: Path, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    edit_config(release, **changes)
    with pytest.raises(BundleError, match=message):
        run(release, tmp_path / "bundle")


def test_a_configuration_in_the_garden_s_words_is_read(release: Path, tmp_path: Path) -> None:
    edit_config(release, num_hidden_layers=None, num_layers=2, hidden_act=None, hidden_activation="gelu")
    assert run(release, tmp_path / "bundle").activation == "gelu, exact"


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_broken_configuration_is_told(release: Path, content: str, tmp_path: Path) -> None:
    (release / "bert_config.json").write_text(content)
    with pytest.raises(BundleError, match=r"bert_config.json cannot be read"):
        run(release, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda words: [*words, "more"], "vocab.txt has 26 tokens, but bert_config.json says 25"),
        (lambda words: words[:-1], "vocab.txt has 24 tokens"),
        (lambda words: ["x" if word == "[MASK]" else word for word in words], r"vocab.txt has no \[MASK\]"),
    ],
)
def test_a_vocabulary_of_another_model_is_told(
    release: Path, edit: Callable[[list[str]], list[str]], message: str, tmp_path: Path
) -> None:
    path = release / "vocab.txt"
    path.write_text("\n".join(edit(path.read_text("utf-8").split())) + "\n", "utf-8")
    with pytest.raises(BundleError, match=message):
        run(release, tmp_path / "bundle")


def test_a_vocabulary_in_another_encoding_is_told(release: Path, tmp_path: Path) -> None:
    (release / "vocab.txt").write_bytes("é\n".encode("latin-1") * 25)
    with pytest.raises(BundleError, match=r"vocab.txt cannot be read"):
        run(release, tmp_path / "bundle")


KERNEL = "bert/encoder/layer_1/output/dense/kernel"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(KERNEL), rf"weight {KERNEL} is missing"),
        (lambda w: w.update({KERNEL: w[KERNEL].T.copy()}), rf"weight {KERNEL} has shape 16 x 32, but .* 32 x 16"),
        (lambda w: w.update({"output_weights": np.zeros((3, 16), "f4")}), r"unknown weight output_weights"),
        (lambda w: w.update({KERNEL: w[KERNEL].astype("i8")}), rf"weight {KERNEL} is int64"),
        (lambda w: w.pop("cls/predictions/output_bias"), r"cls/predictions/output_bias is missing"),
        (lambda w: w.pop("bert/pooler/dense/bias"), r"bert/pooler/dense/bias is missing"),
    ],
)
def test_a_weight_that_is_missing_unknown_or_misshapen_is_named(
    release: Path, edit: Edited, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        run(rewritten(release, edit), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sliced": [KERNEL]}, rf"{KERNEL} is kept in slices"), ({"big_endian": True}, r"big-endian machine")],
)
def test_slices_and_foreign_bytes_are_told(
    release: Path, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        run(rewritten(release, lambda w: None, **options), tmp_path / "bundle")


# Other ways to write the same.


def same(bundle: Path, source: Path = NAMED) -> bool:
    """Whether the hidden states are those of the whole release."""
    from transformers import AutoModel

    said = np.load(source / "expected.npz")
    model = AutoModel.from_pretrained(bundle).eval()
    with torch.inference_mode():
        found = model(*(torch.tensor(said[name]) for name in ("ids", "mask", "types"))).last_hidden_state.numpy()
    real = said["mask"].astype(bool)
    form = "hidden_tanh" if "tanh" in model.config.hidden_act else "hidden"
    return bool(abs(found - said[form])[real].max() < 1e-5)


def test_many_blocks_and_data_files_are_read(release: Path, tmp_path: Path) -> None:
    run(rewritten(release, lambda w: None, shards=3, block_names=5), tmp_path / "bundle")
    assert same(tmp_path / "bundle")
    (release / f"{CKPT}.data-00001-of-00003").unlink()
    with pytest.raises(BundleError, match=r"data-00001-of-00003 is missing: .* half there"):
        TensorBundle(release / CKPT)


def test_an_index_of_more_files_than_have_names_is_told(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(rewritten(release, lambda w: None, shards=3), tmp_path / "bundle")
    monkeypatch.setattr(tensor_bundle, "_MOST_SHARDS", 2)
    with pytest.raises(BundleError, match=r"is no index of a TensorFlow checkpoint"):
        TensorBundle(release / CKPT)


def test_half_precision_is_read(release: Path, tmp_path: Path) -> None:
    def bfloat16(w: dict[str, np.ndarray]) -> None:
        w["bert/pooler/dense/bias"] = (w["bert/pooler/dense/bias"].view("u4") >> 16).astype("u2")
        w["bert/pooler/dense/kernel"] = w["bert/pooler/dense/kernel"].astype("f2")

    run(rewritten(release, bfloat16), tmp_path / "bundle")
    pooler = load_bundle(tmp_path / "bundle").bind(kind="embedding").auto_class().from_pretrained(tmp_path / "bundle")
    wanted = weights(NAMED)["bert/pooler/dense/bias"]
    np.testing.assert_allclose(pooler.pooler.dense.bias.detach().numpy(), wanted, rtol=2**-7)


def without(*heads: str) -> Edited:
    def edit(w: dict[str, np.ndarray]) -> None:
        for name in [name for name in w if name.startswith(heads)]:
            del w[name]

    return edit


@pytest.mark.parametrize(
    ("heads", "architecture", "task"),
    [
        (("cls/seq_relationship",), "BertForMaskedLM", "fill-mask"),
        (("cls/seq_relationship", "bert/pooler"), "BertForMaskedLM", "fill-mask"),
        (("cls/",), "BertModel", "embedding"),
        (("cls/", "bert/pooler"), "BertModel", "embedding"),
    ],
)
def test_a_checkpoint_may_lack_heads_as_a_whole(
    release: Path, heads: tuple[str, ...], architecture: str, task: str, tmp_path: Path
) -> None:
    done = run(rewritten(release, without(*heads)), tmp_path / "bundle")
    assert (done.architecture, done.task) == (architecture, task)
    assert same(tmp_path / "bundle")
    # Weights of the pooler are kept wherever there were any: a classifier begins with it.
    from safetensors import safe_open

    with safe_open(tmp_path / "bundle" / "model.safetensors", "np") as file:
        assert any("pooler" in name for name in file.keys()) == ("bert/pooler" not in heads)  # noqa: SIM118


def renamed(rename: Callable[[str], str | None]) -> Edited:
    def edit(w: dict[str, np.ndarray]) -> None:
        old = dict(w)
        w.clear()
        for name, value in old.items():
            if new := rename(name.removesuffix(VALUE)):
                w[new + VALUE] = value

    return edit


def in_lists(name: str) -> str:
    """As networks that keep their layers in lists: encoder/_transformer_layers/0, encoder/_pooler_layer."""
    for place, attribute in enumerate(("_embedding_layer", "_position_embedding_layer", "_type_embedding_layer")):
        name = name.replace(f"layer_with_weights-{place}/", f"{attribute}/")
    name = name.replace("layer_with_weights-3/", "_embedding_norm_layer/")
    for layer in range(2):
        name = name.replace(f"layer_with_weights-{4 + layer}/", f"_transformer_layers/{layer}/")
    return name.replace("layer_with_weights-6/", "_pooler_layer/")


def numbered(name: str) -> str | None:
    """As the pretraining model of 2020: the encoder, then the heads, all numbered below one model."""
    if name.startswith("encoder/layer_with_weights-6"):
        return None
    if name.startswith("next_sentence..pooler_dense"):
        return name.replace("next_sentence..pooler_dense", "model/layer_with_weights-0/layer_with_weights-6")
    name = name.replace("model/classification_heads/0/out_proj", "model/layer_with_weights-1/layer_with_weights-0")
    name = name.replace("masked_lm/embedding_table", "encoder/layer_with_weights-0/embeddings")
    name = name.replace("masked_lm/", "model/layer_with_weights-2/").replace("output_bias.Sbias", "bias")
    return name.replace("encoder/", "model/layer_with_weights-0/").replace(
        "_attention_layer/_output_dense", "_attention_output_dense"
    )


def encoder_alone(name: str) -> str | None:
    """As tf.train.Checkpoint(model=encoder)."""
    name = name.replace("masked_lm/embedding_table", "encoder/layer_with_weights-0/embeddings")
    return name.replace("encoder/", "model/") if name.startswith("encoder/") else None


@pytest.mark.parametrize(
    ("rename", "architecture"),
    [(in_lists, "BertForPreTraining"), (numbered, "BertForPreTraining"), (encoder_alone, "BertModel")],
)
def test_the_garden_s_other_names_are_understood(
    rename: Callable[[str], str | None], architecture: str, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(GARDEN, tmp_path / "garden"))
    assert run(rewritten(source, renamed(rename)), tmp_path / "bundle").architecture == architecture
    assert same(tmp_path / "bundle", GARDEN)


def test_an_object_that_is_no_part_of_bert_is_named(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GARDEN, tmp_path / "garden"))
    edit = renamed(lambda name: name.replace("_intermediate_dense/bias", "_gate_dense/bias"))
    message = r"unknown weight encoder/layer_with_weights-4/_gate_dense/bias\S+ \(and 1 more\)"
    with pytest.raises(BundleError, match=message):
        run(rewritten(source, edit), tmp_path / "bundle")


# The command.


def test_the_command_converts_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bundle"
    assert cli.main(["convert", str(NAMED), str(output)]) == cli.DONE
    told = capsys.readouterr().out
    for line in ("(name-based)", "46; left out: 93 other", "gelu, exact", "says uncased", "(task fill-mask)"):
        assert line in told
    assert cli.main(["convert", str(NAMED), str(output)]) == cli.AT_FAULT
    assert "already exists" in capsys.readouterr().err


def test_the_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    for words in ("usage: bert-ray convert CHECKPOINT OUTPUT", "--lower-case true|false", "--gelu auto|exact|tanh"):
        assert words in shown


def test_a_wrong_setting_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"gelu is 'new'"):
        ConvertJob(checkpoint="x", output=str(tmp_path / "y"), gelu="new")


# The checksum.


def test_checksums_are_those_of_the_standard() -> None:
    # RFC 3720, B.4, and the check value of CRC-32C in the catalogue of parametrised CRC algorithms.
    for data, wanted in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0)):
        assert crc32c(np.frombuffer(data, np.uint8)) == wanted


@pytest.mark.parametrize("size", [1, 2, 3, 8191, 8192, 8193, 2**20 - 1, 2**20 + 1, 2 * 2**20])
def test_checksums_of_any_length_are_those_of_byte_by_byte(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    state = 0xFFFFFFFF
    for byte in data.tolist():
        state = table[(state ^ byte) & 0xFF] ^ state >> 8
    assert crc32c(data) == state ^ 0xFFFFFFFF
