"""What every line of a benchmark says of where it was measured."""

import os
import platform
from typing import Any

import torch

from archzoo.training.run import cpu_name, git_state


def environment() -> dict[str, Any]:
    state = git_state() or {}
    return {
        "commit": str(state.get("commit", ""))[:12] + ("+" if state.get("dirty") else ""),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
