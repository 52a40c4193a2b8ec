"""What comparisons found, for people: tables on the terminal, and one self-contained HTML page."""

from __future__ import annotations

from shared_config.parity.report.page import report_page, write_report
from shared_config.parity.report.terminal import print_failures

__all__ = ["print_failures", "report_page", "write_report"]
