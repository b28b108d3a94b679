"""What a model asks of the layer in a block that mixes tokens: the recurrent ones and attention alike.

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
    """A layer that mixes tokens. Reading a text in any pieces, with `forward` and `step`, gives what reading it at once does.

    What a class keeps for the sequences is a state of its own (see `factorization_memory.layers.state.MixerState`).
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
        """A stretch of whole sequences, from their beginning or from a carried state.

        Args:
            x: `[B, T, d]`, normalised.
            state: where the sequences stand (of N sequences with `cu_seqlens`); None begins anew. Not modified.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding, anywhere in the sequence: such a token leaves the state as it is, no
                other token sees it, and its output is to be ignored. Not with `cu_seqlens`.
            keep_state: whether to return the state.

        Returns:
            y `[B, T, d]`, and the state after the last token or None.
        """

    def step(self, x: Tensor, state: Any) -> Tensor:
        """One token x `[B, d]` to y `[B, d]`; `state` is changed in place, also by larger tensors instead of its own.
        ValueError unless x fits and `state` is one of this layer for B sequences."""

    def check_state(self, state: Any, sequences: int) -> None:
        """ValueError unless `state` is one of this layer, of so many sequences; looks at no values."""

    def initial_state(self, batch_size: int, capacity: int = 0) -> Any:
        """The empty state of `batch_size` sequences: zeros. One that grows begins with room for `capacity` tokens."""

    def reset_parameters(self) -> None:
        """Initial weights."""


@runtime_checkable
class UndoableMixer(Protocol):
    """A `SequenceMixer` whose steps can be taken back."""

    def keep_undo(self, state: Any, steps: int, position: Tensor) -> Any:
        """The same state, in the same tensors, with an `undo` that takes what the next `steps` steps overwrite; see
        `factorization_memory.layers.state.Undo`, also for `position`."""


@dataclass(frozen=True)
class MixerWidth:
    """A width of a mixer that may be varied to make models equally large: a ratio to another width."""

    field: str
    """Its name in a configuration, dots and all: "model.mamba2.expand"."""
    base: Callable[[ModelConfig], int]
    """What it is a ratio of."""
    step: Callable[[ModelConfig], int]
    """The width is a multiple of this."""

    def read(self, config: ModelConfig) -> float:
        """The ratio."""
        value: Any = config
        for name in self.field.split(".")[1:]:
            value = getattr(value, name)
        return float(value)

    def replaced(self, config: ModelConfig, ratio: float) -> ModelConfig:
        """The configuration with another ratio."""
        return cast(ModelConfig, _replaced(config, self.field.split(".")[1:], ratio))


def _replaced(part: Any, names: list[str], value: float) -> Any:
    name, *deeper = names
    return replace(part, **{name: _replaced(getattr(part, name), deeper, value) if deeper else value})


@dataclass(frozen=True)
class MixerKind:
    """One kind of mixer: how it is built, and what of its costs cannot be seen in its modules."""

    build: Callable[[ModelConfig], SequenceMixer]
    """A layer of a model's configuration."""
    recurrence_flops: Callable[[ModelConfig], int] = lambda _: 0
    """Of updating and reading a state of constant size, for one token, forward."""
    attended: Callable[[ModelConfig, int], int] = lambda _, __: 0
    """Pairs of tokens that see each other in a sequence of so many, times the width of a token; four FLOPs each."""
    window: Callable[[ModelConfig], int] = lambda _: 0
    """Tokens that its state grows to and not beyond; 0 for one that does not grow, or without end."""
    width: MixerWidth | None = None
    """What may be varied to make models equally large, where blocks have no feed-forward layer."""


MIXERS: dict[str, MixerKind] = {}
"""All kinds by the names that `ModelConfig.mixers` gives them. The first in a model's pattern that has a width is varied."""

State = TypeVar("State", bound=LayerStateBase)

UPDATE_FLOPS = 3
"""Of one number of the memory: `(1 - theta) * h + theta * v`; `1 - theta` is shared by a state's whole width."""
MERGE_FLOPS = 2
"""Of one number of the memory: its share of `sum_j phi_j h_j`."""


def register_mixer(name: str, kind: MixerKind, choice: MixerChoice | None = None) -> None:
    """Make a layer one that models can be built of: `ModelConfig(mixers=(name,))`.

    Args:
        name: its name in configurations.
        kind: how it is built and what it costs.
        choice: what it asks of configurations, and whether its state grows; nothing, and no, by default.

    Raises:
        ValueError: the name is taken.
    """
    if name in MIXERS:
        raise ValueError(f"mixer {name!r}: there is one of this name; choose another")
    if choice is not None or name not in mixer_names():
        add_mixer_choice(name, choice or MixerChoice())
    MIXERS[name] = kind


def begin_step(mixer: Any, x: Tensor, state: Any) -> None:
    """What every mixer's `step` begins with: ValueError unless x is one token `[B, d]` of each sequence and `state` one of this
    mixer for B sequences, which may be changed in place from here on."""
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
    """What every mixer's `forward` begins with: its arguments are checked, and what must not be seen is taken out of x.

    Args:
        mixer: with `hidden_size` and `check_state`.
        x, state, cu_seqlens, padding_mask: as of `SequenceMixer.__call__`.
        window: tokens that each token sees, itself included; None: all before it.

    Returns:
        x, zero in padding and where it is not finite; the state, which may be used with gradients; and where x was not finite
        (None: nowhere).

    Raises:
        ValueError: an argument of the wrong shape or dtype, or two that do not go together.
    """
    check_inputs(x, mixer.hidden_size, cu_seqlens, padding_mask)
    if state is not None:
        mixer.check_state(state, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        state = state.apply(outside_inference_mode)
    if padding_mask is not None:
        # Whatever stands in padding, also what is not finite, stays out.
        x = x.masked_fill(~padding_mask[..., None], 0)
    x, broken = set_aside(x, cu_seqlens, window)
    return x, state, broken


def end_forward(y: Tensor, state: State | None, broken: Broken | None) -> tuple[Tensor, State | None]:
    """y `[B, T, d]` and the state after the last token, NaN where `begin_forward` found that they would be."""
    if broken is None:
        return y, state
    return broken.output(y), None if state is None else state.apply(broken.state)


def check_inputs(x: Tensor, hidden_size: int, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> None:
    """ValueError for arguments of a mixer's `forward` that are of the wrong shape or dtype, or do not go together."""
    ops.check_tensors(x=x, cu_seqlens=cu_seqlens, padding_mask=padding_mask)
    if x.dim() != 3 or x.shape[2] != hidden_size:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes [B, T, {hidden_size}]")
    if padding_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("padding_mask: not together with cu_seqlens; leave padding out of packed sequences")
        if padding_mask.dtype != torch.bool or padding_mask.shape != x.shape[:2]:
            raise ValueError(
                f"padding_mask: got {padding_mask.dtype} {tuple(padding_mask.shape)}, takes torch.bool {tuple(x.shape[:2])}"
            )
    if cu_seqlens is not None:
        ops.check_borders(cu_seqlens, x.shape[0], x.shape[1])


@dataclass(frozen=True)
class Broken:
    """Where the input of a mixer was not finite, and what that reaches.

    Attributes:
        token: whether a token's input was not finite, bool `[B, T]`.
        reached: whether a token sees such a one, bool `[B, T]`.
        sequence: whether a sequence has one, bool `[B]` (`[N]` of packed sequences).
    """

    token: Tensor
    reached: Tensor
    sequence: Tensor

    def output(self, y: Tensor) -> Tensor:
        """Results y `[B, T, d]`, NaN where they are reached."""
        return y.masked_fill(self.reached[..., None], torch.nan)

    def state(self, tensor: Tensor) -> Tensor:
        """A tensor `[B, ...]` of the state after the last token, likewise."""
        if not tensor.is_floating_point():
            return tensor
        return tensor.masked_fill(self.sequence.view(-1, *[1] * (tensor.dim() - 1)), torch.nan)


def set_aside(x: Tensor, cu_seqlens: Tensor | None, window: int | None = None) -> tuple[Tensor, Broken | None]:
    """x `[B, T, d]` of whole sequences without what is not finite, and where its results are to be NaN; None if all is finite.

    What is not finite would reach the tokens before it: in a matrix product over time it is multiplied by their zeros. On a GPU
    it does, in the same sequence.

    Args:
        x: the input of a mixer.
        cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
        window: tokens that each token sees, itself included; None: all before it.
    """
    # A GPU cannot be asked without waiting for it, and each pass over x costs time in every layer.
    if x.device.type != "cpu":
        return x, None
    # Nor is a graph split to find out whether there is any.
    may_look = not torch.compiler.is_compiling()
    if may_look and isinstance(x, FakeTensor):
        return x, None
    if may_look and bool(x.detach().sum().isfinite()):
        return x, None
    token = ~torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1).isfinite()
    if may_look and not bool(token.any()):  # only their sum was too large
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
