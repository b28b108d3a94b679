"""Tokens per second, MFU and memory of whole training steps: our model beside `transformers`' Llama and Mamba-2 of equal
parameters.

A step is forward, loss, backward and AdamW on random tokens, with the same optimizer for all. MFU is the FLOPs of the model
by `floor.training_flops` times tokens per second, over the device's peak; it is given for our model alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from factorization_memory.benchmarks.floor import measure_rates, peak_teraflops, training_flops
from factorization_memory.benchmarks.interruption import Interruption
from factorization_memory.benchmarks.settings import TrainingBenchmark
from factorization_memory.benchmarks.timing import (
    interleaved_seconds,
    machine,
    on_device,
    paired_ratio,
    peak_bytes,
    release,
    summary,
    tensor_bytes,
)
from factorization_memory.models import LanguageModel
from factorization_memory.models.compilation import compiled_loss
from factorization_memory.models.counting import count

Loss = Callable[[Tensor], Tensor]
"""Tokens `[B, T]` to the mean loss of predicting each from those before it."""
OURS = "factorization-memory"
MAMBA2_HEAD = 64
"""Width of Mamba-2's heads."""


def run(
    benchmark: TrainingBenchmark, device: torch.device, progress: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """All measurements.

    Args:
        benchmark: what to measure.
        device: where.
        progress: called with what comes next, for people.

    Returns:
        `machine`; `dtype`; `compiled`; `activation_memory_budget`; `flops_per_token` of our model's training (with attention at
        the largest length); `peak`, what MFU is relative to, as `tflops` and its `source`; `missing`, why peers were left out,
        or None; and `records`, one per length and model:
        `model`, `parameters`, `batch`, `length`, `seconds` of a step (median, min, max), `tokens_per_second` (of the median),
        `mfu` (None for peers), `held_bytes` of weights and optimizer state, `peak_bytes` of a step beyond those (gradients
        included; None for a compiled step on a CPU), `total_bytes` of both together, `error` (None, or why a peer has no
        figures), and for peers `ours_over_this`, the ratio of our tokens per second to the peer's (the median of the rounds'
        ratios); `interrupted`, the name of the signal that ended the measuring early, or None.

    Raises:
        RuntimeError: a step of our model fails.
    """
    with on_device(device):
        return _run(benchmark, device, progress)


def _run(benchmark: TrainingBenchmark, device: torch.device, progress: Callable[[str], None]) -> dict[str, Any]:
    models: dict[str, tuple[nn.Module, Loss]] = {}
    missing = list(_unfit(benchmark).values())
    peak = _peak(benchmark, device, progress)
    flops = {length: training_flops(count(benchmark.model, length)) for length in benchmark.lengths}
    torch.manual_seed(0)
    ours = LanguageModel(benchmark.model).to(device)
    models[OURS] = ours, partial(_our_loss, ours)
    if benchmark.peers:
        progress("building the peers")
        try:
            models |= _peers(benchmark, device, _parameters(ours))
        except ImportError as error:
            missing = [f"no peers: {error}; pip install transformers"]
    steps = {name: _Step(model, _compiled(benchmark, name, loss), benchmark.bfloat16) for name, (model, loss) in models.items()}
    records: list[dict[str, Any]] = []
    with Interruption() as interruption:
        for length in benchmark.lengths:
            interruption.check()
            release(device)
            tokens = torch.randint(0, benchmark.model.vocab_size, (benchmark.batch, length), device=device)
            progress(f"T={length}: {', '.join(steps)}")
            failures: dict[str, str] = {}
            calls = {name: partial(step, tokens) for name, step in steps.items()}
            seconds = interleaved_seconds(calls, benchmark.repeats, device, failures=failures)
            if OURS in failures:
                remedy = "; try without compile" if benchmark.compile else ""
                raise RuntimeError(f"a step of our model at T={length} failed: {failures[OURS]}{remedy}")
            for name, step in steps.items():
                record: dict[str, Any] = {
                    "model": name,
                    "parameters": _parameters(step.model),
                    "batch": benchmark.batch,
                    "length": length,
                }
                names = ("error", "seconds", "tokens_per_second", "mfu", "held_bytes", "peak_bytes", "total_bytes")
                record |= dict.fromkeys(names)
                if name in failures:
                    record["error"] = failures[name]
                else:
                    spread = summary(seconds[name])
                    speed = tokens.numel() / spread["median"]
                    record |= {"seconds": spread, "tokens_per_second": speed, "held_bytes": step.held_bytes()}
                    # On a CPU bytes are counted where a compiler lets nobody look.
                    if device.type == "cuda" or not benchmark.compile:
                        record["peak_bytes"] = peak_bytes(calls[name], device)
                        record["total_bytes"] = record["held_bytes"] + record["peak_bytes"]
                    if name == OURS:
                        record["mfu"] = flops[length] * speed / (peak["tflops"] * 1e12)
                    else:
                        record["ours_over_this"] = paired_ratio(seconds[name], seconds[OURS])
                records.append(record)
    return {
        "machine": machine(device),
        "dtype": "bfloat16" if benchmark.bfloat16 else "float32",
        "compiled": benchmark.compile,
        "activation_memory_budget": benchmark.activation_memory_budget,
        "flops_per_token": max(flops.values()),
        "peak": peak,
        "missing": "; ".join(missing) or None,
        "interrupted": interruption.signal,
        "records": records,
    }


def _peak(benchmark: TrainingBenchmark, device: torch.device, progress: Callable[[str], None]) -> dict[str, Any]:
    if benchmark.peak_tflops:
        return {"tflops": benchmark.peak_tflops, "source": "given"}
    sheet = peak_teraflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if sheet is not None:
        return {"tflops": sheet, "source": "data sheet, dense bfloat16"}
    progress("measuring the speed of matrix products")
    rates = measure_rates(device)
    return {"tflops": rates.matmul_flops_per_second / 1e12, "source": f"measured, {rates.matmul}"}


def _compiled(benchmark: TrainingBenchmark, name: str, loss: Loss) -> Loss:
    if not benchmark.compile:
        return loss
    return compiled_loss(loss, name == OURS, benchmark.activation_memory_budget)


class _Step:
    """One training step of a model."""

    def __init__(self, model: nn.Module, loss: Loss, bfloat16: bool) -> None:
        self.model, self.loss, self.bfloat16 = model, loss, bfloat16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self, tokens: Tensor) -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Bytes of weights, buffers and optimizer state, which stand between steps."""
        state = [x for values in self.optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
        return tensor_bytes(*self.model.parameters(), *self.model.buffers(), *state)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _our_loss(model: LanguageModel, tokens: Tensor) -> Tensor:
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    loss, _ = model(tokens, targets, keep_state=False)
    return cast(Tensor, loss)


def _unfit(benchmark: TrainingBenchmark) -> dict[str, str]:
    """Why peers cannot have the model's width, by name."""
    whole = {"llama": 2 * benchmark.llama_heads, "mamba2": MAMBA2_HEAD // 2}
    return {
        name: f"no {name}: its heads need a hidden_size that is a multiple of {whole[name]}"
        for name in benchmark.peers
        if benchmark.model.hidden_size % whole[name]
    }


def _peers(benchmark: TrainingBenchmark, device: torch.device, parameters: int) -> dict[str, tuple[nn.Module, Loss]]:
    """The peers that fit, each with as many parameters as its one free size allows: Llama's feed-forward width, Mamba-2's state
    size.

    Raises ImportError without transformers.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # it remarks on missing fast paths, which the figures show anyway
    config = benchmark.model

    def llama(intermediate_size: int) -> nn.Module:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                intermediate_size=intermediate_size,
                num_attention_heads=benchmark.llama_heads,
                max_position_embeddings=max(benchmark.lengths),
                tie_word_embeddings=config.tie_word_embeddings,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )

    def mamba2(state_size: int) -> nn.Module:
        return transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=benchmark.mamba2_layers,
                state_size=state_size,
                expand=2,
                num_heads=2 * config.hidden_size // MAMBA2_HEAD,
                head_dim=MAMBA2_HEAD,
                n_groups=1,
                chunk_size=benchmark.mamba2_chunk,
                tie_word_embeddings=config.tie_word_embeddings,
                use_cache=False,
            )
        )

    builders: dict[str, Callable[[int], nn.Module]] = {"llama": llama, "mamba2": mamba2}
    peers: dict[str, tuple[nn.Module, Loss]] = {}
    unfit = _unfit(benchmark)
    for name in dict.fromkeys(benchmark.peers):
        if name in unfit:
            continue
        model = builders[name](_size_for(parameters, builders[name])).to(device).train()
        peers[name] = model, partial(_peer_loss, model)
    return peers


def _size_for(parameters: int, build: Callable[[int], nn.Module]) -> int:
    """The size whose model comes nearest to `parameters`, which grow linearly with it."""
    with torch.device("meta"):
        small, large = (_parameters(build(size)) for size in (16, 32))
    return max(8, 16 + round((parameters - small) / ((large - small) / 16)))


def _peer_loss(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss
