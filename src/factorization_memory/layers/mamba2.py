"""The Mamba-2 layer (arXiv 2405.21060) with the interface of the memory layer, for comparisons and hybrid models.

Shapes: B sequences, T tokens, d hidden size, H heads, P head width, G groups of heads, N state size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from factorization_memory import ops
from factorization_memory.config import Backend, Mamba2Config, ModelConfig
from factorization_memory.layers.calling import behind_adapters, device_of
from factorization_memory.layers.convolution import CausalConvolution
from factorization_memory.layers.mixer import (
    MERGE_FLOPS,
    UPDATE_FLOPS,
    MixerKind,
    MixerWidth,
    begin_forward,
    begin_step,
    end_forward,
    register_mixer,
)
from factorization_memory.layers.norm import rms_norm
from factorization_memory.layers.state import LayerStateBase
from factorization_memory.ops.precision import state_dtype
from factorization_memory.ops.ssd import ssd, ssd_step

DECAY_RATES = (1.0, 16.0)
"""Range of decay rates at initialisation, drawn uniformly."""
STEP_SIZES = (1e-3, 1e-1)
"""Range of step sizes at initialisation, drawn log-uniformly."""


@dataclass(repr=False)
class Mamba2State(LayerStateBase):
    """The state of one Mamba-2 layer; all zeros initially.

    Attributes:
        memory: `[B, H, P, N]`, float32 (float64 in a float64 model).
        convolution: tail of the causal convolution: its last inputs, oldest first, `[B, taps - 1, H P + 2 G N]`.
    """

    memory: Tensor
    convolution: Tensor


class Mamba2(nn.Module):
    """A selective state space layer with one decay per head (Mamba-2), as in the authors' implementation.

    The input is projected to a gate z, values x, an input map B, an output map C and a step size dt; x, B and C pass through a
    causal convolution with SiLU; the recurrence (see `ops.ssd`) is followed by a skip `D x`, `norm(y * silu(z))` and the
    output projection. The input is expected RMS-normalised, as in a pre-norm block. Double backward raises an error.

    Args:
        hidden_size: d, width of input and output.
        config: sizes; H is `expand * hidden_size / head_size`.
        norm_eps: epsilon of the normalisation, over each group's heads.
        backend: "reference" and "chunked" are those of `ops.ssd.ssd`; any other value picks the fastest available.

    Raises:
        ConfigError: an invalid value; the message names the field and the remedy.
    """

    state_type = Mamba2State

    def __init__(
        self, hidden_size: int, config: Mamba2Config | None = None, *, norm_eps: float = 1e-5, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        config = config or Mamba2Config()
        # ModelConfig checks these fields, for a layer alone as for a whole model.
        ModelConfig(hidden_size=hidden_size, mamba2=config, mixers=("mamba2",), norm_eps=norm_eps, backend=backend)
        self.hidden_size, self.norm_eps, self.chunk_size = hidden_size, norm_eps, config.chunk_size
        self.backend = backend if backend in ("reference", "chunked") else "auto"
        self.value_size = int(config.expand * hidden_size)
        self.head_size, self.num_heads = config.head_size, self.value_size // config.head_size
        self.num_groups, self.state_size = config.num_groups, config.state_size

        channels = self.value_size + 2 * self.num_groups * self.state_size
        self.input = nn.Linear(hidden_size, self.value_size + channels + self.num_heads, bias=False)
        self.convolution = CausalConvolution(channels, config.conv_size)
        self.log_decay_rate = nn.Parameter(torch.empty(self.num_heads))
        self.step_size_bias = nn.Parameter(torch.empty(self.num_heads))
        self.skip = nn.Parameter(torch.empty(self.num_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.value_size))
        self.output = nn.Linear(self.value_size, hidden_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: ModelConfig) -> Mamba2:
        """Builds the layer from a model's configuration."""
        return cls(config.hidden_size, config.mamba2, norm_eps=config.norm_eps, backend=config.backend)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights, as in the authors' implementation: the decay factor per token starts between 0.2 and nearly 1."""
        for projection in (self.input, self.output):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
        nn.init.uniform_(self.log_decay_rate, *DECAY_RATES).log_()
        low, high = (math.log(size) for size in STEP_SIZES)
        step_size = nn.init.uniform_(self.step_size_bias, low, high).exp_()
        step_size.add_(torch.log(-torch.expm1(-step_size)))  # the inverse of softplus
        nn.init.ones_(self.skip)
        nn.init.ones_(self.norm_weight)
        self.convolution.reset_parameters()

    def initial_state(self, batch_size: int, capacity: int = 0) -> Mamba2State:
        """The initial state of `batch_size` sequences; `capacity` is ignored, since the state does not grow."""
        shape = (batch_size, self.num_heads, self.head_size, self.state_size)
        memory = torch.zeros(shape, dtype=state_dtype(self.output.weight), device=device_of(self))
        return Mamba2State(memory, behind_adapters(self.convolution).initial_tail(batch_size))

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, Mamba2State | None]:
        """Runs the layer over whole sequences, from the initial state or from `state`.

        Args:
            x: `[B, T, d]`, normalised.
            state: state to continue from (of N sequences with `cu_seqlens`); None starts from the initial state. Not modified.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding, anywhere in the sequence: padding leaves the state unchanged;
                ignore its output. Not with `cu_seqlens`.
            keep_state: whether to return the state; if not, none is allocated.

        Returns:
            y `[B, T, d]`, and the state after the last token or None.

        Raises:
            ValueError: an argument of the wrong shape or dtype, or two arguments that exclude each other.
        """
        x, state, broken = begin_forward(self, x, state, cu_seqlens, padding_mask)
        gate, mixed, dt = self._project(x)
        if padding_mask is not None:
            dt = dt.masked_fill(~padding_mask[..., None], 0)
        mixed, tail = self.convolution(
            mixed,
            None if state is None else state.convolution,
            cu_seqlens,
            padding_mask,
            keep_tail=keep_state,
            backend="auto" if self.backend == "auto" else "plain",
        )
        value, input_map, output_map = self._parts(mixed)
        y, memory = ssd(
            value,
            dt,
            self._decay_rate(),
            input_map,
            output_map,
            self.chunk_size,
            None if state is None else state.memory,
            keep_state,
            cu_seqlens,
            self.backend,
        )
        final = None if memory is None or tail is None else Mamba2State(memory, tail)
        return end_forward(self._output(y, value, gate), final, broken)

    def check_state(self, state: Mamba2State, sequences: int) -> None:
        """Raises ValueError unless `state` fits this layer and holds `sequences` sequences; reads no values."""
        shape = (sequences, self.num_heads, self.head_size, self.state_size)
        ops.check_state(state.memory, "state.memory", shape, self.output.weight)
        behind_adapters(self.convolution).check_tail(state.convolution, "state.convolution", sequences)

    @torch.no_grad()
    def step(self, x: Tensor, state: Mamba2State) -> Tensor:
        """One token x `[B, d]` to y `[B, d]`; `state` is updated in place. Raises ValueError unless x and `state` fit this
        layer and each other."""
        begin_step(self, x, state)
        gate, mixed, dt = self._project(x)
        value, input_map, output_map = self._parts(self.convolution.step(mixed, state.convolution))
        y = ssd_step(value, dt, self._decay_rate(), input_map, output_map, state.memory)
        return self._output(y, value, gate)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate `[..., H P]`, the convolution's input, and step sizes `[..., H]`, float32 (float64 for float64 x)."""
        channels = self.value_size + 2 * self.num_groups * self.state_size
        gate, mixed, dt = self.input(x).split((self.value_size, channels, self.num_heads), dim=-1)
        dtype = state_dtype(self.output.weight)
        return gate, mixed, functional.softplus(dt.to(dtype) + self.step_size_bias.to(dtype))

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits the convolution's output into values `[..., H, P]`, input maps and output maps `[..., G, N]`."""
        maps = self.num_groups * self.state_size
        value, input_map, output_map = mixed.split((self.value_size, maps, maps), dim=-1)
        return (
            value.unflatten(-1, (self.num_heads, self.head_size)),
            input_map.unflatten(-1, (self.num_groups, self.state_size)),
            output_map.unflatten(-1, (self.num_groups, self.state_size)),
        )

    def _decay_rate(self) -> Tensor:
        """A, `[H]`."""
        return -self.log_decay_rate.to(state_dtype(self.output.weight)).exp()

    def _output(self, y: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """Output of the recurrence's y `[..., H, P]`: add the skip of the values, gate, normalise per group, project."""
        y = torch.addcmul(y, value, self.skip.to(y.dtype)[:, None]).flatten(-2)
        y = y * functional.silu(gate)
        weight = self.norm_weight.to(y.dtype)
        if self.num_groups == 1:
            return self.output(rms_norm(y, weight, self.norm_eps))
        grouped = y.unflatten(-1, (self.num_groups, -1))
        return self.output(functional.rms_norm(grouped, grouped.shape[-1:], eps=self.norm_eps).flatten(-2) * weight)


register_mixer(
    "mamba2",
    MixerKind(
        Mamba2.from_config,
        recurrence_flops=lambda config: (
            (UPDATE_FLOPS + MERGE_FLOPS) * config.mamba2.state_size * int(config.mamba2.expand * config.hidden_size)
        ),
        width=MixerWidth(
            "model.mamba2.expand",
            lambda config: config.hidden_size,
            lambda config: config.mamba2.head_size * config.mamba2.num_groups,
        ),
    ),
)
