"""`fmem bench`: the speed and memory of the recurrence (`op`), of one decoding step of it (`step`), of whole training steps
(`training`) and of reading and writing with whole models (`inference`) on this machine.

Tables go to stderr as soon as their figures are available, the whole result to stdout as one JSON line at the end.
"""

from __future__ import annotations

import shlex
from typing import Annotated

import tyro

from factorization_memory.cli import bench_inference, bench_op, bench_step, bench_training
from factorization_memory.cli.bench_inference import Inference
from factorization_memory.cli.bench_op import Op
from factorization_memory.cli.bench_step import Step
from factorization_memory.cli.bench_training import Training
from factorization_memory.cli.common import parse
from factorization_memory.config import ConfigError

Bench = (
    Annotated[Op, tyro.conf.subcommand("op")]
    | Annotated[Training, tyro.conf.subcommand("training")]
    | Annotated[Inference, tyro.conf.subcommand("inference")]
    | Annotated[Step, tyro.conf.subcommand("step")]
)


def run(arguments: list[str]) -> int:
    """`fmem bench` with `arguments`; returns the exit status."""
    options: Op | Training | Inference | Step = parse(Bench, arguments, "bench")  # type: ignore[arg-type]
    if isinstance(options, Op):
        for name in ("batch", "repeats"):
            if getattr(options, name) < 1:
                raise ConfigError(f"{name}={getattr(options, name)}: use 1 or more")
        if any(length < 1 for length in options.lengths):
            raise ConfigError(f"lengths={options.lengths}: use lengths of 1 or more tokens")
    if options.threads < 0:
        raise ConfigError(f"threads={options.threads}: use 0 (PyTorch's number) or more")
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    command = shlex.join(["fmem", "bench", *arguments])
    if isinstance(options, Op):
        return bench_op.run(options, command)
    if isinstance(options, Training):
        return bench_training.run(options, command)
    return bench_inference.run(options, command) if isinstance(options, Inference) else bench_step.run(options, command)
