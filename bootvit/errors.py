"""The errors that a user or the machine can cause, and that end a command with one line instead of a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OF_THE_MACHINE = (  # a full disk or quota, a folder that may not be written, a broken disk, too many open files
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.EMFILE, errno.ENFILE),
)


OF_THE_USER = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # a path that cannot be what it is to be


class UserError(Exception):
    """The user's mistake: one line that names the file, the key, the value and what would be right (status 2)."""


class RunFailed(Exception):
    """A run that could not go on, such as a loss that is no longer finite (status 1)."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an `OSError` raised inside name this file: one from writing, such as of a full disk, names none."""
    try:
        yield
    except OSError as err:
        if err.errno is not None and err.filename is None:
            err.filename = str(path)
        raise
