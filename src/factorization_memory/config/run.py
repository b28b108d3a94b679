"""Options of a training run: data, optimizer, training loop, and with a model the complete run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from factorization_memory.config.checks import MOST_TOKENS, require, require_at_most, require_finite
from factorization_memory.config.model import ModelConfig
from factorization_memory.config.plain import require_types


@dataclass(frozen=True)
class DataConfig:
    """The source of batches and how they are formed."""

    corpus: str = ""
    """Folder of a packed corpus, as written by `fmem data pack`."""
    context_length: int = 512
    """Tokens of one training sequence."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each source of the corpus in a batch, by name; empty means in proportion to their tokens."""
    document_boundary: Literal["reset", "continue"] = "reset"
    """Whether the memory is reset or carried on where a new document begins inside a sequence."""
    read_ahead: int = 4
    """Batches that a background thread prepares ahead of the training step; 0 reads them in the step itself."""

    def __post_init__(self) -> None:
        require_types(self, "data")
        require_finite(self, "data")
        require(self.context_length >= 1, "data.context_length", self.context_length, "use 1 or more tokens")
        require_at_most(self, "data", MOST_TOKENS, "context_length")
        require(self.read_ahead >= 0, "data.read_ahead", self.read_ahead, "use 0 or more batches")
        for name, weight in self.weights.items():
            require(weight >= 0, f"data.weights.{name}", weight, "use 0 or more")
        require(not self.weights or sum(self.weights.values()) > 0, "data.weights", self.weights, "make at least one positive")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and gradient clipping."""

    learning_rate: float = 2e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled weight decay of the weight matrices, not of norms, biases and embeddings."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine to the final ratio; warm-up-stable-decay (linear decay at the end); or constant."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly to its peak."""
    decay_fraction: float = 0.2
    """Share of all steps that the wsd schedule decays over."""
    final_ratio: float = 0.1
    """Learning rate at the last step, relative to the peak."""
    clip_norm: float = 1.0
    """Global norm that gradients are clipped to; 0 disables clipping."""

    def __post_init__(self) -> None:
        require_types(self, "optimizer")
        require_finite(self, "optimizer")
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "use a positive number")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "use 0 <= beta < 1")
        require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "use a positive number")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "use 0 or more")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "use 0 or more")
        require(0 < self.decay_fraction <= 1, "optimizer.decay_fraction", self.decay_fraction, "use 0 < fraction <= 1")
        require(0 <= self.final_ratio <= 1, "optimizer.final_ratio", self.final_ratio, "use 0 to 1")
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "use 0 (no clipping) or more")


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop on one device."""

    steps: int = 1000
    """Optimizer steps of the whole run. A resumed run may have more than before; its schedule is then computed from the new
    number."""
    tokens_per_step: int = 8192
    """Tokens per optimizer step, over all accumulated micro-batches."""
    micro_batch_size: int = 0
    """Sequences per forward and backward pass; 0 means the whole step at once."""
    carry_state: bool = False
    """Truncated backpropagation: each row of the batch continues its text, from the detached memory of the last step."""
    seed: int = 0
    """Seeds weights and batch order."""
    init_from: str = ""
    """Model to start from instead of random weights (fine-tuning): the folder of a run, of a checkpoint or in Hugging Face's
    layout, or "builtin", the one that comes with the package. `fmem train` copies the fields of `model` from it; same as
    --init-from."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products: bfloat16 is autocast over float32 weights; "auto" means bfloat16 on a GPU, float32 on a
    CPU."""
    compile: bool = False
    """Compile the loss with torch.compile: on a GPU, training gets faster after about a minute. Steps with a document border
    inside a row run uncompiled (see data.document_boundary)."""
    activation_memory_budget: float = 1.0
    """With compile: share of the activation bytes saved for backward; below 1, the rest is recomputed to save memory."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 250
    """Steps between evaluations on held-out text; 0 evaluates only at the end."""
    evaluation_tokens: int = 65536
    """Held-out tokens of each source to read in an evaluation during training."""
    sample_every: int = 0
    """Steps between generated samples; 0 disables them."""
    sample_prompts: tuple[str, ...] = ("It was", "それは")
    """Prompts of the generated samples."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0 writes only the final one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept, in addition to the best one."""

    def __post_init__(self) -> None:
        require_types(self, "training")
        for name in ("steps", "tokens_per_step", "log_every", "evaluation_tokens", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "use 1 or more")
        for name in ("micro_batch_size", "evaluate_every", "sample_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "use 0 or more")
        require(-(1 << 63) <= self.seed < 1 << 64, "training.seed", self.seed, "use a 64-bit integer, -2**63 to 2**64 - 1")
        require(
            not (self.compile and self.carry_state),
            "training.compile",
            self.compile,
            "cannot be combined with carry_state; unset one of them",
        )
        budget = self.activation_memory_budget
        require(
            0 <= budget <= 1 and (self.compile or budget == 1),
            "training.activation_memory_budget",
            budget,
            "use a number from 0 to 1; below 1 requires compile",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete."""

    name: str = "run"
    """Name of the preset that the run is based on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        require(
            self.training.tokens_per_step % self.data.context_length == 0,
            "training.tokens_per_step",
            self.training.tokens_per_step,
            f"must be a multiple of data.context_length={self.data.context_length}",
        )
        require(
            not (self.training.carry_state and self.model.state_grows),
            "training.carry_state",
            self.training.carry_state,
            "attention without a window keeps everything it has read; set model.attention.sliding_window, or unset carry_state",
        )
        sequences = self.sequences_per_step
        micro = self.training.micro_batch_size
        require(
            micro == 0 or sequences % micro == 0,
            "training.micro_batch_size",
            micro,
            f"must divide the {sequences} sequences of a step (tokens_per_step / context_length)",
        )
        tokens = self.micro_batch_size * self.data.context_length
        require(
            tokens <= MOST_TOKENS,
            "training.micro_batch_size",
            micro,
            f"one forward pass would read {tokens:,} tokens; lower it so that it reads at most {MOST_TOKENS:,}",
        )

    @property
    def sequences_per_step(self) -> int:
        """Sequences per optimizer step."""
        return self.training.tokens_per_step // self.data.context_length

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward and backward pass, with the automatic choice resolved."""
        return self.training.micro_batch_size or self.sequences_per_step
