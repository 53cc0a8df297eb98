"""Steps compiled in the background: order, bounds, and giving up."""

import sys
import threading
from types import SimpleNamespace

import pytest

from jft.freeze.phases import Phase
from jft.train import compiled
from jft.train.compiled import CompiledSteps
from jft.train.inputs import Input


def phase(index, steps=4):
    mask = {"a": True, f"b{index}": True}
    entered = dict.fromkeys(mask, "0")
    return Phase(index, str(index), index * steps, (index + 1) * steps, mask, entered)


@pytest.fixture
def made(monkeypatch):
    """(steps, indices in the order in which their compilation began, what lets it go on)."""
    began, gate = [], threading.Semaphore(0)

    def compile_phase(run, phase, chosen):
        began.append(phase.index)
        assert gate.acquire(timeout=30)
        return phase.index, 0.5

    monkeypatch.setattr(compiled, "compile_phase", compile_phase)
    said = []
    steps = CompiledSteps(SimpleNamespace(plan=None), lambda phase: Input(), said.append)
    yield SimpleNamespace(steps=steps, began=began, gate=gate, said=said)
    for _ in range(100):
        gate.release()
    steps.close()


def test_what_is_wanted_is_compiled_before_what_was_only_likely(made):
    likely = [made.steps.start(phase(index)) for index in range(4)]
    wanted = phase(7)
    made.steps.want(wanted)
    made.gate.release(2)
    assert made.steps.get(wanted)[0] == 7
    assert made.began[1:] == [7] or made.began == [7], "behind at most the one that ran already"
    assert all(future.cancelled() for future in likely[1:])
    again = made.steps.start(phase(2))
    made.gate.release()
    assert again.result()[0] == 2, "what was given up may be asked for again"


def test_one_step_serves_all_phases_of_a_set_and_only_the_latest_are_kept(made, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_KEPT", 2)
    made.gate.release(9)
    for index in (0, 1, 0, 2, 0):
        assert made.steps.get(phase(index))[0] == index
    assert made.began == [0, 1, 2], "the one used last stays"
    made.steps.get(phase(1))
    assert made.began == [0, 1, 2, 1]
    assert made.steps.seconds == 0.5 * 4


def test_compiling_ahead_gives_up_when_the_run_is_to_stop(made):
    made.steps.ahead([phase(index) for index in range(3)], stop=lambda: True)
    assert made.began in ([], [0]) and not made.said
    made.gate.release(3)
    made.steps.ahead([phase(index) for index in range(3)])
    assert made.began == [0, 1, 2]
    assert made.said[0].startswith("compiled 3 trainable sets of 3 phases before step 1 in ")


def test_long_phases_compile_along_the_way(made):
    made.steps.ahead([phase(index, steps=500) for index in range(3)])
    assert not made.began


def test_the_interpreter_changes_threads_as_before_once_it_is_closed(made):
    assert sys.getswitchinterval() <= compiled.SWITCH_SECONDS
    made.steps.close()
    assert sys.getswitchinterval() > compiled.SWITCH_SECONDS
