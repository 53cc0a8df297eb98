"""Checkpoints: whole or not at all, verified when read, and nothing good is ever lost."""

import functools
import logging
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jft.errors import ConfigError, WeightsError
from jft.train import checkpoint, step_folder
from jft.train.checkpoint import Checkpoints

DTYPES = [
    *("bool uint8 int8 uint16 int16 uint32 int32 uint64 int64".split()),
    *("float16 float32 float64 complex64 complex128".split()),
    *("bfloat16 float8_e4m3fn float8_e5m2 int4 uint4".split()),
]
SHORT = os.environ.get("JFT_FAULTS") == "short"
FROZEN = {
    "stem/kernel": np.arange(300, dtype=np.float32).reshape(3, 100),
    "stem/mean": np.full(7, 0.5, ml_dtypes.bfloat16),
}


def state_at(step):
    """A small state that is another one at every step."""
    rng = np.random.default_rng(step)
    return {
        "params/head/kernel": rng.standard_normal((40, 20), dtype=np.float32),
        "params/head/bias": rng.standard_normal(20).astype(ml_dtypes.bfloat16),
        "opt_state/0/count": np.asarray(step, np.int32),
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        leaf = np.asarray(leaf)
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        assert found[path].tobytes() == leaf.tobytes(), path


def save(run, *steps, **kwargs):
    with Checkpoints(run, **kwargs) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), FROZEN, {"position": step})


def files_of(run):
    return sorted(file for file in run.rglob("*") if file.is_file() and file.stat().st_size)


def names(run):
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def assert_restores(run, step, skipped, **kwargs):
    restored = Checkpoints(run).restore(**kwargs)
    assert restored.step == step and restored.info == {"position": step}
    assert len(restored.skipped) == skipped
    assert_equal(restored.state, state_at(step))
    assert_equal(restored.frozen, FROZEN)
    return restored


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "run"
    save(run, 10, 20)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


# What goes in comes out


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    state = {}
    for name in DTYPES:
        for shape in [(), (3,), (2, 3), (0, 2)]:
            dtype = np.dtype(getattr(ml_dtypes, name, name))
            state[f"{name}/{len(shape)}_{sum(shape)}"] = rng.integers(0, 2, shape).astype(dtype)
    state["special/values"] = np.array([-0.0, np.nan, -np.nan, np.inf, 5e-324, 0.0])
    state["special/payload"] = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)
    state["special/negative_zeros"] = np.full((2, 2), -0.0, np.float32)
    state["special/transposed"] = np.arange(6.0).reshape(2, 3).T
    state["special/big_endian"] = np.arange(3, dtype=">f4")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        restored = checkpoints.restore()
    state["special/big_endian"] = np.arange(3, dtype=np.float32)
    state["special/transposed"] = state["special/transposed"].copy()
    assert_equal(restored.state, state)


def test_jax_arrays_and_python_numbers_are_leaves(tmp_path):
    devices = jax.sharding.Mesh(np.array(jax.devices()), "batch")
    spread = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("batch"))
    state = {
        "w": jnp.ones((2, 2), jnp.bfloat16),
        "spread": jax.device_put(jnp.arange(16.0), spread),
        "key": jax.random.key_data(jax.random.key(3)),
        "count": 7,
        "rate": np.float32(0.5),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"f": jnp.zeros(3)}, {})
        restored = checkpoints.restore()
    assert_equal(restored.state, {path: np.asarray(leaf) for path, leaf in state.items()})


def test_an_empty_state_and_empty_frozen_set_are_a_step(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {}, {}, {})
        restored = checkpoints.restore()
    assert (restored.step, restored.state, restored.frozen) == (1, {}, {})


def test_info_and_metrics_come_back(tmp_path):
    info = {"phase": 1, "data": {"position": 3, "order": [1, 2]}, "text": "ü", "none": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), {}, info, {"loss": jnp.float32(0.5), "n": np.int64(3)})
        restored = checkpoints.restore()
    assert restored.info == info and restored.metrics == {"loss": 0.5, "n": 3}
    with pytest.raises(TypeError):
        Checkpoints(tmp_path).save(2, {}, {}, {"bad": {1, 2}})


def test_a_typed_key_is_refused_by_name(tmp_path):
    with pytest.raises(WeightsError, match="'state/key'.*key_data"):
        Checkpoints(tmp_path).save(1, {"state/key": jax.random.key(0)}, {}, {})


def test_nothing_is_touched_before_the_first_save(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.restore() is None and checkpoints.steps() == []
    assert checkpoints.latest() is None and checkpoints.best() is None
    checkpoints.close()
    assert not (tmp_path / "run").exists()
    for wrong in ({"keep": 0}, {"keep": True}, {"best_mode": "least"}):
        with pytest.raises(ConfigError):
            Checkpoints(tmp_path, **wrong)


# In the background


def test_donated_and_overwritten_arrays_are_saved_as_they_were(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(tree):
        return jax.tree.map(lambda leaf: leaf + 1, tree)

    tree = {"a": jnp.zeros((64, 64)), "b": jnp.zeros(5), "c": jnp.asarray(0)}
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for number in range(5):
            host = np.full(9, float(number))
            checkpoints.save(number, tree | {"host": host}, {}, {})
            host[:] = -1.0
            for _ in range(3):
                tree = step(tree)
        for number in range(5):
            state = checkpoints.restore(number).state
            assert all((state[path] == 3 * number).all() for path in tree)
            assert (state["host"] == number).all()


def test_save_returns_before_the_writing_and_the_next_one_waits(tmp_path, monkeypatch):
    gate, entered = threading.Event(), threading.Event()

    def slow(folder):
        entered.set()
        assert gate.wait(60)
        return step_folder.seal_files(folder)

    monkeypatch.setattr(checkpoint, "seal_files", slow)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), FROZEN, {})
        assert entered.wait(60)
        checkpoints.poll()
        assert checkpoints.steps() == []
        threading.Timer(0.1, gate.set).start()
        checkpoints.save(2, state_at(2), FROZEN, {})
        assert checkpoints.steps() == [1]
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_frozen_leaves_are_stored_once_for_all_steps(saved):
    assert len(list((saved / "frozen").iterdir())) == len(FROZEN)


def test_a_frozen_set_that_changes_is_followed(tmp_path):
    frozen = {"w": np.zeros(3)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, {}, frozen, {})
        checkpoints.wait()
        frozen["w"][:] = 1.0  # in place, so it has to be said
        checkpoints.frozen_changed()
        checkpoints.save(2, {}, frozen, {})
        checkpoints.save(3, {}, {"w": jnp.full(3, 2.0), "v": jnp.ones(1)}, {})
        values = [checkpoints.restore(step).frozen["w"][0] for step in (1, 2, 3)]
    assert values == [0.0, 1.0, 2.0]


# Which steps stay


@pytest.mark.parametrize(
    ("mode", "metric", "values", "stay", "best"),
    [
        ("max", "acc", [0.1, 0.9, 0.2, 0.3, 0.4], [1, 3, 4], 1),
        ("min", "acc", [0.1, 0.9, 0.2, 0.3, 0.4], [0, 3, 4], 0),
        ("max", "acc", [0.5, 0.5, 0.5, 0.5, 0.5], [3, 4], 4),
        ("max", "acc", [0.5, float("nan"), None, float("inf"), 0.1], [0, 3, 4], 0),
        ("max", None, [0.1, 0.9, 0.2, 0.3, 0.4], [3, 4], None),
        ("max", "other", [0.1, 0.9, 0.2, 0.3, 0.4], [3, 4], None),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, mode, metric, values, stay, best):
    with Checkpoints(tmp_path, keep=2, best_metric=metric, best_mode=mode) as checkpoints:
        for step, value in enumerate(values):
            checkpoints.save(step, {"w": np.ones(1) * step}, {}, {}, value and {"acc": value})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == (stay, 4, best)
    assert names(tmp_path) == [str(step) for step in stay]


def test_saving_an_equal_step_again_renews_what_is_said_about_it(run):
    before = (run / "checkpoints/20/state/_METADATA").stat().st_mtime_ns
    with Checkpoints(run, best_metric="acc") as checkpoints:
        checkpoints.save(20, state_at(20), FROZEN, {"position": 21}, {"acc": 0.5})
        checkpoints.wait()
        assert checkpoints.best() == 20 and checkpoints.restore().info == {"position": 21}
    assert names(run) == ["10", "20"]
    assert (run / "checkpoints/20/state/_METADATA").stat().st_mtime_ns == before


def test_a_good_step_with_other_content_is_moved_aside_not_lost(run, caplog):
    with Checkpoints(run) as checkpoints:
        checkpoints.save(20, state_at(21), FROZEN, {})
        checkpoints.save(20, state_at(22), FROZEN, {})
        assert_equal(checkpoints.restore().state, state_at(22))
    assert names(run) == ["10", "20", "replaced-20-1", "replaced-20-2"]
    assert "moved aside" in caplog.text


def test_going_on_from_an_older_step_keeps_what_it_saves(run):
    save(run, 5, keep=1)
    assert Checkpoints(run).steps() == [5, 20]


# Damage


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def check_caught(run, file, before):
    """The damaged file is never read as if it were right, whichever it is."""
    part = file.relative_to(run).parts
    if part[0] == "frozen":
        with pytest.raises(WeightsError, match=file.name):
            Checkpoints(run).restore()
        assert_restores(run, 20, 0, rebuild=lambda _paths: FROZEN)
        assert file.read_bytes() == before
    elif part[1] == "20":
        restored = assert_restores(run, 10, 1)
        assert "checkpoints/20" in restored.skipped[0]
    else:
        assert_restores(run, 20, 0)
        with pytest.raises(WeightsError, match="checkpoints/10"):
            Checkpoints(run).restore(10)


def flip_many(run, count):
    rng = random.Random(7)
    for _ in range(count):
        file = rng.choice(files_of(run))
        before = file.read_bytes()
        flip(file, rng)
        check_caught(run, file, before)
        file.write_bytes(before)


def test_a_flipped_bit_anywhere_is_caught(run):
    flip_many(run, 20)


@pytest.mark.faults
def test_many_flipped_bits_are_caught(run):
    flip_many(run, 40 if SHORT else 500)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "emptied", "zeroed", "longer"])
def test_each_damaged_file_is_caught(run, damage):
    files = random.Random(1).sample(files_of(run), 6)
    files += [run / "checkpoints/20/manifest.json"]
    for file in files:
        before = file.read_bytes()
        changed = {
            "deleted": None,
            "truncated": before[:-1],
            "emptied": b"",
            "zeroed": bytes(len(before)),
            "longer": before + b"\0",
        }[damage]
        file.unlink() if changed is None else file.write_bytes(changed)
        check_caught(run, file, before)
        file.write_bytes(before)


def test_swapped_files_and_folders_are_caught(run):
    old, new = run / "checkpoints/10", run / "checkpoints/20"
    for name in ("manifest.json", "state/manifest.ocdbt", "state/_METADATA"):
        before = (new / name).read_bytes()
        if before == (old / name).read_bytes():
            continue
        shutil.copy(old / name, new / name)
        check_caught(run, new / name, before)
        (new / name).write_bytes(before)
    new.rename(run / "aside")
    shutil.copytree(old, new)
    assert "holds step 10" in assert_restores(run, 10, 1).skipped[0]


def test_a_link_in_place_of_a_file_is_refused(run):
    file = run / "checkpoints/20/state/_METADATA"
    file.rename(run / "elsewhere")
    file.symlink_to(run / "elsewhere")
    assert_restores(run, 10, 1)


def test_a_wrong_number_from_the_reader_is_caught_by_its_leaf_hash(run, monkeypatch):
    read = step_folder.read_leaves

    def wrong(folder, manifest):
        leaves = read(folder, manifest)
        if folder.name == "20":
            leaves["params/head/kernel"][0, 0] += 1
        return leaves

    monkeypatch.setattr(step_folder, "read_leaves", wrong)
    assert "params/head/kernel" in assert_restores(run, 10, 1).skipped[0]


def test_when_no_step_is_good_the_run_is_refused_not_restarted(run):
    for step in ("10", "20"):
        flip(run / "checkpoints" / step / "manifest.json", random.Random(0))
    with pytest.raises(WeightsError, match="no checkpoint is whole.*20.*10") as caught:
        Checkpoints(run).restore()
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_a_step_that_is_not_there_is_named_with_those_that_are(run):
    with pytest.raises(WeightsError, match=r"no step 15, only \[10, 20\]"):
        Checkpoints(run).restore(15)


def test_training_goes_on_past_a_damaged_step(run, caplog):
    flip(run / "checkpoints/20/manifest.json", random.Random(0))
    with caplog.at_level(logging.WARNING), Checkpoints(run) as checkpoints:
        assert checkpoints.restore().step == 10
        checkpoints.save(15, state_at(15), FROZEN, {"position": 15})
        checkpoints.save(20, state_at(20), FROZEN, {"position": 20})
        checkpoints.wait()
        assert checkpoints.steps() == [15, 20]
    assert_restores(run, 20, 0)
    assert names(run) == ["15", "20", "damaged-20-1"]
    assert "is damaged" in caplog.text and "moved aside" in caplog.text


def test_a_damaged_step_counts_for_nothing_when_old_ones_are_deleted(run):
    data = run / "checkpoints/20/state/manifest.ocdbt"
    flip(data, random.Random(0))  # the size stays: only the hash tells
    with Checkpoints(run, keep=1) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.restore().step == 10 and checkpoints.steps() == [10]
        checkpoints.save(11, state_at(11), FROZEN, {"position": 11})
    assert_restores(run, 11, 0)


def test_what_a_killed_writer_leaves_is_no_step_and_no_hindrance(run):
    folder = run / "checkpoints"
    for name in ("30.writing", "40.writing/40.orbax-checkpoint-tmp", "7.deleting"):
        shutil.copytree(folder / "20", folder / name)
    (folder / "30").mkdir()  # committed by orbax, say, with no manifest
    (folder / "30" / "commit_success.txt").touch()
    (run / "frozen" / "x.safetensors.tmp").touch()
    assert_restores(run, 20, 1)
    save(run, 30)
    assert_restores(run, 30, 0)
    assert names(run) == ["20", "30", "damaged-30-1"]
    assert not list((run / "frozen").glob("*.tmp"))


def test_only_steps_moved_aside_is_not_a_fresh_start(run):
    for step in ("10", "20"):
        (run / "checkpoints" / step).rename(run / "checkpoints" / f"replaced-{step}-1")
    with pytest.raises(WeightsError, match="moved aside"):
        Checkpoints(run).restore()


# Failing saves


@pytest.fixture
def full_disk():
    """No file may grow beyond 20,000 bytes, as with a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(full=True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else limits[0], limits[1]))

    yield fill
    fill(False)


@pytest.mark.filterwarnings("ignore")  # orbax drops coroutines when its writing fails
@pytest.mark.parametrize("part", ["state", "frozen"])
def test_a_full_disk_is_one_error_and_costs_no_good_step(run, full_disk, part):
    big = {"big": np.random.default_rng(0).standard_normal(50_000)}
    state, frozen = (state_at(30) | big, FROZEN) if part == "state" else (state_at(30), big)
    with Checkpoints(run) as checkpoints:
        full_disk()
        checkpoints.save(30, state, frozen, {})
        with pytest.raises(WeightsError, match="step 30 could not be saved in .*run") as caught:
            checkpoints.wait()
        full_disk(False)
        assert "\n" not in str(caught.value)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20] and names(run) == ["10", "20"]
        assert not list((run / "frozen").glob("*.tmp"))
        checkpoints.save(30, state, frozen, {})
    assert_equal(Checkpoints(run).restore().state, state)


@pytest.mark.parametrize("tell", ["poll", "wait", "close", "save"])
def test_a_failed_save_is_told_once_by_whatever_comes_next(run, monkeypatch, tell):
    def fail(_folder):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(run)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal_files", fail)
        checkpoints.save(30, state_at(30), FROZEN, {})
        with pytest.raises(WeightsError, match="No space left"):
            if tell == "poll":
                while True:
                    checkpoints.poll()
            elif tell == "save":
                checkpoints.save(40, state_at(40), FROZEN, {})
            else:
                getattr(checkpoints, tell)()
    checkpoints.poll()
    checkpoints.close()
    assert names(run) == ["10", "20"]


# Kill -9

CHILD = """
import os, signal, sys, time
import numpy as np
sys.path[:0] = [{root!r}, {tests!r}]
from test_checkpoint import FROZEN, assert_equal, state_at
from jft.train.checkpoint import Checkpoints

def train(pipe):
    checkpoints = Checkpoints({run!r}, keep=1)
    restored = checkpoints.restore()
    step = restored.step if restored else 0
    if restored:
        assert_equal(restored.state, state_at(step))
    os.write(pipe, b"%d\\n" % step)
    while True:
        step += 1
        checkpoints.save(step, state_at(step), FROZEN, {{"position": step}})
        checkpoints.wait()
        os.write(pipe, b"%d\\n" % step)

for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            train(writer)
        finally:
            os._exit(9)
    os.close(writer)
    saves, delay = line.split()
    told = b""
    while told.count(b"\\n") <= int(saves):
        told += os.read(reader, 1)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while block := os.read(reader, 1 << 16):
        told += block
    print(os.WTERMSIG(status), told.split()[-1].decode(), flush=True)
"""


def kill_many(run, count):
    tests = Path(__file__).parent
    script = CHILD.format(root=str(tests.parent), tests=str(tests), run=str(run))
    rng = random.Random(3)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as nursery:  # fmt: skip
        newest = grown = 0
        for attempt in range(count):
            saves = attempt % 3  # 0: maybe before the first one
            nursery.stdin.write(f"{saves} {rng.uniform(0.0, 0.1)}\n")
            nursery.stdin.flush()
            signal, told = map(int, nursery.stdout.readline().split())
            assert signal == 9
            newest = max(newest, told)
            if restored := Checkpoints(run).restore():
                assert newest <= restored.step <= newest + 1 and restored.skipped == []
                assert_restores(run, restored.step, 0)
                newest = restored.step
                grown += saves
            else:
                assert newest == 0
        nursery.stdin.close()
    assert newest >= grown > 0


def test_kill_9_in_the_middle_of_saves_costs_one_save_at_most(tmp_path):
    kill_many(tmp_path, 5)


@pytest.mark.faults
def test_many_kills_cost_one_save_each_at_most(tmp_path):
    kill_many(tmp_path, 10 if SHORT else 100)


# Two processes

PROCESS = """
import os, sys
sys.path[:0] = [{root!r}]
import jax, numpy as np
rank = int(sys.argv[1])
jax.distributed.initialize("127.0.0.1:{port}", 2, rank)
from jax.experimental import multihost_utils
from jft.errors import WeightsError
from jft.train.checkpoint import Checkpoints
mesh = jax.sharding.Mesh(np.array(jax.devices()), "batch")
def place(value, *spec):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.make_array_from_process_local_data(sharding, value)
whole, part = place(np.arange(6.0)), place(np.arange(2.0), "batch")
with Checkpoints({run!r}) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, {{"w": whole * step}}, {{"f": whole}}, {{}})
    checkpoints.wait()
    multihost_utils.sync_global_devices("saved")
    restored = checkpoints.restore()
    assert restored.step == 3 and (restored.state["w"] == 3 * np.arange(6)).all()
    try:
        checkpoints.save(4, {{"w": part}}, {{}}, {{}})
        assert rank == 1
    except WeightsError as error:
        assert rank == 0 and "spread over processes" in str(error)
multihost_utils.sync_global_devices("done")
os._exit(0)
"""


@pytest.mark.slow
def test_process_0_of_two_saves_and_both_restore(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parent.parent)
    script = PROCESS.format(root=root, port=port, run=str(tmp_path))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
