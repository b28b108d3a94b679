"""Figures of `fmem bench op` from the times measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from factorization_memory.benchmarks.floor import PASSES
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.timing import paired_ratio, summary

REFERENCE = "reference"
"""The backend that is the baseline on a CPU."""
Records = list[dict[str, Any]]


def empty_record(contender: str, shape: Shape, peer: bool = False, note: str = "") -> dict[str, Any]:
    """A contender at a shape, with nothing measured yet."""
    who = {"contender": contender, "peer": peer, "note": note, "shape": str(shape)}
    return who | asdict(shape) | dict.fromkeys(("error", *PASSES, "extra_bytes", "extra_ratio"))


def timing_figures(
    seconds: dict[str, list[float]], name: str, baseline: str, shape: Shape, least: dict[str, Any] | None
) -> dict[str, Any]:
    """Time per token of contender `name`, its rates and distance to the floor `least`, and its ratio to the baseline."""
    spread = summary(seconds[name])
    figures: dict[str, Any] = {"seconds": spread, "ns_per_token": spread["median"] / shape.tokens * 1e9}
    figures |= dict.fromkeys(("gigabytes_per_second", "teraflops_per_second", "ratio_to_floor"))
    if least is not None:
        ns = figures["ns_per_token"]
        figures["gigabytes_per_second"] = least["bytes_per_token"] / ns
        figures["teraflops_per_second"] = least["flops_per_token"] / ns / 1000
        figures["ratio_to_floor"] = ns / least["ns_per_token"]
    base = seconds.get(baseline)
    if baseline == REFERENCE:
        figures["speedup"] = None if base is None else paired_ratio(base, seconds[name])
    else:
        figures["time_over_first"] = None if base is None else paired_ratio(seconds[name], base)
    return figures


def length_spread(lengths: Records) -> Records:
    """The slowest over the fastest time per token of each sweep and backend, by pass, and of graphs under `graph_` and that."""
    grouped: dict[tuple[str, str], Records] = {}
    for record in lengths:
        grouped.setdefault((record["sweep"], record["contender"]), []).append(record)
    result: Records = []
    for (sweep, contender), records in grouped.items():
        spread: dict[str, Any] = {"sweep": sweep, "contender": contender}
        for part in PASSES:
            figures = [record[part] for record in records if record[part] is not None]
            for prefix in ("", "graph_"):
                times = [figure[f"{prefix}ns_per_token"] for figure in figures]
                there = [time for time in times if time is not None]
                spread[prefix + part] = max(there) / min(there) if there else None
        result.append(spread)
    return result
