"""A user's own NNX module through `jft.from_nnx`: fit, evaluate, export, freezing, devices."""

import json
import shutil

import fault_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from test_own_model import CLASSES, assert_kept, assert_moved, leaves_of, make_config

import jft
from jft.errors import ConfigError, WeightsError
from jft.models.family import Preprocess
from jft.models.layers import Training
from jft.models.own import own_model
from jft.tree import flatten

pytestmark = pytest.mark.usefixtures("quick")


class Layer(nnx.Module):
    def __init__(self, features, rngs, dropout=0.3):
        # No bias below a BatchNorm: its true gradient is zero, so all that moves it is rounding.
        self.conv = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.8, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.relu(self.norm(self.conv(x))))


class Net(nnx.Module):
    """As people write it: a list of layers, BatchNorm, dropout, `train()` and `eval()`."""

    def __init__(self, rngs, dropout=0.3):
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)  # made first, called last
        self.stem = nnx.Conv(3, 6, (3, 3), 2, rngs=rngs)
        self.layers = nnx.List([Layer(6, rngs, dropout) for _ in range(2)])

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


class Staged(nnx.Module):
    """Runs a part of its stages."""

    stages = ("stem", "layers_0", "layers_1", "head")
    preprocess = Preprocess((100.0,) * 3, (50.0,) * 3, 8)

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), 2, rngs=rngs)
        self.layers = nnx.List([Layer(6, rngs) for _ in range(2)])
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x, start=0, stop=None):
        parts = [self.stem, *self.layers, lambda x: self.head(x.mean((1, 2)))]
        for part in parts[start:stop]:
            x = part(x)
        return x


class Called(nnx.Module):
    """Is told by arguments, random streams too."""

    def __init__(self, rngs):
        self.body = nnx.Linear(192, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5)
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x, train: bool, rngs=None):
        x = self.body(x.reshape(x.shape[0], -1))
        return self.head(self.drop(x, deterministic=not train, rngs=rngs))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fault_run.write_arrays(tmp_path_factory.mktemp("data") / "images.npz", 32, 12, 12, 8)


def net(seed=0, **kw):
    return Net(nnx.Rngs(seed), **kw)


def variables_of(outcome):
    return {"params": outcome.params, "batch_stats": outcome.model_state}


def state_of(module):
    """{path: array} of an NNX module's own parameters and statistics."""
    _, params, stats, _ = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    found = {}
    for place, variable in [*nnx.to_flat_state(params), *nnx.to_flat_state(stats)]:
        path = "/".join(map(str, place)).replace("layers/", "layers_")
        found[path] = np.asarray(variable[...])
    return found


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """An instance, trained in three phases by groups of its own names."""
    workdir = tmp_path_factory.mktemp("nnx") / "run"
    phases = "head@2 | layers[-1:] + head@4 | 'head/bias'"
    options = ("checkpoint.every_steps=2", "checkpoint.keep=9", "optim.ema_decay=0.5")
    config = make_config(images, f"freeze.phases={phases}", *options)
    instance = net()
    run = jft.setup(config, workdir, model=jft.from_nnx(instance))
    outcome = jft.fit(run)
    fault_run.assert_same_leaves(state_of(instance), state_of(net()))
    return workdir, run, outcome


def test_a_run_starts_from_the_weights_of_the_instance(trained):
    _, run, outcome = trained
    assert outcome.exit_code == 0 and outcome.step == 6
    params, stats = run.start()
    fault_run.assert_same_leaves(state_of(net()), {**params, **stats})
    assert set(params) >= {"stem/kernel", "layers_0/conv/kernel", "layers_1/norm/scale"}
    assert set(stats) == {f"layers_{i}/norm/{name}" for i in (0, 1) for name in ("mean", "var")}


def test_what_a_phase_freezes_moves_0_ulp_statistics_included(trained):
    workdir, _, _ = trained
    first, second, third = (leaves_of(workdir, step) for step in (2, 4, 6))
    assert_moved(first, second, "layers_1", "head")
    assert_kept(first, second, "stem", "layers_0")
    assert_kept(second, third, "stem", "layers_0", "layers_1")
    moved = [path for path in second if path.startswith("model_state/layers_1")]
    assert len(moved) == 2
    for path in moved:
        assert first[path].tobytes() != second[path].tobytes(), path
    plan = json.loads((workdir / "plan.json").read_text())
    # In the order of the calls, not in that of the attributes.
    assert [group["group"] for group in plan["groups"]] == [
        "stem",
        "layers[0]",
        "layers[1]",
        "head",
    ]
    assert [phase["cut"] for phase in plan["phases"]] == ["head", "layers_1", "head"]


def test_evaluate_predict_and_the_module_that_comes_back_agree(trained, tmp_path):
    workdir, _, outcome = trained
    wrapped = jft.from_nnx(net(seed=5))  # its own weights do not matter any more
    again = jft.evaluate(workdir, "val", model=wrapped)
    assert again == {name: outcome.metrics[f"eval/{name}"] for name in again}
    pixels = fault_run.coloured(np.random.default_rng(1), 2, 8)[:, :8]
    fault_run.Image.fromarray(pixels).save(tmp_path / "x.png")
    (row,) = jft.predict(workdir, [tmp_path / "x.png"], model=wrapped)
    back = wrapped.to_nnx(variables_of(outcome))
    assert isinstance(back, Net) and not any(
        np.shares_memory(leaf, outcome.params[path]) for path, leaf in state_of(back).items()
        if path in outcome.params
    )  # fmt: skip
    fault_run.assert_same_leaves(state_of(back), {**outcome.params, **outcome.model_state})
    from jft.trained import load_trained

    averaged = load_trained(workdir, model=wrapped)
    back = wrapped.to_nnx(
        {"params": jft.merge(averaged.params), "batch_stats": averaged.model_state}
    )
    x = (pixels[None].astype(np.float32) - 127.5) / 127.5
    wanted = jax.nn.softmax(back(jnp.asarray(x))[0])
    np.testing.assert_allclose(list(row["probabilities"].values()), wanted, rtol=1e-4)
    back.train()  # it is an ordinary module again
    assert back(jnp.asarray(x)).shape == (1, CLASSES)


def test_an_export_loads_again_under_the_modules_own_names(trained, images, tmp_path):
    workdir, _, _ = trained
    out = jft.export(workdir, tmp_path / "out", model=jft.from_nnx(net()))
    arrays = load_file(out / "model.safetensors")
    assert set(arrays) == set(state_of(net()))
    config = make_config(images, f"init.source=file:{out}")
    run = jft.setup(config, tmp_path / "run", model=jft.from_nnx(Net))
    params, stats = run.start()
    fault_run.assert_same_leaves(arrays, {**params, **stats})
    config = make_config(images, f"init.source=file:{out}", "init.fresh=['head/.*']")
    mixed = jft.setup(config, tmp_path / "mixed", model=jft.from_nnx(net(7))).start()[0]
    np.testing.assert_array_equal(mixed["head/kernel"], state_of(net(7))["head/kernel"])
    np.testing.assert_array_equal(mixed["stem/kernel"], arrays["stem/kernel"])
    np.savez(tmp_path / "w.npz", **{n: a for n, a in arrays.items() if n != "stem/bias"})
    config = make_config(images, f"init.source=file:{tmp_path}/w.npz")
    with pytest.raises(WeightsError, match="'stem/bias', which is missing"):
        jft.setup(config, tmp_path / "no", model=jft.from_nnx(Net))


def test_a_run_of_an_nnx_module_resumes_bitwise(images, tmp_path):
    config = make_config(images, "freeze.phases=head@2 | all", "checkpoint.every_steps=3")
    whole = jft.fit(jft.setup(config, tmp_path / "whole", model=jft.from_nnx(net())))
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(part / "checkpoints" / "6")
    # What is in the run counts, not what the instance holds now.
    resumed = jft.fit(jft.setup(config, part, model=jft.from_nnx(net(3))))
    assert resumed.metrics == whole.metrics
    fault_run.assert_same_end(part, tmp_path / "whole")


def test_a_constructor_gives_fresh_weights_by_the_seed_of_the_config(images, tmp_path):
    def start(seed, make):
        config = make_config(images, f"seed={seed}")
        return jft.setup(config, tmp_path / "run", model=jft.from_nnx(make)).start()[0]

    one, same = start(1, Net), start(1, lambda rngs: Net(rngs))
    fault_run.assert_same_leaves(one, same)
    assert any(not np.array_equal(one[path], start(2, Net)[path]) for path in one)


def end_of(images, workdir, mode, devices):
    """{path: leaf} after two steps without dropout."""
    options = (f"parallel.devices={devices}", f"parallel.mode={mode}", "train.steps=2")
    config = make_config(images, *options, "optim.name=sgd", "eval.splits=[]")
    end = jft.fit(jft.setup(config, workdir, model=jft.from_nnx(net(dropout=0.0))))
    return {**end.params, **end.model_state}


@pytest.fixture(scope="module")
def on_one_device(images, tmp_path_factory):
    return end_of(images, tmp_path_factory.mktemp("one"), "pmap", 1)


@pytest.mark.parametrize("mode", ["pmap", "shard_map", "auto"])
def test_batch_norm_of_an_nnx_module_gives_the_same_on_any_number_of_devices(
    images, on_one_device, tmp_path, mode
):
    one, four = on_one_device, end_of(images, tmp_path, mode, 4)
    assert one.keys() == four.keys()
    for path in one:
        np.testing.assert_allclose(one[path], four[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_stages_give_the_cut_and_a_cache_of_the_prefix(images, tmp_path):
    outcomes = {}
    for cache in ("off", "on"):
        options = (f"freeze.cache={cache}", "freeze.views=1", "freeze.phases=head@4 | all")
        config = make_config(images, *options)
        run = jft.setup(config, tmp_path / cache, model=jft.from_nnx(Staged))
        outcomes[cache] = jft.fit(run)
    for path, leaf in outcomes["off"].params.items():
        cached = outcomes["on"].params[path]
        np.testing.assert_allclose(cached, leaf, rtol=1e-5, atol=1e-6, err_msg=path)


def make_model(module):
    return own_model(jft.from_nnx(module), CLASSES, Staged.preprocess)


def training(rows, cut=0, norms=()):
    return Training(jnp.ones(rows), jnp.arange(rows), cut=cut, frozen_norms=frozenset(norms))


def test_what_is_done_to_the_first_weights_changes_neither_the_next_nor_the_instance():
    wrapped = jft.from_nnx(instance := net())
    first = wrapped.init(jax.random.key(0), None)["params"]["stem"]["kernel"]
    wanted = first.copy()
    first[:] = 0
    again = wrapped.init(jax.random.key(0), None)["params"]["stem"]["kernel"]
    np.testing.assert_array_equal(again, wanted)
    np.testing.assert_array_equal(state_of(instance)["stem/kernel"], wanted)


def test_a_part_of_the_stages_needs_the_leaves_of_that_part_alone():
    model = make_model(Staged(nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    first = {kind: {n: v for n, v in tree.items() if n in model.stages[:2]}
             for kind, tree in variables.items()}  # fmt: skip
    rest = {kind: {n: v for n, v in tree.items() if n in model.stages[2:]}
            for kind, tree in variables.items()}  # fmt: skip
    middle = model.apply(first, x, stop=2)
    np.testing.assert_array_equal(model.apply(rest, middle, start=2), model.apply(variables, x))
    with pytest.raises(TypeError):
        model.apply(rest, x)


@pytest.mark.parametrize("kind", [Net, Staged])
def test_below_the_cut_and_in_frozen_norms_nothing_is_random_and_statistics_stay(kind):
    model = make_model(kind(nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

    def run(key, training):
        out, moved = model.apply(
            variables, x, training=training, rngs={"dropout": jax.random.key(key)},
            mutable=["batch_stats"],
        )  # fmt: skip
        return np.asarray(out), flatten(moved["batch_stats"])

    still = flatten(variables["batch_stats"])
    assert model.stages == ("stem", "layers_0", "layers_1", "head")
    out, moved = run(0, training(4, cut=3))
    np.testing.assert_array_equal(out, model.apply(variables, x))
    assert all(np.array_equal(moved[path], still[path]) for path in moved)
    out, moved = run(0, training(4, cut=2))
    assert not np.array_equal(out, run(1, training(4, cut=2))[0])
    changed = {path for path in moved if not np.array_equal(moved[path], still[path])}
    assert changed == {"layers_1/norm/mean", "layers_1/norm/var"}
    _, moved = run(0, training(4, norms=["layers_0/norm"]))
    changed = {path for path in moved if not np.array_equal(moved[path], still[path])}
    assert changed == {"layers_1/norm/mean", "layers_1/norm/var"}


def test_parts_of_a_list_are_numbered_groups_unless_some_have_no_parameters():
    names = dict(jft.from_nnx(net()).groups)
    assert set(names) == {"stem", "layers", "head"}
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(192, 6, rngs=rngs), nnx.relu, nnx.Linear(6, CLASSES, rngs=rngs)
    norm = nnx.BatchNorm(192, use_bias=False, use_scale=False, rngs=rngs)
    gaps = jft.from_nnx(nnx.Sequential(lambda x: x.reshape(len(x), -1), norm, *layers))
    model = own_model(gaps, CLASSES, Staged.preprocess)
    assert model.stages == ("layers_1", "layers_2", "layers_4")
    assert set(dict(gaps.groups)) == {"layers_2", "layers_4"}  # the norm has no parameters


def test_random_streams_follow_the_key_of_the_step_and_the_first_row():
    for module in (Net(nnx.Rngs(0)), Called(nnx.Rngs(0))):
        model = make_model(module)
        x = np.ones((4, 8, 8, 3), np.float32)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

        def run(key, first, model=model, variables=variables, x=x):
            how = Training(jnp.ones(4), first + jnp.arange(4))
            rngs = {"dropout": jax.random.key(key)}
            out, _ = model.apply(variables, x, training=how, rngs=rngs, mutable=["batch_stats"])
            return np.asarray(out)

        np.testing.assert_array_equal(run(0, 0), run(0, 0))
        assert not np.array_equal(run(0, 0), run(1, 0))
        assert not np.array_equal(run(0, 0), run(0, 4))
        np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x))


def test_gradients_are_those_of_nnx_itself():
    module = net(dropout=0.0)
    model = make_model(module)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))

    def loss(params):
        all_of = {**variables, "params": params}
        out, _ = model.apply(all_of, x, training=training(4), mutable=["batch_stats"])
        return jax.nn.logsumexp(out, 1).sum()

    found = flatten(jax.jit(jax.grad(loss))(variables["params"]))
    module.train()
    grads = nnx.jit(nnx.grad(lambda module: jax.nn.logsumexp(module(x), 1).sum()))(module)
    wanted = {"/".join(map(str, place)).replace("layers/", "layers_"): np.asarray(value[...])
              for place, value in nnx.to_flat_state(grads)}  # fmt: skip
    assert found.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(3, 3, rngs=rngs)
        self.two = self.one


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(3, 3, rngs=rngs)
        self.two = nnx.Linear(3, 3, rngs=rngs)
        self.two.kernel = self.one.kernel


class Cached(nnx.Module):
    def __init__(self, rngs):
        self.cache = nnx.Cache(jnp.zeros(3))


class Table(nnx.Module):
    def __init__(self, rngs):
        self.table = jnp.zeros(3)


class Counts(nnx.Module):
    def __init__(self, rngs):
        self.counts = nnx.Param(jnp.zeros(3, jnp.int32))


class Twins(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
        self.layers_0 = nnx.Linear(2, 2, rngs=rngs)


class Computed(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(float(jnp.linspace(0, 0.1, 3)[1]))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Shared, "'one' and 'two' are one: what is shared"),
        (Tied, "'one/kernel' and 'two/kernel' are one: what is shared"),
        (Cached, "'cache' is an nnx.Cache; nnx.Param is trained"),
        (Table, "'table' is an array; nnx.Param is trained"),
        (Counts, "'counts' is no array of floating numbers"),
        (Twins, "are both 'layers_0'"),
        (Computed, "give an instance of it"),
        (lambda rngs: 3, "made a int, no nnx.Module"),
        (3, "takes an nnx.Module or what makes one, not int"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(made, words):
    with pytest.raises(ConfigError, match=words) as error:
        jft.from_nnx(made)
    assert "\n" not in str(error.value)
    if isinstance(made, type) and made is not Computed:
        with pytest.raises(ConfigError, match=words):
            jft.from_nnx(made(nnx.Rngs(0)))


def test_a_module_as_it_is_or_with_shapes_alone_is_refused(images, tmp_path):
    with pytest.raises(ConfigError, match=r"Net has no init; .* jft.from_nnx\(module\)"):
        jft.setup(make_config(images), tmp_path / "run", model=net())
    with pytest.raises(ConfigError, match="shapes alone"):
        jft.from_nnx(nnx.eval_shape(net))
    with pytest.raises(ConfigError, match="'head/kernel' is missing"):
        leaves = {n: v for n, v in state_of(net()).items() if n != "head/kernel"}
        jft.from_nnx(net()).to_nnx({"params": leaves})
    with pytest.raises(ConfigError, match="'stem/bias' has shape"):
        jft.from_nnx(net()).to_nnx({"params": {**state_of(net()), "stem/bias": np.zeros(5)}})
