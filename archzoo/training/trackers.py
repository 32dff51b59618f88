"""Mirrors of the local record, fed by the same call: Weights & Biases and TensorBoard.

`metrics.jsonl` and `run.json` are the truth. A mirror never stops a run: what goes wrong with it is said once, and the
run goes on. A mirror that starts late, as after an interruption, is brought up to date from the truth first.
"""

import html
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from archzoo.report.samples import visible
from archzoo.training.config import TrackerConfig
from archzoo.training.pictures import Drawn

log = logging.getLogger("archzoo")
INIT_TIMEOUT = 15  # seconds; wandb's own default is 90


class Tracker(Protocol):
    """One mirror."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl."""

    def log_text(self, line: Mapping[str, Any]) -> None:
        """One line of samples.jsonl: a step, and texts."""

    def log_pictures(self, step: int, pictures: Sequence[Drawn]) -> None:
        """The pictures that were drawn at the end, which is this step."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """The final run.json; closes the mirror."""


def flat_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of run.json that mirrors show beside the curves, under the same names everywhere."""
    figures: dict[str, Any] = {"status": record["status"], "parameters": record["parameters"], "flops": record["flops"]}
    for part in ("timing", "memory"):
        figures |= {f"{part}/{k}": v for k, v in record[part].items()}
    for part in ("best", "test", "task"):
        figures |= {f"{part}/{k}": v for k, v in (record["summary"].get(part) or {}).items()}
    if record.get("score"):
        figures["score"] = record["score"]["value"]
    return {k: v for k, v in figures.items() if v is not None}


class WandbTracker:
    """A W&B run, offline or online.

    The run's id is that of the run folder, so that the same run resumed is the same W&B run. Offline, the files of an
    interrupted try are replaced by ones that tell the whole story, for W&B keeps every line ever logged.
    """

    def __init__(
        self,
        config: TrackerConfig,
        folder: Path,
        record: Mapping[str, Any],
        history: list[dict[str, Any]],
        texts: list[dict[str, Any]],
    ):
        import wandb

        offline = config.wandb == "offline"
        if offline:
            for old in folder.glob("wandb/offline-run-*"):
                shutil.rmtree(old, ignore_errors=True)
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        options: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "group": record["experiment"],
            "name": record["name"],
            "id": record["run_id"],
            "tags": [record["layer"], record["task"], *config.tags],
            "config": record["config"],
            "dir": str(folder),
            "settings": settings,
        }
        try:
            self.run = wandb.init(mode=config.wandb, resume=None if offline else "allow", **options)  # type: ignore[arg-type]
        except Exception as error:  # wandb raises many kinds; none of them may stop a run
            log.warning("W&B is not reachable (%s): this run is recorded offline", error)
            self.run = wandb.init(mode="offline", **options)
        known = 0 if self.run.settings.mode == "offline" else int(self.run.step or 0)
        # In one order: W&B takes no step that lies behind one that it has.
        told = [*((line, self.log_text) for line in texts), *((line, self.log) for line in history)]
        for line, log_line in sorted(told, key=lambda entry: int(entry[0]["step"])):
            if not known or line["step"] > known:
                log_line(line)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Logs a line at its step."""
        self.run.log(dict(metrics), step=int(metrics["step"]))

    def log_text(self, line: Mapping[str, Any]) -> None:
        """Logs texts at their step, as they are typed."""
        import wandb

        pages = {
            key: wandb.Html(f"<pre>{html.escape(visible(text))}</pre>", inject=False)
            for key, text in line.items()
            if key != "step"
        }
        self.run.log(pages, step=int(line["step"]))

    def log_pictures(self, step: int, pictures: Sequence[Drawn]) -> None:
        """Logs the files, with their captions."""
        import wandb

        images = {f"pictures/{p.name}": wandb.Image(str(p.path), caption=visible(p.caption)) for p in pictures}
        self.run.log(images, step=step)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Writes the summary and closes the run."""
        self.run.summary.update(flat_summary(record))
        self.run.finish(exit_code=0 if record["status"] == "done" else 1)


class TensorBoardTracker:
    """TensorBoard events under `tensorboard/` of the run folder."""

    def __init__(self, folder: Path, history: list[dict[str, Any]], texts: list[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        for line in history:
            self.log(line)
        for line in texts:
            self.log_text(line)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Adds a scalar for each metric."""
        for key, value in metrics.items():
            if key != "step":
                self.writer.add_scalar(key, value, int(metrics["step"]))

    def log_text(self, line: Mapping[str, Any]) -> None:
        """Adds texts at their step; the four spaces keep Markdown from reading them."""
        for key, text in line.items():
            if key != "step":
                shown = "\n".join(f"    {row}" for row in visible(text).split("\n"))
                self.writer.add_text(key, shown, int(line["step"]))

    def log_pictures(self, step: int, pictures: Sequence[Drawn]) -> None:
        """Adds the images, and their captions as texts."""
        import numpy as np
        from PIL import Image

        for picture in pictures:
            with Image.open(picture.path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self.writer.add_image(f"pictures/{picture.name}", pixels, step, dataformats="HWC")
            self.writer.add_text(f"pictures/{picture.name}", f"    {visible(picture.caption)}", step)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Adds the summary and closes the file."""
        self.writer.add_text("summary", f"```\n{json.dumps(flat_summary(record), indent=1)}\n```")
        self.writer.close()


class Trackers:
    """All mirrors of a run. One that fails is dropped with a warning."""

    def __init__(
        self,
        config: TrackerConfig,
        folder: Path,
        record: Mapping[str, Any],
        history: list[dict[str, Any]],
        texts: list[dict[str, Any]],
    ):
        self.trackers: list[Tracker] = []
        if config.wandb != "disabled":
            os.environ.setdefault("WANDB_SILENT", "true")
            self._guard("W&B", lambda: self.trackers.append(WandbTracker(config, folder, record, history, texts)))
        if config.tensorboard:
            self._guard("TensorBoard", lambda: self.trackers.append(TensorBoardTracker(folder, history, texts)))

    def _guard(self, what: str, act: Any) -> bool:
        try:
            act()
        except Exception as error:  # a mirror may fail in any way, and must not take the run with it
            log.warning("%s stopped recording this run: %r; metrics.jsonl goes on", what, error)
            return False
        return True

    def log(self, metrics: Mapping[str, float]) -> None:
        """Feeds a line to every mirror."""
        self.trackers = [t for t in self.trackers if self._guard(type(t).__name__, lambda t=t: t.log(metrics))]

    def log_text(self, line: Mapping[str, Any]) -> None:
        """Feeds a line of texts to every mirror."""
        self.trackers = [t for t in self.trackers if self._guard(type(t).__name__, lambda t=t: t.log_text(line))]

    def log_pictures(self, step: int, pictures: Sequence[Drawn]) -> None:
        """Feeds the pictures to every mirror."""
        if pictures:
            self.trackers = [
                t for t in self.trackers if self._guard(type(t).__name__, lambda t=t: t.log_pictures(step, pictures))
            ]

    def finish(self, record: Mapping[str, Any]) -> None:
        """Closes every mirror."""
        for tracker in self.trackers:
            self._guard(type(tracker).__name__, lambda t=tracker: t.finish(record))
        self.trackers = []
