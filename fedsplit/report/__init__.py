"""What a run leaves behind: results, tables, plots, and the trained adapter."""

from fedsplit.report.records import RoundRecord, Written
from fedsplit.report.run import RunReport, is_finished, read_data_lines, read_records, read_stopped
from fedsplit.report.tables import make_console, plain_text, round_line, summary_table
from fedsplit.report.turns import TurnRow, read_turns

__all__ = [
    "RoundRecord",
    "RunReport",
    "TurnRow",
    "Written",
    "is_finished",
    "make_console",
    "plain_text",
    "read_data_lines",
    "read_records",
    "read_stopped",
    "read_turns",
    "round_line",
    "summary_table",
]
