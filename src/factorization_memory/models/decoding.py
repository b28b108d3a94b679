"""A model's step in few kernels, for decoding on a GPU.

The projections of a layer's input become one, and what stands around a linear layer (normalisation, gate, residual, casts) is
in few kernels. The residual stream is float32 whatever the weights' dtype. A block takes, in the dense form:

- up to four sequences, five kernels: a linear layer takes all around it into its own kernel (`ops/triton/small_linear.py`),
  so that a step takes little more than the time of reading the weights and the states that it touches. They are the input
  projections with the norm before them; the step with its routing; output projection with norm, gate and residual; gate and up
  projections with norm and SwiGLU; down projection with residual.
- more sequences, nine: PyTorch's products (input projections; output; gate and up; down), the step with its routing, and before
  the products one kernel for all that stands there (`ops/triton/decoding.py`: residual sum, norm and cast; norm, gate and cast;
  residual sum, norm and cast; SwiGLU and cast).

The sparse form takes one more for routing, and of more sequences one for biases; a convolution takes one more, or four (five
of few sequences, six of more in bfloat16) if routing sees it too (`conv_input="both"`); steps that can be undone one for each
tensor put aside but the memory. Queries of their own take several small ones more.

Shapes: B sequences, d hidden size, H heads, M memory states, K selected states, D value width of a head, V vocabulary size,
P parts of a product, O its outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory import ops
from factorization_memory.layers import FactorizationMemory, LayerState, MixerState, ModelState
from factorization_memory.models.language_model import Block, LanguageModel
from factorization_memory.ops.precision import wide_product

PARTS = (4, 2)
"""Parts of a product into the residual stream, for more than few sequences: the first that divides the inputs."""
LEAST_INPUTS = 64
"""The inputs of a part are a multiple of this."""


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
        from factorization_memory.ops.triton.small_linear import most_tokens

        self.model = model
        self.blocks = [_DecodingBlock(block) for block in model.blocks]
        self.few = min(most_tokens(model.config.hidden_size), *(block.few for block in self.blocks))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token of each sequence, `[B]`, to float32 logits `[B, V]`; `state` is updated in place and returned."""
        from factorization_memory.ops.triton.decoding import normalise
        from factorization_memory.ops.triton.small_linear import small_linear

        model = self.model
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
            logits = wide_product(normalise(x, parts, None, norm.weight, norm.eps, 1, head.dtype), head.T)
        state.step_done()
        return logits, state


def obstacle(model: LanguageModel) -> str | None:
    """Why a model has no such form, or not on its device; None if it has."""
    config, weight = model.config, model.embedding.weight
    others = sorted({mixer for mixer in config.layer_mixers if mixer != "memory"})
    if others:
        return f"mixers={config.mixers!r}: only memory layers have one, not {', '.join(others)}"
    if not config.feed_forward:
        return "feed_forward=False: it takes blocks with a feed-forward layer"
    if config.conv_size and config.conv_input == "layer":
        return "conv_input='layer': it takes convolutions that values pass"
    if config.affinity != "softmax":
        return f"affinity={config.affinity!r} is not the paper's routing"
    if config.backend in ("reference", "chunked"):
        return f"backend={config.backend!r} is not that of the kernels"
    if config.norm == "state":
        return "norm='state' sees every memory state"
    if config.affinity_threshold is not None:
        return "affinity_threshold selects another number of states for each token"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {weight.dtype}, the kernels take float32 or bfloat16"
    return ops.obstacle("triton", weight, "weight")


class _DecodingBlock:
    """A block's step."""

    def __init__(self, block: Block) -> None:
        from factorization_memory.ops.triton.small_linear import most_tokens

        mixer, feed_forward, feed_forward_norm = block.mixer, block.feed_forward, block.feed_forward_norm
        assert isinstance(mixer, FactorizationMemory), "see obstacle"
        assert feed_forward is not None, "see obstacle"
        assert feed_forward_norm is not None
        assert mixer.affinity is not None, "see obstacle"
        self.mixer, self.mixer_norm = mixer, block.mixer_norm
        self.feed_forward, self.feed_forward_norm = feed_forward, feed_forward_norm
        rates = [rate for rate in (mixer.update_rate, mixer.merge_rate) if rate is not None]
        routing = [mixer.affinity, *rates, *([] if mixer.query is None else [mixer.query])]
        others = [mixer.value, *([] if mixer.gate is None else [mixer.gate])]
        self.routing_sees_convolution = mixer.convolution is not None and mixer.conv_input == "both"
        first = others if self.routing_sees_convolution else [*routing, *others]
        self.weight = torch.cat([projection.weight for projection in first]).detach()
        self.sizes = [projection.out_features for projection in first]
        self.routing_sizes = [projection.out_features for projection in routing]
        # The others have none.
        self.rate_bias = torch.cat([rate.bias for rate in rates]).detach()
        self.rates = slice(self.routing_sizes[0], self.routing_sizes[0] + len(self.rate_bias))
        bias = self.weight.new_zeros(sum(self.routing_sizes))
        bias[self.rates] = self.rate_bias
        if self.routing_sees_convolution:
            self.routing_weight, self.routing_bias = torch.cat([each.weight for each in routing]).detach(), bias
            self.bias = None
        else:
            self.bias = functional.pad(bias, (0, len(self.weight) - len(bias)))
        self.norm_groups = mixer.num_heads if mixer.norm == "head" else 1
        self.few = min(
            most_tokens(mixer.hidden_size), most_tokens(mixer.output.in_features, self.norm_groups),
            most_tokens(feed_forward.down.in_features),
        )  # fmt: skip

    def step_few(self, x: Tensor, state: MixerState) -> None:
        """The residual stream `[B, d]`, float32, and the state, both in place: B up to `few`."""
        from factorization_memory.ops.triton.decoding import normalise
        from factorization_memory.ops.triton.small_linear import small_linear

        norm, mixer = self.mixer_norm, self.mixer
        projected = x.new_empty(len(x), len(self.weight))
        normalised = None
        if self.routing_sees_convolution:
            normalised = normalise(x, None, None, norm.weight, norm.eps, 1, torch.float32)
            small_linear(normalised, self.weight, projected, early=True)
        else:
            small_linear(
                x, self.weight, projected, bias=self.bias, norm_weight=norm.weight, norm_eps=norm.eps, early=True
            )  # fmt: skip
        y, gate, value = self._recurrence(projected, normalised, True, state)
        small_linear(
            y, mixer.output.weight, x, residual=x, gate=gate, skipped=value, skip_weight=mixer.skip,
            norm_weight=mixer.norm_weight, norm_eps=mixer.norm_eps, norm_groups=self.norm_groups, early=True,
        )  # fmt: skip
        norm, feed_forward = self.feed_forward_norm, self.feed_forward
        hidden = x.new_empty(len(x), feed_forward.down.in_features, dtype=self.weight.dtype)
        small_linear(x, feed_forward.gate_up.weight, hidden, norm_weight=norm.weight, norm_eps=norm.eps, glu=True, early=True)
        small_linear(hidden, feed_forward.down.weight, x, residual=x, early=True)

    def step_many(self, x: Tensor, parts: Tensor | None, state: MixerState) -> Tensor:
        """The residual stream `[B, d]`, float32, and the state, both in place.

        Args:
            x: the stream, but for what the block before adds to it.
            parts: that, `[P, B, d]`, whose sum it is; None if there is none.
            state: of the layer.

        Returns:
            What this block's feed-forward layer adds, likewise.
        """
        from factorization_memory.ops.triton.decoding import glu, normalise

        norm, mixer, dtype = self.mixer_norm, self.mixer, self.weight.dtype
        normalised = normalise(x, parts, None, norm.weight, norm.eps, 1, dtype)
        projected = wide_product(normalised, self.weight.T)
        y, gate, value = self._recurrence(projected, normalised, False, state)
        y = normalise(y, None, gate, mixer.norm_weight, mixer.norm_eps, self.norm_groups, dtype, value, mixer.skip)
        parts = _in_parts(y, mixer.output.weight)
        norm, feed_forward = self.feed_forward_norm, self.feed_forward
        y = normalise(x, parts, None, norm.weight, norm.eps, 1, dtype)
        return _in_parts(glu(wide_product(y, feed_forward.gate_up.weight.T), dtype), feed_forward.down.weight)

    def _recurrence(
        self, projected: Tensor, normalised: Tensor | None, few: bool, state: MixerState
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """From the projections of the layer's input, with biases if they are those of few sequences, to the merged vectors
        `[B, H * D]`; the gate's logits if there is a gate; the values `[B, H * D]` if they skip the memory. `normalised` is the
        layer's input, which must be given where routing sees the convolution."""
        from factorization_memory.ops.triton.decoding import convolve
        from factorization_memory.ops.triton.step import dense_step

        assert isinstance(state, LayerState), "the state is of another model"
        mixer, undo = self.mixer, state.undo
        convolution = mixer.convolution
        parts = list(projected.split(self.sizes, dim=1))
        gate = parts.pop() if mixer.gate is not None else None
        value = parts.pop()
        if undo is not None:
            undo.put_aside(None, state.convolution)
        if self.routing_sees_convolution:
            assert normalised is not None
            value = torch.cat((value, normalised.to(value.dtype)), dim=1)
        if convolution is not None and state.convolution is not None:
            value = convolve(value, state.convolution, convolution.weight, convolution.bias)
        if self.routing_sees_convolution:
            value, before = value.split((mixer.output.in_features, mixer.hidden_size), dim=1)
            projected = self._routing_logits(normalised + before, few)
            parts = list(projected.split(self.routing_sizes, dim=1))
        heads = (mixer.num_heads, -1)
        logits = iter([part.unflatten(1, heads) for part in parts])
        affinity, update = next(logits), next(logits)
        merge = None if mixer.merge_rate is None else next(logits)
        query = None if mixer.query is None else next(logits)
        rate_bias = None if few else self.rate_bias
        values = value.unflatten(1, heads)
        if mixer.top_k is not None or query is not None:
            if rate_bias is not None:
                projected[:, self.rates].add_(rate_bias)
            routing = mixer.weigh(affinity, update, merge, query)
            if undo is not None:
                undo.put_aside(routing.indices, None)
            y = mixer.step_memory(routing, values, state)
        else:
            assert merge is not None, "only a query does without"
            rows, position = (None, None) if undo is None else (undo.rows, undo.position)
            y = dense_step(affinity, update, merge, rate_bias, mixer.temperature, values, state.memory, rows, position)
        return y.flatten(1), gate, None if mixer.skip is None else value

    def _routing_logits(self, x: Tensor, few: bool) -> Tensor:
        """The projections that routing is made of, of its input x `[B, d]`; for few sequences with biases."""
        from factorization_memory.ops.triton.small_linear import small_linear

        if not few:
            return wide_product(x.to(self.weight.dtype), self.routing_weight.T)
        out = x.new_empty(len(x), len(self.routing_weight))
        return small_linear(x, self.routing_weight, out, bias=self.routing_bias, early=True)


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` as parts `[P, B, O]` whose sum it is, float32, each of its own inputs: few outputs are few tiles, and so
    many of them keep more of a GPU reading."""
    inputs = x.shape[1]
    parts = next((parts for parts in PARTS if inputs % (parts * LEAST_INPUTS) == 0), 1)
    return wide_product(x.unflatten(1, (parts, -1)).transpose(0, 1), weight.unflatten(1, (parts, -1)).permute(1, 2, 0))
