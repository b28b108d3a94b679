"""The Gated DeltaNet layer (arXiv 2412.06464) with the interface of the memory layer, for comparisons and hybrid models.

Shapes: B sequences, T tokens, d hidden size, G key heads, H value heads, K width of a key, V width of a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from factorization_memory import ops
from factorization_memory.config import Backend, GatedDeltaNetConfig, ModelConfig
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
from factorization_memory.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from factorization_memory.ops.precision import no_autocast, state_dtype

DECAY_RATES = (0.01, 16.0)
"""Range of decay rates at initialisation, drawn uniformly; the authors draw from 0, whose log is -inf."""
STEP_SIZES = (1e-3, 1e-1)
"""Range of step sizes at initialisation, drawn log-uniformly."""
KEY_EPS = 1e-6
"""Added to the squared norm, under the root, when queries and keys are normalised."""


@dataclass(repr=False)
class GatedDeltaNetState(LayerStateBase):
    """The state of one Gated DeltaNet layer; all zeros initially.

    Attributes:
        memory: `[B, H, K, V]`, float32 (float64 in a float64 model).
        convolution: tail of the causal convolution: its last inputs, oldest first, `[B, taps - 1, 2 G K + H V]`.
    """

    memory: Tensor
    convolution: Tensor


class GatedDeltaNet(nn.Module):
    """A linear attention layer whose memory decays and is updated by the delta rule, as in the authors' implementation.

    The input is projected to queries, keys and values, which pass through a causal convolution with SiLU; queries and keys are
    then scaled to norm 1. It is also projected to a write strength `sigmoid(b)` and a log decay `-A softplus(a + bias)` per
    value head. The output of the recurrence (see `ops.gated_delta_rule`) is RMS-normalised per head, multiplied by a SiLU gate
    and projected. Unlike the authors' convolution, ours has a bias, as in our other layers, initialised to zero. The input is
    expected RMS-normalised, as in a pre-norm block.

    Args:
        hidden_size: d, width of input and output.
        config: sizes.
        norm_eps: epsilon of the normalisation per head.
        backend: "reference" and "chunked" are those of `ops.gated_delta_rule`; any other value picks the fastest available.

    Raises:
        ConfigError: an invalid value; the message names the field and the remedy.
    """

    state_type = GatedDeltaNetState

    def __init__(
        self,
        hidden_size: int,
        config: GatedDeltaNetConfig | None = None,
        *,
        norm_eps: float = 1e-5,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        config = config or GatedDeltaNetConfig()
        # ModelConfig checks these fields, for a layer alone as for a whole model.
        model = ModelConfig(
            hidden_size=hidden_size, gated_deltanet=config, mixers=("gated_deltanet",), norm_eps=norm_eps, backend=backend
        )
        self.hidden_size, self.norm_eps = hidden_size, norm_eps
        self.backend = backend if backend in ("reference", "chunked") else "auto"
        self.num_heads, self.num_value_heads = model.gated_deltanet_heads
        self.head_size, self.value_head_size = config.head_size, config.value_head_size
        self.key_size, self.value_size = self.num_heads * self.head_size, self.num_value_heads * self.value_head_size

        channels = 2 * self.key_size + self.value_size
        self.input = nn.Linear(hidden_size, self.value_size + channels + 2 * self.num_value_heads, bias=False)
        self.convolution = CausalConvolution(channels, config.conv_size)
        self.log_decay_rate = nn.Parameter(torch.empty(self.num_value_heads))
        self.step_size_bias = nn.Parameter(torch.empty(self.num_value_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.value_head_size))
        self.output = nn.Linear(self.value_size, hidden_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: ModelConfig) -> GatedDeltaNet:
        """Builds the layer from a model's configuration."""
        return cls(config.hidden_size, config.gated_deltanet, norm_eps=config.norm_eps, backend=config.backend)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights; decays as in the authors' implementation."""
        for projection in (self.input, self.output):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
        nn.init.uniform_(self.log_decay_rate, *DECAY_RATES).log_()
        low, high = (math.log(size) for size in STEP_SIZES)
        step_size = nn.init.uniform_(self.step_size_bias, low, high).exp_()
        step_size.add_(torch.log(-torch.expm1(-step_size)))  # the inverse of softplus
        nn.init.ones_(self.norm_weight)
        self.convolution.reset_parameters()

    def initial_state(self, batch_size: int, capacity: int = 0) -> GatedDeltaNetState:
        """The initial state of `batch_size` sequences; `capacity` is ignored, since the state does not grow."""
        shape = (batch_size, self.num_value_heads, self.head_size, self.value_head_size)
        memory = torch.zeros(shape, dtype=state_dtype(self.output.weight), device=device_of(self))
        return GatedDeltaNetState(memory, behind_adapters(self.convolution).initial_tail(batch_size))

    def forward(
        self,
        x: Tensor,
        state: GatedDeltaNetState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
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
        gate, mixed, strength, log_decay = self._project(x)
        if padding_mask is not None:
            strength, log_decay = (rate.masked_fill(~padding_mask[..., None], 0) for rate in (strength, log_decay))
        mixed, tail = self.convolution(
            mixed,
            None if state is None else state.convolution,
            cu_seqlens,
            padding_mask,
            keep_tail=keep_state,
            backend="auto" if self.backend == "auto" else "plain",
        )
        query, key, value = self._parts(mixed)
        y, memory = gated_delta_rule(
            query,
            key,
            value,
            log_decay,
            strength,
            None,
            None if state is None else state.memory,
            keep_state,
            cu_seqlens,
            self.backend,
        )
        final = None if memory is None or tail is None else GatedDeltaNetState(memory, tail)
        return end_forward(self._output(y, gate), final, broken)

    def check_state(self, state: GatedDeltaNetState, sequences: int) -> None:
        """Raises ValueError unless `state` fits this layer and holds `sequences` sequences; reads no values."""
        shape = (sequences, self.num_value_heads, self.head_size, self.value_head_size)
        ops.check_state(state.memory, "state.memory", shape, self.output.weight)
        behind_adapters(self.convolution).check_tail(state.convolution, "state.convolution", sequences)

    @torch.no_grad()
    def step(self, x: Tensor, state: GatedDeltaNetState) -> Tensor:
        """One token x `[B, d]` to y `[B, d]`; `state` is updated in place. Raises ValueError unless x and `state` fit this
        layer and each other."""
        begin_step(self, x, state)
        gate, mixed, strength, log_decay = self._project(x)
        query, key, value = self._parts(self.convolution.step(mixed, state.convolution))
        y = gated_delta_rule_step(query, key, value, log_decay, strength, state.memory)
        return self._output(y, gate)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gate `[..., H V]`, the convolution's input, and write strengths and log decays `[..., H]`, float32 (float64 for
        float64 x)."""
        heads = self.num_value_heads
        channels = 2 * self.key_size + self.value_size
        gate, mixed, strength, step_size = self.input(x).split((self.value_size, channels, heads, heads), dim=-1)
        dtype = state_dtype(self.output.weight)
        step_size = functional.softplus(step_size.to(dtype) + self.step_size_bias.to(dtype))
        return gate, mixed, strength.to(dtype).sigmoid(), -self.log_decay_rate.to(dtype).exp() * step_size

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys `[..., G, K]` of norm 1, and values `[..., H, V]`, from the convolution's output."""
        query, key, value = mixed.split((self.key_size, self.key_size, self.value_size), dim=-1)
        query, key = (_unit(part.unflatten(-1, (self.num_heads, self.head_size))) for part in (query, key))
        return query, key, value.unflatten(-1, (self.num_value_heads, self.value_head_size))

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """The recurrence's output `[..., H, V]`, normalised per head, gated and projected."""
        y = rms_norm(y, self.norm_weight.to(y.dtype), self.norm_eps).flatten(-2)
        return self.output(y * functional.silu(gate))


def _unit(x: Tensor) -> Tensor:
    """x, scaled to norm 1 along its last dimension."""
    with no_autocast(x.device):
        wide = x.to(state_dtype(x))
        return (wide * (wide.square().sum(-1, keepdim=True) + KEY_EPS).rsqrt()).to(x.dtype)


ERASE_FLOPS = 2
"""Per memory element, on top of updating and reading it: its share of reading the memory at the key."""


def _recurrence_flops(config: ModelConfig) -> int:
    sizes, (_, heads) = config.gated_deltanet, config.gated_deltanet_heads
    return (UPDATE_FLOPS + MERGE_FLOPS + ERASE_FLOPS) * heads * sizes.head_size * sizes.value_head_size


register_mixer(
    "gated_deltanet",
    MixerKind(
        GatedDeltaNet.from_config,
        _recurrence_flops,
        width=MixerWidth("model.gated_deltanet.expand_v", lambda config: config.gated_deltanet.head_size, lambda _: 8),
    ),
)
