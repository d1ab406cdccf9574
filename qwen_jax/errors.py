"""The one exception for bad input, and what the system says when there is no room."""

import errno

# The disk is full, the quota is used up, a file may not grow further.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message says what was expected, what came, and what to do. The command line prints it on standard error
    without a traceback and exits with status 1.
    """
