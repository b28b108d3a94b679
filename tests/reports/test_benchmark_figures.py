"""The benchmark's picture: drawn whole, with gaps where there are no figures, and written aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from factorization_memory.config import ConfigError
from factorization_memory.reports import benchmark_figures as plot


def record(contender: str, shape: str, forward: float | None, both: float | None, **more: Any) -> dict[str, Any]:
    def time(ns: float | None) -> dict[str, float] | None:
        return None if ns is None else {"ns_per_token": ns}

    return {"contender": contender, "shape": shape, "forward": time(forward), "forward_backward": time(both)} | more


SHAPES = ("16x2048x1x64x2048", "1x131072x2x64x2048x8")
RESULT: dict[str, Any] = {
    "machine": {"name": "a machine", "torch": "2.99"},
    "dtype": "bfloat16",
    "floors": {
        shape: {"forward": {"ns_per_token": 2.0}, "forward_backward": {"ns_per_token": 5.0}} for shape in SHAPES
    },
    "comparison": [record("triton", SHAPES[0], 4.0, 15.0), record("gla", SHAPES[0], 11.0, None)],
    "lengths": [
        record("triton", "", 4.0 + batch, 15.0, sweep=sweep, length=length)
        for sweep, batch in (("one sequence", 1), ("constant tokens", 2))
        for length in (1024, 4096)
    ],
}  # fmt: skip


def test_what_is_drawn() -> None:
    figure = plot.draw(RESULT)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["forward", "forward + backward", "forward, by length", "forward + backward, by length"]
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {"floor", "triton", "gla", "triton, one sequence", "triton, constant tokens"}
    numbers = [{text.get_text() for text in axes.texts} for axes in figure.axes[:2]]
    assert numbers == [{"4", "11"}, {"15"}]
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert labels == ["M=64, D=2048\nB=16, T=2048", "M=64, D=2048\nK=8\nB=1, T=131072\nH=2"]
    assert len(plot.draw(RESULT | {"lengths": []}).axes) == 2


def test_break_even_of_a_sparse_memory() -> None:
    """Over M / K, of graphs where both forms were captured; nothing without both."""

    def both(selected: int, dense: float, sparse: float, graph: float | None) -> list[dict[str, Any]]:
        shape = f"2x100x1x64x32x{selected}"
        sizes = {"num_states": 64, "value_size": 32, "batch": 2, "length": 100, "top_k": selected}
        records = [record(name, shape, ns, ns, **sizes) for name, ns in (("triton-dense", dense), ("triton-sparse", sparse))]
        for one, ns in zip(records, (graph, graph and graph / 4), strict=True):
            for part in ("forward", "forward_backward"):
                one[part]["graph_ns_per_token"] = ns
        return records

    comparison = [*both(32, 10.0, 20.0, None), *both(4, 10.0, 5.0, 8.0)]
    floors = {one["shape"]: RESULT["floors"][SHAPES[0]] for one in comparison}
    figure = plot.draw(RESULT | {"comparison": comparison, "floors": floors, "lengths": []})
    panel = figure.axes[2]
    assert panel.get_title(loc="left") == "forward: speed of triton-sparse over triton-dense, by M / K"
    drawn = next(line for line in panel.lines if line.get_label().startswith("M=64"))
    assert drawn.get_xydata().tolist() == [[2.0, 0.5], [16.0, 4.0]]
    alone = [one for one in comparison if one["contender"] == "triton-dense"]
    assert len(plot.draw(RESULT | {"comparison": alone, "floors": floors, "lengths": []}).axes) == 2


@pytest.mark.parametrize(("name", "start"), [("times.png", b"\x89PNG"), ("times.SVG", b"<?xml")])
def test_files(name: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "made" / name
    plot.save(RESULT, path)
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]


def inference_record(contender: str, batch: int, context: int, **modes: float) -> dict[str, Any]:
    figures = {mode: {"seconds": {"median": seconds}, "tokens_per_second": batch / seconds} for mode, seconds in modes.items()}
    return {"contender": contender, "batch": batch, "context": context, "decode": figures}


INFERENCE: dict[str, Any] = {
    "machine": RESULT["machine"],
    "dtype": "bfloat16",
    "records": [
        inference_record("ours", batch, context, eager=0.002 * batch, graph=0.001 * batch)
        for batch in (1, 4)
        for context in (1024, 65536)
    ]
    + [inference_record("llama", 1, 1024, eager=0.003), inference_record("llama", 4, 65536)],
}


def test_what_is_drawn_of_whole_models() -> None:
    figure = plot.draw_inference(INFERENCE)
    latency, speed = figure.axes
    assert speed.get_title(loc="left") == "tokens per second, after 64k tokens"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"ours, B=1", "ours, B=4", "llama, B=1"}
    lines = {line.get_label(): line.get_xydata().tolist() for line in latency.lines}
    assert lines["ours, B=4"] == [[1024, 4.0], [65536, 4.0]]
    (line,) = speed.lines
    assert line.get_xydata().tolist() == [[1, 1000.0], [4, 1000.0]]
    one = INFERENCE | {"records": INFERENCE["records"][:1]}
    assert [text.get_text() for text in plot.draw_inference(one).legends[0].get_texts()] == ["ours"]
    assert len(plot.draw_inference(INFERENCE | {"records": INFERENCE["records"][-1:]}).axes) == 2


def test_a_file_of_whole_models(tmp_path: Path) -> None:
    path = tmp_path / "speed.svg"
    plot.save(INFERENCE, path, plot.draw_inference)
    assert "tokens per second" in path.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "times.png"
    path.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        plot.save(RESULT, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"times\.pdf.*\.png or \.svg"):
        plot.check_path(tmp_path / "times.pdf")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        plot.check_path(tmp_path / "folder.png")
