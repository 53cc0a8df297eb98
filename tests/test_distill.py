"""Distillation: the loss of the paper, a teacher that costs what the plan says and never moves."""

import dataclasses
import json

import fault_run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import Trainer, batches, worst
from tiny_net import TinyNet, make_batch, make_parts

from jft import evaluate, fit, load_config, setup
from jft.costs import hlo
from jft.errors import ConfigError, WeightsError
from jft.losses import make_distillation
from jft.prepare import plan_overview
from jft.train.run import compile_phase
from jft.train.teacher import Teacher
from jft.tree import flatten, merge

pytestmark = pytest.mark.usefixtures("quick")

PLAIN = dict(name="sgd", args={"momentum": 0.0}, learning_rate=0.1, schedule="constant")
SMALL = (
    "model.args.depth=1",
    "model.args.patch=8",
    "train.steps=4",
    "eval.every_steps=2",
    "checkpoint.every_steps=2",
    "log.tensorboard=False",
    "parallel.devices=1",
)


def logits(seed, rows=6, classes=4):
    return 3 * np.random.default_rng(seed).standard_normal((rows, classes)).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_of_classes_is_the_divergence_at_a_temperature(temperature):
    own, taught = logits(0), logits(1)
    softened = jax.nn.softmax(taught / temperature)
    other = jax.nn.log_softmax(own / temperature)
    wanted = temperature**2 * np.sum(softened * (np.log(softened) - other), axis=-1)
    loss = make_distillation("class", temperature)
    assert np.allclose(loss(own, taught), wanted, rtol=1e-4)
    assert np.allclose(loss(taught, taught), 0, atol=1e-6)
    # Hinton's equation 2: dC/dz = T * (softmax(z / T) - softmax(v / T)), T^2 included.
    slope = jax.grad(lambda own: loss(own, taught).sum())(own)
    assert np.allclose(
        slope, temperature * (jax.nn.softmax(own / temperature) - softened), atol=1e-5
    )


def test_the_losses_of_other_kinds():
    own, taught = logits(0), logits(1)
    p, q = jax.nn.sigmoid(taught / 2.0), jax.nn.sigmoid(own / 2.0)
    wanted = 4 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), axis=-1)
    assert np.allclose(make_distillation("multi", 2.0)(own, taught), wanted, rtol=1e-3, atol=1e-5)
    squared = make_distillation("value", 2.0)(own, taught)
    assert np.allclose(squared, np.mean((own - taught) ** 2, axis=-1), rtol=1e-5)


def taught_trainer(weight=0.5, mode="pmap", devices=1, **kw):
    """A trainer with a teacher: TinyNet with other weights, and statistics of its own."""
    net = TinyNet()
    variables = net.init(jax.random.key(7), jnp.zeros((1, 8, 8, 3)))
    leaves = {"params": flatten(variables["params"])}
    leaves["model_state"] = flatten(variables["batch_stats"])
    teacher = Teacher(net.apply, lambda x: x, make_distillation("class", 2.0), weight, leaves)
    trainer = Trainer(mode=mode, devices=devices, teacher=teacher, **kw)
    placed = trainer.parallel.place(leaves)
    trainer.frozen = dataclasses.replace(trainer.frozen, teacher=placed)
    return trainer, net, variables


def test_a_step_is_the_mixture_written_by_hand():
    trainer, net, variables = taught_trainer(weight=0.3, norm=False, optim=PLAIN)
    batch, before = make_batch(padding=3), trainer.leaves()
    parts, mask = trainer.parts, batch["mask"]
    image = parts.eval_transform(jnp.asarray(batch["image"]))
    taught = net.apply(variables, image)

    def loss(params):
        out = parts.apply({"params": merge(params)}, image)
        own = parts.loss(out, batch["label"])
        soft = make_distillation("class", 2.0)(out, taught)
        return jnp.sum(mask * (0.7 * own + 0.3 * soft)) / mask.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(before)
    metrics = trainer.run([batch])
    wanted = {path: leaf - 0.1 * np.asarray(grads[path]) for path, leaf in before.items()}
    assert worst(trainer.leaves(), wanted) < 1e-5
    assert float(metrics["loss_sum"] / metrics["weight_sum"]) == pytest.approx(float(value))
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)


@pytest.mark.parametrize(
    "kw",
    [
        pytest.param({"sam_rho": 0.1}, marks=pytest.mark.slow),
        {"accum_steps": 2, "norm": False},
    ],
)
def test_devices_change_nothing_and_the_teacher_is_neither_moved_nor_donated(kw):
    one, _, variables = taught_trainer(augment=True, dropout=0.2, optim=PLAIN, **kw)
    many, _, _ = taught_trainer(
        augment=True, dropout=0.2, optim=PLAIN, mode="shard_map", devices=8, **kw
    )
    one.run(batches(5))
    many.run(batches(5))
    assert worst(many.leaves(), one.leaves()) < 1e-5
    for path, leaf in flatten(variables["params"]).items():
        assert np.array_equal(one.frozen.teacher["params"][path], leaf)
    assert not [name for name in jax.tree.leaves(one.state) if name.is_deleted()]


def test_a_student_of_its_teacher_alone_comes_to_say_what_it_says():
    trainer, net, variables = taught_trainer(weight=1.0, norm=False, steps=200)
    batch = make_batch()
    trainer.run([batch] * 60)
    image = trainer.parts.eval_transform(jnp.asarray(batch["image"]))
    own = make_parts(norm=False)[0].apply({"params": merge(trainer.leaves())}, image)
    taught = net.apply(variables, image)
    assert float(jnp.max(jnp.abs(jax.nn.softmax(own) - jax.nn.softmax(taught)))) < 0.05


# Runs of the command's own path: a teacher with two blocks, a student with one.


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick):
    """A folder with the finished run of a teacher in it."""
    folder = tmp_path_factory.mktemp("distill")
    keys = ("model.args.depth=2", "freeze.phases=all", "optim.ema_decay=0.5")
    fit(setup(config_of(*keys), folder / "teacher"))
    return folder


def config_of(*more):
    path = fault_run.ROOT / "configs" / "digits_vit.py"
    return load_config(f"{path}:tiny", [*SMALL, *more])


def student(folder, *more):
    return config_of(f"distill.teacher={folder / 'teacher'}", "distill.weight=0.9", *more)


def test_a_run_teaches_another_and_resumes_bitwise(folder, tmp_path, monkeypatch):
    straight = fit(setup(student(folder), tmp_path / "a"))
    fault_run.stop_at(monkeypatch, 3)
    with pytest.raises(fault_run.Stop):
        fit(setup(student(folder), tmp_path / "b"))
    monkeypatch.undo()
    resumed = fit(setup(student(folder), tmp_path / "b"))
    for path, leaf in straight.params.items():
        assert np.array_equal(leaf, resumed.params[path]), path
    fault_run.assert_same_end(tmp_path / "b", tmp_path / "a")
    saved = fault_run.last_step(tmp_path / "a")
    assert not [name for name in saved.state | saved.frozen if "teacher" in name]
    assert len(saved.info["teacher"]["sha256"]) == 64
    assert evaluate(tmp_path / "a", "test")["accuracy"] == straight.metrics["test/accuracy"]
    # The student learns from the teacher's averages, which is what it predicts with.
    assert json.loads((folder / "teacher" / "status.json").read_text())["state"] == "done"

    run = setup(student(folder), tmp_path / "b")
    params = dict(run.teacher["params"], **{"head/bias": run.teacher["params"]["head/bias"] + 1})
    changed = run.info | {"teacher": run.info["teacher"] | {"sha256": "0" * 64}}
    with pytest.raises(WeightsError, match="other weights than when the run started"):
        fit(dataclasses.replace(run, info=changed, teacher={**run.teacher, "params": params}))


def test_the_plan_counts_the_teacher_and_the_compiled_step_agrees(folder, tmp_path):
    plain = setup(config_of(), tmp_path / "plain")
    for more in ([], ["optim.sam_rho=0.1"]):
        taught = setup(student(folder, *more), tmp_path / "taught")
        # Both passes of the second one are counted alike in every phase: its last will do.
        for phase in taught.phases[-1:] if more else taught.phases:
            assert taught.plan is not None and plain.plan is not None and taught.inputs is not None
            chosen = taught.inputs.uncached(phase)
            cost = hlo.count(compile_phase(taught, phase)[0])
            plan, alone = taught.plan(phase, chosen), plain.plan(phase, chosen)
            assert cost.flops == pytest.approx(plan.flops, rel=0.05)
            held = sum(leaf.nbytes for flat in taught.teacher.values() for leaf in flat.values())
            assert cost.argument_bytes == plan.argument_bytes == alone.argument_bytes + held
            assert plan.flops > alone.flops


def test_a_teacher_of_weights_needs_its_architecture_and_all_its_leaves(tmp_path):
    given = ("distill.teacher=random:0", "distill.model=vit_tiny")
    run = setup(config_of(*given, "distill.args={'depth': 2, 'patch': 8}"), tmp_path)
    assert run.notes[0].startswith("teacher   random:0 (vit_tiny): ")
    text = str(plan_overview(config_of(*given)))
    assert "GFLOP/step" in text


def wrong(folder):
    own = f"distill.teacher={folder / 'teacher'}"
    return {
        "no run": (["distill.teacher=nowhere"], "is no run directory"),
        "a source without a model": (["distill.teacher=random:0"], "distill.model: is missing"),
        "a run with a model": ([own, "distill.model=vit_tiny"], "which has its own model"),
        "no such model": (["distill.teacher=random:0", "distill.model=vit_tinny"], "vit_tiny"),
        "no such field": (
            ["distill.teacher=random:0", "distill.model=vit_tiny", "distill.args={'dpth': 1}"],
            "distill.args.dpth",
        ),
        "another size": ([own, "data.image_size=24"], "both need data.image_size=16"),
        "a temperature of 0": ([own, "distill.temperature=0"], "distill.temperature: 0.0"),
        "a cache": ([own, "freeze.cache=on", "augment.flip=False"], "which distill.teacher needs"),
    }


@pytest.mark.parametrize("case", list(wrong(fault_run.ROOT)))
def test_what_does_not_fit_is_named(folder, tmp_path, case):
    keys, message = wrong(folder)[case]
    with pytest.raises(ConfigError, match=message):
        setup(config_of(*keys), tmp_path)


def test_a_teacher_of_other_classes_is_refused(folder, tmp_path):
    data = folder / "teacher" / "data.json"
    content = json.loads(data.read_text())
    try:
        data.write_text(json.dumps({**content, "label_names": [*"abcdefghij"]}))
        with pytest.raises(ConfigError, match="'a' as class 0, which is '0' in the data"):
            setup(student(folder), tmp_path)
        data.write_text(json.dumps({**content, "kind": "multi"}))
        with pytest.raises(ConfigError, match="labels of kind 'multi'"):
            setup(student(folder), tmp_path)
    finally:
        data.write_text(json.dumps(content))
