"""Layers: exact under masks and any device count, equal to the plain forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models.layers import (
    BatchNorm,
    Dropout,
    DropPath,
    LayerNorm,
    Training,
    attention,
    gelu,
    relu6,
)

DEVICES = 8


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(found, wanted, tolerance=1e-5):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


def value_and_grads(form, dy_seed, *args):
    out, pull = jax.vjp(form, *args)
    return (out, *pull(normal(dy_seed, *out.shape)))


def batch_norm(x, training, stats=None):
    module = BatchNorm(momentum=0.9)
    variables = module.init(jax.random.key(0), x)
    variables["params"] = {"scale": normal(5, x.shape[-1]), "bias": normal(6, x.shape[-1])}
    if stats is not None:
        variables["batch_stats"] = stats
    return module.apply(variables, x, training, mutable=["batch_stats"])


def test_batch_norm_ignores_masked_rows_exactly():
    x = normal(0, 6, 3, 2, 4) * 2 + 1
    spoiled = x.at[4:].set(1e6)
    mask = jnp.array([1.0, 1, 1, 1, 0, 0])
    alone, stats = batch_norm(x[:4], Training(jnp.ones(4), jnp.arange(4)))
    masked, masked_stats = batch_norm(spoiled, Training(mask, jnp.arange(6)))
    close(masked[:4], alone)
    rows = np.asarray(x[:4], np.float64).reshape(-1, 4)
    for found in (stats["batch_stats"], masked_stats["batch_stats"]):
        close(found["mean"], 0.1 * rows.mean(0))
        close(found["var"], 0.9 + 0.1 * rows.var(0, ddof=1))


def test_batch_norm_on_eight_devices_equals_one_under_a_ragged_mask():
    x = normal(0, DEVICES * 2, 3, 3, 4) * 3 + 2
    weight = jnp.ones(len(x)).at[-5:].set(0.0)  # the last two devices hold padding only
    index = jnp.arange(len(x))
    dy = normal(7, *x.shape) * weight[:, None, None, None]

    def run(x, weight, index, dy, axis_name):
        def form(x):
            return batch_norm(x, Training(weight, index, axis_name))

        out, pull, stats = jax.vjp(form, x, has_aux=True)
        return out, pull(dy)[0], stats

    single = jax.jit(functools.partial(run, axis_name=None))(x, weight, index, dy)
    shards = [value.reshape(DEVICES, -1, *value.shape[1:]) for value in (x, weight, index, dy)]
    many = jax.pmap(functools.partial(run, axis_name="batch"), axis_name="batch")(*shards)
    for found, wanted in zip(many[:2], single[:2], strict=True):
        close(found.reshape(wanted.shape), wanted)
    for name, wanted in single[2]["batch_stats"].items():
        assert np.ptp(np.asarray(many[2]["batch_stats"][name]), axis=0).max() == 0
        close(many[2]["batch_stats"][name][0], wanted)


def test_batch_norm_without_an_example_moves_no_statistic():
    x = normal(0, 2, 2, 2, 3)
    out, stats = batch_norm(x, Training(jnp.zeros(2), jnp.arange(2)))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(stats["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(stats["batch_stats"]["var"], np.ones(3))


def test_frozen_batch_norm_uses_and_keeps_its_statistics():
    x = normal(0, 4, 2, 2, 3)
    stats = {"mean": normal(1, 3), "var": jnp.exp(normal(2, 3))}
    # A module applied alone has the empty path.
    training = Training(jnp.ones(4), jnp.arange(4), frozen_norms=frozenset({""}))
    out, after = batch_norm(x, training, stats)
    still, _ = batch_norm(x, None, stats)
    np.testing.assert_array_equal(out, still)
    for name, value in stats.items():
        np.testing.assert_array_equal(after["batch_stats"][name], value)


def test_batch_norm_is_read_only_unless_statistics_are_mutable():
    module, x = BatchNorm(), normal(0, 4, 2, 2, 3)
    variables = module.init(jax.random.key(0), x)
    out = module.apply(variables, x, Training(jnp.ones(4), jnp.arange(4)))
    close(out.mean((0, 1, 2)), np.zeros(3))


@pytest.mark.parametrize("layer", [Dropout(0.4), DropPath(0.4)])
def test_random_masks_do_not_depend_on_the_number_of_devices(layer):
    x, key = jnp.ones((DEVICES * 4, 5, 3)), jax.random.key(3)

    def run(x, index):
        training = Training(jnp.ones(len(x)), index)
        return layer.apply({}, x, training, rngs={"dropout": key})

    index = jnp.arange(len(x))
    single = run(x, index)
    many = jax.pmap(run)(x.reshape(DEVICES, 4, 5, 3), index.reshape(DEVICES, 4))
    np.testing.assert_array_equal(many.reshape(x.shape), single)
    strided = run(x[1::2], index[1::2])  # micro-batches take strided rows
    np.testing.assert_array_equal(strided, single[1::2])
    assert 0.2 < float(jnp.mean(single == 0)) < 0.6
    np.testing.assert_array_equal(np.unique(single), np.float32([0, 1 / 0.6]))


def test_drop_path_drops_whole_examples():
    training = Training(jnp.ones(16), jnp.arange(16))
    rngs = {"dropout": jax.random.key(0)}
    out = DropPath(0.5).apply({}, jnp.ones((16, 4, 3)), training, rngs=rngs)
    assert {len(np.unique(row)) for row in out} == {1}
    assert len(np.unique(out)) == 2


@pytest.mark.parametrize("layer", [Dropout(0.4), DropPath(0.4)])
def test_random_masks_are_off_in_evaluation(layer):
    x = normal(0, 4, 3)
    np.testing.assert_array_equal(layer.apply({}, x, None), x)


def test_layer_norm_matches_float64():
    x = normal(0, 5, 32) * 3 + 100
    module = LayerNorm(1e-12)
    out = module.apply({"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}, x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / exact.std(1, keepdims=True)
    close(out, exact)


@pytest.mark.parametrize("form", ["exact", "tanh"])
def test_gelu_and_its_gradient_match_jax(form):
    x = jnp.linspace(-8, 8, 513)
    ours = functools.partial(gelu, form=form)
    plain = functools.partial(jax.nn.gelu, approximate=form == "tanh")
    for one, other in zip(value_and_grads(ours, 1, x), value_and_grads(plain, 1, x), strict=True):
        close(one, other, 1e-6)


def test_exact_and_tanh_gelu_differ():
    x = jnp.linspace(-3, 3, 101)
    assert float(jnp.abs(gelu(x, "exact") - gelu(x, "tanh")).max()) > 1e-4


def test_attention_and_its_gradients_match_jax():
    args = [normal(seed, 2, 7, 3, 4) * 3 for seed in range(3)]
    wanted = value_and_grads(jax.nn.dot_product_attention, 4, *args)
    for one, other in zip(value_and_grads(attention, 4, *args), wanted, strict=True):
        close(one, other)


def test_attention_is_finite_for_large_scores():
    query = jnp.full((1, 3, 1, 4), 1e3)
    assert np.isfinite(attention(query, query, query)).all()


def test_relu6_has_no_gradient_at_its_ends():
    x = jnp.array([-1.0, 0, 3, 6, 7])
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu6))(x), [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(relu6(x), [0, 0, 3, 6, 6])
