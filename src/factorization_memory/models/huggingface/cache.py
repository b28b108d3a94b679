"""A model's state as a cache of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from factorization_memory.layers import MixerState, ModelState

CACHE_NAME = "cache" if "cache" in signature(BaseModelOutputWithPast).parameters else "past_key_values"
"""Name of the cache in outputs and in `generate()`, renamed in transformers 5.24. `forward` accepts both."""


_BASE = 6364136223846793005
"""Base of the fingerprint of tokens: odd, and large enough to spread small ids over 64 bits."""


class CacheLayer(CacheLayerMixin):
    """The state of one block; `is_sliding` and the like tell `transformers` what the cache does not support.

    Attributes:
        state: state of the block; None before the first token.
        seen: number of tokens read.
        read: in the first block, fingerprint of the tokens read, int64 `[B]`; None if unknown.
    """

    is_compileable = is_croppable = is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None
        self.seen = 0
        self.read: Tensor | None = None

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Does nothing: a block creates its state when it reads the first tokens."""

    def update(self, *_: Any, **__: Any) -> Any:
        """Unsupported: there are no keys and values to add."""
        raise RuntimeError(f"{CACHE_NAME}: only the model's forward can update a memory")

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Number of tokens read."""
        return self.seen

    def get_mask_sizes(self, query_length: Any, *_: Any, **__: Any) -> tuple[int, int]:
        """Length of a mask over all tokens read and `query_length` more, and its offset."""
        return self.seen + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # name before transformers 5.16

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor by `function` of it."""
        if self.state is not None:
            self.state = self.state.apply(function)
        if self.read is not None:
            self.read = function(self.read)

    def reset(self) -> None:
        """Resets to the initial state."""
        self.state, self.seen, self.read, self.is_initialized = None, 0, None, False

    def offload(self) -> None:
        """Does nothing: states are small and stay on their block's device."""

    def prefetch(self) -> None:
        """Does nothing, as `offload`."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes the previous sequence `beam_idx[i]`."""
        self.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times, consecutively."""
        self.apply(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these sequences."""
        self.reorder_cache(indices)

    def crop(self, *_: Any, **__: Any) -> None:
        """Raises: tokens cannot be removed from a memory."""
        raise RuntimeError(f"{CACHE_NAME}: a memory cannot be cropped; keep a clone() from before those tokens")


@dataclass(frozen=True)
class _Place:
    """Identifies a tensor of a layer's state; when replicas are gathered, the layer is that of the first."""

    number: int
    layer: CacheLayer = field(compare=False)


class FactorizationMemoryCache(Cache):
    """A model's state between calls, as `past_key_values` or `cache`. Reading tokens modifies it; `clone()` it first to
    continue one text in several ways.

    Iterating yields the layers' tensors, for `torch.nn.DataParallel`, which iterates over outputs to gather those of replicas.

    Args:
        num_layers: number of blocks; or the result of iterating over another cache.
    """

    def __init__(self, num_layers: int | Iterable[Mapping[_Place, Tensor]]) -> None:
        if isinstance(num_layers, int):
            super().__init__(layers=[CacheLayer() for _ in range(num_layers)])
        else:
            super().__init__(layers=[_layer_of(tensors) for tensors in num_layers])

    def __iter__(self) -> Iterator[dict[_Place, Tensor]]:
        for layer in self.own_layers():
            tensors = [] if layer.state is None else layer.state.tensors()
            tensors += [] if layer.read is None else [layer.read]
            yield {_Place(number, layer): tensor for number, tensor in enumerate(tensors)}

    @classmethod
    def from_state(cls, state: ModelState, seen: int) -> FactorizationMemoryCache:
        """A cache from the state of a `LanguageModel` that has read `seen` tokens; tensors are shared."""
        cache = cls(len(state))
        for layer, one in zip(cache.own_layers(), state, strict=True):
            layer.state, layer.seen, layer.is_initialized = one, seen, True
        return cache

    def own_layers(self) -> list[CacheLayer]:
        """The layers, with their own type."""
        return cast(list[CacheLayer], self.layers)

    def state(self) -> ModelState | None:
        """The state for a `LanguageModel`; tensors are shared. None if nothing was read."""
        states = [layer.state for layer in self.own_layers()]
        return None if states[0] is None else ModelState(cast(list[MixerState], states))

    def note(self, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Records which tokens are about to be read.

        Args:
            tokens: int64 `[B, T]`; None if only embeddings are known.
            mask: bool `[B, T]`, False for padding; None if there is no padding.
        """
        first = self.own_layers()[0]
        unknown = tokens is None or (first.seen > 0 and first.read is None)
        first.read = None if unknown else fingerprint(cast(Tensor, tokens), mask, first.read)

    def check_prompt(self, length: int, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Raises ValueError unless a prompt begins with the tokens read and continues after them.

        Args:
            length: number of tokens of the prompt.
            tokens: the prompt, int64 `[B, length]`; None if only embeddings are known, and then only the length is checked.
            mask: `[B, length]`, 0 for padding; None if there is no padding.
        """
        first = self.own_layers()[0]
        again = "to reuse a cache, clone() it before generate(), which advances it"
        if length <= first.seen:
            raise ValueError(
                f"{CACHE_NAME}: has read {first.seen} tokens, but the prompt has only {length}; pass the "
                f"whole text with at least one new token, or the new tokens with an attention_mask over all; {again}"
            )
        if tokens is None or first.read is None or len(first.read) != len(tokens):  # the model reports a different batch size
            return
        begin = slice(first.seen)
        given = fingerprint(tokens[:, begin], None if mask is None else mask[:, begin] != 0, None)
        if not torch.equal(given.to(first.read.device), first.read):
            raise ValueError(
                f"{CACHE_NAME}: has read {first.seen} tokens, but not the first ones of this prompt (or with other padding); "
                f"pass the text it has read followed by more, or drop the cache; {again}"
            )

    def clone(self) -> FactorizationMemoryCache:
        """An independent copy."""
        return self._copied(torch.clone)

    def detach(self) -> FactorizationMemoryCache:
        """The cache detached from the autograd graph."""
        return self._copied(torch.detach)

    def _copied(self, function: Callable[[Tensor], Tensor]) -> FactorizationMemoryCache:
        state = self.state()
        if state is None:
            return type(self)(len(self.layers))
        first = self.own_layers()[0]
        copied = type(self).from_state(state.apply(function), first.seen)
        copied.own_layers()[0].read = None if first.read is None else function(first.read)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorizationMemoryCache:
        return self._copied(lambda tensor: tensor.detach().clone())


def _layer_of(tensors: Mapping[_Place, Tensor]) -> CacheLayer:
    """The layer with these tensors as its state."""
    layer = CacheLayer()
    if tensors:
        like, left = next(iter(tensors)).layer, iter(tensors.values())
        assert like.state is not None
        layer.state, layer.seen, layer.is_initialized = like.state.apply(lambda _: next(left)), like.seen, True
        layer.read = next(left, None)
    return layer


def fingerprint(tokens: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
    """A hash per row of tokens, independent of how reading is split: a polynomial in their ids, modulo 2^64.

    Args:
        tokens: int64 `[B, T]`.
        mask: bool `[B, T]`, False for padding, which is ignored; None if there is no padding.
        before: hash of the tokens before, int64 `[B]`; None if there are none.

    Returns:
        int64 `[B]`.
    """
    before = tokens.new_zeros(len(tokens), dtype=torch.int64) if before is None else before
    terms = (tokens + 1) * _BASE
    if tokens.shape[1] == 1 and mask is None:  # a decoding step
        return before * _BASE + terms[:, 0]
    powers = functional.pad(terms.new_full((tokens.shape[1],), _BASE).cumprod(0), (1, 0), value=1)
    if mask is None:
        return before * powers[-1] + (terms * powers[:-1].flip(0)).sum(1)
    behind = mask.flip(1).cumsum(1).flip(1)  # real tokens from here on
    return before * powers[mask.sum(1)] + (terms * mask * powers[(behind - 1).clamp(min=0)]).sum(1)
