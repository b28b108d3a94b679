"""Pages, tables and figures, made from the records of runs and benchmarks."""

from factorization_memory.reports.inspection_page import inspection_html
from factorization_memory.reports.report import ReportError, write_report

__all__ = ["ReportError", "inspection_html", "write_report"]
