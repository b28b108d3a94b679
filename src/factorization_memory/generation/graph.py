"""One step of a whole model for a batch of fixed size: as it is anywhere, and on a GPU as a CUDA graph.

Launched one by one from Python, the hundreds of small kernels of a step keep a GPU waiting; a graph launches them at once.
Shapes: B sequences, V vocabulary size.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from factorization_memory.layers import MIXERS
from factorization_memory.layers.calling import why_any_called
from factorization_memory.models.decoding import DecodingModel, why_unsupported

if TYPE_CHECKING:
    from factorization_memory.models import LanguageModel, ModelState

WARM_UP = 2
"""Steps before the capture: kernels are compiled in the first, and nothing that is set up once is captured."""


def steps_for(model: LanguageModel, batch_size: int, dtype: torch.dtype | None = None, undo_steps: int = 0) -> Steps:
    """`StepGraph` on a GPU; `Steps` elsewhere, for a model whose state grows, and where something acts in the calls of its
    modules (adapters, hooks, offloading)."""
    graph = next(model.parameters()).is_cuda and not grows(model) and why_any_called(model) is None
    return (StepGraph if graph else Steps)(model, batch_size, dtype, undo_steps)


def grows(model: LanguageModel) -> bool:
    """Whether what the model carries grows with the text read."""
    return model.config.state_grows


def window(model: LanguageModel) -> int:
    """Tokens that the widest of its mixers with a window keeps; 0 without such a one."""
    return max(MIXERS[name].window(model.config) for name in model.config.layer_mixers)


def with_dtype(model: LanguageModel, dtype: torch.dtype | None) -> LanguageModel:
    """A copy of the model with weights of `dtype`, or the model itself if it has them (or for None). Memories stay float32
    (float64 with float64 weights)."""
    if dtype is None or all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).to(dtype)


def weights_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that a precision stands for: "float32", "bfloat16", or "auto", bfloat16 on a GPU and float32 on a CPU."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


class Steps:
    """One token after the other of `batch_size` sequences, each by a call of `LanguageModel.step`.

    Args:
        model: in evaluation mode.
        batch_size: B.
        dtype: of the weights; another than the model's makes a copy of it.
        undo_steps: the last steps that `state` can roll back (`ModelState.rollback`), without a copy.

    Attributes:
        model: the model that steps.
        batch_size: B.
        state: where the sequences stand, changed in place by every step; empty at first.
    """

    captured = False
    """Whether a new size costs a capture."""

    def __init__(self, model: LanguageModel, batch_size: int, dtype: torch.dtype | None = None, undo_steps: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: use 1 or more sequences")
        self.model = with_dtype(model, dtype)
        self.batch_size = batch_size
        # A window has its full size from the start, so that nothing grows. Under inference mode the state could not be changed
        # after that has ended.
        with torch.inference_mode(False):
            self.state: ModelState = self.model.initial_state(batch_size, window(self.model))
        if undo_steps:
            self.state = self.model.keep_undo(self.state, undo_steps)

    def load(self, state: ModelState, rows: Tensor | list[int] | None = None) -> None:
        """Copy `state` in; steps done before cannot be rolled back.

        Args:
            state: of B sequences, or of as many as there are `rows`.
            rows: its sequence i goes to row `rows[i]`, and the other rows stay as they are; None takes all in their order.

        Raises:
            ValueError: `state` is of another number of sequences, or not of this model.
        """
        self.state.load(state, rows)

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens int64 `[B]` to logits `[B, V]`, which the next step may overwrite."""
        logits, _ = self.model.step(tokens, self.state)
        return logits


class StepGraph(Steps):
    """A step captured once as a CUDA graph and replayed for each token.

    The capture fixes the size of the batch and where everything lies: `state` keeps its tensors, `load` copies into them, and
    all logits are one tensor. It holds a `DecodingModel`, which has its own copies of some weights, where there is one of the
    model and autocast is off; otherwise `LanguageModel.step`, with the bits of `Steps`, for which weights changed in place
    count, and with autocast if the caller has it on.

    Args:
        model, batch_size, dtype, undo_steps: as of `Steps`.
        fused: False never takes a `DecodingModel`.

    Attributes:
        fused: whether it took one.

    Raises:
        ValueError: the model is not on a GPU, its state grows, or something acts in the calls of its modules, such as an
            adapter or a hook, which a graph would not run again.
    """

    captured = True

    def __init__(
        self, model: LanguageModel, batch_size: int, dtype: torch.dtype | None = None, undo_steps: int = 0, fused: bool = True
    ) -> None:
        super().__init__(model, batch_size, dtype, undo_steps)
        device = self.state.device
        if grows(self.model):
            raise ValueError(
                "model: its attention keeps all it has read, and a CUDA graph takes a state of one size; use Steps"
            )
        if (reason := why_any_called(self.model)) is not None:
            raise ValueError(f"model: {reason}, which a CUDA graph would leave out; use Steps, which calls it")
        if device.type != "cuda":
            raise ValueError(f"model: is on {device}, a CUDA graph takes a GPU; use Steps, which runs anywhere")
        with torch.inference_mode(False):
            self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # Weights that autocast has cast are not to be kept from one block to the next: a graph would go on reading them.
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        self.fused = fused and not torch.is_autocast_enabled("cuda") and why_unsupported(self.model) is None
        # Kept: the graph reads the weights that a DecodingModel has copied.
        self._step = step = DecodingModel(self.model).step if self.fused else self.model.step
        stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.no_grad(), autocast:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step(self.tokens, self.state)
            torch.cuda.current_stream().wait_stream(stream)
            # Of this thread alone: others, such as one that reads batches ahead, may go on allocating.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.logits, _ = step(self.tokens, self.state)
            for tensor in self.state.tensors():
                tensor.zero_()
        self.state.forget_steps()

    def step(self, tokens: Tensor) -> Tensor:
        """Tokens int64 `[B]` to logits `[B, V]`: one tensor, which the next step overwrites."""
        if tokens.shape != self.tokens.shape:  # copying would repeat one token for all sequences
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, takes {tuple(self.tokens.shape)}, one of each sequence")
        self.tokens.copy_(tokens)
        self._graph.replay()
        self.state.step_done(replayed=True)
        return self.logits
