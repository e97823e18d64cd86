"""Errors that a user can cause and fix. The command line prints each in one line, no traceback."""


class UserError(Exception):
    """Bad input (exit status 2). The message names the file, the key, the value and the remedy.

    Each line of the message is one error. The command line prints each after ``error:``.
    """


class DeviceError(UserError):
    """The device cannot go on: its memory is full, or there is no code for it."""


class NonFiniteError(FloatingPointError):
    """A loss or tensor became NaN or infinite (exit status 3).

    The message names the step and the first bad tensor.
    """


class Stopped(Exception):
    """Breaks off an evaluation, since a stop is asked for."""


def printable(text: str) -> str:
    r"""A name from outside, made safe for a message: one line, without control characters.

    A character that cannot be printed becomes an escape. Example: a byte 0xe9 that is not UTF-8
    becomes ``\udce9``.
    """
    if text.isprintable():
        return text  # a million names take half a second instead of seconds
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
