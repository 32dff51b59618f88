"""How a model is spread over several processes, or put together again: DistributedDataParallel, or FSDP2.

What is sharded has a part of every parameter, as a DTensor, in each process, and whole ones only while they are needed.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from archzoo.tasks.task import Task
from archzoo.training.blocks import repeated_blocks
from archzoo.training.distributed import copy_from_rank_0, initialized, world_size


class Objective(nn.Module):
    """A model's loss as a module: what is wrapped, so that the model itself stays as it is.

    Tasks and models may ask more of a model than its forward pass; here it is all inside of one.

    Args:
        model: The model.
        loss: Of a batch that it knows.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, targets: Tensor) -> Tensor:
        """The loss, a scalar."""
        return self.loss(targets)


def replicate(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> nn.parallel.DistributedDataParallel:
    """The loss, whose gradients are averaged over all processes; parameters and buffers become rank 0's.

    Parameters that take no part in a step are looked for: layers that select among candidates have some. So gradients
    also keep the places in the messages that they have from the first step on, and a resumed run adds up in the order
    of one that was never interrupted.
    """
    objective = Objective(model, loss)
    # Never used: DistributedDataParallel, which looks for parameters that are not, warns where it finds none.
    objective.unused = nn.Parameter(torch.zeros((), device=next(model.parameters()).device))
    return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)


# ---- a part of every parameter in each process


def asks_more(task: Task, model: nn.Module) -> bool:
    """Whether the training loss asks the model for more than its output, as derivatives or another method's result."""
    return type(task).training_loss is not Task.training_loss or hasattr(model, "training_loss")


def shard(model: nn.Module, device: torch.device, by_blocks: bool = True) -> None:
    """Spreads every parameter over all processes, in place (FSDP2): blocks one by one, and the rest together.

    The model need not fit the device: it is moved there part by part.

    A block (`repeated_blocks`) that has a `regularization_loss()` of its own is left to the rest, whose parameters are
    there as long as the loss is computed; so is one with an `update_grid()`, or inside of what has one, for that method
    may call it.

    Args:
        model: Its parameters and buffers become rank 0's.
        device: Of this process.
        by_blocks: False: no block is spread by itself, so that methods of theirs may be called too.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(model, device)
    shared = _shared_parameters(model)
    gridded = {inner for outer in model.modules() if hasattr(outer, "update_grid") for inner in outer.modules()}
    for block in repeated_blocks(model) if by_blocks else ():
        asked = any(hasattr(module, "regularization_loss") or module in gridded for module in block.modules())
        if not asked and not any(p in shared for p in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def shard_objective(model: nn.Module, device: torch.device, loss: Callable[[Tensor], Tensor]) -> Objective:
    """The same for a model that is asked for more than its output: the loss, to be called in place of the given one.

    All of the model is there while the loss is computed and differentiated, whatever method it calls and whatever it
    differentiates by. A call of the model elsewhere puts it together too, for as long as until `reshard`.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    root = Objective(model, loss)
    fully_shard(root, mesh=_mesh(model, device), reshard_after_forward=False)
    model.register_forward_pre_hook(lambda *_: cast(FSDPModule, root).unshard())
    return root


def _mesh(model: nn.Module, device: torch.device) -> DeviceMesh:
    """All processes, which agree about the model."""
    # Nothing here changes an output in place, which is what it warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    copy_from_rank_0(itertools.chain(model.parameters(), model.buffers()))
    return init_device_mesh(device.type, (world_size(),))


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that two modules or more have, as tied embeddings: they belong to no block."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}


def reshard(root: nn.Module) -> None:
    """Drops the whole parameters that a forward pass without a backward pass has left behind."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, which is all of it unless it is spread; what is written to it is kept."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor, which all processes must ask for."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def whole_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, modules of a sharded model hold plain whole parameters; what is written to them is kept.

    For methods that change parameters in place, as `constrain_()`. What FSDP2 has been told of, as the model and its
    blocks, cannot be called inside.
    """
    if not initialized():
        yield
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    held: list[tuple[nn.Module, str, DTensor]] = [
        (module, name, parameter)
        for outer in dict.fromkeys(modules)
        for module in outer.modules()
        for name, parameter in cast(dict[str, Any], module._parameters).items()
        if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in held:
        full = nn.Parameter(parameter.full_tensor().detach().clone(), requires_grad=parameter.requires_grad)
        module._parameters[name] = full
    try:
        yield
    finally:
        for module, name, parameter in held:
            changed = cast(Tensor, module._parameters[name]).detach()
            own = distribute_tensor(changed, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().detach().copy_(own.to_local())
            module._parameters[name] = cast(nn.Parameter, parameter)


@torch.no_grad()
def put_together(plain: nn.Module, model: nn.Module) -> nn.Module:
    """Gives a plain model, on the CPU and of the same structure, all that a sharded one holds, in all processes.

    Also the numbers and texts that the modules have as attributes, for a callback may have set them.
    """
    plain.load_state_dict({name: whole(value).cpu() for name, value in model.state_dict().items()})
    for module, own in zip(model.modules(), plain.modules(), strict=True):
        vars(own).update({k: v for k, v in vars(module).items() if type(v) in (bool, int, float, str)})
    return plain
