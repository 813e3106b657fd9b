"""What a run looked like: the table that grows on the terminal, and one self-contained HTML page."""

from jaxquant.report.page import write_report
from jaxquant.report.tables import ProgressTable

__all__ = ["ProgressTable", "write_report"]
