"""Observes how the memory is used: the routing of every memory layer, and statistics that reveal a collapsed router.

Shapes: B sequences, T tokens, H heads, M memory states, K selected states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch

from factorization_memory.layers import FactorizationMemory, Routing
from factorization_memory.models.language_model import LanguageModel
from factorization_memory.ops import over_states

DEAD_SHARE = 0.01
"""A state is dead if it gets less than this fraction of an even share of use."""


class StatesUse(TypedDict):
    """The use of one layer's states; `RoutingHealth.summary` says what it means."""

    share: list[list[float]]
    balance: list[float]
    entropy: list[float]
    dead: list[int]
    memory_length: list[list[float | None]]
    """Tokens."""


class LayerUse(StatesUse):
    """The same, with the number of the layer's block."""

    layer: int


def memory_layers(model: LanguageModel) -> dict[int, FactorizationMemory]:
    """The memory layers of a model, by block index."""
    mixers = {i: block.mixer for i, block in enumerate(model.blocks)}
    return {i: mixer for i, mixer in mixers.items() if isinstance(mixer, FactorizationMemory)}


@contextmanager
def observe_routing(model: LanguageModel) -> Iterator[list[list[Routing]]]:
    """Collects the detached routing of each forward pass inside the context: one list per memory layer, one entry per pass."""
    layers = memory_layers(model).values()
    observed: list[list[Routing]] = [[] for _ in layers]
    for records, layer in zip(observed, layers, strict=True):
        layer.observer = lambda routing, records=records: records.append(_detach(routing))
    try:
        yield observed
    finally:
        for layer in layers:
            layer.observer = None


def _detach(routing: Routing) -> Routing:
    return Routing(
        routing.affinity.detach(),
        routing.update.detach(),
        routing.merge.detach(),
        routing.indices,
        routing.update_indices,
        routing.num_states,
        routing.padding_mask,
    )


class RoutingHealth:
    """Running statistics of a model's routing over all tokens seen inside `observe`."""

    def __init__(self, model: LanguageModel) -> None:
        self._layers = memory_layers(model)
        self._health = {number: _LayerHealth() for number in self._layers}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Counts every forward pass of the model inside the context."""
        for number, layer in self._layers.items():
            layer.observer = self._health[number].add
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.observer = None

    def summary(self) -> list[LayerUse]:
        """JSON-ready statistics, one dictionary per memory layer, none for a model without:

        - `layer`: index of its block.
        - `share` `[H][M]`: share of all affinity that each state gets; sums to 1 over a head's states.
        - `balance` `[H]`: entropy of `share` over log M: 1 is even use, 0 is all in one state.
        - `entropy` `[H]`: mean entropy of a token's affinities over log M: 1 is uniform routing, 0 is one state per token.
        - `dead` `[H]`: states that get less than a hundredth of an even share.
        - `memory_length` `[H][M]`: tokens until a state's contents have decayed to 1/e at the mean decay; None if never
          written.

        Raises:
            ValueError: no forward pass was observed.
        """
        return [{"layer": number, **health.summary()} for number, health in self._health.items()]


class _LayerHealth:
    def __init__(self) -> None:
        self.tokens = 0
        self.share = self.entropy = self.decay = torch.zeros(())

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        affinity, update = (x.flatten(0, -3) for x in (routing.affinity.float(), routing.update.float()))
        indices, updated = (None if x is None else x.flatten(0, -3) for x in (routing.indices, routing.update_indices))
        if routing.padding_mask is not None:
            real = routing.padding_mask.flatten()
            affinity, update = affinity[real], update[real]
            indices, updated = (None if x is None else x[real] for x in (indices, updated))
        # A full overwrite forgets everything at once; a floor keeps its logarithm finite.
        decay = -torch.log1p(-update.clamp(max=1 - 1e-6))
        self.entropy = self.entropy + torch.special.entr(affinity).sum((0, -1)).cpu()
        self.share = self.share + over_states(affinity, indices, routing.num_states).sum(0).cpu()
        self.decay = self.decay + over_states(decay, updated, routing.num_states).sum(0).cpu()
        self.tokens += affinity.shape[0]

    def summary(self) -> StatesUse:
        if not self.tokens:
            raise ValueError("routing health: no forward pass observed; run the model inside observe()")
        share = self.share / self.tokens
        num_states = share.shape[-1]
        full = math.log(num_states) or 1.0
        lengths = [[1 / d if d > 0 else None for d in head] for head in (self.decay / self.tokens).tolist()]
        return {
            "share": share.tolist(),
            "balance": (torch.special.entr(share).sum(-1) / full).tolist(),
            "entropy": (self.entropy / self.tokens / full).tolist(),
            "dead": (share < DEAD_SHARE / num_states).sum(-1).tolist(),
            "memory_length": lengths,
        }
