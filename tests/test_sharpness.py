"""Two passes and noise: as written by hand, over the whole batch, on what trains alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import SGD, Trainer, batches, worst
from tiny_net import make_batch

from jft.errors import ConfigError
from jft.metrics import batch_sums
from jft.train.draws import add_noise
from jft.tree import merge

pytestmark = pytest.mark.usefixtures("quick")

RHO = 0.1
PLAIN = dict(name="sgd", args={"momentum": 0.0}, learning_rate=0.1, schedule="constant")


def by_hand(trainer, batch):
    """Foret's update with plain SGD, on the merged parameters of a network without BatchNorm."""
    parts = trainer.parts
    params = {path: np.asarray(leaf) for path, leaf in trainer.state.params.items()}
    rest = {path: np.asarray(leaf) for path, leaf in trainer.frozen.params.items()}

    def loss(params):
        image = parts.eval_transform(jnp.asarray(batch["image"]))
        logits = parts.apply({"params": merge(params, rest)}, image)
        losses = parts.loss(logits, batch["label"])
        sums = batch_sums(logits, batch["label"], batch["mask"], losses)
        return sums["loss_sum"] / sums["weight_sum"]

    grad = jax.jit(jax.grad(loss))
    first = grad(params)
    length = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in first.values()))
    second = grad({p: w + RHO * first[p] / length for p, w in params.items()})
    return {p: w - 0.1 * np.asarray(second[p]) for p, w in params.items()} | rest


@pytest.mark.parametrize(("phases", "in_parts"), [("all", False), ("blocks_0 + head", True)])
def test_a_step_is_the_two_passes_written_by_hand(phases, in_parts):
    trainer = Trainer(phases, norm=False, sam_rho=RHO, optim=PLAIN, in_parts=in_parts)
    before, batch = trainer.leaves(), make_batch(padding=3)
    wanted = by_hand(trainer, batch)
    trainer.run([batch])
    assert worst(trainer.leaves(), wanted) < 1e-5
    frozen = trainer.frozen.params
    assert all(np.array_equal(before[path], trainer.leaves()[path]) for path in frozen)


NOISY = dict(dropout=0.3, augment=True, optim=SGD, sam_rho=RHO, grad_noise=0.01, ema_decay=0.9)


@functools.cache
def on_one_device():
    trainer = Trainer(**NOISY)
    trainer.run(batches(10))
    return trainer


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("auto", marks=pytest.mark.slow)])
def test_devices_change_nothing_with_both_passes_noise_and_batchnorm(mode):
    one, many = on_one_device(), Trainer(mode=mode, devices=8, **NOISY)
    many.run(batches(10))
    assert worst(many.leaves(), one.leaves()) < 1e-5
    pairs = [leaf for leaf in one.state.averages["params"].values()]
    other = [leaf for leaf in many.state.averages["params"].values()]
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(pairs, other, strict=True))


def test_micro_batches_equal_one_batch_with_both_passes():
    kw = dict(norm=False, dropout=0.3, augment=True, optim=SGD, sam_rho=RHO)
    whole, parts = Trainer(**kw), Trainer(accum_steps=4, devices=2, **kw)
    whole.run(batches(10))
    parts.run(batches(10))
    assert worst(parts.leaves(), whole.leaves()) < 1e-5


def test_statistics_and_metrics_are_those_of_the_first_pass():
    plain, near = Trainer(optim=SGD), Trainer(optim=SGD, sam_rho=RHO)
    first, second = plain.run(batches(1)), near.run(batches(1))
    assert float(first["loss_sum"]) == pytest.approx(float(second["loss_sum"]), rel=1e-6)
    stats = {path for path in plain.leaves() if path.endswith(("mean", "var"))}
    one, other = plain.leaves(), near.leaves()
    assert worst({p: one[p] for p in stats}, {p: other[p] for p in stats}) < 1e-6


def test_a_gradient_of_zeros_moves_nothing():
    trainer = Trainer(norm=False, sam_rho=RHO, optim=PLAIN)
    before, batch = trainer.leaves(), make_batch()
    trainer.run([dict(batch, mask=np.zeros_like(batch["mask"]))])
    assert worst(trainer.leaves(), before) == 0


def test_noise_has_the_variance_of_the_paper_and_falls_on_what_trains_alone():
    zeros = {"a/kernel": jnp.zeros((200, 300)), "b/kernel": jnp.zeros((4, 4))}
    mask, key = {"a/kernel": True, "b/kernel": False}, jax.random.key(0)
    for step in (0, 99):
        noisy = add_noise(zeros, mask, key, jnp.int32(step), 0.3)
        assert np.std(noisy["a/kernel"]) ** 2 == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.02)
        assert not np.any(noisy["b/kernel"])
    stacked = {"s_0..1/kernel": jnp.zeros((2, 3, 5))}
    alone = {"s_0/kernel": jnp.zeros((3, 5)), "s_1/kernel": jnp.zeros((3, 5))}
    both = add_noise(stacked, dict.fromkeys(stacked, True), key, jnp.int32(0), 1.0)
    each = add_noise(alone, dict.fromkeys(alone, True), key, jnp.int32(0), 1.0)
    assert np.array_equal(both["s_0..1/kernel"], np.stack(list(each.values())))
    assert float(optax.tree.norm(each)) > 0


@pytest.mark.parametrize("rho", [0.0, -0.1])
def test_a_radius_out_of_range_is_named(rho):
    with pytest.raises(ConfigError, match="optim.sam_rho"):
        Trainer(sam_rho=rho)
