"""Schedules, rates by rule, decay by rule, and the optimizer against optax's own."""

import jax
import numpy as np
import optax
import pytest

from jft.errors import ConfigError
from jft.freeze.groups import make_groups
from jft.freeze.methods import make_phases
from jft.train.optim import make_decay_mask, make_optim
from jft.train.rates import make_multipliers, make_rates
from jft.train.schedules import make_schedule
from jft.train.state import leaves_by_path
from jft.train.transforms import by_cohort

STAGES = ("stem", "blocks_0", "head")
PARAMS = {
    "stem/kernel": np.full((3, 4), 0.5, np.float32),
    "stem/bias": np.full(4, 0.5, np.float32),
    "blocks_0/kernel": np.full((4, 4), -0.5, np.float32),
    "head/kernel": np.full((4, 2), 0.25, np.float32),
    "head/bias": np.full(2, 0.25, np.float32),
}


def phases(text="all", steps=100):
    return make_phases(make_groups(PARAMS), total_steps=steps, steps_per_epoch=10, phases=text)


def rates(schedule, steps):
    return np.asarray([float(schedule(step)) for step in range(steps)])


def test_warmup_moves_from_the_first_step_and_cosine_ends_at_the_final_scale():
    schedule = make_schedule([(0, 100)], learning_rate=1.0, warmup_steps=10, final_lr_scale=0.1)
    found = rates(schedule, 101)
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=1e-6)
    progress = np.arange(91) / 90
    expected = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(found[10:], expected, rtol=1e-5)


def test_one_schedule_spans_the_run_unless_it_restarts_per_phase():
    spans = [(0, 40), (40, 100)]
    whole = make_schedule(spans, learning_rate=1.0)
    restarted = make_schedule(spans, learning_rate=1.0, per_phase=True)
    np.testing.assert_allclose(
        rates(whole, 100), 0.5 * (1 + np.cos(np.pi * np.arange(100) / 100)), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(float(restarted(40)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(float(restarted(39)), 0.5 * (1 + np.cos(np.pi * 39 / 40)), rtol=1e-4)


def test_each_phase_scales_its_own_rate():
    plan = phases([{"train": "head", "until": 40}, {"train": "all", "lr_scale": 0.1}])
    found = [make_rates(phase, dict.fromkeys(PARAMS, 1.0))["phase"] for phase in plan]
    np.testing.assert_allclose(found, [1.0, 0.1], rtol=1e-6)


def test_layer_decay_counts_stages_down_from_the_head():
    factors = make_multipliers(list(PARAMS), STAGES, layer_decay=0.5)
    assert factors["head/kernel"] == 1.0
    assert factors["blocks_0/kernel"] == 0.5
    assert factors["stem/bias"] == 0.25


def test_rate_rules_multiply_with_layer_decay_and_leave_the_rest_alone():
    rules = [["head/.*", 10.0], ["stem/bias", 2.0]]
    factors = make_multipliers(list(PARAMS), STAGES, lr_rules=rules, layer_decay=0.5)
    assert [factors[p] for p in ("head/bias", "stem/bias", "stem/kernel")] == [10.0, 0.5, 0.25]


def test_leaves_of_two_dimensions_decay_unless_rules_say_otherwise():
    default = make_decay_mask(PARAMS)
    assert {p for p, decays in default.items() if decays} == {p for p in PARAMS if "kernel" in p}
    ruled = make_decay_mask(PARAMS, [["head/.*", False], [".*", True]])
    assert [ruled[p] for p in ("head/kernel", "stem/bias")] == [False, True]


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"lr_rules": [["head/.*", 0]]}, "factor 0 of 'head/.*' should be above 0"),
        ({"lr_rules": [["haed/.*", 2]]}, "optim.lr_rules: pattern 'haed/.*' matches no leaf"),
        ({"layer_decay": 1.5}, "optim.layer_decay"),
        ({"decay_rules": [["head/.*", 1], [".*", 0]]}, "optim.decay_rules"),
        ({"learning_rate": 0.0}, "optim.learning_rate"),
        ({"grad_clip_norm": -1.0}, "optim.grad_clip_norm"),
        ({"schedule": "cosin"}, "no schedule 'cosin' .did you mean 'cosine'"),
        ({"name": "adamm"}, "no optimizer 'adamm' .did you mean 'adam'"),
        ({"args": {"beta": 1}}, "optim.args"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
    ],
)
def test_bad_values_are_named(kw, message):
    with pytest.raises(ConfigError, match=message):
        make_optim([(0, 100)], PARAMS, STAGES, **kw)


@pytest.mark.parametrize(
    ("name", "args", "reference"),
    [
        (
            "adamw",
            {"b2": 0.95},
            lambda mask: optax.adamw(1e-2, b2=0.95, weight_decay=0.1, mask=mask),
        ),
        (
            "sgd",
            {},
            lambda mask: optax.chain(
                optax.trace(0.9), optax.add_decayed_weights(0.1, mask), optax.scale(-1e-2)
            ),
        ),
    ],
)
def test_updates_equal_those_of_optax(name, args, reference):
    plan = phases()
    section = make_optim(
        [(0, 100)],
        PARAMS,
        STAGES,
        name=name,
        args=args,
        learning_rate=1e-2,
        schedule="constant",
        weight_decay=0.1,
        grad_clip_norm=1.0,
    )
    mask = {path: leaf.ndim >= 2 for path, leaf in PARAMS.items()}
    ours, theirs = section.tx(plan[0]), optax.chain(optax.clip_by_global_norm(1.0), reference(mask))
    states = ours.init(PARAMS), theirs.init(PARAMS)
    first = second = PARAMS
    for step in range(5):
        grads = jax.tree.map(lambda p, s=step: np.float32(np.cos(p * (s + 1))), first)
        updates, a = ours.update(grads, states[0], first, step=step, rates=section.rates(plan[0]))
        first = optax.apply_updates(first, updates)
        updates, b = theirs.update(grads, states[1], second)
        second = optax.apply_updates(second, updates)
        states = a, b
    for path in PARAMS:
        np.testing.assert_allclose(first[path], second[path], rtol=1e-6, atol=1e-7)


def test_cohorts_update_as_optax_partition_does_without_its_empty_nodes():
    cohorts = (("head/kernel", "head/bias"), ("blocks_0/kernel",), ("stem/kernel", "stem/bias"))
    labels = {path: f"cohort_{at}" for at, paths in enumerate(cohorts) for path in paths}
    ours = by_cohort(cohorts, lambda _: optax.scale_by_adam())
    theirs = optax.partition({label: optax.scale_by_adam() for label in labels.values()}, labels)
    a, b = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(3):
        grads = jax.tree.map(lambda p, s=step: np.float32(np.cos(p * (s + 1))), PARAMS)
        moved, a = ours.update(grads, a, PARAMS)
        expected, b = theirs.update(grads, b, PARAMS)
        assert moved.keys() == expected.keys()
        for path in PARAMS:
            np.testing.assert_array_equal(moved[path], expected[path])
    assert leaves_by_path(a).keys() == leaves_by_path(b).keys()  # as checkpoints name them
    kept = jax.tree.leaves(a, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    assert len(kept) == len(jax.tree.leaves(a)) == 2 * len(PARAMS) + len(cohorts)


def test_a_leaf_with_half_the_factor_moves_half_as_far():
    plan = phases()
    kw = dict(name="sgd", args={"momentum": 0.0}, learning_rate=1.0, schedule="constant")
    section = make_optim([(0, 100)], PARAMS, STAGES, lr_rules=[["stem/.*", 0.5]], **kw)
    tx = section.tx(plan[0])
    grads = jax.tree.map(np.ones_like, PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, step=0, rates=section.rates(plan[0]))
    assert float(updates["stem/kernel"][0, 0]) == -0.5
    assert float(updates["head/kernel"][0, 0]) == -1.0


def test_a_fresh_state_compiles_nothing_after_the_warm_up(caplog):
    section = make_optim([(0, 100)], PARAMS, STAGES, learning_rate=1e-2)
    leaves = {"a": jax.device_put(np.ones((3, 41), np.float32)), "b": jax.device_put(np.ones(43))}
    with jax.log_compiles():
        section.warm_up(leaves.values())
        assert "ompil" in caplog.text
        caplog.clear()
        section.fresh(leaves)
    assert "ompil" not in caplog.text
