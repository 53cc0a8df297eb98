"""Every named method is, step by step, what its authors publish: their rules written out anew."""

import itertools
import math

import numpy as np
import pytest
from freeze_runs import (
    above,
    block,
    groups_of,
    leaves,
    random_signals,
    run_rules,
    spans,
    trained,
    vit,
)

from jft.errors import ConfigError
from jft.freeze.groups import COMMON_SETS, make_groups
from jft.freeze.methods import METHODS, make_freeze
from jft.freeze.phases import Elements
from jft.train.rates import leaf_factors, make_rates
from jft.train.schedules import make_schedule

CONSTANT = {"schedule": "constant", "warmup_steps": 0, "per_phase": False}
DEPTHS = pytest.mark.parametrize("depth", [4, 12])


def plan(groups, name, total=1000, epoch=100.0, seed=0, max_sets=None, cut_quantum=1, **args):
    return make_freeze(
        groups,
        total_steps=total,
        steps_per_epoch=epoch,
        name=name,
        args=args,
        seed=seed,
        max_sets=max_sets,
        cut_quantum=cut_quantum,
    )


def at(phases, step):
    return next(phase for phase in phases if phase.start_step <= step < phase.stop_step)


def only_phase(groups, name, **args):
    (phase,) = plan(groups, name, **args).phases()
    assert spans((phase,)) == [(0, 1000)]
    assert (phase.lr_scale, phase.anneal, phase.ramps) == (1.0, None, None)
    return phase


def rates_of(name, per_phase, total=60):
    """The run's learning rate at each step, factors of phases and leaves left out."""
    schedule = plan(vit(4), name, total=total, epoch=10.0)
    kw = {"schedule": "cosine", "warmup_steps": 2, "per_phase": per_phase}
    kw |= schedule.recipe_schedule
    rate = make_schedule(
        schedule.spans.all(), learning_rate=1.0, events=bool(schedule.watched), **kw
    )
    return [float(rate(step)) for step in range(total)]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_course_of_the_rate_and_lp_ft_is_two(name):
    whole, restarted = rates_of(name, False), rates_of(name, True)
    if name == "lp_ft":
        first, second = restarted[:18], restarted[18:]
        assert first[1] == second[1] == 1.0 and whole[19] < 1.0
        assert first[-1] < 0.1 and second[-1] < 0.1
    else:
        assert restarted == whole


# Sets that do not change.


@DEPTHS
def test_the_plain_sets(depth):
    groups = vit(depth)
    everything, head = set(groups.paths), leaves(groups, "head")
    embed, norm = leaves(groups, "embed"), leaves(groups, "norm")
    assert trained(only_phase(groups, "full")) == everything
    assert trained(only_phase(groups, "linear_probe")) == head
    assert trained(only_phase(groups, "last_k")) == block(groups, depth - 1) | norm | head
    last = trained(only_phase(groups, "last_k", k=3))
    assert last == block(groups, depth - 3, depth - 2, depth - 1) | norm | head
    assert trained(only_phase(groups, "last_k", k=depth)) == everything - embed
    assert trained(only_phase(groups, "first_k")) == embed | block(groups, 0) | head
    assert trained(only_phase(groups, "first_k", k=2)) == embed | block(groups, 0, 1) | head
    biases = {path for path in everything if path.split("/")[-1] == "bias"}
    assert trained(only_phase(groups, "bitfit")) == biases | head
    norms = {p for p in everything if p.split("/")[-2] in ("norm", "norm1", "norm2")}
    assert len(norms) == 4 * depth + 2
    assert trained(only_phase(groups, "norm_only")) == norms | head
    attention = {path for path in everything if "/attn/" in path}
    assert len(attention) == 8 * depth
    expected = attention | {"embed/pos_embedding"} | head
    assert trained(only_phase(groups, "attention_only")) == expected


@DEPTHS
def test_surgical_trains_any_run_of_blocks(depth):
    groups = vit(depth)
    head, quarter = leaves(groups, "head"), range(depth // 4)
    first = trained(only_phase(groups, "surgical"))
    assert first == leaves(groups, "embed") | block(groups, *quarter) | head
    bare = only_phase(groups, "surgical", stem=False, always="")
    assert trained(bare) == block(groups, *quarter)
    for start in range(depth):
        for stop in range(start + 1, depth + 1):
            found = trained(only_phase(groups, "surgical", start=start, stop=stop))
            stem = leaves(groups, "embed") if start == 0 else set()
            assert found == block(groups, *range(start, stop)) | head | stem


@pytest.mark.parametrize(("depth", "rate"), [(4, 0.75), (12, 0.65)])
def test_layerwise_decay_is_that_of_mae(depth, rate):
    groups = vit(depth)
    phase = only_phase(groups, "layerwise_decay", rate=rate)
    assert trained(phase) == set(groups.paths)
    # MAE's layer ids: embeddings 0, block b has b + 1, the rest L + 1; scale rate ** (L + 1 - id).
    for path in groups.paths:
        top = path.split("/")[0]
        number = int(top.split("_")[1]) + 1 if top.startswith("blocks_") else depth + 1
        number = 0 if top == "embed" else number
        assert phase.scales[path] == pytest.approx(rate ** (depth + 1 - number), rel=1e-12)
    assert METHODS["layerwise_decay"].__kwdefaults__ == {"rate": 0.75}


# Phases by the clock.


def test_lp_ft_trains_the_head_first():
    groups = vit(4)
    head, everything = plan(groups, "lp_ft", lr_scale=0.1).phases()
    assert spans((head, everything)) == [(0, 300), (300, 1000)]
    assert trained(head) == leaves(groups, "head")
    assert trained(everything) == set(groups.paths)
    assert (head.lr_scale, everything.lr_scale) == (1.0, 0.1)
    assert everything.entered["head/bias"] == head.entered["head/bias"]


@DEPTHS
def test_gradual_unfreezing_adds_a_unit_each_epoch_from_the_top(depth):
    groups, epoch = vit(depth), 10
    schedule = plan(groups, "gradual_unfreezing", total=300, epoch=epoch)
    phases = schedule.phases()
    stops = [epoch * number for number in range(1, depth + 2)] + [300]
    assert [phase.stop_step for phase in phases] == stops
    for number, phase in enumerate(phases):  # depth - number blocks are still frozen
        cut = depth - number
        assert trained(phase) == above(groups, cut), number
        assert phase.state == "keep"
        assert phase.scales["head/kernel"] == phase.scales["norm/scale"] == 1.0
        for b in range(depth):
            scale = phase.scales[f"blocks_{b}/norm1/scale"]
            assert scale == pytest.approx(2.6 ** (b - depth), rel=1e-9)
        assert phase.scales["embed/patch/kernel"] == pytest.approx(2.6 ** -(depth + 1), rel=1e-9)
    assert schedule.recipe_schedule == {
        "schedule": "slanted_triangle",
        "args": {"cut_frac": 0.1, "ratio": 32.0},
        "warmup_steps": 0,
        "per_phase": False,
    }


def test_an_epoch_of_a_fraction_does_not_drift():
    phases = plan(vit(4), "gradual_unfreezing", total=100, epoch=10.4).phases()
    assert [phase.stop_step for phase in phases] == [10, 21, 31, 42, 52, 100]


def test_gradual_unfreezing_in_a_short_run_thaws_evenly():
    phases = plan(vit(4), "gradual_unfreezing", total=60, epoch=100).phases()
    assert [phase.stop_step for phase in phases] == [10, 20, 30, 40, 50, 60]
    assert trained(phases[-1]) == set(vit(4).paths)


@DEPTHS
def test_chain_thaw_goes_head_each_layer_all(depth):
    groups = vit(depth)
    schedule = plan(groups, "chain_thaw")
    assert schedule.watched == ["eval/loss"] and schedule.triggered
    # Stage n ends at the fifth evaluation in a row that is no better than the stage's best one.
    log, begin, stops = [], 0, []
    for number in range(depth + 3):
        for index, value in enumerate([2.0, 1.0, 1.5, 1.0, 3.0, 2.0, 1.0]):
            step = begin + 2 * (index + 1)
            log.append({"step": step, "metric": "eval/loss", "value": value + number})
        begin = step
        stops.append(step)
    phases = schedule.phases(log)
    assert [phase.stop_step for phase in phases] == [*stops, 1000]
    sets = [leaves(groups, "head"), leaves(groups, "embed")]
    sets += [block(groups, b) for b in range(depth)]
    sets += [leaves(groups, "norm"), set(groups.paths)]
    assert [trained(phase) for phase in phases] == sets
    assert [phase.lr_scale for phase in phases] == [1.0] + [0.1] * (depth + 3)
    assert {phase.state for phase in phases} == {"reset"}
    for number, phase in enumerate(phases):
        assert set(phase.entered.values()) == {str(number)}, "each stage has a new optimizer"
    assert schedule.recipe_schedule == CONSTANT


def test_chain_thaw_without_a_plateau_gives_each_stage_an_equal_share():
    phases = plan(vit(4), "chain_thaw", total=80).phases()
    assert spans(phases) == [(10 * n, 10 * n + 10) for n in range(8)]
    assert [phase.event for phase in phases] == ["plateau(5)"] * 7 + [""]


# t_i of FreezeOut with 4 blocks: stem, block 0, 1, 2, 3; the head trains to the end.
FREEZEOUT = [
    # (.8 + .04 i) ** 3 = .512 .592704 .681472 .778688 .884736
    ({}, [512, 593, 682, 779, 885]),
    ({"how": "linear", "t0": 0.5}, [500, 600, 700, 800, 900]),
    ({"how": "squared", "t0": 0.5}, [250, 360, 490, 640, 810]),  # .5 .6 .7 .8 .9 squared
]


@pytest.mark.parametrize(("args", "steps"), FREEZEOUT)
def test_freezeout_freezes_from_the_input_on_its_clock(args, steps):
    groups = vit(4)
    schedule = plan(groups, "freezeout", **args)
    phases = schedule.phases()
    assert [phase.stop_step for phase in phases] == [*steps, 1000]
    for cut, phase in enumerate(phases, -1):
        assert trained(phase) == above(groups, cut)
    assert schedule.recipe_schedule == CONSTANT


@pytest.mark.parametrize("scaled", [True, False])
@DEPTHS
def test_freezeout_anneals_each_layer_to_its_own_end(depth, scaled):
    groups, total = vit(depth), 2000
    phases = plan(groups, "freezeout", total=total, scaled=scaled).phases()
    control = plan(groups, "anneal_only", total=total, scaled=scaled).phases()
    assert len(control) == 1 and trained(control[0]) == set(groups.paths)
    for step in [0, 1, 500, 1023, 1024, 1500, 1999]:
        phase = at(phases, step)
        for used in (phase, control[0]):
            rates = make_rates(used, dict.fromkeys(groups.paths, 1.0))
            found = dict(zip(sorted(used.entered), leaf_factors(step, rates), strict=True))
            for path, factor in found.items():
                top = path.split("/")[0]
                index = int(top.split("_")[1]) + 1 if top.startswith("blocks_") else depth + 1
                index = 0 if top == "embed" else index
                share = (0.8 + 0.2 * index / (depth + 1)) ** 3
                stop = math.ceil(share * total - 1e-6)
                peak = 1 / share if scaled else 1.0
                curve = 0.5 * (1 + math.cos(math.pi * step / stop)) if step < stop else 0.0
                assert float(factor) == pytest.approx(peak * curve, abs=2e-6)
                assert (step < stop) or used is control[0], "frozen at the end of its curve"


def composer_depth(step, total, start, level, layers):
    """How many of the layers below the last Composer has frozen after an epoch's last step."""
    share = step / total
    if share <= start:
        return 0
    return int(level * (share - start) / (1 - start) * layers + 1e-9)


@pytest.mark.parametrize(("start", "level"), [(0.5, 1.0), (0.1, 0.6), (0.0, 1.0)])
@DEPTHS
def test_linear_bottom_up_is_composers(depth, start, level):
    groups, total, epoch = vit(depth), 400, 25
    phases = plan(groups, "linear_bottom_up", total, epoch, start=start, level=level).phases()
    frozen = 0
    for step in range(total):
        if step and step % epoch == 0:
            frozen = composer_depth(step, total, start, level, depth + 1)
        assert trained(at(phases, step)) == above(groups, frozen - 1), step
    assert frozen >= depth // 2, "the last epoch is not the first to freeze"


@DEPTHS
def test_controls_freeze_as_many_units_at_the_same_times(depth):
    groups, total, epoch = vit(depth), 400, 10
    tops = ["embed", *(f"blocks_{b}" for b in range(depth))]

    def frozen(name, seed=0):
        phases = plan(groups, name, total, epoch, seed=seed).phases()
        found = []
        for phase in phases:
            mask = [all(phase.mask[p] for p in leaves(groups, top)) for top in tops]
            assert leaves(groups, "norm", "head") <= trained(phase)
            found.append(
                (phase.stop_step, tuple(top for top, t in zip(tops, mask, strict=True) if not t))
            )
        return found

    forward, backward = frozen("linear_bottom_up"), frozen("reversed_order")
    shuffled, again = frozen("random_order"), frozen("random_order", seed=1)
    assert len(forward) == depth + 1  # the last unit would freeze at the very end
    for (stop, first), *others in zip(forward, backward, shuffled, again, strict=True):
        assert [(s, len(units)) for s, units in others] == [(stop, len(first))] * 3
        assert first == tuple(tops[: len(first)])
        assert others[0][1] == tuple(tops[len(tops) - len(first) :])
    assert shuffled != again and shuffled == frozen("random_order")
    for (_, before), (_, after) in itertools.pairwise(shuffled):
        assert set(before) < set(after), "what is frozen stays frozen"


# ceil(L (1 - (1 - alpha) ** e)) for e = 0..9, worked out by hand.
PIPETRANSFORMER = [
    (12, 0.5, [0, 6, 9, 11, 12, 12, 12, 12, 12, 12]),
    (12, 1 / 3, [0, 4, 7, 9, 10, 11, 11, 12, 12, 12]),
    (12, 0.2, [0, 3, 5, 6, 8, 9, 9, 10, 10, 11]),
    (4, 0.5, [0, 2, 3, 4, 4, 4, 4, 4, 4, 4]),
]


@pytest.mark.parametrize(("depth", "alpha", "frozen"), PIPETRANSFORMER)
def test_pipetransformer_freezes_geometrically(depth, alpha, frozen):
    groups = vit(depth)
    phases = plan(groups, "pipetransformer", 500, 50, alpha=alpha).phases()
    for step in range(500):
        count = frozen[step // 50]
        assert trained(at(phases, step)) == above(groups, count if count else -1), step
    assert METHODS["pipetransformer"].__kwdefaults__["alpha"] == 0.5


# Drawn, or in turn.


@DEPTHS
def test_lisa_draws_two_blocks_every_twenty_steps(depth):
    groups = vit(depth)
    phases = plan(groups, "lisa", total=2010).phases()
    rest = leaves(groups, "embed", "norm", "head")
    counts = np.zeros(depth, int)
    for step in range(0, 2010, 20):
        found = trained(at(phases, step))
        chosen = [b for b in range(depth) if block(groups, b) <= found]
        assert len(chosen) == 2 and found == block(groups, *chosen) | rest
        assert at(phases, min(step + 19, 2009)) is at(phases, step)
        counts[chosen] += 1
    expected = 101 * 2 / depth
    assert (abs(counts - expected) < 4 * expected**0.5).all(), counts
    assert {phase.entered["head/bias"] for phase in phases} == {"0"}
    for before, after in itertools.pairwise(phases):
        for path in trained(after) - trained(before):
            assert after.entered[path] == str(after.index), "a block that comes back starts anew"
    assert spans(phases) == spans(plan(groups, "lisa", total=2010).phases())
    other = plan(groups, "lisa", total=2010, seed=1).phases()
    assert [p.name for p in other] != [p.name for p in phases]


@pytest.mark.parametrize("order", ["top_down", "bottom_up"])
@DEPTHS
def test_badam_takes_the_blocks_in_turn_with_a_new_state(depth, order):
    groups = vit(depth)
    phases = plan(groups, "badam", total=1520, order=order).phases()
    stops = [*range(50, 1520, 50), 1520]
    assert [phase.stop_step for phase in phases] == stops
    for number, phase in enumerate(phases):
        b = number % depth if order == "bottom_up" else depth - 1 - number % depth
        assert trained(phase) == block(groups, b) | leaves(groups, "head")
        assert set(phase.entered.values()) == {str(number)}
    bare = plan(groups, "badam", order=order, always="").phases()
    assert all("head" not in path for path in trained(bare[0]))


def test_badam_random_goes_through_all_blocks_each_sweep():
    groups = vit(4)
    phases = plan(groups, "badam", total=400, order="random", every=5).phases()
    drawn = [int(p.name.split("[")[1][0]) for p in phases]
    sweeps = [tuple(drawn[n : n + 4]) for n in range(0, 80, 4)]
    assert len(drawn) == 80 and all(sorted(sweep) == [0, 1, 2, 3] for sweep in sweeps)
    assert len(set(sweeps)) > 5
    assert [p.entered["head/bias"] for p in phases] == [str(n) for n in range(80)]


@DEPTHS
def test_hift_trains_one_unit_a_step_and_holds_the_rate_for_a_sweep(depth):
    groups = vit(depth)
    schedule = plan(groups, "hift", total=100)
    phases = schedule.phases()
    units = [leaves(groups, "embed"), *(block(groups, b) for b in range(depth))]
    units.append(leaves(groups, "norm", "head"))
    assert spans(phases) == [(n, n + 1) for n in range(100)]
    for number, phase in enumerate(phases):
        assert trained(phase) == units[number % len(units)]
        assert phase.state == "park"
        assert len(phase.cohorts) == 1
    assert len({phase.key for phase in phases}) == len(units), "a step is compiled once a unit"
    assert schedule.recipe_schedule == {"hold_steps": depth + 2, "per_phase": False}
    pairs = plan(groups, "hift", size=2, every=3, order="top_down")
    assert pairs.recipe_schedule["hold_steps"] == 3 * math.ceil((depth + 2) / 2)
    assert trained(pairs.phases()[0]) == units[-1] | units[-2]


# Decided from signals.


def spread(groups, norms):
    """A signal by leaf whose sum over block b is norms[b]."""
    found = {}
    for b, norm in enumerate(norms):
        own = sorted(block(groups, b))
        found |= dict.fromkeys(own, norm / len(own)) if norm else {}
    return found


def test_autofreeze_moves_the_cut_to_the_first_block_above_the_median():
    groups = vit(4)
    schedule = plan(groups, "autofreeze", total=40)
    norms = {
        2: [1.0, 1.0, 1.0, 1.0],  # the first is only noted
        4: [0.9, 1.2, 0.5, 1.6],  # .1 .2 .5 .6, median .35: blocks 0 and 1 freeze
        6: [0.0, 0.0, 0.2, 1.6],  # .6 0, median .3: block 2 stays
        8: [0.0, 0.0, 0.2, 0.8],  # 0 .5: block 2 freezes
    }
    log = run_rules(schedule, lambda due: spread(groups, norms.get(due.step, [0, 0, 0, 1.0])))
    assert [record["step"] for record in log] == list(range(2, 40, 2))
    phases = schedule.phases(log)
    cuts = [-1, 2, 2] + [3] * 16
    assert spans(phases) == [(0, 4), *((n, n + 2) for n in range(4, 40, 2))]
    assert [trained(phase) for phase in phases] == [above(groups, cut) for cut in cuts]
    for phase in phases[1:]:  # the optimizer is re-created even where the cut stays
        assert set(phase.entered.values()) == {str(phase.index)}
    assert len({phase.key for phase in phases}) == 3


def test_autofreeze_of_twelve_blocks_is_the_authors_loop():
    groups, total = vit(12), 200
    schedule = plan(groups, "autofreeze", total=total, percentile=70.0)
    random = np.random.default_rng(3)
    norms = {step: random.uniform(0.1, 1.0, 12) for step in range(10, total, 10)}
    cut, before, expected = 0, None, {}
    for step in range(10, total, 10):
        now = np.where(np.arange(12) < cut, 0.0, norms[step])
        if before is not None:
            eta = np.zeros(12)
            eta[cut:] = abs(before - now)[cut:] / before[cut:]
            bound = np.percentile(eta[cut:], 70.0)
            cut = next(at for at in range(cut, 12) if eta[at] >= bound)
        before, expected[step] = now, cut

    def measure(due):
        frozen = [not (block(groups, b) <= trained(due.phase)) for b in range(12)]
        return spread(groups, np.where(frozen, 0.0, norms[due.step]))

    phases = schedule.phases(run_rules(schedule, measure))
    for step, cut in expected.items():
        assert trained(at(phases, step)) == above(groups, cut or -1), step
    assert max(expected.values()) >= 3


def test_egeria_freezes_a_flat_front_and_thaws_when_the_rate_has_dropped():
    groups = vit(4)
    schedule = plan(groups, "egeria", total=100)
    # Every 2 steps; window 3: six values, of which the last changes are small, freeze the front.
    series = {0: [9, 7, 5, 4, 4, 4, 4, 4] + [1, 9] * 50, 1: [2] * 6, 2: [1, 9] * 50}
    front = []

    def measure(due):
        cut = sum(not (block(groups, b) <= trained(due.phase)) for b in range(4))
        front.append(cut)
        return {f"block[{cut}]": float(series[cut][front.count(cut) - 1])}

    log = run_rules(schedule, measure, rate=lambda step: 1.0 if step < 60 else 0.2)
    phases = schedule.phases(log)
    # Block 0: means of three 7, 5.33, 4.33, 4, 4, 4: changes 1.67, 1, .33, 0, 0 of at most .7: the
    # last three are, first at the eighth value, step 16. Block 1 six values later, step 28.
    assert spans(phases)[:3] == [(0, 16), (16, 28), (28, 60)]
    assert [trained(p) for p in phases[:3]] == [above(groups, cut) for cut in (-1, 1, 2)]
    assert trained(phases[3]) == set(groups.paths)
    assert spans(phases)[3:] == [(60, 100)]
    assert phases[3].entered["head/bias"] == "0", "the state of what trained on is kept"


def test_egeria_freezes_as_many_blocks_at_a_time_as_the_quantum_says():
    groups = vit(6)
    schedule = plan(groups, "egeria", total=100, cut_quantum=2)
    seen = []

    def measure(due):
        cut = next(n for n in range(6) if block(groups, n) & trained(due.phase))
        seen.append(schedule.outline.front(cut))
        return {seen[-1]: 1.0}

    log = run_rules(schedule, measure)
    assert list(dict.fromkeys(seen)) == ["block[1]", "block[3]", "block[5]"]
    cuts = [trained(phase) for phase in schedule.phases(log)]
    assert cuts == [set(groups.paths), above(groups, 2), above(groups, 4)]


def test_autofreeze_decides_nineteen_times_however_long_the_run():
    for total in (39, 40, 59):
        schedule = plan(vit(4), "autofreeze", total=total)
        log = run_rules(schedule, lambda due: dict.fromkeys(trained(due.phase), 1.0))
        assert len(log) == 19
        assert all(abs(r["step"] - n * total / 20) < 0.51 for n, r in enumerate(log, 1))


def test_egeria_begins_anew_after_it_has_thawed():
    groups = vit(4)
    schedule = plan(groups, "egeria", total=100)
    # Block 0 is flat throughout, block 1 never.
    log = run_rules(
        schedule,
        lambda due: {"block[0]": 4.0, "block[1]": (1.0, 9.0)[due.step // 2 % 2]},
        rate=lambda step: 1.0 if step < 40 else 0.2 if step < 80 else 0.04,
    )
    # Six values freeze block 0 at step 12; the first drop thaws it; six new values freeze it at 52,
    # and from then on it is the second drop that counts.
    phases = schedule.phases(log)
    assert spans(phases) == [(0, 12), (12, 40), (40, 52), (52, 80), (80, 92), (92, 100)]
    cuts = [-1, 1, -1, 1, -1, 1]
    assert [trained(phase) for phase in phases] == [above(groups, cut) for cut in cuts]


def test_auto_rgn_scales_by_the_relative_gradient_each_epoch():
    groups = vit(4)
    schedule = plan(groups, "auto_rgn", total=25, epoch=10)
    ratios = {0: 2.0, 10: 4.0, 20: 8.0}

    def measure(due):
        values = {path: 1.0 for path in groups.paths}
        values["blocks_1/mlp/fc1/kernel"] = ratios[due.step]
        values["blocks_2/norm1/bias"] = values["head/bias"] = 0.0  # weights that are 0
        return values

    phases = schedule.phases(run_rules(schedule, measure))
    assert spans(phases) == [(0, 10), (10, 20), (20, 25)]
    for phase in phases:
        assert trained(phase) == set(groups.paths) - {"blocks_2/norm1/bias"}
        assert phase.scales["blocks_1/mlp/fc1/kernel"] == 1.0
        assert phase.scales["embed/cls_token"] == 1.0 / ratios[phase.start_step]
        assert phase.scales["head/bias"] == 1.0
        assert set(phase.entered.values()) == {str(phase.index)}, "a new optimizer each epoch"
    assert schedule.entries[0]["batches"] == 5


def test_auto_rgn_and_auto_snr_leave_batch_norm_alone():
    groups = groups_of("efficientnet_lite_tiny")
    norms = {path for path in groups.paths if path.split("/")[-2].startswith("bn")}
    assert len(norms) == 26
    for name in ("auto_rgn", "auto_snr"):
        schedule = plan(groups, name, total=10)
        log = run_rules(schedule, lambda due: dict.fromkeys(groups.paths, 2.0))
        (phase,) = schedule.phases(log)
        assert trained(phase) == set(groups.paths) - norms


def test_auto_snr_trains_what_reaches_the_bound():
    groups = vit(4)
    low = {"blocks_0/attn/query/kernel": 0.9499, "blocks_3/mlp/fc2/bias": 0.0, "head/bias": 0.1}
    high = {"blocks_1/attn/query/kernel": 0.95}
    values = dict.fromkeys(groups.paths, 3.0) | low | high
    for args, kept in (({}, {"head/bias"}), ({"always": ""}, set())):
        schedule = plan(groups, "auto_snr", total=30, epoch=10, **args)
        phases = schedule.phases(run_rules(schedule, lambda due: values))
        assert spans(phases) == [(0, 10), (10, 20), (20, 30)]
        for phase in phases:
            assert trained(phase) == set(groups.paths) - set(low) | kept
            assert set(phase.entered.values()) == {str(phase.index)}


def test_slimfit_visits_each_weight_then_trains_the_largest_updates():
    groups = vit(4)
    schedule = plan(groups, "slimfit", total=200, every=1, seed=5)
    fixed = {p for p in groups.paths if p.endswith("/bias")} | leaves(groups, "norm", "head")
    free = [path for path in groups.paths if path not in fixed]
    updates = np.random.default_rng(0)
    last, visits, sets = {}, [], []

    def measure(due):
        moved = {path: float(updates.uniform()) for path in sorted(trained(due.phase))}
        if due.step:
            # What trained is known now; the authors rank by it, then by the first huge values.
            sets.append(trained(due.phase) - fixed)
            visits.extend(path for path in sorted(sets[-1]) if path not in last)
            last.update({path: moved[path] for path in sets[-1]})
            expected.append(dict(last))
        return moved if due.step else {}

    expected = []
    log = run_rules(schedule, measure)
    phases = schedule.phases(log)
    kept = len(free) - int(0.9 * len(free))
    assert kept > 1 and all(len(found) == kept for found in sets)
    assert all(fixed <= trained(phase) for phase in phases)
    assert set(visits) == set(free) and len(visits) == len(free)
    first = math.ceil(len(free) / kept)
    assert len(set().union(*sets[:first])) == len(free), "each is visited before any comes again"
    for number in range(first, len(sets) - 1):
        ranked = sorted(free, key=lambda path: -expected[number][path])
        assert sets[number + 1] == set(ranked[:kept]), number
    other = plan(groups, "slimfit", total=200, every=1, seed=6)
    assert trained(other.phases(run_rules(other, random_signals(other)))[0]) != trained(phases[0])


def test_slimfit_visits_by_seed_whatever_all_leaves_did_before():
    groups = vit(4)
    rule = {"generator": "rule", "signal": "rel_update", "decide": "freeze_lowest", "every": 10}
    sets = []
    for seed, sign in ((0, 1), (0, -1), (1, 1)):
        schedule = make_freeze(groups, total_steps=20, steps_per_epoch=10, phases=[rule], seed=seed)
        moved = {path: 1.0 + sign * n / 1000 for n, path in enumerate(groups.paths)}
        log = run_rules(schedule, lambda due, moved=moved: moved)
        sets.append(trained(schedule.phases(log)[1]))
    assert sets[0] == sets[1] != sets[2]


def test_spectrum_trains_the_best_half_of_each_module_type():
    groups = vit(4)
    schedule = plan(groups, "spectrum")
    best = {"attn/query": (0, 3), "attn/key": (1, 2), "attn/value": (0, 1), "attn/out": (2, 3)}
    best |= {"mlp/fc1": (0, 2), "mlp/fc2": (1, 3)}
    values = {"embed/patch/kernel": 0.1, "head/kernel": 0.1}
    for module, winners in best.items():
        for b in range(4):
            values[f"blocks_{b}/{module}/kernel"] = 1.0 + b / 10 + 5.0 * (b in winners)
    (record,) = run_rules(schedule, lambda due: values)
    (phase,) = schedule.phases([record])
    expected = leaves(groups, "embed", "norm", "head")
    for module, winners in best.items():
        for b in winners:
            expected |= {f"blocks_{b}/{module}/kernel", f"blocks_{b}/{module}/bias"}
    assert trained(phase) == expected
    quarter = plan(groups, "spectrum", share=0.25)
    (record,) = run_rules(quarter, lambda due: values)
    found = trained(quarter.phases([record])[0])
    assert {b for b in range(4) if f"blocks_{b}/mlp/fc2/kernel" in found} == {3}


@pytest.mark.parametrize(
    ("name", "args", "signal", "share", "always"),
    [
        ("child_tuning", {}, "fisher", 0.3, "embed + final + head"),
        ("fish", {}, "fisher", 0.005, "head"),
        ("saft", {}, "grad_abs", 0.001, "head"),
        ("saft", {"share": 0.5, "always": ""}, "grad_abs", 0.5, ""),
    ],
)
@DEPTHS
def test_fixed_choices_of_elements_are_made_once_before_the_first_step(
    depth, name, args, signal, share, always
):
    groups = vit(depth)
    schedule = plan(groups, name, **args)
    due = schedule.due(0)
    assert (due.step, due.rule.signal, due.rule.decide) == (0, signal, "top_elements")
    log = run_rules(schedule, lambda due: {})
    elements = {"kind": "fixed", "share": share, "always": always}
    assert log == [{"step": 0, "entry": 0, "elements": elements}]
    (phase,) = schedule.phases(log)
    assert trained(phase) == set(groups.paths)
    assert phase.elements == Elements("fixed", share)
    assert "saves no compute" in METHODS[name].__doc__


def test_child_tuning_f_draws_elements_at_every_step():
    phase = only_phase(vit(4), "child_tuning", variant="F", share=0.2)
    assert trained(phase) == set(vit(4).paths)
    assert phase.elements == Elements("bernoulli", 0.2)
    assert not plan(vit(4), "child_tuning", variant="F").triggered


# All of them.

MODELS = {"vit4": vit(4), "vit12": vit(12)}
MODELS |= {"lite": groups_of("efficientnet_lite_tiny"), "se": groups_of("efficientnet_tiny")}
MODELS |= {"clip": groups_of("clip_tiny")}  # without a final norm
MODELS |= {"swin": groups_of("swin_tiny"), "resnet": groups_of("resnet_tiny")}
UNFIT = {(name, "attention_only") for name in ("lite", "se", "resnet")} | {
    ("vit12", "chain_thaw", 8)
}


@pytest.mark.parametrize("total", [8, 1000])
@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_runs_with_its_defaults(name, model, total):
    groups = MODELS[model]
    if (model, name) in UNFIT or (model, name, total) in UNFIT:
        with pytest.raises(ConfigError, match=rf"^freeze\.name: {name} (needs|has) "):
            plan(groups, name, total)
        return
    for epoch in (max(2, total // 20), 100):
        schedule = plan(groups, name, total, epoch)
        log = run_rules(schedule, random_signals(schedule))
        phases = schedule.phases(log)
        assert phases[0].start_step == 0 and phases[-1].stop_step == total
        for before, after in itertools.pairwise(phases):
            assert before.stop_step == after.start_step
        for number, phase in enumerate(phases):
            assert phase.index == number and phase.start_step < phase.stop_step
            assert trained(phase) == set(phase.entered) and phase.entered
        again = plan(groups, name, total, epoch)
        assert again.phases(run_rules(again, random_signals(again))) == phases
        assert schedule.approximation == ""


@pytest.mark.parametrize("name", ["lisa", "badam", "hift", "slimfit"])
def test_every_block_has_its_turn_in_a_long_run(name):
    groups = vit(12)
    schedule = plan(groups, name, total=2000)
    log = run_rules(schedule, random_signals(schedule))
    found = set().union(*(trained(phase) for phase in schedule.phases(log)))
    assert block(groups, *range(12)) <= found


def test_seeds_decide_what_is_drawn_and_nothing_else():
    groups = vit(12)
    for name in sorted(METHODS):
        schedules = [plan(groups, name, seed=seed) for seed in (0, 0, 1)]
        first, same, other = (schedule.phases() for schedule in schedules)
        assert first == same
        drawn = name in ("lisa", "random_order")
        assert ([p.mask for p in first] != [p.mask for p in other]) is drawn, name


@pytest.mark.parametrize(
    ("name", "args", "limit", "note"),
    [
        ("lisa", {}, 6, "6 of 66 sets of 2 blocks (freeze.max_sets)"),
        ("freezeout", {}, 4, "4 of 14 trainable sets (freeze.max_sets)"),
        ("gradual_unfreezing", {"every": "5%"}, 3, "3 of 14 trainable sets (freeze.max_sets)"),
        ("autofreeze", {}, 2, "trainable sets (freeze.max_sets)"),
        ("slimfit", {}, 10, "trainable sets (freeze.max_sets)"),
    ],
)
def test_max_sets_bounds_what_is_compiled_and_says_so(name, args, limit, note):
    groups = vit(12)
    schedule = plan(groups, name, max_sets=limit, **args)
    phases = schedule.phases(run_rules(schedule, random_signals(schedule)))
    assert len({phase.key for phase in phases}) <= limit  # compiled steps, not only sets
    assert note in schedule.approximation
    assert phases[0].start_step == 0 and phases[-1].stop_step == 1000
    if name in ("lisa", "slimfit"):
        found = set().union(*(trained(phase) for phase in phases))
        assert found == set(groups.paths), "a menu leaves no leaf out"


def test_a_menu_too_small_for_every_visit_is_refused():
    message = "freeze.max_sets: freeze_lowest needs {} trainable sets or more to visit every leaf"
    with pytest.raises(ConfigError, match=message.format(10)):
        plan(vit(12), "slimfit", max_sets=9)
    assert plan(vit(12), "slimfit", max_sets=2, every="50%").phases(), "two decisions, two sets"
    (rule,) = plan(vit(12), "slimfit").entries
    for entries in (["head@10%", rule], [{**rule, "first": False}]):
        with pytest.raises(ConfigError, match=message.format(11)):
            make_freeze(vit(12), total_steps=1000, steps_per_epoch=9, phases=entries, max_sets=10)


def test_cut_quantum_lowers_cuts_to_coarser_steps():
    groups = vit(12)
    exact = plan(groups, "freezeout", total=2000).phases()
    coarse = plan(groups, "freezeout", total=2000, cut_quantum=4).phases()
    for step in range(0, 2000, 7):
        cut = next(c for c in range(-1, 13) if trained(at(exact, step)) == above(groups, c))
        assert trained(at(coarse, step)) == above(groups, cut // 4 * 4 if cut > 0 else cut)
    assert len(coarse) == 5  # all, and cuts at 0, 4, 8 and 12; equal neighbours are one phase


ERRORS = [
    ("last_k", {"k": 5}, r"freeze.args.k: 5 should be a whole number of blocks, 1 to 4"),
    ("first_k", {"k": True}, r"freeze.args.k: True"),
    ("surgical", {"start": 2, "stop": 2}, r"freeze.args: blocks start=2 to stop=2"),
    ("surgical", {"always": 3}, r"freeze.args.always: 3 should be a text"),
    ("surgical", {"always": "haed"}, r"freeze.name: surgical: .*no group 'haed' .did you mean"),
    ("layerwise_decay", {"rate": 0}, r"lr_scale: 0 should be a number above 0"),
    ("gradual_unfreezing", {"every": [1]}, r"every: \[1\] should be a number or a whole number or"),
    ("gradual_unfreezing", {"every": "often"}, r"freeze.args.every='often' should be a period"),
    ("gradual_unfreezing", {"cut_frac": 0}, r"freeze.args.cut_frac: 0 should be above 0"),
    ("chain_thaw", {"patience": 0}, r"freeze.args.patience: 0"),
    ("freezeout", {"how": "qubic"}, r"freeze.args.how: 'qubic' .*did you mean 'cubic'"),
    ("freezeout", {"t0": 0.0}, r"freeze.args.t0: 0.0 should be above 0 and at most 1"),
    ("linear_bottom_up", {"level": 1.5}, r"freeze.args.level: 1.5"),
    ("random_order", {"start": 2}, r"freeze.args.start: 2"),
    ("pipetransformer", {"alpha": 0}, r"freeze.args.alpha: 0"),
    ("lisa", {"count": 5}, r"count=5: give 1 to 4 blocks"),
    ("lisa", {"count": "two"}, r"count: 'two' should be a whole number"),
    ("lisa", {"every": 0}, r"every=0 should be a period"),
    ("badam", {"order": "sideways"}, r"order='sideways'"),
    ("hift", {"size": 0}, r"size=0 should be 1 or more"),
    ("autofreeze", {"intervals": 0}, r"freeze.args.intervals: 0"),
    ("autofreeze", {"intervals": 2.5}, r"freeze.args.intervals: 2.5 should be a whole number"),
    ("autofreeze", {"percentile": 120}, r"args.q: 120 should be from 0 to 100"),
    ("autofreeze", {"batches": 0}, r"batches: 0 should be a whole number above 0"),
    ("egeria", {"window": 0}, r"args.window: 0 should be 1 or more"),
    ("auto_snr", {"always": "nothing"}, r"args: no group 'nothing'"),
    ("slimfit", {"share": 1.2}, r"args.share: 1.2 should be from 0 to 1"),
    ("slimfit", {"share": 1.0, "always": ""}, r"the decision leaves nothing to train"),
    ("fish", {"share": 0.0}, r"args.share: 0.0 should be above 0 and at most 1"),
    ("child_tuning", {"variant": "E"}, r"freeze.args.variant: 'E' should be 'F' or 'D'"),
    ("child_tuning", {"variant": "F", "share": 1.5}, r"share=1.5 should be at most 1"),
    ("fish", {"shares": 0.1}, r"freeze.args: .*unexpected keyword argument 'shares'"),
]


@pytest.mark.parametrize(("name", "args", "message"), ERRORS)
def test_a_mistake_is_one_line_that_names_the_key(name, args, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan(vit(4), name, **args)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("freeze.")


MODULES = ["conv/kernel", "conv/bias", "bn/scale", "bn/bias", "dense/kernel", "dense/bias"]
NEED_BLOCKS = {"last_k", "first_k", "surgical", "pipetransformer", "lisa", "badam", "autofreeze"}
NEED_BLOCKS |= {"egeria", "spectrum", "child_tuning"}
NEED_SETS = {"linear_probe", "lp_ft", "chain_thaw", "bitfit", "norm_only", "attention_only"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_model_of_plain_modules_gets_what_fits_it(name):
    groups = make_groups(MODULES, (), COMMON_SETS)
    if name in NEED_BLOCKS | NEED_SETS:
        need = "numbered blocks, .*full fits any" if name in NEED_BLOCKS else "a group '"
        with pytest.raises(ConfigError, match=rf"^freeze.name: {name} needs {need}") as error:
            plan(groups, name, 40, 4)
        assert "\n" not in str(error.value)
        return
    schedule = plan(groups, name, 40, 4)
    phases = schedule.phases(run_rules(schedule, random_signals(schedule)))
    assert (phases[0].start_step, phases[-1].stop_step) == (0, 40)
    seen = set().union(*(trained(phase) for phase in phases))
    left_out = {"bn/scale", "bn/bias"} if name in ("auto_rgn", "auto_snr") else set()
    assert seen == set(MODULES) - left_out


@pytest.mark.parametrize("name", ["linear_bottom_up", "random_order", "reversed_order"])
def test_one_module_leaves_nothing_to_order(name):
    groups = make_groups(["dense/kernel", "dense/bias"], (), COMMON_SETS)
    with pytest.raises(ConfigError, match=f"^freeze.name: {name} needs two units or more"):
        plan(groups, name)
