"""What a model carries from one call to the next, as a cache of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from factorization_memory.layers import MixerState, ModelState

CACHE_NAME = "cache" if "cache" in signature(BaseModelOutputWithPast).parameters else "past_key_values"
"""The field of outputs, and argument of `generate()`, for the cache: transformers 5.24 renamed it. `forward` takes both."""


class CacheLayer(CacheLayerMixin):
    """What one block carries; `is_sliding` and the like tell `transformers` what it cannot do with it."""

    is_compileable = is_croppable = is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None
        self.seen = 0

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing: a block makes its state when it reads the first tokens."""

    def update(self, *_: Any, **__: Any) -> Any:
        """There are no keys and values to add."""
        raise RuntimeError(f"{CACHE_NAME}: a memory is updated by the model's forward alone")

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Tokens read."""
        return self.seen

    def get_mask_sizes(self, query_length: Any, *_: Any, **__: Any) -> tuple[int, int]:
        """Tokens that a mask over all that was read and `query_length` more would have, and where it begins."""
        return self.seen + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put `function` of each tensor in its place."""
        if self.state is not None:
            self.state = self.state.apply(function)

    def reset(self) -> None:
        """Forget all that was read."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """Nothing: states are small, and stay where their block is."""

    def prefetch(self) -> None:
        """Nothing, likewise."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what `beam_idx[i]` was."""
        self.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes `repeats` ones, side by side."""
        self.apply(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences stay."""
        self.reorder_cache(indices)

    def crop(self, *_: Any, **__: Any) -> None:
        """Refused: what was read cannot be taken out of a memory again."""
        raise RuntimeError(f"{CACHE_NAME}: a memory cannot forget its last tokens; keep a clone() of it from before them")


@dataclass(frozen=True)
class _Place:
    """Which tensor of a layer's state it is; the layer is that of the first replica where several are gathered."""

    number: int
    layer: CacheLayer = field(compare=False)


class FactorizationMemoryCache(Cache):
    """What a model carries from one call to the next, as `past_key_values` or `cache`. Reading changes it; `clone()` it before
    that to go on from one text in several ways.

    Iterating gives what the layers carry, as `torch.nn.DataParallel` takes outputs apart to put those of its replicas together.

    Args:
        num_layers: blocks of the model; or, instead of their number, what iterating over another cache gave.
    """

    def __init__(self, num_layers: int | Iterable[Mapping[_Place, Tensor]]) -> None:
        if isinstance(num_layers, int):
            super().__init__(layers=[CacheLayer() for _ in range(num_layers)])
        else:
            super().__init__(layers=[_layer_of(tensors) for tensors in num_layers])

    def __iter__(self) -> Iterator[dict[_Place, Tensor]]:
        for layer in self.own_layers():
            tensors = [] if layer.state is None else layer.state.tensors()
            yield {_Place(number, layer): tensor for number, tensor in enumerate(tensors)}

    @classmethod
    def from_state(cls, state: ModelState, seen: int) -> FactorizationMemoryCache:
        """The state of a `LanguageModel` that has read `seen` tokens; the tensors are shared."""
        cache = cls(len(state))
        for layer, one in zip(cache.own_layers(), state, strict=True):
            layer.state, layer.seen, layer.is_initialized = one, seen, True
        return cache

    def own_layers(self) -> list[CacheLayer]:
        """The layers, by their type."""
        return cast(list[CacheLayer], self.layers)

    def state(self) -> ModelState | None:
        """What a `LanguageModel` takes as its state, the tensors shared; None if nothing was read."""
        states = [layer.state for layer in self.own_layers()]
        return None if states[0] is None else ModelState(cast(list[MixerState], states))

    def clone(self) -> FactorizationMemoryCache:
        """An independent copy."""
        return self._copied(torch.clone)

    def detach(self) -> FactorizationMemoryCache:
        """The same numbers, cut off from the graph that made them."""
        return self._copied(torch.detach)

    def _copied(self, function: Callable[[Tensor], Tensor]) -> FactorizationMemoryCache:
        state = self.state()
        if state is None:
            return type(self)(len(self.layers))
        return type(self).from_state(state.apply(function), self.own_layers()[0].seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorizationMemoryCache:
        return self._copied(lambda tensor: tensor.detach().clone())


def _layer_of(tensors: Mapping[_Place, Tensor]) -> CacheLayer:
    """The layer whose state has these tensors."""
    layer = CacheLayer()
    if tensors:
        like, left = next(iter(tensors)).layer, iter(tensors.values())
        assert like.state is not None
        layer.state, layer.seen, layer.is_initialized = like.state.apply(lambda _: next(left)), like.seen, True
    return layer
