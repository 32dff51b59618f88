"""One file an idea; a file reads on its own, beside its paper.

Every public class of every file here can be imported from `archzoo.layers` and from `archzoo`. The files are found,
not listed: a new layer is a new file.
"""

import pkgutil
import sys
from typing import Any

_exports: dict[str, Any] = {}


def _collect() -> dict[str, Any]:
    """Public classes and functions that the layer files define, or list in their `__all__`."""
    if not _exports:
        from archzoo.registry import import_layers

        import_layers()
        exports = {}
        for found in pkgutil.iter_modules(__path__, "archzoo.layers."):
            module = sys.modules[found.name]
            names = getattr(module, "__all__", None) or [
                name
                for name, value in vars(module).items()
                if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
            ]
            exports.update({name: getattr(module, name) for name in names})
        _exports.update(exports)
    return _exports


def __getattr__(name: str) -> Any:
    try:
        known = not name.startswith("_") and name in _collect()
    except AttributeError as error:  # in a layer file; let through, it would read as "no such name" to its caller
        raise ImportError(f"archzoo.layers cannot be imported: {error}") from error
    if known:
        return _exports[name]
    raise AttributeError(f"module 'archzoo.layers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_collect())
