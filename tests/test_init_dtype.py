"""Runs from weights in bfloat16: cast up by default, or kept as they are and updated in float32."""

import gc
import json
import weakref

import fault_run
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jft import evaluate, fit, load_config, setup
from jft.errors import ConfigError
from jft.freeze.phases import Phase
from jft.models.zoo import make_model
from jft.report.writers import RunWriter
from jft.train import precision
from jft.train.inputs import Input
from jft.train.optim import make_optim
from jft.trained import export, load_trained
from jft.weights.export import write_random

pytestmark = pytest.mark.usefixtures("quick")
BF16 = np.dtype(ml_dtypes.bfloat16)


class Sources(dict):
    """{"vit" or "lite": weights in bfloat16}, written at their first use."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, key):
        name, args, classes = {
            "vit": ("vit_tiny", {"patch": 4, "image_size": 16, "depth": 2}, 7),
            "lite": ("efficientnet_lite_tiny", {"image_size": 16}, 10),
        }[key]
        model = make_model(name=name, args=args, num_classes=classes)
        self[key] = write_random(model, self.folder / key, 0, dtype="bfloat16")
        return self[key]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, quick):
    return Sources(tmp_path_factory.mktemp("sources"))


def config_of(sources, *changed, model="vit"):
    own = {
        "vit": ["model.args={'patch': 4, 'depth': 2}"],
        "lite": ["model.name=efficientnet_lite_tiny", "model.args={}"],
    }
    return load_config(
        "configs/digits_vit.py:tiny",
        [
            f"init.source=file:{sources[model]}",
            "parallel.devices=1",
            "optim.learning_rate=1e-2",
            *own[model],
            *changed,
        ],
    )


def finished(config, folder):
    """(run, outcome, what it said) of a run from its start to its end."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "message", lambda _, text: said.append(text))
        run = setup(config, folder)
        return run, fit(run), said


@pytest.fixture(scope="module")
def kept_run(sources, tmp_path_factory, quick):
    folder = tmp_path_factory.mktemp("kept") / "run"
    return folder, *finished(config_of(sources, "init.dtype=source"), folder)


def assert_bitwise(a, b):
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path]), np.asarray(b[path])
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), path


def test_masters_are_exact_casts_by_default(sources, tmp_path):
    run = setup(config_of(sources), tmp_path / "run")
    params, _ = run.start()
    arrays = load_file(sources["vit"] / "model.safetensors")
    assert {np.dtype(leaf.dtype).name for leaf in params.values()} == {"float32"}
    kernel = arrays["vit.encoder.layer.1.intermediate.dense.weight"].astype(np.float32).T
    np.testing.assert_array_equal(params["blocks_1/mlp/fc1/kernel"], kernel)
    assert {leaf.dtype for leaf in run.shapes[0].values()} == {jnp.dtype("float32")}


def assert_kept(folder, run, outcome, said):
    low = {path for path, leaf in run.shapes[0].items() if leaf.dtype == BF16}
    assert {path for path, leaf in outcome.params.items() if leaf.dtype == BF16} == low
    assert all(leaf.dtype == np.float32 for leaf in outcome.model_state.values())
    restored = fault_run.last_step(folder)
    moments = [leaf for name, leaf in restored.state.items() if name.startswith("opt_state/")]
    assert {leaf.dtype.name for leaf in moments} <= {"float32", "int32"} and len(moments) > 20
    assert {leaf.dtype for leaf in fault_run.last_step(folder).state.values()} >= {BF16}
    # Each step was compared with its plan in FLOPs and in bytes.
    compared = [text for text in said if text.startswith("step of phase")]
    assert len(compared) == 2 and not [text for text in said if "warning" in text]
    first = run.start()[0]
    moved = [p for p in low if np.any(np.asarray(outcome.params[p]) != np.asarray(first[p]))]
    assert len(moved) > len(low) / 2
    return low


def test_kept_leaves_stay_in_bfloat16_through_a_run(kept_run):
    _, run, outcome, _ = kept_run
    # The head is made anew, in float32: the data have another number of classes.
    head = {path for path in run.shapes[0] if path.startswith("head")}
    assert outcome.exit_code == 0 and assert_kept(*kept_run) == set(run.shapes[0]) - head


@pytest.mark.slow
def test_statistics_are_float32_beside_kept_leaves(sources, tmp_path):
    config = config_of(sources, "init.dtype=source", model="lite")
    run, outcome, said = finished(config, tmp_path / "run")
    assert outcome.model_state
    assert assert_kept(tmp_path / "run", run, outcome, said) == set(run.shapes[0])


def test_a_killed_run_in_bfloat16_ends_bit_for_bit_as_it_would_have(
    sources, kept_run, tmp_path, monkeypatch
):
    config = config_of(sources, "init.dtype=source")
    with monkeypatch.context() as patch:
        fault_run.stop_at(patch, 6)
        with pytest.raises(fault_run.Stop):
            fit(setup(config, tmp_path / "killed"))
    resumed = fit(setup(config, tmp_path / "killed"))
    assert_bitwise(kept_run[2].params, resumed.params)
    assert fault_run.logged_rows(kept_run[0]) == fault_run.logged_rows(tmp_path / "killed")


@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing_beside_kept_leaves(sources, kept_run, tmp_path):
    config = config_of(sources, "init.dtype=source", "parallel.devices=4", "train.accum_steps=2")
    found = fit(setup(config, tmp_path / "run")).params
    for path, leaf in kept_run[2].params.items():
        a, b = (np.asarray(x).astype(np.float32) for x in (leaf, found[path]))
        # Sums in another order may fall to the other side of a rounding. No loss depends on a bias
        # of the keys: its gradient is rounding alone.
        if not path.endswith("attn/key/bias"):
            assert np.abs(a - b).max() <= 2**-6 * np.abs(a).max(), path


def test_a_finished_run_in_bfloat16_is_evaluated_and_exported_as_it_is(kept_run, tmp_path):
    folder = kept_run[0]
    assert evaluate(folder, "test")["loss"] > 0
    trained = load_trained(folder)
    out = export(folder, tmp_path / "out")
    arrays = load_file(out / "model.safetensors")
    key = "vit.encoder.layer.1.intermediate.dense.weight"
    assert arrays[key].dtype == BF16 and arrays["classifier.weight"].dtype == np.float32
    np.testing.assert_array_equal(arrays[key].T, trained.params["blocks_1/mlp/fc1/kernel"])
    out = export(folder, tmp_path / "low", dtype="bfloat16")
    arrays = load_file(out / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {BF16}
    assert json.loads((out / "jft.json").read_text())["rounding"]["leaves"] == 2


def test_the_plan_counts_the_bytes_of_what_is_kept(sources, tmp_path):
    plans = {}
    for dtype in ("float32", "source"):
        run = setup(config_of(sources, f"init.dtype={dtype}"), tmp_path / dtype)
        plans[dtype] = [run.plan(phase, Input()) for phase in run.phases]
    low = {path for path, leaf in run.shapes[0].items() if leaf.dtype == BF16}
    spared = 2 * sum(run.shapes[0][path].size for path in low)
    for full, kept in zip(plans["float32"], plans["source"], strict=True):
        assert full.argument_bytes - kept.argument_bytes == spared
        assert full.optimizer_bytes == kept.optimizer_bytes
        assert full.all_reduce_bytes == kept.all_reduce_bytes and full.flops == kept.flops


@pytest.mark.parametrize(
    "changed",
    [["optim.ema_decay=0.9"], ["optim.name=schedule_free_adamw", "optim.schedule=constant"]],
)
def test_averages_of_kept_leaves_are_refused(sources, tmp_path, changed):
    with pytest.raises(ConfigError, match="averages need parameters in float32"):
        setup(config_of(sources, "init.dtype=source", *changed), tmp_path / "run")


def test_start_weights_are_handed_out_once_and_then_read_again(sources, tmp_path):
    run = setup(config_of(sources), tmp_path / "run")
    first = run.start()[0]
    assert all(isinstance(leaf, jax.Array) and leaf.committed for leaf in first.values())
    kept = weakref.ref(first["embed/cls_token"])
    values = {path: np.array(leaf) for path, leaf in first.items()}
    del first
    gc.collect()
    assert kept() is None, "the run must not hold what a step gives away"
    assert_bitwise(run.start()[0], values)


# --- the update -------------------------------------------------------------------------------


def phase_of(*paths):
    return Phase(0, "all", 0, 9, dict.fromkeys(paths, True), dict.fromkeys(paths, "0"))


def test_the_update_is_that_of_float32_rounded_once():
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16)
    gradients = [jnp.asarray(rng.normal(size=(64, 8)), jnp.float32) for _ in range(3)]
    optim = make_optim([(0, 9)], {"w": leaf}, ("w",), learning_rate=1e-2, weight_decay=0.1)
    phase = phase_of("w")
    tx, rates = optim.tx(phase), optim.rates(phase)
    low, full = {"w": leaf}, {"w": leaf.astype(jnp.float32)}
    state, wide = tx.init(low), tx.init(full)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, wide)
    for step, gradient in enumerate(gradients):
        extra = {"step": jnp.int32(step), "rates": rates}
        moves, state = tx.update({"w": gradient}, state, low, **extra)
        wanted, wide = tx.update({"w": gradient}, wide, precision.full(low), **extra)
        np.testing.assert_array_equal(moves["w"], wanted["w"])
        rounded = (precision.full(low)["w"] + wanted["w"]).astype(jnp.bfloat16)
        low = {"w": precision.add_rounded(low["w"], moves["w"])}
        np.testing.assert_array_equal(low["w"], rounded)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments and all(leaf.dtype == jnp.float32 for leaf in moments)


def test_leaves_in_float32_are_the_same_arrays_and_the_same_program():
    leaves = {"a": jnp.ones((3, 4)), "b": np.ones(3, np.int32)}
    assert all(precision.full(leaves)[name] is leaf for name, leaf in leaves.items())
    tx = optax.adam(1e-2)

    def update(tx):
        def step(gradient, state, params):
            moves, state = tx.update(gradient, state, params)
            return precision.add_rounded(params["a"], moves["a"]), state

        held = {"a": leaves["a"]}
        return jax.jit(step).lower(held, tx.init(held), held).as_text()

    assert update(tx) == update(precision.in_full(tx))
