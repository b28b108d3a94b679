"""A language model without its head: embedding, blocks, last norm. Both our model and the one for `transformers` build on it.

Shapes: B sequences, T tokens, d hidden size, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from factorization_memory.config import ModelConfig
from factorization_memory.layers import MixerState
from factorization_memory.layers.norm import RMSNorm
from factorization_memory.models.block import Block


class Backbone(nn.Module):
    """Embedding, blocks and last norm. Has no `__init__`, since classes of `transformers` define one with other arguments."""

    config: Any
    """With `embedding_multiplier`."""
    embedding: nn.Embedding
    blocks: Sequence[Block]
    final_norm: RMSNorm

    def _add_layers(self, config: ModelConfig, block_type: type[Block] = Block) -> None:
        """Creates the modules; called by `__init__`."""
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = cast(Any, nn.ModuleList(block_type(config, mixer) for mixer in config.layer_mixers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings `[..., d]` of tokens `[...]`, the input of the blocks."""
        return self.scale_embeddings(self.embedding(tokens))

    def scale_embeddings(self, x: Tensor) -> Tensor:
        """Scales embeddings `[..., d]` from the table by `embedding_multiplier`."""
        return x if self.config.embedding_multiplier == 1 else x * self.config.embedding_multiplier

    def run_blocks(
        self,
        x: Tensor,
        states: Sequence[MixerState | None],
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        keep_state: bool = True,
        *,
        step: bool = False,
        after_block: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, list[MixerState | None]]:
        """Runs embedded tokens through all blocks, without the last norm.

        Args:
            x: `[B, T, d]`, or `[B, d]` for a step.
            states: state of each block to continue from (of N sequences with `cu_seqlens`); None starts from the initial
                state. Modified only by a step.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding.
            keep_state: whether to return states; if not, they are None.
            step: whether to decode one token per sequence, updating `states` in place; none may be None then.
            after_block: called with each block's output; its result is the next block's input.

        Returns:
            x after the last block, and the states after the last token.
        """
        after: list[MixerState | None] = []
        for block, state in zip(self.blocks, states, strict=True):
            if step:
                assert state is not None, "a step goes on from a state"
                x = block.step(x, state)
            else:
                x, state = self._call_block(block, x, state, cu_seqlens, padding_mask, keep_state)
            if after_block is not None:
                x = after_block(x)
            after.append(state)
        return x, after

    def _call_block(self, block: Block, *arguments: Any) -> tuple[Tensor, MixerState | None]:
        """Calls a block; subclasses may override it."""
        return cast(tuple[Tensor, MixerState | None], block(*arguments))
