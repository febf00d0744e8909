"""Results of runs: the page, the table in the terminal, and the figures."""

from hf_lowrank.report.page import write_report
from hf_lowrank.report.terminal import terminal_table

__all__ = ["terminal_table", "write_report"]
