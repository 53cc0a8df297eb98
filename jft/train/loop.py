"""The loop: phases, steps, logging, evaluation, checkpoints, signals. It takes built parts only."""

import dataclasses
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax

from jft.errors import DivergedError
from jft.freeze.phases import Phase
from jft.report.writers import RunWriter
from jft.train.averages import eval_params
from jft.train.checkpoint import Restored
from jft.train.compiled import CompiledSteps
from jft.train.decisions import Decisions
from jft.train.ema import averaged
from jft.train.ending import Ending
from jft.train.evaluator import Evaluator
from jft.train.feed import Feed
from jft.train.guarantee import Guard
from jft.train.inputs import Input
from jft.train.lock import Lock
from jft.train.parallel import check_replicas
from jft.train.rows import Rows
from jft.train.run import Outcome, Run, batch_shape, from_checkpoint, pack, phase_of
from jft.train.signals import StopSignals
from jft.train.stacks import Apart, unstack
from jft.train.state import leaves_by_path, make_state, switch_phase
from jft.tree import Flat

SHOWN_PHASES = 12  # of hundreds the plan gives the sum

# Steps the host may run ahead of the device: enough to hide its work, few enough batches to hold.
IN_FLIGHT_STEPS = 8


def fit(run: Run) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the end or to a signal.

    Raises:
      DivergedError: a loss or gradient was not finite and train.nonfinite forbids going on.
    """
    with Lock(run.workdir), StopSignals() as stop, run.checkpoints:
        restored = run.checkpoints.restore(rebuild=run.rebuild)
        if restored is not None:  # what does not fit must not touch the run's files
            from_checkpoint(run, phase_of(run, restored), restored)
        run.begin()
        with run.make_writer(restored.step if restored else None) as writer:
            return _fit(run, writer, restored, stop)


def _fit(run: Run, writer: RunWriter, restored: Restored | None, stop: StopSignals) -> Outcome:
    trainer = None
    try:
        trainer = _Trainer(run, writer, restored)
        return trainer.outcome(trainer.train(stop))
    except BaseException as error:
        state = "diverged" if isinstance(error, DivergedError) else "failed"
        step = trainer.step if trainer else restored.step if restored else 0
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        writer.status(state=state, step=step, exit_reason=reason)
        raise
    finally:
        if trainer:
            trainer.steps.close()
            trainer.guard.close()
            trainer.feed.close()


class _Trainer:
    """The moving parts of one `fit`: state, compiled steps, and rows not yet fetched."""

    def __init__(self, run: Run, writer: RunWriter, restored: Restored | None):
        self.run, self.writer = run, writer
        self.steps = CompiledSteps(run, self.choose, writer.message)
        self.guard = Guard(writer.message)
        self.apart = Apart()
        self.parked: Flat = {}
        beside: dict[str, Flat] = {}
        self.evaluator = Evaluator(run, writer)
        self.in_flight: deque[jax.Array] = deque()
        self.rows = Rows(run, writer, self.compile_seconds)
        self.last: dict[str, Any] = {}
        self.results: dict[str, float] = {}
        self.step, self.evaluated_step, self.entered = 0, -1, False
        self.compared: set[Any] = set()
        self.batch_names: tuple[str, ...] = ()
        if restored is None:
            self.phase = run.freeze.at(0)
            params, stats = run.start()
            tx = run.optim.tx(self.phase, run.enforce)
            self.state, self.frozen = make_state(
                self.phase, tx, params, stats, run.enforce, run.parts.averages
            )
        else:
            self.phase = phase_of(run, restored)
            self.state, self.frozen, beside = from_checkpoint(run, self.phase, restored)
            self.parked = beside["parked"]
            self.step = restored.step
            self.results = dict(restored.info["results"])
            for message in restored.skipped:
                writer.message(f"warning: {message}")
            writer.message(f"resuming at step {self.step} of {run.total_steps}")
        self.saved_step = self.step if restored else -1
        self.teacher = run.parallel.place(run.teacher)
        for note in run.notes:
            writer.message(note)
        info = restored.info if restored else {}
        self.decisions = Decisions(run, info.get("decisions", []), beside)
        self.feed = Feed(run, self.step, info.get("caches", {}), writer.message)
        self.ranked: Mapping[str, Any] = {}
        self.ending = Ending(run, info)
        self.ending.begin(self.step, run.freeze.phases(self.decisions.log))

    def train(self, stop: StopSignals) -> int:
        """Runs the phases that are left; returns the exit code."""
        run = self.run
        self.decisions.begin(self.step, *self.leaves())
        self.guard.begin(self.leaves()[0])
        self.decide()
        if not self.done and run.total_steps == run.freeze.outline.total_steps:
            foreseen = run.freeze.foreseen(self.decisions.log)
            following = [phase for phase in foreseen if phase.stop_step > self.step]
            self.steps.ahead(following, stop=lambda: stop.exit_code is not None)
        while not self.done:
            phase = run.freeze.at(self.step, self.decisions.log)
            self.enter(phase)
            decided = len(self.decisions.log)
            last = min(phase.stop_step, run.total_steps)
            while self.step < last and len(self.decisions.log) == decided and not self.done:
                self.update()
                if phase.key not in self.compared:
                    check_replicas(self.state)
                    self.compared.add(phase.key)
                self.after_update(last=self.step == run.total_steps)
                if stop.exit_code is not None:
                    self.save()
                    return stop.exit_code
        frozen = self.frozen.params | self.frozen.model_state
        self.guard.end(self.leaves()[0], frozen, run.freeze.groups, run.freeze.outline.units)
        self.feed.end()
        return 0

    @property
    def done(self) -> bool:
        """Whether the run has come to its end."""
        return self.step >= self.run.total_steps or self.ending.reason is not None

    def compile_seconds(self) -> float:
        """Returns what compilation took so far."""
        return self.steps.seconds + self.evaluator.compile_seconds

    def leaves(self) -> tuple[Flat, Flat]:
        """Returns all parameters and all statistics of the model."""
        params = unstack({**self.state.params, **self.frozen.params})
        return params, {**self.state.model_state, **self.frozen.model_state}

    def eval_leaves(self) -> tuple[Flat, Flat]:
        """Returns the leaves that are evaluated: averages, or those of the best checkpoint."""
        if self.ending.leaves is not None:
            return self.ending.leaves
        params = unstack({**eval_params(leaves_by_path(self.state)), **self.frozen.params})
        stats = {**self.state.model_state, **self.frozen.model_state}
        return averaged(unstack(self.state.averages), params, stats)

    def choose(self, phase: Phase) -> Input:
        """Returns what a phase reads."""
        return self.feed.choose(phase, self.run.freeze.phases(self.decisions.log))

    def decide(self) -> None:
        """Makes the freezing decision that is due at this step, if there is one."""
        if self.done:
            return
        due = self.run.freeze.due(self.step, self.decisions.log)
        if due is None:
            return
        self.rows.write(wait=True)
        began = time.monotonic()
        text = self.decisions.decide(due, *self.leaves(), self.feed)
        seconds = time.monotonic() - began
        self.writer.message(f"step {self.step}: {text} ({seconds:.1f} s)")
        self.rows.leave_out(seconds, probe=True)

    def enter(self, phase: Phase) -> None:
        """Makes `phase` the current one: its split, its compiled step, and the next one's start."""
        run, old = self.run, self.phase
        going_on = phase.index == old.index and self.entered
        if not going_on:
            # The steps under way belong to the old phase's clock, not to the switch or the new one;
            # first row by row, so that each has the time of its own steps.
            self.rows.write(wait=True)
            jax.block_until_ready(self.last)
            self.writer.phase(phase.index, phase.name)
        began = time.monotonic()
        self.steps.want(phase)
        if not going_on:
            self.state, self.frozen = unstack((self.state, self.frozen))
        elements = self.decisions.elements(phase, self.frozen.elements)
        # A decision before the first step changes the set of the phase that is there already.
        if phase.index != old.index or phase.entered != old.entered:
            tx = run.optim.tx(phase, run.enforce)
            self.state, self.frozen, self.parked = switch_phase(
                self.state, self.frozen, old, phase, tx, run.enforce, self.parked
            )
        self.phase, self.entered = phase, True
        if not going_on:
            cache = self.feed.enter(phase, self.choose(phase), *self.leaves())
            self.batch_names = tuple(batch_shape(run, self.feed.input))
            rates = run.optim.rates(phase)
            self.frozen = dataclasses.replace(
                self.frozen, rates=rates, elements=elements, cache=cache, teacher={}
            )
            stacked = run.stacks(phase).stack((self.state, self.frozen))
            self.state, self.frozen = run.parallel.place(stacked)
            self.frozen = dataclasses.replace(self.frozen, teacher=self.teacher)
            self.current, compile_seconds = self.steps.get(phase)
            phases = run.freeze.phases(self.decisions.log)
            self.rows.enter(phase, phases, self.steps.flops(phase))
            trains = [p for p in phase.entered if p not in elements or elements[p].any()]
            self.guard.freeze(self.frozen.params | self.frozen.model_state, trains)
            self.show_phase(phase, compile_seconds, time.monotonic() - began)
            self.rows.restart(self.step)
        for following in run.freeze.likely(self.decisions.log, self.step):
            if following.start_step < run.total_steps:
                self.steps.start(following)

    def show_phase(self, phase: Phase, compile_seconds: float, stall: float) -> None:
        """Says that a phase begins; of many short ones only the first few."""
        self.rows.stall_seconds += stall
        if phase.index < SHOWN_PHASES or stall > 1.0:
            last = f"at most {phase.stop_step}" if phase.event else str(phase.stop_step)
            self.writer.message(
                f"phase {phase.index} ({phase.name}): steps {self.step}-{last},"
                f" compiled in {compile_seconds:.1f} s, waited {stall:.1f} s"
            )

    def update(self) -> None:
        """One step; the device works while the host fetches the next batch."""
        began = time.monotonic()
        batch = next(self.feed)
        self.rows.wait_seconds += time.monotonic() - began
        placed = self.run.parallel.place_batch({name: batch[name] for name in self.batch_names})
        self.decisions.before_update(self.step, self.state.params)
        self.state, self.last = self.current(self.state, self.frozen, placed)
        self.step += 1
        self.writer.tick(self.step)
        self.in_flight.append(self.last["loss_sum"])
        if len(self.in_flight) > IN_FLIGHT_STEPS:
            self.in_flight.popleft().block_until_ready()

    def after_update(self, last: bool) -> None:
        """Logs, evaluates, decides and saves what is due at this step."""
        run = self.run
        if last or self.step % run.parts.log_every_steps == 0:
            self.rows.add(self.step, self.phase.index, self.last)
        self.rows.write(wait=False)
        every = run.eval_every_steps
        if "val" in run.splits and (last or (every and self.step % every == 0)):
            self.evaluate("val")
        if self.done:
            self.end()
        self.decide()
        due = run.save_every_steps and self.step % run.save_every_steps == 0
        if self.done or due or self.ending.is_best(self.step):
            self.save()
        run.checkpoints.poll()

    def end(self) -> None:
        """Evaluates what is left at the end of the run; on its best checkpoint, all splits."""
        text = self.ending.restore(self.step)
        if text:
            self.writer.message(text)
        for split in self.run.splits:
            if split != "val" or self.ending.leaves is not None:
                self.evaluate(split)

    def check_last(self) -> None:
        """Writes all rows and raises if the run has halted by now; waits for the device."""
        if self.last:
            self.rows.add(self.step, self.phase.index, self.last, shown=False)
        self.rows.write(wait=True)

    def evaluate(self, split: str) -> None:
        """Evaluates one split and logs it; "val" as "eval/...", of the best step as "best/..."."""
        self.check_last()
        began, run, final = time.monotonic(), self.run, self.ending.leaves is not None
        compiling = self.evaluator.compile_seconds
        prefix, raw = "eval" if split == "val" else split, dict[str, float]()
        if run.eval_raw and self.state.averages and not final:  # first: the other file stays
            found = run.evaluate(self.evaluator.predict(split, self.leaves()), split, self.step)
            raw = {f"{prefix}_raw/{name}": value for name, value in found.items()}
        step = (self.ending.restored_step if final else None) or self.step
        predict = self.evaluator.predict(split, self.eval_leaves())
        scalars = run.evaluate(predict, split, step)
        named: dict[str, Any] = {f"{prefix}/{name}": value for name, value in scalars.items()} | raw
        self.results.update(named)
        if final and split == "val":
            named = {f"best/{name}": value for name, value in scalars.items()} | {"best/step": step}
        else:
            self.decisions.observe(self.step, named)
            self.evaluated_step = self.step
        if split == "val" and not final:
            self.ranked = named
            self.ending.observe(self.step, named, run.freeze.phases(self.decisions.log))
        taken = time.monotonic() - began
        seconds = taken - (self.evaluator.compile_seconds - compiling)
        self.rows.eta.evaluated(split, seconds)
        self.writer.write(
            self.step, {"phase": self.phase.index, **named}, {"eval_seconds": seconds}
        )
        self.rows.leave_out(taken)

    def save(self) -> None:
        """Saves the state; what was logged up to this step is on the disk before."""
        if self.step == self.saved_step:
            return
        self.check_last()
        self.writer.flush()
        beside = {"parked": self.parked, **self.decisions.beside}
        state, frozen = pack(*self.apart(self.state, self.frozen), beside)
        info = {**self.run.info, "phase": self.phase.index, "batches": self.step}
        info |= {"results": self.results, "decisions": list(self.decisions.log)}
        info |= {"caches": dict(self.feed.chosen), **self.ending.info}
        # A checkpoint is ranked by an evaluation of this very step, never by an older one.
        metrics = {**self.results, **self.ranked} if self.step == self.evaluated_step else {}
        self.guard.check(self.frozen.params | self.frozen.model_state)
        self.run.checkpoints.save(self.step, state, frozen, info, metrics)
        self.saved_step = self.step

    def outcome(self, exit_code: int) -> Outcome:
        """Waits for the last save and says how the run ended."""
        self.run.checkpoints.wait()
        if self.decisions.log:
            self.run.record(self.decisions.log)
        state = {0: "done", 75: "preempted", 130: "interrupted"}[exit_code]
        signalled = f"stopped by a signal at step {self.step}, saved"
        reason = self.ending.reason if exit_code == 0 else signalled
        if exit_code == 0 and reason:
            self.writer.message(reason)
        self.writer.status(state=state, step=self.step, eta_seconds=None, exit_reason=reason)
        leaves, restored = self.eval_leaves(), self.ending.restored_step
        return Outcome(exit_code, self.step, dict(self.results), *leaves, restored)
