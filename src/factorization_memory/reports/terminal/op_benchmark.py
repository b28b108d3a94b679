"""The figures of `fmem bench op`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factorization_memory.reports.terminal.machine import show_machine
from factorization_memory.reports.terminal.tables import number, table

if TYPE_CHECKING:
    from rich.console import Console


LABELS = {"forward": "fwd", "forward_backward": "fwd+bwd"}
"""Passes, as the tables name them."""
SIZE_FIELDS = ("batch", "length", "heads", "num_states", "value_size", "top_k")
"""Fields of a record that hold B, T, H, M, D and K."""


def show_op_part(section: str, records: list[dict[str, Any]], people: Console) -> None:
    """A part of the result as soon as it is there, as `run` of benchmarks/op.py hands it on."""
    show = {"checks": _show_checks, "comparison": _show_comparison, "lengths": _show_lengths, "memory": _show_memory}
    show[section](records, people)


def show_tuned(tuned: list[dict[str, Any]], people: Console) -> None:
    """The fastest tiles that `tune` of benchmarks/tuning.py found."""
    for record in tuned:
        of = f"{record['kernel']}, chunks of {record['chunk']}, {record['padded']} states"
        kept = "as shipped" if record["shipped"] else "another than ships"
        people.print(f"{of}: {record['tile']} ({kept})", soft_wrap=True)


def show_op_end(result: dict[str, Any], people: Console) -> None:
    """What the whole result says beside its parts: the machine, how even the lengths are, and notes on the peers."""
    show_machine(result, people)
    for spread in result["length_spread"]:
        labels = LABELS | {f"graph_{part}": f"{label} graph" for part, label in LABELS.items()}
        ratios = ", ".join(f"{label} {number(spread[part], 'x')}" for part, label in labels.items() if spread[part])
        people.print(f"{spread['contender']}, {spread['sweep']}: slowest over fastest length {ratios}", soft_wrap=True)
    for name, why in result["missing"].items():
        people.print(f"without {name}: {why}", soft_wrap=True)
    for record in result["same_maths"]:
        error = record["reason"] or f"relative error {record['error']:.1e}"
        text = f"{record['peer']} at {record['shape']} against the float64 reference: {error}"
        if not record["passed"]:
            tolerance = f"{record['tolerance']:.0e}"
            text = f"[yellow]{text}; NOT the same maths (more than {tolerance} off), so its times are not comparable[/]"
        people.print(text, soft_wrap=True)


def _show_checks(records: list[dict[str, Any]], people: Console) -> None:
    worst = max(records, key=lambda check: check["error"])
    where = f"{worst['worst']} of {worst['backend']} at {worst['shape']}"
    people.print(f"correctness gate passed: largest relative error {worst['error']:.1e} ({where})", soft_wrap=True)
    people.print(
        "graph: the same as a replayed CUDA graph; GB/s, TFLOP/s, floor: for what the formula must move and compute; "
        "extra: memory of fwd+bwd beyond inputs, output and gradients, relative to the bytes of v and y",
        soft_wrap=True,
    )


def _show_comparison(records: list[dict[str, Any]], people: Console) -> None:
    first = next(record for record in records if not record["peer"])
    size = ", ".join(
        f"{letter}={first[name]}" for letter, name in zip("BTHMDK", SIZE_FIELDS, strict=True) if first[name] is not None
    )
    figures = [record[part] for record in records for part in LABELS if record[part] is not None]
    graphs = any(figure["graph_ns_per_token"] is not None for figure in figures)
    reference = any("speedup" in figure for figure in figures)
    ratio = "speed-up" if reference else f"to {first['contender']}"
    columns = ("", "pass", "ns/token", *(["graph"] if graphs else []), "GB/s", "TFLOP/s", "to floor", ratio, "extra")
    shown = table(size, *columns)
    for record in records:
        if record["error"]:
            people.print(f"[yellow]{record['contender']}: {record['error']}[/]", soft_wrap=True)
        for part, label in LABELS.items():
            figure = record[part]
            if figure is None:
                continue
            over = figure["speedup"] if reference else figure["time_over_first"]
            shown.add_row(
                record["contender"] if part == "forward" else "",
                label,
                number(figure["ns_per_token"]),
                *([number(figure["graph_ns_per_token"])] if graphs else []),
                number(figure["gigabytes_per_second"]),
                number(figure["teraflops_per_second"]),
                number(figure["ratio_to_floor"], "x"),
                number(over, "x"),
                number(record["extra_ratio"], "x") if part == "forward_backward" else "",
            )
        shown.add_section()
    people.print(shown)
    for record in records:
        if record["note"]:
            people.print(f"{record['contender']}: {record['note']}", soft_wrap=True)


def _show_lengths(records: list[dict[str, Any]], people: Console) -> None:
    kinds = ["ns_per_token"]
    if any(record[part] and record[part]["graph_ns_per_token"] is not None for record in records for part in LABELS):
        kinds.append("graph_ns_per_token")
    heads = ("forward ns/token", "forward+backward ns/token")
    columns = [head if kind == "ns_per_token" else "graph" for head in heads for kind in kinds]
    for sweep in dict.fromkeys(record["sweep"] for record in records):
        shown = table(f"{sweep}, by length", "backend", "B", "T", *columns)
        for record in records:
            if record["sweep"] == sweep:
                times = [record[part] and record[part][kind] for part in LABELS for kind in kinds]
                shown.add_row(record["contender"], f"{record['batch']:,}", f"{record['length']:,}", *map(number, times))
        people.print(shown)
    for error in dict.fromkeys(f"{record['contender']}: {record['error']}" for record in records if record["error"]):
        people.print(f"[yellow]{error}[/]", soft_wrap=True)


def _show_memory(records: list[dict[str, Any]], people: Console) -> None:
    columns = ("backend", "T", "peak MB", "over inputs + outputs", "with their gradients", "extra")
    shown = table("memory of forward and backward of one sequence, inputs included", *columns)
    for record in records:
        if record["error"]:
            people.print(f"[yellow]{record['backend']}: {record['error']}[/]", soft_wrap=True)
            continue
        shown.add_row(
            record["backend"],
            f"{record['length']:,}",
            number(record["peak_bytes"] / 1e6),
            *(f"{record[name]:.2f}x" for name in ("ratio", "ratio_with_gradients", "extra_ratio")),
        )
    people.print(shown)
