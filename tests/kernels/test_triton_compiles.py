"""Every Triton kernel is compiled for every GPU that counts, on a machine that may have none."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY
from tests.kernels.triton_support import needs_triton

SHARED = {80: 163, 90: 227, 100: 227}
"""Shared memory that a block may have, KiB, by compute capability."""
TENSOR_MEMORY = 512
"""Columns of it that a block may have; for more Triton compiles an empty kernel."""


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("variants", [(), pytest.param(("--all",), marks=pytest.mark.large)], ids=["by turns", "all"])
def test_every_kernel_compiles_for_every_gpu_and_keeps_to_its_registers(variants):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels", *variants],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    faults = [
        report
        for report in reports
        if "error" in report
        or report["stack"]
        or report["local"]
        or report["shared"] > SHARED[report["sm"]] * 1024
        or report["tensor_memory"] > TENSOR_MEMORY
    ]
    assert not faults, "\n".join(map(str, faults))
    for capability in SHARED:
        compiled = {report["kernel"] for report in reports if report["sm"] == capability}
        for file in (REPOSITORY / "kernels").glob("_*_triton.py"):
            for kernel in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE):
                assert f"archzoo.kernels.{file.stem}.{kernel}" in compiled, f"{kernel} for sm_{capability}"
