"""A sweep: what it will cost, and where its runs stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from factorization_memory._text import clock, short
from factorization_memory.reports.terminal.tables import plain, table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_sweep_plan(plan: Mapping[str, Any], out: Console) -> None:
    """What `Sweep.plan` returned."""
    if plan["done"] == plan["runs"]:
        out.print(f"{plan['runs']:,} runs, all of them done")
        return
    done = f", {plan['done']:,} of them done" if plan["done"] else ""
    if plan["seconds"] is None:
        time = "time not known: run `fmem bench training` once on this machine"
    else:
        time = f"about {clock(plan['seconds'])} one at a time on this machine, evaluations aside"
    out.print(
        f"{plan['runs']:,} runs{done}; to do: {plan['tokens']:,} tokens, {short(plan['train_flops'])}FLOP, "
        f"{short(plan['disk_bytes'])}B of checkpoints; {time}",
        soft_wrap=True,
    )


def sweep_table(runs: Sequence[Mapping[str, Any]], seconds_left: float | None) -> Table:
    """A row for each run of `sweep_status`, how many are in which state, and the time that is left."""
    shown = table("", "run", "state", "step", "loss", "bits/byte", "tokens/s")
    for run in runs:
        shown.add_row(
            plain(run["title"]),
            run["state"],
            f"{run['step']:,}/{run['steps']:,}",
            *("" if run[name] is None else f"{run[name]:{form}}" for name, form in _FORMS.items()),
        )
        if run["message"]:
            shown.add_row(plain(f"  {run['message']}"))
    counts = Counter(run["state"] for run in runs)
    shown.caption = ", ".join(f"{count:,} {state}" for state, count in counts.items()) + (
        "" if seconds_left is None else f"; about {clock(seconds_left)} left"
    )
    shown.caption_justify = "left"
    return shown


_FORMS = {"loss": ".4f", "bits_per_byte": ".4f", "tokens_per_second": ",.0f"}
