"""Compiles what the Triton kernels would launch, for GPUs that are not here: one JSON line a kernel and GPU.

    python -m tests.kernels.compile_kernels [--all] [OP ...]

Every `BlockSizes` of every op does its problems on the `meta` device, at its own sizes and at those of the committed
table, and those of `compile_variants.py`, each of these for one of the GPUs, or with `--all` for all. Instead of being
started, kernels are noted, with the types and divisibilities of their arguments, and compiled by Triton and its ptxas.
Never with TRITON_INTERPRET=1. Takes 0.5 to 3 s of CPU a kernel, on all cores; nothing where Triton's cache has it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from archzoo.kernels import _block_sizes, _triton
from tests.kernels import helpers_kernel
from tests.kernels.compile_variants import VARIANTS

CAPABILITIES = (80, 90, 100)
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}

Job = tuple[str, str, str, dict[str, str], dict[str, Any], list[int], dict[str, int], int]
"""Op and problem, module and name of the kernel, signature, constexprs, arguments divisible by 16, options, GPU."""


def sizes_of(blocks: _block_sizes.BlockSizes, capability: int) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    """The op's own problems, and those of the table."""
    for dtype in _block_sizes.TUNED_DTYPES:
        yield from ((dtype, sizes) for sizes in blocks.sizes)
    for key in _block_sizes._table().get(blocks.op, {}):
        gpu, dtype, sizes = key.split()
        if gpu == f"sm{capability}":
            yield getattr(torch, dtype), tuple(map(int, sizes.split("x")))


def described(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Signature, constexprs, arguments divisible by 16, and options, as Triton's launcher would have them."""
    options = {name: constants[name] for name in _triton.OPTIONS if name in constants}
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in constants.items() if k not in options}
    assert set(given) == set(kernel.arg_names), f"{kernel.__name__}: {set(kernel.arg_names) ^ set(given)}"
    signature, constexprs, divisible = {}, {}, []
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        known = parameter.is_constexpr or value is None
        if known or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                divisible.append(index)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i1" if isinstance(value, bool) else "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(index)
    return signature, constexprs, divisible, options


def jobs(ops: list[str], every_variant: bool) -> list[Job]:
    """What the ops would launch, each once; by default the GPUs have the variants by turns."""
    found: dict[str, Job] = {}
    where = ""
    capability = 0

    def note(kernel: Any, grid: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        signature, constexprs, divisible, options = described(kernel, args, constants)
        text = repr((kernel.__module__, kernel.__name__, signature, constexprs, divisible, options, capability))
        job = (where, kernel.__module__, kernel.__name__, signature, constexprs, divisible, options, capability)
        found.setdefault(text, job)

    _triton._start = note
    _block_sizes._capability = lambda device: capability
    known = _block_sizes.all_tuned()
    for capability in CAPABILITIES:
        for op in ops or known:
            for dtype, sizes in sizes_of(known[op], capability):
                where = f"{op} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}"
                known[op].problem(dtype, torch.device("meta"), *sizes)()
            for number, (where, run) in enumerate(VARIANTS.get(op, tuple)()):
                if every_variant or number % len(CAPABILITIES) == CAPABILITIES.index(capability):
                    where = f"{op} {where}"
                    run()
        where = "the helpers of kernels/_triton.py"
        for dtype in () if ops else (torch.float32, torch.bfloat16):
            helpers_kernel.run(torch.empty(32, 32, dtype=dtype, device="meta"), approximate=dtype == torch.float32)
    return list(found.values())


def compiled(job: Job) -> dict[str, Any]:
    """Compiles one, and reads what it uses."""
    where, module, name, signature, constexprs, divisible, options, capability = job
    kernel = getattr(sys.modules[module], name)
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
    report = {"problem": where, "kernel": f"{module}.{name}", "sm": capability, "options": options}
    report["constexprs"] = {k: v for k, v in constexprs.items() if isinstance(v, int | float | bool | str)}
    try:
        source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        usage = resources(result.asm["cubin"])
    except Exception as error:  # whatever the compiler raises goes into this kernel's report; the others go on
        return {**report, "error": f"{type(error).__name__}: {error}"}
    wgmma = "wgmma" in result.asm["ptx"] or "tcgen05.mma" in result.asm["ptx"]
    memory = {"shared": result.metadata.shared, "tensor_memory": result.metadata.tmem_size or 0}
    return {**report, **memory, "tensor_cores": wgmma, **usage}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and its bytes of stack and local memory, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {"registers": int(used["REG"]), "stack": int(used["STACK"]), "local": int(used["LOCAL"])}


def main() -> None:
    """Compiles, and prints."""
    if _triton.INTERPRET:
        raise SystemExit("compile_kernels: kernels are not compiled with TRITON_INTERPRET=1; unset it")
    todo = jobs([word for word in sys.argv[1:] if word != "--all"], "--all" in sys.argv)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        for report in pool.map(compiled, todo):
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
