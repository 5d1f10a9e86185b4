"""The errors that a user can cause. Each message is one line: the field, what was found, what is allowed."""

import difflib
from collections.abc import Iterable
from itertools import islice


class MoekitError(Exception):
    """Base of the errors below; the command line prints its message without a traceback and exits with 2.

    What a message quotes of a file may hold anything; line ends become spaces, other control characters their escapes.
    """

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.splitlines())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


class ConfigError(MoekitError):
    """A setting is unknown, out of range, or cannot take effect."""


class CheckpointError(MoekitError):
    """A directory is not the checkpoint that it claims to be."""


class DataError(MoekitError):
    """Text or tokenised data cannot be read; the message names the file and the line."""


class UnsupportedError(MoekitError):
    """The request is sound but this machine or this version cannot carry it out."""


class TrainingError(MoekitError):
    """Training cannot go on (the loss is not finite, say); the message names the last good checkpoint."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the known name closest to `name`, or an empty string when none is close."""
    matches = difflib.get_close_matches(name, islice(known, 10_000), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""
