"""Translation: a text in another language, or in other words.

Output: string. The model is transformers' `EncoderDecoderModel`: the base's encoder, and a decoder of BERT's layers
that starts from the base's own weights where they fit (`translation_start.py`). The decoder has a vocabulary of its
own, in `target/tokenizer.json` of the bundle; a bundle without one uses the encoder's.

A text is translated sentence by sentence, as models that learn from pairs of sentences expect it.

Shapes: B rows, P pieces (sentences), T tokens of a packed batch, S tokens of all targets of a batch, D hidden size,
V the decoder's vocabulary, W longest translation in tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from bert_ray.errors import BundleError, JobError
from bert_ray.model.architectures import ENCODER_DECODER
from bert_ray.model.decoder import decode_targets, decoder_of
from bert_ray.model.examples import Examples, Targets
from bert_ray.model.generation import Generator
from bert_ray.model.tasks.answer_spans import take_pieces
from bert_ray.model.tasks.base import Options, Outputs, Task, set_dropout
from bert_ray.model.tasks.sections import Section, text_cases
from bert_ray.model.tasks.translation_start import TARGET_TOKENIZER, make_start
from bert_ray.model.tokenization import Pieces, Tokenizer, as_strings, is_blank, to_python_strings
from bert_ray.model.vocabulary_head import vocabulary_losses

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch

# Behind what a sentence ends: a mark with what closes quotes and brackets, and white space; in Chinese and Japanese the
# marks alone; or the end of a line.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])(?![。！？…])[”’」』）)\]]*|\n\s*")
# Languages that put no blank between sentences.
_WITHOUT_BLANKS = ("zh", "ja", "th")
# Blanks that a tokenizer's own decoder puts between Chinese or Japanese characters.
_BETWEEN_CHARACTERS = re.compile(r"(?<=[\u3040-\u30ff\u3400-\u9fff]) (?=[\u3040-\u30ff\u3400-\u9fff])")
_CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(kw_only=True, frozen=True, slots=True)
class TranslationOptions(Options):
    """What may be chosen per call, and what a new decoder is like.

    Attributes:
        source_language: code of the language translated from (`en`, `zh`); it stands on the card, for whoever looks.
        target_language: of the language translated to; it decides how BLEU splits words and how sentences are joined.
        beams: hypotheses that are kept at each step; 1 takes the likeliest token always (greedy).
        length_penalty: exponent of the length by which a hypothesis' log probability is divided; above 1 favours long
            ones.
        max_target_tokens: longest translation of a sentence.
        split: `sentences`: each sentence of a text by itself; `none`: the text as it is.
        decoder_layers: of a new decoder; at most as many as the encoder has.
        vocabulary: largest number of tokens of a new decoder.
    """

    source_language: str = ""
    target_language: str = ""
    beams: int = 4
    length_penalty: float = 1.0
    max_target_tokens: int = 128
    overflow: Literal["truncate"] = "truncate"
    split: Literal["sentences", "none"] = "sentences"
    decoder_layers: int = 3
    vocabulary: int = 8000

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        for name, least in (("beams", 1), ("max_target_tokens", 2), ("decoder_layers", 1), ("vocabulary", 100)):
            if (value := getattr(self, name)) < least:
                raise JobError(f"options.{name} is {value}; give {least} or more")
        if not -10 <= self.length_penalty <= 10:
            raise JobError(f"options.length_penalty is {self.length_penalty}; give a number from -10 to 10")


class SentenceTokenizer(Tokenizer):
    """Texts as their sentences, a piece each; one that is longer than the model as several."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, split: str) -> None:
        super().__init__(tokenizer, max_length, overflow="windows", overlap=0)
        self._split = split

    def __call__(self, inputs: Sequence[pa.Array]) -> Pieces:
        """Tokenise texts, none of them null."""
        if self._split == "none":
            return super().__call__(inputs)
        texts = [sentences(text) for text in to_python_strings(inputs[0])]
        owners = np.repeat(np.arange(len(texts)), [len(found) for found in texts])
        pieces = super().__call__([pa.array([one for found in texts for one in found], pa.large_string())])
        pieces.rows = owners[pieces.rows]
        return pieces

    def whole(self, inputs: Sequence[pa.Array]) -> Pieces:
        """Tokenise texts to learn from: one piece each, cut at the model's length."""
        pieces = super().__call__(inputs)
        return pieces if len(pieces) == len(inputs[0]) else take_pieces(pieces, pieces.starts[:-1])


def sentences(text: str) -> list[str]:
    """Split a text behind its sentences; at least one, and none of them blank unless the whole text is."""
    borders = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts: list[list[str]] = []
    quotes, spoke = 0, False
    for start, end in pairwise(borders):
        stretch = text[start:end]
        # It closes where no blank is before it, or one behind it.
        closes = quotes % 2 and stretch.startswith('"')
        if closes and (stretch[1:2].isspace() or not parts[-1][-1][-1:].isspace()):
            parts[-1].append('"')
            stretch, quotes = stretch[1:], quotes + 1
        quotes += stretch.count('"')
        speaks = any(map(str.isalnum, stretch))
        if parts and not (spoke and speaks):  # Marks alone are no sentence.
            parts[-1].append(stretch)
            spoke = spoke or speaks
        else:
            parts.append([stretch])
            spoke = speaks
    return [whole for part in parts if (whole := "".join(part).strip())] or [text]


class Translation(Task):
    """A text in another language."""

    kind: ClassVar[str] = "translation"
    truths: ClassVar[tuple[str, ...]] = ("translation",)
    metric: ClassVar[str] = "bleu"
    blank_is_null: ClassVar[bool] = False
    tiles: ClassVar[int] = 4
    generates: ClassVar[bool] = True
    options_type: ClassVar[type[Options]] = TranslationOptions
    inherits: ClassVar[tuple[str, ...]] = ("source_language", "target_language")
    architecture: ClassVar[str | None] = "EncoderDecoderModel"
    plain_metrics: ClassVar[tuple[str, ...]] = ("bleu", "chrf")

    def __init__(
        self, card: Card, config: PretrainedConfig | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(card, config, options)
        self._bundle: Bundle | None = None
        self._backend: Backend | None = None
        self._generator: Generator | None = None

    def attach(self, bundle: Bundle) -> None:
        """Remember where the decoder's vocabulary lies."""
        self._bundle, self._backend = bundle, None

    @property
    def distortable(self) -> bool:
        """A distorted sentence has another translation."""
        return False

    def output_type(self) -> pa.DataType:
        """String."""
        return pa.string()

    def auto_class(self) -> Any:
        """AutoModelForSeq2SeqLM."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    @property
    def target_tokenizer(self) -> Backend:
        """The decoder's tokenizer: `target/tokenizer.json`, else the encoder's."""
        if self._backend is None:
            from tokenizers import Tokenizer as Backend

            assert self._bundle is not None, "attach comes first"
            path = self._bundle.directory / TARGET_TOKENIZER
            if path.exists():
                self._backend = Backend.from_file(str(path))
            else:
                backend = self._bundle.tokenizer().backend_tokenizer
                self._backend = Backend.from_str(backend.to_str())
            self._backend.no_padding()
            self._backend.no_truncation()
            # "[SEP]" in a translation is five characters, and not its end.
            self._backend.encode_special_tokens = True
        return self._backend

    @property
    def _ends(self) -> tuple[int, int]:
        """The tokens before the first and behind the last of a target."""
        config = self.config
        begin = getattr(config, "decoder_start_token_id", None)
        end = getattr(config, "eos_token_id", None)
        if begin is None or end is None:
            raise BundleError(
                "config.json of a translation model needs decoder_start_token_id and eos_token_id: the tokens that "
                "a translation begins and ends with"
            )
        return begin, end

    @property
    def _longest(self) -> int:
        """Tokens that a translation may have: those asked for, as far as the decoder has positions."""
        config: Any = self.config
        return min(self.options.max_target_tokens, int(config.decoder.max_position_embeddings))

    # A row's way.

    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
        """One piece a sentence."""
        return SentenceTokenizer(tokenizer, self.card.max_length, self.options.split)

    def prepare(self, annotator: Annotator) -> None:
        """Arrange the decoder's weights, and read its vocabulary."""
        with torch.inference_mode():
            self._generator = Generator(annotator.model, *self._ends)
        _ = self.target_tokenizer

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Token ids of each piece's translation, (P, W) fp32 (ids below 2^24 are exact), -1 behind the last.

        Validation between epochs searches greedily, whatever `beams` says: a fraction of the time.
        """
        generator, beams = self._generator, self.options.beams
        if generator is None:
            generator, beams = Generator(model, *self._ends), 1
        longest = self._longest
        found = generator(
            hidden, batch.lengths, beams=beams, longest=longest, length_penalty=self.options.length_penalty
        )
        return F.pad(found, (0, self.options.max_target_tokens - longest), value=-1).float()

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Token ids (P, W) -> strings, the pieces of a row joined; a blank text stays empty."""
        ids = outputs.values.astype(np.int64)
        lists = [row[row >= 0].tolist() for row in ids]
        said = [text.strip() for text in self.target_tokenizer.decode_batch(lists, skip_special_tokens=True)]
        blank = "" if self.options.target_language.startswith(_WITHOUT_BLANKS) else " "
        if self.options.target_language.startswith(_WITHOUT_BLANKS[:2]):
            said = [_BETWEEN_CHARACTERS.sub("", text) for text in said]
        texts = [blank.join(filter(None, said[start:end])) for start, end in pairwise(pieces.starts.tolist())]
        return pc.if_else(is_blank(inputs[0]), "", pa.array(texts, pa.string()))

    # Training and evaluation.

    def start(self, base: Bundle, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], output: Path) -> bool:
        """An encoder-decoder from a plain encoder; a translation model is trained on as it is.

        Raises:
            JobError: more decoder layers than the encoder has.
        """
        if base.config.model_type == ENCODER_DECODER:
            return False
        layers, most = self.options.decoder_layers, base.config.num_hidden_layers
        if layers > most:
            raise JobError(f"options.decoder_layers is {layers}, but {base.reference} has {most} layers to start from")
        make_start(base, inputs[0], truth[0], layers=layers, vocabulary=self.options.vocabulary, output=output)
        return True

    def write_files(self, directory: Path) -> None:
        """The decoder's vocabulary."""
        if self._bundle is None or (directory / TARGET_TOKENIZER).exists():
            return
        (directory / TARGET_TOKENIZER).parent.mkdir(exist_ok=True)
        self.target_tokenizer.save(str(directory / TARGET_TOKENIZER))

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base as it is, its dropout rates changed."""
        from transformers import AutoConfig

        from bert_ray.model.bundle import read_model

        config = AutoConfig.from_pretrained(base.directory)
        for part in (config.encoder, config.decoder):
            set_dropout(part, dropout, attention_dropout)
        return read_model(self.auto_class(), base.directory, config=config)[0]

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """Translations as large_string.

        Raises:
            ColumnError: they are not text.
        """
        return [as_strings(truth[0], "translation")], super().read_truth(truth, inputs)[1]

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """Blank texts and blank translations."""
        blanks = {"a blank text": inputs[0], "a blank translation": truth[0]}
        return {what: is_blank(array).to_numpy(zero_copy_only=False).astype(bool) for what, array in blanks.items()}

    def examples(self, tokenize: Tokenizer, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Examples:
        """Pairs to learn from; each counts for as many tokens as its translation has."""
        assert isinstance(tokenize, SentenceTokenizer)
        pieces = tokenize.whole(inputs)
        targets = self.targets(pieces, inputs, truth)
        assert targets.offsets is not None
        weights = (np.diff(targets.offsets) - 1).astype(np.float64)
        return Examples(pieces=pieces, targets=targets, weights=weights, inputs=inputs, truth=truth)

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """Tokens of each translation, the one that begins it and the one that ends it around them, int64 (M,)."""
        begin, end = self._ends
        room = self._longest - 1
        texts = to_python_strings(truth[0])
        found = [
            encoding.ids[:room] for encoding in self.target_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        offsets = np.zeros(len(found) + 1, np.int64)
        np.cumsum([len(ids) + 2 for ids in found], out=offsets[1:])
        values = np.full(int(offsets[-1]), end, np.int64)
        values[offsets[:-1]] = begin
        inner = np.ones(len(values), bool)
        inner[offsets[:-1]] = inner[offsets[1:] - 1] = False
        values[inner] = np.fromiter((token for ids in found for token in ids), np.int64, int(inner.sum()))
        return Targets(values=values, offsets=offsets)

    def losses(
        self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum of the cross-entropies of each translation's tokens, (P,); what would be said costs a search, so None."""
        begin, _ = self._ends
        first = (targets == begin).nonzero()[:, 0]
        lengths = torch.diff(first, append=first.new_tensor([len(targets)])) - 1
        # Each row without its last token goes in, without its first is to come out.
        goes_in = torch.ones_like(targets, dtype=torch.bool)
        goes_in[first + lengths] = False
        comes_out = targets != begin
        states = decode_targets(
            decoder_of(model), hidden, batch.lengths, targets[goes_in], tuple(lengths.tolist()), model.training
        )
        asked, smoothing = targets[comes_out], self.learning.label_smoothing
        losses, _ = vocabulary_losses(model.decoder, states, asked, smoothing, guesses=False)
        return torch.segment_reduce(losses, "sum", lengths=lengths), None

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """BLEU (Papineni et al., 2002) and chrF (Popović, 2015) by sacreBLEU, 0 to 100, over the whole table."""
        from sacrebleu.metrics import BLEU, CHRF

        said = [text or "" for text in to_python_strings(annotations)]
        so = to_python_strings(truth[0])
        return {
            "bleu": float(BLEU(tokenize=self._splitter(so)).corpus_score(said, [so]).score),
            "chrf": float(CHRF().corpus_score(said, [so]).score),
        }

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """Translations beside the references, the worst by chrF and some of the best."""
        from sacrebleu.metrics import CHRF

        said, so = ([text or "" for text in to_python_strings(array)] for array in (annotations, truth[0]))
        scorer = CHRF()
        values = [scorer.sentence_score(one, [other]).score / 100 for one, other in zip(said, so, strict=True)]
        return text_cases(self.inputs, inputs, said, so, values, most, "chrF")

    def _splitter(self, texts: Sequence[str]) -> str:
        """SacreBLEU's tokenizer: as the language says, else that for Chinese where most translations hold hanzi."""
        language = self.options.target_language
        if language.startswith("zh") or (
            not language and 2 * sum(bool(_CHINESE.search(text)) for text in texts) > len(texts)
        ):
            return "zh"
        # Where no blanks tell words, a character counts as one.
        return "char" if language.startswith(_WITHOUT_BLANKS) else "13a"
