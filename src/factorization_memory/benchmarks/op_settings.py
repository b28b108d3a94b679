"""What the benchmark of the recurrence measures. The flags of `fmem bench op` are the fields of this dataclass."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields
from typing import Literal, get_args

from factorization_memory.benchmarks.settings import Shape
from factorization_memory.config import Backend, ConfigError, suggestion

OpPeer = Literal["gla", "attention", "ssd"]
OpDtype = Literal["float64", "float32", "bfloat16", "float16"]
SIZE_FIELDS = tuple(each.name for each in fields(Shape))


@dataclass(frozen=True)
class OpBenchmark:
    """What to measure of the recurrence alone: each backend and peer at each size, its time over length, its memory."""

    backends: tuple[str, ...] = ()
    """Backends to measure; by default triton and chunked on a GPU, chunked on a CPU. Ratios are to the first on a GPU, on a CPU
    to the reference."""
    peers: tuple[OpPeer, ...] = get_args(OpPeer)
    """Peers to compare with: fla's chunk_gla on the same maths, PyTorch's attention, Mamba-2's scan of equal width (all but
    attention on a GPU only, where installed); may be empty."""
    shapes: tuple[str, ...] = ()
    """Sizes to compare at, each BxTxHxMxD or BxTxHxMxDxK, such as 16x2048x1x64x2048; by default the one of the six options
    below. Lengths and memory are measured at the widths of the first."""
    batch: int = 4
    """Sequences."""
    length: int = 1024
    """Tokens of each sequence, where the backends are compared."""
    heads: int = 1
    """Heads."""
    num_states: int = 64
    """Memory states of each head."""
    value_size: int = 512
    """Value width of a head."""
    top_k: int | None = None
    """States each token selects; none is the dense form."""
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Lengths of one sequence for the time per token over length; may be empty."""
    length_tokens: int = 0
    """If positive, also measure those lengths in batches with this many tokens in total."""
    memory_length: int = 16384
    """Length of the sequence whose peak memory is measured; 0 for none."""
    dtype: OpDtype = "float32"
    """Dtype of values and output."""
    repeats: int = 5
    """Number of rounds; results are medians over them."""

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: use 1 or more")
        if any(length < 1 for length in self.lengths):
            raise ConfigError(f"lengths={self.lengths}: use lengths of 1 or more tokens")
        for name in ("memory_length", "length_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: use 0 (none) or more tokens")
        known = get_args(Backend)
        for backend in self.backends:
            if backend not in known:
                raise ConfigError(f"unknown backend {backend!r}{suggestion(backend, known)}")
        for peer in self.peers:
            if peer not in get_args(OpPeer):
                raise ConfigError(f"peers={peer!r}: use some of {', '.join(get_args(OpPeer))}")
        if self.dtype not in get_args(OpDtype):
            raise ConfigError(f"dtype={self.dtype!r}: use one of {', '.join(get_args(OpDtype))}")
        if self.shapes:
            for each in fields(self):
                value = getattr(self, each.name)
                if each.name in SIZE_FIELDS and value != each.default:
                    raise ConfigError(
                        f"{each.name}={value}: cannot be combined with shapes, which sets all sizes; drop one of them"
                    )
        for name in ("length", "heads", "num_states", "value_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: use 1 or more")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_states:
            raise ConfigError(f"top_k={self.top_k}: use 1 to num_states={self.num_states}")
        _ = self.sizes  # reads `shapes`

    @property
    def sizes(self) -> tuple[Shape, ...]:
        """Sizes at which all contenders are compared; lengths and memory are measured at the first one's widths."""
        given = tuple(Shape.parse(text) for text in self.shapes)
        return given or (Shape(*(getattr(self, name) for name in SIZE_FIELDS)),)

    def backends_on(self, device_type: str) -> tuple[str, ...]:
        """`backends` on a "cpu" or "cuda" device, each once. Where none are named, those worth measuring: the kernels and the
        plain PyTorch form on a GPU, the latter alone on a CPU."""
        kernels = device_type == "cuda" and importlib.util.find_spec("triton") is not None
        return tuple(dict.fromkeys(self.backends)) or (("triton", "chunked") if kernels else ("chunked",))
