"""Mistakes a user can mend, and how small command lines report them."""

import argparse
from typing import NoReturn


class InputError(ValueError):
    """A wrong file, record, setting or template.

    The message is one line that names the key, file, line or record and says what to do. The
    command line prints it without a traceback and ends with status 2.
    """


class OneLineParser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like every other mistake of the command line."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong."""
        raise InputError(f"{message}; see {self.prog} --help")
