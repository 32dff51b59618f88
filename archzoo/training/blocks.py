"""The repeated blocks of a model, as a transformer's: what memory is saved by."""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with parameters of which a list or a sequence holds several of one class, outermost ones only."""
    for container in model.children():
        blocks = list(container.children()) if isinstance(container, nn.ModuleList | nn.Sequential) else []
        repeated = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if repeated and any(True for _ in blocks[0].parameters()):
            yield from blocks
        else:
            yield from repeated_blocks(container)


def recompute(model: nn.Module) -> None:
    """Has every block keep its input alone for the backward pass, and compute the rest again then (arXiv 1604.06174).

    Changes no number: what was drawn, as dropout, is drawn again as it was.

    Raises:
        ValueError: If the model has no blocks.
    """
    blocks = list(repeated_blocks(model))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks of one class, which could be computed again")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
