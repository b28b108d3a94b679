"""A model's fused decoding step on a CPU: four matmuls a block, and between them one compiled loop each
(`ops/decoding/loops.py`).

A step of one sequence in PyTorch's own operations takes most of its time to launch them, some sixty a block.

Shapes: B sequences, d hidden size, V vocabulary size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from factorization_memory.layers import FactorizationMemory, LayerState, MixerState, ModelState
from factorization_memory.layers.decoding import DecodingParts
from factorization_memory.models.block import Block
from factorization_memory.models.decoding import why_not_memory_alone
from factorization_memory.models.language_model import LanguageModel
from factorization_memory.ops import runtime
from factorization_memory.ops.autograd import written


class LoopDecodingModel:
    """`LanguageModel.step` of a model in evaluation, with the same states.

    Its input projections are copied, and copied again when a weight has changed. Hooks that are added later are ignored.

    Args:
        model: on a CPU, in float32, sparse (`top_k`).

    Raises:
        ValueError: the model has no such step, or not on this device.
    """

    def __init__(self, model: LanguageModel) -> None:
        if (reason := why_unsupported(model)) is not None:
            raise ValueError(f"model: {reason}; use LanguageModel.step")
        self.model = model
        self._weights = list(model.parameters())
        self._gather()

    def _gather(self) -> None:
        model = self.model
        self._seen = self._versions()
        self._blocks = [_LoopBlock(block) for block in model.blocks]
        self._norm, self._head = _array(model.final_norm.weight), model.head.weight.detach().T

    def _versions(self) -> list[tuple[int, int]]:
        """What changes with any weight."""
        return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in self._weights]

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token of each sequence, `[B]`, to logits `[B, V]`; `state` is updated in place and returned. Raises ValueError
        unless it fits this model and B sequences."""
        from factorization_memory.ops.decoding import loops

        model = self.model
        if any(layer.undo is not None for layer in state) or torch.is_autocast_enabled("cpu"):
            return model.step(tokens, state)  # which records what it overwrites, and casts
        if self._versions() != self._seen:
            if why_unsupported(model) is not None:
                return model.step(tokens, state)
            self._weights = list(model.parameters())
            self._gather()
        model.check_step(tokens, state)
        x = model.embed(tokens)
        added: Tensor | None = None
        for block, layer in zip(self._blocks, state, strict=True):
            added = block.step(x, added, layer)
        normalised = torch.empty_like(x)
        loops.add_and_normalise(x.numpy(), _rows(added, x), self._norm, np.float32(model.final_norm.eps), normalised.numpy())
        state.step_done()
        return normalised @ self._head, state


def why_unsupported(model: LanguageModel) -> str | None:
    """Why a model has no such step, or not on its device; None if it has."""
    if (reason := why_not_memory_alone(model)) is not None:
        return reason
    weight = model.embedding.weight
    if model.config.backend not in ("auto", "numba"):
        return f"backend={model.config.backend!r} is not that of the loops"
    if model.config.top_k in (None, model.config.num_states):
        return f"top_k={model.config.top_k}: the loops need selected states"
    if weight.dtype != torch.float32:
        return f"its weights are {weight.dtype}, but the loops take float32"
    return runtime.why_no_numba(weight, "weight")


class _LoopBlock:
    """A block's step."""

    def __init__(self, block: Block) -> None:
        mixer, feed_forward, feed_forward_norm = block.mixer, block.feed_forward, block.feed_forward_norm
        assert isinstance(mixer, FactorizationMemory), "see why_unsupported"
        assert feed_forward is not None, "see why_unsupported"
        assert feed_forward_norm is not None
        parts = DecodingParts.of(mixer)
        self._num_heads, self._num_states, self._top_k = mixer.num_heads, mixer.num_states, mixer.top_k or 0
        self._temperature, self._has_gate = np.float32(parts.temperature), parts.has_gate
        self._norm, self._norm_eps = _array(block.mixer_norm.weight), np.float32(block.mixer_norm.eps)
        self._input, self._rate_bias = parts.input_weight.T, _array(parts.rate_bias)
        self._taps, self._taps_bias = np.empty((0, 0), np.float32), np.empty(0, np.float32)
        if parts.convolution is not None:
            self._taps, self._taps_bias = (_array(weight) for weight in parts.convolution)
        self._memory_norm, self._memory_norm_eps = _array(parts.norm_weight), np.float32(parts.norm_eps)
        self._skip = np.empty(0, np.float32) if parts.skip is None else _array(parts.skip)
        self._output = parts.output_weight.detach().T
        self._hidden_norm, self._hidden_norm_eps = _array(feed_forward_norm.weight), np.float32(feed_forward_norm.eps)
        self._gate_up, self._down = feed_forward.gate_up.weight.detach().T, feed_forward.down.weight.detach().T

    def step(self, x: Tensor, added: Tensor | None, state: MixerState) -> Tensor:
        """Updates the state and the residual stream x `[B, d]` in place.

        Args:
            x: the stream without the previous block's last contribution.
            added: that contribution, `[B, d]`; None if there is none.
            state: of the layer.

        Returns:
            The contribution of this block's feed-forward layer, `[B, d]`.
        """
        from factorization_memory.ops.decoding import loops

        assert isinstance(state, LayerState), "the state is of another model"
        batch, stream = len(x), x.numpy()
        normalised = torch.empty_like(x)
        loops.add_and_normalise(stream, _rows(added, x), self._norm, self._norm_eps, normalised.numpy())
        mixed = x.new_empty(batch, len(self._memory_norm))
        selection = (batch, 0, self._num_heads, self._top_k)
        loops.memory_layer(
            torch.mm(normalised, self._input).numpy(),
            self._num_heads,
            self._num_states,
            self._rate_bias,
            self._temperature,
            np.empty((batch, 0, 0), np.float32) if state.convolution is None else state.convolution.detach().numpy(),
            self._taps,
            self._taps_bias,
            np.empty(selection, np.float32) if state.affinity is None else state.affinity.detach().numpy(),
            np.empty(selection, np.int64) if state.indices is None else state.indices.numpy(),
            state.memory.detach().numpy(),
            self._memory_norm,
            self._memory_norm_eps,
            self._skip,
            self._has_gate,
            mixed.numpy(),
        )
        written(*state.tensors())
        contribution = torch.mm(mixed, self._output)
        loops.add_and_normalise(stream, contribution.numpy(), self._hidden_norm, self._hidden_norm_eps, normalised.numpy())
        hidden = x.new_empty(batch, len(self._down))
        loops.glu(torch.mm(normalised, self._gate_up).numpy(), hidden.numpy())
        return torch.mm(hidden, self._down)


def _array(weight: Tensor) -> np.ndarray:
    return weight.detach().contiguous().numpy()


def _rows(added: Tensor | None, x: Tensor) -> np.ndarray:
    return np.empty((0, x.shape[1]), np.float32) if added is None else added.numpy()
