"""The training loop: plain torch, to be read from top to bottom.

Every module that has a `regularization_loss()` adds it to the loss, and every module that has a `constrain_()` is
constrained after each optimizer step; nothing else is expected of a layer. What replaces parameters during training, as
a callback that refines grids, does so inside `Trainer.restructuring`.
"""

import copy
import itertools
import logging
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.tasks.task import Task
from archzoo.training import distributed, spreading
from archzoo.training.build import example_batch, total_steps
from archzoo.training.callbacks import Callback
from archzoo.training.checkpoint import (
    CheckpointError,
    get_random_state,
    get_state,
    get_weights,
    set_model_state,
    set_optimizer_state,
    set_random_state,
    set_weights,
)
from archzoo.training.config import (
    ConfigError,
    TrainConfig,
    optimizer_errors,
    process_errors,
    stacking_errors,
)
from archzoo.training.data import BatchOrder, eval_batches, train_batches
from archzoo.training.diagnose import BadSteps, Divergence, diagnose
from archzoo.training.placing import Placed

log = logging.getLogger("archzoo")


class Diverged(RuntimeError):
    """The loss or its gradients are not finite any more."""

    def __init__(self, divergence: Divergence):
        super().__init__(str(divergence))
        self.divergence = divergence


class _LeftOut(Exception):
    """Leaves an optimizer's step before it has changed anything."""


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class Trainer(Placed):
    """Trains one model on one task.

    In a process group each process has a Trainer, with the same arguments but for what is called with its state: the
    batches of the configuration are of all processes together, and each takes its part of them.

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

    Attributes, with those of `Placed`:
        step: Optimizer steps done.
        inputs: Inputs of the last forward pass, on the device.
        regularization_factor: Multiplies the layers' `regularization_loss()`; callbacks may set it.
        last: Metrics of the last evaluation.
        step_times: Seconds of every step of this process, evaluations and logging left out.
        bad: The steps that were left out, for their loss or gradients were not finite.
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
        processes = distributed.world_size()
        sizes = [len(getattr(task, split)) for split in ("train", "val", "test")]
        wrong = itertools.chain(
            optimizer_errors(config),
            stacking_errors(config, task.seeds),
            process_errors(config, processes if distributed.initialized() else 0, min(sizes)),
        )
        if errors := list(wrong):
            raise ConfigError("\n".join(errors))
        super().__init__(config, task, callbacks)
        self.record, self.record_text = record, record_text
        self.save, self.should_stop, self.progress = save, should_stop, progress
        self.order = BatchOrder(
            sizes[0],
            t.batch_size,
            seed=config.seed,
            shuffle=not (task.stream or t.overfit_batches),
            batches_per_epoch=t.overfit_batches or t.limit_batches,
            rank=self.rank,
            world_size=self.processes,
        )
        self.steps_per_epoch = self.order.batches_per_epoch / t.accumulate
        self.total_steps = total_steps(config, task, self.steps_per_epoch)
        self._begin(model)
        self.scaler = torch.amp.GradScaler(self.device.type) if t.precision == "float16" else None
        self.metrics = task.metrics().to(self.device)

        self.eval_every = t.eval_every or max(1, (self.total_steps or 10_000) // 20)
        self.checkpoint_every = t.checkpoint_every or self.eval_every

        self.regularization_factor = 1.0
        self.step, self.inputs = 0, torch.empty(0)
        self.elapsed_before, self.started = 0.0, time.perf_counter()
        self.aside = 0.0  # seconds of those elapsed in which nothing was trained
        self.evaluations: list[dict[str, float]] = []
        self.step_times = array("d")
        self.bad = BadSteps(self)
        self._clock = 0.0  # seconds of training at the end of the last step, as all processes have agreed
        if self.rank:  # as dropout, which is not to be the same in every part of a batch
            torch.manual_seed(distributed.own_seed(config.seed, 0))

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
        elapsed = self.elapsed() if self.processes == 1 else self._clock
        return min(1.0, elapsed / (self.config.trainer.seconds or 1.0))

    @property
    def last(self) -> dict[str, float] | None:
        """Metrics of the last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    # ---- the loop

    def fit(self) -> None:
        """Trains until the budget is spent.

        A step whose loss or gradients are not finite is left out: it counts, and changes nothing. Whatever is saved
        has finite parameters.

        Raises:
            Diverged: After `trainer.max_bad_steps` of these in a row, or half of a run that is shorter.
            Interrupted: When `should_stop` said so; the state is saved.
        """
        log_every, most_bad = self.config.trainer.log_every, self.bad.most()
        for callback in self.callbacks:
            callback.check(self.config, self.task, self.model)
            callback.on_start(self)
        batches = self._batches()
        self.started = time.perf_counter()
        self.model.train()
        while not self._done():
            began = time.perf_counter()
            loss = self._train_step(batches)
            self.step_times.append(time.perf_counter() - began)
            if most_bad and self.bad.in_a_row >= most_bad and self.bad.first is not None:
                raise Diverged(self.bad.first)
            stop = self.should_stop()
            if self.processes > 1:
                asked, self._clock = distributed.exchange(stop, self.elapsed())
                stop = bool(asked)
            self.progress(self.step, self.spent())
            if self.step % log_every == 0 or self._done():
                loss = float(loss)
                if not most_bad:
                    self._check_finite(loss)
                self._log({"train/loss": loss, "lr": self.optimizer.param_groups[0]["lr"]})
            evaluate = self.step % self.eval_every == 0 or self._done()
            if evaluate:
                with self._aside():
                    metrics = self._evaluate()
                self._log(metrics)
            due = stop or self.step % self.checkpoint_every == 0 or (evaluate and self._done())
            if due and self.bad.is_sound():
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
        if self.bad.in_a_row:
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            return total
        self.optimizer.zero_grad(set_to_none=True)
        if self.constrained:
            self._constrain()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        for callback in self.callbacks:
            callback.after_step(self)
        return total

    def _gradient_step(self, batches: Iterator[Any]) -> Tensor | float:
        accumulate, clip = self.config.trainer.accumulate, self.config.trainer.clip_grad
        total: Tensor | float = 0.0
        for left in reversed(range(accumulate)):
            self.inputs, targets = self._to_device(next(batches))
            with self._averaging(now=left == 0):
                loss = self.objective(targets)
                if accumulate > 1:
                    loss = loss / accumulate
                if self.processes > 1:
                    loss = loss * self._share()
                # On a GPU, reading the loss would wait for it: there it is read when logged.
                total = total + (loss.item() if self.device.type == "cpu" else loss.detach())
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.processes > 1:
            total = distributed.mean(total)
        norm: Tensor | None = None
        if clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if self.bad.found(total, norm) and self.scaler is None:
            return total
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return total

    def _share(self) -> float:
        """What this process's mean over its part of a batch counts in the mean over processes."""
        return len(self.inputs) * self.processes / min(self.order.batch_size, self.order.examples)

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
            loss = self.objective(targets)
            if self.processes > 1:
                loss = loss * self._share()
            loss.backward()
            whole = distributed.mean(loss.detach())
            values.append(whole.item())
            if len(values) == 1 and self.bad.found(values[0]):  # where a search tries is its own affair
                raise _LeftOut
            return whole

        with suppress(_LeftOut):
            self.optimizer.step(closure)  # type: ignore[arg-type]  # torch's hint says float, and its code takes both
        return values[0]

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
        distributed.copy_from_rank_0(model.buffers())  # as running statistics, which each process has of its own part
        parts = {"rank": self.rank, "world_size": self.processes}
        if t.overfit_batches:  # the question is whether these batches can be fitted at all
            order = BatchOrder(self.order.examples, t.batch_size, seed=0, shuffle=False, **parts)
            batches: Iterator[Any] = train_batches(self.task, self.task.train, order, workers=0)
            batches = itertools.islice(batches, t.overfit_batches)
        else:
            batches = eval_batches(self.task, getattr(self.task, split), t.eval_batch_size, t.limit_batches, **parts)
        done = 0
        for batch in batches:
            inputs, targets = self._to_device(batch)
            with self._autocast():
                output = model(inputs)
            metrics.update(output.to(self.dtype), targets)
            done += 1
        if self.sharded:  # every process gathers the parameters as often as the one that has the most batches
            for _ in range(done, int(distributed.exchange(done)[0])):
                model(self._move(example_batch(self.task, 1)))
            spreading.reshard(self.root if model is self.model else model)
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
        finite = math.isfinite(metrics[key])
        if finite and (self.best is None or sign * metrics[key] > sign * self.best[key]):
            self.best = self.evaluations[-1]
            self.best_weights = get_weights(self.eval_model, self.sharded)
        return metrics

    def test(self) -> tuple[dict[str, float], nn.Module, dict[str, Tensor]]:
        """Evaluates the weights of the best evaluation, if there is one, on the test split. Training must be over.

        Returns:
            The metrics; the model, a copy unless it is sharded; its weights, of a sharded model in rank 0 only.
        """
        final = self.eval_model if self.sharded else copy.deepcopy(self.eval_model)
        if self.best is not None:
            set_weights(final, self.best_weights, self.sharded)
        return self.evaluate("test", final), final, get_weights(final, self.sharded)

    def _log(self, metrics: dict[str, float]) -> None:
        epoch = self.step / self.steps_per_epoch
        self.record({"step": self.step, "epoch": epoch, "time_s": self.elapsed(), "train_s": self.trained(), **metrics})

    # ---- what a checkpoint holds

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that is needed to go on bit for bit: tensors by file, and plain JSON.

        All processes of a group must ask for it; what rank 0 gets is the whole.
        """
        training, numbers = get_state(self.model, self.optimizer)
        tensors = {"training": training, "best": self.best_weights}
        if self.ema is not None:
            tensors["ema"] = get_weights(self.ema.module, self.sharded)
        random = distributed.collect(get_random_state())
        state = {
            "elapsed_s": self.elapsed(),
            "aside_s": self.aside,
            "evaluations": self.evaluations,
            "best": self.best,
            "changed_at": self.changed_at,
            "bad_steps": self.bad.count,
            "optimizer": numbers,
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "random": random[0] if random else {},
            "callbacks": [c.state_dict() for c in self.callbacks],
        }
        if self.processes > 1:
            state |= {"processes": self.processes, "random_of_ranks": random}
        return tensors, state

    def load_state(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Takes up what `state` returned to rank 0, also at another number of processes.

        With as many as before, a run goes on bit for bit. With others, batches are the same and are divided otherwise,
        and what a process draws, as dropout, begins anew.

        Args:
            tensors: Of rank 0; the other processes' does not count.
            state: The same in all processes.

        Raises:
            CheckpointError: If it is of another model, optimizer or set of callbacks.
        """
        if not self.sharded:
            tensors = distributed.share_tensors(tensors)
        if self.ema is not None and "ema" not in tensors and (self.rank == 0 or not self.sharded):
            raise CheckpointError("the checkpoint has no moving average, and trainer.ema_decay is set")
        if len(state["callbacks"]) != len(self.callbacks):
            raise CheckpointError("the checkpoint was written with other callbacks")
        callback_states = list(zip(self.callbacks, state["callbacks"], strict=True))
        training, built = tensors.get("training", {}), self._parameters()
        changed = self.sharded and state.get("changed_at") is not None
        with self.restructuring() if changed else nullcontext():
            for callback, callback_state in callback_states:
                callback.restore(self.model, callback_state)
            own = distributed.share_tensors({"training": training})["training"] if changed else training
            set_model_state(self.model, own, self.sharded and not changed)
        if not self.sharded and self._parameters() != built:  # replaced or frozen, by a callback or in loading
            self.rebuild_optimizer()
        set_optimizer_state(self.model, self.optimizer, training, state["optimizer"], self.sharded)
        if self.ema is not None:
            set_weights(self.ema.module, tensors.get("ema", {}), self.sharded)
        self.step, self.elapsed_before = int(state["step"]), float(state["elapsed_s"])
        self.evaluations, self.best, self.best_weights = state["evaluations"], state["best"], tensors.get("best", {})
        self.changed_at, self.aside = state.get("changed_at"), float(state.get("aside_s", 0.0))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for callback, callback_state in callback_states:
            callback.load_state_dict(callback_state)
        self.bad.count, self._clock = state.get("bad_steps", 0), self.elapsed_before
        if (before := state.get("processes", 1)) == self.processes:
            set_random_state(state["random"] if self.processes == 1 else state["random_of_ranks"][self.rank])
        else:
            log.info("processes: it was trained by %d and is by %d now; dropout begins anew", before, self.processes)
            torch.manual_seed(distributed.own_seed(self.config.seed, self.step))
