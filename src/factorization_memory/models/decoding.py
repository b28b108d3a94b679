"""A model's step in few kernels, for decoding on a GPU: six for each block instead of some thirty.

The projections of a layer's input become one, and each linear layer takes what stands around it (normalisation, gate,
residual) into its own kernel, so that a step takes little more than the time of reading the weights and the states that it
touches. The residual stream is float32 whatever the weights' dtype.

Shapes: B sequences, d hidden size, H heads, M memory states, K selected states, D value width of a head, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory import ops
from factorization_memory.layers import LayerState, ModelState
from factorization_memory.models.language_model import Block, LanguageModel
from factorization_memory.ops.routing import route


class DecodingModel:
    """`LanguageModel.step` of a model in evaluation, with the same states.

    Args:
        model: on a device that Triton kernels run on; its input projections are copied, so that weights changed later do not
            count.

    Raises:
        ValueError: there is no such form of the model, or not here.
    """

    def __init__(self, model: LanguageModel) -> None:
        if (reason := obstacle(model)) is not None:
            raise ValueError(f"model: {reason}; use LanguageModel.step")
        self.model = model
        self.blocks = [_DecodingBlock(block) for block in model.blocks]

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token of each sequence, `[B]`, to float32 logits `[B, V]`; `state` is updated in place and returned."""
        from factorization_memory.ops.triton.small_linear import small_linear

        model = self.model
        x = model.embedding(tokens).float()
        for block, layer_state in zip(self.blocks, state, strict=True):
            block.step(x, layer_state)
        state.step_done()
        logits = x.new_empty(len(tokens), model.config.vocab_size)
        norm = model.final_norm
        small_linear(x, model.head.weight, logits, norm_weight=norm.weight, norm_eps=norm.eps)
        return logits, state


def obstacle(model: LanguageModel) -> str | None:
    """Why a model has no such form, or not on its device; None if it has."""
    config, weight = model.config, model.embedding.weight
    if config.backend in ("reference", "chunked"):
        return f"backend={config.backend!r} is not that of the kernels"
    if config.norm == "state":
        return "norm='state' sees every memory state"
    if config.affinity_threshold is not None:
        return "affinity_threshold selects another number of states for each token"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {weight.dtype}, the kernels take float32 or bfloat16"
    return ops.obstacle("triton", weight)


class _DecodingBlock:
    """A block's step."""

    def __init__(self, block: Block) -> None:
        self.block = block
        mixer = block.mixer
        projections = [mixer.affinity, mixer.update_rate, mixer.merge_rate, mixer.value]
        if mixer.gate is not None:
            projections.append(mixer.gate)
        self.weight = torch.cat([projection.weight for projection in projections]).detach()
        self.bias = torch.cat([p.weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in projections]).detach()
        self.sizes = [projection.out_features for projection in projections]

    def step(self, x: Tensor, state: LayerState) -> None:
        """The residual stream `[B, d]`, float32, and the state, both in place."""
        from factorization_memory.ops.triton.small_linear import small_linear
        from factorization_memory.ops.triton.step import weigh_all

        block, mixer = self.block, self.block.mixer
        norm = block.mixer_norm
        projected = small_linear(
            x, self.weight, x.new_empty(len(x), len(self.weight)), bias=self.bias, norm_weight=norm.weight, norm_eps=norm.eps,
        )  # fmt: skip
        affinity, update, merge, value, *gate = projected.split(self.sizes, dim=1)
        heads = (mixer.num_heads, -1)
        affinity, update, merge = (logits.unflatten(1, heads) for logits in (affinity, update, merge))
        if mixer.top_k is None:
            update, merge = weigh_all(affinity, update, merge, mixer.temperature)
            indices = None
        else:
            _, update, merge, indices = route(affinity, update, merge, mixer.top_k, mixer.temperature)
        undo = state.undo
        if undo is not None:
            undo.put_aside(indices, state.convolution)
        if mixer.convolution is not None and state.convolution is not None:
            value = mixer.convolution.step(value, state.convolution)
        rows, position = (None, None) if undo is None else (undo.rows, undo.position)
        y = ops.step_unchecked(update, merge, value.unflatten(1, heads), state.memory, indices, undo=rows, position=position)
        small_linear(
            y.flatten(1), mixer.output.weight, x, residual=x, gate=gate[0] if gate else None,
            norm_weight=mixer.norm_weight, norm_eps=mixer.norm_eps, norm_groups=mixer.num_heads if mixer.norm == "head" else 1,
        )  # fmt: skip
        norm, feed_forward = block.feed_forward_norm, block.feed_forward
        hidden = x.new_empty(len(x), feed_forward.down.in_features, dtype=self.weight.dtype)
        small_linear(x, feed_forward.gate_up.weight, hidden, norm_weight=norm.weight, norm_eps=norm.eps, glu=True)
        small_linear(hidden, feed_forward.down.weight, x, residual=x)
