"""Suggestions for misspelt names, and text that can be shown, in a module that imports nothing heavy."""

from collections.abc import Sequence
from difflib import get_close_matches


def visible(text: str) -> str:
    r"""The text with U+FFFD in the place of what cannot be shown: control characters, lone surrogates.

    >>> visible("a\0b\n")
    'a�b\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def suggest(wrong: str, names: Sequence[str]) -> str:
    """The end of an error message about a wrong name.

    >>> suggest("kna", ["aptx", "kan", "nac"])
    "did you mean 'kan'?"
    >>> suggest("zzz", ["aptx", "kan"])
    'choose one of aptx, kan'
    """
    # Swapped letters are the commonest slip, and difflib thinks little of them: 'kna' is nearer to 'nac' than to 'kan'.
    swapped = [name for name in names if sorted(name) == sorted(wrong)]
    near = swapped or get_close_matches(wrong, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    return f"choose one of {', '.join(names)}"
