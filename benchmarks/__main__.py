"""`python -m benchmarks NAME …` runs the `main` of `benchmarks/NAME.py`; without a name it lists them."""

import importlib
import pkgutil
import sys
from pathlib import Path

import benchmarks
from benchmarks._checkout import make_importable, make_tests_importable

# `python -m` puts the working folder first in sys.path, and ours holds a folder `kernels` (see train.py).
root = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
make_importable()
make_tests_importable()


def main() -> int:
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print("usage: python -m benchmarks NAME\n")
        for name in names:
            doc = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
            print(f"  {name:20} {doc.strip().splitlines()[0]}")
        return 2
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
