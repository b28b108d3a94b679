"""Everything that the fused decoding step reads from a memory layer.

Shapes: B sequences, d hidden size, H heads, M memory states, D value width of a head, R rates of a head (M or 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecodingParts:
    """Weights and sizes of a memory layer in the order in which a step uses them, from input x `[B, d]` to output:

    1. `x @ input_weight.T`, split into affinity logits, update rate logits, merge rate logits, values and, with a gate, gate
       logits. `rate_bias` is added to the rate logits.
    2. The values through the convolution, if there is one.
    3. Routing and recurrence, which return the merged vectors y: `step_memory`, or one kernel if the layer is `dense`.
    4. `(rms_norm(y) * norm_weight + value * skip) * silu(gate) @ output_weight.T`.
    """

    num_heads: int
    """H."""
    input_weight: Tensor
    """`[sum of input_sizes, d]`, a copy: all input projections concatenated."""
    input_sizes: tuple[int, ...]
    """Outputs of each: H M, H R, H R, H D, and H D with a gate."""
    rate_bias: Tensor
    """`[2 H R]`, a copy: of the update rates, then of the merge rates."""
    has_gate: bool
    """Whether the last projection is the gate."""
    convolution: tuple[Tensor, Tensor] | None
    """Weight `[taps, H D]` and bias `[H D]`; None without a convolution."""
    dense: bool
    """Whether a token updates and merges all states by its own affinities."""
    temperature: float
    """Divides the affinity logits."""
    step_memory: Callable[..., Tensor]
    """The layer's `FactorizationMemory.step_memory`."""
    norm_weight: Tensor
    """`[H D]`."""
    norm_eps: float
    """Epsilon of the normalisation."""
    skip: Tensor | None
    """`[H D]`; None without a value skip."""
    output_weight: Tensor
    """`[d, H D]`."""

    @property
    def rates(self) -> slice:
        """Slice of the rate logits in the projections' outputs."""
        return slice(self.input_sizes[0], self.input_sizes[0] + len(self.rate_bias))
