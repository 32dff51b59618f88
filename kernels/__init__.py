"""Hot paths: one file an op, its plain-torch definition first. Importable as `archzoo.kernels` only."""

if __name__ != "archzoo.kernels":
    raise ImportError(
        f"this folder is 'archzoo.kernels', but it was imported as {__name__!r}, a name that belongs to another "
        "package; use `from archzoo import kernels`"
    )

from archzoo.kernels._backend import use_backend
from archzoo.kernels._block_sizes import tune
from archzoo.kernels._thresholds import tune_thresholds

__all__ = ["tune", "tune_thresholds", "use_backend"]
