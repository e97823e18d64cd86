"""The names of classes that reports and predictions show."""

from triptych.core.config.spec import DataSpec
from triptych.core.data.source import native_path
from triptych.core.errors import UserError, printable

TABLES = {
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
"""``data.class_names`` -> names in the order of the labels, for data whose files hold no names."""

MAX_BYTES = 2**24
"""Largest file of names; a longer file is something else."""


def class_names(data: DataSpec, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The name to show for each class of a source.

    Args:
        classes: the source's own labels, e.g. the names of folders.

    Returns:
        One name per class: ``classes`` themselves if ``data.class_names`` is null.

    Raises:
        UserError: the file cannot be read, or does not name every class.
    """
    if data.class_names is None:
        return classes
    table = TABLES.get(data.class_names)
    at = f"data.class_names: {printable(data.class_names)}"
    lines = _lines(at, data.class_names) if table is None else list(table)
    looked_up = dict(parts for line in lines if len(parts := line.split(maxsplit=1)) == 2)
    if table is None and classes and all(name in looked_up for name in classes):
        return tuple(looked_up[name].strip() for name in classes)
    if len(lines) == len(classes):
        return tuple(lines)
    absent = next((name for name in classes if name not in looked_up), None)
    raise UserError(
        f"{at}: {len(lines)} names for {len(classes)} classes"
        + ("" if absent is None else f", and no line for class '{printable(absent)}'")
        + "; give one name per line in the order of the classes, or lines `CLASS NAME`"
    )


def _lines(at: str, name: str) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        with open(native_path(name), "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{at}: {error.strerror}; give a text file or one of {', '.join(TABLES)}"
        ) from error
    try:
        if len(content) > MAX_BYTES or b"\0" in content:
            raise ValueError("too long, or with zero bytes")
        text = content.decode("utf-8-sig")
    except ValueError as error:
        raise UserError(f"{at}: not a UTF-8 text file") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
