"""Convolutions and pools: each form equals the plain one, and costs what the plan says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import close, normal, value_and_grads

from jft.costs.flops import analytic_flops
from jft.costs.hlo import count
from jft.models import conv
from jft.models.conv import dense_conv, depthwise_conv, pointwise_conv
from jft.models.pool import max_pool


def lax_conv(x, kernel, strides, padding="SAME", groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("height", "width", "size", "stride", "padding"),
    [
        (9, 7, 3, 1, "SAME"),
        (9, 7, 3, 2, "SAME"),
        (8, 5, 5, 2, "SAME"),
        (7, 8, 5, 1, "SAME"),
        (2, 2, 5, 1, "SAME"),  # the kernel's outer ring never meets a pixel
        (1, 3, 5, 2, "SAME"),
        (1, 1, 3, 2, "SAME"),
        (9, 8, 3, 2, "VALID"),
        (6, 6, 5, 1, ((0, 3), (2, 1))),
    ],
)
def test_depthwise_conv_equals_the_grouped_convolution(height, width, size, stride, padding):
    x, kernel = normal(0, 3, height, width, 4), normal(1, size, size, 1, 4)
    ours = functools.partial(depthwise_conv, strides=(stride, stride), padding=padding)
    plain = functools.partial(lax_conv, strides=(stride, stride), padding=padding, groups=4)
    wanted = value_and_grads(plain, 2, x, kernel)
    found = jax.jit(functools.partial(value_and_grads, ours, 2))(x, kernel)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def test_depthwise_kernel_gradient_is_the_same_in_chunks(monkeypatch):
    x, kernel = normal(0, 2, 12, 12, 8), normal(1, 3, 3, 1, 8)
    form = functools.partial(depthwise_conv, strides=(2, 2))
    whole = value_and_grads(form, 2, x, kernel)
    monkeypatch.setattr("jft.models.conv.CHUNK_BYTES", 1)
    for one, other in zip(value_and_grads(form, 2, x, kernel), whole, strict=True):
        close(one, other)


def test_depthwise_conv_takes_no_grouped_convolution_on_cpu():
    x, kernel = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 1, 4)
    form = functools.partial(depthwise_conv, strides=(1, 1))
    lowered = jax.jit(functools.partial(value_and_grads, form, 2)).lower(x, kernel)
    assert "stablehlo.convolution" not in lowered.as_text()
    assert "depthwise" in lowered.compile().as_text()


def test_depthwise_conv_is_the_native_one_elsewhere():
    x, kernel = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 1, 4)
    form = functools.partial(depthwise_conv, strides=(1, 1))
    traced = jax.jit(functools.partial(value_and_grads, form, 2)).trace(x, kernel)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 3
    assert "while" not in text


def test_depthwise_conv_in_bfloat16_sums_in_float32():
    x, kernel = normal(0, 2, 8, 8, 4), normal(1, 5, 5, 1, 4)
    half = (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    found = depthwise_conv(*half, (1, 1))
    wanted = lax_conv(*(value.astype(jnp.float32) for value in half), (1, 1), groups=4)
    assert found.dtype == jnp.bfloat16
    close(found, wanted, 2**-8)


# (image side, kernel side, stride, pads, input channels, output channels) by the form on CPU.
DENSE = {
    "native": [
        (9, 3, 1, ((1, 1), (1, 1)), 8, 5),
        (9, 3, 2, ((1, 1), (1, 1)), 8, 5),
        (10, 3, 2, "SAME", 8, 5),
        (15, 7, 2, ((3, 3), (3, 3)), 3, 4),
    ],
    "patches": [
        (9, 3, 2, "SAME", 3, 5),  # few values a patch
        (2, 3, 1, ((1, 1), (1, 1)), 8, 5),  # an image smaller than the kernel
        (2, 3, 2, ((1, 1), (1, 1)), 8, 5),
        (5, 3, 1, ((1, 1), (1, 1)), 8, conv.MANY_CHANNELS),
        (5, 3, 2, ((1, 1), (1, 1)), 8, conv.MANY_CHANNELS),
    ],
    "tiles": [
        (8, 4, 4, "VALID", 3, 5),
        (9, 2, 2, "VALID", 8, 5),  # the last row and column belong to no patch
        (4, 2, 2, ((1, 1), (2, 0)), 8, 5),
        (4, 2, 2, ((1, 0), (0, 1)), 8, 5),
    ],
}
every_dense = pytest.mark.parametrize(
    ("form", "case"), [(form, case) for form, cases in DENSE.items() for case in cases]
)


def dense(case):
    side, size, stride, padding, inputs, outputs = case
    args = normal(0, 2, side, side, inputs), normal(1, size, size, inputs, outputs)
    form = {"strides": (stride, stride), "padding": padding}
    return functools.partial(dense_conv, **form), functools.partial(lax_conv, **form), args


@every_dense
def test_dense_conv_equals_the_convolution(form, case, monkeypatch):
    ours, plain, args = dense(case)
    taken = []
    for name in ("native", "patches", "tiles"):
        run = getattr(conv, f"_{name}_conv")
        noted = lambda *a, name=name, run=run: taken.append(name) or run(*a)  # noqa: E731
        monkeypatch.setattr(conv, f"_{name}_conv", noted)
    wanted = value_and_grads(plain, 2, *args)
    found = jax.jit(functools.partial(value_and_grads, ours, 2))(*args)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    assert set(taken) == {form, "native"}, "the native one is traced for other platforms"


@every_dense
def test_dense_conv_costs_what_the_analysis_says(form, case):
    ours, _, (x, kernel) = dense(case)
    x = x[:, :-1] if form == "tiles" else x  # not a square

    def loss(trainable, frozen):
        both = {**trainable, **frozen}
        return jnp.sum(jnp.tanh(ours(both["x"], both["kernel"])))

    for names in (["x"], ["kernel"], ["x", "kernel"]):
        trainable = {name: {"x": x, "kernel": kernel}[name] for name in names}
        frozen = {n: v for n, v in {"x": x, "kernel": kernel}.items() if n not in names}
        compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen).compile()
        assert count(compiled).flops == analytic_flops(loss, trainable, frozen).total


@pytest.mark.parametrize("form", DENSE)
def test_dense_conv_in_bfloat16_sums_in_float32(form):
    ours, plain, args = dense(DENSE[form][0])
    half = [value.astype(jnp.bfloat16) for value in args]
    found = value_and_grads(lambda *a: ours(*a).astype(jnp.float32), 2, *half)
    wanted = value_and_grads(plain, 2, *(value.astype(jnp.float32) for value in half))
    for one, other in zip(found, wanted, strict=True):
        close(one, other, 2**-7)


@every_dense
def test_dense_conv_is_the_native_one_elsewhere(form, case):
    ours, _, args = dense(case)
    traced = jax.jit(functools.partial(value_and_grads, ours, 2)).trace(*args)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 3 and "dot_general" not in text


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_conv_equals_the_convolution(stride):
    x, kernel = normal(0, 2, 5, 4, 3), normal(1, 1, 1, 3, 6)
    ours = functools.partial(pointwise_conv, strides=(stride, stride))
    plain = functools.partial(lax_conv, strides=(stride, stride), padding="VALID")
    wanted = value_and_grads(plain, 2, x, kernel)
    for one, other in zip(value_and_grads(ours, 2, x, kernel), wanted, strict=True):
        close(one, other)


def lax_max_pool(x, window, strides, pads):
    whole = ((0, 0), *pads, (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), whole)


@pytest.mark.parametrize(
    ("height", "width", "window", "strides", "pads"),
    [
        (8, 8, (3, 3), (2, 2), ((1, 1), (1, 1))),
        (9, 7, (3, 3), (2, 2), ((1, 1), (1, 1))),
        (1, 2, (3, 3), (2, 2), ((1, 1), (1, 1))),
        (6, 7, (2, 2), (2, 2), ((0, 0), (0, 0))),  # a column that no window holds
        (7, 8, (2, 3), (3, 1), ((0, 1), (0, 0))),
    ],
)
def test_max_pool_and_its_gradient_equal_those_of_jax(height, width, window, strides, pads):
    # Few different values: most windows hold their largest one more than once.
    x = jnp.round(normal(0, 3, height, width, 5))
    form = {"window": window, "strides": strides, "pads": pads}
    wanted = value_and_grads(functools.partial(lax_max_pool, **form), 2, x)
    ours = functools.partial(max_pool, **form)
    for one, other in zip(
        jax.jit(functools.partial(value_and_grads, ours, 2))(x), wanted, strict=True
    ):
        close(one, other, 1e-6)


def test_the_gradient_of_max_pool_goes_to_the_first_of_equals_row_by_row():
    x = jnp.zeros((1, 3, 3, 1)).at[0, 0, 2].set(1).at[0, 1, 0].set(1)
    grad = jax.grad(lambda x: max_pool(x, (3, 3), (1, 1), ((0, 0), (0, 0))).sum())(x)
    np.testing.assert_array_equal(grad[0, :, :, 0], [[0, 0, 1], [0, 0, 0], [0, 0, 0]])


def test_max_pool_shows_what_is_not_a_number():
    x = normal(0, 1, 4, 4, 1).at[0, 1, 1].set(jnp.nan)
    out = max_pool(x, (2, 2), (2, 2), ((0, 0), (0, 0)))
    np.testing.assert_array_equal(jnp.isnan(out)[0, :, :, 0], [[True, False], [False, False]])


def test_max_pool_takes_no_window_operation_on_cpu_and_the_native_ones_elsewhere():
    form = functools.partial(max_pool, window=(3, 3), strides=(2, 2), pads=((1, 1), (1, 1)))
    traced = jax.jit(functools.partial(value_and_grads, form, 2)).trace(normal(0, 2, 8, 8, 4))
    text = traced.lower().as_text()
    assert "reduce_window" not in text and "select_and_scatter" not in text
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "reduce_window" in text and "select_and_scatter" in text
