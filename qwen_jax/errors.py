"""The one exception for bad input."""


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message says what was expected, what came, and what to do. The command line prints it on standard error
    without a traceback and exits with status 1.
    """
