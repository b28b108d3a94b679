"""Named complete runs: functions that return a configuration. `PRESETS` lists them for the command line."""

from __future__ import annotations

from collections.abc import Callable

from factorization_memory.config import (
    AttentionConfig,
    DataConfig,
    Mamba2Config,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)


def demo() -> RunConfig:
    """Two minutes on two cores: one English and one Japanese book in a vocabulary of 512."""
    return RunConfig(
        name="demo",
        model=ModelConfig(
            hidden_size=160, num_layers=3, num_states=32, top_k=4, num_heads=4, conv_size=4, output_gate=True,
            embedding_multiplier=10.0,
        ),
        data=DataConfig(context_length=256),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, weight_decay=1.0, schedule="wsd", decay_fraction=0.3),
        training=TrainingConfig(
            steps=240, tokens_per_step=4096, log_every=5, evaluate_every=80, evaluation_tokens=16384, checkpoint_every=80,
        ),
    )  # fmt: skip


def books() -> RunConfig:
    """Five million parameters, half an hour of CPU or minutes of a GPU: for books, with a BPE vocabulary of 16k."""
    return RunConfig(
        name="books",
        model=ModelConfig(
            hidden_size=192, num_layers=4, num_states=32, top_k=4, num_heads=4, conv_size=4, output_gate=True,
            embedding_multiplier=10.0,
        ),
        data=DataConfig(context_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, schedule="wsd", decay_fraction=0.3),
        training=TrainingConfig(
            steps=500, tokens_per_step=4096, log_every=5, evaluate_every=100, evaluation_tokens=16384, checkpoint_every=50,
            sample_every=100,
        ),
    )  # fmt: skip


def paper() -> RunConfig:
    """The paper's equations in every layer, dense: one head, no convolution, no gate; for one GPU."""
    return RunConfig(
        name="paper",
        model=ModelConfig(hidden_size=512, num_layers=8, num_states=64, embedding_multiplier=50.0),
        data=DataConfig(context_length=1024),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        training=TrainingConfig(steps=2000, tokens_per_step=65536, evaluate_every=250, checkpoint_every=500),
    )


def paper_sparse() -> RunConfig:
    """As `paper`, with a quarter of the states selected by each token."""
    config = paper()
    return RunConfig(
        name="paper_sparse",
        model=ModelConfig(hidden_size=512, num_layers=8, num_states=64, top_k=16, embedding_multiplier=50.0),
        data=config.data,
        optimizer=config.optimizer,
        training=config.training,
    )


def transformer() -> RunConfig:
    """Baseline: a Llama-style Transformer of the size and data of `paper`."""
    config = paper()
    return RunConfig(
        name="transformer",
        model=ModelConfig(
            hidden_size=512,
            num_layers=8,
            mixers=("attention",),
            attention=AttentionConfig(num_heads=8),
            embedding_multiplier=50.0,
        ),
        data=config.data,
        optimizer=config.optimizer,
        training=config.training,
    )


def mamba2() -> RunConfig:
    """Baseline: Mamba-2 in its own layout (no feed-forward, twice the blocks), of the size and data of `paper`."""
    config = paper()
    return RunConfig(
        name="mamba2",
        model=ModelConfig(
            hidden_size=512, num_layers=16, mixers=("mamba2",), feed_forward=False,
            mamba2=Mamba2Config(state_size=128, head_size=64, expand=2.0), embedding_multiplier=50.0,
        ),
        data=config.data,
        optimizer=config.optimizer,
        training=config.training,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "books": books,
    "paper": paper,
    "paper-sparse": paper_sparse,
    "transformer": transformer,
    "mamba2": mamba2,
}
