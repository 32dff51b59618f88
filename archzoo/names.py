"""Suggestions for misspelt names, in a module that imports nothing heavy."""

from collections.abc import Sequence
from difflib import get_close_matches


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
