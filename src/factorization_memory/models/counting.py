"""What a model costs, from its configuration alone: parameters, FLOPs per token, state bytes, memory for training.

A multiplication and an addition are one FLOP each. Shapes: d hidden size, D total value width, H heads, M memory states of
each head, K of them selected, V vocabulary size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from factorization_memory.config import ModelConfig
from factorization_memory.models.language_model import LanguageModel

UPDATE_FLOPS = 3
"""Of one number of the memory: `(1 - theta) * h + theta * v`; `1 - theta` is shared by a state's whole width."""
MERGE_FLOPS = 2
"""Of one number of the memory: its share of `sum_j phi_j h_j`."""


@dataclass(frozen=True)
class Counts:
    """Costs of one model. FLOPs are per token; `decode` is one generated token, `prefill` one of a prompt."""

    parameters: int
    embedding_parameters: int
    projection_flops: int
    """Matrix products of the blocks, forward."""
    head_flops: int
    """The output head, forward."""
    recurrence_flops: int
    """Updating and merging the selected states as the formula says, forward. The chunked form does other arithmetic for the
    same result."""
    state_bytes: int
    """Memory and convolution tails of one sequence, at any length."""

    @property
    def forward_flops(self) -> int:
        """One token through blocks and head."""
        return self.projection_flops + self.recurrence_flops + self.head_flops

    @property
    def train_flops(self) -> int:
        """Forward and backward; backward does each product twice."""
        return 3 * self.forward_flops

    @property
    def prefill_flops(self) -> int:
        """One prompt token: no head, which only the last one needs."""
        return self.projection_flops + self.recurrence_flops

    @property
    def decode_flops(self) -> int:
        """One generated token."""
        return self.forward_flops


def count(config: ModelConfig) -> Counts:
    """The costs of a model of `config`, whose `vocab_size` must be set. With an affinity threshold all states count."""
    with torch.device("meta"):
        model = LanguageModel(config)
        state = model.initial_state(1)
    weights = sum(
        module.weight.numel() for block in model.blocks for module in block.modules() if isinstance(module, torch.nn.Linear)
    )
    selected = config.top_k or config.num_states
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=model.embedding.weight.numel() * (1 if config.tie_word_embeddings else 2),
        projection_flops=2 * weights,
        head_flops=2 * config.hidden_size * config.vocab_size,
        recurrence_flops=config.num_layers * (UPDATE_FLOPS + MERGE_FLOPS) * selected * config.value_size,
        state_bytes=state.num_bytes,
    )


def training_memory(config: ModelConfig, micro_batch_size: int, context_length: int, bfloat16: bool) -> dict[str, int]:
    """Bytes that a training step holds: `weights`, `gradients`, `optimizer` (AdamW's two moments), `activations` (what
    backward needs of one micro-batch, seen by running the forward pass on tensors without storage) and their `total`."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    held: dict[int, int] = {}
    kept_alive = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        # Views of one tensor are counted once; keeping the tensors keeps their identities apart.
        storage = x.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        kept_alive.append(x)
        return x

    with torch.device("meta"):
        model = LanguageModel(dataclasses.replace(config, backend="chunked")).to(dtype)
        tokens = torch.zeros(micro_batch_size, context_length, dtype=torch.long)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.loss(tokens, tokens)
    parameters = sum(p.numel() for p in model.parameters())
    activations = sum(size for storage, size in held.items() if storage not in own)
    parts = {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters, "activations": activations}
    return parts | {"total": sum(parts.values())}
