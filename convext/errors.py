"""The one exception that a command prints instead of a traceback."""


class UserError(Exception):
    """Something the person at the terminal can put right.

    Its message is one line that says what is wrong and, where it helps, what to do. The
    commands of `python -m convext` print it and leave with exit status 2.
    """
