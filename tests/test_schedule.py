"""Entries, generators, events, rules, bounds and the history of leaves."""

import itertools

import pytest
from freeze_runs import (
    above,
    block,
    leaves,
    random_signals,
    run_rules,
    spans,
    trained,
    vit,
)

from jft.errors import ConfigError
from jft.freeze.masks import make_mask
from jft.freeze.methods import make_freeze
from jft.freeze.phases import Elements
from jft.freeze.schedule import parse_phases


def schedule(phases, depth=4, total=200, epoch=16.0, **kw):
    return make_freeze(vit(depth), total_steps=total, steps_per_epoch=epoch, phases=phases, **kw)


def expand(phases, log=(), **kw):
    return schedule(phases, **kw).phases(log)


# Entries.


def test_the_string_form_takes_generators_with_their_arguments():
    groups = vit(4)
    phases = expand("head@20% | thaw(every=20)@80% | all")
    assert spans(phases) == [(0, 40), (40, 60), (60, 80), (80, 100), (100, 120), (120, 140)] + [
        (140, 160),
        (160, 200),
    ]
    cuts = [4, 3, 2, 1, 0, -1]
    assert [trained(p) for p in phases[1:7]] == [above(groups, cut) for cut in cuts]
    assert phases[7].entered == phases[6].entered, "the same set goes on with its state"
    listed = [
        {"train": "head", "until": "20%"},
        {"generator": "thaw", "every": 20, "until": 0.8},
        {"train": "all"},
    ]
    assert expand(listed) == phases


def test_a_list_may_hold_the_parts_of_the_string_form():
    parts = ["head@30%", "block[-3:] + head@70%", "all"]
    assert expand(parts) == expand(" | ".join(parts))
    assert spans(expand(["head@20%", {"train": "all"}])) == [(0, 40), (40, 200)]


def test_arguments_may_be_given_by_place_and_by_name():
    text = "sample(1, 10, replace=False)"
    entry = {"generator": "sample", "count": 1, "every": 10, "replace": False}
    assert expand(text) == expand([entry])
    assert parse_phases(text)[0] == {**entry, "until": None}
    assert parse_phases("thaw(random, 1ep)")[0]["every"] == "1ep"


def test_marks_within_quotes_and_brackets_belong_to_the_expression():
    groups = vit(4)
    first, last = expand("'blocks_(0|1)/.*' + head@50% | all")
    assert trained(first) == block(groups, 0, 1) | leaves(groups, "head")
    assert (first.stop_step, last.name) == (100, "all")
    text = "rule(signal=fisher, decide=top_elements, args={'share': 0.1, 'always': 'head'})"
    assert parse_phases(f"head@50% | {text}")[1]["args"] == {"share": 0.1, "always": "head"}


def test_a_set_in_brackets_is_not_a_generator():
    (phase,) = expand("bias & (block[0] + head)")
    assert trained(phase) == {p for p in block(vit(4), 0) | {"head/bias"} if p.endswith("/bias")}


def test_a_generator_hands_state_and_rate_to_each_of_its_phases():
    entry = {"generator": "cycle", "every": 50, "state": "reset", "lr_scale": 0.5, "warm_steps": 3}
    phases = expand([entry])
    assert [(p.state, p.lr_scale) for p in phases] == [("reset", 0.5)] * 4
    assert phases[1].ramps == {path: (50, 3) for path in block(vit(4), 0)}


def test_factors_and_curves_are_given_by_set_or_by_leaf():
    scales = {"block[1]": 2.0, "head": 3.0, "head/bias": 5.0}
    (phase,) = expand([{"train": "all", "scales": scales, "anneal": {"embed": 70}}])
    assert phase.scales == {
        **dict.fromkeys(block(vit(4), 1), 2.0),
        "head/kernel": 3.0,
        "head/bias": 5.0,
    }
    assert phase.anneal == dict.fromkeys(leaves(vit(4), "embed"), 70)
    decay = {"name": "depth_decay", "rate": 0.5}
    (phase,) = expand([{"train": "all", "scales": {"block[1]": 2.0}, "lr_scale": decay}])
    assert phase.scales["blocks_1/norm1/bias"] == 2.0 * 0.5**3
    assert phase.lr_scale == 1.0


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("thaw(evry=3)", r"\[0\]: unknown key 'evry' .did you mean 'every'"),
        ("thaw(top_down, 3, 4)", r"has more than 2 arguments"),
        ("thaw(every=soon)", r"every='soon' should be a period"),
        ("thaw(every=-1)", r"every=-1 should be a period"),
        ("thaw(every=0ep)", r"every='0ep' should be a period"),
        ("thaw(order=up)", r"order='up'"),
        ("sample(9)", r"count=9: give 1 to 4 blocks"),
        ("sample(count=two)", r"\[0\].count: 'two' should be a whole number"),
        ("sample(replace=1)", r"\[0\].replace: 1 should be true or false"),
        ("cycle(parts=halves)", r"parts='halves' should be 'units' or 'blocks'"),
        ("cycle(size=0)", r"size=0 should be 1 or more"),
        ("freeze(keep=6)", r"keep=6: the model has 6 units"),
        ("freeze(keep=0)", r"keep=0 would freeze everything; give 1 or more"),
        ([{"generator": "sample", "always": 3}], r"always=3 should be a set expression"),
        ("freeze(begin=early)", r"begin: 'early' should be a number"),
        ("head@40 | thaw(every=5)@30 | all", r"\[1\]: until='30' is step 30; it must be after"),
        ("thaw()@150", r"\[0\]: ends at step 150 but the run has 200 steps"),
        ("thaw() | all", r"\[0\]: 'until' is missing"),
        ([{"generator": "taw"}], r"\[0\]: no generator 'taw' .did you mean 'thaw'"),
        ([3], r"\[0\]: 3 should be a dict"),
        ([{"until": 3}], r"\[0\]: 'train' is missing"),
        ([{"train": "all", "scales": {"block": 0}}], r"\[0\].scales: .* factor above 0"),
        ([{"train": "all", "scales": {"blok": 1}}], r"no group 'blok'"),
        ([{"train": "all", "scales": [1]}], r"\[0\].scales"),
        ([{"train": "all", "anneal": {"block": "late"}}], r"\[0\].anneal: .* step of the run"),
        ([{"train": "all", "anneal": {"block": 0.5}}], r"\[0\].anneal: .* step of the run"),
        ([{"train": {"head": True}}], r"\[0\].train: {'head': True} should be a set expression"),
        ([{"train": {"leaves": ["typo"]}}], r"\[0\].train: .* should be a set expression"),
        (["head", "all"], r"\[0\]: 'until' is missing"),
        ([{"train": "all", "elements": {"kind": "fixed", "share": 0.1}}], r"made by a rule"),
        ([{"train": "all", "elements": {"kind": "bernoulli", "share": 2}}], r"at most 1"),
        ([{"train": "all", "state": "reste"}], r"state: 'reste' .*did you mean 'reset'"),
        ([{"train": "all", "lr_scale": {"name": "decay"}}], r"lr_scale: .*depth_decay"),
        ([{"train": "all", "lr_scale": 10**400}], r"lr_scale: 1000*0 should be a number"),
        ([{"train": "all", "lr_scale": float("inf")}], r"lr_scale: inf should be a number"),
        ("head@1e400 | all", r"\[0\]: until='1e400' should be"),
        ("head@1e400% | all", r"\[0\]: until='1e400%' should be"),
        ("head@1.2.3 | all", r"\[0\]: until='1.2.3' should be"),
        ([{"train": "head", "until": float("inf")}, "all"], r"\[0\]: until=inf should be"),
        ([{"train": "head", "until": 10**400}, "all"], r"\[0\]: until=1000*0 should be"),
        ("sample(2, every=1e999)", r"every=inf should be a period"),
        ([{"train": "all", "warm_steps": 1.5}], r"warm_steps: 1.5 should be a whole number"),
    ],
)
def test_a_wrong_entry_is_named(phases, message):
    with pytest.raises(ConfigError, match=message) as error:
        expand(phases)
    assert str(error.value).startswith("freeze.phases") and "\n" not in str(error.value)


RULE = {"generator": "rule", "signal": "grad_norm", "decide": "at_least", "every": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signal": "grad_nrm"}, r"signal: no signal 'grad_nrm' .did you mean 'grad_norm'"),
        ({"decide": "at_last"}, r"decide: no decide 'at_last' .did you mean 'at_least'"),
        ({"args": 5}, r"args: 5 should be {argument: value}"),
        ({"args": [1]}, r"args: \[1\] should be {argument: value}"),
        ({"args": {3: 1}}, r"args: no argument 3"),
        ({"args": {"bond": 1}}, r"args: no argument 'bond' .did you mean 'bound'"),
        ({"args": {"bound": "high"}}, r"args.bound: 'high' should be a number"),
        ({"args": {"always": "haed"}}, r"args: no group 'haed'"),
        ({"args": {"always": None}}, r"args.always: None should be a text"),
        ({"batches": 0.5}, r"batches: 0.5 should be a whole number"),
        ({"first": "yes"}, r"first: 'yes' should be true or false"),
        ({"every": "often"}, r"every='often' should be a period"),
        ({"every": [20]}, r"every: \[20\] should be a period"),
        ({"signal": "fisher"}, r"signal: at_least cannot use fisher; it takes grad_norm, "),
        ({"decide": "flat_cut"}, r"signal: flat_cut cannot use grad_norm; it takes plasticity"),
        ({"decide": "top_elements"}, r"signal: top_elements cannot use grad_norm; it takes fish"),
        ({"train": "hed"}, r"no group 'hed'"),
    ],
)
def test_a_wrong_rule_is_named_before_anything_runs(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        schedule([{**RULE, **change}]).next_due(0)
    assert "\n" not in str(error.value)


# Generators.


def test_thaw_spreads_over_its_stretch_in_any_order():
    groups = vit(4)
    for order, first in (("top_down", leaves(groups, "norm", "head")), ("bottom_up", None)):
        phases = expand(f"head@80 | thaw({order})")
        assert spans(phases)[1:] == [(n, n + 20) for n in range(80, 200, 20)]
        assert trained(phases[1]) == (first or leaves(groups, "embed"))
        assert trained(phases[-1]) == set(groups.paths)
        for before, after in itertools.pairwise(phases[1:]):
            assert trained(before) < trained(after)
    random = expand("thaw(random)", seed=3)
    assert random == expand("thaw(random)", seed=3) != expand("thaw(random)", seed=4)


def test_freeze_takes_its_times_from_the_stretch():
    groups = vit(4)
    # Units 0..4 of 6 at (i / 6) ** 2 of 180 steps after step 20: 0, 5, 20, 45, 80.
    phases = expand("head@20 | freeze(power=2.0)")
    assert spans(phases) == [(0, 20), (20, 25), (25, 40), (40, 65), (65, 100), (100, 200)]
    assert [trained(p) for p in phases[1:]] == [above(groups, cut) for cut in range(5)]


def test_more_units_than_steps_come_together():
    groups = vit(12)
    phases = expand("thaw()", depth=12, total=3)
    assert spans(phases) == [(0, 1), (1, 2), (2, 3)]
    assert trained(phases[-1]) == set(groups.paths)
    # Unit k of 14 comes in at (k - 1) / 14 of 3 steps, rounded: 3 at step 0, 7 at step 1.
    assert [trained(p) for p in phases[:2]] == [above(groups, 10), above(groups, 6)]


def test_a_cycle_without_a_period_is_one_sweep():
    phases = expand("cycle(parts=blocks, always=head)", total=10)
    assert spans(phases) == [(0, 3), (3, 5), (5, 8), (8, 10)]
    for b, phase in enumerate(phases):
        assert trained(phase) == block(vit(4), b) | leaves(vit(4), "head")


def test_a_sample_without_replacement_draws_each_block_before_any_again():
    phases = expand("sample(count=1, every=5, replace=False, always='')")
    order = [phase.name for phase in phases for _ in range(phase.start_step, phase.stop_step, 5)]
    sweeps = [order[n : n + 4] for n in range(0, 40, 4)]
    assert all(len(set(sweep)) == 4 for sweep in sweeps)
    pairs = expand("sample(count=3, every=5, replace=False)", total=4000)
    for phase in pairs:  # what is left of a sweep goes with blocks of the next, not with itself
        assert sum(block(vit(4), b) <= trained(phase) for b in range(4)) == 3
    counts = [
        sum(p.stop_step - p.start_step for p in pairs if block(vit(4), b) <= trained(p))
        for b in range(4)
    ]
    assert max(counts) - min(counts) <= 5, counts  # one draw


def test_a_menu_that_cannot_hold_every_block_is_refused():
    with pytest.raises(ConfigError, match="freeze.max_sets: 12 blocks by 2 need 6 sets or more"):
        expand("sample(2)", depth=12, max_sets=5)
    made = schedule("sample(2)", depth=12, max_sets=6, total=4000)
    assert len({frozenset(trained(p)) for p in made.phases()}) == 6
    said, _, menu = made.approximation.partition(": ")
    assert said == "6 of 66 sets of 2 blocks (freeze.max_sets)"
    assert set(menu.split(" | ")) == {phase.name for phase in made.phases()}
    assert schedule("sample(1)", max_sets=4).approximation == ""


def test_the_sets_that_are_kept_are_spread_and_the_nearest_stands_in():
    groups = vit(4)
    made = schedule("thaw()", total=60, max_sets=3)  # of cuts 4 3 2 1 0 -1: first, third, last
    phases = made.phases()
    said, _, menu = made.approximation.partition(": ")
    assert said == "3 of 6 trainable sets (freeze.max_sets)"
    assert menu == "final + head | block[2:] + final + head | all"
    assert [trained(p) for p in phases] == [above(groups, 4), above(groups, 2), above(groups, -1)]
    # Cut 3 differs from 4 and from 2 in one block: the earlier; cut 1 is nearer to 2 than to all.
    assert spans(phases) == [(0, 20), (20, 40), (40, 60)]
    with pytest.raises(ConfigError, match="freeze.max_sets: 0 should be 1 or more"):
        schedule("all", max_sets=0)


# Events.


def values(metric, *pairs):
    return [{"step": step, "metric": metric, "value": value} for step, value in pairs]


def test_a_plateau_ends_a_phase_at_the_evaluation_that_shows_it():
    made = schedule("head@plateau(2) | all")
    assert made.watched == ["eval/loss"]
    assert spans(made.phases()) == [(0, 100), (100, 200)], "at the latest after an equal share"
    falling = values("eval/loss", (10, 3.0), (20, 2.0), (30, 1.0))
    assert spans(made.phases(falling)) == [(0, 100), (100, 200)]
    flat = [*falling, *values("eval/loss", (40, 1.0), (50, 1.2))]
    assert spans(made.phases(flat)) == [(0, 50), (50, 200)]
    later = [*flat, *values("eval/loss", (60, 0.1), (70, 0.1))]
    assert spans(made.phases(later)) == [(0, 50), (50, 200)], "what comes later changes nothing"


def test_a_better_value_starts_the_count_again():
    made = schedule("head@plateau(2) | all")
    log = values("eval/loss", (10, 1.0), (20, 2.0), (30, 0.5), (40, 0.6), (50, 0.5), (60, 9.0))
    assert spans(made.phases(log)) == [(0, 50), (50, 200)]


def test_a_metric_other_than_a_loss_should_rise():
    made = schedule("head@plateau(1, eval/accuracy) | all")
    assert made.watched == ["eval/accuracy"]
    log = values("eval/accuracy", (10, 0.5), (20, 0.6), (30, 0.6))
    assert spans(made.phases(log)) == [(0, 30), (30, 200)]
    assert spans(made.phases(values("eval/loss", (10, 1.0), (20, 1.0)))) == [(0, 100), (100, 200)]


def test_a_trigger_waits_for_its_bound():
    for text, value, stop in (
        ("eval/accuracy >= 0.9", 0.9, 20),
        ("eval/accuracy >= 0.9", 0.89, 100),
        ("eval/loss <= 1e-2", 0.01, 20),
        ("eval/loss<=0.5", 0.51, 100),
    ):
        metric = text.split("<")[0].split(">")[0].strip()
        made = schedule([{"train": "head", "until": text}, "all"])
        assert made.phases(values(metric, (20, value)))[0].stop_step == stop, text


def test_an_event_may_have_a_latest_end():
    made = schedule("head@plateau(2) or 30% | all")
    assert made.phases()[0].stop_step == 60
    flat = values("eval/loss", (10, 1.0), (20, 1.0), (30, 1.0))
    assert made.phases(flat)[0].stop_step == 30
    late = values("eval/loss", (50, 1.0), (60, 1.0), (70, 1.0))
    assert schedule("head@plateau(2) or 30% | all").phases(late)[0].stop_step == 60
    relative = schedule("head@10 | block[3] + head@plateau(2) or +2ep | all").phases()
    assert relative[1].stop_step == 42


def test_an_event_cuts_a_generator_off_and_leaves_what_was_before_it():
    for text in ("thaw()", "freeze(power=2)", "cycle()", "sample(1, every=7)"):
        made = schedule(f"{text}@plateau(1) or 50% | all")
        before = made.phases()
        seen = values("eval/loss", (10, 1.0), (40, 1.0))
        after = schedule(made.entries).phases(seen)
        assert after[-1].start_step == 40 and after[-1].stop_step == 200, text
        kept = [phase for phase in before if phase.start_step < 40]
        assert [p.mask for p in after[:-1]] == [p.mask for p in kept], text
        assert [p.entered for p in after[:-1]] == [p.entered for p in kept], text
        assert [p.stop_step for p in after[:-1]] == [min(p.stop_step, 40) for p in kept], text
        assert all(phase.event == "plateau(1)" for phase in after[:-1]), text


def test_each_phase_counts_its_own_evaluations():
    made = schedule("head@plateau(1) | block[3:] + head@plateau(1) | all")
    log = values("eval/loss", (10, 1.0), (20, 1.0))
    assert spans(made.phases(log)) == [(0, 20), (20, 110), (110, 200)]
    log += values("eval/loss", (30, 5.0), (40, 5.0))
    assert spans(schedule(made.entries).phases(log)) == [(0, 20), (20, 40), (40, 200)]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("head@plateau(0) | all", "a patience is 1 or more"),
        ("head@plateau(x) | all", r"\[0\]: until='plateau\(x\)' should be"),
        ("head@eval/loss >= low | all", r"\[0\]: until="),
        ("head@eval/loss >= 0.9.1 | all", r"\[0\]: until='eval/loss >= 0.9.1' should be"),
        ("head@plateau(2) or never | all", r"\[0\]: until='never' should be"),
        ("head@plateau(2)", "the last phase lasts to the run's end"),
        ("head@plateau(2) or 50%", "the last phase lasts to the run's end"),
    ],
)
def test_a_wrong_event_is_named(phases, message):
    with pytest.raises(ConfigError, match=message):
        expand(phases)


# Rules.


def test_a_rule_decides_within_its_stretch_only():
    groups = vit(4)
    made = schedule(
        [
            {"train": "head", "until": 15},
            {**RULE, "until": 50, "args": {"always": "head"}},
            {"train": "all"},
        ]
    )
    assert made.next_due(0)[0] == 25 and made.next_due(25)[0] == 35 and made.next_due(45) is None
    log = run_rules(made, lambda due: dict.fromkeys(block(groups, due.step // 10), 1.0))
    assert [record["step"] for record in log] == [25, 35, 45]
    phases = made.phases(log)
    head = leaves(groups, "head")
    assert spans(phases) == [(0, 15), (15, 25), (25, 35), (35, 45), (45, 50), (50, 200)]
    assert trained(phases[1]) == set(groups.paths)
    assert trained(phases[2]) == block(groups, 2) | head
    assert trained(phases[3]) == block(groups, 3) | head
    assert trained(phases[4]) == head, "no block reaches the bound"
    assert {p.entered["head/bias"] for p in phases} == {"0"}


def test_a_decision_that_changes_nothing_makes_no_phase():
    made = schedule([{**RULE, "args": {"always": ""}}])
    log = run_rules(made, lambda due: dict.fromkeys(vit(4).paths, 1.0))
    assert len(log) == 19 and spans(made.phases(log)) == [(0, 200)]
    made = schedule([{**RULE, "state": "reset", "args": {"always": ""}}])
    log = run_rules(made, lambda due: dict.fromkeys(vit(4).paths, 1.0))
    phases = made.phases(log)
    assert spans(phases) == [(n, n + 10) for n in range(0, 200, 10)], "but with a reset it does"
    assert len({phase.key for phase in phases}) == 1


def test_another_choice_of_elements_begins_a_phase_though_the_leaves_are_the_same():
    entry = {**RULE, "signal": "fisher", "decide": "top_elements", "every": 20}
    made = schedule([{**entry, "args": {"share": 0.1}}], total=60)
    log = run_rules(made, lambda due: {})
    assert spans(made.phases(log)) == [(0, 20), (20, 40), (40, 60)]
    assert len({phase.key for phase in made.phases(log)[1:]}) == 1


def test_a_rule_trains_nothing_that_it_may_not_choose_from():
    groups = vit(4)
    entry = {**RULE, "signal": "grad_change", "decide": "percentile_cut", "train": "all - norm"}
    made = schedule([entry], total=60)
    blocks = [block(groups, n) for n in range(4)]

    def measure(due):  # the first block never changes, the others ever more
        return {p: 1.0 + due.step * at for at, paths in enumerate(blocks) for p in paths}

    log = run_rules(made, measure)
    norms = {path for path in groups.paths if "/norm" in path or path.startswith("norm/")}
    chosen = [trained(phase) for phase in made.phases(log)]
    assert len(chosen) > 1 and not any(norms & leaves for leaves in chosen)


def test_periods_that_are_no_whole_number_of_steps_do_not_drift():
    made = schedule([{**RULE, "every": "1ep"}], total=25, epoch=2.5)
    log = run_rules(made, lambda due: dict.fromkeys(vit(4).paths, 1.0))
    assert [record["step"] for record in log] == [3, 5, 8, 10, 13, 15, 18, 20, 23]
    phases = expand("sample(1, every=1ep)", total=25, epoch=2.5)
    assert {phase.stop_step for phase in phases} <= {3, 5, 8, 10, 13, 15, 18, 20, 23, 25}
    assert [p.stop_step for p in expand("cycle(every=1ep)", total=10, epoch=2.5)] == [3, 5, 8, 10]


def test_at_least_one_leaf_trains_whatever_is_measured():
    made = schedule([{**RULE, "args": {"always": "", "exclude": "head"}, "every": 100}])
    values_ = dict.fromkeys(vit(4).paths, 0.1) | {"norm/scale": 0.2, "head/bias": 0.9}
    log = run_rules(made, lambda due: values_)
    assert trained(made.phases(log)[-1]) == {"norm/scale"}


def test_what_a_rule_may_choose_next_is_known_ahead():
    groups = vit(4)
    entry = {"generator": "rule", "signal": "grad_change", "decide": "percentile_cut", "every": 10}
    made = schedule([entry])
    likely = made.likely([], 5)
    assert [trained(phase) for phase in likely] == [above(groups, cut) for cut in (1, 2, 3)]
    log = [{"step": 10, "entry": 0, "train": "block[2:] + final + head", "values": {}}]
    assert [trained(p) for p in made.likely(log, 12)] == [above(groups, 3)]
    made = schedule([{**entry, "signal": "plasticity", "decide": "flat_cut"}])
    assert [trained(p) for p in made.likely([], 5)] == [above(groups, 1)]
    found = [trained(p) for p in made.likely(log, 12)]
    assert found == [above(groups, 3), set(groups.paths)], "it may also thaw"


def test_nothing_is_likely_after_the_last_decision():
    entry = {"generator": "rule", "signal": "grad_change", "decide": "percentile_cut", "every": 10}
    made = schedule([entry])
    assert made.next_due(189) and made.likely([], 189)
    assert made.next_due(190) is None and not made.likely([], 190)
    once = schedule([{k: v for k, v in entry.items() if k != "every"}])
    assert not once.likely([], 0)
    # What may follow begins where it is decided, not at once: its length tells what a cache saves.
    assert {phase.start_step for phase in made.likely([], 5)} == {10}


def test_an_event_ends_a_rule_too_and_says_so():
    entry = {"generator": "rule", "signal": "grad_norm", "decide": "at_least", "every": 10}
    made = schedule([{**entry, "until": "plateau(2) or 50%"}, "all"])
    assert made.phases()[0].event == "grad_norm or plateau(2)"
    assert made.spans.all() == [(0, 100), (100, 200)]
    losses = [{"step": step, "metric": "eval/loss", "value": 1.0} for step in (20, 40, 60)]
    assert made.spans.all(losses) == [(0, 60), (60, 200)]


def test_an_event_without_an_end_leaves_room_for_the_ends_that_are_stated():
    made = schedule("head@plateau(5) | block[-2:] + head@30% | all")
    assert made.spans.all() == [(0, 30), (30, 60), (60, 200)]
    made = schedule("head@plateau(5) | block[-2:] + head@plateau(3) or 50% | all")
    assert made.spans.all() == [(0, 50), (50, 100), (100, 200)]
    made = schedule("head@plateau(5) | block[-2:] + head@+10 | all")
    assert made.spans.all() == [(0, 66), (66, 76), (76, 200)]


def test_the_first_visits_of_every_leaf_are_foreseen_before_anything_is_measured():
    entry = {"generator": "rule", "signal": "rel_update", "decide": "freeze_lowest", "every": 10}
    made = schedule([{**entry, "first": True}], total=400)
    foreseen = made.foreseen()
    log = run_rules(made, random_signals(made))
    real = made.phases(log)
    free = sum(make_mask("all - bias - head", made.groups).values())
    visits = free // (free - int(0.9 * free))
    assert len(foreseen) == visits >= 8
    assert [p.mask for p in foreseen] == [p.mask for p in real[:visits]]
    assert [p.key for p in foreseen] == [p.key for p in real[:visits]]
    assert made.likely(log[:4], 35)[-1].mask == real[4].mask
    later = schedule(made.entries, total=400).foreseen(log)
    assert [p.mask for p in later] == [p.mask for p in real], "then only what is in the log"


def test_a_choice_of_elements_is_planned_where_it_is_due_at_once():
    entry = {"generator": "rule", "signal": "fisher", "decide": "top_elements"}
    (phase,) = expand([{**entry, "args": {"share": 0.1}}])
    assert phase.elements == Elements("fixed", 0.1)
    (phase,) = expand([{**entry, "every": 10}])
    assert phase.elements is None, "until the first decision everything trains"


def test_a_bounded_set_has_one_compiled_step_at_every_visit():
    for text, limit in (("sample(2, every=5)", 4), ("cycle(every=5, size=2)", 3)):
        phases = expand(text, max_sets=limit)
        assert len(phases) > 20 and len({phase.key for phase in phases}) <= limit, text
    unbounded = expand("sample(2, every=5)")
    assert len({p.key for p in unbounded}) > len({str(sorted(trained(p))) for p in unbounded})


# The history of leaves.


def test_leaves_that_left_at_different_phases_never_share_a_token_again():
    park = {"state": "park"}
    phases = expand(
        [
            {"train": "all", "until": 20},
            {"train": "all - embed", "until": 40, **park},
            {"train": "all - embed - block[0]", "until": 60, **park},
            {"train": "head", "until": 80, **park},
            {"train": "all", **park},
        ]
    )
    last = phases[-1].entered
    tokens = {
        "embed": {last[p] for p in leaves(vit(4), "embed")},
        "block 0": {last[p] for p in block(vit(4), 0)},
        "blocks": {last[p] for p in block(vit(4), 1, 2, 3) | leaves(vit(4), "norm")},
        "head": {last[p] for p in leaves(vit(4), "head")},
    }
    assert all(len(own) == 1 for own in tokens.values()), "equal history, one token"
    assert len(set().union(*tokens.values())) == 4, "unequal history, different tokens"
    assert tokens["head"] == {"0"}
    assert len(phases[-1].cohorts) == 4


def test_what_comes_back_from_the_park_is_not_what_stayed():
    park = {"state": "park"}
    phases = expand(
        [
            {"train": "head + block[0]", "until": 20},
            {"train": "head + block[1]", "until": 40, **park},
            {"train": "head + block[0] + block[1]", "until": 60, **park},
            {"train": "all", **park},
        ]
    )
    zero, one = "blocks_0/norm1/bias", "blocks_1/norm1/bias"
    assert phases[2].entered[one] == phases[1].entered[one]
    tokens = {phases[2].entered[path] for path in (zero, one, "head/bias")}
    assert len(tokens) == 3
    assert phases[2].entered[zero] != phases[0].entered[zero], "it has a counter of its own"
    assert phases[3].entered[zero] == phases[2].entered[zero]


def test_without_a_park_what_left_starts_anew():
    phases = expand("head + block[0]@20 | head@40 | head + block[0:2]")
    fresh = {phases[2].entered[p] for p in block(vit(4), 0, 1)}
    assert fresh == {"2"}, "what comes back and what comes new are one cohort"


def test_a_phase_that_keeps_empties_the_park():
    phases = expand(
        [
            {"train": "head + block[0]", "until": 20},
            {"train": "head", "until": 40, "state": "park"},
            {"train": "head + norm", "until": 60},
            {"train": "head + norm + block[0]", "state": "park"},
        ]
    )
    rest = block(vit(4), 0) - {p for p in vit(4).paths if "/norm" in p}
    assert {phases[3].entered[path] for path in rest} == {"3"}


def test_a_reset_makes_all_history_equal():
    phases = expand(
        [
            {"train": "head", "until": 20},
            {"train": "block[3] + head", "until": 40},
            {"train": "all", "state": "reset"},
        ]
    )
    assert len(phases[1].cohorts) == 2
    assert set(phases[2].entered.values()) == {"2"} and len(phases[2].cohorts) == 1


def test_leaves_that_come_back_at_different_phases_do_not_share_a_token():
    park = {"state": "park"}
    phases = expand(
        [
            {"train": "head + block[0] + block[1]", "until": 20},
            {"train": "head", "until": 40, **park},
            {"train": "head + block[0]", "until": 60, **park},
            {"train": "head + block[0] + block[1]", **park},
        ]
    )
    first, last = phases[0].entered, phases[3].entered
    zero, one = "blocks_0/norm1/bias", "blocks_1/norm1/bias"
    assert first[zero] == first[one]
    assert last[zero] != last[one], "one of them has trained 20 steps more"
    assert len(phases[3].cohorts) == 3
