"""Each task beside the Hugging Face pipeline, rows per second, in one run:

    python benchmarks/tasks.py
    python benchmarks/tasks.py --rounds 2 --rows 60        a quick look
    python benchmarks/tasks.py --dtype bf16                both sides in bf16, for a CPU that multiplies it

The same weights on both sides: MiniLM's encoder with a fresh head; speed does not depend on what a head has learned.
Texts of mixed lengths (sentences, news, film reviews; questions with their paragraphs), shuffled. The pipeline
runs as it comes (one row at a time) and in batches of 16; for answers, which transformers 5 has no pipeline for, the
recipe of its example run_qa.py does, for embedding, zero-shot and similarity sentence-transformers, to which few-shot
adds scikit-learn's logistic regression and FAQ sentence-transformers' own search, over 1,000 questions. Zero-shot is by
embedding here, where the pipeline of that name asks a model of inference once for each label. Mask has the pipeline for
entities and Presidio's recognisers, as ours has; regression reads two texts. Translation stands beside
`model.generate` on batches of the same number of tokens, texts sorted by length, greedily and with four beams, on
sentences of Tatoeba: with the model that `quality.py --case en_zh` has trained where it is there, else with one that
has learned from 3,000 sentences and says 16 tokens at most.
Results: benchmarks/results/tasks.json, tasks_bf16.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 16
TASKS = (
    "classification",
    "multi-label",
    "regression",
    "entities",
    "mask",
    "answer",
    "faq",
    "embedding",
    "similarity",
    "zero-shot",
    "few-shot",
    "fill-mask",
    "translation",
    "translation, 4 beams",
)
MAX_LENGTH = 512
ENTITIES = ["O", "B-person", "I-person", "B-location", "I-location"]
TOPICS = ["world politics", "sports", "business", "science and technology", "films"]

# Tasks with a head on the whole text: transformers' name of the problem, and how its pipeline is called.
_OF_TEXTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "classification": (None, {}),
    "multi-label": ("multi_label_classification", {"top_k": None, "function_to_apply": "sigmoid"}),
    "regression": ("regression", {"function_to_apply": "none"}),
}
RECOGNISERS = {
    "card": "CreditCardRecognizer",
    "email": "EmailRecognizer",
    "iban": "IbanRecognizer",
    "ip": "IpRecognizer",
    "phone": "PhoneRecognizer",
}
INDEXED = 1000

Contestants = dict[str, Callable[[], Any]]


def texts(rows: int) -> list[str]:
    """Sentences, news and reviews in equal parts, shuffled."""
    found: list[str] = []
    for folder, column in (("sst2", "sentence"), ("ag_news", "text"), ("imdb", "text")):
        path = common.SHARED / folder / "test.parquet"
        part = pq.read_table(path, columns=[column])[column] if path.exists() else common.reviews(rows)[0]
        found += part.slice(0, -(-rows // 3)).to_pylist()
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))][:rows]


def questions(rows: int) -> list[dict[str, str]]:
    """Questions with their paragraphs, shuffled."""
    path = common.SHARED / "xquad" / "en.parquet"
    if not path.exists():
        return [{"question": text[:60], "context": text} for text in texts(rows)]
    found = pq.read_table(path, columns=["question", "context"])
    return found.take(pa.array(np.random.default_rng(0).permutation(len(found))[:rows])).to_pylist()


def save(auto: Any, directory: Path, **settings: Any) -> str:
    """MiniLM with a fresh head of this kind, as a plain transformers directory."""
    from transformers import AutoTokenizer

    from bert_ray.model.references import resolve

    source = resolve(common.MODEL)
    auto.from_pretrained(source, **settings).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return str(directory)


def translator(scratch: Path) -> tuple[str, int]:
    """A translation model, and the most tokens that it should say."""
    place = scratch / "translator"
    for precision in common.TYPES:
        trained = common.ROOT / "out" / "quality" / f"en_zh-0-{precision}"
        if trained.exists():
            return str(trained), 64
    if place.exists():
        return str(place), 16
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    # Weights that have learned nothing say what rounding decides; a little training makes the two comparable.
    pairs = pq.read_table(common.SHARED / "tatoeba_zh_en" / "train.parquet", columns=["en", "zh"]).slice(0, 3000)
    pq.write_table(pairs.rename_columns(["text", "translation"]), scratch / "pairs.parquet")
    train(
        TrainJob(
            model=common.MODEL,
            output=str(place),
            engine="local",
            task="translation",
            epochs=2,
            batch_size=32,
            learning_rate=5e-4,
            max_length=64,
            data=DataOptions(train=str(scratch / "pairs.parquet"), validation_fraction=0.0),
        )
    )
    return str(place), 16


def english(rows: int) -> pa.Array:
    """Short English sentences, shuffled."""
    path = common.SHARED / "tatoeba_zh_en" / "test.parquet"
    found = pq.read_table(path, columns=["en"])["en"].to_pylist() if path.exists() else texts(rows)
    return pa.array([found[index] for index in np.random.default_rng(0).permutation(len(found))][:rows], pa.string())


def translation(rows: int, scratch: Path, beams: int, dtype: str) -> tuple[Contestants, int]:
    """Ours, and transformers' `generate` with its own key-value cache."""
    import torch
    import transformers

    from bert_ray.model.annotator import AnnotatorSpec

    model, longest = translator(scratch)
    table = pa.table({"text": english(rows)})
    options = {"beams": beams, "max_target_tokens": longest, "split": "none"}
    annotator = AnnotatorSpec(model=model, options=options, dtype=dtype).build()
    peer = transformers.AutoModelForSeq2SeqLM.from_pretrained(model, dtype=common.TYPES[dtype]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    target = annotator.task.target_tokenizer  # type: ignore[attr-defined]
    search = {"num_beams": beams, "do_sample": False, "max_new_tokens": longest}
    search |= {"early_stopping": True, "length_penalty": 1.0} if beams > 1 else {}

    @torch.inference_mode()
    def generated() -> list[str]:
        lists = tokenizer(table["text"].to_pylist(), truncation=True, max_length=annotator.bundle.card.max_length)
        order = sorted(range(len(table)), key=lambda row: -len(lists["input_ids"][row]))
        said, start = [""] * len(table), 0
        while start < len(order):
            # Longest first: the first row of a batch says how wide it is.
            size = max(1, annotator.batch_tokens // len(lists["input_ids"][order[start]]))
            some = order[start : start + size]
            batch = tokenizer.pad({"input_ids": [lists["input_ids"][row] for row in some]}, return_tensors="pt")
            ids = peer.generate(**batch, **search)
            for row, text in zip(some, target.decode_batch(ids.tolist(), skip_special_tokens=True), strict=True):
                said[row] = text.strip()
            start += size
        return said

    said = annotator(table)["translation"].to_pylist()
    same = np.mean([one == other for one, other in zip(said, generated(), strict=True)])
    if same < (0.99 if dtype == "fp32" else 0.9):  # Ties apart, which rounding makes more of, both say the same.
        raise SystemExit(f"the two translate only {same:.1%} of the sentences alike: no fair comparison")
    return {"bert_ray": lambda: annotator(table), "model.generate, sorted": generated}, len(table)


def pipelines(task: str, rows: int, scratch: Path, dtype: str) -> tuple[Contestants, int]:
    """Ours, and the pipeline of transformers."""
    import transformers

    from bert_ray.model.annotator import AnnotatorSpec

    data, place = texts(rows), scratch / task
    more: dict[str, Any] = {}
    call: dict[str, Any] = {}
    options: dict[str, Any] = {}
    after: Callable[[str, Any], Any] | None = None
    if task in _OF_TEXTS:
        problem, how = _OF_TEXTS[task]
        labels = 1 if task == "regression" else 4
        settings = {"num_labels": labels, "problem_type": problem} if problem else {"num_labels": labels}
        model = save(transformers.AutoModelForSequenceClassification, place, **settings)
        name, call = "text-classification", {"truncation": True, "max_length": MAX_LENGTH, **how}
    elif task in ("entities", "mask"):
        names = {"id2label": dict(enumerate(ENTITIES)), "label2id": {name: at for at, name in enumerate(ENTITIES)}}
        model = save(transformers.AutoModelForTokenClassification, place, **names)
        name, more = "token-classification", {"aggregation_strategy": "first", "stride": 64}
    else:
        model = save(transformers.AutoModelForMaskedLM, place)
        name, call = "fill-mask", {"tokenizer_kwargs": {"truncation": True, "max_length": MAX_LENGTH}}
        data = [" ".join([*text.split()[:3], "[MASK]", *text.split()[4:]]) for text in data]
    if task == "mask":
        options, after = {"patterns": list(RECOGNISERS)}, recognised()
    annotator = AnnotatorSpec(model=model, task="mask" if after else None, options=options, dtype=dtype).build()
    table, asked = pa.table({"text": data}), list(data)
    if task == "regression":  # Of two texts, as one row.
        table = table.append_column("text_pair", pa.array(data[::-1]))
        asked = table.to_pylist()
    pipe = transformers.pipeline(name, model=model, device="cpu", dtype=common.TYPES[dtype], **more)

    def piped(batch: int) -> Callable[[], Any]:
        def run() -> Any:
            found = list(pipe(asked, batch_size=batch, **call))
            return [after(text, spans) for text, spans in zip(data, found, strict=True)] if after else found

        return run

    return {
        "bert_ray": lambda: annotator(table),
        "pipeline, one by one": piped(1),
        f"pipeline, batches of {BATCH}": piped(BATCH),
    }, len(data)


def recognised() -> Callable[[str, Any], Any]:
    """Presidio's recognisers on a text, beside the entities that were found in it."""
    from presidio_analyzer import predefined_recognizers as known

    regions = {"phone": {"supported_regions": ("US", "GB", "CN")}}  # As ours has by default.
    recognisers = [getattr(known, kind)(**regions.get(name, {})) for name, kind in RECOGNISERS.items()]
    email = next(one for one in recognisers if isinstance(one, known.EmailRecognizer))
    email.validate_result = lambda pattern_text: None  # It would ask the network for the list of domains.

    def look(text: str, entities: Any) -> Any:
        return entities, [one.analyze(text, one.supported_entities, None) for one in recognisers]

    return look


def answer(rows: int, scratch: Path, dtype: str) -> tuple[Contestants, int]:
    """Ours, and the recipe of transformers' example."""
    import transformers
    from peers_answer import answers

    from bert_ray.model.annotator import AnnotatorSpec

    model, data = save(transformers.AutoModelForQuestionAnswering, scratch / "answer"), questions(rows)
    annotator, table = AnnotatorSpec(model=model, dtype=dtype).build(), pa.Table.from_pylist(data)
    peer = transformers.AutoModelForQuestionAnswering.from_pretrained(model, dtype=common.TYPES[dtype]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def searched(batch: int) -> Callable[[], Any]:
        return lambda: answers(peer, tokenizer, data, max_length=MAX_LENGTH, batch=batch)

    return {
        "bert_ray": lambda: annotator(table),
        "run_qa.py's recipe, one by one": searched(1),
        f"run_qa.py's recipe, batches of {BATCH}": searched(BATCH),
    }, len(data)


def few_shot(scratch: Path, peer: Any) -> tuple[str, Callable[[Any], Any]]:
    """A head of ours on 64 examples of each of AG News' labels, and scikit-learn's on the peer's vectors of them."""
    from sklearn.linear_model import LogisticRegression

    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    news = pq.read_table(common.SHARED / "ag_news" / "train.parquet", columns=["text", "label"]).to_pylist()
    labels = sorted({row["label"] for row in news})
    some = [row for label in labels for row in [row for row in news if row["label"] == label][:64]]
    pq.write_table(pa.Table.from_pylist(some), scratch / "examples.parquet")
    data = DataOptions(train=str(scratch / "examples.parquet"), validation_fraction=0.0)
    train(TrainJob(model=common.MODEL, output=str(scratch / "few-shot"), task="few-shot", engine="local", data=data))
    head = LogisticRegression(C=10.0, max_iter=1000)
    head.fit(peer.encode([row["text"] for row in some]), [row["label"] for row in some])
    return str(scratch / "few-shot"), head.predict_proba


def faq(scratch: Path, peer: Any, rows: int) -> tuple[str, list[str], Callable[[Any], Any]]:
    """A bundle of ours with 1,000 questions, questions to ask, and sentence-transformers' search among the same."""
    from sentence_transformers.util import semantic_search

    from bert_ray.model.tasks.faq import build_index

    known = pq.read_table(common.SHARED / "xquad" / "en.parquet", columns=["question"])["question"].to_pylist()
    pairs = pa.table({"question": known[:INDEXED], "answer": [f"answer {at}" for at in range(INDEXED)]})
    build_index(common.MODEL, pairs, scratch / "faq")
    index = peer.encode(known[:INDEXED])
    asked = (known[INDEXED:] * (1 + rows // len(known[INDEXED:])))[:rows]
    return str(scratch / "faq"), asked, lambda vectors: semantic_search(vectors, index, top_k=1)


def sentence_vectors(task: str, rows: int, scratch: Path, dtype: str) -> tuple[Contestants, int]:
    """Ours, and sentence-transformers, which sorts texts by length, in batches of 32."""
    import torch
    from sentence_transformers import SentenceTransformer

    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.model.references import resolve

    peer = SentenceTransformer(
        resolve(common.MODEL).as_posix(), device="cpu", model_kwargs={"dtype": getattr(torch, common.TYPES[dtype])}
    )
    options: dict[str, Any] = {"labels": TOPICS} if task == "zero-shot" else {}
    data = texts(2 * rows if task == "similarity" else rows)
    first, other = (data[:rows], data[rows:]) if task == "similarity" else (data, TOPICS)
    columns = {"text": first, "text_pair": other} if task == "similarity" else {"text": first}
    model, then = common.MODEL, None
    if task == "few-shot":
        model, then = few_shot(scratch, peer)
    elif task == "faq":
        model, first, then = faq(scratch, peer, rows)
        columns = {"question": first}
    annotator = AnnotatorSpec(model=model, task=task, options=options, dtype=dtype).build()
    peer.max_seq_length = annotator.bundle.card.max_length
    table = pa.table(columns)

    def encoded(batch: int) -> Callable[[], Any]:
        def run() -> Any:
            vectors = peer.encode(first, batch_size=batch)
            if task == "embedding":
                return vectors
            if then is not None:
                return then(vectors)
            others = peer.encode(other, batch_size=batch)
            return (peer.similarity_pairwise if task == "similarity" else peer.similarity)(vectors, others)

        return run

    if task == "embedding":
        close = (np.stack(annotator(table)[task].to_numpy()) * encoded(32)()).sum(1).min()
        if close < (0.9999 if dtype == "fp32" else 0.99):
            raise SystemExit(f"a vector's cosine with sentence-transformers' is {close:.5f}: no fair comparison")
    return {
        "bert_ray": lambda: annotator(table),
        "sentence-transformers, one by one": encoded(1),
        "sentence-transformers, batches of 32": encoded(32),
    }, len(first)


def contestants(task: str, rows: int, scratch: Path, dtype: str) -> tuple[Contestants, int]:
    """What runs for a task, and how many rows it annotates."""
    if task.startswith("translation"):
        return translation(5 * rows, scratch, 4 if task.endswith("beams") else 1, dtype)
    if task == "answer":
        return answer(rows, scratch, dtype)
    if task in ("embedding", "similarity", "zero-shot", "few-shot", "faq"):
        return sentence_vectors(task, rows, scratch, dtype)
    return pipelines(task, rows, scratch, dtype)


def main() -> None:
    """Measure every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=common.TYPES, default="fp32", help="of all contestants")
    parser.add_argument("--task", choices=TASKS, action="append", help="may be given several times; default: all")
    options = parser.parse_args()
    common.set_threads(options.threads)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    result = common.RESULTS / f"{common.result_name('tasks', options.dtype)}.json"
    if options.task and result.exists():
        figures = json.loads(result.read_text())["tasks"]  # The others stay as they were.
    cpu = common.machine()["cpu"]
    how = {"cpu": cpu, "rounds": options.rounds, "threads": options.threads, "date": datetime.date.today().isoformat()}
    lines = []
    with tempfile.TemporaryDirectory(prefix="bert_ray-bench-") as scratch:
        for task in options.task or TASKS:
            try:
                runs, rows = contestants(task, options.rows, Path(scratch), options.dtype)
            except FileNotFoundError as error:
                print(f"{task}: left out, {error}", flush=True)
                continue
            for run in runs.values():
                run()  # Warm-up.
            measured = common.interleaved(runs, options.rounds)
            speeds = {name: [rows / seconds for seconds, _ in found] for name, found in measured.items()}
            best = max((name for name in speeds if name != "bert_ray"), key=lambda name: common.median(speeds[name]))
            ratios = [one / other for one, other in zip(speeds["bert_ray"], speeds[best], strict=True)]
            figures[task] = {**how, "rows": rows, "best_peer": best, "ratio": common.median(ratios)} | {
                name: {"rows_per_second": common.median(found)} for name, found in speeds.items()
            }
            lines += [
                (
                    task,
                    name,
                    f"{common.median(found):.1f}",
                    f"{common.median(ratios):.2f}" if name == "bert_ray" else "",
                )
                for name, found in speeds.items()
            ]
            # Kept as they come: one that cannot be compared ends the run, and loses nothing.
            common.keep(common.result_name("tasks", options.dtype), {"dtype": options.dtype, "tasks": figures})
    common.table(
        f"Tasks beside the Hugging Face pipeline, MiniLM, {options.threads} threads, {options.dtype}",
        ("task", "contestant", "rows/s", "beside its best"),
        lines,
    )


if __name__ == "__main__":
    main()
