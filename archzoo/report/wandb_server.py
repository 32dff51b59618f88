"""The W&B server: whether it answers and knows the login, and what of a comparison it is sent."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_TIMEOUT = 5.0
"""Seconds in which a server must answer its first, small question."""
SYNC_START, SYNC_RUN = 60.0, 20.0
"""Seconds that sending runs may take in all: at the start, and for each run."""


class Unreachable(RuntimeError):
    """W&B cannot be used from here; the message says why, and what would help."""


@dataclass(frozen=True, slots=True)
class Login:
    """Who W&B takes us for."""

    url: str
    """Of the API, as `https://api.wandb.ai`."""
    entity: str | None
    """Where runs go that name no entity; None where the server does not tell."""


def log_in() -> Login:
    """Asks the server who we are, and gives it `ANSWER_TIMEOUT` seconds.

    The key comes from the environment (`WANDB_API_KEY`) or from netrc, where `wandb login` puts it; nothing is prompted
    for.

    Raises:
        Unreachable: Without the package, a key, an answer, or the server's consent.
    """
    be_quiet()
    try:
        import requests
        import wandb
    except ImportError as error:
        raise Unreachable(f"{error.name} is not installed; pip install 'archzoo[wandb]'") from error
    # W&B reads the environment once a process, so that its settings may be older than it.
    url = (os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).rstrip("/")
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):  # a login without a key, which only wandb itself can use
        return Login(url, None)
    key = os.environ.get("WANDB_API_KEY") or (requests.utils.get_netrc_auth(url) or ("", ""))[1]
    if not key:
        raise Unreachable(f"there is no login for {url}; run `wandb login`, or set WANDB_API_KEY")
    question = {"query": "query Viewer { viewer { entity } }"}
    try:
        answer = requests.post(f"{url}/graphql", json=question, auth=("api", key), timeout=ANSWER_TIMEOUT)
        viewer = (answer.json().get("data") or {}).get("viewer") if answer.ok else None
    except requests.Timeout as error:
        raise Unreachable(f"{url} does not answer within {ANSWER_TIMEOUT:g} s") from error
    except (requests.RequestException, AttributeError) as error:  # the latter: JSON, but no object
        raise Unreachable(f"{url} does not answer as W&B does ({type(error).__name__})") from error
    if answer.status_code in (401, 403) or (answer.ok and viewer is None):
        raise Unreachable(f"{url} does not accept the API key; run `wandb login --relogin`, or set WANDB_API_KEY")
    if viewer is None:
        raise Unreachable(f"{url} answers with HTTP status {answer.status_code}")
    return Login(url, viewer.get("entity"))


def sync(folders: Sequence[Path], entity: str, project: str) -> list[Path]:
    """Sends those of the offline runs that were not sent before.

    `wandb sync` does it, in a process of its own that gets at most `SYNC_START` + `SYNC_RUN` seconds a run.

    Args:
        folders: As `…/wandb/offline-run-20260501_100000-1f3a9c0b2d`.
        entity: User or team that owns the project.
        project: W&B project.

    Returns:
        The folders that were not sent whole.
    """
    waiting = [folder for folder in folders if not any(folder.glob("*.synced"))]
    if waiting:
        command = [sys.executable, "-m", "wandb", "sync", "--entity", entity, "--project", project, *map(str, waiting)]
        be_quiet()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SYNC_START + SYNC_RUN * len(waiting))
        process.kill()  # and with it wandb's own process, which watches it
        process.wait()
    return [folder for folder in waiting if not any(folder.glob("*.synced"))]


def save(view: Any, before: Mapping[str, str] | None) -> dict[str, str]:
    """Saves a workspace or a report, in the place of the one that was saved before.

    Args:
        view: One of `build_dashboard`.
        before: What this function returned the last time; None: it is new.

    Returns:
        Its id, its name within W&B and its address.

    Raises:
        Unreachable: If the server does not take it.
    """
    # A report has a public id. Of a workspace there is no public way but to load it, which would keep the old panels.
    key, name = ("id", "id") if hasattr(view, "blocks") else ("_internal_id", "_internal_name")
    before = before or {}
    setattr(view, name, before.get("name", ""))
    setattr(view, key, before.get("id", ""))
    try:
        view.save()
    except Exception as error:  # it raises what requests, wandb and pydantic raise
        if before:  # somebody may have deleted it there
            return save(view, None)
        raise Unreachable(f"the server does not take the dashboard ({type(error).__name__}: {error})") from error
    return {"id": getattr(view, key), "name": getattr(view, name), "url": view.url}


def be_quiet() -> None:
    """Has wandb print nothing, and send its crash reports and statistics to nobody, unless the environment says so."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
