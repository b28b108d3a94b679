"""Two small models that learn to recall, while they learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table


def learning_table(update_lags: Mapping[str, int], reports: Sequence[tuple[int, Mapping[str, float]]]) -> Table:
    """Bars of how often each form names the value right, from its name; `update_lags` names the forms, each report has the
    step and the accuracy of each. Shows the first reports, ever fewer later ones, and the last."""
    shown = Table("steps", *(f"{name} (update_lag={lag})" for name, lag in update_lags.items()))
    for number, (step, accuracy) in enumerate(reports, start=1):
        if number & (number - 1) == 0 or number == len(reports):
            shown.add_row(str(step), *(_bar(accuracy[name]) for name in update_lags))
    return shown


def _bar(share: float, width: int = 20) -> str:
    return f"{'█' * round(width * share):·<{width}} {share:4.0%}"
