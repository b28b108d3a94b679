"""`fmem doctor`: what is installed, what the machine has, and whether every backend computes the recurrence here."""

from __future__ import annotations

from dataclasses import dataclass

from factorization_memory.cli.common import console, emit, parse


@dataclass(frozen=True)
class Doctor:
    """What is installed, and a tiny forward and backward of every backend on every device against the float64 reference.
    Status 1 if any is wrong."""

    json: bool = False
    """Write the findings to stdout as one JSON line."""


def run(arguments: list[str]) -> int:
    """`fmem doctor` with `arguments`; returns the exit status."""
    options = parse(Doctor, arguments, "doctor")
    from factorization_memory.benchmarks.doctor import examine
    from factorization_memory.reports.terminal.doctor import show_findings

    people = console()
    with people.status("checking the installation and every backend"):
        findings = examine()
    show_findings(findings, people)
    emit(findings, options.json)
    return 0 if findings["passed"] else 1
