"""What the benchmarks measure. The flags of `fmem bench` are the fields of these dataclasses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from factorization_memory.config import ConfigError, ModelConfig

TrainingPeer = Literal["llama", "mamba2"]
InferencePeer = Literal["transformer", "mamba2", "gated-deltanet", "llama"]
Precision = Literal["auto", "float32", "bfloat16"]
StepDtype = Literal["auto", "float32", "bfloat16", "float16"]
KEY_SIZES = (128, 64, 32, *range(127, 0, -1))
"""Widths of Gated DeltaNet's key heads to choose from, in this order: its kernels pad what is no power of two."""


@dataclass(frozen=True)
class Shape:
    """The size of one call of the recurrence."""

    batch: int = 4
    """B: sequences."""
    length: int = 1024
    """T: tokens of each."""
    heads: int = 1
    """H."""
    num_states: int = 64
    """M: memory states of each head."""
    value_size: int = 512
    """D: value width of a head."""
    top_k: int | None = None
    """K: states each token selects; None is the dense form."""

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.batch * self.length

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A size written BxTxHxMxD, or BxTxHxMxDxK with K selected states, as `16x2048x1x64x2048`.

        Raises ConfigError if it is anything else, a number is not positive, or K is larger than M.
        """
        parts = text.split("x")
        if len(parts) not in (5, 6) or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"shapes={text!r}: write BxTxHxMxD (or BxTxHxMxDxK), positive whole numbers such as 16x2048x1x64x2048: "
                "sequences, tokens each, heads, memory states, value width per head (selected states)"
            )
        shape = cls(*map(int, parts))
        if shape.top_k is not None and shape.top_k > shape.num_states:
            raise ConfigError(f"shapes={text!r}: K={shape.top_k} exceeds M={shape.num_states}; use K <= M")
        return shape

    def __str__(self) -> str:
        """As `parse` reads it."""
        sizes = (self.batch, self.length, self.heads, self.num_states, self.value_size, self.top_k)
        return "x".join(str(size) for size in sizes if size is not None)


@dataclass(frozen=True)
class TrainingBenchmark:
    """What to measure of whole training steps: our model, and peers of the same vocabulary, width, embeddings and number of
    parameters."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4))
    """Our model, to compare."""
    batch: int = 8
    """Sequences per step."""
    lengths: tuple[int, ...] = (512, 4096)
    """Tokens of each sequence."""
    peers: tuple[TrainingPeer, ...] = get_args(TrainingPeer)
    """Peer models to compare with; may be empty."""
    llama_heads: int = 4
    """Number of Llama's attention heads."""
    mamba2_layers: int = 8
    """Number of Mamba-2's layers."""
    mamba2_chunk: int = 64
    """Chunk size of Mamba-2's scan; 64 is the fastest on a CPU."""
    bfloat16: bool = False
    """Autocast to bfloat16."""
    compile: bool = False
    """Compile the losses with torch.compile, ours as one graph."""
    activation_memory_budget: float = 1.0
    """With --compile: share of the activation bytes saved for backward, 0 to 1; the rest is recomputed."""
    peak_tflops: float = 0
    """Peak TFLOP/s of the device that MFU is relative to; 0 means the data sheet's for dense bfloat16 if the device is
    known (H100, H200, A100), otherwise the measured rate of a large matrix product."""
    repeats: int = 5
    """Number of rounds; results are medians over them."""

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: use 1 or more")
        if any(length < 1 for length in self.lengths):
            raise ConfigError(f"lengths={self.lengths}: use lengths of 1 or more tokens")
        if not self.lengths:
            raise ConfigError("lengths=(): use one length or more")
        if self.model.vocab_size < 1:
            raise ConfigError(f"model.vocab_size={self.model.vocab_size}: use 1 or more token ids")
        for peer in self.peers:
            if peer not in get_args(TrainingPeer):
                raise ConfigError(f"peers={peer!r}: use some of {', '.join(get_args(TrainingPeer))}")
        if self.llama_heads < 1:
            raise ConfigError(f"llama_heads={self.llama_heads}: use 1 or more")
        if not 0 <= self.peak_tflops < math.inf:
            raise ConfigError(f"peak_tflops={self.peak_tflops}: use a positive number of TFLOP/s, or 0 for the device's own")


@dataclass(frozen=True)
class InferenceBenchmark:
    """What to measure of reading and writing: each model at each number of sequences, after each number of tokens."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4))
    """Our model, to compare."""
    contexts: tuple[int, ...] = (1024, 16384, 131072, 1048576)
    """Tokens each sequence has read before it starts decoding."""
    batches: tuple[int, ...] = (1, 16)
    """Batch sizes: sequences decoded at once."""
    top_k: tuple[int, ...] = ()
    """States each token selects, one model for each number; 0 is the dense form; by default --model.top-k."""
    peers: tuple[InferencePeer, ...] = ()
    """Peers to compare with, of the same vocabulary and width and as many parameters: transformer, mamba2 and gated-deltanet,
    made of this package's layers, and llama, that of transformers if it is installed. transformer and llama keep a key-value
    cache."""
    transformer_heads: int = 0
    """Number of the Transformer's attention heads; 0 means heads of width 64, or one if 64 does not divide hidden_size."""
    mamba2_head_size: int = 64
    """Width of Mamba-2's heads, which together are twice as wide as the model."""
    mamba2_state_size: int = 128
    """Mamba-2's states per channel."""
    gated_deltanet_head_size: int = 0
    """Width of Gated DeltaNet's key heads, which together are 3/4 as wide as the model; value heads are twice as wide. 0 means
    the first of 128, 64 and 32 that divides this, or else the widest below 128."""
    llama_heads: int = 4
    """Number of Llama's attention heads."""
    precision: Precision = "auto"
    """Precision of weights and arithmetic: auto means bfloat16 on a GPU, float32 on a CPU. Memories are always float32."""
    prefill_chunk: int = 0
    """Tokens read in one forward pass, over all sequences; 0 means 16384 on a GPU, 1024 on a CPU."""
    prefill_seconds: float = 2.0
    """Seconds; a prompt that would take longer to read is not read, and its steps continue from random numbers as its state,
    which costs the same; 0 reads none."""
    decode_tokens: int = 128
    """Steps to time at each size, from Python and as generation runs them: as a CUDA graph on a GPU, in compiled loops on a
    CPU."""
    decode_seconds: float = 2.0
    """Seconds; fewer steps are timed if they would take longer than this."""
    repeats: int = 5
    """Number of rounds; results are medians over them."""

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {remedy}")

        require(
            bool(self.contexts) and min(self.contexts) >= 1, "contexts", "use one or more numbers of tokens, each 1 or more"
        )
        require(bool(self.batches) and min(self.batches) >= 1, "batches", "use one or more batch sizes, each 1 or more")
        states = self.model.num_states
        require(all(0 <= k <= states for k in self.top_k), "top_k", f"use 0 (dense) to model.num_states={states}")
        if self.top_k and self.model.top_k is not None:
            raise ConfigError(f"model.top_k={self.model.top_k}: cannot be combined with top_k={self.top_k}; drop one of them")
        require(
            all(peer in get_args(InferencePeer) for peer in self.peers),
            "peers",
            f"use some of {', '.join(get_args(InferencePeer))}",
        )
        for name in ("llama_heads", "mamba2_head_size", "mamba2_state_size", "decode_tokens", "repeats"):
            require(getattr(self, name) >= 1, name, "use 1 or more")
        for name in ("transformer_heads", "gated_deltanet_head_size"):
            require(getattr(self, name) >= 0, name, "use 0 (automatic) or more")
        self._check_heads(require)
        require(self.precision in get_args(Precision), "precision", f"use one of {', '.join(get_args(Precision))}")
        require(self.prefill_chunk >= 0, "prefill_chunk", "use 1 or more tokens, or 0 (automatic)")
        for name in ("prefill_seconds", "decode_seconds"):
            require(0 <= getattr(self, name) < math.inf, name, "use a number of seconds, 0 or more")
        if "attention" in self.model.layer_mixers:
            raise ConfigError(
                f"model.mixers={self.model.mixers}: takes only layers with constant state; use transformer as a peer"
            )
        if self.model.vocab_size < 1:
            raise ConfigError(f"model.vocab_size={self.model.vocab_size}: use 1 or more token ids")

    def _check_heads(self, require: Callable[[bool, str, str], None]) -> None:
        """That the heads of each requested peer fit the model's width."""
        size = self.model.hidden_size
        for peer, name in (("transformer", "transformer_heads"), ("llama", "llama_heads")):
            if peer in self.peers:
                fits = size % (2 * (getattr(self, name) or 1)) == 0
                require(fits, name, f"must divide model.hidden_size={size} into heads of even width")
        if "mamba2" in self.peers:
            require(
                2 * size % self.mamba2_head_size == 0,
                "mamba2_head_size",
                f"must divide {2 * size}, twice model.hidden_size={size}",
            )
        if "gated-deltanet" in self.peers:
            require(
                self.gated_deltanet_key_size > 0,
                "gated_deltanet_head_size",
                f"must divide {0.75 * size:g}, 3/4 of model.hidden_size={size}; use "
                + ("0 (automatic)" if size % 4 == 0 else "a hidden_size that is a multiple of 4"),
            )

    @property
    def gated_deltanet_key_size(self) -> int:
        """`gated_deltanet_head_size` with the automatic choice resolved; 0 if it does not divide 3/4 of the model's width."""
        sizes = (self.gated_deltanet_head_size,) if self.gated_deltanet_head_size else KEY_SIZES
        return next((size for size in sizes if 3 * self.model.hidden_size % (4 * size) == 0), 0)


@dataclass(frozen=True)
class StepBenchmark:
    """What to measure of decoding steps: each number of sequences with each number of memory states and of selected ones."""

    batches: tuple[int, ...] = (1, 64)
    """Batch sizes: sequences decoded at once."""
    num_states: tuple[int, ...] = (256, 1024)
    """Memory states of each head."""
    top_k: tuple[int, ...] = (0, 64, 16)
    """States each token selects; 0 is the dense form. Numbers above num_states are skipped."""
    value_size: int = 2048
    """Value width of a head."""
    heads: int = 1
    """Heads."""
    dtype: StepDtype = "auto"
    """Of values and output: auto takes bfloat16 on a GPU, float32 on a CPU. The memory is float32, and where the Triton kernel
    runs also bfloat16 with stochastic rounding."""
    rollbacks: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of steps to roll back at once, at each sparse size; may be empty."""
    repeats: int = 5
    """Number of rounds; results are medians over them."""

    def __post_init__(self) -> None:
        for name in ("batches", "num_states", "rollbacks"):
            numbers = getattr(self, name)
            if not all(number >= 1 for number in numbers) or (not numbers and name != "rollbacks"):
                raise ConfigError(f"{name}={numbers}: use one or more numbers, each 1 or more")
        if not self.top_k or not all(number >= 0 for number in self.top_k):
            raise ConfigError(f"top_k={self.top_k}: use one or more numbers, each 0 (dense) or more")
        if min(self.top_k) > max(self.num_states):
            raise ConfigError(f"top_k={self.top_k}: exceeds every num_states={self.num_states}; use fewer, or 0 (dense)")
        for name in ("value_size", "heads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: use 1 or more")
        if self.dtype not in get_args(StepDtype):
            raise ConfigError(f"dtype={self.dtype!r}: use one of {', '.join(get_args(StepDtype))}")

    def dtype_on(self, device_type: str) -> str:
        """`dtype` on a "cpu" or "cuda" device."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device_type == "cuda" else "float32"

    def shapes(self, batch: int, num_states: int) -> list[Shape]:
        """The sizes with `batch` sequences and `num_states` states, the dense one first."""
        chosen = sorted((k for k in dict.fromkeys(self.top_k) if k <= num_states), key=lambda k: -(k or num_states + 1))
        return [Shape(batch, 1, self.heads, num_states, self.value_size, k or None) for k in chosen]
