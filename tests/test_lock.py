"""One process at a time writes to a run directory, and a dead one never blocks it."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jft.errors import ConfigError
from jft.train import lock
from jft.train.lock import Lock, process_start

ROOT = str(Path(__file__).parent.parent)
HOLD = """
import sys
sys.path.insert(0, sys.argv[2])
from jft.train.lock import Lock
lock = Lock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""
RACE = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from jft.errors import ConfigError
from jft.train.lock import Lock
go, start = os.pipe()
won, report = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        os.close(start)
        os.read(go, 1)  # returns when the parent closes its end
        try:
            Lock(sys.argv[1])
        except ConfigError as error:
            os.write(report, b"-" if "in use by process" in str(error) else b"?")
            os._exit(0)
        os.write(report, b"+")
        time.sleep(60)
        os._exit(0)
os.close(start)
text = b""
while len(text) < 8:
    text += os.read(won, 8)
print(text.decode())
os.killpg(0, 9)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), ROOT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def write_owner(folder, **changes):
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": process_start(os.getpid())}
    (folder / "lock.json").write_text(json.dumps(owner | changes))


def test_a_live_owner_is_refused_by_pid_and_host(tmp_path, holder):
    with pytest.raises(ConfigError, match=f"process {holder.pid} on host") as caught:
        Lock(tmp_path)
    assert socket.gethostname() in str(caught.value) and caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_killed_owner_is_taken_over_with_one_line(tmp_path, holder, caplog):
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock.json").exists()
    with caplog.at_level(logging.WARNING), Lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert len(caplog.records) == 1 and str(holder.pid) in caplog.text


def test_an_owner_that_ends_leaves_nothing(tmp_path, holder, caplog):
    holder.communicate()
    assert not (tmp_path / "lock.json").exists()
    Lock(tmp_path).release()
    assert not caplog.records


def test_release_frees_and_may_be_called_again(tmp_path):
    for _ in range(2):
        with Lock(tmp_path / "new" / "run") as held:
            with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
                Lock(tmp_path / "new" / "." / "run")
        held.release()
    assert not (tmp_path / "new" / "run" / "lock.json").exists()


def test_of_eight_at_once_one_gets_it(tmp_path):
    for content in (None, "", '{"pid": 1, "host": "elsewhere", "start": "x"}'):
        if content is not None:
            (tmp_path / "lock.json").write_text(content)
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", RACE, str(tmp_path), ROOT],
            capture_output=True, text=True, start_new_session=True, check=False,
        )  # fmt: skip
        assert sorted(found.stdout.strip()) == sorted("+-------"), found.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "another boot:1"},  # the pid was given to another process
        {"pid": 2**22 + 1},
        {"pid": None},
        {"host": "another-host"},  # its record lock is gone
    ],
)
def test_a_stale_owner_in_the_file_is_taken_over(tmp_path, changes, caplog):
    write_owner(tmp_path, **changes)
    with Lock(tmp_path):
        assert "taken over" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\0" * 50])
def test_a_damaged_lock_file_is_no_hindrance(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    Lock(tmp_path).release()


def test_without_record_locks_the_file_alone_refuses_a_live_owner(tmp_path, monkeypatch):
    def no_locks(_handle, _how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    write_owner(tmp_path)
    with pytest.raises(ConfigError, match="in use by process"):
        Lock(tmp_path)
    write_owner(tmp_path, start="gone")
    Lock(tmp_path).release()


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be locked"):
        Lock(tmp_path / "file" / "run")


def test_a_refusal_in_the_same_process_costs_no_lock(tmp_path):
    probe = f"""
import fcntl
try:
    fcntl.lockf(open({str(tmp_path / "lock.json")!r}, "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("locked")
"""
    with Lock(tmp_path):
        with pytest.raises(ConfigError):
            Lock(tmp_path)
        found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert found.stdout == "locked\n"


def test_process_start_tells_processes_apart(holder):
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(os.getpid()) != process_start(holder.pid)
    assert process_start(2**22 + 1) is None
