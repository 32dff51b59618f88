"""Trains alternative neural layers beside the usual ones: `python train.py experiment=digits`."""

import sys
from pathlib import Path

# A script's own folder comes first in sys.path, and ours holds a folder `kernels`: another library would take it for
# the package of that name. archzoo itself is installed, and found without it.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

try:
    from archzoo.training.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}: install archzoo first, with pip install -e '.[train]'")

if __name__ == "__main__":
    sys.exit(main())
