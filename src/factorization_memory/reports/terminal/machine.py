"""Where a benchmark ran."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factorization_memory.reports.terminal.tables import number

if TYPE_CHECKING:
    from rich.console import Console


def show_machine(result: dict[str, Any], people: Console) -> None:
    """Prints where a benchmark ran, and the device's copy and matmul rates."""
    where = result["machine"]
    packages = "".join(f", {package} {version}" for package, version in where["packages"].items())
    text = (
        f"{where['name']} ({where['device']}), {where['threads']} threads, torch {where['torch']}{packages}, {result['dtype']}"
    )
    if "rates" in result:
        rates = result["rates"]
        text += (
            f"; copies {rates['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
            f"products {number(rates['matmul_flops_per_second'] / 1e12)} TFLOP/s ({rates['matmul']})"
        )
    people.print(text, soft_wrap=True)
