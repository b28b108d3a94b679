"""Peaks of a GPU's memory that count what is measured alone."""

from __future__ import annotations

import pytest
import torch

from factorization_memory.benchmarks import device_memory
from factorization_memory.benchmarks.device_memory import DeviceMemory


def test_a_cpu_has_no_figures() -> None:
    memory = DeviceMemory(torch.device("cpu"))
    memory.start()
    with memory.set_aside():
        torch.zeros(1000)
    assert memory.allocated() == memory.others == 0
    assert memory.peak_bytes() is None


def test_what_belongs_to_others_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"now": 100, "peak": 0}
    monkeypatch.setattr(device_memory, "synchronise", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: there["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: there["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: there.update(peak=there["now"]))
    memory = DeviceMemory(torch.device("cuda"))
    there["now"] = 150  # a model
    with memory.set_aside():
        there["now"] = 157  # a copy of its state
    memory.start()
    assert memory.peak_bytes() == 50
    there["peak"] = 200
    assert memory.peak_bytes() == 93
    memory.start()
    assert memory.peak_bytes() == 50
