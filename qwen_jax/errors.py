"""The exception for bad input, and the error numbers for a full disk."""

import errno

# The disk is full, the quota is used up, a file may not grow further.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message says what was expected, what was found, and what to do. The command line prints it on standard
    error without a traceback and exits with status 1.
    """
