"""Pages, tables and figures, made of what runs and benchmarks have left on disk."""

from factorization_memory.reports.inspection_page import inspection_html
from factorization_memory.reports.report import ReportError, write_report

__all__ = ["ReportError", "inspection_html", "write_report"]
