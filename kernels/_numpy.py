"""NumPy, imported when something of it is first asked for: only connectomes need it, and all else works without."""

from typing import TYPE_CHECKING, Any

__all__ = ["np"]

if TYPE_CHECKING:
    import numpy as np
else:

    class _NumPy:
        def __getattr__(self, name: str) -> Any:
            try:
                import numpy
            except ImportError as error:
                raise ImportError("a connectome needs numpy, which is not installed: pip install numpy") from error
            return getattr(numpy, name)

    np = _NumPy()
