"""Everything that the fused decoding step reads from a memory layer.

Shapes: B sequences, d hidden size, H heads, M memory states, D value width of a head, R rates of a head (M or 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from factorization_memory.layers.factorization_memory import FactorizationMemory


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

    @classmethod
    def of(cls, layer: FactorizationMemory) -> DecodingParts:
        """The parts of a layer; the input projections are copies."""
        rates = (layer.update_rate, layer.merge_rate)
        projections = [layer.affinity, *rates, layer.value, *([] if layer.gate is None else [layer.gate])]
        return cls(
            num_heads=layer.num_heads,
            input_weight=torch.cat([projection.weight for projection in projections]).detach(),
            input_sizes=tuple(projection.out_features for projection in projections),
            rate_bias=torch.cat([rate.bias for rate in rates]).detach(),
            has_gate=layer.gate is not None,
            convolution=None if layer.convolution is None else (layer.convolution.weight, layer.convolution.bias),
            dense=layer.top_k is None and not layer.update_lag,
            temperature=layer.temperature,
            step_memory=layer.step_memory,
            norm_weight=layer.norm_weight,
            norm_eps=layer.norm_eps,
            skip=layer.skip,
            output_weight=layer.output.weight,
        )

    @property
    def rates(self) -> slice:
        """Slice of the rate logits in the projections' outputs."""
        return slice(self.input_sizes[0], self.input_sizes[0] + len(self.rate_bias))
