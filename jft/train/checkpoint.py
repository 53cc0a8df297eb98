"""Checkpoints: orbax v1 underneath; saved in the background, whole or not at all, verified on read.

A step is built in `checkpoints/<step>.writing/`: orbax writes and commits the leaves there, every
file is hashed and forced to disk, manifest.json follows, and one rename to `checkpoints/<step>`
makes it count. Whatever moment a process dies at, a folder named by a number is a finished step.
Reading goes newest first, checks files before orbax parses them and leaves afterwards, and falls
back loudly to the step before.
"""

import json
import logging
import math
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.errors import ConfigError, WeightsError
from jft.train.frozen_store import FrozenStore, Pending, Rebuild, host_copies, sync_folder
from jft.train.step_folder import (
    Damaged,
    Manifest,
    as_number,
    check_files,
    describe,
    first_line,
    read_manifest,
    read_step,
    seal_files,
    write_leaves,
    write_manifest,
)
from jft.tree import Flat

log = logging.getLogger(__name__)

_MODES = ("max", "min")


@dataclass(frozen=True)
class Restored:
    """One verified step.

    Attributes:
      step: the update count it was saved at.
      state: {path: numpy array} as given to `save`.
      frozen: {path: numpy array} from the frozen store.
      info: what `save` was given, through JSON (tuples come back as lists).
      metrics: likewise.
      skipped: one line for each newer step that was damaged and passed over.
    """

    step: int
    state: Flat
    frozen: Flat
    info: dict[str, Any]
    metrics: dict[str, Any] | None
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one run directory.

    One process at a time may save (see `jft.train.lock`), any number may restore. With several
    processes all call `save` with the same values, process 0 writes, and all restore from the
    shared folder. Call `poll` every step and `close` at the end: a process that merely ends while
    a save is under way loses that save.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: str = "max",
    ):
        """Takes the run directory; nothing is made or removed on disk before the first save.

        Args:
          directory: the run directory.
          keep: how many of the newest steps stay, besides the best one.
          best_metric: key of `metrics` by which the best step is chosen; None keeps no best.
          best_mode: "max" or "min".
        """
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ConfigError(f"checkpoints to keep: {keep!r} must be an integer of at least 1")
        if best_mode not in _MODES:
            raise ConfigError(f"best_mode {best_mode!r} is neither 'max' nor 'min'")
        root = Path(directory).absolute()
        self.folder = root / "checkpoints"
        self.frozen = FrozenStore(root / "frozen")
        self.keep = keep
        self.best_metric = best_metric
        self.best_mode = best_mode
        self._bad: set[int] = set()  # steps that restore found damaged
        self._tidy = False
        self._writer: ThreadPoolExecutor | None = None
        self._saving: Future | None = None

    def __enter__(self) -> "Checkpoints":
        """Returns itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Waits for the last save and raises its error."""
        self.close()

    def save(
        self,
        step: int,
        state: Flat,
        frozen: Flat,
        info: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Copies `state` to the host and saves it in the background.

        When this returns, arrays of `state` may be donated or overwritten. A save still under way
        is waited for first. A frozen leaf is copied, hashed and stored only if its very array
        object was not stored under this path before (see `frozen_changed`). Saving a step that is
        there already with equal leaves renews its info and metrics; one with other leaves is moved
        aside to `replaced-<step>-<n>`.

        Args:
          step: number of updates done, >= 0.
          state: {path: jax or numpy array or number}: all that moves.
          frozen: {path: array}: what does not move in this phase.
          info: JSON content to come back with it (phase, data position, config hash, ...).
          metrics: JSON numbers; `best_metric` is looked up here.

        Raises:
          WeightsError: the save before this one failed, or a leaf cannot be saved.
        """
        self.wait()
        if jax.process_index() != 0:
            return
        text = json.dumps([info, metrics], default=as_number)
        pending = self.frozen.snapshot(frozen)
        copies = host_copies(state)
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="jft-checkpoint")
        self._saving = self._writer.submit(self._save, int(step), copies, pending, text)

    def frozen_changed(self) -> None:
        """Says that frozen leaves are not what they were: the next save hashes all of them."""
        self.wait()
        self.frozen.forget()

    def poll(self) -> None:
        """Raises the error of a save that has failed; never waits.

        Raises:
          WeightsError: once for each failed save.
        """
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          WeightsError: it failed; once for each failed save.
        """
        if self._saving is None:
            return
        error = self._saving.exception()  # an interrupt here leaves the save pending
        self._saving = None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the last save and ends the writer; may be called again.

        Raises:
          WeightsError: the last save failed and nobody was told yet.
        """
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def _save(
        self, step: int, state: dict[str, np.ndarray], pending: list[Pending], text: str
    ) -> None:
        work = self.folder / f"{step}.writing" / str(step)
        try:
            self._tidy_up()
            info, metrics = json.loads(text)
            frozen = self.frozen.put(pending)
            manifest = Manifest(step, info, metrics, describe(state), frozen)
            if not self._renew(manifest):
                write_leaves(work, state)
                manifest.files = seal_files(work)
                write_manifest(work, manifest)
                self._set_aside(step, "replaced")
                work.rename(self.folder / str(step))
                shutil.rmtree(work.parent)
            sync_folder(self.folder)
            self._prune(step)
        except Exception as error:
            shutil.rmtree(work.parent, ignore_errors=True)
            raise WeightsError(
                f"step {step} could not be saved in {self.folder}: {first_line(error)}"
            ) from error

    def _tidy_up(self) -> None:
        """Moves damaged steps out of the way; once a process, removes what a killed writer left."""
        for step in sorted(self._bad):
            self._set_aside(step, "damaged")
        self._bad.clear()
        if self._tidy:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.frozen.clear_leftovers()
        for pattern in ("*.writing", "*.deleting"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
        good = self.steps()
        for step in self._folders():
            if step not in good:
                self._set_aside(step, "damaged")
        self._tidy = True

    def _set_aside(self, step: int, why: str) -> None:
        """Renames the folder of a step, if there is one; nothing that exists is deleted."""
        folder = self.folder / str(step)
        if not folder.exists():
            return
        number = 1
        while (aside := self.folder / f"{why}-{step}-{number}").exists():
            number += 1
        folder.rename(aside)
        log.warning("%s checkpoint of step %d moved aside to %s", why, step, aside)

    def _renew(self, manifest: Manifest) -> bool:
        """Gives an equal, undamaged step the new info and metrics; False if there is none."""
        folder = self.folder / str(manifest.step)
        try:
            there = read_manifest(folder)
            if (there.leaves, there.frozen) != (manifest.leaves, manifest.frozen):
                return False
            check_files(folder, there)
        except Damaged:
            return False
        manifest.files = there.files
        write_manifest(folder, manifest)
        return True

    def _prune(self, saved: int) -> None:
        """Deletes what is neither just saved, nor among the newest, nor the best."""
        steps = self.steps()
        stay = {saved, *steps[-self.keep :], self.best()}
        for step in steps:
            if step not in stay:
                # Renamed first, so that no half-deleted folder looks like a step.
                doomed = self.folder / f"{step}.deleting"
                (self.folder / str(step)).rename(doomed)
                shutil.rmtree(doomed)

    def _folders(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = [entry.name for entry in os.scandir(self.folder)]
        return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

    def _manifests(self) -> dict[int, Manifest]:
        manifests = {}
        for step in self._folders():
            if step not in self._bad:
                try:
                    manifests[step] = read_manifest(self.folder / str(step))
                except Damaged:
                    continue
        return manifests

    def steps(self) -> list[int]:
        """Returns the steps on disk, newest last: manifest whole, sizes right, not known as bad.

        Hashes of files are compared by `restore` only.
        """
        return list(self._manifests())

    def latest(self) -> int | None:
        """Returns the newest of `steps`, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the best finite `best_metric` (newest of equals), or None."""
        values = {
            step: (manifest.metrics or {}).get(self.best_metric)
            for step, manifest in self._manifests().items()
        }
        sign = 1 if self.best_mode == "max" else -1
        ranked = [
            (sign * value, step)
            for step, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        return max(ranked)[1] if ranked else None

    def restore(self, step: int | None = None, rebuild: Rebuild | None = None) -> Restored | None:
        """Returns the newest good step (or `step`), verified bit for bit; None if there is none.

        Each damaged step that is passed over is logged and listed in `skipped`; its folder moves
        aside at the next save. A frozen leaf that is missing or damaged is asked of `rebuild`,
        compared with the hash it was saved with, and stored again.

        Args:
          step: this step and no other; None for the newest.
          rebuild: takes the paths of damaged frozen leaves, returns {path: array} from the source.

        Raises:
          WeightsError: there are steps but none is good; `step` is missing or damaged; a frozen
            leaf is damaged and cannot be rebuilt.
        """
        self.wait()
        folders = self._folders()
        if step is not None:
            if step not in folders:
                raise WeightsError(f"{self.folder}: no step {step}, only {folders or 'none'}")
            folders = [step]
        skipped: list[str] = []
        for candidate in reversed(folders):
            try:
                manifest, state = read_step(self.folder / str(candidate))
            except Damaged as error:
                self._bad.add(candidate)
                skipped.append(f"checkpoint {self.folder / str(candidate)} is damaged: {error}")
                log.warning("%s; trying the step before", skipped[-1])
                continue
            frozen = self.frozen.load(manifest.frozen, rebuild)
            return Restored(candidate, state, frozen, manifest.info, manifest.metrics, skipped)
        if skipped:
            raise WeightsError(f"no checkpoint is whole; {'; '.join(skipped)}")
        aside = [*self.folder.glob("damaged-*"), *self.folder.glob("replaced-*")]
        if aside:
            raise WeightsError(
                f"no checkpoint counts, but {aside[0]} was moved aside: delete it to start over"
            )
        return None
