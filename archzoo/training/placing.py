"""The model in training: on its device or spread over processes, averaged, optimized, and changed by callbacks."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.layers.invertible import ActNorm
from archzoo.tasks.task import Task
from archzoo.training import distributed, spreading
from archzoo.training.averaging import Average
from archzoo.training.build import build_model, recompute_blocks, resolve_device
from archzoo.training.config import TrainConfig
from archzoo.training.data import BatchOrder, train_batches
from archzoo.training.optimizing import Schedule, build_optimizer, carry_over

if TYPE_CHECKING:
    from archzoo.training.callbacks import Callback

log = logging.getLogger("archzoo")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Placed:
    """What a `Trainer` has of its model, and what a callback that changes the model calls.

    Attributes:
        model: The model that is trained.
        ema: Its moving average, if there is one.
        optimizer: Its optimizer.
        schedule: Of the optimizer's learning rate.
        objective: The loss of a batch, by which gradients are averaged over processes.
        root: What FSDP2 takes for the root of a sharded model.
        best: Metrics of the evaluation with the best validation score, with its `step`; None before the first. Where
            the model's structure has changed, of those since.
        best_weights: The weights of that evaluation.
        changed_at: Steps done when the model's structure last changed; None if it never did.
    """

    model: nn.Module
    step: int
    total_steps: int | None
    order: BatchOrder
    inputs: Tensor
    regularization_factor: float

    def __init__(self, config: TrainConfig, task: Task, callbacks: "Iterable[Callback]"):
        t = config.trainer
        self.config, self.task, self.callbacks = config, task, list(callbacks)
        self.rank, self.processes = distributed.rank(), distributed.world_size()
        self.device = resolve_device(t.device)
        self.dtype = torch.float64 if t.precision == "float64" else torch.float32
        self.sharded = t.strategy == "fsdp" and distributed.initialized()
        self.ema: Average | None = None
        self.best: dict[str, float] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.changed_at: int | None = None

    def _begin(self, model: nn.Module) -> None:
        """Takes up the model that was built for the run."""
        model = self._prepared(model)
        if self.processes > 1:
            self._start_from_data(model)
        self._place(model)
        self.optimizer = build_optimizer(self.config.optimizer, self.model)
        self.schedule = self._schedule()
        self._find_modules()

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    @contextmanager
    def restructuring(self) -> Iterator[None]:
        """Inside, parameters of `model` are replaced, added, removed, frozen or freed; `rebuild_optimizer` follows.

        A sharded model is put together for it, on the CPU: `model` is another one inside, built as at the beginning of
        the run and given the structure, the weights and the numbers of this one. It is sharded when it is left.
        """
        if not self.sharded:
            yield
            self.rebuild_optimizer()
            return
        sharded = dict(self.model.named_parameters())
        self.reshard()
        self.model = self.put_together(self.model)
        was = {parameter: sharded[name] for name, parameter in self.model.named_parameters()}
        yield
        kept = {name: was[parameter] for name, parameter in self.model.named_parameters() if parameter in was}
        self._place(self.model)
        self._rebuild({parameter: kept[name] for name, parameter in self.model.named_parameters() if name in kept})

    def rebuild_optimizer(self) -> None:
        """Takes up the model as it is now: parameters were replaced, added, removed, frozen or freed.

        A new optimizer of the same configuration goes on at the present learning rate. It keeps the moments of every
        Parameter that is still the same object; L-BFGS, whose memory is of all of them, starts afresh. So does the
        moving average, as a copy of the model, and so does the search for the best evaluation: weights from before
        the change do not fit the model any more. Evaluations from before stay in `evaluations`. Where several
        processes train the model, parameters and buffers become those of rank 0.

        Raises:
            RuntimeError: If the model is sharded: then only `restructuring` can change its parameters.
        """
        if self.sharded:
            raise RuntimeError("the model is sharded: change its parameters inside `with trainer.restructuring():`")
        self._spread()
        self._average()
        self._rebuild({})

    def _rebuild(self, was: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """The rest of it; some parameters may be others, which have taken the place of those that they were."""
        old, self.optimizer = self.optimizer, build_optimizer(self.config.optimizer, self.model)
        self.schedule = self._schedule()
        carry_over(old, self.optimizer, was)
        self._find_modules()
        self.best, self.best_weights, self.changed_at = None, {}, self.step

    def reset_optimizer_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drops the optimizer's moments of parameters whose values have got another meaning.

        L-BFGS has one memory of them all, which is dropped whole.
        """
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.state.clear()
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)

    def restart_average(self) -> None:
        """Lets the moving average of the weights, if there is one, start again as a copy of the model."""
        if self.ema is not None:
            self.ema.restart(self.model)

    def reshard(self) -> None:
        """Drops whole parameters of a sharded model that a call of it without a backward pass has left behind."""
        if self.sharded:
            spreading.reshard(self.root)

    # ---- where it is

    def _prepared(self, model: nn.Module) -> nn.Module:
        """A model as it was built, on the CPU, with what the configuration asks of its modules.

        On GPUs, batch norms take their statistics over all processes; torch cannot on CPUs, and it is said.
        """
        model.to(self.dtype)
        if self.processes > 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            if self.device.type == "cuda":
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            else:
                log.warning("batch norm: on CPUs, its statistics are of each process's part of a batch")
        if self.config.trainer.checkpoint_activations:
            recompute_blocks(model)
        return model

    def _start_from_data(self, model: nn.Module) -> None:
        """Layers that start from the first batch do so from all of it, as in one process, and not from a part each."""
        if not any(isinstance(module, ActNorm) for module in model.modules()):
            return
        first = next(train_batches(self.task, self.task.train, self.order, workers=0))
        inputs, targets = (distributed.whole_batch(t.to(self.dtype) if t.is_floating_point() else t) for t in first)
        probe = copy.deepcopy(model).train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # the first step draws what it would have drawn
            self.task.training_loss(probe, inputs, targets)
        for module, started in zip(model.modules(), probe.modules(), strict=True):
            if isinstance(module, ActNorm):
                module.load_state_dict(started.state_dict())

    def put_together(self, model: nn.Module) -> nn.Module:
        """A plain copy, on the CPU, of the model or its average where they are sharded; else what is given.

        All processes must ask for it.
        """
        if not self.sharded:
            return model
        with torch.random.fork_rng(devices=[]):  # weights are drawn, only to be replaced
            plain = self._prepared(build_model(self.config, self.task, self.callbacks)[0])
        for callback in self.callbacks:
            callback.restore(plain, callback.state_dict())
        return spreading.put_together(plain, model)

    def _place(self, model: nn.Module) -> None:
        """Brings a plain model to the device, its average with it, and spreads both where there are several processes.

        The average is a copy of the plain model: what is sharded cannot be copied.
        """
        self.model = model if self.sharded else model.to(self.device)
        self._average()
        self._spread()
        if self.config.trainer.compile:
            self.model.compile()

    def _average(self) -> None:
        if (decay := self.config.trainer.ema_decay) is not None:
            self.ema = Average(self.model, decay)

    def _spread(self) -> None:
        """Readies the loss for its gradients to be averaged, where several processes train the model."""
        self.objective: Callable[[Tensor], Tensor] = self._loss
        self.root = self.model
        if self.sharded:
            more = spreading.asks_more(self.task, self.model)
            if more:
                self.objective = self.root = spreading.shard_objective(self.model, self.device, self._loss)
            else:
                spreading.shard(self.model, self.device)
            if self.ema is not None:
                spreading.shard(self.ema.module, self.device, by_blocks=not more)
        elif self.processes > 1:
            self.objective = spreading.replicate(self.model, self._loss)

    def _schedule(self) -> Schedule:
        return Schedule(self.config.scheduler, self.optimizer, self.total_steps or 1000)

    def _find_modules(self) -> None:
        self.regularized = [m for m in self.model.modules() if callable(getattr(m, "regularization_loss", None))]
        self.constrained = [m for m in self.model.modules() if callable(getattr(m, "constrain_", None))]
        self.has_complex = any(p.is_complex() for p in self.model.parameters())

    def _parameters(self) -> list[tuple[int, bool]]:
        """Differs where the optimizer must be rebuilt: it keeps the old parameters alive, so that no id comes twice."""
        return [(id(p), p.requires_grad) for p in self.model.parameters()]

    # ---- what the loop does with it

    def _loss(self, targets: Tensor) -> Tensor:
        """The loss of the batch whose inputs are `self.inputs`, regularisation included."""
        with self._autocast():
            loss = self.task.training_loss(self.model, self.inputs, targets)
        for module in self.regularized:
            loss = loss + self.regularization_factor * module.regularization_loss()  # type: ignore[operator]  # found by it
        return loss

    def _autocast(self) -> Any:
        precision = self.config.trainer.precision
        return torch.autocast(self.device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()

    def _averaging(self, now: bool) -> Any:
        """Where several processes train: whether the gradients of a batch are averaged, or wait for those of others."""
        if self.sharded:
            self.root.set_requires_gradient_sync(now)  # type: ignore[operator]  # a method of what is sharded
        elif not now and isinstance(self.objective, nn.parallel.DistributedDataParallel):
            return self.objective.no_sync()
        return nullcontext()

    def _constrain(self) -> None:
        with spreading.whole_parameters(self.constrained):
            for module in self.constrained:
                module.constrain_()  # type: ignore[operator]  # found by it
