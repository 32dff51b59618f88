"""What a language model writes: text sampled while it is trained, beside the numbers."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from archzoo.models.generation import stream
from archzoo.tasks.options import number, whole_number
from archzoo.tasks.task import Task
from archzoo.training.callbacks import Callback, register_callback
from archzoo.training.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from archzoo.training.loop import Trainer


@register_callback("sample_text")
class SampleText(Callback):
    """Lets the model go on from a prompt, after each evaluation and with the weights that are scored.

    The run's folder gets `samples.jsonl`, a line `{"step": …, "sample": "prompt and what follows"}` an evaluation,
    which W&B and TensorBoard get too, and the run's record the last text as `summary.task.sample`, which the report
    shows. It is written by the model that is evaluated, the moving average where there is one, in the precision of its
    weights. Nothing of it depends on torch's random state, or touches it: training goes on as it would without.

    Args:
        prompt: What the model goes on from; of characters that the task's text has.
        length: How many tokens are drawn.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; null: from all.
        top_p: Draw from the fewest likeliest tokens whose probability adds up to at least this much; null: from all.
        seed: Of the draws, which are the same at every evaluation.
        every_evaluation: False: at the end only.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        prompt: str = "\n",
        length: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        every_evaluation: bool = True,
    ):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompt={prompt!r}: must be a text of one character at least, as prompt='def '")
        whole_number("length", length, 1, 100_000)
        number("temperature", temperature, 0, 100)
        if top_p is not None:
            number("top_p", top_p, 0, 1)
        whole_number("seed", seed, 0, 2**63 - 1)
        if not isinstance(every_evaluation, bool):
            raise ValueError(f"every_evaluation={every_evaluation!r}: must be true or false")
        self.prompt, self.length, self.every_evaluation = prompt, length, every_evaluation
        self.options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        stream(lambda ids: ids, torch.zeros(1, 1, dtype=torch.int64), length, **self.options)  # checks, and draws none

    def check(self, config: TrainConfig, task: Task, model: nn.Module) -> None:
        """A ConfigError if the model cannot write, or the task has no text, or not the prompt's characters."""
        if not callable(getattr(task, "encode", None)) or not callable(getattr(task, "decode", None)):
            name = config.task.get("name")
            raise ConfigError(f"callbacks.sample_text: task {name} has no text; choose task=char_lm or task=text")
        if not callable(getattr(model, "generate", None)):
            name = config.model.get("name")
            raise ConfigError(
                f"callbacks.sample_text: model {name} cannot write text, for it has no generate(); choose "
                "model=decoder, or leave the callback out"
            )
        try:
            task.encode(self.prompt)  # type: ignore[attr-defined]  # looked for above
        except ValueError as error:
            raise ConfigError(f"callbacks.sample_text.prompt={self.prompt!r}: {error}") from error

    def on_evaluate(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """Writes a text."""
        if self.every_evaluation:
            model = trainer.put_together(trainer.eval_model)
            trainer.record_text({"step": trainer.step, "sample": self.sample(trainer, model)})

    def summarize(self, trainer: "Trainer", model: nn.Module) -> dict[str, Any]:
        """The last text."""
        return {"sample": self.sample(trainer, model)}

    def sample(self, trainer: "Trainer", model: nn.Module) -> str:
        """The prompt, and what the model puts behind it."""
        device = next(model.parameters()).device
        prompt = trainer.task.encode(self.prompt).to(device)  # type: ignore[attr-defined]  # checked before
        used = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(used):  # generate() has a generator of its own, and a model might draw besides
            new = list(model.generate(prompt[None], self.length, **self.options))  # type: ignore[operator]  # likewise
        ids = torch.cat([prompt, *new]).cpu()
        return trainer.task.decode(ids)  # type: ignore[attr-defined]  # likewise
