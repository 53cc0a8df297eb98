"""The fuzzer of the readers: a short run of each here, 10^5 cases a reader in the slow suite.

With JFT_FAULTS=short that suite, too, runs fewer: 10^4 cases a reader.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_readers
import pytest
from fuzz_seeds import READERS

TESTS = Path(__file__).parent
MANY = 10_000 if os.environ.get("JFT_FAULTS") == "short" else 100_000


@pytest.mark.parametrize("reader", READERS)
def test_a_few_mutated_files_give_arrays_or_refusals(reader):
    tally = fuzz_readers.fuzz(reader, count=800, seed=7, jobs=1)
    assert not tally.failures, fuzz_readers.report(reader, tally, seed=7)
    assert tally.counts["arrays"] >= 10 and tally.counts["refused"] >= 100
    assert sum(tally.counts.values()) == 800
    cases = [fuzz_readers.make_case(7, reader, case) for case in range(800)]
    again = sum(map(fuzz_readers.digest_of, cases)) & 0xFFFFFFFF
    assert tally.digest == again, "a seed and a number make the same input in every process"


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_mutated_files_give_arrays_or_refusals(reader):
    tally = fuzz_readers.fuzz(reader, count=MANY, seed=0, jobs=os.cpu_count() or 1)
    print(fuzz_readers.report(reader, tally, seed=0))
    assert not tally.failures, fuzz_readers.report(reader, tally, seed=0)


FAULTS = """
import json, os, signal, socket, subprocess, sys, warnings
import numpy as np
import fuzz_readers

def loop(folder):
    while True:
        try:
            while True:
                pass
        except Exception:
            pass

def write(folder):
    (folder / "more").write_bytes(b"x")

def quiet_write(folder):
    os.close(os.open(folder / "more", os.O_CREAT | os.O_WRONLY))

def fetch(folder):
    import sqlite3

def set_environment(folder):
    os.environ["JFT_FUZZ"] = "1"

def state(folder):
    sys.setrecursionlimit(sys.getrecursionlimit() + 1)
    return {}

def grow(folder):
    np.ones(230 << 20, np.uint8)

def grow_beyond(folder):
    np.zeros(1 << 30, np.uint8)

FAULTS = {
    "another exception": lambda folder: {}["x"],
    "an exit": lambda folder: sys.exit(3),
    "too slow": loop,
    "a file": write,
    "a file by the system": quiet_write,
    "an import": fetch,
    "code": lambda folder: exec("1"),
    "a process": lambda folder: subprocess.run(["true"]),
    "a shell": lambda folder: os.system("true"),
    "a socket": lambda folder: socket.socket(),
    "the environment": set_environment,
    "another state": state,
    "memory": grow,
    "much memory": grow_beyond,
    "objects": lambda folder: {"a": np.array([None])},
    "a long message": lambda folder: (_ for _ in ()).throw(fuzz_readers.WeightsError("a\\nb")),
    "the end of the process": lambda folder: os.kill(os.getpid(), signal.SIGBUS),
}
good = {"weights": b"x"}
fault = None

def read(folder):
    return FAULTS[fault](folder) if fault else {}

def judge(reader):
    return fuzz_readers.Judge(read, [good], [])

def deadly(reader):
    global fault
    made, fault = judge(reader), "the end of the process"
    return made

if __name__ == "__main__" and sys.argv[1:] == ["all"]:
    fuzz_readers.CPU_SECONDS = 0.2
    one = judge("npz")
    outcomes = {}
    for fault in FAULTS:
        if fault != "the end of the process":
            outcomes[fault] = one.run(good)
    one.close()
    print(json.dumps(outcomes))
elif __name__ == "__main__":
    fuzz_readers.__file__ = __file__
    fuzz_readers.make_case = lambda *_: good
    fuzz_readers._judge = deadly
    sys.exit(fuzz_readers.main())
"""
WANTED = {
    "another exception": "KeyError",
    "an exit": "SystemExit",
    "too slow": "more than 0.2 s",
    "a file": "_SideEffectError: open",
    "a file by the system": "_SideEffectError: open",
    "an import": "_SideEffectError: import",
    "code": "_SideEffectError: exec",
    "a process": "_SideEffectError: subprocess",
    "a shell": "_SideEffectError: os.system",
    "a socket": "_SideEffectError: socket",
    "the environment": "_SideEffectError: os.putenv",
    "another state": "global state changed",
    "memory": "memory grew by",
    "much memory": "MemoryError",
    "objects": "not an array of numbers",
    "a long message": "no short line",
}


def run_faulty(tmp_path, *words):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTS)
    return subprocess.run(
        [sys.executable, script, *words],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        capture_output=True,
        text=True,
    )


def test_every_kind_of_fault_is_told(tmp_path):
    """The fuzzer's own oracle: a reader with each fault in turn."""
    done = run_faulty(tmp_path, "all")
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert set(outcomes) == set(WANTED)
    for fault, message in WANTED.items():
        outcome, why = outcomes[fault]
        assert outcome == "failed" and message in why, (fault, outcome, why)


def test_a_case_that_ends_the_process_is_told_and_the_next_ones_run(tmp_path):
    done = run_faulty(tmp_path, "--reader=npz", "--count=2", "--jobs=1")
    assert done.returncode == 1, done.stderr
    for case in range(2):
        assert f"--case={case}: the process ended with -7" in done.stdout


def test_one_case_is_replayed_alone_and_its_files_kept(tmp_path):
    done = subprocess.run(
        [sys.executable, TESTS / "fuzz_readers.py", "--reader=shards", "--seed=3", "--case=5",
         f"--keep={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert "shards case 5 of seed 3: " in done.stdout and done.returncode == 0, done.stderr
    wanted = fuzz_readers.make_case(3, "shards", 5)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == wanted
