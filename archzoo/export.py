"""Models with layers of the zoo in other runtimes, by ONNX.

`torch.export.export(model, args)` needs nothing from here: a graph has the layers' custom ops, `archzoo::basis_linear`
and the like, which run where archzoo is imported. ONNX has no such ops, so `export_onnx` writes their definitions.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.kernels import use_backend
from archzoo.kernels._op import definitions

__all__ = ["export_onnx"]


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
) -> Path:
    """Writes a model in evaluation mode as an ONNX file, with the ops of our layers in plain definitions.

    Args:
        model: The model, which is left as it is.
        args: Inputs to trace it with, by position.
        path: The file. Weights beyond 2 GB go into files beside it.
        kwargs: Inputs by name.
        dynamic_shapes: As of `torch.export.export`: which sizes may differ. None: none.
        opset_version: Of ONNX; None: torch's own choice.

    Returns:
        The path.

    Raises:
        ImportError: If onnx or onnxscript is not installed.
        ValueError: If the model has an op that ONNX has not; names it, and the module that calls it.
    """
    try:
        importlib.import_module("onnxscript")  # now: torch imports it late, and then tells less
    except ImportError as error:
        raise ImportError(f"export_onnx needs onnx and onnxscript ({error}): pip install 'archzoo[onnx]'") from error
    from torch.onnx import OnnxExporterError

    modes = {module: module.training for module in model.modules()}
    try:
        with use_backend("torch"), definitions():
            program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    finally:
        for module, mode in modes.items():
            module.training = mode
    program = program.run_decompositions({torch.ops.aten.copysign.Tensor: _copysign})
    try:
        # Not optimized: torch 2.14's optimizer loses nodes where a batch's size may differ. Runtimes optimize anyway.
        converted = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset_version, optimize=False)
    except OnnxExporterError as error:
        raise ValueError(f"model: {_what_is_missing(error, program)}") from error
    assert converted is not None
    converted.save(path)
    return Path(path)


def _copysign(x: Tensor, sign: Tensor) -> Tensor:
    """`torch.copysign`, whose own decomposition asks for a bit: 1 / -0 is below 0."""
    return torch.where((sign < 0) | (sign.reciprocal() < 0), -x.abs(), x.abs())


def _what_is_missing(error: BaseException, program: torch.export.ExportedProgram) -> str:
    """In words: the op that ONNX has not, and the module that calls it."""
    told: BaseException | None = error
    while told is not None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(told))
        if found:
            part = found[1].rpartition(".")[2]  # prims.digamma is a part of aten.special_digamma
            nodes = [n for n in program.graph.nodes if "".join(str(n.target).split(".")[1:2]).endswith(part)]
            name = ".".join(str(nodes[0].target).split(".")[:2]) if nodes else found[1]
            modules = list(nodes[0].meta.get("nn_module_stack", {}).values()) if nodes else []
            where = f", which {modules[-1][0] or 'the model itself'} calls," if modules else ""
            return f"op {name}{where} has no equivalent in ONNX; swap that layer for another before the export"
        told = told.__cause__
    return f"it cannot be converted ({error})"
