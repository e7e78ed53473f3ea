"""The errors that a user can cause, and that end a command with one line instead of a traceback."""


class UserError(Exception):
    """The user's mistake: one line that names the file, the key, the value and what would be right (status 2)."""


class RunFailed(Exception):
    """A run that could not go on, such as a loss that is no longer finite (status 1)."""
