"""A user's own Linen module through the Python API: fit, evaluate, predict, export, freezing."""

import json
import shutil

import fault_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

import jft
from jft.errors import ConfigError, WeightsError
from jft.models.family import Preprocess
from jft.models.layers import BatchNorm, Training
from jft.models.own import own_model

pytestmark = pytest.mark.usefixtures("quick")

CLASSES = len(fault_run.COLOURS)


class Switched(nn.Module):
    """As people write it: plain Linen with `train: bool`."""

    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x, train: bool):
        for name in ("first", "second"):
            x = nn.Conv(8, (3, 3), (2, 2), name=name)(x)
            x = nn.BatchNorm(not train, momentum=0.8, name=f"{name}_norm")(x)
            x = nn.relu(x)
        x = nn.Dropout(0.3, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


class Plain(nn.Module):
    """No switch at all, and no names: Linen gives Dense_0 and Dense_1."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES)(x)


class Synced(nn.Module):
    """With jft's own BatchNorm, whose moments are those of all devices."""

    @nn.compact
    def __call__(self, x, training=None):
        x = nn.Conv(4, (3, 3), (2, 2), name="stem")(x)
        x = BatchNorm(name="norm")(x, training)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Bf16(nn.Module):
    """Parameters in half precision."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, param_dtype="bfloat16", name="head")(x.reshape(x.shape[0], -1))


class InParts(nn.Module):
    """Runs a part of its stages, and knows nothing of jft's `Training`."""

    stages: tuple[str, ...] = ("stem", "norm", "head")

    @nn.compact
    def __call__(self, x, start=0, stop=None, train: bool = False):
        for stage in self.stages[start:stop]:
            if stage == "stem":
                x = nn.Conv(4, (3, 3), (2, 2), name="stem")(x)
            elif stage == "norm":
                x = nn.BatchNorm(not train, momentum=0.8, name="norm")(x)
            else:
                x = nn.Dense(CLASSES, name="head")(x.mean((1, 2)))
        return x


class LeftOut(Switched):
    """Calls more than it names."""

    stages: tuple[str, ...] = ("first", "head")


class Axis(nn.Module):
    """Names the axis of the devices itself."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(not train, axis_name="batch", name="norm")(x)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fault_run.write_arrays(tmp_path_factory.mktemp("data") / "images.npz", 32, 12, 12, 8)


def make_config(images, *overrides):
    return jft.load_config(
        "digits_vit",
        [
            "data.name=npz",
            f"data.path={images}",
            "data.image_size=8",
            "train.epochs=None",
            "train.steps=6",
            "train.batch_size=16",
            "optim.warmup_steps=0",
            "log.every_steps=2",
            "log.tensorboard=False",
            "parallel.devices=1",
            *overrides,
        ],
    )


def leaves_of(workdir, step=None):
    """Returns {path: leaf} of a checkpoint without optimizer state: params/..., model_state/..."""
    restored = fault_run.Checkpoints(workdir).restore(step)
    assert restored is not None
    leaves = {**restored.frozen, **restored.state}
    return {
        path: leaf for path, leaf in leaves.items() if path.startswith(("params/", "model_state/"))
    }


def assert_kept(before, after, *stages):
    """Fails unless the leaves of `stages` are equal bit for bit, and there are some."""
    found = [path for path in before if path.split("/")[1] in stages]
    assert {path.split("/")[1] for path in found} == set(stages)
    for path in found:
        assert before[path].tobytes() == after[path].tobytes(), path


def assert_moved(before, after, *stages):
    for stage in stages:
        paths = [path for path in before if path.split("/")[1] == stage]
        assert any(before[path].tobytes() != after[path].tobytes() for path in paths), stage


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A `Switched` module trained by groups of its own module names, three phases."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    phases = 'head@2 | second + second_norm + head@4 | "head/bias"'
    config = make_config(
        images, f"freeze.phases={phases}", "checkpoint.every_steps=2", "checkpoint.keep=9"
    )
    run = jft.setup(config, workdir, model=Switched())
    return workdir, run, jft.fit(run)


def test_a_module_with_train_and_batch_norm_and_dropout_trains_to_the_end(trained):
    workdir, _, outcome = trained
    assert (outcome.exit_code, outcome.step) == (0, 6)
    assert {"eval/accuracy", "test/accuracy"} <= outcome.metrics.keys()
    assert all(np.all(np.isfinite(leaf)) for leaf in outcome.params.values())
    assert json.loads((workdir / "status.json").read_text())["state"] == "done"


def test_what_a_phase_freezes_by_module_name_moves_0_ulp_statistics_included(trained):
    workdir, run, _ = trained
    params, stats = run.start()
    start = {f"params/{path}": np.asarray(leaf) for path, leaf in params.items()}
    start |= {f"model_state/{path}": np.asarray(leaf) for path, leaf in stats.items()}
    first, second, third = (leaves_of(workdir, step) for step in (2, 4, 6))
    assert start.keys() == first.keys() == third.keys()
    assert_moved(start, first, "head")
    assert_kept(start, first, "first", "first_norm", "second", "second_norm")
    assert_moved(first, second, "second", "second_norm", "head")
    assert_kept(first, second, "first", "first_norm")
    assert_kept(second, third, "first", "first_norm", "second", "second_norm")
    assert second["params/head/kernel"].tobytes() == third["params/head/kernel"].tobytes()
    assert second["params/head/bias"].tobytes() != third["params/head/bias"].tobytes()
    moved = [path for path in second if path.startswith("model_state/second_norm")]
    assert len(moved) == 2
    for path in moved:  # mean and var both follow the data while their norm trains
        assert first[path].tobytes() != second[path].tobytes(), path


def test_evaluate_gives_what_the_run_logged_last(trained, capsys):
    workdir, _, outcome = trained
    for split, prefix in (("val", "eval"), ("test", "test")):
        again = jft.evaluate(workdir, split, model=Switched())
        assert again == {name: outcome.metrics[f"{prefix}/{name}"] for name in again}


def test_predict_gives_what_the_module_itself_gives(trained, tmp_path):
    workdir, _, outcome = trained
    pixels = fault_run.coloured(np.random.default_rng(1), 2, 8)[:, :8]
    fault_run.Image.fromarray(pixels).save(tmp_path / "x.png")
    (row,) = jft.predict(workdir, [tmp_path / "x.png"], model=Switched())
    variables = {
        "params": jft.merge(outcome.params),
        "batch_stats": jft.merge(outcome.model_state),
    }
    x = (pixels[None].astype(np.float32) - 127.5) / 127.5
    wanted = jax.nn.softmax(Switched().apply(variables, x, train=False)[0])
    np.testing.assert_allclose(list(row["probabilities"].values()), wanted, rtol=1e-4)


def test_export_holds_every_leaf_under_the_modules_own_names(trained, tmp_path):
    workdir, _, outcome = trained
    jft.export(workdir, tmp_path / "out", model=Switched())
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    fault_run.assert_same_leaves(arrays, {**outcome.params, **outcome.model_state})
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]) == CLASSES


def test_a_run_of_an_own_module_resumes_bitwise(images, tmp_path, trained):
    config = make_config(images, "freeze.phases=head@2 | all", "checkpoint.every_steps=3")
    whole = jft.fit(jft.setup(config, tmp_path / "whole", model=Switched()))
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(part / "checkpoints" / "6")
    resumed = jft.fit(jft.setup(config, part, model=Switched()))
    assert resumed.metrics == whole.metrics
    fault_run.assert_same_end(part, tmp_path / "whole")


def test_the_verbs_say_that_a_run_had_its_own_module(trained):
    with pytest.raises(WeightsError, match="lacks") as error:
        jft.evaluate(trained[0])
    assert "\n" not in str(error.value)


def test_a_module_without_a_switch_trains_on_every_device_and_freezes_by_linens_names(
    images, tmp_path
):
    config = make_config(images, "parallel.devices=8", "freeze.phases=Dense_1")
    run = jft.setup(config, tmp_path, model=Plain())
    outcome = jft.fit(run)
    assert outcome.exit_code == 0 and not outcome.model_state
    start = run.start()[0]
    for path, leaf in outcome.params.items():
        same = np.asarray(leaf).tobytes() == np.asarray(start[path]).tobytes()
        assert same == path.startswith("Dense_0"), path
    assert jft.evaluate(tmp_path, model=Plain())["loss"] == outcome.metrics["test/loss"]


def test_jfts_batch_norm_in_an_own_module_gives_the_same_on_any_number_of_devices(images, tmp_path):
    ends = []
    for devices in (1, 4):
        options = (f"parallel.devices={devices}", "optim.name=sgd", "train.steps=3")
        config = make_config(images, *options, "eval.splits=[]")
        ends.append(jft.fit(jft.setup(config, tmp_path / str(devices), model=Synced())))
    one, four = ({**end.params, **end.model_state} for end in ends)
    for path in one:
        np.testing.assert_allclose(one[path], four[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_parameters_keep_the_dtype_that_a_module_gives_them(images, tmp_path, nonfinite):
    options = ("optim.grad_clip_norm=1.0", f"train.nonfinite={nonfinite}", "eval.splits=[]")
    outcome = jft.fit(jft.setup(make_config(images, *options), tmp_path, model=Bf16()))
    assert outcome.exit_code == 0
    assert {str(leaf.dtype) for leaf in outcome.params.values()} == {"bfloat16"}


def test_stages_of_an_own_module_give_a_cache_and_what_is_below_the_cut_runs_as_in_evaluation(
    images, tmp_path
):
    ends = {}
    for cache in ("off", "on"):  # "on" refuses a module that cannot run in parts
        options = (f"freeze.cache={cache}", "freeze.views=1", "freeze.phases=head")
        config = make_config(images, *options, "eval.splits=[]")
        ends[cache] = jft.fit(jft.setup(config, tmp_path / cache, model=InParts()))
    for path, leaf in ends["off"].params.items():
        np.testing.assert_allclose(ends["on"].params[path], leaf, rtol=1e-5, err_msg=path)


class Noisy(InParts):
    """Drops in its stem alone."""

    @nn.compact
    def __call__(self, x, start=0, stop=None, train: bool = False):
        if start == 0:
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return super().__call__(x, start, stop, train)


def test_below_the_cut_of_an_own_module_with_stages_nothing_is_random():
    model = own_model(Noisy(), CLASSES, Preprocess((0.0,) * 3, (1.0,) * 3, 8))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)

    def run(key, cut):
        training = Training(jnp.ones(4), jnp.arange(4), cut=cut)
        rngs = {"dropout": jax.random.key(key)}
        return model.apply(variables, x, training=training, rngs=rngs, mutable=["batch_stats"])[0]

    np.testing.assert_array_equal(run(0, 1), run(1, 1))
    assert not np.array_equal(run(0, 0), run(1, 0))


def test_statistics_of_one_device_alone_are_refused_in_one_line(images, tmp_path):
    config = make_config(images, "parallel.devices=2", "parallel.mode=pmap")
    with pytest.raises(ConfigError, match="parallel.mode") as error:
        jft.fit(jft.setup(config, tmp_path, model=Switched()))
    assert "\n" not in str(error.value)


def test_statistics_of_the_whole_batch_are_used_by_auto(images, tmp_path):
    options = ("parallel.devices=2", "parallel.mode=auto", "train.steps=1", "eval.splits=[]")
    config = make_config(images, *options)
    assert jft.fit(jft.setup(config, tmp_path, model=Switched())).exit_code == 0


def test_stages_of_an_own_module_stand_in_the_order_it_calls_them(images, tmp_path):
    config = make_config(images, "freeze.phases=first + first_norm@3 | head")
    jft.setup(config, tmp_path, model=Switched()).begin()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [group["group"] for group in plan["groups"]] == [
        "first",
        "first_norm",
        "second",
        "second_norm",
        "head",
    ]
    # The first layer trains: nothing below it is frozen. The head trains: all below it is.
    assert [(phase["class"], phase["cut"]) for phase in plan["phases"]] == [
        ("set", None),
        ("cut", "head"),
    ]


@pytest.mark.parametrize(
    "module, overrides, words",
    [
        (Switched(num_classes=5), [], r"gives \[1, 5\] for one image, the data needs \[1, 3\]"),
        (Switched(), ["freeze.phases=heda@2 | all"], "no group 'heda'.*did you mean 'head'"),
        (Switched(), ['freeze.phases=head + "hed/.*"'], "matches no leaf"),
        (LeftOut(), [], r"stages \['first', 'head'\] leave out the part 'first_norm'"),
        (Axis(), [], "model: .*batch.*jft.models.layers.BatchNorm"),
        (Switched(), ["train.batch_size=12", "parallel.devices=8"], "train.batch_size"),
    ],
)
def test_a_mistake_with_an_own_module_is_one_line_and_leaves_nothing(
    images, tmp_path, module, overrides, words
):
    with pytest.raises(ConfigError, match=words) as error:
        jft.setup(make_config(images, *overrides), tmp_path / "run", model=module)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
