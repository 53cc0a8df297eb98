"""The step: frozen means frozen and free; devices, modes and micro-batches change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_net import make_batch, make_parts

from jft.freeze.groups import make_groups
from jft.freeze.methods import make_phases
from jft.train.optim import make_optim
from jft.train.parallel import check_batch_size, check_replicas, make_parallel
from jft.train.state import (
    fill,
    first_trainable_stage,
    frozen_norms,
    leaves_by_path,
    make_state,
    slots,
    switch_phase,
)
from jft.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick")

STAGES = ("stem", "blocks_0", "head")
ADAMW = dict(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0, schedule="constant")


class Trainer:
    """A run without a loop: phases, compiled steps, and the state as it moves."""

    def __init__(
        self, phases="all", mode="pmap", devices=1, enforce="split", steps=100, optim=ADAMW, **kw
    ):
        self.parts, params, stats = make_parts(**kw)
        self.groups = make_groups(sorted(params))
        self.phases = make_phases(self.groups, total_steps=steps, steps_per_epoch=10, phases=phases)
        self.optim = make_optim([(0, steps)], params, STAGES, **optim)
        self.parallel, self.enforce = make_parallel(mode=mode, devices=devices), enforce
        self.state, self.frozen = make_state(
            self.phases[0],
            self.optim.tx(self.phases[0], enforce),
            params,
            stats,
            enforce,
            self.parts.averages,
        )
        self.parked = {}
        self.enter(self.phases[0])

    def moments(self):
        """{(leaf, slot): array} of the optimizer's state."""
        found = slots(self.state.opt_state, self.phase)
        return {slot: np.asarray(leaf) for slot, leaf in found.items()}

    def enter(self, phase):
        tx = self.optim.tx(phase, self.enforce)
        if phase.index:
            self.state, self.frozen, self.parked = switch_phase(
                self.state, self.frozen, self.phase, phase, tx, self.enforce, self.parked
            )
        self.frozen = dataclasses.replace(self.frozen, rates=self.optim.rates(phase))
        self.phase, self.compiled = phase, None
        stats = {**self.state.model_state, **self.frozen.model_state}
        self.step = make_train_step(
            self.parts,
            tx,
            phase.mask,
            self.optim.schedule,
            cut=first_trainable_stage(phase.mask, STAGES),
            frozen_norms=frozen_norms(phase.mask, stats),
            axis_name=self.parallel.axis_name,
        )
        self.state, self.frozen = self.parallel.place((self.state, self.frozen))

    def run(self, batches):
        for batch in batches:
            batch = self.parallel.place_batch(batch)
            if self.compiled is None:
                self.compiled = self.parallel.compile_train(
                    self.step, self.state, self.frozen, batch
                )
            self.state, metrics = self.compiled(self.state, self.frozen, batch)
        return metrics

    def leaves(self):
        both = {**self.state.params, **self.frozen.params}
        both |= {**self.state.model_state, **self.frozen.model_state}
        return {path: np.asarray(leaf) for path, leaf in both.items()}


def batches(count, **kw):
    return [make_batch(seed=i, padding=3 if i % 2 else 0, **kw) for i in range(count)]


def worst(a, b):
    """Largest relative difference over all leaves, against each leaf's largest entry."""
    assert a.keys() == b.keys()
    return max(float(np.max(np.abs(a[p] - b[p])) / max(np.max(np.abs(b[p])), 1e-3)) for p in a)


SGD = dict(name="sgd", learning_rate=0.05, weight_decay=1e-4, grad_clip_norm=1.0)


@functools.cache
def on_one_device(norm):
    """(leaves, last metrics) of ten whole batches on one device; tests only read them."""
    trainer = Trainer(norm=norm, dropout=0.3, augment=True, optim=SGD)
    metrics = trainer.run(batches(10))
    return trainer.leaves(), metrics


@pytest.mark.parametrize(
    ("mode", "devices"),
    [("pmap", 8), ("auto", 1), ("auto", 8), ("shard_map", 8)],
)
def test_modes_and_device_counts_agree_with_ragged_batches_dropout_and_batchnorm(mode, devices):
    many = Trainer(mode=mode, devices=devices, dropout=0.3, augment=True, optim=SGD)
    (leaves, first), second = on_one_device(True), many.run(batches(10))
    assert worst(many.leaves(), leaves) < 1e-5
    assert float(first["loss_sum"]) == pytest.approx(float(second["loss_sum"]), rel=1e-5)
    check_replicas(many.state)


@pytest.mark.parametrize(
    ("mode", "devices"), [("pmap", 1), ("pmap", 4), ("auto", 4), ("shard_map", 4)]
)
def test_four_micro_batches_equal_one_batch_without_batchnorm(mode, devices):
    kw = dict(norm=False, dropout=0.3, augment=True, optim=SGD)
    parts = Trainer(accum_steps=4, mode=mode, devices=devices, **kw)
    parts.run(batches(10))
    assert worst(parts.leaves(), on_one_device(False)[0]) < 1e-5


def test_micro_batches_with_batchnorm_do_not_depend_on_devices():
    one, many = (Trainer(accum_steps=2, devices=n, optim=SGD) for n in (1, 8))
    one.run(batches(10))
    many.run(batches(10))
    assert worst(many.leaves(), one.leaves()) < 1e-5


# What is enforced is part of the step, which a mode takes as it is: auto with one of both will do.
@pytest.mark.parametrize(
    ("mode", "enforce"),
    [
        *(("pmap", "split"), ("pmap", "optax"), ("auto", "split")),
        pytest.param("auto", "optax", marks=pytest.mark.slow),
    ],
)
def test_frozen_leaves_and_statistics_move_0_ulp(mode, enforce):
    """100 AdamW steps with decay and clipping: head, then all, then head again."""
    trainer = Trainer("head@40 | all@60 | head", mode=mode, devices=2, enforce=enforce, dropout=0.2)
    for phase in trainer.phases:
        if phase.index:
            trainer.enter(phase)
        before = trainer.leaves()
        trainer.run(batches(phase.stop_step - phase.start_step))
        after = trainer.leaves()
        moved = {p for p in before if before[p].tobytes() != after[p].tobytes()}
        if phase.name == "head":
            assert moved == {"head/kernel", "head/bias"}
        else:
            assert moved == before.keys()
    assert int(trainer.state.step) == 100


def test_split_and_optax_enforcement_give_equal_results():
    def run(enforce):
        trainer = Trainer("blocks_0 + head@10 | all", enforce=enforce, steps=20)
        trainer.run(batches(10))
        trainer.enter(trainer.phases[1])
        trainer.run(batches(10))
        return trainer.leaves()

    assert worst(run("split"), run("optax")) < 1e-6


def test_naive_masking_moves_frozen_leaves():
    """The control: decay reaches frozen leaves when the zeroing comes before the optimizer."""
    params = {"frozen": np.ones(3, np.float32)}
    tx = optax.chain(optax.masked(optax.set_to_zero(), {"frozen": True}), optax.adamw(1e-3))
    updates, _ = tx.update({"frozen": np.ones(3, np.float32)}, tx.init(params), params)
    assert np.max(np.abs(np.asarray(updates["frozen"]))) > 0


def test_padded_rows_hold_anything_and_change_nothing():
    batch, other = make_batch(padding=5), make_batch(padding=5)
    other["image"][-5:], other["label"][-5:] = 255 - other["image"][-5:], 0
    first, second = Trainer(), Trainer()
    first.run([batch])
    second.run([other])
    assert worst(first.leaves(), second.leaves()) == 0


def test_optimizer_state_moves_by_path_at_a_switch():
    trainer = Trainer("head@5 | all@10 | blocks_0 + head", steps=20)
    trainer.run(batches(5))
    moments = trainer.moments()
    assert {leaf for leaf, _ in moments} == {"head/kernel", "head/bias"}
    trainer.enter(trainer.phases[1])
    after = trainer.moments()
    assert all(np.array_equal(after[slot], moments[slot]) for slot in moments)
    new = {slot: leaf for slot, leaf in after.items() if slot not in moments}
    assert any(leaf == "stem/conv/kernel" for leaf, _ in new)
    assert not any(np.any(leaf) for leaf in new.values())
    trainer.run(batches(5))
    trainer.enter(trainer.phases[2])
    final = {p: np.asarray(x) for p, x in leaves_by_path(trainer.state.opt_state).items()}
    assert not any("stem" in path for path in final)
    counts = {int(leaf) for path, leaf in final.items() if path.endswith("count")}
    assert counts == {5, 10}


def test_a_late_leaf_takes_adams_first_step_not_a_late_one():
    trainer = Trainer("head@5 | all", steps=20, optim=dict(learning_rate=1e-3, schedule="constant"))
    trainer.run(batches(5))
    before = trainer.leaves()
    trainer.enter(trainer.phases[1])
    trainer.run(batches(1))
    change = np.abs(trainer.leaves()["stem/conv/kernel"] - before["stem/conv/kernel"])
    assert 0.9e-3 < np.max(change) < 1.01e-3


@pytest.mark.parametrize("mode", ["pmap", "shard_map", "auto"])
def test_the_step_donates_its_whole_state_and_nothing_else(mode):
    trainer = Trainer("head@5 | all", mode=mode, devices=2)
    trainer.run(batches(1))
    state, frozen = trainer.state, trainer.frozen
    donated = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert trainer.compiled.memory_analysis().alias_size_in_bytes >= donated
    trainer.run(batches(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def poison(trainer):
    """Makes the next loss NaN through a trainable leaf of the head."""
    params = dict(trainer.state.params)
    bias = np.array(params["head/bias"])
    bias[0] = np.nan
    params["head/bias"] = bias
    trainer.state = trainer.parallel.place(trainer.state.replace(params=params))


def test_stop_halts_at_the_first_nonfinite_step_for_good():
    trainer = Trainer()
    trainer.run(batches(2))
    good = jax.tree.map(np.array, trainer.state)
    poison(trainer)
    metrics = trainer.run(batches(1))
    assert (int(metrics["nonfinite_steps"]), int(metrics["halted"])) == (1, 1)
    trainer.state = trainer.parallel.place(good.replace(faults=trainer.state.faults))
    metrics = trainer.run(batches(2))
    assert np.isfinite(metrics["grad_norm"]) and int(metrics["halted"]) == 1


def test_gradients_do_not_wait_for_their_norm_unless_an_update_may_be_skipped():
    found = {}
    for nonfinite in ("stop", "skip"):
        for devices in (1, 2):
            trainer = Trainer(nonfinite=nonfinite, devices=devices)
            trainer.run(batches(1))
            text = trainer.compiled.as_text()
            found[nonfinite, devices] = (" conditional(" in text, " all-reduce(" in text)
    assert found == {
        ("stop", 1): (False, False),
        ("stop", 2): (False, True),
        ("skip", 1): (True, False),
        ("skip", 2): (True, True),
    }


def test_skipped_steps_of_the_past_do_not_stop_a_run_that_may_skip_no_more():
    trainer = Trainer()
    faults = {"total": np.int32(3), "halted": np.int32(0)}
    trainer.state = trainer.parallel.place(trainer.state.replace(faults=faults))
    metrics = trainer.run(batches(1))
    assert (int(metrics["nonfinite_steps"]), int(metrics["halted"])) == (3, 0)


def test_skip_leaves_out_bad_steps_within_the_quota_and_then_halts():
    def inf_loss(parts):
        plain = parts.loss
        return lambda logits, label: plain(logits, label) * jnp.where(label == 4, jnp.inf, 1.0)

    good, bad = make_batch(seed=1), make_batch(seed=2)
    good["label"] %= 4
    bad["label"][0] = 4
    trainer = Trainer(nonfinite="skip", nonfinite_quota=2)
    object.__setattr__(trainer.parts, "loss", inf_loss(trainer.parts))
    clean = Trainer(nonfinite="skip", nonfinite_quota=2)
    trainer.run([good, bad])
    clean.run([good])
    assert worst(trainer.leaves(), clean.leaves()) == 0
    metrics = trainer.run([bad])
    assert (int(metrics["nonfinite_steps"]), int(metrics["halted"])) == (2, 0)
    metrics = trainer.run([bad])
    assert (int(metrics["nonfinite_steps"]), int(metrics["halted"])) == (3, 1)


def test_a_value_that_was_not_reduced_is_found():
    parallel = make_parallel(devices=2)
    mapped = jax.pmap(
        lambda x: x + jax.lax.axis_index("batch"),
        axis_name="batch",
        out_axes=None,
        devices=list(parallel.mesh.devices.flat),
    )
    check_replicas(parallel.place(np.ones(2)))
    with pytest.raises(RuntimeError, match="was not reduced"):
        check_replicas({"loss": mapped(np.ones(2, np.float32))})


def test_batch_size_errors_name_the_nearest_that_fits():
    parallel = make_parallel(devices=8)
    check_batch_size(32, 2, parallel)
    with pytest.raises(ValueError, match="nearest that does is 48"):
        check_batch_size(50, 2, parallel)


def test_fill_inverts_leaves_by_path_and_refuses_what_does_not_fit():
    trainer = Trainer()
    flat = leaves_by_path(trainer.state)
    again = fill(trainer.state, flat)
    assert jax.tree.structure(again) == jax.tree.structure(trainer.state)
    with pytest.raises(ValueError, match="is missing"):
        fill(trainer.state, {p: x for p, x in flat.items() if p != "step"})
    with pytest.raises(ValueError, match="the run needs int32"):
        fill(trainer.state, flat | {"step": np.zeros((), np.float32)})
