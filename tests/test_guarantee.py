"""The guarantee: a step that costs too much is told with its culprit, a moved leaf is caught."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft.costs import hlo
from jft.costs.plan import Costs, PhaseParts, make_plan
from jft.freeze.groups import make_groups
from jft.models.conv import depthwise_conv, pointwise_conv
from jft.train import guarantee
from jft.train.guarantee import Guard, check_cost, consumers, digest

WIDTH, ROWS = 32, 16
STAGES = ("blocks_0", "blocks_1", "head")
SHAPES = {
    f"{stage}/dense/kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for stage in STAGES
}
BATCH = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
MASK = {path: path.startswith("head") for path in SHAPES}


def loss(trainable, frozen, x):
    params = {**trainable, **frozen}
    for stage in STAGES:
        with jax.named_scope(stage), jax.named_scope("dense"):
            x = jnp.tanh(x @ params[f"{stage}/dense/kernel"])
    return jnp.sum(x)


def compiled(live):
    """A step that differentiates by the leaves `live` of a phase that trains the head alone."""
    train = {path: SHAPES[path] for path in live}
    rest = {path: SHAPES[path] for path in SHAPES if path not in live}
    return hlo.count(jax.jit(jax.grad(loss)).lower(train, rest, BATCH).compile())


@pytest.fixture(scope="module")
def plan():
    phases = [PhaseParts("head", 0, 10, MASK, optax.sgd(0.1))]
    return make_plan(phases, Costs(SHAPES, STAGES, lambda _: loss, [BATCH]))[0]


def test_a_step_of_its_phase_alone_is_within_the_plan(plan):
    text = check_cost(compiled(["head/dense/kernel"]), plan, MASK, STAGES)
    assert not text.startswith("warning") and "(+0.0%)" in text


def test_a_step_that_asks_for_frozen_gradients_names_where(plan):
    cost = compiled(list(SHAPES))
    text = check_cost(cost, plan, MASK, STAGES)
    assert text.startswith("warning: the step costs more than its phase")
    assert "blocks_0/dense" in text and "blocks_1/dense" in text
    found = consumers(cost.scopes, MASK, STAGES)
    assert len(found) == 2 and not any(name.startswith("head") for name in found)


def test_a_frozen_module_above_the_cut_may_pass_its_gradient_on_and_no_more():
    mask = {path: path.startswith("blocks_0") for path in SHAPES}
    assert not consumers(compiled(["blocks_0/dense/kernel"]).scopes, mask, STAGES)
    found = consumers(compiled(list(SHAPES)).scopes, mask, STAGES)
    assert {name.split()[0] for name in found} == {"blocks_1/dense", "head/dense"}


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_that_a_convolution_passes_on_costs_what_its_forward_pass_does(stride):
    shapes = dict.fromkeys(("blocks_0/mix/kernel", "blocks_2/mix/kernel"), (1, 1, 8, 8))
    shapes["blocks_1/conv/kernel"] = (3, 3, 1, 8)
    mask = {path: path.startswith("blocks_0") for path in shapes}

    def loss(params, x):
        with jax.named_scope("blocks_0"), jax.named_scope("mix"):
            x = pointwise_conv(x, params["blocks_0/mix/kernel"])
        with jax.named_scope("blocks_1"), jax.named_scope("conv"):
            x = depthwise_conv(x, params["blocks_1/conv/kernel"], (stride, stride))
        with jax.named_scope("blocks_2"), jax.named_scope("mix"):
            x = pointwise_conv(x, params["blocks_2/mix/kernel"])
        return jnp.sum(x * x)

    def scopes(live):
        made = {path: jnp.ones(shape) for path, shape in shapes.items()}
        train = {path: made[path] for path in live}
        rest = {path: made[path] for path in shapes if path not in live}
        step = jax.jit(jax.grad(lambda train, rest, x: loss({**train, **rest}, x)))
        return hlo.count(step.lower(train, rest, jnp.ones((4, 16, 16, 8))).compile()).scopes

    stages = ("blocks_0", "blocks_1", "blocks_2")
    assert not consumers(scopes(["blocks_0/mix/kernel"]), mask, stages)
    (found,) = consumers(scopes(["blocks_0/mix/kernel", "blocks_1/conv/kernel"]), mask, stages)
    assert found.startswith("blocks_1/conv")


def guard():
    messages = []
    return Guard(messages.append), messages


def leaves():
    return {path: np.full((2, 2), at, np.float32) for at, path in enumerate(SHAPES)}


GROUPS = make_groups(SHAPES)


def test_a_frozen_leaf_that_moves_by_one_ulp_ends_the_run():
    found, _ = guard()
    start = leaves()
    found.begin(start)
    frozen = {path: start[path] for path in ("blocks_0/dense/kernel", "blocks_1/dense/kernel")}
    found.freeze(frozen, ["head/dense/kernel"])
    found.check(frozen)
    found.poll(wait=True)
    moved = frozen["blocks_1/dense/kernel"]
    moved[0, 0] = np.nextafter(moved[0, 0], np.float32(9))
    found.check(frozen)
    with pytest.raises(RuntimeError, match="frozen leaf 'blocks_1/dense/kernel' changed"):
        found.poll(wait=True)
    found.close()


def test_a_unit_that_was_to_train_and_did_not_move_is_named():
    found, messages = guard()
    start = leaves()
    found.begin(start)
    found.freeze(
        {"blocks_0/dense/kernel": start["blocks_0/dense/kernel"]},
        ["blocks_1/dense/kernel", "head/dense/kernel"],
    )
    end = start | {"head/dense/kernel": start["head/dense/kernel"] + 1}
    found.end(end, {"blocks_0/dense/kernel": start["blocks_0/dense/kernel"]}, GROUPS, STAGES)
    assert messages == ["warning: blocks_1 was to train, but not one of its leaves changed"]
    found.close()


def test_a_leaf_that_thaws_may_be_donated_while_its_check_is_due(monkeypatch):
    found, _ = guard()
    plain = guarantee.digest
    monkeypatch.setattr(guarantee, "digest", lambda leaf: time.sleep(0.05) or plain(leaf))
    frozen = {path: jnp.full((2, 2), at) for at, path in enumerate(SHAPES)}
    found.freeze(frozen, [])
    found.check(frozen)
    thawed = frozen.pop("head/dense/kernel")
    found.freeze(frozen, ["head/dense/kernel"])
    thawed.delete()  # as the next step does
    found.check(frozen)
    found.poll(wait=True)
    found.close()


def test_a_frozen_leaf_that_a_switch_changed_is_caught():
    found, _ = guard()
    frozen = leaves()
    found.freeze(frozen, [])
    found.freeze({path: leaf + 1 for path, leaf in frozen.items()}, [])
    with pytest.raises(RuntimeError, match="changed"):
        found.poll(wait=True)
    found.close()


def test_what_cannot_be_counted_does_not_hide_what_costs_too_much(plan):
    cost = dataclasses.replace(compiled(list(SHAPES)), uncounted=("mystery",))
    text = check_cost(cost, plan, MASK, STAGES)
    assert text.startswith("warning") and "not counted: mystery" in text
    calm = dataclasses.replace(compiled(["head/dense/kernel"]), uncounted=("mystery",))
    assert not check_cost(calm, plan, MASK, STAGES).startswith("warning")


def test_a_step_that_holds_more_than_its_phase_is_told(plan):
    cost = compiled(["head/dense/kernel"])
    more = dataclasses.replace(cost, argument_bytes=2 * plan.argument_bytes)
    assert check_cost(more, plan, MASK, STAGES).startswith("warning: the step holds more")


def test_the_digest_tells_values_that_print_alike():
    assert digest(np.float32([0.0])) != digest(np.float32([-0.0]))
