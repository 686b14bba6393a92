"""Beam search over the rows of a packed batch, a token at a time, with a key-value cache; one beam is greedy search.

What the source's rows give to every layer's attention is computed once. Each step computes the newest token of every
hypothesis alone, on the keys and values of the tokens before it; rows that have come to their end leave the batch.

The search is that of transformers' `generate` with `early_stopping=True`: of the 2K likeliest continuations of a row's
K hypotheses those that end are kept, by their log probability over length^length_penalty (Wu et al., Google's Neural
Machine Translation System, arXiv 1609.08144, section 7, in its simpler form), the others go on; a row is done when K
have ended.

Shapes: B rows, K beams, N = B * K hypotheses, T tokens of the packed source, L length of the longest row, D hidden
size, H heads, d_k width of a head, V vocabulary, t tokens said so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from bert_ray.model.attention import filled_up
from bert_ray.model.decoder import Decoder, decoder_of
from bert_ray.model.linear import Linear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from bert_ray.model.encoder import Layer

# A score that no sum of log probabilities comes near, and that may be added to without becoming infinite.
_NEVER = -1.0e9
# Rows that are done are taken out once they are this share of the batch: taking out copies the caches.
_DONE_SHARE = 0.25
# The caches have room for so many tokens at first, and twice as many whenever that is used up. Beams change places at
# each step, and all of the room with them.
_FIRST_ROOM_TOKENS = 8


@dataclass(kw_only=True, slots=True)
class _Step:
    """A decoder layer, its products joined: queries, keys and values in one, the source's keys and values too."""

    qkv: Callable[[torch.Tensor], torch.Tensor]
    mix: Callable[[torch.Tensor], torch.Tensor]
    mix_norm: nn.LayerNorm
    source_query: Callable[[torch.Tensor], torch.Tensor]
    source_kv: Callable[[torch.Tensor], torch.Tensor]
    source_mix: Callable[[torch.Tensor], torch.Tensor]
    source_norm: nn.LayerNorm
    up: Callable[[torch.Tensor], torch.Tensor]
    down: Callable[[torch.Tensor], torch.Tensor]
    down_norm: nn.LayerNorm


@dataclass(slots=True)
class _Cache:
    """Keys and values of one layer: `own` (2, N, H, room, d_k) of what was said, `source` (2, B, H, L, d_k)."""

    own: torch.Tensor
    source: torch.Tensor


class Generator:
    """Says what a decoder has to say to the rows of a packed batch."""

    def __init__(self, model: PreTrainedModel, begin: int, end: int) -> None:
        """Set up.

        Args:
            model: a transformers `EncoderDecoderModel` with a BERT decoder, in evaluation mode.
            begin: the token before the first.
            end: the token behind the last.
        """
        self._decoder = decoder = decoder_of(model)
        self.begin, self.end = begin, end
        packed = decoder.words.weight.device.type == "cpu" and not torch.is_grad_enabled()
        linear = Linear if packed else _plain
        self._layers = [
            _Step(
                qkv=linear(*_joined(layer.query, layer.key, layer.value)),
                mix=linear(layer.mix.weight, layer.mix.bias),
                mix_norm=layer.mix_norm,
                source_query=linear(over.query.weight, over.query.bias),
                source_kv=linear(*_joined(over.key, over.value)),
                source_mix=linear(over.mix.weight, over.mix.bias),
                source_norm=over.mix_norm,
                up=self._widened(linear, layer),
                down=linear(layer.down.weight, layer.down.bias),
                down_norm=layer.down_norm,
            )
            for layer, over in decoder.layers
        ]
        self._head = _head(decoder, linear)

    def _widened(self, linear: Callable[..., Callable[[torch.Tensor], torch.Tensor]], layer: Layer) -> Callable:
        product = linear(layer.up.weight, layer.up.bias)
        if isinstance(product, Linear) and self._decoder.is_gelu:
            return product.gelu
        return lambda x: self._decoder.activation(product(x))

    def __call__(
        self, memory: torch.Tensor, lengths: Sequence[int], *, beams: int, longest: int, length_penalty: float = 1.0
    ) -> torch.Tensor:
        """Search.

        Args:
            memory: the encoder's hidden states (T, D).
            lengths: tokens of each row, B numbers.
            beams: K.
            longest: most tokens to say, the one that ends it included.
            length_penalty: exponent of the length by which a log probability is divided; above 0 favours long ones.

        Returns:
            int64 (B, longest), without the first token, -1 behind the last.
        """
        caches, bias = self._read(memory, lengths, beams)
        search = _Search(len(lengths), beams, longest, self.begin, self.end, length_penalty, memory.device)
        for position in range(longest):
            logits = self._say(search.last, position, caches, bias, beams)
            order = search.step(logits.float(), position)
            if search.done:
                break
            if (alive := search.shrink()) is not None:
                # The hypotheses of the rows that are left, by their numbers in the caches as these are before.
                order = order.view(-1, beams)[alive].view(-1)
                bias = bias[alive]
                for cache in caches:
                    cache.source = cache.source[:, alive]
            if beams > 1 or alive is not None:
                for cache in caches:
                    cache.own = cache.own.index_select(1, order)
        return search.result

    def _read(self, memory: torch.Tensor, lengths: Sequence[int], beams: int) -> tuple[list[_Cache], torch.Tensor]:
        """What every layer needs of the source, and the bias (B, 1, 1, L) that leaves out filled-up places."""
        rows, heads, longest = len(lengths), self._decoder.heads, max(lengths)
        tokens, _, bias = filled_up(torch.tensor(lengths, device=memory.device), longest)
        caches = []
        for layer in self._layers:
            both = layer.source_kv(memory)[tokens].view(rows, longest, 2, heads, -1)
            own = both.new_empty(2, rows * beams, heads, 0, both.shape[-1])
            caches.append(_Cache(own=own, source=both.permute(2, 0, 3, 1, 4).contiguous()))
        # In the keys' own type: autocast may have made it another than the hidden states'.
        return caches, bias.to(caches[0].source.dtype)

    def _say(
        self, last: torch.Tensor, position: int, caches: list[_Cache], bias: torch.Tensor, beams: int
    ) -> torch.Tensor:
        """Logits (N, V) behind the newest token of each hypothesis, int64 (N,)."""
        decoder = self._decoder
        hidden = decoder.words(last) + decoder.positions.weight[position] + decoder.types.weight[0]
        hidden = decoder.norm(hidden)
        for layer, cache in zip(self._layers, caches, strict=True):
            q, k, v = layer.qkv(hidden).view(len(last), 3, decoder.heads, 1, -1).unbind(1)
            self._make_room(cache, position)
            cache.own[0, :, :, position], cache.own[1, :, :, position] = k[:, :, 0], v[:, :, 0]
            said = cache.own[:, :, :, : position + 1]
            mixed = F.scaled_dot_product_attention(q, said[0], said[1]).view(len(last), -1)
            hidden = layer.mix_norm(hidden + layer.mix(mixed))
            # The beams of a row look at the same source: K queries of one row.
            q = layer.source_query(hidden).view(-1, beams, decoder.heads, k.shape[-1]).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(q, cache.source[0], cache.source[1], attn_mask=bias)
            hidden = layer.source_norm(hidden + layer.source_mix(mixed.transpose(1, 2).reshape(len(last), -1)))
            hidden = layer.down_norm(hidden + layer.down(layer.up(hidden)))
        return self._head(hidden)

    @staticmethod
    def _make_room(cache: _Cache, position: int) -> None:
        two, rows, heads, room, d_k = cache.own.shape
        if position == room:
            wider = cache.own.new_empty(two, rows, heads, max(_FIRST_ROOM_TOKENS, 2 * room), d_k)
            wider[:, :, :, :room] = cache.own
            cache.own = wider


class _Search:
    """The hypotheses of a batch of rows, from step to step.

    Attributes:
        last: int64 (N,), the newest token of each that goes on.
        result: int64 (B, longest), what has won; complete when `done`.
        done: whether all rows are.
    """

    def __init__(
        self, rows: int, beams: int, longest: int, begin: int, end: int, length_penalty: float, device: torch.device
    ) -> None:
        self._beams, self._longest, self._end, self._penalty = beams, longest, end, length_penalty
        self._rows = torch.arange(rows, device=device)  # Which rows of the result these are.
        self._running = torch.full((rows, beams), _NEVER, device=device)
        self._running[:, 0] = 0.0  # All hypotheses are the same at first: one counts.
        self._said = torch.zeros((rows, beams, 0), dtype=torch.int64, device=device)
        self._ended_scores = torch.full((rows, beams), -torch.inf, device=device)
        self._ended = torch.full((rows, beams, longest), -1, dtype=torch.int64, device=device)
        self._full = torch.zeros(rows, dtype=torch.bool, device=device)  # Rows of which K have ended.
        self.last = torch.full((rows * beams,), begin, device=device)
        self.result = torch.full((rows, longest), -1, dtype=torch.int64, device=device)
        self.done = False

    def step(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """Take the next token of every hypothesis.

        Args:
            logits: (N, V).
            position: t, tokens said before this one.

        Returns:
            int64 (N,), the hypothesis that each one which goes on continues.
        """
        beams = self._beams
        # A row's 2K likeliest are among the 2K of each of its hypotheses: one pass over the vocabulary finds those,
        # another what normalises them, log softmax(z) = z - logsumexp(z).
        likeliest, tokens = logits.topk(min(2 * beams, logits.shape[1]), dim=1)
        likeliest += self._running.view(-1, 1) - logits.logsumexp(1, keepdim=True)
        scores, index = likeliest.view(-1, beams * tokens.shape[1]).topk(2 * beams, dim=1)
        beam, token = index // tokens.shape[1], tokens.view(len(index), -1).gather(1, index)
        said = torch.cat((self._said.gather(1, beam[:, :, None].expand(-1, -1, position)), token[:, :, None]), dim=2)
        ends = token == self._end
        if position + 1 == self._longest:
            ends = torch.ones_like(ends)
        # Only what is among the K likeliest may end a hypothesis; the others stand by for those that do. A row that is
        # done but still here has its answer: what it says depends on no other row.
        ended = ends & (torch.arange(2 * beams, device=ends.device) < beams) & ~self._full[:, None]
        self._keep_ended(scores.masked_fill(~ended, -torch.inf) / (position + 1) ** self._penalty, said)
        self._running, kept = scores.masked_fill(token == self._end, _NEVER).topk(beams, dim=1)
        self._said = said.gather(1, kept[:, :, None].expand(-1, -1, position + 1))
        self.last = token.gather(1, kept).view(-1)
        self._full = self._ended_scores.isfinite().all(dim=1)
        if position + 1 == self._longest or bool(self._full.all()):
            self._give(torch.ones_like(self._full))
            self.done = True
        rows = torch.arange(len(index), device=kept.device)[:, None]
        return (rows * beams + beam.gather(1, kept)).view(-1)

    def _keep_ended(self, scores: torch.Tensor, said: torch.Tensor) -> None:
        """Of what has ended before and now, the K best."""
        found = F.pad(said, (0, self._longest - said.shape[2]), value=-1)
        self._ended_scores, best = torch.cat((self._ended_scores, scores), dim=1).topk(self._beams, dim=1)
        both = torch.cat((self._ended, found), dim=1)
        self._ended = both.gather(1, best[:, :, None].expand(-1, -1, self._longest))

    def shrink(self) -> torch.Tensor | None:
        """Take out the rows that are done, if it is worth it: the places of those that stay, else None."""
        if self._full.float().mean() < _DONE_SHARE:
            return None
        self._give(self._full)
        alive = (~self._full).nonzero()[:, 0]
        self._rows, self._running, self._said = self._rows[alive], self._running[alive], self._said[alive]
        self._ended_scores, self._ended = self._ended_scores[alive], self._ended[alive]
        self._full = self._full[alive]
        self.last = self.last.view(-1, self._beams)[alive].view(-1)
        return alive

    def _give(self, which: torch.Tensor) -> None:
        """Put the best of the given rows, bool (B,), into the result."""
        best = self._ended_scores[which].argmax(dim=1)
        self.result[self._rows[which]] = self._ended[which].gather(1, best[:, None, None].expand(-1, 1, self._longest))[
            :, 0
        ]


def _joined(*layers: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def _plain(weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.linear(x, weight, bias)


def _head(decoder: Decoder, linear: Callable[..., Callable]) -> Callable[[torch.Tensor], torch.Tensor]:
    """BERT's masked-language-model head (transformers' `BertLMPredictionHead`), its products by `linear`."""
    head = decoder.head.predictions
    transform = linear(head.transform.dense.weight, head.transform.dense.bias)
    vocabulary = linear(head.decoder.weight, head.decoder.bias)
    return lambda x: vocabulary(head.transform.LayerNorm(head.transform.transform_act_fn(transform(x))))
