"""Records on a terminal: what the verbs show, without the verbs."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType

from factorization_memory.experiments.cost import run_cost
from factorization_memory.presets import PRESETS
from factorization_memory.reports.terminal.cost import show_cost
from factorization_memory.reports.terminal.evaluation import show_evaluation
from factorization_memory.reports.terminal.harness import show_tasks
from factorization_memory.reports.terminal.inference_benchmark import show_inference_end, show_model
from factorization_memory.reports.terminal.recall_demo import learning_table
from factorization_memory.reports.terminal.tables import number, table


def shown(show: Callable[[Any, Console], None], record: Any) -> list[list[str]]:
    """The words of each line."""
    console = Console(file=io.StringIO(), width=200)
    show(record, console)
    return [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def printed(thing: RenderableType) -> list[list[str]]:
    return shown(lambda each, console: console.print(each), thing)


@pytest.mark.parametrize(("value", "text"), [(None, ""), (0.126, "0.13x"), (12.34, "12.3x"), (1234.5, "1,234x")])
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value, "x") == text


def test_a_column_named_by_data_is_no_markup() -> None:
    assert ["[red]name", "x"] in printed(table("", "[red]name", "x"))


def test_the_cost_of_a_preset() -> None:
    lines = shown(show_cost, run_cost(PRESETS["tiny"]()))
    assert ["preset", "tiny"] in lines
    assert any(line[:2] == ["learning", "rate"] for line in lines)


def test_an_evaluation_of_losses_alone() -> None:
    row = {"loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.25}
    lines = shown(show_evaluation, {"sources": {"[en]": row}, "total": row, "recall": {}, "routing": []})
    assert ["│", "[en]", "│", "2.000", "│", "7.4", "│", "1.250", "│"] in lines


def test_groups_of_tasks_stand_before_tasks() -> None:
    metrics = {"acc": {"value": 0.25, "stderr": None}, "perplexity": {"value": 2e6, "stderr": 0.5}}
    task = {"examples": 8, "shots": 0, "metrics": metrics}
    lines = shown(show_tasks, {"groups": {"both": {"metrics": metrics}}, "tasks": {"one": task}})
    cells = [" ".join(line).split("│")[1:-1] for line in lines if "│" in line]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["both", "", "", "acc", "0.2500", ""],
        ["", "", "", "perplexity", "2.000e+06", "0.5000"],
        ["one", "8", "0", "acc", "0.2500", ""],
        ["", "", "", "perplexity", "2.000e+06", "0.5000"],
    ]


def test_learning_shows_ever_fewer_reports_and_the_last() -> None:
    lines = printed(learning_table({"a": 1, "b": 0}, [(10 * i, {"a": i / 10, "b": 0.0}) for i in range(1, 8)]))
    assert [line[1] for line in lines if line and line[0] == "│"] == ["10", "20", "40", "70"]
    assert any("██████████████······" in line for line in lines)


def test_peak_memory_of_inference_stands_where_it_was_measured() -> None:
    step = {"seconds": {"median": 0.001, "p99": 0.002}, "tokens_per_second": 2000.0, "ratio_to_floor": 3.0}
    record = {
        "contender": "mamba2", "parameters": 2_000_000, "weight_bytes": 4_000_000, "batch": 2, "context": 1024, "error": None,
        "state": "random", "state_bytes": 1_000_000, "prefill": None,
        "decode": {"eager": step, "graph": step},
    }  # fmt: skip
    figures = ["1.00", "2.00", "2,000", "3.00x"]
    without = shown(show_model, [record])  # as older records are
    assert ["2", "1,024", "1.00", "eager", *figures] in without
    measured = record | {"peak_bytes": {"prefill": None, "decode": 7_000_000}}
    lines = shown(show_model, [measured, record | {"context": 4096, "peak_bytes": {"prefill": 9_000_000, "decode": 7_000_000}}])
    assert ["2", "1,024", "1.00", "7.00", "eager", *figures] in lines
    assert ["2", "4,096", "1.00", "9.00", "eager", *figures] in lines
    assert ["graph", *figures] in lines


def test_latency_that_grows_with_the_text_is_not_called_flat() -> None:
    spread = [
        {"contender": name, "batch": 1, "mode": "graph", "slowest_over_fastest": ratio}
        for name, ratio in (("ours", 1.02), ("transformer", 9.0))
    ]
    machine = {"device": "cpu", "name": "CPU", "threads": 1, "torch": "2", "python": "3", "packages": {}}
    rates = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e12, "matmul": "none"}
    result = {"machine": machine, "dtype": "float32", "rates": rates, "spread": spread, "missing": {}}
    lines = [" ".join(line) for line in shown(show_inference_end, result)]
    assert lines[1:] == [
        "ours, B=1, graph: slowest over fastest context 1.02x, flat within 2 %",
        "transformer, B=1, graph: slowest over fastest context 9.00x",
    ]
