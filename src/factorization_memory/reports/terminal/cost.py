"""Size and cost of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from factorization_memory._text import clock, short

if TYPE_CHECKING:
    from rich.console import Console


def show_cost(result: dict[str, Any], out: Console) -> None:
    """What `run_cost` returned."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    vocabulary = f"vocabulary {result['vocab_size']:,}" + (" assumed" if result["vocabulary_assumed"] else "")
    parameters, flops, memory = result["parameters"], result["flops_per_token"], result["training_memory_bytes"]
    grows = result["state_bytes_per_token"]
    of_which = [f"recurrence forward {short(flops['of_which_recurrence'])}"] if flops["of_which_recurrence"] else []
    if flops["of_which_attention"]:
        of_which.append(f"attention forward, at the mean context of training, {short(flops['of_which_attention'])}")
    rows = {
        "preset": result["preset"],
        "parameters": f"{parameters['total']:,} ({parameters['embedding']:,} in embedding and head; {vocabulary})",
        "FLOPs per token": f"train {short(flops['train'])}, prefill {short(flops['prefill'])}, decode "
        f"{short(flops['decode'])}; {', '.join(of_which)}",
        "state": f"{short(result['state_bytes'])}B per sequence"
        + (f" and {short(grows)}B per token read" if grows else ", at any length"),
        "training memory": ", ".join(f"{name} {short(size)}B" for name, size in memory.items())
        + f" (estimate for {result['precision']}"
        + ("; on a GPU precision=auto takes bfloat16 activations)" if result["precision_assumed"] else ")"),
        "steps": f"{result['steps']:,} of {result['tokens_per_step']:,} tokens in {result['micro_batches']} micro-batch(es): "
        f"{short(result['tokens'])} tokens, {short(result['train_flops'])}FLOP",
    }
    if result["epochs"] is not None:
        of_each = ", ".join(f"{name} {times:.2f}" for name, times in result["epochs"]["sources"].items())
        rows["corpus"] = (
            f"{result['epochs']['training_tokens']:,} training tokens, read {result['epochs']['total']:.2f} times"
            + (f" ({of_each})" if of_each else "")
        )
    if result["time"] is not None:
        rows["time"] = (
            f"about {clock(result['time']['seconds'])} at the {short(result['time']['flops_per_second'])}FLOP/s of "
            f"`fmem bench training` on this machine ({result['time']['date']}), without evaluations"
        )
    else:
        rows["time"] = "unknown; run `fmem bench training` once on this machine"
    for name, text in rows.items():
        table.add_row(name, text)
    peak = max(result["learning_rate"].values())
    for i, (step, rate) in enumerate(result["learning_rate"].items()):
        table.add_row("learning rate" if i == 0 else "", f"{int(step):>8,}  {rate:.2e}  " + "█" * round(30 * rate / peak))
    out.print(table)
