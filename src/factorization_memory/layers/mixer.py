"""The interface of the layer that mixes tokens in a block, recurrent or attention.

Shapes: B sequences, T tokens, d hidden size, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from factorization_memory import ops
from factorization_memory.config import ModelConfig
from factorization_memory.config.mixers import MixerChoice, add_mixer_choice, mixer_names
from factorization_memory.layers.state import LayerStateBase, make_writable, outside_inference_mode


class SequenceMixer(Protocol):
    """A layer that mixes tokens. Splitting a text between any calls of `forward` and `step` does not change the results.

    Each class has its own state type (see `factorization_memory.layers.state.MixerState`).
    """

    output: nn.Linear
    """The projection into the residual stream."""
    state_type: type[Any]
    """The class of its states."""

    def __call__(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, Any]:
        """Runs the layer over whole sequences, from the initial state or from `state`.

        Args:
            x: `[B, T, d]`, normalised.
            state: state to continue from (of N sequences with `cu_seqlens`); None starts from the initial state. Not modified.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding, anywhere in the sequence: padding leaves the state unchanged and no
                other token sees it; ignore its output. Not with `cu_seqlens`.
            keep_state: whether to return the state.

        Returns:
            y `[B, T, d]`, and the state after the last token or None.
        """

    def step(self, x: Tensor, state: Any) -> Tensor:
        """One token x `[B, d]` to y `[B, d]`; `state` is updated in place, and may replace its tensors by larger ones. Raises
        ValueError unless x and `state` fit this layer and each other."""

    def check_state(self, state: Any, sequences: int) -> None:
        """Raises ValueError unless `state` fits this layer and holds `sequences` sequences; reads no values."""

    def initial_state(self, batch_size: int, capacity: int = 0) -> Any:
        """The initial, all-zero state of `batch_size` sequences. A growing state starts with room for `capacity` tokens."""

    def reset_parameters(self) -> None:
        """Initial weights."""


@runtime_checkable
class UndoableMixer(Protocol):
    """A `SequenceMixer` whose steps can be undone."""

    def keep_undo(self, state: Any, steps: int, position: Tensor) -> Any:
        """The same state, sharing its tensors, with an `undo` that records what the next `steps` steps overwrite; see
        `factorization_memory.layers.state.Undo`, also for `position`."""


@dataclass(frozen=True)
class MixerWidth:
    """A width of a mixer that may be varied to match model sizes, as a ratio to another width."""

    field: str
    """Dotted name of the configuration field: "model.mamba2.expand"."""
    base: Callable[[ModelConfig], int]
    """The width that the ratio multiplies."""
    step: Callable[[ModelConfig], int]
    """The width must be a multiple of this."""

    def read(self, config: ModelConfig) -> float:
        """Returns the ratio in `config`."""
        value: Any = config
        for name in self.field.split(".")[1:]:
            value = getattr(value, name)
        return float(value)

    def replaced(self, config: ModelConfig, ratio: float) -> ModelConfig:
        """Returns the configuration with another ratio."""
        return cast(ModelConfig, _replaced(config, self.field.split(".")[1:], ratio))


def _replaced(part: Any, names: list[str], value: float) -> Any:
    name, *deeper = names
    return replace(part, **{name: _replaced(getattr(part, name), deeper, value) if deeper else value})


@dataclass(frozen=True)
class MixerKind:
    """One kind of mixer: its constructor, and the costs that its modules do not show."""

    build: Callable[[ModelConfig], SequenceMixer]
    """Builds the layer from a model's configuration."""
    recurrence_flops: Callable[[ModelConfig], int] = lambda _: 0
    """Forward FLOPs per token of updating and reading a state of constant size."""
    attended: Callable[[ModelConfig, int], int] = lambda _, __: 0
    """Attended pairs of tokens in a sequence of the given length, times the width of a token; four FLOPs each."""
    window: Callable[[ModelConfig], int] = lambda _: 0
    """Tokens at which the state stops growing; 0 if it does not grow, or grows without limit."""
    width: MixerWidth | None = None
    """Width to vary to match model sizes when blocks have no feed-forward layer."""


MIXERS: dict[str, MixerKind] = {}
"""All kinds by their names in `ModelConfig.mixers`. The first in a model's pattern with a `width` is the one varied."""

State = TypeVar("State", bound=LayerStateBase)

UPDATE_FLOPS = 3
"""Per memory element: `(1 - theta) * h + theta * v`; `1 - theta` is computed once for a state's whole width."""
MERGE_FLOPS = 2
"""Per memory element: its share of `sum_j phi_j h_j`."""


def register_mixer(name: str, kind: MixerKind, choice: MixerChoice | None = None) -> None:
    """Registers a layer, so that models can be built of it: `ModelConfig(mixers=(name,))`.

    Args:
        name: its name in configurations.
        kind: its constructor and costs.
        choice: its checks of configurations, and whether its state grows; by default no checks, and it does not.

    Raises:
        ValueError: the name is taken.
    """
    if name in MIXERS:
        raise ValueError(f"mixer {name!r}: this name is already taken; choose another")
    if choice is not None or name not in mixer_names():
        add_mixer_choice(name, choice or MixerChoice())
    MIXERS[name] = kind


def begin_step(mixer: Any, x: Tensor, state: Any) -> None:
    """Start of every mixer's `step`: raises ValueError unless x is one token `[B, d]` per sequence and `state` fits this mixer
    and B sequences; makes `state` writable."""
    ops.check_tensors(x=x)
    if x.dim() != 2 or x.shape[1] != mixer.hidden_size:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes one token of each sequence, [B, {mixer.hidden_size}]")
    mixer.check_state(state, x.shape[0])
    make_writable(state)


def begin_forward(
    mixer: Any,
    x: Tensor,
    state: State | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    window: int | None = None,
) -> tuple[Tensor, State | None, Broken | None]:
    """Start of every mixer's `forward`: checks its arguments, and zeroes padding and non-finite tokens in x.

    Args:
        mixer: with `hidden_size` and `check_state`.
        x, state, cu_seqlens, padding_mask: as in `SequenceMixer.__call__`.
        window: tokens that each token sees, itself included; None means all before it.

    Returns:
        x, zero in padding and where it is not finite; the state, usable with autograd; and where x was not finite (None if
        nowhere).

    Raises:
        ValueError: an argument of the wrong shape or dtype, or two arguments that exclude each other.
    """
    check_inputs(x, mixer.hidden_size, cu_seqlens, padding_mask)
    if state is not None:
        mixer.check_state(state, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        state = state.apply(outside_inference_mode)
    if padding_mask is not None:
        # Padding must not leak in, even if it is not finite.
        x = x.masked_fill(~padding_mask[..., None], 0)
    x, broken = set_aside(x, cu_seqlens, window)
    return x, state, broken


def end_forward(y: Tensor, state: State | None, broken: Broken | None) -> tuple[Tensor, State | None]:
    """y `[B, T, d]` and the state after the last token, set to NaN where `begin_forward` found that non-finite input reaches
    them."""
    if broken is None:
        return y, state
    return broken.output(y), None if state is None else state.apply(broken.state)


def check_inputs(x: Tensor, hidden_size: int, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> None:
    """Raises ValueError for arguments of a mixer's `forward` with the wrong shape or dtype, or that exclude each other."""
    ops.check_tensors(x=x, cu_seqlens=cu_seqlens, padding_mask=padding_mask)
    if x.dim() != 3 or x.shape[2] != hidden_size:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes [B, T, {hidden_size}]")
    if padding_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("padding_mask: cannot be combined with cu_seqlens; leave padding out of packed sequences")
        if padding_mask.dtype != torch.bool or padding_mask.shape != x.shape[:2]:
            raise ValueError(
                f"padding_mask: got {padding_mask.dtype} {tuple(padding_mask.shape)}, takes torch.bool {tuple(x.shape[:2])}"
            )
    if cu_seqlens is not None:
        ops.check_borders(cu_seqlens, x.shape[0], x.shape[1])


@dataclass(frozen=True)
class Broken:
    """Where the input of a mixer was not finite, and the outputs that it reaches.

    Attributes:
        token: whether a token's input was not finite, bool `[B, T]`.
        reached: whether a token sees one that is not finite, bool `[B, T]`.
        sequence: whether a sequence has one, bool `[B]` (`[N]` of packed sequences).
    """

    token: Tensor
    reached: Tensor
    sequence: Tensor

    def output(self, y: Tensor) -> Tensor:
        """Sets results y `[B, T, d]` to NaN where reached."""
        return y.masked_fill(self.reached[..., None], torch.nan)

    def state(self, tensor: Tensor) -> Tensor:
        """The same for a tensor `[B, ...]` of the state after the last token."""
        if not tensor.is_floating_point():
            return tensor
        return tensor.masked_fill(self.sequence.view(-1, *[1] * (tensor.dim() - 1)), torch.nan)


def set_aside(x: Tensor, cu_seqlens: Tensor | None, window: int | None = None) -> tuple[Tensor, Broken | None]:
    """Zeroes non-finite tokens of x `[B, T, d]`; returns x and where results must be NaN, None if all are finite.

    A non-finite token would leak to earlier tokens: a matrix product over time multiplies it by their zeros, giving NaN. On
    a GPU it does, within its sequence.

        Args:
            x: the input of a mixer.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            window: tokens that each token sees, itself included; None means all before it.
    """
    # Checking on a GPU would synchronize, and each pass over x costs time in every layer.
    if x.device.type != "cpu":
        return x, None
    # Compiled, skip the checks: reading values would break the graph.
    may_look = not torch.compiler.is_compiling()
    if may_look and isinstance(x, FakeTensor):
        return x, None
    if may_look and bool(x.detach().sum().isfinite()):
        return x, None
    token = ~torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1).isfinite()
    if may_look and not bool(token.any()):  # only the sum overflowed
        return x, None
    x = x.masked_fill(token[..., None], 0)
    before = functional.pad(token.cumsum(1), (1, 0))
    place = torch.arange(x.shape[1], device=x.device)
    first = torch.zeros_like(place)
    sequence = before[:, -1] > 0
    if cu_seqlens is not None:
        borders = cu_seqlens.to(x.device, torch.long)
        of = torch.bucketize(place, borders[1:], right=True).clamp(max=borders.shape[0] - 2)
        first = borders[of]
        sequence = (before[0, borders[1:]] - before[0, borders[:-1]]) > 0
    if window is not None:
        first = first.maximum(place + 1 - window)
    return x, Broken(token, before[:, 1:] > before[:, first], sequence)
