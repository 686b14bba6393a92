"""Reference implementations for `quality.py`: the recipes of transformers' own examples, by transformers.Trainer.

Each takes the rows to train on and to test on, a seed and the precision (bf16: as Trainer does it, by autocast; TF-IDF
has its own), and returns the case's measure.
Padded batches in random order; like ours: linear decay with a tenth of warm-up, weight decay 0.01, clipping at 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from pairs import cut_accuracy, held_out
from quality_cases import Case, answer_stands

# The measure alone, or all that it measures.
Reference = Callable[[Case, pa.Table, pa.Table, int, str], float | dict[str, float]]


def _source(case: Case) -> str:
    from bert_ray.model.references import resolve

    return str(resolve(case.base))


def _train(
    model: Any, rows: list[dict[str, Any]], collator: Any, case: Case, seed: int, precision: str, loss: Any = None
) -> Any:
    """A trained Trainer; `loss` (outputs, labels, items in the batch) stands for the model's own."""
    import torch
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="bert_ray-reference-"),
        num_train_epochs=case.settings["epochs"],
        per_device_train_batch_size=case.settings.get("batch_size", 32),
        per_device_eval_batch_size=16,
        learning_rate=case.settings["learning_rate"],
        warmup_steps=0.1,
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        bf16=precision == "bf16",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, compute_loss_func=loss)
    trainer.train()
    return trainer


def _balanced(labels: np.ndarray) -> Any:
    """Cross-entropy that weighs labels by scikit-learn's `balanced`."""
    import torch

    counts = np.bincount(labels)
    weights = torch.tensor(len(labels) / (len(counts) * counts), dtype=torch.float32)

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs["logits"].float()
        return torch.nn.functional.cross_entropy(logits, labels, weight=weights.to(logits.device))

    return loss


def sequences(case: Case, train: pa.Table, test: pa.Table, seed: int, precision: str) -> float:
    """Classification and regression of one text or two, as run_classification.py and run_glue.py do."""
    from scipy.stats import spearmanr
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

    set_seed(seed)
    names = {key: case.columns.get(key, key) for key in ("text", "label")}
    inputs = [names["text"]] + ([case.columns["text_pair"]] if "text_pair" in case.columns else [])
    regression = case.task == "regression"
    known = [] if regression else sorted(set(train[names["label"]].to_pylist()), key=str)
    model = AutoModelForSequenceClassification.from_pretrained(
        _source(case), num_labels=1 if regression else len(known)
    )
    tokenizer = AutoTokenizer.from_pretrained(_source(case))

    def encoded(table: pa.Table) -> tuple[list[dict[str, Any]], np.ndarray]:
        found = tokenizer(
            *(table[name].to_pylist() for name in inputs),
            truncation=True,
            max_length=case.settings.get("max_length", 256),
        )
        labels = table[names["label"]].to_pylist()
        labels = [float(value) if regression else known.index(value) for value in labels]
        rows = [{key: found[key][row] for key in found} | {"labels": labels[row]} for row in range(len(labels))]
        return rows, np.array(labels)

    rows, learned = encoded(train)
    loss = _balanced(learned) if case.settings.get("class_weights") == "balanced" else None
    trainer = _train(model, rows, DataCollatorWithPadding(tokenizer), case, seed, precision, loss)
    tested, so = encoded(test)
    outputs = trainer.predict(tested).predictions
    if regression:
        return float(spearmanr(outputs[:, 0], so).statistic)
    said = outputs.argmax(axis=1)
    return float(f1_score(so, said)) if case.measure == "f1" else float(accuracy_score(so, said))


def tokens(case: Case, train: pa.Table, test: pa.Table, seed: int, precision: str) -> float:
    """Entities, as run_ner.py does: the first piece of a word carries its tag; F1 by seqeval."""
    from seqeval.metrics import f1_score
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        set_seed,
    )

    set_seed(seed)
    names = sorted({tag for tags in train["tags"].to_pylist() for tag in tags})
    model = AutoModelForTokenClassification.from_pretrained(_source(case), num_labels=len(names))
    tokenizer = AutoTokenizer.from_pretrained(_source(case))

    def encoded(table: pa.Table) -> list[dict[str, Any]]:
        found = tokenizer(table["tokens"].to_pylist(), truncation=True, max_length=256, is_split_into_words=True)
        rows = []
        for row, tags in enumerate(table["tags"].to_pylist()):
            words, labels = found.word_ids(row), []
            for place, word in enumerate(words):
                first = word is not None and (place == 0 or words[place - 1] != word)
                labels.append(names.index(tags[word]) if first and tags[word] in names else -100)
            rows.append({"input_ids": found["input_ids"][row], "labels": labels})
        return rows

    trainer = _train(model, encoded(train), DataCollatorForTokenClassification(tokenizer), case, seed, precision)
    rows = encoded(test)
    outputs = trainer.predict(rows)
    said, so = [], []
    for scores, labels in zip(outputs.predictions.argmax(axis=2), outputs.label_ids, strict=True):
        kept = labels != -100
        said.append([names[index] for index in scores[kept]])
        so.append([names[index] for index in labels[kept]])
    return float(f1_score(so, said))


def questions(case: Case, train: pa.Table, test: pa.Table, seed: int, precision: str) -> dict[str, float]:
    """Answers, as run_qa.py does: windows of 384 tokens with 128 shared, [CLS] where a window has no answer.

    The best span of a test row as run_qa.py finds it; F1 as in SQuAD's own script. Rows whose answer does not stand at
    its offset are left out, as ours does.
    """
    import torch
    from peers_answer import answers
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, set_seed

    from bert_ray.model.tasks import get_task

    set_seed(seed)
    model = AutoModelForQuestionAnswering.from_pretrained(_source(case))
    tokenizer = AutoTokenizer.from_pretrained(_source(case))
    train, test = (table.filter(pa.array(map(answer_stands, table.to_pylist()))) for table in (train, test))
    table = train.to_pydict()
    found = tokenizer(
        table["question"],
        table["context"],
        truncation="only_second",
        max_length=case.settings["max_length"],
        stride=128,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = []
    for window, row in enumerate(found["overflow_to_sample_mapping"]):
        begin = table["answer_start"][row]
        end = begin + len(table["answer_text"][row])
        inside = [
            place
            for place, (source, span) in enumerate(
                zip(found.sequence_ids(window), found["offset_mapping"][window], strict=True)
            )
            if source == 1 and span[0] < end and span[1] > begin
        ]
        whole = (
            inside
            and found["offset_mapping"][window][inside[0]][0] <= begin
            and found["offset_mapping"][window][inside[-1]][1] >= end
        )
        first, last = (inside[0], inside[-1]) if whole else (0, 0)
        rows.append(
            {key: found[key][window] for key in ("input_ids", "token_type_ids", "attention_mask")}
            | {"start_positions": first, "end_positions": last}
        )
    trainer = _train(model, rows, DataCollatorWithPadding(tokenizer), case, seed, precision)
    with torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        said = answers(trainer.model.eval(), tokenizer, test.to_pylist(), max_length=case.settings["max_length"])
    # One way to compare answers: the task's own metric, which is SQuAD's.
    from bert_ray.model.card import Card

    task = get_task(Card(task="answer", inputs=["question", "context"]))
    inputs = [test[name].combine_chunks() for name in task.inputs]
    truth = [test[name].combine_chunks() for name in task.truths]
    return task.metrics(pa.array(said, task.output_type()), inputs, truth)


def tfidf(case: Case, train: pa.Table, test: pa.Table, seed: int, precision: str) -> float:
    """TF-IDF with logistic regression."""
    from sklearn.metrics import accuracy_score, f1_score

    from bert_ray.planning.tfidf import fit_tfidf

    text, label = case.columns.get("text", "text"), case.columns.get("label", "label")
    if case.task == "multi-label":
        names = sorted({name for labels in train[label].to_pylist() for name in labels})
        said, so = [], []
        for name in names:
            has = [name in labels for labels in train[label].to_pylist()]
            said.append(fit_tfidf(train[text].to_pylist(), has, seed).predict(test[text].to_pylist()))
            so.append([name in labels for labels in test[label].to_pylist()])
        return float(f1_score(np.array(so).T, np.array(said).T, average="micro"))
    model = fit_tfidf(train[text].to_pylist(), [str(value) for value in train[label].to_pylist()], seed)
    said = model.predict(test[text].to_pylist())
    so = [str(value) for value in test[label].to_pylist()]
    if case.measure == "f1":
        return float(f1_score(so, said, pos_label=sorted(set(so))[1]))
    return float(accuracy_score(so, said))


def _sentence_model(case: Case) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(_source(case))


def _computed_in(precision: str) -> Any:
    """Products in bf16 where ours are, of weights that stay fp32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _cosines(model: Any, table: pa.Table) -> np.ndarray:
    one, other = (model.encode(table[name].to_pylist(), normalize_embeddings=True) for name in ("text", "text_pair"))
    return (one * other).sum(axis=1)


def _correlation(model: Any, test: pa.Table) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(_cosines(model, test), test["score"].to_numpy()).statistic)


def cosines(case: Case, train: pa.Table, test: pa.Table, seed: int, precision: str) -> float:
    """Cosines of sentence-transformers' embeddings."""
    with _computed_in(precision):
        return _correlation(_sentence_model(case), test)


def cosines_tuned(case: Case, train: pa.Table, test: pa.Table, seed: int, precision: str) -> float:
    """The same after sentence-transformers' training with its CoSENTLoss."""
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses

    assert case.settings is not None
    rest = train
    if case.cut:
        rest, train = held_out(train)
    model = _sentence_model(case)
    rows = {"sentence1": train["text"].to_pylist(), "sentence2": train["text_pair"].to_pylist()}
    rows["score"] = [float(value) for value in train[case.columns["label"]].to_pylist()]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="bert_ray-reference-"),
        num_train_epochs=case.settings["epochs"],
        per_device_train_batch_size=32,
        learning_rate=case.settings["learning_rate"],
        weight_decay=0.01,
        warmup_steps=0.1,
        save_strategy="no",
        report_to=[],
        seed=seed,
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
    )
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), loss=losses.CoSENTLoss(model)
    ).train()
    with _computed_in(precision):
        if case.cut:
            return cut_accuracy(lambda table: _cosines(model, table), rest, test)
        return _correlation(model, test)


def retrieval(case: Case, train: pa.Table, test: pa.Table, seed: int, precision: str) -> dict[str, float]:
    """The right answer's place, by sentence-transformers' semantic_search."""
    from sentence_transformers.util import semantic_search

    model = _sentence_model(case)
    with _computed_in(precision):
        answers = model.encode(train["answer"].to_pylist(), convert_to_tensor=True)
        asked = model.encode(test["question"].to_pylist(), convert_to_tensor=True)
    found = semantic_search(asked, answers, top_k=len(train))
    place = {name: row for row, name in enumerate(train["id"].to_pylist())}
    ranks = [
        1 + [hit["corpus_id"] for hit in hits].index(place[name])
        for hits, name in zip(found, test["id"].to_pylist(), strict=True)
    ]
    return {"recall@1": float(np.mean(np.equal(ranks, 1))), "mrr": float(np.mean(1 / np.array(ranks)))}


REFERENCES: dict[str, Reference] = {
    "sequences": sequences,
    "tokens": tokens,
    "questions": questions,
    "cosines": cosines,
    "cosines_tuned": cosines_tuned,
    "retrieval": retrieval,
}
