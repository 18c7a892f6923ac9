"""Every named error of the package. Any other mistake in an input is a plain ``ValueError``."""

from __future__ import annotations


class FileError(ValueError):
    """A file is missing, cut short, changed or not what it should be. The message is one line for the user."""


class CannotTrace(ValueError):
    """A model's own code does not run without data, so its memory cannot be predicted."""


class InPlaceChange(RuntimeError):
    """A tensor that was kept without a copy has been modified since."""


class RunError(RuntimeError):
    """A run failed for a reason that is not the user's mistake. The message is one line."""


class NotFinite(RunError):
    """A loss or a gradient is NaN or infinite. The message says at which step, and where the value came from."""


class LostProcess(RunError):
    """Another process of the run has ended without a message, or does not answer."""


class FailedProcess(RunError):
    """A process of the run failed, and all processes know which one and why.

    Attributes:
        rank: the first process that failed.
        code: its exit code; 2 for a user's mistake.
        message: one line.
    """

    def __init__(self, rank: int, code: int, message: str) -> None:
        super().__init__(message)
        self.rank, self.code, self.message = rank, code, message


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        number: the signal's number; the exit code is 128 more.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number
