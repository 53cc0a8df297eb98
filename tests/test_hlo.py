"""Compiled FLOPs equal the analytic ones, and show it when freezing saves nothing."""

import functools

import cost_models as models
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jft.costs.flops import analytic_flops
from jft.costs.hlo import count, count_text
from jft.costs.products import Axis
from jft.tree import count_bytes, split

TOLERANCE = 0.05


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compile_fast(fn, *args, **options):
    return jax.jit(fn, **options).lower(*args).compile(models.FAST)


def ratio(loss_fn, trainable, frozen, *data):
    """Compiled over analytic FLOPs of the gradient."""
    compiled = compile_fast(jax.value_and_grad(loss_fn), trainable, frozen, *data)
    return count(compiled).flops / analytic_flops(loss_fn, trainable, frozen, *data).total


@functools.cache
def case(name, pattern, **options):
    """(compiled cost, analytic flops) of a whole training step."""
    forward, make_params = models.MODELS[name]
    params, loss_fn, batch = make_params(), models.make_loss(forward), models.batch_shapes(name)
    mask = models.make_masks(params)[pattern]
    compiled = models.compile_step(loss_fn, params, mask, batch, accum_steps=2, **options)
    return count(compiled), analytic_flops(loss_fn, *split(params, mask), batch)


@pytest.mark.parametrize("pattern", ["head", "top", "bottom", "scattered", "full"])
@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
def test_the_compiled_step_costs_what_the_analysis_says(name, pattern):
    cost, flops = case(name, pattern)
    assert cost.flops == pytest.approx(flops.total, rel=TOLERANCE)
    assert [trips for _, trips in cost.loops] == [2]
    assert not cost.uncounted


@pytest.mark.parametrize("name, pattern", [("mlp", "head"), ("conv", "top"), ("mlp", "scattered")])
def test_mutant_clipping_all_gradients_brings_the_frozen_backward_pass_back(name, pattern):
    cost, flops = case(name, pattern, clip_everything=True)
    assert cost.flops > (1 + TOLERANCE) * flops.total


def test_shifted_depthwise_products_count_as_multiply_adds():
    x, kernel = floats(4, 8, 8, 16), floats(3, 3, 1, 16)
    forward = 2 * 9 * 4 * 8 * 8 * 16
    cost = count(compile_fast(models.shifted, x, kernel))
    assert cost.kinds == {"depthwise": forward}

    # The gradients apart from the loss, whose fusions may make forward products again.
    cost = count(compile_fast(lambda *a: models.shifted_backward(a[:2], a[2]), x, kernel, x))
    assert cost.kinds["depthwise"] == 2 * forward

    def loss(trainable, frozen):
        return jnp.sum(models.shifted(*({**trainable, **frozen}[k] for k in "xk")) ** 2)

    for trainable in ({"k": kernel}, {"x": x}, {"x": x, "k": kernel}):
        frozen = {k: v for k, v in {"x": x, "k": kernel}.items() if k not in trainable}
        flops = analytic_flops(loss, trainable, frozen)
        assert (flops.forward, flops.backward) == (forward, forward * len(trainable))


def test_sums_by_a_product_with_ones_are_not_counted():
    cost = count(compile_fast(lambda x: (jnp.ones((1, 64)) @ x)[0], floats(64, 32)))
    assert cost.flops == 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("lhs, rhs, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4)])
def test_convolutions_count_real_multiply_adds_in_all_three_directions(stride, lhs, rhs, groups):
    def loss(trainable, frozen, x):
        x = x * trainable["x"][None, None, None]
        y = lax.conv_general_dilated(
            x,
            trainable["k"],
            (stride, stride),
            [(2, 1), (1, 2)],
            lhs_dilation=(lhs, lhs),
            rhs_dilation=(rhs, rhs),
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum(jnp.tanh(y))

    trainable = {"x": floats(8), "k": floats(3, 3, 8 // groups, 8)}
    assert ratio(loss, trainable, {}, floats(2, 9, 9, 8)) == 1.0


def test_a_valid_tap_reads_a_real_element():
    assert Axis(size=8, window=3, output=8, low=1).pairs == 3 * 8 - 2
    assert Axis(size=4, window=3, output=8, low=1, lhs_dilation=2).pairs == 11
    assert Axis(size=5, window=2, output=3, stride=2).pairs == 5


def test_loops_count_times_their_length_and_per_call_site():
    def loss(trainable, frozen, x):
        x, _ = lax.scan(lambda c, w: (jnp.tanh(c @ w @ frozen["b"]), None), x, trainable["w"])
        return jnp.sum(x)

    trainable, frozen = {"w": floats(6, 16, 16)}, {"b": floats(16, 16)}
    assert ratio(loss, trainable, frozen, floats(8, 16)) == 1.0
    cost = count(compile_fast(jax.grad(loss), trainable, frozen, floats(8, 16)))
    assert {trips for _, trips in cost.loops} == {6}


def test_a_loop_without_a_static_length_is_reported():
    def run(x):
        return lax.while_loop(lambda c: jnp.sum(c) < 5, lambda c: c @ c, x)

    cost = count(compile_fast(run, floats(8, 8)))
    assert [trips for _, trips in cost.loops] == [None]
    assert cost.flops == 2 * 8**3


def test_remat_counts_what_runs_again():
    forward, make_params = models.MODELS["transformer"]
    params, batch = make_params(), models.batch_shapes("transformer")
    plain = models.make_loss(forward)
    again = models.make_loss(functools.partial(forward, wrap=jax.checkpoint))
    loss = lambda t, f, b: again(t, f, b)[0]  # noqa: E731
    assert (
        analytic_flops(again, params, {}, batch).total
        > 1.2 * analytic_flops(plain, params, {}, batch).total
    )
    assert ratio(loss, params, {}, batch) == pytest.approx(1, rel=TOLERANCE)


def test_a_condition_costs_its_dearer_branch():
    def loss(trainable, frozen, x):
        return jnp.sum(
            lax.cond(
                x[0, 0] > 0,
                lambda v: v @ trainable["a"] @ frozen["b"],
                lambda v: v @ frozen["b"],
                x,
            )
        )

    square = floats(16, 16)
    assert ratio(loss, {"a": square}, {"b": square}, square) == 1.0


def test_all_reduce_argument_and_alias_bytes_are_exact_per_device():
    params = {"a": floats(16, 16), "b": floats(16)}
    frozen = floats(16, 4)

    def step(state, frozen, x):
        def loss(state):
            return jnp.sum((jnp.tanh(x @ state["a"] + state["b"][None]) @ frozen) ** 2)

        value, grads = jax.value_and_grad(loss)(state)
        grads, value = lax.psum((grads, value), "batch")
        return jax.tree.map(jnp.subtract, state, grads), value

    mapped = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=(None, None))
    cost = count(
        compile_fast(
            lambda s, f, x: mapped(s, f, x.reshape(8, -1, 16)),
            params,
            frozen,
            floats(32, 16),
            donate_argnums=0,
        )
    )
    assert cost.all_reduce_bytes == count_bytes(params) + 4
    assert cost.argument_bytes == count_bytes(params) + 16 * 4 * 4 + 4 * 16 * 4
    assert cost.alias_bytes == count_bytes(params)
    assert cost.output_bytes >= cost.alias_bytes + 4


LIBRARY = """
HloModule m

%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %a.1 = f32[8,16]{1,0} constant({...})
  %d.1 = f32[8,8]{1,0} dot(%a.1, %a.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t.1 = (s32[], f32[4]{0}) tuple(%p.1)
}

ENTRY %main (a: f32[8,16], b: f32[16,32]) -> f32[] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,32]{1,0} parameter(1)
  %x = f32[2,9,9,4]{3,2,1,0} parameter(2)
  %k = f32[3,3,4,8]{3,2,1,0} parameter(3)
  %y = f32[2,9,9,8]{3,2,1,0} parameter(4)
  CALLS
  ROOT %z = f32[] constant(0)
}
"""
CONV = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
CONV_FLOPS = 2 * 2 * 4 * 8 * (3 * 9 - 2) ** 2


@pytest.mark.parametrize(
    "call, flops",
    [
        (
            "(f32[8,32]{1,0}, s8[64]{0}) custom-call(%a, %b), "
            'custom_call_target="__cublas$lt$matmul", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
            2 * 8 * 16 * 32,
        ),
        (
            'f32[8,32]{1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul", '
            'backend_config={"onednn_matmul_config":{"transpose_a":false}}',
            2 * 8 * 16 * 32,
        ),
        (
            "f32[2,9,9,8]{3,2,1,0} custom-call(%x, %k), "
            + CONV
            + ', custom_call_target="__cudnn$convForward"',
            CONV_FLOPS,
        ),
        (
            "f32[2,9,9,4]{3,2,1,0} custom-call(%y, %k), "
            + CONV
            + ', custom_call_target="__cudnn$convBackwardInput"',
            CONV_FLOPS,
        ),
        (
            "f32[3,3,4,8]{3,2,1,0} custom-call(%x, %y), "
            + CONV
            + ', custom_call_target="__cudnn$convBackwardFilter"',
            CONV_FLOPS,
        ),
        ("(s32[], f32[4]{0}) while(%a), condition=%cond, body=%body", 7 * 2 * 8 * 8 * 16),
        ('f32[8]{0} custom-call(%a), custom_call_target="mystery"', 0),
    ],
)
def test_library_calls_count_as_the_products_they_replace(call, flops):
    program = count_text(LIBRARY.replace("CALLS", f"%call = {call}"))
    assert program.flops == flops
    assert program.uncounted == ({"mystery"} if "mystery" in call else set())
