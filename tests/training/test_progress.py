from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from factorization_memory.training.progress import RichProgress


def metrics(step: int, bits: float | None = 2.5) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "bits_per_byte": bits, "tokens_per_second": 12345.0}


def test_without_a_terminal_ten_plain_lines_tell_the_run() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=False, width=200)
    progress = RichProgress(console)
    progress.on_start(100, 1_500_000, 0)
    for step in range(1, 101):
        progress.on_step(metrics(step))
    progress.on_evaluation(
        {"step": 100, "bits_per_byte": 2.0, "sources": {"en": {"bits_per_byte": 1.9}, "ja": {"bits_per_byte": 2.1}}}
    )
    progress.on_sample({"step": 100, "samples": [{"prompt": "It [was] ", "text": "a\nday"}]})
    progress.on_end()
    lines = written.getvalue().splitlines()
    assert lines[0] == "training 1.50 M parameters for 100 steps"
    steps = [line for line in lines if line.startswith("step ") and "tokens/s" in line]
    assert len(steps) == 10
    assert steps[-1].startswith("step 100/100  2.500 bits/byte  12,345 tokens/s  0:00 left")
    assert "step 100: held-out 2.000 bits/byte  (en 1.900, ja 2.100)" in lines
    assert "  | It [was] a day" in lines


def test_on_a_terminal_there_is_a_bar_and_it_goes() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120)
    progress = RichProgress(console)
    progress.on_start(10, 1000, 4)
    for step in range(5, 11):
        progress.on_step(metrics(step, None))
    progress.on_checkpoint(Path("x"))
    progress.on_message("a message")
    progress.on_end()
    text = written.getvalue()
    assert "from step 4" in text
    assert "a message" in text
    assert "12,345 tokens/s" in text
    assert not console._live_stack
