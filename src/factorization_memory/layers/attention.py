"""Causal self-attention with rotary positions, as in Llama (arXiv 2302.13971), with grouped-query heads and a sliding window.

Shapes: B sequences, T tokens, S tokens attended to, d hidden size, H query heads, G key and value heads, P head width, C cache
entries, N packed sequences.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from factorization_memory.config import AttentionConfig, ModelConfig
from factorization_memory.layers.attention_state import AttentionState, Stretch
from factorization_memory.layers.calling import device_of
from factorization_memory.layers.mixer import MixerKind, begin_forward, begin_step, register_mixer
from factorization_memory.ops.attention import attend_evenly, attend_masked, attend_packed, has_packed, rotate

FIRST_ROOM = 16
"""Cache entries that the first step allocates; later steps double them."""


class Attention(nn.Module):
    """Each token attends to itself and all tokens before it. Double backward raises an error.

    Args:
        hidden_size: d, width of input and output.
        num_heads: H; 0 means heads of width 64 (one head if `hidden_size` is not a multiple of 64).
        num_key_value_heads: G, key and value heads, each shared by H / G query heads; 0 means `num_heads`.
        rope_theta: base of the rotary wavelengths.
        sliding_window: tokens that each token attends to, itself included, and that the cache keeps; None: all.

    Raises:
        ConfigError: an invalid value; the message names the field and the remedy.
    """

    state_type = AttentionState

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 0,
        num_key_value_heads: int = 0,
        *,
        rope_theta: float = AttentionConfig.rope_theta,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        # ModelConfig checks these fields, for a layer alone as for a whole model.
        options = AttentionConfig(num_heads, num_key_value_heads, rope_theta, sliding_window)
        config = ModelConfig(hidden_size=hidden_size, mixers=("attention",), attention=options)
        self.num_heads, self.num_key_value_heads = config.attention_heads
        self.hidden_size, self.head_size = hidden_size, hidden_size // self.num_heads
        self.rope_theta, self.sliding_window = rope_theta, sliding_window
        self.heads = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        self.query_key_value = nn.Linear(hidden_size, sum(self.heads) * self.head_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: ModelConfig) -> Attention:
        """Builds the layer from a model's configuration."""
        options = config.attention
        return cls(
            config.hidden_size,
            options.num_heads,
            options.num_key_value_heads,
            rope_theta=options.rope_theta,
            sliding_window=options.sliding_window,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights, 1/sqrt(inputs)."""
        for projection in (self.query_key_value, self.output):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def initial_state(self, batch_size: int, capacity: int = 0) -> AttentionState:
        """The empty cache of `batch_size` sequences with room for `capacity` tokens; it grows as needed."""
        places, device = self._places(capacity), device_of(self)
        shape, dtype = (batch_size, self.num_key_value_heads, places, self.head_size), self.output.weight.dtype
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        positions = torch.zeros(batch_size, places, dtype=torch.int64, device=device)
        return AttentionState(keys, values, positions, positions.new_zeros(batch_size), self.sliding_window)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, AttentionState | None]:
        """Runs the layer over whole sequences, from the initial state or from `state`. Positions restart at each border.

        Args:
            x: `[B, T, d]`, normalised.
            state: state to continue from (of N sequences with `cu_seqlens`); None starts from the initial state. Not modified.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding, anywhere in the sequence: padding has no position and is never
                attended to; ignore its output. Not with `cu_seqlens`.
            keep_state: whether to return the state; if not, none is allocated.

        Returns:
            y `[B, T, d]`, and the state after the last token or None.

        Raises:
            ValueError: an argument of the wrong shape or dtype, or two arguments that exclude each other.
        """
        x, state, broken = begin_forward(self, x, state, cu_seqlens, padding_mask, self.sliding_window)
        stretch = Stretch.of(x, state, cu_seqlens, padding_mask)
        q, k, v = self._heads(self.query_key_value(x), stretch.position)
        y = self.output(self._attend(q, k, v, state, stretch).transpose(1, 2).flatten(2))
        if broken is not None:
            y, v = broken.output(y), v.masked_fill(broken.token[:, None, :, None], torch.nan)
        return y, self._final(k, v, state, stretch) if keep_state else None

    @torch.no_grad()
    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """One token x `[B, d]` to y `[B, d]`; `state` is updated in place, reallocated when full. Raises ValueError unless x
        and `state` fit this layer and each other."""
        begin_step(self, x, state)
        used = slice(self._make_room(state))
        place, position = state.length[:, None], state.length[:, None] + 1
        if self.sliding_window is not None:
            place = place % self.sliding_window
        q, k, v = self._heads(self.query_key_value(x)[:, None], position)
        state.positions.scatter_(1, place, position)
        for kept, new in ((state.keys, k), (state.values, v)):
            kept.scatter_(2, place[..., None, None].expand_as(new), new.to(kept.dtype))
        state.length.add_(1)
        keys, values = (kept[:, :, used].to(q.dtype) for kept in (state.keys, state.values))
        # Fold query heads that share keys into queries of one head.
        q = q.reshape(len(x), self.num_key_value_heads, self.num_heads // self.num_key_value_heads, self.head_size)
        y = functional.scaled_dot_product_attention(q, keys, values, (state.positions[:, used] > 0)[:, None, None])
        return self.output(y.flatten(1))

    def check_state(self, state: AttentionState, sequences: int) -> None:
        """Raises ValueError unless `state` fits this layer and holds `sequences` sequences; reads no values."""
        heads, places, device = self.num_key_value_heads, state.positions.shape[-1], self.output.weight.device
        shapes = {
            "keys": (state.keys, (sequences, heads, places, self.head_size)),
            "values": (state.values, (sequences, heads, places, self.head_size)),
            "positions": (state.positions, (sequences, places)),
            "length": (state.length, (sequences,)),
        }
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"state.{name}: got shape {tuple(tensor.shape)}, takes {shape}")
            if tensor.device != device and device.type != "meta":  # offloaded weights are on meta
                raise ValueError(f"state.{name}: is on {tensor.device}, the layer on {device}; move them to one device")
        if state.most != self.sliding_window:
            raise ValueError(
                f"state: from a layer with sliding_window={state.most}, not {self.sliding_window}; "
                "take one from initial_state or forward"
            )

    def _make_room(self, state: AttentionState) -> int:
        """Makes room for one more token and returns an upper bound of the entries then in use. Synchronizes with a GPU only
        when the known room is used up, and never once a window is full."""
        if state.capacity == self.sliding_window:
            return state.capacity
        if torch.compiler.is_compiling():
            # Reading the lengths would break the graph; one more entry is always enough.
            state.reserve(self._places(state.capacity + 1))
            return state.capacity
        if state.room == 0:
            longest = int(state.length.max()) if len(state.length) else 0
            if longest == state.capacity:
                state.reserve(self._places(max(FIRST_ROOM, 2 * longest)))
            state.room = state.capacity - longest
        state.room -= 1
        return state.capacity - state.room

    def _places(self, tokens: int) -> int:
        """Cache entries for `tokens` tokens."""
        return tokens if self.sliding_window is None else min(tokens, self.sliding_window)

    def _heads(self, projected: Tensor, position: Tensor) -> list[Tensor]:
        """Splits projections `[B, T, (H + 2 G) P]`, which it may overwrite, of tokens at `position` `[B or 1, T]` into queries
        `[B, H, T, P]`, keys and values `[B, G, T, P]`; queries and keys are rotated."""
        turned = rotate(projected, position, self.heads[0] + self.heads[1], self.head_size, self.rope_theta)
        heads = turned.unflatten(-1, (sum(self.heads), self.head_size))
        return [part.transpose(1, 2) for part in heads.split(self.heads, dim=-2)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, stretch: Stretch) -> Tensor:
        """Attention of queries `[B, H, T, P]` over the cache and the new keys and values `[B, G, T, P]`: `[B, H, T, P]`."""
        window = self.sliding_window
        if q.shape[2] == 0:
            return q
        if stretch.whole and (state is None or stretch.even):
            if state is not None:
                keys, values = self._in_order(state, stretch.longest)
                k, v = torch.cat((keys.to(k.dtype), k), dim=2), torch.cat((values.to(v.dtype), v), dim=2)
            return attend_evenly(q, k, v, window)
        if stretch.borders is not None and state is None and has_packed(q):
            return attend_packed(q, k, v, stretch.borders, stretch.borders, stretch.most, stretch.most, window)
        if stretch.cuts is not None:
            lengths = None if state is None else state.length.tolist()
            parts = []
            for n, (start, stop) in enumerate(pairwise(stretch.cuts)):
                own = [x[:, :, start:stop] for x in (q, k, v)]
                if state is not None and lengths is not None and stop > start:
                    kept = self._in_order(state.apply(lambda x, n=n: x[n : n + 1]), lengths[n])  # type: ignore[misc]
                    own[1:] = [torch.cat((old.to(new.dtype), new), dim=2) for old, new in zip(kept, own[1:], strict=True)]
                parts.append(attend_evenly(own[0], own[1], own[2], window) if stop > start else own[0])
            return torch.cat(parts, dim=2)
        key_position = stretch.position
        if stretch.padding_mask is not None:
            key_position = key_position * stretch.padding_mask
        if state is not None:
            k, v = torch.cat((state.keys.to(k.dtype), k), dim=2), torch.cat((state.values.to(v.dtype), v), dim=2)
            key_position = torch.cat((state.positions, key_position.expand(len(state.positions), -1)), dim=1)
        return attend_masked(q, k, v, stretch.position, key_position, window, stretch.sequence, stretch.padding_mask)

    def _in_order(self, state: AttentionState, length: int) -> tuple[Tensor, Tensor]:
        """Cached keys and values `[B, G, S, P]` that the next token may attend to, oldest first; every sequence has read
        `length` tokens."""
        window = self.sliding_window
        if window is None or length <= window:
            return state.keys[:, :, :length], state.values[:, :, :length]
        first = length % window + 1  # the oldest is outside the window
        keys, values = (torch.cat((x[:, :, first:], x[:, :, : first - 1]), dim=2) for x in (state.keys, state.values))
        return keys, values

    def _final(self, k: Tensor, v: Tensor, state: AttentionState | None, stretch: Stretch) -> AttentionState:
        """The cache after new keys and values `[B, G, T, P]`."""
        window = self.sliding_window
        before = self.initial_state(len(stretch.count)) if state is None else state
        start, length = before.length, before.length + stretch.count
        capacity = self._places(stretch.longest + stretch.most)
        if not torch.compiler.is_compiling() or window is not None:  # compiled, it is never less, and a graph need not check
            capacity = max(before.capacity, capacity)
        if stretch.whole and window is None and stretch.even:
            end = stretch.longest + stretch.most
            keys, values = (
                functional.pad(torch.cat((old[:, :, : stretch.longest].to(new.dtype), new), dim=2), (0, 0, 0, capacity - end))
                for old, new in ((before.keys, k), (before.values, v))
            )
            position = torch.arange(1, capacity + 1, device=k.device)
            return AttentionState(keys, values, (position * (position <= end)).expand(len(k), -1).clone(), length)
        place = torch.arange(capacity, device=k.device)
        if window is None:
            position = (place + 1).expand(len(length), -1)
            position = position * (position <= length[:, None])
        else:  # the last one that maps to this entry
            position = length[:, None] - (length[:, None] - 1 - place) % window
            position = position * (position > 0)
        new = position > start[:, None]
        index = (position - start[:, None] - 1).clamp(min=0, max=max(k.shape[2] - 1, 0))
        if stretch.padding_mask is not None and k.shape[2]:  # real tokens first, in order
            index = (~stretch.padding_mask).to(torch.int8).argsort(dim=1, stable=True).gather(1, index)
        before = before.resized(capacity)
        keys, values = before.keys.to(k.dtype), before.values.to(v.dtype)
        if k.shape[2]:
            if stretch.borders is None:
                row = torch.arange(len(k), device=k.device)[:, None]
            else:
                row, index = 0, (index + stretch.borders[:-1, None]).clamp(max=k.shape[2] - 1)  # type: ignore[assignment]
            keys, values = (
                torch.where(new[:, None, :, None], x.transpose(1, 2)[row, index].transpose(1, 2), old)
                for x, old in ((k, keys), (v, values))
            )
        else:  # copies: the given state must not share tensors with the returned one
            keys, values = keys.clone(), values.clone()
        return AttentionState(keys.contiguous(), values.contiguous(), position, length, window)


def _attended(config: ModelConfig, length: int) -> int:
    reach = min(config.attention.sliding_window or length, length)
    return (reach * (reach + 1) // 2 + (length - reach) * reach) * config.hidden_size


def _window(config: ModelConfig) -> int:
    return config.attention.sliding_window or 0


register_mixer("attention", MixerKind(Attention.from_config, attended=_attended, window=_window))
