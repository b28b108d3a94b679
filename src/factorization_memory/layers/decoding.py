"""What a step in few kernels takes from a memory layer: the only facts of it that such a step knows.

Shapes: B sequences, d hidden size, H heads, M memory states, D value width of a head, R rates of a head (M or 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecodingParts:
    """Weights and sizes of a memory layer in the order in which a step uses them, from its input x `[B, d]` to its output:

    1. `x @ input_weight.T`, in parts: logits of the affinities, of the update rates and of the merge rates, the values and, if
       there is a gate, the gate's logits. `rate_bias` belongs to those of the rates.
    2. The values through the convolution, if there is one.
    3. Routing and recurrence, to the merged vectors y: `step_memory`, or one kernel where the layer is `dense`.
    4. `(rms_norm(y) * norm_weight + value * skip) * silu(gate) @ output_weight.T`.
    """

    num_heads: int
    """H."""
    input_weight: Tensor
    """`[sum of input_sizes, d]`, a copy: all projections of the input as one."""
    input_sizes: tuple[int, ...]
    """Outputs of each: H M, H R, H R, H D, and H D with a gate."""
    rate_bias: Tensor
    """`[2 H R]`, a copy: of the update rates, then of the merge rates."""
    has_gate: bool
    """Whether the gate is the last of the projections."""
    convolution: tuple[Tensor, Tensor] | None
    """Weight `[taps, H D]` and bias `[H D]`; None without."""
    dense: bool
    """Whether a token updates and merges all states by its own affinities."""
    temperature: float
    """Divides the affinity logits."""
    step_memory: Callable[..., Tensor]
    """`FactorizationMemory.step_memory` of the layer."""
    norm_weight: Tensor
    """`[H D]`."""
    norm_eps: float
    """Epsilon of the normalisation."""
    skip: Tensor | None
    """`[H D]`; None where values do not skip the memory."""
    output_weight: Tensor
    """`[d, H D]`."""

    @property
    def rates(self) -> slice:
        """Which of the projections' outputs are logits of rates."""
        return slice(self.input_sizes[0], self.input_sizes[0] + len(self.rate_bias))
