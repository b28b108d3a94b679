"""Every choice of a run as frozen, typed dataclasses. Standard library only, so that reading a configuration costs nothing.

A run is one `RunConfig`: the model, the data, the optimizer, the training loop. `presets.py` holds named ones; the command
line overrides any field by its flag (`--model.top-k 8`). Each class checks itself when it is made and raises `ConfigError`
naming the field, its value and what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Mixer = Literal["memory", "attention", "mamba2"]
Backend = Literal["auto", "reference", "chunked", "triton", "triton-dense", "triton-sparse"]


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the field, its value and the remedy."""


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r}: {remedy}")


def _require_finite(config: Any, section: str) -> None:
    """Infinities pass the comparisons that bound a field on one side, and NaN those that are written the other way."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
        _require(finite, f"{section}.{f.name}", value, "use a finite number")


@dataclass(frozen=True)
class AttentionConfig:
    """Causal self-attention with rotary positions, as Llama has it, in the blocks that `ModelConfig.mixers` gives it."""

    num_heads: int = 0
    """Query heads; 0 takes heads of width 64 (one head if hidden_size is not a multiple)."""
    num_key_value_heads: int = 0
    """Key and value heads, each shared by as many query heads; 0 takes num_heads."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    sliding_window: int | None = None
    """Tokens that each token attends to, itself included; None: all before it."""

    def __post_init__(self) -> None:
        _require_finite(self, "model.attention")
        for name in ("num_heads", "num_key_value_heads"):
            _require(getattr(self, name) >= 0, f"model.attention.{name}", getattr(self, name), "use 0 (automatic) or more")
        _require(self.rope_theta > 0, "model.attention.rope_theta", self.rope_theta, "use a positive number")
        window = self.sliding_window
        _require(window is None or window >= 1, "model.attention.sliding_window", window, "use 1 or more tokens, or none")


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 (arXiv 2405.21060), in the blocks that `ModelConfig.mixers` gives it."""

    state_size: int = 128
    """N: width of the state of each value."""
    head_size: int = 64
    """P: values of one head."""
    expand: float = 2.0
    """Inner width, all heads' values, over hidden_size."""
    num_groups: int = 1
    """Groups of heads, each of which has its own input and output maps (B and C)."""
    conv_size: int = 4
    """Taps of the causal convolution."""
    chunk_size: int = 64
    """Tokens that the parallel form takes at once; a matter of speed alone."""

    def __post_init__(self) -> None:
        _require_finite(self, "model.mamba2")
        for name in ("state_size", "head_size", "num_groups", "conv_size", "chunk_size"):
            _require(getattr(self, name) >= 1, f"model.mamba2.{name}", getattr(self, name), "use 1 or more")
        _require(self.expand > 0, "model.mamba2.expand", self.expand, "use a positive ratio")


@dataclass(frozen=True)
class ModelConfig:
    """A language model. Fields that the paper leaves open are marked "silent"; docs/method.md says how each
    was settled."""

    vocab_size: int = 0
    """Number of token ids; 0 takes the tokenizer's when a run starts."""
    hidden_size: int = 256
    """Width d of the residual stream."""
    num_layers: int = 4
    """Number of blocks, each a layer that mixes tokens (see `mixers`) and, unless told otherwise, a feed-forward layer."""
    intermediate_size: int = 0
    """Width of the SwiGLU feed-forward; 0 takes 8/3 of hidden_size, rounded up to a multiple of 32."""
    feed_forward: bool = True
    """Whether blocks have a feed-forward layer behind the mixer; Mamba-2's own layout has none, and twice the blocks."""
    mixers: tuple[Mixer, ...] = ("memory",)
    """What mixes tokens in each block, from the first on, repeated over the depth: three memory layers to one of attention are
    ("memory", "memory", "memory", "attention")."""
    tie_word_embeddings: bool = True
    """Whether the output head shares the embedding's weights."""
    embedding_multiplier: float = 1.0
    """Multiplies the embeddings where they enter the blocks, not in a tied output head. They start at a standard deviation of
    0.02, what blocks add to them near 1: a multiplier of 50 makes both of one size."""
    norm_eps: float = 1e-6
    """Added to the mean square under every RMSNorm's root."""
    dropout: float = 0.0
    """Share of the numbers that enter the blocks, and of those that each layer adds to them, that training sets to zero."""

    num_states: int = 64
    """M: memory states of each head."""
    top_k: int | None = None
    """K: states each token updates and reads; None is the dense form (all M)."""
    merge_top_k: int | None = None
    """States that each token reads, those of its query's largest affinities, where they are to be others than the top_k that it
    updates (a departure; needs top_k, and a query that is not shared); None reads those."""
    affinity_threshold: float | None = None
    """Keep the states whose affinity reaches this value (and always the largest) instead of a fixed number; not with top_k."""
    num_heads: int = 1
    """H: independent memories side by side, each with its own affinities over M states; the paper has 1."""
    expand: float = 2.0
    """D / d: total width of the memory's values over hidden_size (silent)."""
    temperature: float = 1.0
    """Divides the affinity logits before the softmax (silent)."""
    affinity_init: float = 1.0
    """Standard deviation of the affinity logits at initialisation: how sharp routing starts (silent)."""
    affinity: Literal["softmax", "none"] = "softmax"
    """Whether affinities share each token out among the states, or every state is updated at its own rate alone, as in gated
    linear attention (a departure from the paper; needs rates="state", dense)."""
    query: Literal["shared", "separate", "linear"] = "shared"
    """What merge weights are made of: the affinities of the update (the paper); affinities of their own over the selected
    states, which start as a copy of those (a departure); or a linear map of either sign, without rates (another)."""
    rates: Literal["head", "state"] = "state"
    """Whether the update and merge rates are one number a head or one a state (the paper allows both)."""
    update_rate_init: tuple[float, float] = (0.05, 0.95)
    """Update rates at initialisation, spread evenly in logit from the first state to the last: the spread of time scales."""
    norm: Literal["merged", "head", "state", "none"] = "merged"
    """What is RMS-normalised before the output projection: the merged vector of all heads, each head's merged vector, each
    memory state before it is merged, or nothing (silent)."""
    conv_size: int = 0
    """Taps of a causal depthwise convolution, followed by SiLU; 0 for none (an addition to the paper)."""
    conv_input: Literal["value", "layer", "both"] = "value"
    """What the convolution takes: the values; the layer's input, to which it is added, so that routing sees it too; or both,
    the layer's input for routing alone."""
    output_gate: bool = False
    """Whether a SiLU gate computed from the input multiplies the merged vector (an addition to the paper)."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """The attention layers, if `mixers` has any."""
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    """The Mamba-2 layers, if `mixers` has any."""
    backend: Backend = "auto"
    """Backend of the recurrence: the fastest that runs here, the plain loop, parallel over time in PyTorch, or GPU kernels."""

    def __post_init__(self) -> None:
        _require_finite(self, "model")
        backends = typing.get_args(Backend)
        _require(self.backend in backends, "model.backend", self.backend, f"use one of {', '.join(map(repr, backends))}")
        _require(self.vocab_size >= 0, "model.vocab_size", self.vocab_size, "use 0 (the tokenizer's size) or more")
        for name in ("hidden_size", "num_layers", "num_states", "num_heads"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "use 1 or more")
        _require(self.intermediate_size >= 0, "model.intermediate_size", self.intermediate_size, "use 0 (automatic) or more")
        _require(self.expand > 0, "model.expand", self.expand, "use a positive ratio")
        width = self.expand * self.hidden_size
        _require(
            float(width).is_integer() and int(width) % self.num_heads == 0,
            "model.num_heads",
            self.num_heads,
            f"must divide the value width expand * hidden_size = {width:g}",
        )
        if self.top_k is not None:
            _require(
                1 <= self.top_k <= self.num_states,
                "model.top_k",
                self.top_k,
                f"use 1 to num_states={self.num_states}, or none for the dense form",
            )
        if self.merge_top_k is not None:
            _require(self.top_k is not None, "model.merge_top_k", self.merge_top_k, "use it with top_k; or unset it")
            _require(self.query != "shared", "model.merge_top_k", self.merge_top_k, "use it with query='separate' or 'linear'")
            _require(
                1 <= self.merge_top_k <= self.num_states, "model.merge_top_k", self.merge_top_k,
                f"use 1 to num_states={self.num_states}, or none to read the states that are updated",
            )  # fmt: skip
        if self.affinity_threshold is not None:
            _require(
                self.top_k is None, "model.affinity_threshold", self.affinity_threshold, "not together with top_k; unset one"
            )
            _require(
                0.0 <= self.affinity_threshold <= 1.0,
                "model.affinity_threshold",
                self.affinity_threshold,
                "affinities lie between 0 and 1; use a value in that range",
            )
        _require(self.affinity in ("softmax", "none"), "model.affinity", self.affinity, "use softmax or none")
        _require(self.query in ("shared", "separate", "linear"), "model.query", self.query, "use shared, separate or linear")
        if self.affinity == "none":
            _require(self.rates == "state", "model.rates", self.rates, "use state, which affinity='none' needs")
            for name in ("top_k", "affinity_threshold"):
                _require(
                    getattr(self, name) is None, f"model.{name}", getattr(self, name), "not with affinity='none'; unset one"
                )
            _require(self.query != "separate", "model.query", self.query, "use shared or linear with affinity='none'")
        _require(self.temperature > 0, "model.temperature", self.temperature, "use a positive number")
        _require(self.affinity_init > 0, "model.affinity_init", self.affinity_init, "use a positive number")
        low, high = self.update_rate_init
        _require(0 < low <= high < 1, "model.update_rate_init", self.update_rate_init, "use 0 < first <= last < 1")
        _require(self.conv_size >= 0, "model.conv_size", self.conv_size, "use 0 (none) or a number of taps")
        _require(self.conv_input in ("value", "layer", "both"), "model.conv_input", self.conv_input, "use value, layer or both")
        _require(
            self.embedding_multiplier > 0, "model.embedding_multiplier", self.embedding_multiplier, "use a positive number"
        )
        _require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "use a small positive number")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "use 0 (none) or a share below 1")
        known = typing.get_args(Mixer)
        _require(
            len(self.mixers) > 0 and all(mixer in known for mixer in self.mixers),
            "model.mixers",
            self.mixers,
            f"use one or more of {', '.join(map(repr, known))}",
        )
        if "attention" in self.layer_mixers:
            heads, shared = self.attention_heads
            _require(
                self.hidden_size % heads == 0 and (self.hidden_size // heads) % 2 == 0,
                "model.attention.num_heads",
                heads,
                f"must divide hidden_size={self.hidden_size} into heads of even width",
            )
            _require(heads % shared == 0, "model.attention.num_key_value_heads", shared, f"must divide num_heads={heads}")
        if "mamba2" in self.layer_mixers:
            inner = self.mamba2.expand * self.hidden_size
            _require(
                float(inner).is_integer() and int(inner) % self.mamba2.head_size == 0,
                "model.mamba2.head_size",
                self.mamba2.head_size,
                f"must divide the inner width expand * hidden_size = {inner:g}",
            )
            heads = int(inner) // self.mamba2.head_size
            _require(
                heads % self.mamba2.num_groups == 0,
                "model.mamba2.num_groups",
                self.mamba2.num_groups,
                f"must divide {heads} heads",
            )

    @property
    def layer_mixers(self) -> tuple[Mixer, ...]:
        """The mixer of each block."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.num_layers))

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Query heads, and key and value heads, of an attention layer, the automatic choices resolved."""
        automatic = self.hidden_size // 64 if self.hidden_size % 64 == 0 else 1
        heads = self.attention.num_heads or automatic
        return heads, self.attention.num_key_value_heads or heads

    @property
    def value_size(self) -> int:
        """D: total width of the values over all heads."""
        return int(self.expand * self.hidden_size)

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layer, the automatic choice resolved."""
        return self.intermediate_size or 32 * -(-8 * self.hidden_size // (3 * 32))


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from and how they are cut."""

    corpus: str = ""
    """Folder of a packed corpus, as `fmem data pack` writes it."""
    context_length: int = 512
    """Tokens of one training sequence."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each of the corpus's sources in a batch, by name; empty takes shares in proportion to their tokens."""
    document_boundary: Literal["reset", "continue"] = "reset"
    """Whether the memory starts anew where a new document begins inside a sequence, or goes on."""
    read_ahead: int = 4
    """Batches prepared ahead of the training step by a thread; 0 reads in the step itself."""

    def __post_init__(self) -> None:
        _require_finite(self, "data")
        _require(self.context_length >= 1, "data.context_length", self.context_length, "use 1 or more tokens")
        _require(self.read_ahead >= 0, "data.read_ahead", self.read_ahead, "use 0 or more batches")
        for name, weight in self.weights.items():
            _require(weight >= 0, f"data.weights.{name}", weight, "use 0 or more")
        _require(
            not self.weights or sum(self.weights.values()) > 0, "data.weights", self.weights, "at least one must be positive"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and gradient clipping."""

    learning_rate: float = 2e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled weight decay of the weight matrices; norms, biases and embeddings have none."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine to the final ratio; warm-up-stable-decay (linear decay at the end); or constant."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly to its peak."""
    decay_fraction: float = 0.2
    """Share of all steps that the wsd schedule decays over."""
    final_ratio: float = 0.1
    """Learning rate at the last step over the peak."""
    clip_norm: float = 1.0
    """Gradients whose global norm passes this are scaled down to it; 0 clips nothing."""

    def __post_init__(self) -> None:
        _require_finite(self, "optimizer")
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "use a positive number")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "use 0 <= beta < 1")
        _require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "use a positive number")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "use 0 or more")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "use 0 or more")
        _require(0 < self.decay_fraction <= 1, "optimizer.decay_fraction", self.decay_fraction, "use 0 < fraction <= 1")
        _require(0 <= self.final_ratio <= 1, "optimizer.final_ratio", self.final_ratio, "use 0 to 1")
        _require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "use 0 (no clipping) or more")


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop on one device."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    tokens_per_step: int = 8192
    """Tokens of one optimizer step, over all gradient accumulation."""
    micro_batch_size: int = 0
    """Sequences of one forward and backward; 0 takes the whole step at once."""
    carry_state: bool = False
    """Truncated backpropagation: each row of the batch reads on where it stopped, from the detached memory of the last step."""
    seed: int = 0
    """Seeds weights and batch order."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N"."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of matrix products: bfloat16 is autocast over float32 weights; "auto" takes it on a GPU, float32 on a CPU."""
    compile: bool = False
    """Compile the loss with torch.compile: on a GPU training gets faster after a minute or so. Steps whose rows hold a
    document's border run uncompiled (see data.document_boundary)."""
    activation_memory_budget: float = 1.0
    """With compile: share of the bytes kept for the backward pass; below 1 the rest is computed again, for less memory."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 250
    """Steps between evaluations on held-out text; 0 evaluates only at the end."""
    evaluation_tokens: int = 65536
    """Held-out tokens of each source that an evaluation during training reads."""
    sample_every: int = 0
    """Steps between generated samples; 0 for none."""
    sample_prompts: tuple[str, ...] = ("It was ", "それは")
    """Prompts of those samples."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0 writes only the last."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the best one."""

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "log_every", "evaluation_tokens", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "use 1 or more")
        for name in ("micro_batch_size", "evaluate_every", "sample_every", "checkpoint_every"):
            _require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "use 0 or more")
        _require(
            not (self.compile and self.carry_state),
            "training.compile",
            self.compile,
            "not together with carry_state; unset one",
        )
        budget = self.activation_memory_budget
        _require(
            0 <= budget <= 1 and (self.compile or budget == 1),
            "training.activation_memory_budget",
            budget,
            "use a share from 0 to 1, and below 1 only with compile",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete."""

    name: str = "run"
    """Name of the preset that the run started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _require(
            self.training.tokens_per_step % self.data.context_length == 0,
            "training.tokens_per_step",
            self.training.tokens_per_step,
            f"must be a multiple of data.context_length={self.data.context_length}",
        )
        grows = "attention" in self.model.layer_mixers and self.model.attention.sliding_window is None
        _require(
            not (self.training.carry_state and grows),
            "training.carry_state",
            self.training.carry_state,
            "attention keeps all it has read, without end; set model.attention.sliding_window, or carry no state",
        )
        sequences = self.sequences_per_step
        micro = self.training.micro_batch_size
        _require(
            micro == 0 or sequences % micro == 0,
            "training.micro_batch_size",
            micro,
            f"must divide the {sequences} sequences of a step (tokens_per_step / context_length)",
        )

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step."""
        return self.training.tokens_per_step // self.data.context_length

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward and backward, the automatic choice resolved."""
        return self.training.micro_batch_size or self.sequences_per_step


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """The configuration of class `cls` that `to_dict` (through JSON or not) came from.

    Raises `ConfigError` for an unknown field (naming the nearest valid one) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path.rstrip('.') or 'configuration'}={values!r}: expected an object of fields")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}{name}: no such field{suggestion(name, known)}")
        arguments[name] = _from_plain(hints[name], value, f"{path}{name}")
    return cls(**arguments)


def suggestion(name: str, known: typing.Iterable[str]) -> str:
    """`"; did you mean ...?"` with the valid name nearest to `name`, or the list of them."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(sorted(known))}"


def _from_plain(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, f"{path}.")
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _from_plain(next(o for o in options if o is not type(None)), value, path)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigError(f"{path}={value!r}: use one of {', '.join(map(repr, allowed))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r}: expected a list")
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise ConfigError(f"{path}={value!r}: expected {len(kinds)} values")
        return tuple(_from_plain(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={value!r}: expected an object")
        return {name: _from_plain(typing.get_args(hint)[1], item, f"{path}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path}: a number of {len(str(value))} digits; expected float") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r}: expected {hint.__name__}")
    return value
