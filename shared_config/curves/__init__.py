"""Curves of training runs, several in one picture, on a page that stands alone."""

from shared_config.curves.page import runs_page, write_page
from shared_config.curves.runs import Run, read_run

__all__ = ["Run", "read_run", "runs_page", "write_page"]
