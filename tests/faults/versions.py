"""A run that was cut off, kept as this version wrote it: `python -m tests.faults.versions` adds that of the format.

There is one of every format that was ever written; it is made once, and never again.
"""

import json
import shutil
import tempfile
from pathlib import Path

from archzoo.training.checkpoint import FORMAT, list_checkpoints
from archzoo.training.config import TrainConfig, from_plain
from archzoo.training.run import execute
from tests.training.support import make_config

GOLDEN = Path(__file__).parent / "golden"


def cut_off(output_dir: Path) -> None:
    """Stops a run of eight steps after four."""
    config = make_config(
        output_dir,
        model={"name": "mlp", "width": 3, "depth": 1, "dropout": 0.2},
        trainer={"steps": 8, "eval_every": 2, "checkpoint_every": 4, "ema_decay": 0.9, "clip_grad": 1.0},
    )
    looks = iter(range(100))
    execute(config, should_stop=lambda: next(looks) == 3)


def config_of(run: Path, output_dir: Path) -> TrainConfig:
    """The configuration of a recorded run, somewhere else."""
    return from_plain(json.loads((run / "run.json").read_text())["config"] | {"output_dir": str(output_dir)})


def main() -> None:
    target = GOLDEN / f"format_{FORMAT}"
    if target.exists():
        raise SystemExit(f"{target}: is there, and stays as it is")
    with tempfile.TemporaryDirectory() as folder:
        cut_off(Path(folder))
        (run,) = Path(folder).iterdir()
        record = json.loads((run / "run.json").read_text())
        record["config"]["output_dir"] = "outputs"
        kept = target / run.name
        shutil.copytree(list_checkpoints(run / "checkpoints")[0], kept / "checkpoints" / "step_00000004")
        shutil.copy(run / "metrics.jsonl", kept)
        (kept / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "machine"}) + "\n")


if __name__ == "__main__":
    main()
