"""Schedules by name: their formulas, warm-up, restarts per phase, and schedules of groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft.config import arg_keys, load_config
from jft.errors import ConfigError
from jft.freeze.groups import make_groups
from jft.freeze.methods import make_phases
from jft.keys import KEYS
from jft.train.optim import make_optim
from jft.train.rates import LeafRates
from jft.train.schedules import SCHEDULES, make_schedule
from jft.train.stacks import make_stacks
from jft.train.state import leaves_by_path, make_state, switch_phase

STAGES = ("stem", "head")
PARAMS = {
    "stem/kernel": np.full((3, 4), 0.5, np.float32),
    "head/kernel": np.full((4, 2), 0.25, np.float32),
    "head/bias": np.full(2, 0.25, np.float32),
}
T = np.arange(101) / 100


def rates(steps=101, **kw):
    schedule = make_schedule([(0, 100)], **{"learning_rate": 1.0, **kw})
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


@pytest.mark.parametrize(
    ("name", "kw", "expected"),
    [
        ("linear", {"final_lr_scale": 0.2}, 1 - 0.8 * T),
        ("polynomial", {"args": {"power": 2.0}}, (1 - T) ** 2),
        ("polynomial", {"final_lr_scale": 0.1}, 0.1 + 0.9 * (1 - T) ** 0.9),
        ("exponential", {"final_lr_scale": 0.01}, 0.01**T),
        ("rsqrt", {"args": {"timescale": 20}}, 1 / np.sqrt(1 + np.arange(101) / 20)),
        (
            "rsqrt",
            {"args": {"timescale": 20, "cooldown": 0.5}},
            np.minimum(1, 2 * (1 - T)) / np.sqrt(1 + np.arange(101) / 20),
        ),
        ("step", {}, np.where(T < 0.5, 1, np.where(T < 0.75, 0.1, 0.01))),
        ("step", {"args": {"at": [0.3, 60], "factor": 0.5}}, 0.5 ** ((T >= 0.3) * 1 + (T >= 0.6))),
        ("wsd", {"final_lr_scale": 0.1}, np.minimum(1, 0.1 + 0.9 * (1 - T) / 0.2)),
        (
            "wsd",
            {"args": {"decay": 0.5, "shape": "sqrt"}},
            1 - np.sqrt(np.maximum(0, 2 * T - 1)),
        ),
        (
            "one_cycle",
            {"args": {"rise": 0.5, "div": 10.0, "final_div": 100.0}},
            np.where(
                T < 0.5,
                0.1 + 0.9 * 0.5 * (1 - np.cos(np.pi * 2 * T)),
                0.001 + 0.999 * 0.5 * (1 + np.cos(np.pi * (2 * T - 1))),
            ),
        ),
        (
            "cosine_restarts",
            {"args": {"cycles": 2, "growth": 3.0, "peak_decay": 0.5}},
            np.where(
                T < 0.25,
                0.5 * (1 + np.cos(np.pi * T / 0.25)),
                0.25 * (1 + np.cos(np.pi * (T - 0.25) / 0.75)),
            ),
        ),
    ],
)
def test_a_schedule_follows_its_formula(name, kw, expected):
    np.testing.assert_allclose(rates(schedule=name, **kw), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_and_starts_again_with_its_phase(name):
    kw = dict(learning_rate=2.0, schedule=name, warmup_steps=5, final_lr_scale=0.01)
    whole = np.asarray(jax.vmap(make_schedule([(0, 40)], **kw))(jnp.arange(40)))
    assert np.all(np.isfinite(whole)) and np.all(whole > 0) and whole.max() <= 2.0 + 1e-6
    np.testing.assert_allclose(whole[:5], 2.0 * np.arange(1, 6) / 5, rtol=1e-6)
    again = make_schedule([(0, 40), (40, 80)], per_phase=True, **kw)
    twice = np.asarray(jax.vmap(again)(jnp.arange(80)))
    np.testing.assert_allclose(twice, np.concatenate([whole, whole]), rtol=1e-6)
    short = make_schedule([(0, 1)], **{**kw, "warmup_steps": 0})
    assert np.isfinite(float(short(0)))


def test_the_key_lists_every_schedule():
    assert KEYS["optim.schedule"].choices == tuple(SCHEDULES)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"schedule": "step", "args": {"ad": [0.5]}}, "optim.schedule: step takes no 'ad' .*'at'"),
        ({"schedule": "cosine", "args": {"x": 1}}, "cosine takes no 'x'; it takes none"),
        ({"schedule": "step", "args": {"at": [0.7, 0.3]}}, "optim.schedule_args.at: .* rise"),
        ({"schedule": "step", "args": {"at": ["a"]}}, "optim.schedule_args.at: .* above 0"),
        ({"schedule": "rsqrt", "args": {"timescale": 0}}, "optim.schedule_args.timescale"),
        ({"schedule": "wsd", "args": {"decay": 1.5}}, "optim.schedule_args.decay: .* from 0 to 1"),
        ({"schedule": "cosine_restarts", "args": {"cycles": 0}}, "optim.schedule_args.cycles"),
        ({"schedule": "exponential"}, "optim.final_lr_scale: exponential never reaches 0"),
        ({"schedule": "liner"}, "optim.schedule: no schedule 'liner' .did you mean 'linear'"),
    ],
)
def test_bad_options_of_schedules_are_named(kw, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule([(0, 100)], **{"learning_rate": 1.0, **kw})


def section_of(**kw):
    kw = dict(learning_rate=1.0, schedule="constant", name="sgd", args={"momentum": 0.0}) | kw
    return make_optim([(0, 8)], PARAMS, STAGES, **kw)


def phases_of(text="all"):
    return make_phases(make_groups(PARAMS), total_steps=8, steps_per_epoch=4, phases=text)


GROUPS = [["head/.*", "linear"], ["stem/kernel", "step", {"at": [2], "factor": 0.5}]]


@pytest.mark.parametrize("name", ["sgd", "optax.sgd", "dog"])
def test_groups_of_leaves_follow_schedules_of_their_own(name):
    args = {"momentum": 0.0} if name == "sgd" else {}
    section = section_of(name=name, args=args, group_schedules=GROUPS[:1])
    plain = section_of(name=name, args=args)
    phase = phases_of()[0]
    grads = jax.tree.map(np.ones_like, PARAMS)
    for step in (0, 4, 6):
        found, expected = (
            s.tx(phase).update(
                grads, s.tx(phase).init(PARAMS), PARAMS, step=step, rates=s.rates(phase)
            )[0]
            for s in (section, plain)
        )
        for path in PARAMS:
            factor = 1 - step / 8 if path.startswith("head/") else 1.0
            if name == "dog" and factor == 1.0:
                continue  # its norm is of the leaves of one schedule
            if name == "dog":
                assert np.all(found[path] < 0)
                continue
            np.testing.assert_allclose(found[path], factor * expected[path], rtol=1e-6)


def test_a_switch_keeps_the_state_of_a_cohort_whose_groups_become_fewer():
    section = section_of(name="optax.lion", args={}, group_schedules=GROUPS)
    old, new = phases_of("all@4 | head")
    tx = section.tx(old)
    state, frozen = make_state(old, tx, PARAMS, {})
    _, moved = tx.update(
        jax.tree.map(np.ones_like, PARAMS),
        state.opt_state,
        PARAMS,
        step=0,
        rates=section.rates(old),
    )
    state = dataclasses.replace(state, opt_state=moved)
    before = leaves_by_path(state.opt_state)
    after = leaves_by_path(switch_phase(state, frozen, old, new, section.tx(new))[0].opt_state)
    assert after and all("schedule_1" in name for name in after)
    for name, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[name])
        assert np.any(np.asarray(leaf)), name


def test_schedules_of_groups_cost_no_further_step_and_part_stacks():
    section = section_of(group_schedules=GROUPS)
    assert len(section.schedules) == 3
    rates = LeafRates(section.schedules, section.follows, tuple(sorted(PARAMS)))
    phase = phases_of()[0]
    found = jax.jit(rates.of_leaves)(4, section.rates(phase))
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rates.of_leaves(1, section.rates(phase)), [0.875, 0.875, 1.0])
    blocks = {f"blocks_{at}/kernel": np.ones((2, 2), np.float32) for at in range(4)}
    stages = tuple(f"blocks_{at}" for at in range(4))
    other = make_optim([(0, 8)], blocks, stages, group_schedules=[["blocks_[01]/.*", "linear"]])
    phase = make_phases(make_groups(blocks), total_steps=8, steps_per_epoch=8, phases="all")[0]
    stacks = make_stacks(phase, blocks, stages, "blocks", other.traits)
    assert [held.name for held in stacks.ranges] == ["blocks_0..1", "blocks_2..3"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([["head/.*"]], "optim.group_schedules: .* should be"),
        ([["head/.*", "linear", 3]], "optim.group_schedules: 3 should be a dict"),
        ([["haed/.*", "linear"]], "optim.group_schedules: pattern 'haed/.*' matches no leaf"),
        ([["head/.*", "liner"]], "optim.group_schedules: no schedule 'liner'"),
        ([["head/.*", "step", {"ad": 1}]], "optim.group_schedules: step takes no 'ad'"),
    ],
)
def test_bad_groups_are_named(rules, message):
    with pytest.raises(ConfigError, match=message):
        section_of(group_schedules=rules)


def test_what_a_method_prescribes_takes_no_options_of_another_schedule():
    prescribed = {"schedule": "slanted_triangle", "args": {"ratio": 4.0}}
    section = section_of(schedule="rsqrt", schedule_args={"timescale": 3}, prescribed=prescribed)
    assert float(section.schedule(0)) == pytest.approx(1 / 4)


TINY = "configs/digits_vit.py:tiny"


def test_options_of_optimizers_and_schedules_are_checked_on_the_command_line():
    config = load_config(
        TINY,
        [
            "--config.optim.name=rmsprop",
            "--config.optim.args.momentum=0.5",
            "--config.optim.schedule=rsqrt",
            "--config.optim.schedule_args.timescale=1e2",
        ],
    )
    assert config.optim.args.momentum == 0.5 and config.optim.args.centered is False
    assert config.optim.schedule_args.to_dict() == {"timescale": 100, "cooldown": 0.0}
    assert arg_keys("optim", "muon")["preconditioning"].choices[0] == "frobenius"
    assert "weight_decay" not in arg_keys("optim", "lion") and arg_keys("optim", "sign_sgd") == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.name=lion", "optim.args.b3=1"], "optim.args.b3: no such key .did you mean 'b2'"),
        (["optim.name=lio"], "config.optim.name: no optim 'lio' .did you mean 'lion'"),
        (["optim.name=lbfgs"], "optim.name: lbfgs needs the loss as a function"),
        (["optim.schedule=rsqrt", "optim.schedule_args.time=1"], "schedule_args.time: no such key"),
        (["optim.schedule_args.power=2"], "schedule_args.power: no such key; cosine takes none"),
        (["optim.schedule=coesin"], "optim.schedule should be one of cosine, constant, linear"),
        (["optim.args.b1=a"], "optim.args.b1 should be float"),
    ],
)
def test_mistakes_on_the_command_line_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, [f"--config.{text}" for text in overrides])


def test_optax_agrees_on_warm_up_then_linear():
    kw = dict(schedule="linear", warmup_steps=10)
    ramp = optax.linear_schedule(0.1, 1.0, 9)
    theirs = optax.join_schedules([ramp, optax.linear_schedule(1.0, 0.0, 90)], [10])
    np.testing.assert_allclose(rates(**kw), jax.vmap(theirs)(jnp.arange(101)), atol=1e-6)
