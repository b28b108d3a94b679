"""A pre-norm block of a language model: a mixer and a feed-forward layer on the residual stream.

Shapes: B sequences, T tokens, d hidden size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from factorization_memory.config import ModelConfig
from factorization_memory.layers import MIXERS, FeedForward, MixerState, ModelState
from factorization_memory.layers.calling import behind_adapters, why_hooked
from factorization_memory.layers.norm import RMSNorm


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + feed_forward(norm(x))` unless the model has no feed-forward layers."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[mixer].build(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps) if config.feed_forward else None
        self.feed_forward = FeedForward(config.hidden_size, config.feed_forward_size) if config.feed_forward else None
        self.residual_scale = ((2 if config.feed_forward else 1) * config.num_layers) ** -0.5

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights: 1/sqrt(inputs) for projections; those into the residual stream shrink with depth, so that its
        variance does not grow with the number of blocks."""
        self.mixer_norm.reset_parameters()
        self.mixer.reset_parameters()
        self.mixer.output.weight.mul_(self.residual_scale)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return
        self.feed_forward_norm.reset_parameters()
        gate_up, down = self.feed_forward.gate_up, self.feed_forward.down
        nn.init.normal_(gate_up.weight, std=gate_up.in_features**-0.5)
        nn.init.normal_(down.weight, std=self.residual_scale * down.in_features**-0.5)

    def forward(
        self,
        x: Tensor,
        state: MixerState | None,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        keep_state: bool = True,
    ) -> tuple[Tensor, MixerState | None]:
        """x `[B, T, d]` to the same shape, and the new state if requested."""
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens, padding_mask, keep_state)
        return self._feed(x + y), state

    def step(self, x: Tensor, state: MixerState) -> Tensor:
        """One token x `[B, d]` to the same shape; `state` is updated in place.

        If something acts in a call of the block or its mixer, such as a hook, `forward` is called with one token instead. A
        state that records undo then raises ValueError.
        """
        if (reason := self._why_called()) is None:
            return self._feed(x + self.mixer.step(self.mixer_norm(x), state))
        refuse_undo(state, reason)
        y, after = self(x[:, None], state, None, None)
        ModelState([state]).load(ModelState([after]))
        return y[:, 0]

    def _why_called(self) -> str | None:
        """Why `step` may not bypass the calls of the block, the mixer and its submodules; None if it may."""
        mixer = cast(nn.Module, self.mixer)
        for module in (self, mixer, *mixer.children()):
            if (reason := why_hooked(module)) is not None:
                return f"{type(module).__name__}: {reason}"
            # A convolution, whose own step is called.
            if hasattr(behind_adapters(module), "step") and behind_adapters(module) is not module:
                return f"{type(module).__name__} stands in the place of {type(behind_adapters(module)).__name__}"
        return None

    def _feed(self, x: Tensor) -> Tensor:
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        return x + self.feed_forward(self.feed_forward_norm(x))


def refuse_undo(state: MixerState, reason: str) -> None:
    """Raises ValueError for a state that records undo, if for `reason` a step runs `forward` instead."""
    if state.undo is not None:
        raise ValueError(
            f"state: keep_undo does not work with modules that must be called ({reason}); "
            "remove that, or use a state without keep_undo"
        )
