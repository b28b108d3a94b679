"""Other models that read and write, for `benchmarks.inference`: the Llama of `transformers`, whose memory grows with the text.

Shapes: B sequences, T tokens, H attention heads, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from factorization_memory.benchmarks import training
from factorization_memory.benchmarks.inference_contender import Step
from factorization_memory.benchmarks.settings import InferenceBenchmark
from factorization_memory.benchmarks.timing import tensor_bytes
from factorization_memory.generation import weights_dtype
from factorization_memory.models.counting import count
from factorization_memory.models.huggingface import CACHE_NAME


class _Layer(DynamicLayer):
    """Keys and values of one layer in preallocated tensors; attention sees the part that is filled.

    `transformers`' growing cache copies all of it for every token, and its static one attends to what is not filled yet: this
    does neither.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.room, self.length = (keys, values), 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends `[B, H, T, D]`; returns all keys and values so far."""
        start, self.length = self.length, self.length + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start : self.length] = new
        return self.room[0][:, :, : self.length], self.room[1][:, :, : self.length]

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.length


class Llama:
    """A Llama of the same vocabulary, width and depth and as many parameters as our model. A prompt is read in one forward,
    which suits its attention best; steps run from Python alone."""

    name = "llama"
    top_k: int | None = None

    def __init__(self, benchmark: InferenceBenchmark, device: torch.device) -> None:
        size = training.TrainingBenchmark(
            model=benchmark.model, lengths=(2 * max(benchmark.contexts),), llama_heads=benchmark.llama_heads, peers=("llama",)
        )
        torch.manual_seed(0)
        parameters = count(benchmark.model).parameters
        self.model: Any = training._peers(size, torch.device("cpu"), parameters)["llama"][0].eval()
        self.dtype = weights_dtype(benchmark.precision, device)
        self.model.to(device, self.dtype)
        model: nn.Module = self.model
        self.parameters = sum(p.numel() for p in model.parameters())
        self.weight_bytes = tensor_bytes(*model.parameters())
        self.device = device
        self.cache: Cache | None = None

    def reading_work(self, context: int) -> float:
        """As attention's: all pairs of tokens."""
        return float(context) ** 2

    def begin(self, batch: int, steps: int) -> None:
        """Remembers how much to allocate."""
        self.batch, self.steps = batch, steps

    def read(self, tokens: Tensor) -> Tensor:
        """Read int64 `[B, T]` from the beginning; logits `[B, V]` of the next token."""
        self._make_room(*tokens.shape)
        return self._forward(tokens)

    def invent(self, context: int) -> None:
        """Random keys and values of `context` tokens."""
        self._make_room(self.batch, context)
        for layer in self._layers():
            for room in layer.room:
                room.normal_()
            layer.length = context

    def keep(self) -> Callable[[], None]:
        """Goes back to keys and values of now, behind which others may have been written."""
        cache, lengths = self.cache, [layer.length for layer in self._layers()]

        def resume() -> None:
            self.cache = cache
            for layer, length in zip(self._layers(), lengths, strict=True):
                layer.length = length

        return resume

    def modes(self) -> dict[str, Step]:
        """From Python."""
        return {"eager": lambda tokens: self._forward(tokens[:, None])}

    def state_bytes(self) -> int:
        """Bytes of all keys and values that are there."""
        return sum(tensor_bytes(room[:, :, : layer.length]) for layer in self._layers() for room in layer.room)

    def step_bytes(self) -> int:
        """Bytes that a step must read: weights, keys and values."""
        weights, config = self.weight_bytes, self.model.config
        if not config.tie_word_embeddings:  # a table to look B rows up in, and not also the head's weight
            rows = self.model.get_input_embeddings().weight
            weights -= tensor_bytes(rows) - self.batch * tensor_bytes(rows[0])
        return weights + self.state_bytes()

    def end(self) -> None:
        """Frees keys and values."""
        self.cache = None

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self.cache}).logits[:, -1]

    def _make_room(self, batch: int, context: int) -> None:
        self.cache = None  # not two at a time
        config = self.model.config
        shape = (batch, config.num_key_value_heads, context + self.steps, config.hidden_size // config.num_attention_heads)
        layers = [
            _Layer(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
            for _ in range(config.num_hidden_layers)
        ]
        self.cache = Cache(layers=layers)

    def _layers(self) -> list[_Layer]:
        assert self.cache is not None, "nothing was read"
        return self.cache.layers
