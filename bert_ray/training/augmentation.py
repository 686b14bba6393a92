"""Distorted training rows: words left out, swapped, misspelled or replaced, anew each time a row is seen.

What happens to a row is a function of the job's seed, the epoch and the row's number: a run that goes on from a
checkpoint, or with another number of workers, sees the same rows. Validation rows are never touched.

Leaving out and swapping are two of the operations of Wei and Zou, EDA: Easy Data Augmentation Techniques, arXiv
1901.11196; words that a masked language model fills in are Kobayashi's Contextual Augmentation, arXiv 1805.06201.

Shapes: P pieces, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from bert_ray.errors import JobError
from bert_ray.model.architectures import max_positions
from bert_ray.model.bundle import load_bundle
from bert_ray.model.encoder import encode
from bert_ray.model.packing import pack_rows
from bert_ray.model.tasks.fill_mask import FillMask
from bert_ray.model.tokenization import Ragged
from bert_ray.model.vocabulary import is_wordpiece
from bert_ray.model.vocabulary_head import vocabulary_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bert_ray.training.job import AugmentationOptions

# A filled-in word is drawn from so many of the likeliest: the first is often the word that stood there.
_CANDIDATES = 10

_LETTERS = "abcdefghijklmnopqrstuvwxyz"

# A word: token ids, and the type (of two texts) that they have.
_Word = tuple[list[int], int]


class Augmentation:
    """Distorts token lists word by word; special tokens stay, and so does each text's last word."""

    def __init__(
        self,
        options: AugmentationOptions,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Set up.

        Args:
            options: what to do, how often.
            tokenizer: of the rows.
            max_length: most tokens of a row; a misspelled word has more of them.
            seed: the job's.
            device: where the model that fills in words computes.

        Raises:
            JobError: that model has no vocabulary head, or another vocabulary.
            BundleError: it cannot be loaded.
        """
        self._options, self._max_length, self._seed, self._device = options, max_length, seed, device
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = frozenset(tokenizer.all_special_ids)
        self._mask = tokenizer.mask_token_id
        self._begins = _begins(tokenizer)
        self._filler = None
        if options.substitution:
            bundle = load_bundle(str(options.model))
            task = FillMask(bundle.card, bundle.config)
            if bundle.tokenizer().get_vocab() != tokenizer.get_vocab():
                raise JobError(
                    f"augmentation.model {options.model} has another vocabulary than the model to train; give one that "
                    "was pretrained with the same tokenizer"
                )
            if max_length > (room := max_positions(bundle.config)):
                raise JobError(
                    f"augmentation.model {options.model} reads rows of {room} tokens, and those to train on have up to "
                    f"{max_length}: give a model that reads as many, or max_length={room}"
                )
            self._filler = bundle.model(task).to(device)

    def __call__(self, tokens: Ragged, pieces: np.ndarray, epoch: int) -> Ragged:
        """Distorted copies.

        Args:
            tokens: of all rows.
            pieces: int64 (P,), which of them.
            epoch: from 0.

        Returns:
            P token lists in the order of `pieces`.
        """
        rows: list[list[_Word]] = []
        draws, chosen = [], []
        for place, piece in enumerate(pieces.tolist()):
            draw = np.random.default_rng([self._seed, epoch, piece])
            part = slice(tokens.offsets[piece], tokens.offsets[piece + 1])
            types = None if tokens.types is None else tokens.types[part].tolist()
            words = self._distorted(self._words(tokens.ids[part].tolist(), types), draw)
            chosen += [(place, index) for index in self._chosen(words, self._options.substitution, draw)]
            rows.append(words)
            draws.append(draw)
        if chosen:
            self._fill(rows, chosen, draws)
        return _ragged(rows, tokens.types is not None)

    def _words(self, ids: list[int], types: list[int] | None) -> list[_Word]:
        """Tokens gathered to words; a special token is a word of its own."""
        words: list[_Word] = []
        for place, token in enumerate(ids):
            kind = types[place] if types else 0
            joins = words and not self._begins[token] and words[-1][0][-1] not in self._special
            if joins and token not in self._special and words[-1][1] == kind:
                words[-1][0].append(token)
            else:
                words.append(([token], kind))
        return words

    def _chosen(self, words: list[_Word], share: float, draw: np.random.Generator) -> list[int]:
        """The words that something happens to: each with probability `share`, special tokens never."""
        if not share:
            return []
        hit = draw.random(len(words)) < share
        return [index for index in np.flatnonzero(hit).tolist() if words[index][0][0] not in self._special]

    def _distorted(self, words: list[_Word], draw: np.random.Generator) -> list[_Word]:
        options = self._options
        for index in self._chosen(words, options.swap, draw):
            neighbour = words[index + 1] if index + 1 < len(words) else None
            # Words change places within their text only.
            if neighbour and neighbour[0][0] not in self._special and neighbour[1] == words[index][1]:
                words[index], words[index + 1] = neighbour, words[index]
        room = self._max_length - sum(len(tokens) for tokens, _ in words)
        for index in self._chosen(words, options.characters, draw):
            tokens, kind = words[index]
            misspelled = self._misspelled(tokens, draw)
            if (more := len(misspelled) - len(tokens)) <= room:
                words[index], room = (misspelled, kind), room - more
        left = self._chosen(words, options.deletion, draw)
        if left:
            gone = set(left)
            # Texts are told apart by the special tokens between them: RoBERTa's are all of one type.
            special = np.array([word[0][0] in self._special for word in words])
            text = np.cumsum(special)
            for number in np.unique(text[~special]):
                mine = np.flatnonzero((text == number) & ~special).tolist()
                if gone.issuperset(mine):  # A text keeps at least one word.
                    gone.discard(mine[int(draw.integers(len(mine)))])
            words = [word for index, word in enumerate(words) if index not in gone]
        return words

    def _misspelled(self, ids: list[int], draw: np.random.Generator) -> list[int]:
        """A word with one character left out, doubled, changed, or swapped with the next."""
        text = self._backend.decode(ids, skip_special_tokens=False)
        word = text.strip()
        if len(word) < 2:
            return ids
        place, what = int(draw.integers(len(word) - 1)), int(draw.integers(4))
        letter = _LETTERS[int(draw.integers(len(_LETTERS)))]
        if what == 0:
            word = word[:place] + word[place + 1 :]
        elif what == 1:
            word = word[:place] + word[place] + word[place:]
        elif what == 2:
            word = word[:place] + letter + word[place + 1 :]
        else:
            word = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        # A blank before the word, where its first token says that one stood there (byte-level BPE).
        blank = " " if text != word and self._backend.id_to_token(ids[0]).startswith("Ġ") else ""
        return self._backend.encode(blank + word, add_special_tokens=False).ids or ids

    @torch.no_grad()
    def _fill(self, rows: list[list[_Word]], chosen: list[tuple[int, int]], draws: list[np.random.Generator]) -> None:
        """Put a likely word in the place of each chosen word (row, word)."""
        assert self._filler is not None
        for row, index in chosen:
            rows[row][index] = ([self._mask], rows[row][index][1])
        ragged = _ragged(rows, pair=any(kind for words in rows for _, kind in words))
        # Where each mask stands among all tokens: a text may hold masks of its own.
        places = [ragged.offsets[row] + sum(len(tokens) for tokens, _ in rows[row][:index]) for row, index in chosen]
        batch = pack_rows(ragged, np.arange(len(ragged))).to(self._device)
        hidden = encode(self._filler, batch)[torch.tensor(np.array(places), device=self._device)]
        scores, ids = vocabulary_logits(self._filler, hidden).float().topk(_CANDIDATES, dim=1)
        chances, candidates = scores.double().softmax(1).cpu().numpy(), ids.cpu().numpy()
        for (row, index), chance, found in zip(chosen, chances, candidates, strict=True):
            drawn = draws[row].choice(found, p=chance / chance.sum())
            rows[row][index] = ([int(drawn)], rows[row][index][1])


def _begins(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Which tokens of the vocabulary begin a word, bool (V,)."""
    vocabulary = tokenizer.get_vocab()
    begins = np.ones(max(vocabulary.values()) + 1, bool)
    # To WordPiece these are letters.
    known = () if is_wordpiece(tokenizer) else ("Ġ", "▁")
    marks = tuple(mark for mark in known if any(token.startswith(mark) for token in vocabulary))
    for token, index in vocabulary.items():
        begins[index] = token.startswith(marks) if marks else not token.startswith("##")
    return begins


def _ragged(rows: list[list[_Word]], pair: bool) -> Ragged:
    """Words -> token lists."""
    flat = [[(token, kind) for tokens, kind in words for token in tokens] for words in rows]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in flat], out=offsets[1:])
    return Ragged(
        ids=np.array([token for row in flat for token, _ in row], np.int32),
        types=np.array([kind for row in flat for _, kind in row], np.int32) if pair else None,
        offsets=offsets,
    )
