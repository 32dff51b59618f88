"""The training loop: plain torch, to be read from top to bottom.

Every module that has a `regularization_loss()` adds it to the loss, and every module that has a `constrain_()` is
constrained after each optimizer step; nothing else is expected of a layer. What replaces parameters during training, as
a callback that refines grids, calls `Trainer.rebuild_optimizer`.
"""

import itertools
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.tasks.task import Task
from archzoo.training.build import Schedule, build_optimizer, carry_over, resolve_device, total_steps
from archzoo.training.callbacks import Callback
from archzoo.training.checkpoint import (
    CheckpointError,
    get_random_state,
    get_state,
    set_model_state,
    set_optimizer_state,
    set_random_state,
)
from archzoo.training.config import ConfigError, TrainConfig, optimizer_errors, stacking_errors
from archzoo.training.data import BatchOrder, eval_batches, train_batches
from archzoo.training.diagnose import Divergence, diagnose

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Diverged(RuntimeError):
    """The loss is not finite any more."""

    def __init__(self, divergence: Divergence):
        super().__init__(str(divergence))
        self.divergence = divergence


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class Trainer:
    """Trains one model on one task.

    Args:
        config: The run's configuration, validated.
        task: The task with its data.
        model: The model, freshly built; it is moved to the device.
        callbacks: Called in this order.
        record: Called with every line of metrics: a step, and what was measured there.
        record_text: Called with every line of texts, which a callback has for people to read: a step, and texts.
        save: Called with the trainer when a checkpoint is due.
        should_stop: Looked at once a step; true ends the run after it has been saved.
        progress: Called after every step with (step, fraction of the budget spent).

    Raises:
        ConfigError: If the optimizer cannot be had, or not with the other settings.

    Attributes:
        model: The model that is trained.
        optimizer: Its optimizer.
        step: Optimizer steps done.
        inputs: Inputs of the last forward pass, on the device.
        regularization_factor: Multiplies the layers' `regularization_loss()`; callbacks may set it.
        best: Metrics of the evaluation with the best validation score, with its `step`; None before the first. Where
            the model's structure has changed, of those since.
        last: Metrics of the last evaluation.
        changed_at: Steps done when the model's structure last changed; None if it never did.
        step_times: Seconds of every step of this process, evaluations and logging left out.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        model: nn.Module,
        callbacks: Iterable[Callback] = (),
        *,
        record: Callable[[dict[str, float]], None] = lambda line: None,
        record_text: Callable[[dict[str, Any]], None] = lambda line: None,
        save: Callable[["Trainer"], None] = lambda trainer: None,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, float], None] = lambda step, spent: None,
    ):
        t = config.trainer
        if errors := [*optimizer_errors(config), *stacking_errors(config, task.seeds)]:
            raise ConfigError("\n".join(errors))
        self.config, self.task, self.callbacks = config, task, list(callbacks)
        self.record, self.record_text = record, record_text
        self.save, self.should_stop, self.progress = save, should_stop, progress
        self.device = resolve_device(t.device)
        self.dtype = torch.float64 if t.precision == "float64" else torch.float32
        self.model = model.to(self.device, self.dtype)
        if t.compile:
            self.model.compile()
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type) if t.precision == "float16" else None
        self.metrics = task.metrics().to(self.device)
        self.restart_average()

        examples = len(task.train)  # type: ignore[arg-type]  # every split has a length
        self.order = BatchOrder(
            examples,
            t.batch_size,
            seed=config.seed,
            shuffle=not (task.stream or t.overfit_batches),
            batches_per_epoch=t.overfit_batches or t.limit_batches,
        )
        self.steps_per_epoch = self.order.batches_per_epoch / t.accumulate
        self.total_steps = total_steps(config, task, self.steps_per_epoch)
        self.schedule = self._schedule()
        self.eval_every = t.eval_every or max(1, (self.total_steps or 10_000) // 20)
        self.checkpoint_every = t.checkpoint_every or self.eval_every

        self._find_modules()
        self.regularization_factor = 1.0
        self.step, self.inputs = 0, torch.empty(0)
        self.elapsed_before, self.started = 0.0, time.perf_counter()
        self.aside = 0.0  # seconds of those elapsed in which nothing was trained
        self.evaluations: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.changed_at: int | None = None
        self.step_times = array("d")

    # ---- what is asked of a run while it goes on

    def elapsed(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def trained(self) -> float:
        """Seconds of training so far without evaluations, and what callbacks do at them, and checkpoints."""
        return self.elapsed() - self.aside

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The clock of `trained` stands still inside."""
        if self.device.type == "cuda":  # steps that are still in the queue are training
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.aside += time.perf_counter() - began

    def spent(self) -> float:
        """Fraction of the training budget that is spent."""
        if self.total_steps is not None:
            return self.step / self.total_steps
        return min(1.0, self.elapsed() / (self.config.trainer.seconds or 1.0))

    @property
    def last(self) -> dict[str, float] | None:
        """Metrics of the last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    # ---- what a callback that changes the model calls

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
        self.ema = None
        if (decay := self.config.trainer.ema_decay) is not None:
            import timm.utils

            self.ema = timm.utils.ModelEmaV3(self.model, decay=decay)  # type: ignore[attr-defined]

    def rebuild_optimizer(self) -> None:
        """Takes up the model as it is now: parameters were replaced, added, removed, frozen or freed.

        A new optimizer of the same configuration goes on at the present learning rate. It keeps the moments of every
        Parameter that is still the same object; L-BFGS, whose memory is of all of them, starts afresh. So does the
        moving average, as a copy of the model, and so does the search for the best evaluation: weights from before
        the change do not fit the model any more. Evaluations from before stay in `evaluations`.

        Raises:
            ValueError: If the model is wrapped in DistributedDataParallel, which goes on with the old parameters.
        """
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model: DistributedDataParallel reduces the gradients of the parameters it was built with; a model "
                "that changes its structure cannot be wrapped in it"
            )
        old, self.optimizer = self.optimizer, build_optimizer(self.config.optimizer, self.model)
        self.schedule = self._schedule()
        carry_over(old, self.optimizer)
        self._find_modules()
        self.restart_average()
        self.best, self.best_weights, self.changed_at = None, {}, self.step

    def _schedule(self) -> Schedule:
        return Schedule(self.config.scheduler, self.optimizer, self.total_steps or 1000)

    def _parameters(self) -> list[tuple[int, bool]]:
        """Differs where the optimizer must be rebuilt: it keeps the old parameters alive, so that no id comes twice."""
        return [(id(p), p.requires_grad) for p in self.model.parameters()]

    def _find_modules(self) -> None:
        self.regularized = [m for m in self.model.modules() if callable(getattr(m, "regularization_loss", None))]
        self.constrained = [m for m in self.model.modules() if callable(getattr(m, "constrain_", None))]

    # ---- the loop

    def fit(self) -> None:
        """Trains until the budget is spent.

        Raises:
            Diverged: When the loss is not finite.
            Interrupted: When `should_stop` said so; the state is saved.
        """
        log_every = self.config.trainer.log_every
        for callback in self.callbacks:
            callback.on_start(self)
        batches = self._batches()
        self.started = time.perf_counter()
        self.model.train()
        while not self._done():
            began = time.perf_counter()
            loss = self._train_step(batches)
            self.step_times.append(time.perf_counter() - began)
            self.progress(self.step, self.spent())
            if self.step % log_every == 0 or self._done():
                self._check_finite(loss := float(loss))
                self._log({"train/loss": loss, "lr": self.optimizer.param_groups[0]["lr"]})
            evaluate = self.step % self.eval_every == 0 or self._done()
            if evaluate:
                with self._aside():
                    metrics = self._evaluate()
                self._log(metrics)
            stop = self.should_stop()
            if stop or self.step % self.checkpoint_every == 0 or (evaluate and self._done()):
                with self._aside():
                    self.save(self)
            if stop and not self._done():
                raise Interrupted
        for callback in self.callbacks:
            callback.on_end(self)

    def _train_step(self, batches: Iterator[Any]) -> Tensor | float:
        self.schedule.set(self.spent())
        for callback in self.callbacks:
            callback.before_step(self)
        searches = isinstance(self.optimizer, torch.optim.LBFGS)
        total = self._search_step(batches) if searches else self._gradient_step(batches)
        self.optimizer.zero_grad(set_to_none=True)
        for module in self.constrained:
            module.constrain_()  # type: ignore[operator]
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        for callback in self.callbacks:
            callback.after_step(self)
        return total

    def _gradient_step(self, batches: Iterator[Any]) -> Tensor | float:
        accumulate, clip = self.config.trainer.accumulate, self.config.trainer.clip_grad
        total: Tensor | float = 0.0
        for _ in range(accumulate):
            self.inputs, targets = self._to_device(next(batches))
            loss = self._loss(targets)
            if accumulate > 1:
                loss = loss / accumulate
            if self.device.type == "cpu":  # on a GPU, reading the loss would wait for it: there it is read when logged
                self._check_finite(value := loss.item())
                total += value
            else:
                total = total + loss.detach()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return total

    def _search_step(self, batches: Iterator[Any]) -> float:
        """A step of L-BFGS, whose line searches evaluate one batch many times. Returns the loss that it began with."""
        self.inputs, targets = self._to_device(next(batches))
        cuda = self.device.type == "cuda"
        generators = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None
        values: list[float] = []

        def closure() -> Tensor:
            if values:  # the same dropout masks at each evaluation: a search needs a function
                torch.set_rng_state(generators[0])
                if generators[1] is not None:
                    torch.cuda.set_rng_state(generators[1], self.device)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._loss(targets)
            values.append(loss.item())
            if len(values) == 1:  # where a search tries is its own affair
                self._check_finite(values[0])
            loss.backward()
            return loss.detach()

        self.optimizer.step(closure)  # type: ignore[arg-type]  # torch's own hint says float, and its code takes both
        return values[0]

    def _loss(self, targets: Tensor) -> Tensor:
        """The loss of the batch whose inputs are `self.inputs`, regularisation included."""
        with self._autocast():
            loss = self.task.training_loss(self.model, self.inputs, targets)
        for module in self.regularized:
            loss = loss + self.regularization_factor * module.regularization_loss()  # type: ignore[operator]
        return loss

    def _check_finite(self, loss: float) -> None:
        if loss - loss != 0:  # nan or inf
            raise Diverged(diagnose(self, loss))

    def _done(self) -> bool:
        return self.step >= self.total_steps if self.total_steps is not None else self.spent() >= 1.0

    def _batches(self) -> Iterator[Any]:
        t = self.config.trainer
        self.order.start = self.step * t.accumulate
        return train_batches(self.task, self.task.train, self.order, t.workers, pin=self.device.type == "cuda")

    def _to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return self._move(inputs), self._move(targets)

    def _move(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype if t.is_floating_point() else None, non_blocking=True)

    def _autocast(self) -> Any:
        precision = self.config.trainer.precision
        if precision in ("bfloat16", "float16"):
            return torch.autocast(self.device.type, DTYPES[precision])
        return nullcontext()

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self, split: str, model: nn.Module | None = None) -> dict[str, float]:
        """The task's metrics on a split, as `SPLIT/METRIC`."""
        t = self.config.trainer
        model = self.eval_model if model is None else model
        metrics = self.metrics
        metrics.reset()
        was_training = model.training
        model.eval()
        if t.overfit_batches:  # the question is whether these batches can be fitted at all
            order = BatchOrder(self.order.examples, t.batch_size, seed=0, shuffle=False)
            batches: Iterator[Any] = train_batches(self.task, self.task.train, order, workers=0)
            batches = itertools.islice(batches, t.overfit_batches)
        else:
            batches = eval_batches(self.task, getattr(self.task, split), t.eval_batch_size, t.limit_batches)
        for batch in batches:
            inputs, targets = self._to_device(batch)
            with self._autocast():
                output = model(inputs)
            metrics.update(output.to(self.dtype), targets)
        model.train(was_training)
        return {f"{split}/{key}": float(value) for key, value in metrics.compute().items()}

    def _evaluate(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for split in self.task.watched:
            metrics |= self.evaluate(split)
        for callback in self.callbacks:
            callback.on_evaluate(self, metrics)
        key, sign = f"val/{self.task.score}", 1 if self.task.mode == "max" else -1
        self.evaluations.append({"step": float(self.step), **metrics})
        if self.best is None or sign * metrics[key] > sign * self.best[key]:  # never true of a NaN
            self.best = self.evaluations[-1]
            self.best_weights = {k: v.detach().cpu().clone() for k, v in self.eval_model.state_dict().items()}
        return metrics

    def _log(self, metrics: dict[str, float]) -> None:
        epoch = self.step / self.steps_per_epoch
        self.record({"step": self.step, "epoch": epoch, "time_s": self.elapsed(), "train_s": self.trained(), **metrics})

    # ---- what a checkpoint holds

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that is needed to go on bit for bit: tensors by file, and plain JSON."""
        training, numbers = get_state(self.model, self.optimizer)
        tensors = {"training": training, "best": self.best_weights}
        if self.ema is not None:
            tensors["ema"] = {k: v.detach().cpu() for k, v in self.ema.module.state_dict().items()}
        state = {
            "elapsed_s": self.elapsed(),
            "aside_s": self.aside,
            "evaluations": self.evaluations,
            "best": self.best,
            "changed_at": self.changed_at,
            "optimizer": numbers,
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "random": get_random_state(),
            "callbacks": [c.state_dict() for c in self.callbacks],
        }
        return tensors, state

    def load_state(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Takes up what `state` returned.

        Raises:
            CheckpointError: If it is of another model, optimizer or set of callbacks.
        """
        if self.ema is not None and "ema" not in tensors:
            raise CheckpointError("the checkpoint has no moving average, and trainer.ema_decay is set")
        if len(state["callbacks"]) != len(self.callbacks):
            raise CheckpointError("the checkpoint was written with other callbacks")
        callback_states = list(zip(self.callbacks, state["callbacks"], strict=True))
        built = self._parameters()
        for callback, callback_state in callback_states:
            callback.restore(self.model, callback_state)
        set_model_state(self.model, tensors["training"])
        if self._parameters() != built:  # replaced or frozen, by a callback or by a layer as it was loaded
            self.rebuild_optimizer()
        set_optimizer_state(self.model, self.optimizer, tensors["training"], state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        self.step, self.elapsed_before = int(state["step"]), float(state["elapsed_s"])
        self.evaluations, self.best, self.best_weights = state["evaluations"], state["best"], tensors["best"]
        self.changed_at, self.aside = state.get("changed_at"), float(state.get("aside_s", 0.0))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for callback, callback_state in callback_states:
            callback.load_state_dict(callback_state)
        set_random_state(state["random"])
