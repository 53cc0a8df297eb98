"""The first signal is a flag, the second one ends the process, and handlers are put back."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jft.train.signals import StopSignals

ROOT = str(Path(__file__).parent.parent)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_sets_the_flag_and_its_exit_code(number, code, capfd):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as stop:
        assert not stop and stop.exit_code is None
        os.kill(os.getpid(), number)
        assert stop and stop.exit_code == code and stop.signal == number
    assert {each: signal.getsignal(each) for each in before} == before
    assert stop.exit_code == code
    assert signal.Signals(number).name in capfd.readouterr().err


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_it_does_nothing_outside_the_main_thread():
    found = []

    def enter():
        before = signal.getsignal(signal.SIGTERM)
        with StopSignals() as stop:
            found.append(bool(stop) or signal.getsignal(signal.SIGTERM) is not before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("SIGTERM", "SIGTERM", 143), ("SIGINT", "SIGINT", 130), ("SIGTERM", "SIGINT", 130)],
)
def test_the_second_signal_ends_the_process_at_once(first, second, code):
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {ROOT!r})
from jft.train.signals import StopSignals
try:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.{first})
        assert stop
        os.kill(os.getpid(), signal.{second})
        time.sleep(60)
finally:
    print("not reached")
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == code and found.stdout == ""
    assert "at once" in found.stderr and "Traceback" not in found.stderr
