"""The exceptions that a command prints instead of a traceback."""


class UserError(Exception):
    """Something the person at the terminal can put right.

    Its message is one line that says what is wrong and, where it helps, what to do. The
    commands of `python -m convext` print it and leave with its exit status.
    """

    status = 2


class ProcessError(UserError):
    """Another of the processes that train together failed; says which, and what it said."""

    status = 1
