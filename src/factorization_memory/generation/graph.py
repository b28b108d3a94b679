"""One decoding step of a model for a batch of fixed size: eager on any device, in compiled loops on a CPU, or as a CUDA graph
on a GPU.

Launching the hundreds of small kernels of a step one by one from Python leaves a GPU idle; a graph launches them at once.
Shapes: B sequences, V vocabulary size.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from factorization_memory.layers import MIXERS
from factorization_memory.layers.calling import why_any_called
from factorization_memory.models import loop_decoding
from factorization_memory.models.decoding import DecodingModel, why_unsupported

if TYPE_CHECKING:
    from factorization_memory.models import LanguageModel, ModelState

MAX_LOOP_SEQUENCES = 16
"""Sequences up to which compiled loops, in one thread, were faster than PyTorch's operations in all."""
WARM_UP = 2
"""Steps before the capture: the first compiles kernels, and one-time setup stays out of the capture."""


def steps_for(model: LanguageModel, batch_size: int, dtype: torch.dtype | None = None, undo_steps: int = 0) -> Steps:
    """`StepGraph` on a GPU, `LoopSteps` for few sequences of a sparse model on a CPU; `Steps` elsewhere, for models whose state
    grows, and if something intercepts calls of the model's modules (adapters, hooks, offloading)."""
    kind, model = Steps, with_dtype(model, dtype)
    if next(model.parameters()).is_cuda:
        kind = Steps if grows(model) or why_any_called(model) is not None else StepGraph
    elif batch_size <= MAX_LOOP_SEQUENCES and not undo_steps and not torch.is_autocast_enabled("cpu"):
        kind = LoopSteps if loop_decoding.why_unsupported(model) is None else Steps
    return kind(model, batch_size, undo_steps=undo_steps)


def grows(model: LanguageModel) -> bool:
    """Whether the model's state grows with the text read."""
    return model.config.state_grows


def window(model: LanguageModel) -> int:
    """Size in tokens of the widest attention window of the model; 0 if it has none."""
    return max(MIXERS[name].window(model.config) for name in model.config.layer_mixers)


def with_dtype(model: LanguageModel, dtype: torch.dtype | None) -> LanguageModel:
    """A copy of the model with weights of `dtype`, or the model itself if they already are (or `dtype` is None). Memories stay
    float32 (float64 with float64 weights)."""
    if dtype is None or all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).to(dtype)


def weights_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision: "float32", "bfloat16", or "auto" (bfloat16 on a GPU, float32 on a CPU)."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


class Steps:
    """Steps `batch_size` sequences one token at a time, by calling `LanguageModel.step`.

    Args:
        model: in evaluation mode.
        batch_size: B.
        dtype: of the weights; if it differs from the model's, the model is copied.
        undo_steps: how many of the last steps `state` can roll back (`ModelState.rollback`) without a copy.

    Attributes:
        model: the model that steps.
        batch_size: B.
        state: the state of the sequences, updated in place by every step; initially empty.
    """

    captured = False
    """Whether a new batch size costs a capture."""

    def __init__(self, model: LanguageModel, batch_size: int, dtype: torch.dtype | None = None, undo_steps: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: use 1 or more sequences")
        self.model = with_dtype(model, dtype)
        self.batch_size = batch_size
        # Allocate windows at full size, so that nothing grows. Not in inference mode: such a state could not be modified
        # outside it.
        with torch.inference_mode(False):
            self.state: ModelState = self.model.initial_state(batch_size, window(self.model))
        if undo_steps:
            self.state = self.model.keep_undo(self.state, undo_steps)

    def load(self, state: ModelState, rows: Tensor | list[int] | None = None) -> None:
        """Copy `state` in; earlier steps can no longer be rolled back.

        Args:
            state: of B sequences, or of `len(rows)` sequences.
            rows: sequence i of `state` goes to row `rows[i]`; other rows are unchanged. None copies all rows in order.

        Raises:
            ValueError: `state` has the wrong number of sequences, or is not of this model.
        """
        self.state.load(state, rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens int64 `[B]` to logits `[B, V]`, which the next step may overwrite."""
        logits, _ = self.model.step(tokens, self.state)
        return logits


class LoopSteps(Steps):
    """A step in compiled loops, by a `LoopDecodingModel`, which has its own copies of some weights. Raises ValueError for a
    model that has none."""

    def __init__(self, model: LanguageModel, batch_size: int, dtype: torch.dtype | None = None, undo_steps: int = 0) -> None:
        super().__init__(model, batch_size, dtype, undo_steps)
        self._loops = loop_decoding.LoopDecodingModel(self.model)

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens int64 `[B]` to logits `[B, V]`."""
        logits, _ = self._loops.step(tokens, self.state)
        return logits


class StepGraph(Steps):
    """A step captured once as a CUDA graph and replayed for each token.

    The capture fixes the batch size and all addresses: `state` keeps its tensors, `load` copies into them, and all steps
    return the same logits tensor. It captures a `DecodingModel`, which has its own copies of some weights, if the model has
    one and autocast is off. Otherwise it captures `LanguageModel.step`, under the caller's autocast: results are bitwise those
    of `Steps`, and in-place changes of weights take effect.

    Args:
        model, batch_size, dtype, undo_steps: as of `Steps`.
        fused: False never uses a `DecodingModel`.

    Attributes:
        fused: whether it uses one.

    Raises:
        ValueError: the model is not on a GPU, its state grows, or something intercepts calls of its modules, such as an
            adapter or a hook, which a graph would not replay.
    """

    captured = True

    def __init__(
        self, model: LanguageModel, batch_size: int, dtype: torch.dtype | None = None, undo_steps: int = 0, fused: bool = True
    ) -> None:
        super().__init__(model, batch_size, dtype, undo_steps)
        device = self.state.device
        if grows(self.model):
            raise ValueError("model: its attention state grows, but a CUDA graph needs a state of constant size; use Steps")
        if (reason := why_any_called(self.model)) is not None:
            raise ValueError(f"model: {reason}, which a CUDA graph would skip; use Steps, which calls it")
        if device.type != "cuda":
            raise ValueError(f"model: is on {device}, but a CUDA graph needs a GPU; use Steps, which runs anywhere")
        with torch.inference_mode(False):
            self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # Disable autocast's cache of cast weights: a graph would keep reading cached copies.
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        self.fused = fused and not torch.is_autocast_enabled("cuda") and why_unsupported(self.model) is None
        # Keep a reference: the graph reads the weights copied by the DecodingModel.
        self._step = step = DecodingModel(self.model).step if self.fused else self.model.step
        stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.no_grad(), autocast:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step(self.tokens, self.state)
            torch.cuda.current_stream().wait_stream(stream)
            # Restricted to this thread: others, such as one that prefetches batches, may keep allocating.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.logits, _ = step(self.tokens, self.state)
            for tensor in self.state.tensors():
                tensor.zero_()
        self.state.forget_steps()

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens int64 `[B]` to logits `[B, V]`: one tensor, which the next step overwrites."""
        if tokens.shape != self.tokens.shape:  # copy_ would broadcast one token to all sequences
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, takes {tuple(self.tokens.shape)}, one per sequence")
        self.tokens.copy_(tokens)
        self._graph.replay()
        self.state.step_done(replayed=True)
        return self.logits
