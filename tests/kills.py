"""When to kill a run: moments spread over its steps, its saves and its start."""

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import fault_run
import pytest


@dataclass(frozen=True)
class Moment:
    """When to kill: `delay_seconds` after what `event` says has come.

    "launched" the process was started; "begun" the run directory is locked; "step" a row of step
    `value` or later is in metrics.jsonl; "saving" the save of step `value` has begun; "ended" the
    last evaluation is written. The last three wait for a first finished checkpoint, too.
    """

    event: str
    value: int
    delay_seconds: float

    def __str__(self) -> str:
        return f"{self.event}-{self.value}-{1000 * self.delay_seconds:.0f}ms"

    def __call__(self, workdir: Path) -> bool:
        """True once the event has come."""
        if self.event == "launched":
            return True
        if self.event == "begun":
            return (workdir / "config.json").exists()
        if not fault_run.saved_steps(workdir):
            return False
        if self.event == "saving":
            return (workdir / "checkpoints" / f"{self.value}.writing").exists()
        if self.event == "ended":
            return (workdir / "eval" / "test.json").exists()
        last = (workdir / "metrics.jsonl").read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
        return int(last.partition(b'"step": ')[2].partition(b",")[0] or 0) >= self.value


KINDS = ("step", "saving", "step", "begun", "step", "step", "saving", "step", "launched", "ended")
LONGEST_SECONDS = {"launched": 3.0, "begun": 3.0, "step": 0.05, "saving": 0.05, "ended": 0.1}
LATE = ("step", "saving", "ended")


def make_moments(count, steps, save_every, seed=7):
    """Seeded moments, spread evenly over the steps of the run."""
    rng = random.Random(seed)
    moments = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        value = round(steps * (index + rng.random()) / count)
        if kind == "saving":  # the first finished checkpoint is another one
            value = max(2 * save_every, value - value % save_every)
        moments.append(Moment(kind, value, rng.random() * LONGEST_SECONDS[kind]))
    return moments


def kill_at(moment, argv, workdir, env):
    """Runs and kills; False where the run was over before."""
    process = fault_run.start(*argv, env=env)
    try:
        if fault_run.wait_for(lambda: moment(workdir), process):
            time.sleep(moment.delay_seconds)
        process.kill()
        return process.wait() < 0
    finally:
        process.kill()
        process.wait()


def kill_once(moment, argv, workdir, env):
    """Kills a run from its start; where it was faster than the delay, another one sooner."""
    for _ in range(6):
        if kill_at(moment, argv, workdir, env):
            return
        shutil.rmtree(workdir)
        moment = Moment(moment.event, moment.value, moment.delay_seconds / 3)
    pytest.fail(f"the run always ended before {moment}")
