"""A model's fused decoding step on a GPU.

The input projections of a layer are concatenated, and the pointwise work around linear layers (normalisation, gate, residual,
casts) is fused into few kernels. The residual stream is float32 whatever the weights' dtype. Kernels per block in the dense
form:

- up to four sequences, five kernels: each linear layer is fused with its prologue and epilogue
  (`ops/decoding/small_linear.py`), so that a step takes little longer than reading the weights and the states that it touches:
  input projections with their norm; the step with its routing; output projection with norm, gate and residual; gate and up
  projections with norm and SwiGLU; down projection with residual.
- more sequences, nine: PyTorch's matmuls (input projections; output; gate and up; down), the step with its routing, and one
  pointwise kernel before each matmul (`ops/decoding/rows.py`: residual sum, norm and cast; norm, gate and cast; residual sum,
  norm and cast; SwiGLU and cast).

The sparse form needs one more for routing, and with more than four sequences one for biases; a convolution needs one more; the
dense form with an update lag several small ones for its routing; steps that record undo one per recorded tensor but the
memory.

Shapes: B sequences, d hidden size, H heads, M memory states, K selected states, D value width per head, V vocabulary size,
P partial sums of a matmul, O its outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory import ops
from factorization_memory.layers import FactorizationMemory, LayerState, MixerState, ModelState
from factorization_memory.layers.calling import why_any_called
from factorization_memory.layers.decoding import DecodingParts
from factorization_memory.models.block import Block
from factorization_memory.models.language_model import LanguageModel
from factorization_memory.ops.precision import wide_product

PARTS = (4, 2)
"""Partial sums (split-K) of a matmul into the residual stream with more than four sequences: the first that divides the
inputs."""
LEAST_INPUTS = 64
"""The inputs of each part must be a multiple of this."""


class DecodingModel:
    """`LanguageModel.step` of a model in evaluation, with the same states.

    Args:
        model: on a device that Triton kernels run on; its input projections are copied, so later changes of them are ignored.

    Raises:
        ValueError: the model has no fused step, or not on this device.
    """

    def __init__(self, model: LanguageModel) -> None:
        if (reason := why_unsupported(model)) is not None:
            raise ValueError(f"model: {reason}; use LanguageModel.step")
        from factorization_memory.ops.decoding.small_linear import most_tokens

        self.model = model
        self.blocks = [_DecodingBlock(block) for block in model.blocks]
        self.few = min(most_tokens(model.config.hidden_size), *(block.few for block in self.blocks))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token of each sequence, `[B]`, to float32 logits `[B, V]`; `state` is updated in place and returned. Raises
        ValueError unless it fits this model and B sequences."""
        from factorization_memory.ops.decoding.rows import normalise
        from factorization_memory.ops.decoding.small_linear import small_linear

        model = self.model
        model.check_step(tokens, state)
        norm, head = model.final_norm, model.head.weight
        x = model.embed(tokens).float()
        if len(tokens) <= self.few:
            for block, layer_state in zip(self.blocks, state, strict=True):
                block.step_few(x, layer_state)
            logits = x.new_empty(len(tokens), model.config.vocab_size)
            small_linear(x, head, logits, norm_weight=norm.weight, norm_eps=norm.eps, early=True)
        else:
            parts = None
            for block, layer_state in zip(self.blocks, state, strict=True):
                parts = block.step_many(x, parts, layer_state)
            logits = wide_product(normalise(x, parts, None, norm.weight, norm.eps, head.dtype), head.T)
        state.step_done()
        return logits, state


def why_unsupported(model: LanguageModel) -> str | None:
    """Why a model has no fused step, or not on its device; None if it has."""
    if (reason := why_not_memory_alone(model)) is not None:
        return reason
    weight = model.embedding.weight
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {weight.dtype}, but the kernels take float32 or bfloat16"
    return ops.why_unsupported(weight, "weight")


def why_not_memory_alone(model: LanguageModel) -> str | None:
    """Why a model is not one of memory and feed-forward layers whose weights may be read past their modules; None if it is."""
    config = model.config
    others = sorted({mixer for mixer in config.layer_mixers if mixer != "memory"})
    if others:
        return f"mixers={config.mixers!r}: it needs memory layers alone, not {', '.join(others)}"
    if not config.feed_forward:
        return "feed_forward=False: it needs blocks with a feed-forward layer"
    if config.backend in ("reference", "chunked"):
        return f"backend={config.backend!r} is plain PyTorch"
    return why_any_called(model)


class _DecodingBlock:
    """A block's step."""

    def __init__(self, block: Block) -> None:
        from factorization_memory.ops.decoding.small_linear import most_tokens

        mixer, feed_forward, feed_forward_norm = block.mixer, block.feed_forward, block.feed_forward_norm
        assert isinstance(mixer, FactorizationMemory), "see why_unsupported"
        assert feed_forward is not None, "see why_unsupported"
        assert feed_forward_norm is not None
        self.mixer, self.mixer_norm = DecodingParts.of(mixer), block.mixer_norm
        self.feed_forward, self.feed_forward_norm = feed_forward, feed_forward_norm
        weight, rates = self.mixer.input_weight, self.mixer.rates
        self.bias = weight.new_zeros(len(weight))
        self.bias[rates] = self.mixer.rate_bias
        widths = (weight.shape[1], self.mixer.output_weight.shape[1], feed_forward.down.in_features)
        self.few = min(most_tokens(width) for width in widths)

    def step_few(self, x: Tensor, state: MixerState) -> None:
        """Updates the residual stream `[B, d]`, float32, and the state in place; B is at most `few`."""
        from factorization_memory.ops.decoding.small_linear import small_linear

        norm, mixer = self.mixer_norm, self.mixer
        projected = x.new_empty(len(x), len(mixer.input_weight))
        small_linear(x, mixer.input_weight, projected, bias=self.bias, norm_weight=norm.weight, norm_eps=norm.eps, early=True)
        y, gate, value = self._recurrence(projected, None, state)
        small_linear(
            y,
            mixer.output_weight,
            x,
            residual=x,
            gate=gate,
            skipped=value,
            skip_weight=mixer.skip,
            norm_weight=mixer.norm_weight,
            norm_eps=mixer.norm_eps,
            early=True,
        )
        norm, feed_forward = self.feed_forward_norm, self.feed_forward
        hidden = x.new_empty(len(x), feed_forward.down.in_features, dtype=mixer.input_weight.dtype)
        small_linear(x, feed_forward.gate_up.weight, hidden, norm_weight=norm.weight, norm_eps=norm.eps, glu=True, early=True)
        small_linear(hidden, feed_forward.down.weight, x, residual=x, early=True)

    def step_many(self, x: Tensor, parts: Tensor | None, state: MixerState) -> Tensor:
        """Updates the residual stream `[B, d]`, float32, and the state in place.

        Args:
            x: the stream without the previous block's last contribution.
            parts: that contribution as partial sums `[P, B, d]`; None if there is none.
            state: state of the layer.

        Returns:
            The contribution of this block's feed-forward layer, as partial sums.
        """
        from factorization_memory.ops.decoding.rows import glu, normalise

        norm, mixer, dtype = self.mixer_norm, self.mixer, self.mixer.input_weight.dtype
        projected = wide_product(normalise(x, parts, None, norm.weight, norm.eps, dtype), mixer.input_weight.T)
        y, gate, value = self._recurrence(projected, mixer.rate_bias, state)
        y = normalise(y, None, gate, mixer.norm_weight, mixer.norm_eps, dtype, value, mixer.skip)
        parts = _in_parts(y, mixer.output_weight)
        norm, feed_forward = self.feed_forward_norm, self.feed_forward
        y = normalise(x, parts, None, norm.weight, norm.eps, dtype)
        return _in_parts(glu(wide_product(y, feed_forward.gate_up.weight.T), dtype), feed_forward.down.weight)

    def _recurrence(
        self, projected: Tensor, rate_bias: Tensor | None, state: MixerState
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """From the projections of the layer's input: the merged vectors `[B, H * D]`; the gate's logits, or None; the values
        `[B, H * D]` with a value skip, or None. `rate_bias` is added to the rate logits; None if already added."""
        from factorization_memory.ops.decoding.rows import convolve
        from factorization_memory.ops.memory.kernels.step import dense_step

        assert isinstance(state, LayerState), "the state is of another model"
        mixer, undo = self.mixer, state.undo
        parts = list(projected.split(mixer.input_sizes, dim=1))
        gate = parts.pop() if mixer.has_gate else None
        value = parts.pop()
        if undo is not None:
            undo.put_aside(state)
        if mixer.convolution is not None and state.convolution is not None:
            value = convolve(value, state.convolution, *mixer.convolution)
        heads = (mixer.num_heads, -1)
        affinity, update, merge = (part.unflatten(1, heads) for part in parts)
        values = value.unflatten(1, heads)
        if mixer.dense:
            rows, position = (None, None) if undo is None else (undo.rows, undo.position)
            y = dense_step(affinity, update, merge, rate_bias, mixer.temperature, values, state.memory, rows, position)
        else:
            if rate_bias is not None:
                projected[:, mixer.rates].add_(rate_bias)
            y = mixer.step_memory(affinity, update, merge, values, state)
        return y.flatten(1), gate, None if mixer.skip is None else value


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` as float32 partial sums `[P, B, O]` over parts of the inputs (split-K): few outputs make few tiles, and
    splitting keeps more of the GPU busy."""
    inputs = x.shape[1]
    parts = next((parts for parts in PARTS if inputs % (parts * LEAST_INPUTS) == 0), 1)
    return wide_product(x.unflatten(1, (parts, -1)).transpose(0, 1), weight.unflatten(1, (parts, -1)).permute(1, 2, 0))
