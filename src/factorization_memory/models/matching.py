"""Models of equal size: finds the width or depth that gives a configuration a target number of parameters.

Parameters are counted outside embedding and head, which depend on the vocabulary. If blocks have a feed-forward layer, only
its width is varied. Otherwise, as in Mamba-2's own layout, the number of blocks and the width of their mixer are varied: both
have few possible values, so several pairs are tried and the one closest to the given is used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.layers import MIXERS, MixerWidth
from factorization_memory.models.counting import count

TOLERANCE = 0.005
"""Maximum relative difference between models of equal size."""
FEED_FORWARD_MULTIPLES = (32, 16, 8, 4)
"""Feed-forward widths are multiples of the first of these that comes close enough."""
FARTHEST = 2.0
"""Depth and mixer width of blocks without feed-forward may change by this factor, up or down."""
FEED_FORWARD_FARTHEST = 4.0
"""The same for the width of a feed-forward layer."""
TRIED = 16
"""Number of sizes between the smallest and the largest to try when looking for one that fits all."""


@dataclass(frozen=True)
class Match:
    """A model matched in size to another."""

    model: ModelConfig
    parameters: int
    """Outside embedding and head."""
    target: int
    varied: dict[str, tuple[Any, Any]]
    """Changed fields: from, to. Empty if the model was already close enough."""

    @property
    def difference(self) -> float:
        """Remaining relative difference."""
        return self.parameters / self.target - 1


def non_embedding_parameters(model: ModelConfig) -> int:
    """Parameters of a model outside embedding and head."""
    counts = count(dataclasses.replace(model, vocab_size=model.vocab_size or 1))
    return counts.parameters - counts.embedding_parameters


def match_parameters(model: ModelConfig, target: int, tolerance: float = TOLERANCE) -> Match:
    """`model` with as many parameters outside embedding and head as `target`, to within `tolerance`.

    Raises ConfigError if no choice comes close enough: it says what was varied and how close it came.
    """
    own = non_embedding_parameters(model)
    if abs(own / target - 1) <= tolerance:
        return Match(model, own, target, {})
    found = _by_feed_forward(model, target, tolerance) if model.feed_forward else _by_depth_and_width(model, target, tolerance)
    return Match(found, non_embedding_parameters(found), target, _varied(model, found))


def reach(model: ModelConfig) -> tuple[int, int]:
    """The fewest and the most parameters outside embedding and head that `match_parameters` can give `model`; between them a
    few may be out of reach."""
    if model.feed_forward:
        ends = [dataclasses.replace(model, intermediate_size=width) for width in _feed_forward_range(model)]
    else:
        expands = _expands(model)[1]
        layers = [repeats * len(model.mixers) for repeats in _repeats_range(model)]
        ends = [
            dataclasses.replace(_widened(model, expand), num_layers=number)
            for expand, number in zip((expands[0], expands[-1]), layers, strict=True)
        ]
    least, most = map(non_embedding_parameters, ends)
    return least, most


def fitting_target(models: Sequence[ModelConfig], target: int) -> int | None:
    """Of a number of candidates, the parameter count nearest to `target` that all `models` can have; None if there is none."""
    ranges = [reach(model) for model in models]
    lowest, highest = max(least for least, _ in ranges), min(most for _, most in ranges)
    if lowest > highest:
        return None
    spaced = [round(lowest * (highest / lowest) ** (i / TRIED)) for i in range(TRIED + 1)]
    suggested = {min(max(target, lowest), highest), *spaced}
    suggested |= {own for own in map(non_embedding_parameters, models) if lowest <= own <= highest}
    for number in sorted(suggested, key=lambda each: abs(each - target)):
        try:
            for model in models:
                match_parameters(model, number)
        except ConfigError:
            continue
        return number
    return None


def _feed_forward_range(model: ModelConfig) -> tuple[int, int]:
    """The smallest and the largest width allowed for a feed-forward layer."""
    step = FEED_FORWARD_MULTIPLES[-1]
    lowest = max(1, math.ceil(model.feed_forward_size / FEED_FORWARD_FARTHEST / step)) * step
    return lowest, max(lowest, math.floor(model.feed_forward_size * FEED_FORWARD_FARTHEST / step) * step)


def _repeats_range(model: ModelConfig) -> tuple[int, int]:
    """The fewest and the most repeats allowed of the pattern of mixers."""
    pattern = len(model.mixers)
    fewest = max(1, math.ceil(model.num_layers / FARTHEST / pattern))
    return fewest, max(fewest, math.floor(model.num_layers * FARTHEST / pattern))


def _by_feed_forward(model: ModelConfig, target: int, tolerance: float) -> ModelConfig:
    def sized(width: int) -> ModelConfig:
        return dataclasses.replace(model, intermediate_size=width)

    # The number is linear in the width.
    narrow, wide = (non_embedding_parameters(sized(width)) for width in (32, 64))
    of_one = (wide - narrow) / 32
    exact = 32 + (target - narrow) / of_one
    step = FEED_FORWARD_MULTIPLES[-1]
    lowest, highest = _feed_forward_range(model)

    def difference_at(width: int) -> float:
        return (narrow + (width - 32) * of_one) / target - 1

    best = math.inf
    for multiple in FEED_FORWARD_MULTIPLES:
        width = max(1, round(exact / multiple)) * multiple
        best = min(best, difference_at(width), key=abs)
        if abs(difference_at(width)) <= tolerance and lowest <= width <= highest:
            return sized(width)
    least = narrow - (32 - step) * of_one
    if target >= least and not lowest <= exact <= highest:
        nearest = lowest if exact < lowest else highest
        raise ConfigError(
            f"model.intermediate_size, up to a factor of {FEED_FORWARD_FARTHEST:g} from {model.feed_forward_size}, cannot "
            f"bring the model to {target:,} parameters outside the embedding; the nearest ({difference_at(nearest):+.2%}) is "
            f"model.intermediate_size={nearest}; choose another hidden_size or depth, or a nearer target"
        )
    remedy = (
        f"the mixers alone have {round(narrow - 32 * of_one):,}; use fewer layers or a smaller hidden_size, or a larger target"
        if target < least
        else f"widths in multiples of {step} come within {best:+.2%} at best; use another hidden_size or depth"
    )
    raise ConfigError(
        f"model.intermediate_size cannot bring the model to {target:,} parameters outside the embedding: {remedy}"
    )


def _by_depth_and_width(model: ModelConfig, target: int, tolerance: float) -> ModelConfig:
    pattern = len(model.mixers)

    def parameters(repeats: int, expand: float) -> int:
        return non_embedding_parameters(dataclasses.replace(_widened(model, expand), num_layers=repeats * pattern))

    own, expands = _expands(model)
    # The number is linear in the repeats of the pattern, and that of one repeat in the mixers' width.
    one, two = parameters(1, own), parameters(2, own)
    other = max(expands, key=lambda expand: abs(expand - own))
    slope = (parameters(1, other) - one) / (other - own) if other != own else 0.0
    fewest, most = _repeats_range(model)
    candidates = []
    for expand in expands:
        of_one = two - one + slope * (expand - own)
        exact = (target - (2 * one - two)) / of_one
        for repeats in {min(max(round_off(exact), fewest), most) for round_off in (math.floor, math.ceil)}:
            difference = (2 * one - two + repeats * of_one) / target - 1
            layers = repeats * pattern
            departure = abs(math.log(layers / model.num_layers)) + abs(math.log(expand / own))
            candidates.append((departure, difference, dataclasses.replace(_widened(model, expand), num_layers=layers)))
    near = [candidate for candidate in candidates if abs(candidate[1]) <= tolerance]
    if near:
        return min(near, key=lambda candidate: candidate[0])[2]
    _, difference, nearest = min(candidates, key=lambda candidate: abs(candidate[1]))
    raise ConfigError(
        f"model.num_layers and the mixers' expand, up to a factor of {FARTHEST:g}, cannot bring the model to {target:,} "
        f"parameters outside the embedding; the nearest ({difference:+.2%}) is {_described(_varied(model, nearest))}; choose "
        "another hidden_size, or a nearer target"
    )


def _width(model: ModelConfig) -> MixerWidth | None:
    """The mixer width to vary: that of the first mixer in the pattern that has one."""
    return next((width for name in model.layer_mixers if (width := MIXERS[name].width) is not None), None)


def _expands(model: ModelConfig) -> tuple[float, list[float]]:
    """The expansion ratio of the mixers, and all its allowed values, including itself."""
    width = _width(model)
    if width is None:
        return model.expand, [model.expand]
    own, base, step = width.read(model), width.base(model), width.step(model)
    size = own * base
    widths = range(step * math.ceil(size / FARTHEST / step), math.floor(size * FARTHEST) + 1, step)
    expands = {own, *(each / base for each in widths)}
    # A rounded quotient may not give back an integer width.
    return own, sorted(expand for expand in expands if float(expand * base).is_integer())


def _widened(model: ModelConfig, expand: float) -> ModelConfig:
    width = _width(model)
    return model if width is None else width.replaced(model, expand)


def _varied(before: ModelConfig, after: ModelConfig) -> dict[str, tuple[Any, Any]]:
    fields = {
        "model.intermediate_size": (before.feed_forward_size, after.feed_forward_size),
        "model.num_layers": (before.num_layers, after.num_layers),
    } | {kind.width.field: (kind.width.read(before), kind.width.read(after)) for kind in MIXERS.values() if kind.width}
    return {name: (old, new) for name, (old, new) in fields.items() if old != new}


def _described(varied: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}={new:g}" for name, (_, new) in varied.items()) or "the model as it is"
