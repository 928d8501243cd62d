"""Pushes to the Hub during a run, without making training wait."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

from ..checkpointing.checkpoints import seal
from ..config import HubConfig
from ..files import link_tree
from . import push
from .card import without_paths

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"


@dataclass(frozen=True)
class _Job:
    branch: Path  # shown to the user
    copy: Path  # pushed
    message: str


class BackgroundPushes:
    """Runs one push at a time, each of a copy made when it was submitted. Of those that wait, only the newest is kept.

    A push is a separate process (`push.py`): it takes no time from the training process, and can be killed if it
    hangs, since the clients wait for a stalled upload forever. Failures are warnings with the command that pushes
    later. Used by the main process.

    Args:
        hub: where to push, and how.
        output_dir: the run's folder.

    Raises:
        ValueError: the token is missing or rejected, or the repository's name or privacy cannot be as configured.
    """

    def __init__(self, hub: HubConfig, output_dir: str | os.PathLike):
        self.hub, self.output_dir = hub, Path(output_dir)
        self.token = hub.hub_token or get_token()
        self.repo_id = push.repo_id_of(hub.hub_model_id, str(output_dir))
        self.address: str | None = None  # of the newest commit
        self._check()
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._running: _Job | None = None
        self._process: subprocess.Popen | None = None
        self._closed = False
        self._count = 0
        threading.Thread(target=self._work, name="pushes to the Hub", daemon=True).start()

    def submit(self, branch: Path, message: str, *, checkpoint: Path | None = None) -> None:
        """Push a branch's folder in its current state, soon.

        Args:
            checkpoint: a checkpoint's folder to push with it.
        """
        copy = self.output_dir / f"tmp-push-{self._count}"
        self._count += 1
        try:
            _copy(branch, checkpoint, copy)
        except OSError as error:  # of the disk: no reason to stop training
            self.address = None
            self._warn(branch, message, push.describe(error))
            shutil.rmtree(copy, ignore_errors=True)
            return
        with self._changed:
            if self._waiting is not None:
                logger.info("The push %r is skipped: %r is newer.", self._waiting.message, message)
                shutil.rmtree(self._waiting.copy)
            self._waiting = _Job(branch, copy, message)
            self._changed.notify_all()

    def finish(self, branch: Path, message: str, *, checkpoint: Path | None = None) -> str | None:
        """Push the last state and wait for it at most `hub_timeout` seconds. Returns its URL, or `None` if it
        failed."""
        self.submit(branch, message, checkpoint=checkpoint)
        with self._changed:
            in_time = self._changed.wait_for(lambda: not (self._waiting or self._running), self.hub.hub_timeout)
            self._closed = True
            self._changed.notify_all()
            late = [job for job in (self._waiting, self._running) if job is not None]
            if self._process is not None:
                self._process.kill()  # the Hub accepts a commit completely or not at all
        for job in late:
            shutil.rmtree(job.copy, ignore_errors=True)
        if not in_time:
            self._warn(branch, message, f"it took more than `hub_timeout` = {self.hub.hub_timeout:g} seconds.")
        return self.address if in_time else None

    def _check(self) -> None:
        try:
            push.check_push(None, self.repo_id, self.token)
        except ValueError as error:
            raise ValueError(f"`push_to_hub`: {error}") from error
        try:
            self.repo_id = push.make_repo(HfApi(token=self.token), self.repo_id, self.hub.hub_private_repo)
        except Exception as error:
            if not push.may_pass(error):
                reason = str(error) if type(error) is ValueError else push.describe(error)
                raise ValueError(f"`push_to_hub` to {self.repo_id}: {reason}") from error
            logger.warning("The Hub cannot be reached (%s) Training continues and tries again.", push.describe(error))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job, self._waiting = self._waiting, None
                self._running = job
                self._process = self._start(job)
            output, errors = self._process.communicate()
            with self._changed:
                if self._closed:
                    return
                self.address = output.split()[-1] if self._process.returncode == 0 else None
                if self.address:
                    logger.info("Pushed %s (%s) to %s. %s", job.branch, job.message, self.address, errors.strip())
                else:
                    reason = errors.strip().rsplit("error: ", 1)[-1].split(" Nothing is lost")[0]
                    reason = reason.replace(str(job.copy), str(job.branch))
                    self._warn(job.branch, job.message, reason or f"exit status {self._process.returncode}.")
                shutil.rmtree(job.copy, ignore_errors=True)
                self._running = self._process = None
                self._changed.notify_all()

    def _start(self, job: _Job) -> subprocess.Popen:
        command = [sys.executable, "-P", push.__file__, str(job.copy), "--repo_id", self.repo_id]
        command += ["--commit_message", job.message, *push.option_words(self._options())]
        environment = {**os.environ, "HF_TOKEN": self.token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    def _options(self) -> dict[str, Any]:
        return {"private": self.hub.hub_private_repo, "revision": self.hub.hub_revision}

    def _warn(self, branch: Path, message: str, reason: str) -> None:
        logger.warning(
            "The push %r to %s failed: %s The branch is in %s. To push it later: %s",
            message,
            self.repo_id,
            reason,
            branch,
            push.push_command(branch, self.repo_id, **self._options()),
        )


def _copy(branch: Path, checkpoint: Path | None, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)  # of a run that was killed
    link_tree(branch, copy)
    if checkpoint is not None:
        link_tree(checkpoint, copy / LAST_CHECKPOINT)
        _cut_paths(copy / LAST_CHECKPOINT / "trainer_state.json")


def _cut_paths(path: Path) -> None:
    """Reduce paths of this machine to names in the settings of a checkpoint's state."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cut(item) for name, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        return without_paths(value) if isinstance(value, str) else value

    state = cut(json.loads(path.read_text(encoding="utf-8")))
    path.unlink()  # it is a link: writing into it would change the checkpoint
    path.write_text(json.dumps(state, indent=1), encoding="utf-8")
    seal(path.parent)
