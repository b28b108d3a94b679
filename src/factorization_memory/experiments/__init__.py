"""Records of runs turned into figures and reports."""

from factorization_memory.experiments.report import ReportError, write_report

__all__ = ["ReportError", "write_report"]
