"""Errors a user can cause and mend: each is one line, without a traceback, and exit status 2."""


class UserError(Exception):
    """Bad input. The message names the file, the key, the value and the remedy.

    Several lines are several errors; the command line prints each after ``error:``.
    """


class NonFiniteError(FloatingPointError):
    """Training went non-finite (exit status 3); names the step and the first bad tensor."""


def printable(text: str) -> str:
    r"""A name from outside as it may stand in a message: in one line, without control characters.

    What cannot be shown becomes an escape, e.g. a byte 0xe9 that is not UTF-8 becomes ``\udce9``.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
