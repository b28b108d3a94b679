from __future__ import annotations

from typing import Any

import pytest

from factorization_memory.experiments.evaluation import told_by


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, False),
        ({"total": {"tokens": 90}}, True),
        ({"total": {"tokens": 110}}, False),
        ({"position": {}}, True),
        ({"total": {"tokens": 90}, "position": {"en": {"max_position": 2048, "stretches": 8}}}, False),
        ({"position": {"en": {"max_position": 1024, "stretches": 4}}}, True),
        ({"total": {"tokens": 90}, "evaluated": {"checkpoint": "step-2", "corpus_fingerprint": "a"}}, False),
    ],
)
def test_which_evaluation_stays(change: dict[str, Any], kept: bool) -> None:
    """Only one that the new one adds nothing to."""
    before = {
        "evaluated": {"checkpoint": "step-1", "corpus_fingerprint": "a"},
        "total": {"tokens": 100},
        "recall": {},
        "position": {"en": {"max_position": 1024, "stretches": 8}},
    }
    assert told_by(before | change, before) is kept
    assert told_by(before, before | {"recall_tasks": {"items": 8}})
    assert not told_by(before | {"recall_tasks": {"items": 8}}, before | {"recall_tasks": {"items": 4}})
    assert not told_by(before, {name: x for name, x in before.items() if name != "recall"})
