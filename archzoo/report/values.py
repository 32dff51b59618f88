"""Values of a file that anyone may have written: each comes out as what it should be, or as None."""

_LARGEST = 1e70  # so that the square of a variance is still a float


def clean(value: object) -> str:
    """Text in one line that every format can hold: no control characters, no lone surrogates, single spaces."""
    string = str(value).encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in string).split())


def number(value: object) -> float | None:
    """The value as a finite float, or None; what is far beyond float32's range counts as infinite, or as zero."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value) if abs(value) >= 1 / _LARGEST else 0.0
    return None


def text(value: object) -> str | None:
    """A text or a number as clean text, or None."""
    return clean(value) or None if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def integer(value: object) -> int | None:
    """The value as a whole number, or None."""
    whole = number(value)
    return int(whole) if whole is not None and whole == int(whole) else None


def first_line(value: object) -> str | None:
    """The first line that is not empty, or None."""
    lines = [told for line in str(value).splitlines() if (told := clean(line))] if value is not None else []
    return lines[0] if lines else None
