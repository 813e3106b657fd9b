"""What a run looked like: the table that grows on the terminal, and self-contained HTML pages."""

from jaxquant.report.allocation import write_allocation
from jaxquant.report.page import write_report
from jaxquant.report.tables import ProgressTable

__all__ = ["ProgressTable", "write_allocation", "write_report"]
