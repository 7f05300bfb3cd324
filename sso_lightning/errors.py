"""Mistakes a user can mend, and how small command lines report them."""

import argparse
import re
import signal
from typing import NoReturn


class InputError(ValueError):
    """A wrong file, record, setting or template.

    The message is one line that names the key, file, line or record and says what to do. The
    command line prints it without a traceback and ends with status 2.
    """


def mistake_behind(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: a parser wraps what a class refuses in its own words."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end. An interrupt, because trainers shut down cleanly for those.

    The command line ends with `status`, which is what a shell reports of a process that the
    signal killed.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


_KEY_LIKE = re.compile(r"(?<!\w)(?:sk|pk|rk|gsk|hf|nvapi|xai|pplx)[-_][\w-]{16,}")


def hide_keys(text: str) -> str:
    """A text without what looks like an API key: a parser repeats the settings it refuses."""
    return _KEY_LIKE.sub("***", text)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like every other mistake of the command line."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise InputError(f"{message}; see {self.prog} --help")
