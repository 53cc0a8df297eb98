"""What a compiled step costs: nothing beyond its phase, with everything that a step can do on."""

import dataclasses
import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from ml_collections import ConfigDict

from jft import setup
from jft.config import base, from_json, to_json
from jft.costs import hlo
from jft.data.images import canvas_side
from jft.models.layers import Training
from jft.overview import plan_phases
from jft.task import make_data, make_task
from jft.train.run import abstract_state, compile_phase
from jft.train.state import first_trainable_stage, frozen_norms, make_state
from jft.train.step import make_train_step
from jft.tree import count_bytes, flatten, merge

ACCUM, BATCH, DEVICES = 2, 64, 8
SUMS_BYTES = 3 * 4  # loss, correct answers and weights, float32
FLOPS_BAR, TEMP_BAR = 0.05, 1.05
MODELS = {
    "vit_tiny": {"depth": 2},
    "clip_tiny": {"depth": 2, "pooling": "cls", "projection": 24},
    "siglip_tiny": {"depth": 2, "pooling": "probe", "patch": 4},
    # Two blocks, so that the file compiles in seconds: with and without an expansion.
    "efficientnet_lite_tiny": {"blocks": [[1, 3, 1, 1, 8], [1, 5, 2, 3, 16]]},
    "efficientnet_tiny": {"blocks": [[1, 3, 1, 1, 64], [1, 5, 2, 3, 96]]},
    "swin_tiny": {"depths": [2, 1], "window": 2},
    "resnet_tiny": {"widths": [32, 48], "depths": [1, 1]},
}
# Siblings are in the default suite: without squeeze-and-excitation, plain transformers, and other
# convolutions.
SLOW = {"efficientnet_tiny", "swin_tiny", "clip_tiny", "siglip_tiny", "resnet_tiny"}
if os.environ.get("JFT_FAULTS") == "short":
    del MODELS["clip_tiny"]  # blocks of siglip's tower behind vit's class token, which both run
PHASES = {"head": "head", "half": "block[-1:] + final + head", "all": "all"}
WITHOUT_FINAL = {"resnet_tiny"}  # nothing lies between its blocks and its head
MODES = ("pmap", "auto")
every_phase = pytest.mark.parametrize("phase", PHASES)
every_mode = pytest.mark.parametrize("mode", MODES)
every_model = pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in MODELS]
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiles with the plain kernel emitter: what is counted here is decided before it runs."""
    compile_fully = jax.stages.Lowered.compile

    def compile_plainly(lowered):
        try:
            return compile_fully(lowered, compiler_options={"xla_cpu_use_fusion_emitters": False})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return compile_fully(lowered)  # newer ones have no such emitters to switch off

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_plainly)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    built.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory, quick_compilation):
    """Compiles in two threads what the tests will ask for, what is asked for now first."""
    built.folder = tmp_path_factory.mktemp("costs")
    with ThreadPoolExecutor(2) as pool:
        later.pool = pool
        yield
        pool.shutdown(cancel_futures=True)
    later.cache_clear()


@functools.cache
def later(make, *case):
    return later.pool.submit(make, *case)


def cost(model: str, mode: str, phase: str, make=None) -> hlo.Cost:
    """What `make`, by default jft's own step, costs on one device of eight."""
    models = [name for name in MODELS if name == model or not SLOW & {name, model}]
    cases = list(itertools.product(models, MODES, PHASES))
    for case in cases:
        built(*case[:2])
    wanted = later(make or of_jft, model, mode, phase)
    for case in cases:
        later(of_jft, *case)
        later(by_hand, *case)
    return wanted.result()


def config(model: str, mode: str) -> ConfigDict:
    path = built.folder / f"{model}.npz"
    side = 32 if MODELS[model].get("depth") else canvas_side(16, 0.875)
    if not path.exists():
        label = np.arange(BATCH) % 10
        np.savez(path, image=np.zeros((BATCH, side, side, 3), np.uint8), label=label)
    config = base()
    config.data.name, config.data.path = "npz", str(path)
    config.model.name, config.model.args = model, MODELS[model]
    config.data.image_size = 32 if model == "vit_tiny" else 16
    config.augment.flip = False
    half = {"half": "block[-1:] + head"} if model in WITHOUT_FINAL else {}
    phases = PHASES | half
    config.freeze.phases = " | ".join(
        text if name == "all" else f"{text}@{(at + 1) * 10}"
        for at, (name, text) in enumerate(phases.items())
    )
    config.optim.grad_clip_norm = config.optim.weight_decay = 0.1
    config.train.steps, config.train.nonfinite = 30, "skip"
    config.train.batch_size, config.train.accum_steps = BATCH, ACCUM
    config.parallel.mode, config.parallel.devices = mode, DEVICES
    return from_json(to_json(config))


@functools.cache
def built(model: str, mode: str):
    """(task, run, {phase: plan}) as `jft train` builds them."""
    made = config(model, mode)
    splits = make_data(made)
    task = make_task(made, splits.label_names, splits.train.image_shape)
    run = setup(made, built.folder / f"{model}_{mode}")
    plans = plan_phases(task, run.parallel, run.phases, run.optim, run.parts)
    return task, run, dict(zip(PHASES, plans, strict=True))


def phase_of(run, phase):
    return run.phases[list(PHASES).index(phase)]


def of_jft(model: str, mode: str, phase: str) -> hlo.Cost:
    """Cost of the step that jft compiles for a phase."""
    run = built(model, mode)[1]
    return hlo.count(compile_phase(run, phase_of(run, phase))[0])


def hand_loss(task, cut):
    """Loss of a phase whose stages below `cut` are frozen; the prefix runs as in evaluation."""
    model, size = task.model, task.preprocess.image_size
    edge = round((task.image_shape[0] - size) / 2)
    mean, std = (
        np.reshape(np.asarray(values, np.float32), (1, 1, 1, 3))
        for values in (task.preprocess.mean, task.preprocess.std)
    )

    def loss(live, moving, rest, fixed, batch, key, axis):
        image = batch["image"][:, edge : edge + size, edge : edge + size].astype(jnp.float32)
        variables = {"params": merge(live, rest)}
        if moving or fixed:
            variables["batch_stats"] = merge(moving, fixed)
        features = model.apply(variables, (image - mean) / std, stop=cut)
        logits, changed = model.apply(
            variables,
            features,
            start=cut,
            training=Training(batch["mask"], batch["row"], axis),
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = (logits.argmax(-1) == batch["label"]) * batch["mask"]
        total = (losses * batch["mask"]).sum()
        changed = flatten(changed.get("batch_stats", {}))
        sums = (total, correct.sum(), batch["mask"].sum())
        return total, (sums, {path: changed[path] for path in moving})

    return loss


def hand_step(task, cut, tx, axis):
    """A step for one phase alone: accumulates, clips, logs the norm and checks finiteness."""
    grad = jax.grad(hand_loss(task, cut), has_aux=True)

    def step(state, frozen, batch):
        live, moving, opt_state, count = state
        rows = batch["label"].shape[0]
        first = 0 if axis is None else lax.axis_index(axis) * rows
        batch = batch | {"row": first + jnp.arange(rows, dtype=jnp.int32)}
        parts = {name: x.reshape(-1, ACCUM, *x.shape[1:]) for name, x in batch.items()}
        key = jax.random.fold_in(jax.random.key(0), count)

        def body(carry, index):
            grads, sums, moving = carry
            micro = {n: lax.dynamic_index_in_dim(x, index, 1, False) for n, x in parts.items()}
            more, (new_sums, moving) = grad(live, moving, *frozen, micro, key, axis)
            return (*jax.tree.map(jnp.add, (grads, sums), (more, new_sums)), moving), None

        start = (jax.tree.map(jnp.zeros_like, live), (jnp.zeros(()),) * 3, moving)
        (grads, sums, moved), _ = lax.scan(body, start, jnp.arange(ACCUM))
        if axis is not None:
            grads, sums = lax.psum((grads, sums), axis)
        grads = {path: leaf / sums[2] for path, leaf in grads.items()}
        norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in grads.values()))
        grads = {path: leaf * jnp.minimum(1.0, 0.1 / norm) for path, leaf in grads.items()}
        finite = jnp.isfinite(norm) & jnp.isfinite(sums[0])

        def update(live, opt_state):
            updates, opt_state = tx.update(grads, opt_state, live)
            return optax.apply_updates(live, updates), opt_state

        # Selecting between old and new leaves instead would keep both, and copy the moments.
        live, opt_state = lax.cond(finite, update, lambda *old: old, live, opt_state)
        moved = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, moving)
        return (live, moved, opt_state, count + 1), (*sums, norm)

    return step


def by_hand(model: str, mode: str, phase: str) -> hlo.Cost:
    """Cost of the hand-written step of the same phase, devices and shapes."""
    task, run, _ = built(model, mode)
    state, frozen = abstract_state(run, phase_of(run, phase))
    decayed = {path: len(leaf.shape) > 1 for path, leaf in state.params.items()}
    tx = optax.adamw(1e-3, weight_decay=0.1, mask=decayed)
    count = jax.ShapeDtypeStruct((), np.int32)
    start = (state.params, state.model_state, jax.eval_shape(tx.init, state.params), count)
    cut = min(task.model.stages.index(path.split("/")[0]) for path in state.params)
    step = hand_step(task, cut, tx, run.parallel.axis_name)
    rest = (frozen.params, frozen.model_state)
    return hlo.count(run.parallel.compile_train(step, start, rest, run.batch_shape))


def moment_bytes(model: str, phase: str, mode: str) -> int:
    """Bytes of BatchNorm's own sums in one micro-batch: first and second moments, and the count.

    Under pmap the gradients of the moments are summed as well, and equal counts once.
    """
    task, run, _ = built(model, "pmap")
    state, _ = abstract_state(run, phase_of(run, phase))
    means = {p: x for p, x in state.model_state.items() if p.endswith("/mean")}
    image = jax.ShapeDtypeStruct((1, *(task.preprocess.image_size,) * 2, 3), np.float32)
    keep = {"capture_intermediates": lambda module, _: type(module).__name__ == "BatchNorm"}
    module = task.model.module
    _, seen = jax.eval_shape(
        lambda key, x: module.apply(module.init(key, x), x, mutable=["intermediates"], **keep),
        jax.random.key(0),
        image,
    )
    shapes = flatten(seen["intermediates"]) if means else {}
    sizes = {p.rpartition("/")[0]: x[0].shape[1:3] for p, x in shapes.items()}
    positions = [np.prod(sizes[path.rpartition("/")[0]]) for path in means]
    forward = 2 * count_bytes(means)
    if mode == "auto":
        return forward + 4 * len(positions)
    return 2 * forward + 4 * len(set(positions))


@every_phase
@every_mode
@every_model
def test_flops_are_those_of_the_plan(model, mode, phase):
    plan = built(model, mode)[2][phase]
    found = cost(model, mode, phase)
    assert found.flops == pytest.approx(plan.flops, rel=FLOPS_BAR)
    assert not found.uncounted
    assert all(trips is not None for _, trips in found.loops)


@every_phase
@every_mode
@every_model
def test_argument_and_optimizer_bytes_are_exact(model, mode, phase):
    task, run, plans = built(model, mode)
    state, frozen = abstract_state(run, phase_of(run, phase))
    leaves = (state.params, state.model_state, frozen.params, frozen.model_state)
    trainable = sum(leaf.size for leaf in state.params.values())
    # Adam's two moments, and a counter for the leaves that entered in each phase so far; the step,
    # the window's sums and the two fault counters.
    counters = len(set(phase_of(run, phase).entered.values()))
    optimizer, scalars = 2 * 4 * trainable + 4 * counters, 4 + SUMS_BYTES + 2 * 4
    scalars += 4 + 4 * len(state.params)  # the factor of the phase, and that of each leaf
    batch = BATCH // DEVICES * (int(np.prod(task.image_shape)) + 4 + 4)
    exact = sum(count_bytes(part) for part in leaves) + optimizer + scalars + batch
    assert cost(model, mode, phase).argument_bytes == exact
    assert plans[phase].optimizer_bytes == optimizer
    assert plans[phase].argument_bytes == exact


@every_phase
@every_model
def test_pmap_sums_the_trainable_gradients_once_and_nothing_else(model, phase):
    plan = built(model, "pmap")[2][phase]
    assert plan.all_reduce_bytes == plan.trainable_bytes + SUMS_BYTES
    moments = ACCUM * moment_bytes(model, phase, "pmap")
    assert cost(model, "pmap", phase).all_reduce_bytes == plan.all_reduce_bytes + moments


def pair_bytes(model: str, phase: str) -> int:
    """What the gradients of tables of relative positions are larger while devices add them up.

    The compiler adds up where the batch ends: scores of pairs, of which a table has fewer.
    """
    run = built(model, "auto")[1]
    state, _ = abstract_state(run, phase_of(run, phase))
    tables = [x for path, x in state.params.items() if path.endswith("/bias_table")]
    sides = [(int(len(table) ** 0.5) + 1) // 2 for table in tables]
    sizes = [(side**4 - len(x)) * x.shape[1] for side, x in zip(sides, tables, strict=True)]
    return 4 * sum(sizes)


@every_phase
@every_model
def test_auto_sums_the_trainable_gradients_and_nothing_else(model, phase):
    """The compiler adds up after every micro-batch: it does not move the sums out of the loop."""
    _, run, plans = built(model, "auto")
    plan = plans[phase]
    own = plan.trainable_bytes + SUMS_BYTES
    if phase_of(run, phase).mask.get("pool/probe"):
        # A query that all images share: its gradient is summed in place of those it is made of.
        width = 4 * 32
        own -= width * (32 + 1 + 1) - width
    more = moment_bytes(model, phase, "auto") + pair_bytes(model, phase)
    assert cost(model, "auto", phase).all_reduce_bytes == ACCUM * (own + more)


@every_phase
@every_mode
@every_model
def test_temporary_memory_is_that_of_a_step_written_for_this_phase_alone(model, mode, phase):
    ours, theirs = cost(model, mode, phase), cost(model, mode, phase, by_hand)
    assert ours.temp_bytes <= TEMP_BAR * theirs.temp_bytes
    assert ours.flops == pytest.approx(theirs.flops, rel=FLOPS_BAR)


@every_phase
@every_mode
@every_model
def test_the_state_is_updated_in_place(model, mode, phase):
    run = built(model, mode)[1]
    state, _ = abstract_state(run, phase_of(run, phase))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert cost(model, mode, phase).alias_bytes == held


@pytest.mark.parametrize("phase", ["head", "half"])
@pytest.mark.parametrize(("model", "accum"), [("vit_tiny", 1), ("efficientnet_lite_tiny", 2)])
def test_both_passes_and_averages_cost_what_the_plan_says_under_shard_map(model, accum, phase):
    """With one micro-batch both passes share the frozen prefix; with more it runs in each."""
    made = config(model, "shard_map")
    made.unlock()
    made.optim.sam_rho, made.optim.ema_decay, made.train.accum_steps = 0.1, 0.99, accum
    run = setup(from_json(to_json(made)), built.folder / f"{model}_both")
    state, frozen = abstract_state(run, phase_of(run, phase))
    assert run.plan is not None and run.inputs is not None
    plan = run.plan(phase_of(run, phase), run.inputs.uncached(phase_of(run, phase)))
    found = hlo.count(compile_phase(run, phase_of(run, phase))[0])
    assert found.flops == pytest.approx(plan.flops, rel=FLOPS_BAR)
    assert plan.average_bytes == count_bytes(state.params) + count_bytes(state.model_state)
    batch = BATCH // DEVICES * (int(np.prod(run.batch_shape["image"].shape[1:])) + 4 + 4)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, frozen)))
    assert found.argument_bytes == plan.argument_bytes == held + batch
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert found.alias_bytes == moved
    assert plan.all_reduce_bytes == 2 * count_bytes(state.params) + SUMS_BYTES
    once = built(model, "pmap")[2][phase]
    if model == "vit_tiny":
        assert found.all_reduce_bytes == plan.all_reduce_bytes
        assert once.flops < plan.flops < 2 * once.flops
    else:
        assert plan.flops == 2 * once.flops


@every_model
def test_clipping_over_all_leaves_fails_the_flop_bar(model):
    """The mutant: gradients by all parameters are clipped together, and masked afterwards."""
    _, run, plans = built(model, "pmap")
    phase, (params, stats) = phase_of(run, "head"), run.shapes
    tx = optax.chain(optax.clip_by_global_norm(0.1), run.optim.tx(phase, "optax"))
    state, frozen = jax.eval_shape(lambda p, s: make_state(phase, tx, p, s, "optax"), params, stats)
    rates = jax.eval_shape(lambda: run.optim.rates(phase))
    frozen = dataclasses.replace(frozen, rates=rates)
    step = make_train_step(
        run.parts,
        tx,
        phase.mask,
        run.optim.schedule,
        cut=first_trainable_stage(phase.mask, run.stages),
        frozen_norms=frozen_norms(phase.mask, stats),
        axis_name=run.parallel.axis_name,
    )
    compiled = run.parallel.compile_train(step, state, frozen, run.batch_shape)
    assert hlo.count(compiled).flops > (1 + FLOPS_BAR) * plans["head"].flops
