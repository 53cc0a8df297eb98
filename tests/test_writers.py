"""Logs are append-only, cut exactly on resume, and never stop a training."""

import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from jft.errors import ConfigError
from jft.report import writers
from jft.report.progress import Progress, format_seconds
from jft.report.rundir import read_json, read_rows, write_atomic
from jft.report.writers import RunWriter, truncate_rows


def quiet(total_steps=None, **kwargs):
    return Progress(total_steps, stream=io.StringIO(), **kwargs)


def make_writer(workdir, resume_step=None, **kwargs):
    kwargs.setdefault("tensorboard", False)
    kwargs.setdefault("progress", quiet())
    return RunWriter(workdir, resume_step, **kwargs)


def log_steps(writer, steps):
    for step in steps:
        writer.write(step, {"phase": 0, "train/loss": 1 / (step + 3)}, {"elapsed_seconds": step})


def test_a_row_has_its_own_order_and_the_clock_stands_under_time(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(
            7,
            {"train/loss": np.float32(0.1), "eval/accuracy": 0.5, "phase": 1},
            {"step_seconds": 0.25, "eta_seconds": 3},
        )
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 7, "phase": 1, "eval/accuracy": 0.5, "train/loss": 0.10000000149011612, '
        '"time/eta_seconds": 3, "time/step_seconds": 0.25}\n'
    )


def test_equal_values_give_equal_bytes_whatever_their_order_and_type(tmp_path):
    values = {"b": 0.1, "a": 3.0, "phase": "head"}
    for folder, row in (("x", values), ("y", dict(reversed(values.items())))):
        with make_writer(tmp_path / folder) as writer:
            writer.write(1, row)
            writer.write(2, {"a": jnp.float32(0.3), "n": np.int64(4)})
    assert (tmp_path / "x/metrics.jsonl").read_bytes() == (
        tmp_path / "y/metrics.jsonl"
    ).read_bytes()


def test_rows_are_strict_json_even_when_a_value_is_not_finite(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(1, {"train/loss": float("nan"), "x": float("inf")})
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row == {"step": 1, "train/loss": None, "x": None}


def test_a_row_is_on_file_before_the_writer_is_closed(tmp_path):
    writer = make_writer(tmp_path)
    log_steps(writer, [1, 2])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    writer.close()


def test_a_resumed_log_equals_the_uninterrupted_one_bitwise(tmp_path):
    with make_writer(tmp_path / "whole") as writer:
        log_steps(writer, range(1, 11))
    with make_writer(tmp_path / "cut") as writer:
        log_steps(writer, range(1, 9))
    with open(tmp_path / "cut/metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9, "pha')
    with make_writer(tmp_path / "cut", resume_step=4) as writer:
        log_steps(writer, range(5, 11))
    whole, cut = (tmp_path / name / "metrics.jsonl" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_torn_last_line_is_dropped_even_within_the_kept_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3')
    assert truncate_rows(path, 5) == 0
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_log_that_needs_no_cut_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    before = path.stat().st_ino
    truncate_rows(path, 1)
    assert path.stat().st_ino == before


def test_starting_over_empties_the_log(tmp_path):
    with make_writer(tmp_path) as writer:
        log_steps(writer, [0, 1])
    with make_writer(tmp_path, resume_step=None):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_damaged_line_is_dropped_and_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n')
    progress = quiet()
    with make_writer(tmp_path, resume_step=2, progress=progress):
        pass
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "1 damaged line" in progress._stream.getvalue()


def test_a_full_disk_costs_one_warning_and_no_row_once_there_is_room(tmp_path):
    progress = quiet(interval_seconds=1e9)
    writer = make_writer(tmp_path, progress=progress)
    log_steps(writer, [1])
    real = writer._log._file

    class Full:
        def write(self, data):
            if real.write(data[:5]) == 5:  # the disk takes a piece, then is full
                raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    writer._log._file = Full()
    log_steps(writer, [2, 3])
    writer.flush()
    writer._log._file = real
    log_steps(writer, [4])
    writer.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert progress._stream.getvalue().count("No space left") == 1


def read_events(folder):
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_tensorboard_has_the_rows_and_hides_those_after_the_resumed_step(tmp_path):
    pytest.importorskip("tensorboardX")
    with make_writer(tmp_path, tensorboard=True) as writer:
        log_steps(writer, [1, 2])
    with make_writer(tmp_path, resume_step=1, tensorboard=True) as writer:
        log_steps(writer, [2])
    assert len(list((tmp_path / "tb").iterdir())) == 2
    events = list(read_events(tmp_path / "tb"))
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [0, 2]
    losses = [
        (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert losses == [(1, 0.25), (2, pytest.approx(0.2)), (2, pytest.approx(0.2))]


def test_a_failing_tensorboard_costs_one_warning(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    progress = quiet(interval_seconds=1e9)
    with make_writer(tmp_path, tensorboard=True, progress=progress) as writer:

        def refuse(*_):
            raise OSError("no space")

        monkeypatch.setattr(writer._events, "write", refuse)
        log_steps(writer, range(50))
    assert progress._stream.getvalue().count("training goes on") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 50


def test_a_missing_tensorboard_library_is_told_with_its_package(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("tensorboardX")

    monkeypatch.setattr(writers, "_Events", missing)
    progress = quiet()
    with make_writer(tmp_path, tensorboard=True, progress=progress):
        pass
    assert "pip install tensorboardX" in progress._stream.getvalue()


def test_status_is_replaced_whole(tmp_path):
    with make_writer(tmp_path, total_steps=9) as writer:
        writer.status(state="running", step=3, eta_seconds=2)
        writer.status(state="done", step=9, exit_reason="finished")
    assert read_json(tmp_path / "status.json") == {
        "state": "done",
        "step": 9,
        "total_steps": 9,
        "eta_seconds": None,
        "exit_reason": "finished",
    }
    assert os.listdir(tmp_path) == ["status.json"]


def test_an_unwritable_run_directory_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--workdir="):
        make_writer(tmp_path / "file")


def test_only_the_primary_process_writes(tmp_path):
    writer = RunWriter(tmp_path / "run", primary=False)
    writer.write(1, {"train/loss": 1.0})
    writer.status(state="running", step=1)
    writer.message("hello")
    writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_failed_atomic_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def refuse(*_):
        raise OSError("refused")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_a_plain_line_says_step_phase_loss_speed_wait_compile_and_eta():
    progress = quiet(100)
    progress.update(
        10,
        {"phase": "block[-3:]", "train/loss": 0.5, "train/grad_norm": 3.0,
         "train/nonfinite_steps": 2},
        {"examples_per_second": 1234.5, "data_wait_percent": 2.4, "compile_seconds": 12.0,
         "eta_seconds": 90},
    )  # fmt: skip
    assert progress._stream.getvalue() == (
        "step 10/100  phase block[-3:]  loss 0.5  2 steps not finite  1,234 examples/s  "
        "data wait 2%  compile 12s  eta 1m30s\n"
    )


def test_plain_lines_are_throttled_but_evaluations_and_ends_are_not():
    now = [0.0]
    progress = quiet(100, interval_seconds=10, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 1
        progress.update(step, {"phase": step > 50, "train/loss": 1.0})
        if step == 55:
            progress.update(step, {"phase": True, "eval/accuracy": 0.5})
    lines = progress._stream.getvalue().splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [1, 11, 21, 31, 41, 51, 55, 65, 75, 85, 95, 100]


def test_the_eta_leaves_the_first_step_out():
    now = [0.0]
    progress = quiet(101, clock=lambda: now[0])
    now[0] = 60.0  # compiling
    assert progress.eta_seconds(1) is None
    now[0] = 70.0
    assert progress.eta_seconds(11) == pytest.approx(90.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A progress on a terminal 120 columns wide, its stream, and its clock."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, now = Terminal(), [0.0]
    return Progress(10, stream=stream, clock=lambda: now[0]), stream, now


def test_a_terminal_gets_a_bar_with_names_taken_literally(terminal):
    progress, stream, now = terminal
    progress.phase(0, "block[-3:]")
    for step in (1, 5, 10):
        now[0] += 1
        progress.update(
            step,
            {"phase": 0, "train/loss": 0.25, "train/learning_rate": 1e-3},
            {"host_peak_bytes": 812e6, "mfu": 0.4, "eta_seconds": 90.0},
        )
    progress.message("a message with [brackets]")
    progress.close()
    shown = stream.getvalue()
    for words in ("step 5/10", "phase 0 (block[-3:])", "[brackets]", "━", "loss 0.25  lr 0.001"):
        assert words in shown
    assert "mfu 40%  host 812 MB" in shown and "eta 1m30s" in shown


def test_the_bar_moves_between_rows_and_is_drawn_at_most_a_few_times_a_second(terminal):
    progress, stream, now = terminal
    progress.update(1, {"phase": 0, "train/loss": 0.25})
    before = stream.getvalue()
    for step in (2, 3):
        progress.tick(step)
    progress.update(3, {"phase": 0, "train/loss": 0.2})
    assert stream.getvalue() == before
    now[0] += 1
    progress.tick(4)
    assert "step 4/10" in stream.getvalue() and "loss 0.2" in stream.getvalue()


def test_an_evaluation_says_how_far_it_is_and_stays_in_view(terminal):
    progress, stream, now = terminal
    progress.evaluating("val", 120, 400)
    now[0] += 1
    progress.evaluating("val", 512, 400)
    progress.update(5, {"phase": 0, "eval/accuracy": 0.5})
    now[0] += 1
    before = len(stream.getvalue())
    progress.update(6, {"phase": 0, "train/loss": 0.2})
    shown = stream.getvalue()
    assert "evaluating val 120/400" in shown and "evaluating val 400/400" in shown
    assert "evaluating" not in shown[before:]
    assert "step 5: eval accuracy 50.00%" in shown[before:]


def test_the_eta_on_a_terminal_counts_down_between_rows(terminal):
    progress, stream, now = terminal
    progress.update(1, {"train/loss": 1.0}, {"eta_seconds": 90.0})
    now[0] += 30
    progress.tick(2)
    assert "eta 1m00s" in stream.getvalue()
    now[0] += 70
    before = len(stream.getvalue())
    progress.tick(3)
    assert "step 3/10" in stream.getvalue()[before:] and "eta" not in stream.getvalue()[before:]


def test_the_bar_never_goes_back_to_the_step_of_a_late_row(terminal):
    progress, stream, now = terminal
    progress.phase(0, "head")
    assert "preparing" in stream.getvalue()
    now[0] += 1
    progress.tick(8)
    before = len(stream.getvalue())
    now[0] += 1
    progress.update(5, {"train/loss": 1.0})
    assert "step 8/10" in stream.getvalue()[before:]
    assert "preparing" not in stream.getvalue()[before:]


def test_a_long_evaluation_off_a_terminal_is_told_once_an_interval():
    now = [0.0]
    progress = quiet(100, interval_seconds=10, clock=lambda: now[0])
    progress.update(50, {"phase": 0, "train/loss": 1.0})
    for done in range(1, 26):
        now[0] += 1
        progress.evaluating("val", 16 * done, 400)
    assert progress._stream.getvalue().splitlines()[1:] == [
        "step 50/100  evaluating val 160/400",
        "step 50/100  evaluating val 320/400",
    ]


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_a_stream_that_goes_away_does_not_raise(error):
    class Gone(io.StringIO):
        def write(self, _):
            raise error

    progress = Progress(3, stream=Gone())
    progress.update(1, {"train/loss": 1.0})
    progress.message("hello")
    progress.close()


@pytest.mark.parametrize(
    "seconds, text",
    [(0.44, "0.4s"), (9.96, "10s"), (42, "42s"), (59.7, "1m00s"), (185, "3m05s"),
     (7620, "2h07m"), (273600, "3d04h"), (float("nan"), "?")],
)  # fmt: skip
def test_durations_read_as_people_say_them(seconds, text):
    assert format_seconds(seconds) == text
