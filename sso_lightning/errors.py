"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """A wrong file, record, setting or template.

    The message is one line that names the key, file, line or record and says what to do. The
    command line prints it without a traceback and ends with status 2.
    """
