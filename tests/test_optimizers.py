"""Every optimizer by name: optax's own numbers, one switch of phases, one resume, bit for bit."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from fault_run import Stop, stop_at
from test_step import Trainer, batches, worst
from tiny_run import make_run

from jft.config import base, from_json, to_json
from jft.costs.plan import optimizer_flops
from jft.errors import ConfigError
from jft.freeze.groups import make_groups
from jft.freeze.methods import make_phases
from jft.freeze.phases import Elements
from jft.prepare import setup
from jft.train import averages
from jft.train.checkpoint import Checkpoints
from jft.train.loop import fit
from jft.train.optim import make_optim
from jft.train.optimizers import OPTIMIZERS, REFUSED
from jft.train.parallel import check_replicas
from jft.train.stacks import make_stacks, unstack
from jft.train.state import fill, leaves_by_path, make_state, switch_phase
from jft.trained import evaluate, load_trained

pytestmark = pytest.mark.usefixtures("quick")

STAGES = ("stem", "head")
RNG = np.random.default_rng(0)
# Few leaves: each costs every name its share of the compilation.
SHAPES = {"stem/kernel": (3, 4), "head/kernel": (4, 2), "head/bias": (2,)}
PARAMS = {path: RNG.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
DECAY = 0.1
# Those that find their rate themselves take a factor on it.
RATES = dict.fromkeys(("dadapt_adamw", "dog", "dowg", "prodigy", "cocob"), 1.0)
MASK = {path: leaf.ndim >= 2 for path, leaf in PARAMS.items()}
# Their own decay has no mask.
UNMASKED = ("dadapt_adamw", "madgrad", "muon", "novograd", "prodigy")
FREE = ("schedule_free_adamw", "schedule_free_sgd")
ALL = [[".*", True]]
NAMES = [*OPTIMIZERS, "optax.adamw", "optax.contrib.lion"]
SLOW = pytest.mark.slow
# Parts of optimizers take long to compile, and most are parts of one that is there.
SWITCHED = [pytest.param(n, marks=SLOW) if n.startswith("scale_by_") else n for n in NAMES]
# Of the parts that optax makes directions of, whose rate and decay jft adds, two show it.
COMPARED = [n for n in NAMES if not n.startswith("scale_by_")] + ["scale_by_yogi", "scale_by_sm3"]
TEXT, STEPS = "head@10 | all@14 | head", 18


def phases_of(text="all", steps=100, **kw):
    groups = make_groups(sorted(PARAMS))
    return make_phases(groups, total_steps=steps, steps_per_epoch=10, phases=text, **kw)


def section_of(name, steps=100, **kw):
    kw = dict(learning_rate=RATES.get(name, 3e-2), schedule="constant", weight_decay=DECAY) | kw
    if name in UNMASKED or name in FREE:
        kw.setdefault("decay_rules", ALL)
    return make_optim([(0, steps)], PARAMS, STAGES, name=name, **kw)


def gradients(params, step):
    """Of another bowl at each step."""
    return {path: 0.5 * leaf + 0.1 * (step % 3) - 0.2 for path, leaf in params.items()}


def run(tx, extra, start=PARAMS, steps=10):
    """The params and the optimizer's state after so many updates."""

    @jax.jit
    def all_steps(params):
        def body(carry, step):
            params, state = carry
            updates, state = tx.update(gradients(params, step), state, params, **extra(step))
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))[0]

    return all_steps(jax.tree.map(jnp.asarray, start))


def ours(section, steps=10):
    phase = phases_of()[0]
    rates = section.rates(phase)
    return run(section.tx(phase), lambda step: dict(step=step, rates=rates), steps=steps)


def _mask(tree):
    return {path: MASK[path] for path in tree}


def reference(name, rate):
    """optax's optimizer with the same hyper-parameters; decay as its own signature has it."""
    own = {"adamw": optax.adamw, "sgd": functools.partial(optax.sgd, momentum=0.9)}
    plain = name.removeprefix("optax.")
    make = own.get(name) or getattr(optax, plain, None) or getattr(optax.contrib, plain)
    takes = inspect.signature(make).parameters
    mask = next((key for key in ("mask", "weight_decay_mask") if key in takes), None)
    if name == "muon":
        return make(rate, weight_decay=DECAY, adam_weight_decay=DECAY)
    if name == "adafactor":  # its decay does not follow the rate
        return make(rate, weight_decay_rate=rate * DECAY, weight_decay_mask=_mask)
    if "learning_rate" not in takes:
        return optax.chain(make(), optax.add_decayed_weights(DECAY, _mask), optax.scale(-rate))
    if name in UNMASKED or name in FREE:
        return make(rate, weight_decay=DECAY)
    if mask:
        return make(rate, weight_decay=DECAY, **{mask: _mask})
    decay = DECAY if callable(rate) else rate * DECAY
    by_rate = optax.scale_by_learning_rate(rate) if callable(rate) else optax.scale(-1)
    after = optax.chain(optax.set_to_zero(), optax.add_decayed_weights(decay, _mask), by_rate)
    return sum_of(make(rate), after)


def sum_of(one, other):
    """The updates of both, each from the same gradients."""

    def update(updates, state, params):
        a, first = one.update(updates, state[0], params)
        b, second = other.update(updates, state[1], params)
        return jax.tree.map(jnp.add, a, b), (first, second)

    return optax.GradientTransformation(lambda p: (one.init(p), other.init(p)), update)


def assert_close(a, b, bar=1e-6):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=bar, atol=bar, err_msg=path)


class Rehearsal:
    """A run without a model: phases, compiled updates, and a state that may be saved anywhere."""

    def __init__(self, name, text=TEXT, enforce="split", **kw):
        self.section, self.enforce = section_of(name, steps=STEPS, **kw), enforce
        self.phases, self.compiled = phases_of(text, steps=STEPS), {}

    def tx(self, phase):
        return self.section.tx(phase, self.enforce)

    def start(self):
        phase = self.phases[0]
        params = jax.tree.map(jnp.asarray, PARAMS)
        return (*make_state(phase, self.tx(phase), params, {}, self.enforce), {})

    def switch(self, held, at):
        state, frozen, parked = held
        old, phase = self.phases[at - 1], self.phases[at]
        tx = self.tx(phase)
        return switch_phase(state, frozen, old, phase, tx, self.enforce, parked)

    def go(self, held, at, count):
        """Runs some steps of phase `at`; the state is donated, as it is by the real step."""
        state, frozen, parked = held
        phase = self.phases[at]
        if phase.key not in self.compiled:
            tx, mask = self.tx(phase), phase.mask

            def update(state, rates):
                grads, extra = gradients(state.params, state.step), dict(rates=rates)
                found = tx.update(grads, state.opt_state, state.params, step=state.step, **extra)
                moved = {p: x + found[0][p] if mask[p] else x for p, x in state.params.items()}
                return dataclasses.replace(
                    state, step=state.step + 1, params=moved, opt_state=found[1]
                )

            jitted = jax.jit(update, donate_argnums=0)
            self.compiled[phase.key] = jitted.lower(state, self.section.rates(phase)).compile()
        state, rates = jax.device_put((state, self.section.rates(phase)), may_alias=False)
        for _ in range(count):
            state = self.compiled[phase.key](state, rates)
        return state, frozen, parked

    def saved(self, held, at):
        """What comes back from a checkpoint: by names, on the host, in the form the phase says."""
        state, frozen, parked = held
        tx = self.tx(self.phases[at])
        template = jax.eval_shape(
            lambda p: make_state(self.phases[at], tx, p, {}, self.enforce), PARAMS
        )
        disk = [{n: np.array(x) for n, x in leaves_by_path(t).items()} for t in (state, frozen)]
        restored = [fill(t, flat) for t, flat in zip(template, disk, strict=True)]
        return (*restored, {slot: np.array(leaf) for slot, leaf in parked.items()})

    def phase_end(self, held, at, save=False):
        """The end of phase `at`; saved and restored in its middle and right before the switch."""
        phase = self.phases[at]
        held = self.switch(held, at) if at else held
        held = self.go(held, at, 2)
        held = self.saved(held, at) if save else held
        held = self.go(held, at, phase.stop_step - phase.start_step - 2)
        return self.saved(held, at) if save else held

    def whole(self, save=False):
        held = self.start()
        for at in range(len(self.phases)):
            held = self.phase_end(held, at, save)
        return held

    def evaluated(self, held):
        state, frozen, _ = held
        params = self.section.eval_params(state.opt_state, state.params, self.phases[-1])
        return {p: np.asarray(x) for p, x in {**params, **frozen.params}.items()}


def bits(held):
    state, frozen, parked = held
    flat = leaves_by_path(state) | {f"frozen/{p}": x for p, x in frozen.params.items()} | parked
    return {name: np.asarray(leaf).tobytes() for name, leaf in flat.items()}


@functools.cache
def rehearsal(name):
    return Rehearsal(name)


@pytest.mark.parametrize("name", COMPARED)
def test_ten_updates_equal_those_of_optax(name):
    params = rehearsal(name).phase_end(rehearsal(name).start(), 0)[0].params
    rate = RATES.get(name, 3e-2)
    start = {path: PARAMS[path] for path in params}
    theirs, _ = run(reference(name.replace("contrib.", ""), rate), lambda step: {}, start)
    assert_close(params, theirs)
    assert all(np.any(params[path] != PARAMS[path]) for path in params)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_may_be_skipped(name):
    """A state goes through both branches of one condition, as with train.nonfinite=skip."""
    section, phase = section_of(name), phases_of()[0]
    tx, extra = section.tx(phase), dict(step=0, rates=section.rates(phase))

    def step(params, state):
        def update(old):
            updates, new = tx.update(gradients(old[0], 0), old[1], old[0], **extra)
            return optax.apply_updates(old[0], updates), new

        return jax.lax.cond(state is not None, update, lambda old: old, (params, state))

    before = jax.eval_shape(tx.init, PARAMS)
    after = jax.eval_shape(step, PARAMS, before)[1]
    assert jax.tree.structure(after) == jax.tree.structure(before)


@pytest.mark.parametrize("name", SWITCHED)
def test_a_run_with_two_switches_resumes_bitwise(name):
    straight = rehearsal(name).whole()
    assert bits(rehearsal(name).whole(save=True)) == bits(straight)
    state, frozen, _ = straight
    assert int(state.step) == STEPS
    held = [path for path in PARAMS for leaf in leaves_by_path(state.opt_state) if path in leaf]
    assert all(path.startswith("head/") for path in held), "state of frozen leaves"
    ends = {**state.params, **frozen.params}
    for path, leaf in ends.items():
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != PARAMS[path]), path


SCHEDULED = ["adafactor", "cocob", "dadapt_adamw", "madgrad", "muon", "prodigy", "rmsprop"]
SCHEDULED += [pytest.param(n, marks=SLOW) for n in ("dog", "fromage", "lamb", "lars", "novograd")]


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_enters_as_optax_has_it(name):
    shape = dict(schedule="cosine", warmup_steps=4)
    args = {"momentum": 0.9} if name == "rmsprop" else {}
    section = section_of(name, steps=12, args=args, **shape)
    if name == "adafactor":
        section = dataclasses.replace(section, weight_decay=0.0)
        theirs = optax.adafactor(section.schedule)
    elif name == "rmsprop":
        section = dataclasses.replace(section, weight_decay=0.0)
        theirs = optax.rmsprop(section.schedule, **args)
    else:
        theirs = reference(name, section.schedule)
    assert_close(ours(section)[0], run(theirs, lambda step: {})[0])


def test_schedule_free_warms_up_as_optax_has_it():
    section = section_of("schedule_free_adamw", warmup_steps=4)
    base = optax.chain(
        optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(section.schedule),
    )
    # optax asks for the rate of the averaging weight at counts from 1, of the base from 0.
    theirs = optax.contrib.schedule_free(base, lambda count: section.schedule(count - 1))
    (params, state), (expected, held) = ours(section), run(theirs, lambda step: {})
    assert_close(params, expected)
    evaluated = section.eval_params(state, params)
    assert_close(evaluated, optax.contrib.schedule_free_eval_params(held, expected))
    assert any(np.abs(evaluated[path] - params[path]).max() > 1e-3 for path in params)


KINDS = ("lamb", "muon", "prodigy", "sm3", "schedule_free_adamw")


@pytest.mark.parametrize("name", KINDS)
def test_the_reference_by_optax_partition_gives_the_same(name):
    split, masked = rehearsal(name), Rehearsal(name, enforce="optax")
    first, second = split.evaluated(split.whole()), masked.evaluated(masked.whole())
    assert_close(first, second, 1e-6)


def moved(section, phase, step=0, start=PARAMS):
    """The params after one update."""
    tx, params = section.tx(phase), jax.tree.map(jnp.asarray, start)
    extra = dict(step=step, rates=section.rates(phase))
    updates, _ = tx.update(gradients(params, step), tx.init(params), params, **extra)
    return {path: np.asarray(updates[path]) for path in updates}


@pytest.mark.parametrize("name", UNMASKED)
def test_only_leaves_that_decay_decay(name):
    """Without a mask in optax: those that decay differ, by the decay, and no other does."""
    part = moved(section_of(name, decay_rules=[]), phases_of()[0])
    none = moved(section_of(name, weight_decay=0.0), phases_of()[0])
    everything = moved(section_of(name), phases_of()[0])
    for path, decays in MASK.items():
        np.testing.assert_array_equal(part[path], (everything if decays else none)[path])
        assert np.any(everything[path] != none[path])


@pytest.mark.parametrize("name", ["lion", "lamb", "muon", "dog", "schedule_free_sgd"])
def test_a_factor_on_the_rate_is_a_factor_on_the_moves(name):
    plain = moved(section_of(name), phases_of()[0])
    rules = [["head/.*", 0.5]]
    halved = moved(section_of(name, lr_rules=rules), phases_of()[0])
    phase = phases_of([{"train": "all", "lr_scale": 0.5}])[0]
    scaled = moved(section_of(name), phase)
    for path, move in plain.items():
        factor = 0.5 if path.startswith("head/") else 1.0
        np.testing.assert_allclose(halved[path], factor * move, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(scaled[path], 0.5 * move, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["prodigy", "madgrad", "schedule_free_sgd"])
def test_a_warm_ramp_and_the_factor_of_a_phase_are_in_the_one_rate(name):
    """Each step has the rate that the optimizer would be given: ramp x factor x the peak."""
    entries = [{"train": "head", "until": 2}, {"train": "all", "lr_scale": 0.5, "warm_steps": 4}]
    section, phase = section_of(name), phases_of(entries)[1]
    late = {path for path in phase.entered if not path.startswith("head/")}
    peak = RATES.get(name, 3e-2)
    for step in (2, 3, 9):
        found = moved(section, phase, step)
        for paths in (late, phase.entered.keys() - late):
            ramp = min((step - 1) / 4, 1.0) if paths == late else 1.0
            own = make_optim(
                [(0, 100)],
                {p: PARAMS[p] for p in paths},
                STAGES,
                name=name,
                learning_rate=peak * 0.5 * ramp,
                schedule="constant",
                weight_decay=DECAY,
                decay_rules=ALL,
            )
            alone = phases_of("head" if "head/bias" in paths else "all - head")[0]
            expected = moved(own, alone, step, {p: PARAMS[p] for p in paths})
            for path, move in expected.items():
                np.testing.assert_allclose(found[path], move, rtol=2e-5, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("enforce", ["split", "optax"])
@pytest.mark.parametrize("state", ["keep", "park", "reset"])
def test_a_leaf_that_freezes_keeps_its_average(enforce, state):
    """No switch moves what is evaluated; what is frozen then stays bit for bit."""
    entries = [
        {"train": "all", "until": 5},
        {"train": "head", "until": 9, "state": state},
        {"train": "all", "state": state},
    ]
    rehearsal = Rehearsal("schedule_free_adamw", entries, enforce)
    held = rehearsal.phase_end(rehearsal.start(), 0)
    for at in (1, 2):
        before = rehearsal.evaluated(held)
        switched = rehearsal.switch(held, at)
        assert_close(rehearsal.evaluated(switched), before)
        frozen = switched[1].params if enforce == "split" else switched[0].params
        stem = np.array(frozen["stem/kernel"]) if at == 1 else None
        held = rehearsal.go(switched, at, 3)
        if at == 1:
            np.testing.assert_array_equal(stem, before["stem/kernel"])
            frozen = held[1].params if enforce == "split" else held[0].params
            np.testing.assert_array_equal(frozen["stem/kernel"], stem)
    # A leaf that was parked goes on from where its gradients were taken, not from its average.
    points = {p: np.asarray(x) for p, x in switched[0].params.items()}
    fresh = np.array_equal(points["stem/kernel"], before["stem/kernel"])
    assert fresh == (state != "park")


def test_other_optimizers_evaluate_what_they_train():
    rehearsal = Rehearsal("lion")
    state = rehearsal.phase_end(rehearsal.start(), 0)[0]
    found = rehearsal.section.eval_params(state.opt_state, state.params)
    assert all(found[path] is leaf for path, leaf in state.params.items())


def test_checkpoints_tell_by_names_alone_what_to_evaluate():
    rehearsal = Rehearsal("schedule_free_sgd", "all")
    state, _, _ = rehearsal.phase_end(rehearsal.start(), 0)
    saved = {name: np.array(leaf) for name, leaf in leaves_by_path(state).items()}
    found = averages.eval_params({**saved, "opt_state/9/b1/weight": np.ones(1), "x/b1": np.ones(1)})
    assert_close(found, rehearsal.section.eval_params(state.opt_state, state.params))
    assert any(np.abs(found[path] - saved[f"params/{path}"]).max() > 1e-4 for path in found)


BLOCKS = {
    f"{stage}/{name}": RNG.normal(size=shape).astype(np.float32)
    for stage in ("blocks_0", "blocks_1")
    for name, shape in {"kernel": (4, 5), "bias": (5,)}.items()
}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("muon", {}),
        ("lamb", {}),
        ("adafactor", {"min_dim_size_to_factor": 2, "momentum": 0.9}),
        ("novograd", {}),
        ("schedule_free_adamw", {}),
    ],
)
def test_blocks_in_a_stack_move_as_they_do_apart(name, args):
    stages = ("blocks_0", "blocks_1")
    optim = dict(weight_decay=DECAY, schedule="constant", learning_rate=0.1)
    section = make_optim([(0, 9)], BLOCKS, stages, name=name, args=args, **optim)
    phase = make_phases(make_groups(sorted(BLOCKS)), total_steps=9, steps_per_epoch=9, phases="all")
    stacks = make_stacks(phase[0], BLOCKS, stages, "blocks", section.traits)
    assert [held.name for held in stacks.ranges] == ["blocks_0..1"]
    placed, rates = stacks.phase(phase[0]), section.rates(phase[0])
    start = jax.tree.map(jnp.asarray, BLOCKS)
    extra = lambda step: dict(step=step, rates=rates)  # noqa: E731
    one, state = run(section.tx(phase[0]), extra, start, steps=2)
    other, stacked = run(section.tx(placed), extra, stacks.stack(start), steps=2)
    assert_close(unstack(other), one)
    assert jax.tree.structure(stacks.stack(state)) == jax.tree.structure(stacked)
    if name == "lamb":  # the mutant: one norm for all blocks
        whole = dataclasses.replace(section.optimizer, stacks="whole")
        section = dataclasses.replace(section, optimizer=whole)
        wrong, _ = run(section.tx(placed), extra, stacks.stack(start), steps=2)
        assert np.abs(unstack(wrong)["blocks_0/kernel"] - one["blocks_0/kernel"]).max() > 1e-3


def test_the_plan_counts_the_products_of_an_update():
    """Newton-Schulz on [4, 5], 5 times: x x', a a, and b x; 2 FLOPs a multiply-add."""
    phase, leaves = phases_of()[0], {"stem/kernel": np.zeros((4, 5), np.float32)}
    phase = dataclasses.replace(phase, mask={"stem/kernel": True}, entered={"stem/kernel": "0"})
    for name, expected in (("muon", 5 * 2 * (4 * 4 * 5 + 4 * 4 * 4 + 4 * 4 * 5)), ("lamb", 0)):
        section = section_of(name)
        rates = section.rates(phase)
        assert optimizer_flops(section.tx(phase), leaves, rates) == expected
        assert optimizer_flops(section.tx(phase), leaves, None) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_its_reason(name):
    for full in (name, f"optax.{name}"):
        with pytest.raises(ConfigError, match=f"optim.name: {name} ") as error:
            make_optim([(0, 9)], PARAMS, STAGES, name=full)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"name": "adopt", "args": {"b3": 1}}, "optim.args: adopt: got an unexpected .* 'b3'"),
        ({"name": "muon", "args": {"ns_coeffs": [1.0]}}, "optim.args: muon: "),
        ({"name": "schedule_free_sgd", "args": {"b1": 0.0}}, "optim.args.b1"),
        ({"name": "schedule_free_adamw", "schedule": "cosine"}, "optim.schedule: .* constant"),
        ({"name": "prodigy", "layer_decay": 0.5}, "optim.lr_rules, optim.layer_decay: prodigy"),
        ({"name": "cocob", "lr_rules": [["head/.*", 2.0]]}, "cocob has one rate"),
        ({"name": "sm3", "scanned": True}, "train.scan_blocks: the state of sm3"),
        ({"name": "optax.adamm"}, "no optimizer 'optax.adamm' .did you mean"),
    ],
)
def test_combinations_that_would_be_wrong_are_refused(kw, message):
    with pytest.raises(ConfigError, match=message):
        make_optim([(0, 9)], PARAMS, STAGES, **{"schedule": "constant", **kw})


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("prodigy", {"lr_scale": {"name": "depth_decay", "rate": 0.5}}, "one rate for all leaves"),
        ("schedule_free_sgd", {"elements": {"kind": "fixed", "share": 0.5}}, "single elements"),
        ("madgrad", {"elements": {"kind": "fixed", "share": 0.5}}, "single elements"),
    ],
)
def test_phases_that_an_optimizer_cannot_follow_are_refused(name, entry, message):
    phase = phases_of([{"train": "all"}])[0]
    if "elements" in entry:
        phase = dataclasses.replace(phase, elements=Elements(**entry["elements"]))
    else:
        phase = dataclasses.replace(phase, scales={"stem/kernel": 0.5})
    with pytest.raises(ConfigError, match=message):
        section_of(name).tx(phase)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "prodigy", "muon"])
def test_a_killed_run_of_the_loop_ends_bitwise_equal(name, tmp_path, monkeypatch):
    """Killed in phase 1 after a save in phase 0: the switch is made again, and evaluated."""

    def made(folder):
        optim = dict(name=name, schedule="constant", learning_rate=RATES.get(name, 3e-2))
        kw = dict(steps=7, eval_every_steps=4, save_every_steps=3, norm=False, dropout=0.0)
        return make_run(tmp_path / folder, "head@4 | all", optim=optim, augment=False, **kw)

    straight = fit(made("straight"))
    stop_at(monkeypatch, 6)
    with pytest.raises(Stop):
        fit(made("killed"))
    monkeypatch.undo()
    again = fit(made("killed"))
    assert again.metrics == straight.metrics
    for path, leaf in straight.params.items():
        assert np.asarray(leaf).tobytes() == np.asarray(again.params[path]).tobytes(), path
    saved = made("killed").checkpoints.restore().state
    evaluated = averages.eval_params(saved)
    assert_close({path: straight.params[path] for path in evaluated}, evaluated)
    trained = {path: saved[f"params/{path}"] for path in evaluated}
    differs = [path for path, leaf in trained.items() if np.any(leaf != straight.params[path])]
    assert bool(differs) == (name in FREE)


def test_a_finished_run_is_used_with_its_averages(tmp_path):
    file = tmp_path / "data.npz"
    image = RNG.integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(file, image=image, label=np.arange(40) % 4)
    config = base()
    config.data.name, config.data.path, config.data.image_size = "npz", str(file), 16
    config.model.name = "vit_tiny"
    config.model.args = {"depth": 1, "features": 8, "heads": 2, "mlp_features": 8, "patch": 16}
    config.train.steps, config.train.batch_size, config.parallel.devices = 3, 8, 1
    config.optim.name, config.optim.schedule = "schedule_free_sgd", "constant"
    config.optim.learning_rate, config.log.tensorboard = 0.5, False
    outcome = fit(setup(from_json(to_json(config)), tmp_path / "run"))
    trained = load_trained(tmp_path / "run")
    assert_close(trained.params, outcome.params)
    found = evaluate(tmp_path / "run", "val")
    assert found["loss"] == pytest.approx(outcome.metrics["eval/loss"], rel=1e-5)
    saved = Checkpoints(tmp_path / "run").restore().state
    moves = [np.abs(saved[f"params/{p}"] - x).max() for p, x in trained.params.items()]
    assert max(moves) > 1e-3, "what is trained is another point"


@pytest.mark.parametrize("name", ["muon", pytest.param("schedule_free_sgd", marks=SLOW)])
def test_the_number_of_devices_changes_nothing(name):
    kw = dict(norm=False, optim=dict(name=name, schedule="constant", learning_rate=3e-2))
    one, many = Trainer(**kw), Trainer(devices=8, **kw)
    one.run(batches(5))
    many.run(batches(5))
    assert worst(many.leaves(), one.leaves()) < 1e-4
    check_replicas(many.state)
