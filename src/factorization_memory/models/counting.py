"""Costs of a model from its configuration alone: parameters, FLOPs per token, state bytes, training memory.

A multiplication and an addition are one FLOP each. Shapes: d hidden size, D total value width, H heads, M memory states per
head, K selected, V vocabulary size, T tokens of a training sequence, W tokens of an attention window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from factorization_memory.config import DataConfig, ModelConfig
from factorization_memory.layers import MIXERS, ModelState
from factorization_memory.models.language_model import LanguageModel, parameter_count

PAIR_FLOPS = 4
"""Attention FLOPs per pair of tokens and channel: query-key product and weighted sum of values."""

MUCH_READ = 1 << 31
"""A length at which every window is full."""

TRACED_LAYERS, TRACED_LENGTH = 64, 32768
"""Largest model whose activations are measured by tracing all of it."""


@dataclass(frozen=True)
class Counts:
    """Costs of one model. FLOPs are per token; `decode` is one generated token, `prefill` one of a prompt. With attention they
    depend on the context: all are means over the tokens of a training sequence."""

    parameters: int
    embedding_parameters: int
    projection_flops: int
    """Matrix products of the blocks, forward."""
    head_flops: int
    """The output head, forward."""
    recurrence_flops: int
    """Updating and merging the selected states by the formula, forward; for Mamba-2 and Gated DeltaNet, updating and reading
    the whole state, in the latter also reading it at the key. The chunked forms do different arithmetic for the same
    result."""
    attention_flops: int
    """Products of queries with keys, and sums of values, forward, at the mean context of a training sequence."""
    state_bytes: int
    """Memory, convolution tails, lagged selections and full attention windows of one sequence, at any length."""
    state_bytes_per_token: int
    """Additional bytes per token read, from attention without a window."""

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters of the blocks and the last norm."""
        return self.parameters - self.embedding_parameters

    @property
    def forward_flops(self) -> int:
        """Blocks and head, for one token."""
        return self.prefill_flops + self.head_flops

    @property
    def train_flops(self) -> int:
        """Forward and backward; backward costs twice the forward."""
        return 3 * self.forward_flops

    @property
    def prefill_flops(self) -> int:
        """One prompt token, without the head, which only the last one needs."""
        return self.projection_flops + self.recurrence_flops + self.attention_flops

    @property
    def decode_flops(self) -> int:
        """One generated token."""
        return self.forward_flops


def count(config: ModelConfig, context_length: int = DataConfig.context_length) -> Counts:
    """The costs of a model of `config`, whose `vocab_size` must be set.

    `context_length` is the length T of training sequences: a token attends to (T + 1) / 2 tokens on average, fewer with a
        window.
    """
    # One block per position in the pattern of mixers represents all at that position, so the time does not depend on depth.
    places = min(config.num_layers, len(config.mixers))
    times = [len(range(place, config.num_layers, len(config.mixers))) for place in range(places)]
    with torch.device("meta"):
        model = LanguageModel(dataclasses.replace(config, num_layers=places))
        full, fuller = (model.initial_state(1, capacity) for capacity in (MUCH_READ, MUCH_READ + 1))

    def state_bytes(of: ModelState) -> int:
        return sum(count * _bytes(layer.tensors()) for count, layer in zip(times, of.layers, strict=True))

    weights = sum(
        count * module.weight.numel()
        for count, block in zip(times, model.blocks, strict=True)
        for module in block.modules()
        if isinstance(module, torch.nn.Linear)
    )
    kinds = [MIXERS[mixer] for mixer in config.layer_mixers]
    pairs = sum(kind.attended(config, context_length) for kind in kinds)  # over all tokens of a sequence
    state_bytes_per_token = state_bytes(fuller) - state_bytes(full)
    return Counts(
        parameters=parameter_count(config),
        embedding_parameters=model.embedding.weight.numel() * (1 if config.tie_word_embeddings else 2),
        projection_flops=2 * weights,
        head_flops=2 * config.hidden_size * config.vocab_size,
        recurrence_flops=sum(kind.recurrence_flops(config) for kind in kinds),
        attention_flops=PAIR_FLOPS * pairs // context_length,
        state_bytes=state_bytes(full) - MUCH_READ * state_bytes_per_token,
        state_bytes_per_token=state_bytes_per_token,
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def training_memory(config: ModelConfig, micro_batch_size: int, context_length: int, bfloat16: bool) -> dict[str, int]:
    """Bytes that a training step holds: `weights`, `gradients`, `optimizer` (AdamW's two moments), `activations` (saved for
    backward for one micro-batch, measured by a forward pass on tensors without storage) and their `total`.

    Activations are linear in the repeats of the pattern of mixers and, for long sequences, in the length: beyond
    `TRACED_LAYERS` and `TRACED_LENGTH` they are extrapolated from two smaller passes, so that any size takes little time.
    """
    parameters = parameter_count(config)

    def of_layers(length: int) -> int:
        pattern = len(config.mixers)
        if config.num_layers <= max(TRACED_LAYERS, 3 * pattern):
            return _activations(config, micro_batch_size, length, bfloat16)
        few = pattern + config.num_layers % pattern
        small, more = (
            _activations(dataclasses.replace(config, num_layers=layers), micro_batch_size, length, bfloat16)
            for layers in (few, few + pattern)
        )
        return small + (config.num_layers - few) // pattern * (more - small)

    if context_length <= TRACED_LENGTH:
        activations = of_layers(context_length)
    else:
        half, whole = of_layers(TRACED_LENGTH // 2), of_layers(TRACED_LENGTH)
        activations = whole + (context_length - TRACED_LENGTH) * (whole - half) // (TRACED_LENGTH // 2)
    parts = {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters, "activations": activations}
    return parts | {"total": sum(parts.values())}


def _activations(config: ModelConfig, micro_batch_size: int, context_length: int, bfloat16: bool) -> int:
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    held: dict[int, int] = {}
    kept_alive = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        # Count views of one storage once; keep the tensors alive, so that ids stay unique.
        storage = x.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        kept_alive.append(x)
        return x

    with torch.device("meta"):
        model = LanguageModel(dataclasses.replace(config, backend="chunked")).to(dtype)
        tokens = torch.zeros(micro_batch_size, context_length, dtype=torch.long)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(tokens, tokens)
    return sum(size for storage, size in held.items() if storage not in own)
