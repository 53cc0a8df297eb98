"""Blocks as a loop: the same run as unrolled, in everything but the size of the program."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import setup
from jft.config import base, from_json, to_json
from jft.costs import hlo
from jft.errors import ConfigError
from jft.freeze.groups import make_groups
from jft.freeze.methods import make_phases
from jft.models.layers import Training
from jft.models.zoo import make_model
from jft.overview import plan_phases
from jft.task import make_task
from jft.train.loop import fit
from jft.train.optim import make_optim
from jft.train.run import compile_phase, from_checkpoint, phase_of
from jft.train.stacks import Apart, make_stacks, unstack
from jft.train.state import leaves_by_path, make_state
from jft.tree import flatten, unflatten

pytestmark = pytest.mark.usefixtures("quick")

MODEL = {"depth": 6, "features": 16, "heads": 2, "mlp_features": 32, "patch": 16}
DROPS = {"dropout_rate": 0.2, "drop_path_rate": 0.3}
SGD = {"name": "sgd", "learning_rate": 0.05, "weight_decay": 1e-4, "grad_clip_norm": 1.0}
ADAMW = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1, "grad_clip_norm": 1.0}
HALF = "block[-3:] + final + head"
SLOW = pytest.mark.slow
SWITCHED = f"head@3 | {HALF}@6 | block[1:4] + attn + head@8 | all"
SHORT = os.environ.get("JFT_FAULTS") == "short"
# Where a run of SWITCHED stops, and whether it is a loop first; each once in the short form.
STOPS = ((4, True), (7, False)) if SHORT else ((4, True), (7, False), (4, False), (7, True))


@functools.cache
def model(**args):
    """(model, {path: leaf}); every leaf is noise, so that none is what another one is."""
    made = make_model(name="vit_tiny", args={**MODEL, **args}, num_classes=5)
    shapes = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(path.endswith("/scale"), 0.2, leaf.shape), leaf.dtype)
        for path, leaf in flatten(shapes["params"]).items()
    }
    return made, params


def phases_of(text, steps=10, **args):
    made, params = model(**args)
    groups = make_groups(sorted(params), structural=made.family.groups, sets=made.family.sets)
    return make_phases(groups, total_steps=steps, steps_per_epoch=10, phases=text)


def stacks_of(phase, decay=None, **args):
    made, params = model(**args)
    decay = decay or dict.fromkeys(params, True)
    return make_stacks(phase, params, made.stages, "blocks", decay)


def names(stacks):
    return [held.name for held in stacks.ranges]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 37, 37, 3), np.uint8)
    np.savez(path, image=image, label=np.arange(64) % 5)
    return path


def config_of(data, phases, *, scan, optim=SGD, steps=10, mode="pmap", devices=1, **more):
    config = base()
    config.data.name, config.data.path, config.data.image_size = "npz", str(data), 32
    config.model.name, config.model.args = "vit_tiny", {**MODEL, **more.pop("args", {})}
    config.freeze.phases = phases
    for key, value in optim.items():
        config.optim[key] = value
    config.train.steps, config.train.batch_size, config.train.scan_blocks = steps, 16, scan
    config.parallel.mode, config.parallel.devices = mode, devices
    config.log.tensorboard = False
    for key, value in more.items():
        section, _, name = key.partition("_")
        config[section][name] = value
    return from_json(to_json(config))


def trained(folder, data, phases, **kw):
    outcome = fit(setup(config_of(data, phases, **kw), folder))
    assert outcome.exit_code == 0
    return outcome


def assert_close(a, b, bar=1e-5):
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        a1, b1 = np.asarray(leaf), np.asarray(b[path])
        scale = max(np.max(np.abs(b1)), 1e-3)
        assert np.max(np.abs(a1 - b1)) / scale < bar, path


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert np.asarray(leaf).dtype == np.asarray(b[path]).dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", ["blocks_0..5"]),
        ("head", ["blocks_0..5"]),
        (HALF, ["blocks_0..2", "blocks_3..5"]),
        ("attn + head", ["blocks_0..5"]),
        ("block[1:3] + head", ["blocks_1..2", "blocks_3..5"]),
        ("block[4] + head", ["blocks_0..3"]),
    ],
)
def test_stacks_are_the_longest_runs_that_train_alike(text, expected):
    assert names(stacks_of(phases_of(text)[0])) == expected


def test_stacks_part_where_cohorts_or_decay_differ():
    phases = phases_of(f"{HALF}@5 | all")
    assert names(stacks_of(phases[1])) == ["blocks_0..2", "blocks_3..5"]
    decay = {path: not path.startswith("blocks_2/") for path in model()[1]}
    assert names(stacks_of(phases_of("all")[0], decay)) == ["blocks_0..1", "blocks_3..5"]
    # What does not train does not decay either.
    assert names(stacks_of(phases_of("head")[0], decay)) == ["blocks_0..5"]


@pytest.mark.parametrize("optim", [SGD, ADAMW])
@pytest.mark.parametrize("enforce", ["split", "optax"])
@pytest.mark.parametrize("on_device", [False, True])
def test_stacking_and_taking_apart_gives_the_same_bits(optim, enforce, on_device):
    made, params = model(depth=12)
    phases = phases_of("block[10] + head@3 | block[2:11] + head@6 | block[2:] + head", depth=12)
    section = make_optim([(0, phases[-1].stop_step)], params, made.stages, **optim)
    phase = phases[-1]
    state, frozen = make_state(phase, section.tx(phase, enforce), params, {}, enforce)
    masks = {path: np.ones(params[path].shape, bool) for path in phase.entered}
    frozen = dataclasses.replace(frozen, elements=masks)
    rng = np.random.default_rng(0)

    def filled(leaf):
        noise = rng.normal(size=leaf.shape)
        noise = (noise > 0 if leaf.dtype == bool else noise).astype(leaf.dtype)
        return jnp.asarray(noise) if on_device else noise

    state, frozen = jax.tree.map(filled, (state, frozen))
    stacks = stacks_of(phase, depth=12)
    assert names(stacks) == ["blocks_0..1", "blocks_2..9"]
    whole, rest = stacks.stack((state, frozen))
    assert len(leaves_by_path(whole)) < len(leaves_by_path(state))
    # The step's own optimizer has a state of just this form: cohorts keep their numbers.
    placed = stacks.phase(phase)
    fresh = section.tx(placed, enforce).init(whole.params)
    assert jax.tree.structure(fresh) == jax.tree.structure(whole.opt_state)
    for apart in (unstack((whole, rest)), Apart()(whole, rest)):
        assert jax.tree.structure(apart) == jax.tree.structure((state, frozen))
        assert_equal(leaves_by_path(apart), leaves_by_path((state, frozen)))


def test_frozen_leaves_are_taken_apart_once():
    made, params = model()
    phase = phases_of("head")[0]
    section = make_optim([(0, phase.stop_step)], params, made.stages)
    state, frozen = stacks_of(phase).stack(make_state(phase, section.tx(phase), params, {}))
    apart = Apart()
    first, second = apart(state, frozen)[1], apart(state, frozen)[1]
    assert all(first.params[path] is second.params[path] for path in first.params)
    name = "blocks_0/norm1/scale"
    cached = apart(state, dataclasses.replace(frozen, cache={"table": np.zeros(9)}))[1]
    assert cached.params[name] is first.params[name] and cached.cache == {}, "it is never saved"
    copies = {path: np.array(leaf) for path, leaf in frozen.params.items()}
    other = apart(state, dataclasses.replace(frozen, params=copies))[1]
    assert other.params[name] is not first.params[name]


@pytest.mark.parametrize("cut", [0, 4])
def test_a_loop_draws_what_the_blocks_draw(cut):
    made, params = model(**DROPS)
    stacked = stacks_of(phases_of(HALF, **DROPS)[0], **DROPS).stack(params)
    image = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    training = Training(jnp.ones(4), jnp.arange(4), None, cut)

    def logits(flat, training, seed=7):
        rngs = {"dropout": jax.random.key(seed)}
        return made.apply({"params": unflatten(flat)}, image, training=training, rngs=rngs)

    np.testing.assert_allclose(logits(stacked, training), logits(params, training), atol=1e-6)
    np.testing.assert_allclose(logits(stacked, None), logits(params, None), atol=1e-6)
    assert np.max(np.abs(logits(stacked, training) - logits(stacked, training, 8))) > 1e-3


def test_parts_of_the_stages_run_up_to_the_borders_of_stacks():
    made, params = model()
    stacked = {"params": unflatten(stacks_of(phases_of(HALF)[0]).stack(params))}
    image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    features = made.apply(stacked, image, stop=4)
    whole = made.apply({"params": unflatten(params)}, image)
    np.testing.assert_allclose(made.apply(stacked, features, start=4), whole, atol=1e-6)
    with pytest.raises(ValueError, match=r"blocks_3\.\.5"):
        made.apply(stacked, image, stop=5)
    with pytest.raises(ValueError, match=r"blocks_0\.\.2"):
        made.apply(stacked, features, start=2)
    with pytest.raises(ValueError, match=r"blocks_3\.\.5"):
        made.apply(stacked, image, training=Training(jnp.ones(2), jnp.arange(2), None, 5))


@pytest.mark.parametrize(
    "phases",
    [
        # A frozen loop below a live one; then a live one below a frozen one.
        f"{HALF}@3 | block[1:3] + head",
        *(
            pytest.param(text, marks=SLOW)
            for text in ("all", "attn + head", "embed + head", SWITCHED)
            if not (SHORT and text in ("all", "attn + head"))  # which SWITCHED has, too
        ),
    ],
)
def test_a_run_comes_out_the_same(tmp_path, data, phases):
    kw = dict(args=DROPS, train_accum_steps=2, steps=10 if "@8" in phases else 6)
    loop = trained(tmp_path / "loop", data, phases, scan=True, **kw)
    plain = trained(tmp_path / "plain", data, phases, scan=False, **kw)
    assert_close(loop.params, plain.params)
    for name, value in plain.metrics.items():
        assert loop.metrics[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "devices"), [("pmap", 8), ("auto", 8)])
def test_devices_and_modes_change_nothing(tmp_path, data, mode, devices):
    kw = dict(args=DROPS, mode=mode, devices=devices)
    loop = trained(tmp_path / "many", data, f"{HALF}@5 | all", scan=True, **kw)
    plain = trained(tmp_path / "one", data, f"{HALF}@5 | all", scan=True, args=DROPS)
    assert plain.step == loop.step == 10
    assert_close(loop.params, plain.params)


@pytest.mark.slow
def test_rates_decay_and_the_optax_reference_hold_leaf_by_leaf(tmp_path, data):
    rules = [["blocks_2/.*", 3.0], ["blocks_4/mlp/.*", 0.5]]
    more = dict(layer_decay=0.7, lr_rules=rules, decay_rules=[["blocks_1/.*", False], [".*", True]])
    optim = {**SGD, **more, "weight_decay": 0.1}
    loop = trained(tmp_path / "loop", data, f"{HALF}@4 | all", scan=True, optim=optim)
    for enforce in ("split", "optax"):
        kw = dict(optim=optim, freeze_enforce=enforce)
        plain = trained(tmp_path / enforce, data, f"{HALF}@4 | all", scan=False, **kw)
        assert_close(loop.params, plain.params)


@pytest.mark.slow
def test_drawn_element_masks_are_those_of_the_blocks(tmp_path, data):
    entries = [{"train": "all", "elements": {"kind": "bernoulli", "share": 0.5}}]
    loop = trained(tmp_path / "loop", data, entries, scan=True, steps=4)
    plain = trained(tmp_path / "plain", data, entries, scan=False, steps=4)
    assert_close(loop.params, plain.params)


@pytest.mark.parametrize(
    ("phases", "stop", "first"),
    [
        pytest.param(f"{HALF}@5 | all", 5, True, marks=SLOW),
        *(pytest.param(SWITCHED, at, scan, marks=SLOW) for at, scan in STOPS),
    ],
)
def test_checkpoints_go_on_in_either_form(tmp_path, data, phases, stop, first):
    def start(scan):
        kw = dict(optim=ADAMW, args=DROPS, checkpoint_every_steps=1, checkpoint_keep=20)
        config = config_of(data, phases, scan=scan, **kw)
        return setup(config, tmp_path / "run", resume="force")

    fit(dataclasses.replace(start(first), stop_step=stop))
    saved = start(first).checkpoints.restore()
    assert saved.step == stop and not [name for name in saved.state if ".." in name]
    assert not [name for name in saved.frozen if ".." in name]
    other = start(not first)
    phase = phase_of(other, saved)
    state, frozen, _ = from_checkpoint(other, phase, saved)
    again = other.stacks(phase).stack((state, frozen))
    assert_equal(leaves_by_path(unstack(again)), leaves_by_path((state, frozen)))
    assert_equal({k: saved.state[k] for k in leaves_by_path(state)}, leaves_by_path(state))
    resumed = fit(other)
    whole = trained(tmp_path / "whole", data, phases, scan=first, optim=ADAMW, args=DROPS)
    assert resumed.step == whole.step == 10
    # Adam divides rounding by itself; and of a key's bias, which softmax cancels, that is all.
    seen = {path: leaf for path, leaf in resumed.params.items() if "key/bias" not in path}
    assert_close(seen, {path: whole.params[path] for path in seen}, bar=2e-3)


@pytest.fixture(scope="module")
def built(tmp_path_factory, data):
    """{scan: (run, plans)} of 10 blocks over head, half and all."""
    found = {}
    for scan in (True, False):
        phases = "head@3 | block[-5:] + final + head@6 | all"
        args = {"depth": 10, "features": 32, "mlp_features": 64, "patch": 4}
        config = config_of(data, phases, scan=scan, optim=ADAMW, args=args, augment_flip=False)
        task = make_task(config, [str(at) for at in range(5)], (37, 37, 3))
        run = setup(config, tmp_path_factory.mktemp("built"))
        found[scan] = run, plan_phases(task, run.parallel, run.phases, run.optim, run.parts)
    return found


@pytest.fixture(scope="module")
def compiled(built):
    return {
        scan: [compile_phase(run, phase)[0] for phase in run.phases]
        for scan, (run, _) in built.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_loop_costs_what_the_plan_says(built, compiled, at):
    plan = built[True][1][at]
    loop, plain = hlo.count(compiled[True][at]), hlo.count(compiled[False][at])
    assert loop.flops == pytest.approx(plan.flops, rel=0.05)
    assert loop.flops == pytest.approx(plain.flops, rel=0.05)
    assert loop.argument_bytes == pytest.approx(plain.argument_bytes, rel=1e-3)
    assert not loop.uncounted and all(trips is not None for _, trips in loop.loops)
    trips = sorted(trips for _, trips in loop.loops)
    assert trips == [[10], [5, 5, 5], [5, 5, 5, 5]][at]


def test_a_frozen_stack_keeps_nothing_for_the_backward_pass(compiled):
    head, half, whole = (hlo.count(step).temp_bytes for step in compiled[True])
    assert head < 0.3 * whole
    assert half < 0.7 * whole


def test_the_program_of_a_loop_is_much_shorter(compiled):
    texts = {scan: len(steps[0].as_text()) for scan, steps in compiled.items()}
    assert texts[True] < 0.4 * texts[False]


def test_a_family_without_a_loop_is_refused(tmp_path, data):
    config = base()
    config.data.name, config.data.path = "npz", str(data)
    config.model.name = "efficientnet_lite_tiny"
    config.train.steps, config.train.scan_blocks = 2, True
    with pytest.raises(ConfigError, match="train.scan_blocks: efficientnet_lite_tiny cannot run"):
        setup(from_json(to_json(config)), tmp_path)
