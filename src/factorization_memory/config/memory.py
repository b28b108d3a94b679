"""Options of a memory layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from factorization_memory.config.checks import (
    LARGEST,
    LARGEST_WIDTH,
    require,
    require_at_most,
    require_finite,
    require_width,
)
from factorization_memory.config.plain import require_types

Rates = Literal["head", "state"]
Backend = Literal["auto", "reference", "chunked", "triton", "triton-dense", "triton-sparse", "numba"]


@dataclass(frozen=True)
class MemoryConfig:
    """A memory layer. "(silent)" marks fields that the paper leaves open; docs/method.md says how each was chosen."""

    hidden_size: int = 256
    """Width d of the residual stream."""
    num_states: int = 64
    """M: memory states per head."""
    top_k: int | None = None
    """K: states each token updates and reads; None is the dense form (all M)."""
    num_heads: int = 1
    """H: number of heads, each an independent memory with its own affinities over M states; the paper has 1."""
    expand: float = 2.0
    """D / d: total width of the memory's values over hidden_size (silent)."""
    temperature: float = 1.0
    """Temperature that divides the affinity logits before the softmax (silent)."""
    affinity_init: float = 1.0
    """Standard deviation of the affinity logits at initialisation: how sharp routing starts (silent)."""
    update_lag: int = 0
    """How many tokens back a token takes the affinities it writes with: 0, its own (the paper); 1, the previous token's, so
    that a later occurrence of that token finds what followed it (the associative form, see docs/method.md)."""
    rates: Rates = "state"
    """Whether update and merge rates are per head or per state (the paper allows both)."""
    update_rate_init: tuple[float, float] = (0.05, 0.95)
    """Update rates at initialisation, spread evenly in logit from the first state to the last: the spread of time scales."""
    conv_size: int = 0
    """Taps of a causal depthwise convolution of the values, followed by SiLU; 0 for none (an addition to the paper)."""
    value_skip: bool = False
    """Whether a token's own values, scaled by a learned weight per channel, are added to the normalised merged vector, as in
    Mamba-2 (an addition to the paper)."""
    output_gate: bool = False
    """Whether a SiLU gate computed from the input multiplies the merged vector (an addition to the paper)."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm, added to the mean square under the root."""
    backend: Backend = "auto"
    """Backend of the recurrence: auto, the fastest available; reference, the plain loop; the others are parallel over time."""

    def __post_init__(self) -> None:
        if isinstance(self.update_rate_init, list):
            object.__setattr__(self, "update_rate_init", tuple(self.update_rate_init))
        lag = self.update_lag
        whole = isinstance(lag, int) and not isinstance(lag, bool)
        require(
            whole and lag >= 0, "model.update_lag", lag, "use 0 (the paper's form), 1 (the associative form), or more tokens"
        )
        require_types(self, "model")
        require_finite(self, "model")
        require_at_most(self, "model", LARGEST, "hidden_size", "num_heads", "conv_size")
        require_at_most(self, "model", LARGEST_WIDTH, "num_states")
        for name in ("hidden_size", "num_states", "num_heads"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "use 1 or more")
        require(self.expand > 0, "model.expand", self.expand, "use a positive ratio")
        width = self.expand * self.hidden_size
        require(
            float(width).is_integer() and int(width) % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide the value width expand * hidden_size = {width:g}",
        )
        require_width("model.num_states", self.num_states, self.num_heads * self.num_states)
        require_width("model.expand", self.expand, width)
        if self.top_k is not None:
            require(
                1 <= self.top_k <= self.num_states,
                "model.top_k",
                self.top_k,
                f"use 1 to num_states={self.num_states}, or none for the dense form",
            )
        require_at_most(self, "model", LARGEST, "update_lag")
        require(self.temperature > 0, "model.temperature", self.temperature, "use a positive number")
        require(self.affinity_init > 0, "model.affinity_init", self.affinity_init, "use a positive number")
        low, high = self.update_rate_init
        require(0 < low <= high < 1, "model.update_rate_init", self.update_rate_init, "use 0 < first <= last < 1")
        require(self.conv_size >= 0, "model.conv_size", self.conv_size, "use 0 (none) or a number of taps")
        require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "use a small positive number")

    @property
    def value_size(self) -> int:
        """D: total width of the values over all heads."""
        return int(self.expand * self.hidden_size)
