"""Mirrors of the local record, fed by the same call: Weights & Biases and TensorBoard.

`metrics.jsonl` and `run.json` are the truth. A mirror never stops a run: what goes wrong with it is said once, and the
run goes on. A mirror that starts late, as after an interruption, is brought up to date from the truth first.
"""

import html
import json
import logging
import queue
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from archzoo.names import visible
from archzoo.report.files import read_own
from archzoo.report.pictures import FOLDER, NAME
from archzoo.report.wandb_server import Unreachable, be_quiet, log_in
from archzoo.training.config import TrackerConfig
from archzoo.training.pictures import Drawn

log = logging.getLogger("archzoo")
PATIENCE = 12.0
"""Seconds that a run waits for W&B in all, at its start and at its end; wandb itself waits 90 s, and without end."""
LEAST_FOR_THE_END = 3.0
BACKLOG = 100_000
"""Calls that may wait for W&B before it is given up: what waits is held in memory."""
_given_up: str | None = None
"""Why this process does not try W&B's server any more."""


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
    """A W&B run, offline or online. Its calls return when wandb has them, and raise what wandb raises.

    The run's id is that of the run folder, so that the same run resumed is the same W&B run. Offline, the files of an
    earlier try are replaced by ones that tell the whole story, for W&B keeps every line ever logged. Neither kind gets
    the command line, the environment, the source code, or the machine's name.
    """

    def __init__(
        self,
        config: TrackerConfig,
        folder: Path,
        record: Mapping[str, Any],
        history: Sequence[dict[str, Any]],
        texts: Sequence[dict[str, Any]],
        *,
        offline: bool,
    ):
        import wandb

        if offline:
            for old in folder.glob("wandb/*run-*"):
                shutil.rmtree(old, ignore_errors=True)
        settings = wandb.Settings(
            init_timeout=PATIENCE,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,  # sys.argv is part of it
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=record["experiment"],
            name=record["name"],
            id=record["run_id"],
            tags=[record["layer"], record["task"], *config.tags],
            config={**record["config"], "contestant": record["layer"]},  # which a dashboard groups by
            dir=str(folder),
            settings=settings,
            mode="offline" if offline else "online",
            resume=None if offline else "allow",
            reinit="create_new",  # a run of the program around us is none of ours
        )
        known = 0 if offline else int(self.run.step or 0)  # the first step that the server lacks
        # In one order: W&B takes no step that lies behind one that it has.
        told = [*((line, self.log_text) for line in texts), *((line, self.log) for line in history)]
        for line, log_line in sorted(told, key=lambda entry: int(entry[0]["step"])):
            if line["step"] >= known:
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


class LiveWandb:
    """A W&B run that can be watched while it trains, and never holds it up.

    A thread of its own talks to W&B. What the server does not take within `PATIENCE` seconds in all, at the start and
    at the end, it is not waited for: the run is then told once more from the local record, into an offline run, which
    `archzoo dashboard` or `wandb sync` sends later.

    Raises:
        Unreachable: If the server cannot be used.
    """

    def __init__(
        self,
        config: TrackerConfig,
        folder: Path,
        record: Mapping[str, Any],
        history: Sequence[dict[str, Any]],
        texts: Sequence[dict[str, Any]],
    ):
        self.config, self.folder = config, folder
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._problem: str | None = None
        self._ready = threading.Event()
        began = time.monotonic()
        self._thread = threading.Thread(
            target=self._work, args=(dict(record), history, texts), name="archzoo-wandb", daemon=True
        )
        self._thread.start()
        if not self._ready.wait(PATIENCE):
            self._problem = f"it takes longer than {PATIENCE:g} s to start a run"
        if self._problem is not None:
            end_service()
            raise Unreachable(self._problem)
        self._patience = max(PATIENCE - (time.monotonic() - began), LEAST_FOR_THE_END)

    def _work(self, record: dict[str, Any], history: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]]) -> None:
        try:
            log_in()
            tracker = WandbTracker(self.config, self.folder, record, history, texts, offline=False)
            self._ready.set()
            method = ""
            while method != "finish":
                method, arguments = self._calls.get()
                getattr(tracker, method)(*arguments)
        except (Exception, SystemExit) as error:  # wandb raises many kinds, and exits
            self._problem = self._problem or (str(error) if isinstance(error, Unreachable) else repr(error))
        finally:
            self._ready.set()

    def _post(self, method: str, *arguments: Any) -> None:
        if self._calls.qsize() >= BACKLOG:
            self._problem = self._problem or f"{BACKLOG:,} calls are waiting for it"
        if self._problem is None:
            self._calls.put((method, arguments))

    def log(self, metrics: Mapping[str, float]) -> None:
        """Has a line logged at its step."""
        self._post("log", dict(metrics))

    def log_text(self, line: Mapping[str, Any]) -> None:
        """Has texts logged at their step."""
        self._post("log_text", dict(line))

    def log_pictures(self, step: int, pictures: Sequence[Drawn]) -> None:
        """Has the pictures logged."""
        self._post("log_pictures", step, pictures)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Waits for what is left of the patience; where that is not enough, tells the run again, offline."""
        self._post("finish", record)
        if self._problem is None:
            self._thread.join(self._patience)
        if self._problem is None and not self._thread.is_alive():
            for old in self.folder.glob("wandb/offline-run-*"):  # of a try before, when W&B could not be reached
                shutil.rmtree(old, ignore_errors=True)
            return
        give_up(self._problem or f"it does not take all of the run within {PATIENCE:g} s")
        end_service()
        tell_offline(self.folder, self.config, record)


def tell_offline(folder: Path, config: TrackerConfig, record: Mapping[str, Any]) -> None:
    """Makes a W&B offline run of a run that has ended, from its folder; in the place of those that are there.

    Args:
        folder: The run's folder.
        config: Where it belongs on W&B.
        record: Its run.json.
    """
    history, texts = (read_lines(folder / f"{name}.jsonl", folder.parent) for name in ("metrics", "samples"))
    tracker = WandbTracker(config, folder, record, history, texts, offline=True)
    try:
        entries = [p for p in (record.get("pictures") or {}).get("drawn", []) if re.fullmatch(NAME, p["name"])]
        drawn = [Drawn(p["name"], p["caption"], folder / FOLDER / f"{p['name']}.png") for p in entries]
        if own := [picture for picture in drawn if _is_own(picture.path, folder.parent)]:
            tracker.log_pictures(record["steps"], own)
    finally:
        tracker.finish(record)


def _is_own(path: Path, root: Path) -> bool:
    try:
        return bool(read_own(path, root))
    except OSError:
        return False


def give_up(problem: str) -> None:
    """Says once that W&B cannot be used; this process then does not try again."""
    global _given_up
    if _given_up is None:
        _given_up = problem
        told = "W&B is not used: %s. This run and the later ones of this process are recorded offline; %s sends them"
        log.warning(told, problem, "`archzoo dashboard`")


def open_wandb(
    config: TrackerConfig,
    folder: Path,
    record: Mapping[str, Any],
    history: Sequence[dict[str, Any]],
    texts: Sequence[dict[str, Any]],
) -> Tracker:
    """A W&B run as the configuration has it, offline where it is to be online and cannot."""
    be_quiet()
    if config.wandb == "online":
        try:
            if _given_up is None:
                return LiveWandb(config, folder, record, history, texts)
            log.info("W&B is not tried again: %s. This run is recorded offline", _given_up)
        except Unreachable as error:
            give_up(str(error))
    return WandbTracker(config, folder, record, history, texts, offline=True)


def read_lines(path: Path, root: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are whole, without the nulls that stand for nan; none where there is no file.

    Raises:
        OSError: If it cannot be read, or leads out of `root`.
        ValueError: If a whole line is no JSON.
    """
    lines = read_own(path, root).decode().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if value is not None} for line in lines]


def end_service() -> None:
    """Ends wandb's own process, and has wandb forget it: while that goes on trying, no Python process can exit."""
    from wandb.sdk import wandb_setup

    def end() -> None:
        # There is no public way that does not wait for the server; where these names change, only the exit is slow.
        service = getattr(getattr(wandb_setup, "_singleton", None), "_connection", None)
        process = getattr(getattr(service, "_proc", None), "_process", None)
        if process is None:  # there is none, or it is not ours
            return
        process.kill()
        process.wait()  # or it stays behind, dead but not gone
        with suppress(Exception, SystemExit):  # of a process that was killed it complains
            wandb_setup.teardown()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(2)


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
        history = [{key: value for key, value in line.items() if value is not None} for line in history]
        if config.wandb != "disabled":
            self._guard("W&B", lambda: self.trackers.append(open_wandb(config, folder, record, history, texts)))
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
