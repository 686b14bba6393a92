"""The stream of rows that pretraining takes from a corpus: order, steps, masks, parts, replayed text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_ray.errors import JobError
from bert_ray.model.bundle import load_bundle
from bert_ray.training.corpus_source import Rows
from bert_ray.training.job import DataOptions, PretrainingOptions, TrainJob
from bert_ray.training.launch import prepare
from bert_ray.training.masking import NOT_ASKED
from bert_ray.training.shards import Documents
from tests.conftest import tiny_tokenizer
from tests.corpora import corpus_source, documents, make_corpus, random_texts

Jobs = Callable[..., TrainJob]


def test_documents_come_back_from_their_rows(corpus: Path) -> None:
    rows = Rows(Documents(corpus, "train"), 17)
    assert rows.lengths.max() <= 17
    ids, _ = rows.take(np.arange(len(rows)))
    expected = [tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in documents(100)]
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))
    # Rows of one document are of about equal length.
    of = rows.document_of(np.arange(len(rows)))
    assert all(np.ptp(rows.lengths[of == document]) <= 1 for document in range(100))


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_every_row_is_seen_once_in_each_pass(corpus: Path, pretraining_for: Jobs, warmup: float) -> None:
    rows = corpus_source(corpus, pretraining_for(batch_warmup=warmup, steps=40))
    seen = np.concatenate([rows.select(step) for step in range(40)])
    passes = len(seen) // len(rows)
    assert passes >= 2
    assert len(set(seen.tolist())) == len(seen)
    for number in range(passes):
        one = seen[(seen >= number * len(rows)) & (seen < (number + 1) * len(rows))]
        assert sorted(one % len(rows)) == list(range(len(rows)))


def test_a_step_takes_its_tokens_and_batch_warmup_begins_with_an_eighth(corpus: Path, pretraining_for: Jobs) -> None:
    rows = corpus_source(corpus, pretraining_for(batch_warmup=0.5, steps=40))
    tokens = [int(rows.lengths_of(rows.select(step)).sum()) for step in range(40)]
    assert tokens[0] < 512 / 8 + 40
    assert np.mean(tokens[20:]) == pytest.approx(512, rel=0.02)
    assert np.mean(tokens[5:15]) < np.mean(tokens[10:20])


def test_no_step_is_smaller_than_a_row(corpus: Path, pretraining_for: Jobs) -> None:
    """Else a row would be taken by several, or a step have none."""
    longest = int(corpus_source(corpus, pretraining_for(steps=1)).lengths_of(np.arange(50)).max())
    rows = corpus_source(corpus, pretraining_for(batch_warmup=0.5, steps=40, batch_tokens=2 * longest))
    taken = [rows.select(step) for step in range(40)]
    assert min(map(len, taken)) >= 1
    assert len(set(np.concatenate(taken).tolist())) == sum(map(len, taken))
    with pytest.raises(JobError, match=r"batch_tokens is 8, but rows have up to \d+ tokens.*batch_tokens=\d+ or more"):
        corpus_source(corpus, pretraining_for(steps=40, batch_tokens=8))


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.9])
def test_epochs_are_whole_passes_whatever_the_batch_warmup(corpus: Path, pretraining_for: Jobs, warmup: float) -> None:
    rows = corpus_source(corpus, pretraining_for(batch_warmup=warmup, steps=None, epochs=2))
    seen = np.concatenate([rows.select(step) for step in range(rows.steps)])
    # To the row: the last step may take a few of a third pass.
    assert set(range(2 * len(rows))) <= set(seen.tolist())
    assert len(seen) < 2 * len(rows) + len(rows.select(rows.steps - 1))


def test_the_end_of_a_run_needs_nothing_of_its_beginning(corpus: Path, pretraining_for: Jobs) -> None:
    job = pretraining_for(steps=400)
    one, other = corpus_source(corpus, job), corpus_source(corpus, job)
    for step in range(399):
        one.select(step)
    assert (one.select(399) == other.select(399)).all()


def test_general_text_is_replayed_as_a_share_of_every_step(
    corpus: Path, general: Path, pretraining_for: Jobs, tiny_encoder: Path
) -> None:
    data = DataOptions(train=str(corpus), replay=str(general), replay_share=0.25)
    job = pretraining_for(data=data, steps=None, epochs=2)
    base = load_bundle(str(tiny_encoder))
    card, opened, _ = prepare(job, base)
    card.max_length = job.max_length
    rows, judged = opened.sources(job, base, card, torch.device("cpu"))
    alone = corpus_source(corpus, job)
    assert rows.steps == pytest.approx(alone.steps / 0.75, abs=1)
    assert len(judged) == len(Rows(Documents(corpus, "validation"), job.max_length - 2))
    seen = [rows.select(step) for step in range(rows.steps)]
    own = [samples[samples % len(rows) < len(alone)] for samples in seen]
    # Every document's rows twice, for two passes, as without replay.
    counts = np.bincount(np.concatenate(own) % len(rows), minlength=len(alone))
    assert set(counts.tolist()) <= {2, 3}
    assert np.mean(counts) == pytest.approx(2, rel=0.03)
    for samples, kept in zip(seen[:-1], own[:-1], strict=True):
        share = 1 - rows.lengths_of(kept).sum() / rows.lengths_of(samples).sum()
        assert share == pytest.approx(0.25, abs=0.1)
    again = np.concatenate([np.setdiff1d(samples, kept) for samples, kept in zip(seen, own, strict=True)])
    assert len(set(again.tolist())) == len(again)
    batch, targets = rows.batch(np.sort(again[:3]), 0)
    word = tiny_tokenizer().convert_tokens_to_ids("money")
    asked = targets[: len(batch.input_ids)]
    assert set(asked[asked != NOT_ASKED].tolist()) == {word}
    assert str(general) in rows.where(again[:3])


def test_a_part_from_elsewhere_is_of_the_same_corpus(
    corpus: Path, general: Path, pretraining_for: Jobs, tiny_encoder: Path
) -> None:
    data = DataOptions(train=str(corpus), replay=str(general))
    job = pretraining_for(data=data, pretraining=PretrainingOptions(sentences="next", mask_rate=0.01))
    base = load_bundle(str(tiny_encoder))
    card, opened, _ = prepare(job, base)
    rows, _ = opened.sources(job, base, card, torch.device("cpu"))
    own = len(Rows(Documents(corpus, "train"), card.max_length - 3))
    batch, targets = rows.batch(np.arange(len(rows)), 0)
    tokens, parts, _ = targets.split((len(batch.input_ids), len(rows), len(rows)))
    ids = torch.where(tokens >= 0, tokens, batch.input_ids)  # Unmasked.
    money = ids == tiny_tokenizer().convert_tokens_to_ids("money")
    begins = int(batch.cu_seqlens[own])
    assert (parts[:own] == 1).any()
    assert not money[:begins].any()
    assert money[begins:].sum() == (len(ids) - begins) - 3 * (len(rows) - own)


def test_a_steps_batch_has_special_tokens_at_its_ends_and_masks_between(corpus: Path, pretraining_for: Jobs) -> None:
    rows = corpus_source(corpus, pretraining_for())
    samples = rows.select(0)
    batch, targets = rows.batch(samples, 0)
    marks = tiny_tokenizer()
    ends = batch.cu_seqlens.long()
    assert (batch.input_ids[ends[:-1]] == marks.cls_token_id).all()
    assert (batch.input_ids[ends[1:] - 1] == marks.sep_token_id).all()
    asked = targets[: len(batch.input_ids)]
    assert (asked[ends[:-1]] == NOT_ASKED).all()
    assert (asked != NOT_ASKED).sum() == rows.weigh(samples)
    assert (batch.position_ids[ends[:-1]] == 0).all()
    assert int(batch.position_ids.max()) == max(batch.lengths) - 1


def begin_or_end_with(rows: Rows, tokens: np.ndarray) -> list[int]:
    """The rows that begin or end with these tokens."""
    contents = (rows.take(np.array([row]))[0] for row in range(len(rows)))
    ends = ((row, (ids[: len(tokens)], ids[len(ids) - len(tokens) :])) for row, ids in enumerate(contents))
    return [row for row, both in ends if any(np.array_equal(end, tokens) for end in both)]


@pytest.mark.parametrize("sentences", ["order", "next"])
def test_two_parts(corpus: Path, pretraining_for: Jobs, sentences: str) -> None:
    plain = corpus_source(corpus, pretraining_for(max_length=39))
    rows = corpus_source(corpus, pretraining_for(pretraining=PretrainingOptions(sentences=sentences, mask_rate=0.01)))
    samples = np.arange(len(rows))
    batch, targets = rows.batch(samples, 0)
    tokens, parts, _ = targets.split((len(batch.input_ids), len(samples), len(samples)))
    ids = torch.where(tokens >= 0, tokens, batch.input_ids)  # Unmasked.
    originals = plain._rows
    taken: set[int] = set()
    assert 0.3 < (parts == 1).float().mean() < 0.7
    sep, kinds = tiny_tokenizer().sep_token_id, batch.token_type_ids
    for sample in range(len(samples)):
        here = slice(int(batch.cu_seqlens[sample]), int(batch.cu_seqlens[sample + 1]))
        row, kind = ids[here], kinds[here]
        first, second = row[1:][kind[1:] == 0][:-1], row[kind == 1][:-1]
        assert row[int((kind == 0).sum()) - 1] == sep
        document, _ = originals.take(np.array([sample]))
        if parts[sample] == 0:
            assert torch.cat((first, second)).tolist() == document.tolist()
        elif parts[sample] == 1 and sentences == "order":
            assert torch.cat((second, first)).tolist() == document.tolist()
        elif parts[sample] == 1:
            assert first.tolist() == document[: len(first)].tolist()
            assert len(first) + len(second) == len(document)
            assert second.tolist() != document[len(first) :].tolist()
            begun = np.array(begin_or_end_with(originals, second.numpy()), np.int64)
            of = set(originals.document_of(begun)) - set(originals.document_of(np.array([sample])))
            assert of, "no row of another document begins or ends like that"
            taken |= of if len(of) == 1 else set()
    if sentences == "next":
        assert len(taken) > len(samples) / 5, "the second parts stem from the same few documents"


def test_a_row_s_length_does_not_tell_whether_its_second_part_follows(tmp_path: Path, pretraining_for: Jobs) -> None:
    """Where few rows are long, one that is would seldom find another that is long enough by chance alone."""
    words = [" ".join(random_texts(60)).split() for _ in range(4)]
    texts = [" ".join(words[number % 4][number : number + (30 if number % 20 == 0 else 6)]) for number in range(400)]
    place = make_corpus(tmp_path / "uneven", tiny_tokenizer(), texts)
    source = corpus_source(place, pretraining_for(max_length=64, pretraining=PretrainingOptions(sentences="next")))
    samples = np.arange(len(source._rows))
    batch, targets = source.batch(samples, 0)
    _, parts, _ = targets.split((len(batch.input_ids), len(samples), len(samples)))
    lengths = np.array(batch.lengths)
    long = lengths > np.median(lengths) * 2
    assert 10 <= long.sum() <= 40
    assert 0.25 < (parts.numpy()[long] == 1).mean() < 0.75
    assert 0.35 < (parts.numpy()[~long] == 1).mean() < 0.65


def test_a_document_that_has_most_of_the_rows_is_changed_as_often(tmp_path: Path, pretraining_for: Jobs) -> None:
    """Else what it is about would tell that its second parts follow."""
    words = " ".join(random_texts(400)).split()
    texts = [" ".join(words), *(" ".join(words[number : number + 20]) for number in range(6))]
    place = make_corpus(tmp_path / "book", tiny_tokenizer(), texts)
    source = corpus_source(place, pretraining_for(max_length=24, pretraining=PretrainingOptions(sentences="next")))
    samples = np.arange(len(source._rows))
    batch, targets = source.batch(samples, 0)
    _, parts, _ = targets.split((len(batch.input_ids), len(samples), len(samples)))
    begin, stop = source._rows.siblings(samples)
    book = stop - begin > len(samples) * 0.8
    assert book.sum() > 50
    assert 0.35 < (parts.numpy()[book] == 1).mean() < 0.65


def test_the_next_sentence_of_the_only_document_is_its_own(tmp_path: Path, pretraining_for: Jobs) -> None:
    alone = make_corpus(tmp_path / "alone", tiny_tokenizer(), [" ".join(random_texts(20))])
    source = corpus_source(alone, pretraining_for(max_length=39, pretraining=PretrainingOptions(sentences="next")))
    samples = np.arange(len(source._rows))
    assert len(samples) > 5
    batch, targets = source.batch(samples, 0)
    _, parts, _ = targets.split((len(batch.input_ids), len(samples), len(samples)))
    assert set(parts.tolist()) == {0}
