"""The plan's numbers: what each trainable set costs, what it can save, and what spoils the cut."""

import json

import cost_models as models
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from jft.costs.flops import Flops, analytic_flops
from jft.costs.plan import Costs, PhaseParts, make_plan, to_dict
from jft.costs.plan_text import plan_table
from jft.tree import count_bytes

ADAM = optax.adam(1e-3)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def chain(depth=4, width=16):
    """A chain of equal square layers and its loss: every product costs `unit`."""
    params = {f"blocks_{i}/kernel": floats(width, width) for i in range(depth)}

    def loss_fn(trainable, frozen, x):
        weights = {**trainable, **frozen}
        for i in range(depth):
            x = jnp.tanh(x @ weights[f"blocks_{i}/kernel"])
        return jnp.sum(x)

    return params, loss_fn, floats(8, width), 2 * 8 * width * width


def cost(trained, depth=4):
    params, loss_fn, x, unit = chain(depth)
    trainable = {p: v for p, v in params.items() if int(p[7]) in trained}
    flops = analytic_flops(loss_fn, trainable, {p: params[p] for p in params.keys() - trainable}, x)
    return flops.forward / unit, flops.backward / unit


@pytest.mark.parametrize(
    "trained, backward",
    [({3}, 1), ({2, 3}, 3), ({0, 1}, 5), ({0}, 4), ({0, 3}, 5), ({0, 1, 2, 3}, 7), (set(), 0)],
)
def test_each_product_costs_one_more_per_operand_that_depends_on_a_trainable_leaf(
    trained, backward
):
    assert cost(trained) == (4, backward)


def square(loss):
    """Units of forward and backward for a loss of trainable a, frozen b, data x, all [16, 16]."""
    unit = 2 * 16**3
    flops = analytic_flops(loss, {"a": floats(16, 16)}, {"b": floats(16, 16)}, floats(16, 16))
    return flops.forward / unit, flops.backward / unit


def test_adapters_pay_for_the_way_through_and_not_for_the_base():
    # x @ b once; then (y @ a) @ a: dA twice, and the way back through the outer a.
    assert square(lambda t, f, x: jnp.sum(x @ f["b"] @ t["a"] @ t["a"])) == (3, 3)


def test_stopped_gradients_and_integers_carry_none():
    assert square(lambda t, f, x: jnp.sum(lax.stop_gradient(x @ t["a"]) @ f["b"])) == (2, 0)
    assert square(
        lambda t, f, x: jnp.sum((x @ t["a"]).astype(jnp.int32).astype(jnp.float32) @ f["b"])
    ) == (2, 0)
    assert square(lambda t, f, x: jnp.sum(jnp.floor(x @ t["a"]) @ f["b"])) == (2, 0)


def test_metrics_beside_the_loss_cost_forward_only_and_what_nobody_reads_costs_nothing():
    def loss(t, f, x):
        unread = x @ f["b"] @ t["a"]
        del unread
        return jnp.sum(x @ t["a"]), {"other": x @ t["a"] @ f["b"]}

    assert square(loss) == (3, 1)


def test_liveness_passes_through_every_kind_of_call():
    def body(t, f, x):
        return jnp.tanh(x @ t["a"]) @ f["b"]

    plain = square(lambda t, f, x: jnp.sum(body(t, f, x)))
    assert plain == (2, 2)
    assert square(lambda t, f, x: jnp.sum(jax.jit(body)(t, f, x))) == plain
    assert square(lambda t, f, x: jnp.sum(jax.checkpoint(body)(t, f, x))) == (2, 3)

    @jax.custom_vjp
    def custom(a, b, x):
        return body({"a": a}, {"b": b}, x)

    custom.defvjp(lambda a, b, x: (custom(a, b, x), None), lambda _, g: (g, g, g))
    assert square(lambda t, f, x: jnp.sum(custom(t["a"], f["b"], x))) == plain

    @jax.custom_jvp
    def forward(x):
        return jnp.tanh(x)

    forward.defjvp(lambda x, dx: (jnp.tanh(x[0]), dx[0]))
    assert square(lambda t, f, x: jnp.sum(forward(x @ t["a"]) @ f["b"])) == plain
    assert (
        square(
            lambda t, f, x: jnp.sum(
                lax.cond(x[0, 0] > 0, lambda v: v @ t["a"] @ f["b"], lambda v: v, x)
            )
        )
        == plain
    )


def test_a_scan_settles_what_is_live_in_its_carry():
    def loss(t, f, x):
        # The carry depends on a trainable leaf only after the first turn.
        def turn(carry, _):
            return (carry[1] @ f["b"], jnp.tanh(carry[0] @ t["a"])), None

        carry, _ = lax.scan(turn, (x, x), None, length=3)
        return jnp.sum(carry[0])

    # Each turn: x @ b (its operand is live), x @ a (both are): 2 forward, 1 + 2 backward.
    assert square(loss) == (6, 9)


def test_the_loss_must_be_a_scalar():
    with pytest.raises(ValueError, match="scalar loss"):
        analytic_flops(lambda t, f: t, floats(3), {})


def test_flops_add_up():
    assert (Flops(1, 2) + Flops(3, 4)).times(2) == Flops(8, 12)
    assert Flops(1, 2).total == 3


def network_plan(*trains, tx=ADAM):
    """Phases of 10 steps over the small transformer; each trains what its function selects."""
    forward, make_params = models.MODELS["transformer"]
    params = make_params()
    stages = list(dict.fromkeys(path.split("/")[0] for path in params))
    phases = [
        PhaseParts(name, 10 * at, 10 * at + 10, {path: test(path) for path in params}, tx)
        for at, (name, test) in enumerate(trains)
    ]
    loss_fn = models.make_loss(forward)
    batch = models.batch_shapes("transformer")
    plans = make_plan(phases, Costs(params, stages, lambda _: loss_fn, [batch]), scalars_bytes=12)
    return params, phases, plans


HEAD = ("head", lambda path: path.startswith("head/"))
ALL = ("all", lambda _: True)
BIAS = ("bias + head", lambda path: path.endswith("bias") or path.startswith("head/"))
TOP = ("top", lambda path: path.startswith(("head/", "blocks_1/")))
POS = ("head + position", lambda path: path.startswith("head/") or path == "embed/pos")


def test_classes_cuts_and_bounds():
    _, _, plans = network_plan(HEAD, TOP, BIAS, ALL)
    assert [plan.kind for plan in plans] == ["cut", "cut", "set", "full"]
    assert [plan.cut for plan in plans] == ["head", "blocks_1", None, None]
    bounds = [plan.bound for plan in plans]
    assert bounds[0] == pytest.approx(3, rel=0.02) and bounds[3] == 1
    assert 1 < bounds[2] <= 1.5 < bounds[0]
    assert all(plan.forward_flops == plans[0].forward_flops for plan in plans)


def test_bytes_are_exact():
    params, phases, (head, everything) = network_plan(HEAD, ALL)
    for plan, phase in zip((head, everything), phases, strict=True):
        leaves = {path: leaf for path, leaf in params.items() if phase.mask[path]}
        assert plan.trainable_bytes == count_bytes(leaves) == 4 * plan.trainable_params
        assert plan.trainable_bytes + plan.frozen_bytes == count_bytes(params)
        assert plan.optimizer_bytes == 2 * plan.trainable_bytes + 4  # two moments and the counter
        assert plan.all_reduce_bytes == plan.trainable_bytes + 12
        batch = 16 * 8 * 8 * 3 * 4 + 16 * 4
        assert plan.argument_bytes == count_bytes(params) + plan.optimizer_bytes + batch


def test_a_low_trainable_leaf_that_spoils_the_cut_is_named_with_its_cost():
    _, _, (head, low, bias, everything) = network_plan(HEAD, POS, BIAS, ALL)
    assert low.spoilers == ("embed/pos",)
    assert low.spoiler_flops == low.flops - head.flops > 0
    assert not head.spoilers and not everything.spoilers and not bias.spoilers
    text = str(plan_table([head, low]))
    assert "embed/pos" in text and f"bound is {head.bound:.2f}x" in text


def test_the_table_is_aligned_and_plan_json_has_its_shape():
    params, phases, plans = network_plan(HEAD, BIAS, ALL)
    lines = str(plan_table(plans)).splitlines()[:-1]
    assert len(lines) == 4 and len({line.index("x  ") for line in lines[1:]}) == 1
    groups = {path: path.split("/")[0] for path in params}
    content = to_dict(plans, params, [phase.mask for phase in phases], groups, {"head": 1e-3})
    assert json.loads(json.dumps(content)) == content
    wanted = "index name train start_step stop_step class cut trainable_params flops bound"
    assert all(set(wanted.split()) <= set(row) for row in content["phases"])
    assert content["phases"][0] | {"bound": 0} == content["phases"][0] | {"bound": 0, "cut": "head"}
    rows = {row["group"]: row for row in content["groups"]}
    assert list(rows) == ["embed", "blocks_0", "blocks_1", "head"]
    assert rows["blocks_0"]["trainable"] == [False, True, True]
    assert rows["head"] | {"leaves": 2, "params": 330, "bytes": 1320} == rows["head"]
    assert rows["head"]["learning_rate"] == 1e-3 and rows["embed"]["learning_rate"] is None


def test_a_leaf_outside_the_stages_is_refused():
    params, loss_fn, x, _ = chain()
    with pytest.raises(ValueError, match="blocks_3/kernel"):
        Costs(params, ["blocks_0", "blocks_1", "blocks_2"], lambda _: loss_fn, [x])
