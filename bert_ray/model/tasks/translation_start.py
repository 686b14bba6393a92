"""From a plain encoder to an encoder-decoder that can be trained to translate.

- The encoder is the base's; characters of the source that its vocabulary cannot spell get tokens of their own.
- The decoder has BERT's layers and takes its weights from layers of the base, evenly spaced; its attention to the
  source starts fresh (Rothe et al., arXiv 1907.12461, section 3: BERT2BERT).
- The decoder's vocabulary is trained on the translations (byte pair encoding, each Chinese character and each mark by
  itself), so that a softmax over it costs a fraction of one over BERT's 30,522. A token's embedding starts as the mean
  of the pieces' that the base spells it with.

All of it is a function of base and texts: a run that goes on makes the same again.

Shapes: V the decoder's vocabulary, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from bert_ray.model.architectures import dropout_rates, max_positions
from bert_ray.model.bundle import read_model, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.decoder import Decoder, decoder_of
from bert_ray.model.encoder import Encoder, encoder_of
from bert_ray.model.tokenization import to_python_strings
from bert_ray.model.vocabulary import add_tokens, is_wordpiece, stands_alone, whole_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    from bert_ray.model.bundle import Bundle

TARGET_TOKENIZER = "target/tokenizer.json"

# In this order the decoder's first tokens.
PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"

# Texts that vocabularies are made from; more of them hold hardly any new characters.
_VOCABULARY_TEXTS = 500_000
# A character gets a token of its own where it stands so often.
_LEAST_OFTEN = 2
# Spread of fresh weights: BERT's own (`initializer_range`).
_SPREAD = 0.02
_SEED = 0


def make_start(
    base: Bundle, source: pa.Array, target: pa.Array, *, layers: int, vocabulary: int, output: Path
) -> Bundle:
    """Write the bundle that training starts from.

    Args:
        base: any bundle with a supported encoder.
        source: texts, none null.
        target: their translations, none null.
        layers: of the decoder.
        vocabulary: most tokens of the decoder.
        output: the bundle's directory.
    """
    from transformers import AutoModel, EncoderDecoderModel

    texts = to_python_strings(source[:_VOCABULARY_TEXTS])
    model, _ = read_model(AutoModel, base.directory)
    draw = torch.Generator().manual_seed(_SEED)
    plain = base.tokenizer()
    tokenizer, added = spelling(plain, characters_of(plain, texts))
    if added:
        _widen(model, len(tokenizer), draw)
    backend = target_vocabulary(to_python_strings(target[:_VOCABULARY_TEXTS]), vocabulary)
    decoder = _new_decoder(model, backend.get_vocab_size(), layers, max_positions(base.config))
    both = EncoderDecoderModel(encoder=model, decoder=decoder)
    _fill(decoder_of(both), encoder_of(model), draw)
    with torch.no_grad():
        _embed(decoder_of(both).words.weight, encoder_of(model).words.weight, backend, plain, draw)
    both.tie_weights()
    ids = {name: backend.token_to_id(token) for name, token in (("pad", PAD), ("begin", BEGIN), ("end", END))}
    for config in (both.config, both.generation_config):
        config.pad_token_id, config.eos_token_id = ids["pad"], ids["end"]
        config.decoder_start_token_id, config.bos_token_id = ids["begin"], ids["begin"]
    card = Card(task="translation", max_length=base.card.max_length)

    def add(directory: Path) -> None:
        (directory / TARGET_TOKENIZER).parent.mkdir()
        backend.save(str(directory / TARGET_TOKENIZER))

    return save_bundle(output, both, tokenizer, card, add=add)


def characters_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Counter[str]:
    """How often each character stands in the texts as the tokenizer normalises them."""
    backend = tokenizer.backend_tokenizer
    often: Counter[str] = Counter()
    for text in texts:
        often.update(backend.normalizer.normalize_str(text) if backend.normalizer else text)
    return often


def spelling(
    tokenizer: PreTrainedTokenizerFast, often: Counter[str], least: int = _LEAST_OFTEN
) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """A WordPiece tokenizer that can spell texts: with characters that stand in them and that it lacked.

    Args:
        tokenizer: to add to.
        often: of the texts' characters.
        least: how often one has to stand there.

    Returns:
        the tokenizer, and what was added: a character by itself, and one that goes on a word unless it always stands
        alone (as Chinese ones do). Other kinds of tokenizers spell everything, or cannot be added to: they stay.
    """
    backend = tokenizer.backend_tokenizer
    if not is_wordpiece(tokenizer):
        return tokenizer, []
    words = tokenizer.get_vocab()
    added: list[str] = []
    for character in sorted(often):
        if often[character] < least or character.isspace():
            continue
        alone = stands_alone(backend, character)
        tokens = (character, *(() if alone else (backend.model.continuing_subword_prefix + character,)))
        added += [token for token in tokens if token not in words]
    return (add_tokens(tokenizer, added), added) if added else (tokenizer, [])


def target_vocabulary(texts: list[str], size: int) -> Backend:
    """A tokenizer of at most `size` tokens (but for single characters) whose tokens join to the text again."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            # The angle brackets too, or a text's own "<s>" would be merged to the token of that name.
            pre_tokenizers.Split(Regex(r"[\p{Han}\p{P}\p{N}<>]"), "isolated"),
        ]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=[PAD, UNKNOWN, BEGIN, END], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _widen(model: Any, rows: int, draw: torch.Generator) -> None:
    """More rows of word embeddings, drawn with the spread of those that are there."""
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(rows, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[: len(old)] = old
        weight[len(old) :] = torch.randn((rows - len(old), old.shape[1]), generator=draw) * old.std()


def _new_decoder(model: Any, rows: int, layers: int, positions: int) -> Any:
    """A BERT decoder as wide as the model, its weights not yet set."""
    from transformers import BertConfig, BertLMHeadModel

    config, distil = model.config, model.config.model_type == "distilbert"
    hidden_rate, attention_rate = dropout_rates(config)
    return BertLMHeadModel(
        BertConfig(
            vocab_size=rows,
            hidden_size=config.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.hidden_dim if distil else config.intermediate_size,
            hidden_act=config.activation if distil else config.hidden_act,
            max_position_embeddings=positions,
            hidden_dropout_prob=hidden_rate,
            attention_probs_dropout_prob=attention_rate,
            layer_norm_eps=1e-12 if distil else config.layer_norm_eps,
            is_decoder=True,
            add_cross_attention=True,
            pad_token_id=0,
        )
    )


@torch.no_grad()
def _fill(decoder: Decoder, encoder: Encoder, draw: torch.Generator) -> None:
    """The encoder's weights into the decoder's own parts; the rest fresh, BERT's way."""
    for module in decoder.head.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not decoder.words.weight:
            module.weight.normal_(0.0, _SPREAD, generator=draw)
    decoder.positions.weight.copy_(encoder.positions.weight[encoder.first_position :][: len(decoder.positions.weight)])
    decoder.types.weight.zero_()
    if encoder.types is not None:
        decoder.types.weight[0] = encoder.types.weight[0]
    decoder.norm.load_state_dict(encoder.norm.state_dict())
    places = torch.linspace(0, len(encoder.layers) - 1, len(decoder.layers)).round().long().tolist()
    for (own, over), place in zip(decoder.layers, places, strict=True):
        source = encoder.layers[place]
        for name in ("query", "key", "value", "mix", "mix_norm", "up", "down", "down_norm"):
            getattr(own, name).load_state_dict(getattr(source, name).state_dict())
        for module in (over.query, over.key, over.value, over.mix):
            module.weight.normal_(0.0, _SPREAD, generator=draw)
            module.bias.zero_()


def _embed(
    weight: torch.Tensor,
    base: torch.Tensor,
    backend: Backend,
    tokenizer: PreTrainedTokenizerFast,
    draw: torch.Generator,
) -> None:
    """Embeddings (V, D): the mean over the base's pieces of each token's text; fresh where it has none."""
    weight.copy_(torch.randn(weight.shape, generator=draw) * base.std())
    names = [(backend.id_to_token(index) or "").replace("▁", " ").strip() for index in range(len(weight))]
    spelt = whole_texts(tokenizer).encode_batch(names, add_special_tokens=False)
    special = set(tokenizer.all_special_ids)  # The unknown token among them: it stands for no text.
    for index, encoding in enumerate(spelt):
        if encoding.ids and special.isdisjoint(encoding.ids):
            weight[index] = base[encoding.ids].mean(0)
