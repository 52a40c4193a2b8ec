"""Errors for the user to fix: the command line prints them without a traceback and exits with status 2."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Something given from outside (file, flag, value, installation) cannot be used; the message says what and why.

    Attributes:
        shown_elsewhere: whether another process of the run shows the user what went wrong, so that this one is silent.
    """

    shown_elsewhere = False


class ConfigError(UserError):
    """One or several problems of a configuration.

    Attributes:
        problems: one line each, naming field, value and what is allowed.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
