"""`report.html` of a run folder: all its records on one self-contained page.

Read are `config.json`, `environment.json`, `metrics.jsonl`, `result.json` (see runs/record.py), `evaluation.json` (see
evaluation/run.py), `inspection.json` (see evaluation/inspection.py), `recall_demo.json` (see evaluation/recall_demo.py) and
`samples.json`, a list of {prompt, text} and whatever else generation has to say. A section whose record is not there is left
out. The plots are also written to `plots/*.png`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorization_memory._files import JSONError, read_json, read_json_lines, write_atomic
from factorization_memory.config import ConfigError, RunConfig, from_dict, to_dict
from factorization_memory.reports import figures, sections
from factorization_memory.reports.inspection_page import INSPECTION_STYLE, explanation, inspection_fragment
from factorization_memory.reports.pages import page
from factorization_memory.reports.plotting import png, svg
from factorization_memory.reports.position_figures import position_curves
from factorization_memory.runs.evaluation_record import EvaluationRecord
from factorization_memory.runs.names import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    EVALUATION_NAME,
    INSPECTION_NAME,
    METRICS_NAME,
    PLOTS_NAME,
    RECALL_DEMO_NAME,
    REPORT_NAME,
    RESULT_NAME,
    SAMPLES_NAME,
)

if TYPE_CHECKING:
    from factorization_memory.models.routing import LayerUse
    from factorization_memory.runs.inspection_record import InspectionRecord
    from factorization_memory.runs.recall_record import RecallDemoRecord
    from factorization_memory.runs.training_record import RunResult, SampleRecord


class ReportError(ValueError):
    """No report can be made from a run folder; the message names the file and the remedy."""


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` and `plots/*.png` of the run in `run_dir` from its records; returns the report's path.

    Raises ReportError if there is no run, a record cannot be read, or the configuration is incomplete.
    """
    config = _read_config(run_dir)
    environment = _read(run_dir / ENVIRONMENT_NAME) or {}
    result: RunResult | None = _read(run_dir / RESULT_NAME)
    evaluation: EvaluationRecord = _read(run_dir / EVALUATION_NAME) or EvaluationRecord()
    inspection: InspectionRecord | None = _read(run_dir / INSPECTION_NAME)
    recall_demo: RecallDemoRecord | None = _read(run_dir / RECALL_DEMO_NAME)
    metrics = list(_metrics(run_dir / METRICS_NAME))
    drawn = {
        "loss": figures.loss_curve(metrics),
        "position": position_curves(evaluation.get("position", {})),
        "memory": figures.memory_use(_routing(evaluation, metrics), config["data"]["context_length"]),
        "recall-learning": figures.recall_curves(recall_demo),
        "recall-reads": figures.recall_reads(recall_demo),
    }
    plots: dict[str, str] = {}
    if (run_dir / PLOTS_NAME).is_symlink():
        raise ReportError(f"{run_dir / PLOTS_NAME}: a symbolic link, but a report writes only to its run's folder; remove it")
    (run_dir / PLOTS_NAME).mkdir(exist_ok=True)
    for name, figure in drawn.items():
        if figure is not None:
            png(figure, run_dir / PLOTS_NAME / f"{name}.png")
            caption = f"<figcaption>{sections.CAPTIONS[name]}</figcaption>" if name in sections.CAPTIONS else ""
            plots[name] = f"<figure>{svg(figure, name)}{caption}</figure>"

    samples: list[SampleRecord] = _read(run_dir / SAMPLES_NAME) or _last_samples(metrics)
    parts = [
        sections.header(config, environment, result, evaluation, metrics),
        sections.headline(evaluation),
        sections.section("Learning", sections.LEARNING_NOTE, plots.get("loss")),
        sections.section(
            "Loss by position", sections.position_note(evaluation), plots.get("position"), sections.position_table(evaluation)
        ),
        sections.section("Recall", sections.RECALL_NOTE, sections.recall_table(evaluation.get("recall", {}))),
        sections.section(
            "Learning to recall",
            sections.recall_demo_note(recall_demo),
            plots.get("recall-learning"),
            plots.get("recall-reads"),
        ),
        sections.section("Use of the memory", sections.MEMORY_NOTE, plots.get("memory")),
        sections.section(
            "The memory at work",
            explanation(inspection),
            inspection_fragment(inspection) if inspection else None,
        ),
        sections.samples(samples),
        sections.configuration(config, environment),
    ]
    body = "\n".join(part for part in parts if part)
    path = run_dir / REPORT_NAME
    write_atomic(path, page(f"{config['name']} – Factorization Memory", body, sections.STYLE + INSPECTION_STYLE))
    return path


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except JSONError as error:
        raise ReportError(f"{error}; write it again, or remove it to skip its section") from None


def _read_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG_NAME
    values = _read(path)
    if values is None:
        raise ReportError(f"{run_dir}: no run here ({CONFIG_NAME} is missing); give a run folder")
    # Filling in defaults for missing parts would describe a run that never was. Single fields may be missing.
    if missing := ", ".join(name for name in to_dict(RunConfig()) if isinstance(values, dict) and name not in values):
        raise ReportError(f"{path}: fields missing: {missing}; restore the file")
    try:
        return to_dict(from_dict(RunConfig, values))
    except ConfigError as error:
        raise ReportError(f"{path}: not the configuration of a run: {error}") from None


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for values in read_json_lines(path):
            if not isinstance(values.get("kind"), str) or not isinstance(values.get("step"), int):
                raise ReportError(f"{path}: line without 'kind' and 'step' ({str(values)[:80]}); remove it")
            yield values
    except JSONError as error:
        raise ReportError(str(error)) from None


def _last_samples(metrics: list[dict[str, Any]]) -> list[SampleRecord]:
    return next((m["samples"] for m in reversed(metrics) if m["kind"] == "sample"), [])


def _routing(evaluation: EvaluationRecord, metrics: list[dict[str, Any]]) -> list[LayerUse]:
    return evaluation.get("routing") or next((m["layers"] for m in reversed(metrics) if m["kind"] == "routing"), [])
