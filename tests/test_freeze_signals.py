"""Signals and elementary decisions against numpy, by their published formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.errors import ConfigError, DivergedError
from jft.freeze.decide import change_ratio, flat, percentile_cut
from jft.freeze.signals import (
    SCALE_MARK,
    dequantise,
    exact,
    marchenko_pastur_edge,
    quantise,
    rel_update,
    similarity_distance,
    top_elements,
    unit_snr,
    weight_snr,
    weight_snrs,
)


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 5), (3, 3, 4, 7), (9,)])
def test_unit_snr_is_the_mean_of_squares_over_the_variance_along_outputs(shape):
    grad = normal(*shape) + 0.5
    spread = grad.astype(np.float64).var(axis=-1, ddof=1, keepdims=True)
    assert float(unit_snr(grad)) == pytest.approx(np.mean(grad**2 / (spread + 1e-8)), rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 1), (1,), ()])
def test_unit_snr_of_a_single_output_is_finite_and_passes_the_bound(shape):
    assert np.isfinite(unit_snr(jnp.full(shape, 0.01))) and unit_snr(jnp.full(shape, 0.01)) > 0.95


def test_rel_update_is_the_mean_relative_change_of_the_elements_that_were_not_zero():
    before = {"a": normal(4, 3), "b": np.zeros(3, np.float32)}
    before["a"][0, 0] = 0.0
    after = {"a": before["a"] + normal(4, 3, seed=1, scale=0.01), "b": np.ones(3, np.float32)}
    counts = before["a"] != 0
    wanted = np.mean(np.abs((after["a"] - before["a"])[counts] / before["a"][counts]))
    found = rel_update(before, after)
    assert found["a"] == pytest.approx(wanted, rel=1e-5)
    assert found["b"] == 0.0
    assert rel_update(before, {**after, "c": np.ones(2)}) == found


def numpy_distance(now, reference):
    grams = []
    for x in (now, reference):
        rows = x.reshape(len(x), -1).astype(np.float64)
        gram = rows @ rows.T
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    return np.sum((grams[0] - grams[1]) ** 2) / len(now) ** 2


def test_similarity_distance_compares_row_normalised_gram_matrices():
    now, reference = normal(6, 3, 4), normal(6, 5, seed=1)  # widths may differ
    found = similarity_distance(now, reference, jnp.ones(6))
    assert float(found) == pytest.approx(numpy_distance(now, reference), rel=1e-5)
    assert float(similarity_distance(now, 3.0 * now, jnp.ones(6))) < 1e-12  # scale is no change
    assert float(similarity_distance(now, now, jnp.zeros(6))) == 0.0


def test_similarity_distance_leaves_out_padded_rows_even_if_they_are_nan():
    now, reference = normal(6, 4), normal(6, 4, seed=1)
    weight = np.array([1, 1, 1, 1, 0, 0], np.float32)
    wanted = numpy_distance(now[:4], reference[:4])
    now[4:], reference[4:] = np.nan, 1e30
    assert float(similarity_distance(now, reference, weight)) == pytest.approx(wanted, rel=1e-5)


def test_a_quantised_leaf_is_within_half_a_step_and_vectors_stay_as_they_are():
    leaves = {
        "k/kernel": normal(5, 7, scale=0.3),
        "k/bias": normal(7),
        "z": np.zeros((2, 2), np.float32),
    }
    held = quantise(leaves)
    assert held["k/kernel"].dtype == np.int8 and np.abs(held["k/kernel"]).max() == 127
    back = jax.jit(dequantise)(held)
    assert set(back) == set(leaves)
    step = float(held["k/kernel" + SCALE_MARK])
    assert step == pytest.approx(np.abs(leaves["k/kernel"]).max() / 127, rel=1e-6)
    assert np.max(np.abs(back["k/kernel"] - leaves["k/kernel"])) <= 0.5001 * step
    assert np.array_equal(back["k/bias"], leaves["k/bias"])
    assert not np.any(back["z"])


def test_exact_numbers_survive_json():
    value = exact(0.1)
    assert json.loads(json.dumps(value)) == value
    assert np.float32(value) == np.float32(0.1) and value != 0.1


@pytest.mark.parametrize("shape", [(300, 300), (100, 400), (400, 100)])
def test_the_edge_parts_a_random_spectrum_from_a_planted_direction(shape):
    noise = normal(*shape, scale=0.02)
    edge = marchenko_pastur_edge(0.02 * np.sqrt(max(shape)), shape)
    assert np.linalg.svd(noise, compute_uv=False)[0] < 1.03 * edge
    left, right = normal(shape[0], seed=1), normal(shape[1], seed=2)
    spike = np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    values = np.linalg.svd(noise + 2.0 * edge * spike, compute_uv=False)
    assert np.sum(values > 1.1 * edge) == 1


def numpy_weight_snr(matrix):
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    edge = sigma * np.sqrt((1 + np.sqrt(min(matrix.shape) / max(matrix.shape))) ** 2)
    noise = values[values <= edge].sum() if np.any(values <= edge) else 1.0
    return values[values > edge].sum() / noise / values[0]


@pytest.mark.parametrize("shape", [(32, 32), (12, 40), (40, 12), (3, 3, 8, 16), (8, 1)])
def test_weight_snr_is_spectrums_ratio_of_singular_values(shape):
    kernel = normal(*shape)
    wanted = numpy_weight_snr(kernel.reshape(-1, shape[-1]))
    assert weight_snr(kernel) == pytest.approx(wanted, rel=1e-6)


def test_weight_snr_falls_with_scale_and_with_a_single_strong_direction():
    kernel = normal(64, 64)
    assert weight_snr(4.0 * kernel) == pytest.approx(weight_snr(kernel) / 4.0, rel=1e-6)
    spiked = kernel + 100.0 / 64 * np.ones((64, 64), np.float32)
    assert weight_snr(spiked) < 0.5 * weight_snr(kernel)
    assert weight_snr(np.zeros((4, 4), np.float32)) == 0.0


def test_weight_snrs_takes_matrices_and_kernels_only():
    leaves = {
        "conv/kernel": normal(3, 3, 4, 8),
        "dense/kernel": normal(4, 8),
        "dense/bias": normal(8),
        "embed/position": normal(1, 5, 8),
    }
    found = weight_snrs(leaves)
    assert set(found) == {"conv/kernel", "dense/kernel"}
    assert found["dense/kernel"] == weight_snr(leaves["dense/kernel"])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("levels", [1, 2, 5, None])
def test_top_elements_keeps_the_exact_count_and_the_largest_whatever_the_ties(share, levels):
    rng = np.random.default_rng(0)
    draw = rng.normal if levels is None else lambda size: rng.integers(0, levels, size)
    values = {path: np.asarray(draw(size=s), np.float32) for path, s in (("b", (7, 9)), ("a", 37))}
    masks = top_elements(values, share)
    assert {p: m.shape for p, m in masks.items()} == {p: v.shape for p, v in values.items()}
    assert sum(int(m.sum()) for m in masks.values()) == round(share * 100)
    kept = np.concatenate([values[p][masks[p]] for p in values])
    dropped = np.concatenate([values[p][~masks[p]] for p in values])
    assert not dropped.size or kept.min() >= dropped.max()
    # Sorted by value, then path, then position, whatever the order of the dict.
    ranked = sorted(
        ((-v, p, i) for p in values for i, v in enumerate(values[p].reshape(-1).tolist()))
    )[: round(share * 100)]
    assert {(p, i) for p in masks for i in np.flatnonzero(masks[p]).tolist()} == {
        (p, i) for _, p, i in ranked
    }
    again = top_elements(dict(reversed(values.items())), share)
    assert all(np.array_equal(again[p], masks[p]) for p in masks)


@pytest.mark.parametrize("share", [0.0, 0.001, -0.5, 1.5])
def test_top_elements_refuses_a_share_that_keeps_nothing_or_too_much(share):
    with pytest.raises(ConfigError, match="share"):
        top_elements({"a": np.ones(10, np.float32)}, share)


def test_top_elements_names_the_leaf_that_is_not_finite():
    with pytest.raises(DivergedError, match="'b'"):
        top_elements({"a": np.ones(3), "b": np.array([1.0, np.nan])}, 0.5)


def test_change_ratio_counts_a_dead_block_as_unchanged():
    before = {"0": 10.0, "1": 4.0, "2": 0.0, "3": 5.0}
    now = {"0": 5.0, "1": 5.0, "2": 1.0, "3": 0.0, "4": 1.0}
    assert change_ratio(before, now) == {"0": 0.5, "1": 0.25, "2": 0.0, "3": 0.0}


@pytest.mark.parametrize(
    ("eta", "q", "moved"),
    [
        ([0.1, 0.2, 0.3, 0.4], 50, 2),
        ([0.4, 0.1, 0.1, 0.1], 50, 0),
        ([0.1, 0.4, 0.1, 0.5], 50, 1),
        ([0.1, 0.2, 0.3], 100, 2),
        ([0.2, 0.2, 0.2], 100, 0),
        ([0.7], 50, 0),
        ([], 50, 0),
    ],
)
def test_the_cut_moves_to_the_first_block_that_reaches_the_percentile(eta, q, moved):
    assert percentile_cut(eta, q) == moved


def test_a_series_is_flat_once_its_smoothed_changes_are_small():
    falling = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert not flat(falling, 2, 0.1)
    assert not flat([1.0, 1.0, 1.0], 2, 0.1)  # too short
    assert flat([*falling, 0.2, 0.2, 0.2], 2, 0.1)
    assert flat([1.0, 1.1, 0.9, 1.1, 0.9, 1.1], 2, 0.05)  # noise is smoothed away
    assert not flat([1.0, 1.1, 0.9, 1.1, 0.9, 1.1], 1, 0.05)
    with pytest.raises(ConfigError, match="window"):
        flat(falling, 0, 0.1)
