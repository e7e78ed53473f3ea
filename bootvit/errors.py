"""The errors that a user or the machine can cause, and that end a command with one line instead of a traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bootvit.addresses import public

OF_THE_MACHINE = (  # a full disk or quota, a folder that may not be written, a broken disk, too many open files
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.EMFILE, errno.ENFILE),
)


OF_THE_USER = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # a path that cannot be what it is to be


LONGEST = 1000  # characters of a message


def one_line(text: str) -> str:
    """A message without characters that break a line or cannot be seen, cut in its middle where it is long."""
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return seen if len(seen) <= LONGEST else f"{seen[: LONGEST // 2]} ... {seen[5 - LONGEST // 2 :]}"


class OneLine(Exception):
    """An error whose text is one line without passwords, whatever names and values of the user it repeats."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(public(message)))


class UserError(OneLine):
    """The user's mistake: one line that names the file, the key, the value and what would be right (status 2)."""


class RunFailed(OneLine):
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
