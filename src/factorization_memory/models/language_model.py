"""The language model: embedding, pre-norm blocks of a mixer (memory, attention, Mamba-2, Gated DeltaNet) and a feed-forward
layer, norm, head.

Shapes: B sequences, T tokens, d hidden size, V vocabulary size, N packed sequences.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from factorization_memory.config import ConfigError, ModelConfig
from factorization_memory.layers import MixerState, ModelState, UndoableMixer
from factorization_memory.layers.calling import why_called, why_hooked
from factorization_memory.layers.norm import RMSNorm
from factorization_memory.models.backbone import Backbone
from factorization_memory.models.block import Block, refuse_undo
from factorization_memory.models.capacity import require_room
from factorization_memory.ops import check_tensors, read_borders
from factorization_memory.ops.cross_entropy import linear_cross_entropy, logits_cross_entropy

BLOCK_BYTES = 40_000
"""Bytes of a block's Python objects, however small its weights."""


@functools.lru_cache(maxsize=256)
def parameter_count(config: ModelConfig) -> int:
    """Parameter count of a model of `config`, without allocating weights and in time independent of its depth."""
    with torch.device("meta"):
        kinds = [(mixer, config.layer_mixers.count(mixer)) for mixer in dict.fromkeys(config.layer_mixers)]
        blocks = sum(times * sum(p.numel() for p in Block(config, mixer).parameters()) for mixer, times in kinds)
        norm = sum(p.numel() for p in RMSNorm(config.hidden_size, config.norm_eps).parameters())
    tables = 1 if config.tie_word_embeddings else 2
    return blocks + norm + tables * config.vocab_size * config.hidden_size


def _require_room(config: ModelConfig) -> None:
    device = torch.get_default_device()
    if device.type == "meta":
        return
    number = parameter_count(config)
    sizes = ", ".join(f"{name}={getattr(config, name)}" for name in ("num_layers", "hidden_size", "vocab_size"))
    require_room(
        f"model: {number:,} parameters ({sizes})",
        torch.get_default_dtype().itemsize * number + BLOCK_BYTES * config.num_layers,
        "lower these or the mixers' sizes",
        device,
    )


class LanguageModel(Backbone):
    """A causal language model. Its state has constant size, unless it has attention without a window.

    Args:
        config: its `vocab_size` must be set.

    Raises:
        ConfigError: `vocab_size` is 0, or the weights exceed this machine's memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError(f"model.vocab_size={config.vocab_size!r}: use the number of ids of its tokenizer")
        _require_room(config)
        self.config = config
        self._add_layers(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights: a standard deviation of 0.02 for the embedding and the head; see `Block` for the rest."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        if not self.config.tie_word_embeddings:
            nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            block.reset_parameters()
        self.final_norm.reset_parameters()

    def initial_state(self, batch_size: int, capacity: int = 0) -> ModelState:
        """The initial state of `batch_size` sequences; attention has room for `capacity` tokens, and grows as needed."""
        return ModelState(block.mixer.initial_state(batch_size, capacity) for block in self.blocks)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | ModelState | None = None,
        *,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        last_only: bool = False,
        reduction: str = "mean",
        keep_state: bool = True,
    ) -> tuple[Tensor, ModelState | None]:
        """Logits of the next token, or with `targets` the loss: cross-entropy in nats per token.

        The loss never materialises all logits at once, unless the head must be called (it is an adapter, or has a hook).

        Args:
            tokens: int64 `[B, T]`.
            targets: int64 `[B, T]`, the token after each; -100 where there is none. A state passed here, as for layers, is
                taken as `state`.
            state: state to continue from (of N sequences with `cu_seqlens`); None starts from the initial state. Not modified.
            cu_seqlens: `[N + 1]` integers, borders of sequences packed along T (B = 1).
            padding_mask: bool `[B, T]`, False for padding, which leaves the state unchanged.
            last_only: compute only the logits of the last position, for prefill; for packed sequences those of the last
                position of each, none of which may be empty. Not with `targets`.
            reduction: of the loss: "mean" over the targets, or "none".
            keep_state: whether to return the state; for many packed sequences it takes much memory.

        Returns:
            Logits `[B, T, V]` (`[B, 1, V]` with `last_only`, `[1, N, V]` for packed sequences); or the loss, a scalar in
            float32 (float64 in a float64 model), or float32 `[B, T]` (not differentiable, 0 where there is no target) with
            "none". And the state after the last token, or None.

        Raises:
            ValueError: an argument that does not fit, or an empty sequence with `last_only`.
        """
        if isinstance(targets, ModelState):
            if state is not None:
                raise ValueError("targets: got a ModelState, and another as state; pass targets (int64 [B, T]) before state")
            targets, state = None, targets
        check_tensors(tokens=tokens, targets=targets, cu_seqlens=cu_seqlens, padding_mask=padding_mask)
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets: got shape {tuple(targets.shape)}, takes the shape of tokens, {tuple(tokens.shape)}")
        if last_only:
            self._check_last_only(tokens, targets, cu_seqlens)
        if state is not None:
            self.check_state(state)
        before = [None] * len(self.blocks) if state is None else state.layers
        x, layers = self.run_blocks(self.embed(tokens), before, cu_seqlens, padding_mask, keep_state)
        after = ModelState(cast(list[MixerState], layers)) if keep_state else None
        if targets is not None:
            return self._loss(self.final_norm(x), targets, reduction), after
        if last_only:
            x = x[:, -1:] if cu_seqlens is None else x[:, cu_seqlens[1:].to(x.device, torch.long) - 1]
        return self.head(self.final_norm(x)), after

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        reduction: str = "mean",
        keep_state: bool = True,
    ) -> tuple[Tensor, ModelState | None]:
        """`self(tokens, targets, ...)`, under its former name."""
        options: dict[str, Any] = {"state": state, "cu_seqlens": cu_seqlens, "padding_mask": padding_mask}
        return cast(Any, self(tokens, targets, reduction=reduction, keep_state=keep_state, **options))

    def _loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The loss, given the head's input `[B, T, d]`."""
        flat = targets.flatten()
        if why_called(self.head) is None:
            losses = linear_cross_entropy(x.flatten(0, 1), self.head.weight, flat, reduction)
        else:
            losses = logits_cross_entropy(self.head(x).flatten(0, 1), flat, reduction)
        return losses.view(targets.shape) if reduction == "none" else losses

    def _check_last_only(self, tokens: Tensor, targets: Tensor | None, cu_seqlens: Tensor | None) -> None:
        if targets is not None:
            raise ValueError("last_only=True: cannot be combined with targets; a loss needs all positions")
        if tokens.shape[1] == 0:
            raise ValueError(
                f"tokens: got shape {tuple(tokens.shape)}, which has no last position; give a token, or drop last_only"
            )
        if cu_seqlens is not None and not torch.compiler.is_compiling():
            borders = read_borders(cu_seqlens)
            empty = [n for n, (start, stop) in enumerate(pairwise(borders)) if start == stop]
            if empty:
                raise ValueError(
                    f"cu_seqlens: got {borders}, whose sequence {empty[0]} is empty and has no last position; drop it, or "
                    "last_only"
                )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token of each sequence, `[B]`, to logits `[B, V]`; `state` is updated in place and returned.

        If something acts in a call of the model, such as a hook, `forward` is called with one token instead; likewise for each
        block (see `Block.step`).

        Raises:
            ValueError: `state` does not fit this model and B sequences, or records undo (`keep_undo`) although the model or a
                block must be called.
        """
        self.check_step(tokens, state)
        if (reason := why_hooked(self)) is not None:
            for layer in state:
                refuse_undo(layer, f"the model: {reason}")
            logits, after = self(tokens[:, None], state=state)
            state.load(after)
            return logits[:, 0], state
        x, _ = self.run_blocks(self.embed(tokens), state.layers, step=True)
        state.step_done()
        return self.head(self.final_norm(x)), state

    def keep_undo(self, state: ModelState, steps: int) -> ModelState:
        """The same state, sharing its tensors, recording what the last `steps` steps overwrite, so that `ModelState.rollback`,
        `snapshot` and `restore` cost as little as those steps.

        Raises:
            ValueError: `steps` is not positive, `state` is not of this model, or a layer's steps cannot be undone.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: use 1 or more steps to keep")
        self.check_state(state)
        with torch.inference_mode(False):
            position = torch.zeros(1, dtype=torch.int64, device=state.device)
        layers = []
        for number, (block, layer) in enumerate(zip(self.blocks, state, strict=True)):
            if not isinstance(block.mixer, UndoableMixer):
                raise ValueError(
                    f"block {number} of the model: steps of {type(block.mixer).__name__} cannot be rolled back; "
                    "take a snapshot() or clone() of the state before them"
                )
            layers.append(block.mixer.keep_undo(layer, steps, position))
        return ModelState(layers)

    def check_state(self, state: ModelState) -> None:
        """Raises ValueError for a state with another number or kind of layers."""
        kinds = [block.mixer.state_type for block in self.blocks]
        if len(state) != len(kinds) or not all(isinstance(one, kind) for one, kind in zip(state, kinds, strict=True)):
            found = ", ".join(type(one).__name__ for one in state)
            takes = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"state: got layers of {found}, takes {takes}; take one from initial_state or forward")

    def check_step(self, tokens: Tensor, state: ModelState) -> None:
        """Raises ValueError unless `tokens` has one token per sequence of `state` and `state` fits this model; called before
        any layer's state is modified."""
        check_tensors(tokens=tokens)
        if tokens.dim() != 1:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, takes one token per sequence, [B]")
        self.check_state(state)
        for block, layer in zip(self.blocks, state, strict=True):
            block.mixer.check_state(layer, len(tokens))
