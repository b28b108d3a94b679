"""Named complete runs: functions that return a configuration. `PRESETS` lists them for the command line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from factorization_memory.config import (
    AttentionConfig,
    DataConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)


def demo() -> RunConfig:
    """1.1 M parameters outside the embedding, two minutes on two cores: one English and one Japanese book in a vocabulary of
    512."""
    return RunConfig(
        name="demo",
        model=ModelConfig(
            hidden_size=160, num_layers=3, num_states=64, top_k=8, update_lag=1, rates="head", conv_size=4, value_skip=True,
            output_gate=True, embedding_multiplier=10.0,
        ),
        data=DataConfig(context_length=256),
        optimizer=OptimizerConfig(
            learning_rate=6e-3, warmup_steps=40, weight_decay=1.0, schedule="wsd", decay_fraction=0.7, final_ratio=0.01
        ),
        training=TrainingConfig(
            steps=460, tokens_per_step=2048, log_every=10, evaluate_every=230, evaluation_tokens=16384, checkpoint_every=230,
        ),
    )  # fmt: skip


def books() -> RunConfig:
    """2.4 M parameters outside the embedding, half an hour of CPU or minutes of a GPU: for books, with a BPE vocabulary of
    16k."""
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
    """26.1 M parameters outside the embedding: the paper's equations in every layer, dense, with one head, no convolution, no
    gate; for one GPU."""
    return RunConfig(
        name="paper",
        model=ModelConfig(hidden_size=512, num_layers=8, num_states=64, embedding_multiplier=50.0),
        data=DataConfig(context_length=1024),
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=100),
        training=TrainingConfig(steps=2000, tokens_per_step=65536, evaluate_every=250, checkpoint_every=500),
    )


_PAPER = paper()
SIZES: dict[str, tuple[ModelConfig, DataConfig, OptimizerConfig, TrainingConfig]] = {
    "tiny": (
        replace(_PAPER.model, hidden_size=256, num_layers=6, top_k=16),
        _PAPER.data,
        _PAPER.optimizer,
        replace(_PAPER.training, steps=1000, checkpoint_every=250),
    ),
    "small": (replace(_PAPER.model, top_k=16), _PAPER.data, _PAPER.optimizer, _PAPER.training),
    "base": (
        replace(_PAPER.model, hidden_size=1024, num_layers=24, top_k=16),
        DataConfig(context_length=2048),
        OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
        TrainingConfig(steps=20000, tokens_per_step=262144, micro_batch_size=32, evaluate_every=1000, checkpoint_every=500),
    ),
}
"""Models whose forms and learning rates were compared at 10 million parameters (width 384, six blocks): 6e-3 served all there,
and 1.2e-2 the associative form a little better. No size has been trained as it stands; the base's learning rate is a guess."""
PARAMETERS = {"tiny": "5.1", "small": "26.1", "base": "308"}
"""Millions of parameters outside the embedding."""
FORMS = {
    "pure": "the paper's equations, nothing added",
    "best": "memory alone in the best form we trained: associative, with convolution of values, value_skip and gate",
}
FEED_FORWARD = {"tiny": 512, "small": 1008, "base": 2048}
"""Widths that make a size's forms equally large, to 0.5 %: what is added is taken from the feed-forward layers."""


def associative(model: ModelConfig) -> ModelConfig:
    """The best form that was trained, of a model's size: each token writes under the affinities of the one before."""
    return replace(
        model, update_lag=1, num_states=256, top_k=8, rates="head", conv_size=4, value_skip=True, output_gate=True
    )  # fmt: skip


def sized(size: str, form: str) -> RunConfig:
    """A model of one of `SIZES` in one of `FORMS`."""
    model, data, optimizer, training = SIZES[size]
    if form != "pure":
        model = replace(associative(model), intermediate_size=FEED_FORWARD[size])
    name = size if form == "best" else f"{size}_{form}"
    return RunConfig(name=name, model=model, data=data, optimizer=optimizer, training=training)


def _preset(size: str, form: str) -> Callable[[], RunConfig]:
    def make() -> RunConfig:
        return sized(size, form)

    make.__doc__ = f"{size.capitalize()} size, {PARAMETERS[size]} M parameters outside the embedding: {FORMS[form]}."
    return make


def paper_sparse() -> RunConfig:
    """26.1 M parameters outside the embedding: as `paper`, with a quarter of the states selected by each token; the same as
    small-pure."""
    return replace(sized("small", "pure"), name="paper_sparse")


def transformer() -> RunConfig:
    """25.3 M parameters outside the embedding: a baseline, a Llama-style Transformer of the size and data of `paper`."""
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
    """27.5 M parameters outside the embedding: a baseline, Mamba-2 in its own layout (no feed-forward, twice the blocks), of
    the size and data of `paper`."""
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


def gated_deltanet() -> RunConfig:
    """26.0 M parameters outside the embedding: a baseline, Gated DeltaNet with feed-forward layers, as its authors have it, of
    the size and data of `paper`."""
    config = paper()
    return RunConfig(
        name="gated_deltanet",
        model=ModelConfig(
            hidden_size=512, num_layers=8, intermediate_size=1088, mixers=("gated_deltanet",), embedding_multiplier=50.0,
            gated_deltanet=GatedDeltaNetConfig(num_heads=3, head_size=128, expand_v=2.0),
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
    **{size if form == "best" else f"{size}-{form}": _preset(size, form) for size, form in itertools.product(SIZES, FORMS)},
    "transformer": transformer,
    "mamba2": mamba2,
    "gated-deltanet": gated_deltanet,
}
