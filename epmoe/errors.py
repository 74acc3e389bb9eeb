"""Errors a user can act on. Each carries what failed, why, the fix, and the exit code of the process."""

from __future__ import annotations

import re
import sys

_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it, and half characters; not newline and tab."""


def printable(text: str) -> str:
    r"""Text that is safe to print: control characters of file names, values or generated text shown as ``\x1b``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def warn(text: str) -> None:
    """One line on stderr about what is not as it should be, and no reason to end."""
    print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


class EpmoeError(Exception):
    """Base of every error epmoe raises on purpose.

    Args:
        what: One sentence: what failed, with the numbers.
        why: The cause, if it is not obvious.
        fix: What to type or change.
    """

    exit_code = 1
    rank: int | None = None
    """Where it began, if that was another rank than the one that raises it."""

    def __init__(self, what: str, *, why: str | None = None, fix: str | None = None) -> None:
        self.what = printable(what)
        self.why, self.fix = (printable(text) if text else text for text in (why, fix))
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        super().__init__("\n".join(lines))


class ConfigError(EpmoeError):
    """A mistake in the configuration or on the command line."""

    exit_code = 2


class DataError(EpmoeError):
    """Training data is missing, damaged or does not fit the tokenizer."""

    exit_code = 3


class CheckpointError(EpmoeError):
    """A checkpoint cannot be used or written."""

    exit_code = 4


class UnreachableCheckpoint(CheckpointError):
    """The file system did not give a checkpoint's bytes: nobody knows whether it is good, so none takes its place."""


class NumericsError(EpmoeError):
    """Training stopped because losses or gradients are not finite."""

    exit_code = 5


class MemoryExhausted(EpmoeError):
    """The device ran out of memory."""

    exit_code = 6


class CommError(EpmoeError):
    """A collective failed or timed out: a peer died, hung or cannot be reached."""

    exit_code = 7


class NotProven(EpmoeError):
    """``epmoe verify`` found a layout that trains another model, or a planted fault that it did not notice."""

    exit_code = 8


class Preempted(EpmoeError):
    """Asked to stop (SIGTERM, SIGINT); a checkpoint was written. Run the same command to go on."""

    exit_code = 75


class NoProgress(EpmoeError):
    """The same step failed at every restart; restarting again would not help."""

    exit_code = 93
