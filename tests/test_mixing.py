"""Mixup and cutmix: what is mixed, with whom, how it counts; and that devices change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_step import SGD, Trainer, batches, worst
from tiny_net import make_batch, make_parts

from jft import load_config, setup
from jft.data.mixing import beta, make_mixing, mixed_sums, partners
from jft.errors import ConfigError
from jft.losses import KINDS, LOSSES, make_loss
from jft.train.micro import micro_batches
from jft.train.parallel import check_batch_size, make_parallel
from jft.train.state import Frozen
from jft.train.step import make_loss_sums

pytestmark = pytest.mark.usefixtures("quick")

BOTH = dict(mixup=0.4, cutmix=1.0)
OPTIONS = dict(norm=False, dropout=0.3, augment=True)


class Mixed(Trainer):
    """A Trainer whose steps mix images."""

    def __init__(self, mixing=BOTH, **kw):
        self.mixing = make_mixing(**mixing)
        super().__init__(optim=SGD, **kw)

    def enter(self, phase):
        self.parts = dataclasses.replace(self.parts, mixing=self.mixing)
        super().enter(phase)


def mix(rows=64, seed=0, mask=None, bad=False, **args):
    """(images, mixed images, own shares) of noise; with `bad`, NaN in rows that do not count."""
    mixing = make_mixing(**args)
    assert mixing is not None
    images = np.random.default_rng(seed).normal(size=(rows, 8, 8, 3)).astype(np.float32)
    if bad:
        images[mask == 0] = np.nan
    mask = np.ones(rows, np.float32) if mask is None else mask
    run = jax.jit(mixing)
    found = run(images, mask, jnp.arange(rows), jax.random.key(seed))
    return images, *(np.asarray(part) for part in found)


def test_nothing_is_mixed_unless_asked_for():
    assert make_mixing() is None and make_mixing(mixup=0.2, prob=0.0) is None


def test_mixup_is_the_stated_share_of_both_images():
    images, mixed, own = mix(mixup=1.0)
    other = np.asarray(partners(images))
    np.testing.assert_array_equal(other[::2], images[1::2])
    share = own.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(mixed, share * images + (1 - share) * other, atol=1e-6)
    assert len(np.unique(own)) == len(own) and 0 < own.min() < 0.1 and 0.9 < own.max() < 1


def test_cutmix_shows_a_box_of_the_partner_and_counts_its_pixels():
    images, mixed, own = mix(cutmix=1.0)
    other = np.asarray(partners(images))
    taken = (mixed == other).all(-1)
    assert (taken | (mixed == images).all(-1)).all()
    np.testing.assert_allclose(own, 1 - taken.mean((1, 2)), atol=1e-6)
    assert all(row.sum() == row.any(0).sum() * row.any(1).sum() for row in taken)
    assert len(np.unique(own)) > 10


def test_each_image_gets_one_of_the_two_or_none():
    images, mixed, own = mix(rows=512, **BOTH, prob=0.8, cutmix_share=0.25)
    other = np.asarray(partners(images))
    same, partly = (mixed == images).all(-1), (mixed == other).all(-1)
    left = same.all((1, 2))
    cut = ~left & (same | partly).all((1, 2))
    assert (own[left] == 1).all()
    # Small boxes of cutmix are empty, and Beta(0.4, 0.4) is often next to 0 or 1.
    assert 0.15 < left.mean() < 0.32 and 0.1 < cut.mean() < 0.26


def test_shares_are_of_the_beta_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    for alpha in (0.4, 8.0):  # of lower ones float32 rounds much to 1
        drawn = np.asarray(jax.jit(jax.vmap(lambda key, a=alpha: beta(key, a)))(keys))
        assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01
        assert drawn.min() >= 0 and drawn.max() <= 1


def test_a_row_that_does_not_count_is_nobodys_partner():
    mask = np.ones(16, np.float32)
    mask[5] = mask[14] = mask[15] = 0
    images, mixed, own = mix(rows=16, mask=mask, **BOTH)
    for row in (4, 5, 14, 15):
        np.testing.assert_array_equal(mixed[row], images[row])
        assert own[row] == 1
    assert (own < 1).sum() >= 8
    again = mix(rows=16, mask=mask, bad=True, **BOTH)[1]
    np.testing.assert_array_equal(again[mask > 0], mixed[mask > 0])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_weighed_between_both_labels(name):
    rng = np.random.default_rng(0)
    kind = KINDS[name][0]
    label = {
        "class": rng.integers(0, 5, 8),
        "multi": rng.choice([0.0, 1.0, np.nan], (8, 5)).astype(np.float32),
        "value": rng.normal(size=(8, 5)).astype(np.float32),
    }[kind]
    logits = rng.normal(size=(8, 5)).astype(np.float32)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    own = np.where(mask * mask.reshape(-1, 2).min(1).repeat(2) > 0, rng.uniform(size=8), 1)
    own = own.astype(np.float32)
    loss = make_loss(name=name, kind=kind)
    sums = mixed_sums(loss, logits, label, mask, own, kind)
    first, second = loss(logits, label), loss(logits, np.asarray(partners(jnp.asarray(label))))
    wanted = np.sum(mask * (own * first + (1 - own) * second))
    np.testing.assert_allclose(sums["loss_sum"], wanted, rtol=1e-6)
    assert sums["weight_sum"] == mask.sum()
    if kind == "class":
        right = np.stack([logits.argmax(-1) == x for x in (label, label[np.arange(8) ^ 1])])
        wanted = np.sum(mask * (own * right[0] + (1 - own) * right[1]))
        np.testing.assert_allclose(sums["correct_sum"], wanted, rtol=1e-6)


@functools.cache
def on_one_device():
    """(leaves, last metrics) of four steps on whole batches; half of them are padded."""
    trainer = Mixed(**OPTIONS)
    metrics = jax.device_get(trainer.run(batches(4)))
    return trainer.leaves(), metrics


@pytest.mark.parametrize(("mode", "devices", "accum_steps"), [("pmap", 8, 1), ("auto", 2, 4)])
def test_devices_and_micro_batches_change_nothing(mode, devices, accum_steps):
    leaves, metrics = on_one_device()
    many = Mixed(mode=mode, devices=devices, accum_steps=accum_steps, **OPTIONS)
    found = many.run(batches(4))
    assert worst(many.leaves(), leaves) < 1e-5
    for name in ("loss_sum", "correct_sum", "weight_sum"):
        assert float(found[name]) == pytest.approx(float(metrics[name]), rel=1e-5)


def test_micro_batches_hold_whole_pairs_and_every_row_once():
    rows = {"row": jnp.arange(24)}
    for together in (1, 2):
        take = micro_batches(rows, 3, together)
        parts = [np.asarray(take(jnp.int32(i))["row"]) for i in range(3)]
        assert sorted(np.concatenate(parts)) == list(range(24))
        if together == 1:
            np.testing.assert_array_equal(parts[1], np.arange(1, 24, 3))
        else:
            assert all((part.reshape(-1, 2) // 2 == part[::2, None] // 2).all() for part in parts)


def test_rows_that_are_no_pairs_are_refused():
    parallel = make_parallel(devices=8)
    check_batch_size(8, 1, parallel)
    with pytest.raises(ConfigError, match="augment.mixup or cutmix mixes; the nearest that does"):
        check_batch_size(8, 1, parallel, together=2)
    parts, params, stats = make_parts(norm=False)
    parts = dataclasses.replace(parts, mixing=make_mixing(mixup=1.0))
    batch = {name: leaf[:3] for name, leaf in make_batch().items()} | {"row": np.arange(3)}
    with pytest.raises(ConfigError, match="3 rows a device and micro-batch are no pairs"):
        make_loss_sums(parts)(params, {}, Frozen({}, stats), batch, jax.random.key(0))


def test_no_cache_holds_what_is_mixed(tmp_path):
    options = ["freeze.views=2", "augment.flip=True", "augment.mixup=0.2", "parallel.devices=1"]
    made = {}
    for mode in ("auto", "on"):
        config = load_config("digits_vit:tiny", [*options, f"freeze.cache={mode}"])
        run = setup(config, tmp_path / mode)
        assert run.inputs is not None
        made[mode] = run
    auto, phases = made["auto"], made["auto"].phases
    chosen = auto.inputs.choose(phases[0], phases, {})
    assert chosen.kind == "views" and "augment.mixup and augment.cutmix mix images" in chosen.text
    with pytest.raises(ConfigError, match="freeze.cache=on: augment.mixup"):
        made["on"].inputs.choose(phases[0], made["on"].phases, {})
