"""Models of this package that read and write, for `benchmarks.inference`: those whose state has constant size, and attention.

Shapes: B sequences, T tokens, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from factorization_memory.benchmarks.inference_contender import Step
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.benchmarks.timing import tensor_bytes
from factorization_memory.config import ModelConfig
from factorization_memory.generation import LoopSteps, Steps, default_chunk, prefill_batch, steps_for, weights_dtype, with_dtype
from factorization_memory.generation.pool import slot_bytes
from factorization_memory.layers import LayerState, ModelState
from factorization_memory.layers.attention_state import AttentionState
from factorization_memory.models import LanguageModel
from factorization_memory.models.capacity import require_room
from factorization_memory.models.counting import count


class PackageModel:
    """A `LanguageModel` of random weights; what `RecurrentModel` and `AttentionModel` share."""

    def __init__(self, name: str, config: ModelConfig, benchmark: InferenceBenchmark, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = with_dtype(LanguageModel(config).to(device).eval(), weights_dtype(benchmark.precision, device))
        self.top_k = None if config.top_k == config.num_states else config.top_k
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.weight_bytes = tensor_bytes(*self.model.parameters())
        self.chunk = benchmark.prefill_chunk or default_chunk(device)
        self.steps: Steps | None = None

    def reading_work(self, context: int) -> float:
        """FLOPs of reading `context` tokens."""
        return float(context * count(self.model.config, context).prefill_flops)

    def _read_weight_bytes(self, batch: int) -> int:
        """Bytes of the weights that a step of `batch` sequences reads."""
        if self.model.config.tie_word_embeddings:
            return self.weight_bytes
        rows = self.model.embedding.weight  # a table to look B rows up in, and not also the head's weight
        return self.weight_bytes - tensor_bytes(rows) + batch * tensor_bytes(rows[0])


class RecurrentModel(PackageModel):
    """A model whose state has constant size, with `generation`'s way of reading and stepping."""

    invented: int | None = None

    def begin(self, batch: int, steps: int) -> None:
        """Allocates the state of `batch` sequences, on a GPU with the graph of its step."""
        self.steps = steps_for(self.model, batch)

    def read(self, tokens: Tensor) -> Tensor:
        """Reads int64 `[B, T]` from the beginning; logits `[B, V]` of the next token."""
        logits, state = prefill_batch(self.model, list(tokens), self.chunk)
        # The prompt that a warm-up reads may be of fewer sequences.
        room = self._room()
        room.load(state, None if state.batch_size == room.batch_size else list(range(state.batch_size)))
        self.invented = None
        return logits

    def invent(self, context: int) -> None:
        """Fills the state with random numbers, as if it had read `context` tokens: its size is that of any text."""
        for tensor in self._room().state.tensors():
            if tensor.is_floating_point():  # the rest are indices, set by the first step
                tensor.normal_()
        self.invented = context

    def keep(self) -> Callable[[], None]:
        """Remembers the state; the result brings it back."""
        if self.invented is not None:
            return partial(self.invent, self.invented)
        room = self._room()
        return partial(room.load, room.state.clone())

    def modes(self) -> dict[str, Step]:
        """Steps by name."""
        return _modes(self._room())

    def state_bytes(self) -> int:
        """Bytes of the state."""
        return self._room().state.num_bytes

    def step_bytes(self) -> int:
        """Bytes that a step must move: the weights once, the states that it touches in and out."""
        room, config = self._room(), self.model.config
        memories = [layer.memory for layer in room.state if isinstance(layer, LayerState)]
        moved = room.state.num_bytes - tensor_bytes(*memories)
        touched = sum(tensor_bytes(memory) * (self.top_k or config.num_states) // config.num_states for memory in memories)
        # With a lag other states are read than those that are read and written.
        read_alone = touched if config.update_lag and self.top_k else 0
        return self._read_weight_bytes(room.batch_size) + 2 * (moved + touched) + read_alone

    def end(self) -> None:
        """Frees the state."""
        self.steps = None

    def _room(self) -> Steps:
        assert self.steps is not None, "begin comes first"
        return self.steps


class AttentionModel(PackageModel):
    """A model of attention alone, whose state grows with the text.

    A step that enlarges its cache cannot be captured as a CUDA graph. But here it is known how many tokens follow: the steps
    are those of a window that holds the text and all of them. It leaves nothing out, and its cache has that size from the
    start.
    """

    has_read: ModelState | None = None
    """What was read, until it is in the steps' state."""

    def begin(self, batch: int, steps: int) -> None:
        """Remembers for how much to make room."""
        self.batch, self.more = batch, steps
        self.end()

    def read(self, tokens: Tensor) -> Tensor:
        """Reads int64 `[B, T]` from the beginning; logits `[B, V]` of the next token."""
        self.end()  # the last text's cache need not stand beside this one's
        self._require_room(*tokens.shape)
        logits, self.has_read = prefill_batch(self.model, list(tokens), self.chunk)
        self.context = tokens.shape[1]
        return logits

    def invent(self, context: int) -> None:
        """Random keys and values of `context` tokens."""
        self.end()
        self.context = context
        for layer in _caches(self._room().state):
            layer.keys.normal_()
            layer.values.normal_()
            _fill_positions(layer, context)

    def keep(self) -> Callable[[], None]:
        """Goes back to the tokens of now, behind which steps have written others."""
        state, context = self._room().state, self.context

        def resume() -> None:
            for layer in _caches(state):
                _fill_positions(layer, context)
            state.forget_steps()

        return resume

    def modes(self) -> dict[str, Step]:
        """Steps by name."""
        return _modes(self._room())

    def state_bytes(self) -> int:
        """Bytes of the part of the cache that is filled."""
        filled = slice(self.context)
        return sum(
            tensor_bytes(layer.keys[:, :, filled], layer.values[:, :, filled], layer.positions[:, filled], layer.length)
            for layer in _caches(self._room().state)
        )

    def step_bytes(self) -> int:
        """Bytes that a step must move: reads of the weights, keys and values, writes of those of one token."""
        one = slice(1)
        of_a_token = sum(tensor_bytes(layer.keys[:, :, one], layer.values[:, :, one]) for layer in _caches(self._room().state))
        return self._read_weight_bytes(self.batch) + (self.context + 1) * of_a_token

    def end(self) -> None:
        """Frees the cache."""
        self.steps, self.has_read = None, None

    def _room(self) -> Steps:
        """The cache with room for the steps, on a GPU with the graph of a step; holds what was read, if anything."""
        if self.steps is None:
            most = self.context + self.more
            self._require_room(self.batch, most)
            self.steps = steps_for(_with_window(self.model, most), self.batch)
            if self.has_read is not None:
                # Not by `load`, which would enlarge the other cache first.
                for layer, other in zip(_caches(self.steps.state), _caches(self.has_read), strict=True):
                    for tensor, given in ((layer.keys, other.keys), (layer.values, other.values)):
                        tensor[:, :, : self.context] = given[:, :, : self.context]
                    _fill_positions(layer, self.context)
                self.has_read = None
        return self.steps

    def _require_room(self, batch: int, tokens: int) -> None:
        size = batch * slot_bytes(self.model, tokens)
        require_room(f"keys and values of {batch:,} x {tokens:,} tokens", size, "use fewer", self.model.embedding.weight.device)


def _modes(steps: Steps) -> dict[str, Step]:
    eager: Step = lambda tokens: steps.model.step(tokens, steps.state)[0]  # noqa: E731
    if isinstance(steps, LoopSteps):
        return {"eager": eager, "loops": steps.step}
    return {"eager": eager, "graph": steps.step} if steps.captured else {"eager": eager}


def _caches(state: ModelState) -> Sequence[AttentionState]:
    return cast(Sequence[AttentionState], state.layers)


def _fill_positions(layer: AttentionState, context: int) -> None:
    """Makes the first `context` entries the only ones that count."""
    position = torch.arange(1, layer.capacity + 1, device=layer.positions.device)
    layer.positions.copy_(position * (position <= context))
    layer.length.fill_(context)


def _with_window(model: LanguageModel, window: int) -> LanguageModel:
    """The same model, sharing its weights, with attention to the last `window` tokens."""
    config = replace(model.config, attention=replace(model.config.attention, sliding_window=window))
    with torch.device("meta"):
        windowed = LanguageModel(config)
    windowed.load_state_dict(model.state_dict(), assign=True)
    return windowed.eval()
