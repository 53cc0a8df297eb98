"""Runs that train from the cached outputs of a frozen prefix: equal to those that do not."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import fault_run
import numpy as np
import pytest
from fault_run import Stop, stop_at

from jft import fit, setup
from jft.config import load_config
from jft.errors import ConfigError, DataError
from jft.report.writers import RunWriter
from jft.train import loop
from jft.train.feed import Feed

pytestmark = pytest.mark.usefixtures("quick")

PHASES = "head@16 | block[-1:] + final + head@20 | all"
LINE = [
    "model.args.depth=2",
    "data.val_fraction=0.02",
    "data.test_fraction=0.02",
    f"freeze.phases={PHASES}",
    "train.steps=24",
    "augment.crop=random_resized",
    "optim.name=sgd",
    "parallel.devices=1",
    "checkpoint.every_steps=3",
    "log.tensorboard=False",
    "eval.every_steps=12",
]


DEEP = "model.args.depth=4"  # where more than two cuts are asked for
FIXED = ("freeze.views=2", "freeze.cache=on")
TIER = "jft.freeze.entry_store.Room.tier"


@pytest.fixture
def messages(monkeypatch):
    said = []
    monkeypatch.setattr(RunWriter, "message", lambda _, text: said.append(text))
    return said


def run_of(workdir, *overrides):
    return setup(load_config("configs/digits_vit.py:tiny", [*LINE, *overrides]), workdir)


def leaves(outcome):
    return {path: np.asarray(leaf) for path, leaf in outcome.params.items()}


def assert_close(found, wanted, bar):
    for path, leaf in wanted.items():
        scale = max(float(np.max(np.abs(leaf))), 1e-3)
        assert np.max(np.abs(found[path] - leaf)) <= bar * scale, path


def kill(monkeypatch, workdir, step, *line):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop):
            fit(run_of(workdir, *line))


def assert_same_run(workdir, straight):
    rows = [fault_run.logged_rows(folder) for folder in (workdir, straight)]
    assert rows[0] == rows[1]
    infos = [fault_run.last_step(folder).info for folder in (workdir, straight)]
    assert infos[0]["caches"] == infos[1]["caches"]


@pytest.fixture(scope="module")
def uncached(tmp_path_factory):
    return leaves(fit(run_of(tmp_path_factory.mktemp("uncached"), "freeze.views=2")))


@dataclass
class Cached:
    """A whole run from the entries on one tier; `files`: how many lay on the disk at each step."""

    workdir: Path
    leaves: dict
    messages: list
    files: list


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """tier -> Cached; tests only read it."""

    @functools.cache
    def run(tier):
        workdir, said, files = tmp_path_factory.mktemp(tier), [], []
        plain = loop._Trainer.update

        def update(trainer):
            files.append(len(list(workdir.rglob("*.entries"))))
            plain(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunWriter, "message", lambda _, text: said.append(text))
            patch.setattr(TIER, lambda *_: tier)
            patch.setattr(loop._Trainer, "update", update)
            return Cached(workdir, leaves(fit(run_of(workdir, *FIXED))), said, files)

    return run


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_cached_run_equals_the_one_that_takes_the_same_views(tier, uncached, cached):
    run = cached(tier)
    assert sum("cache filled" in text for text in run.messages) == 2
    assert not [text for text in run.messages if "warning" in text]
    assert set(fault_run.last_step(run.workdir).info["caches"].values()) == {tier}
    assert not list(run.workdir.rglob("*.entries")), "a finished run has no use for them"
    assert_close(run.leaves, uncached, 1e-5)


@pytest.mark.parametrize("step", [5, 19])
def test_a_killed_cached_run_keeps_its_choice_and_ends_bitwise_equal(
    step, cached, tmp_path, monkeypatch
):
    kill(monkeypatch, tmp_path, step, *FIXED)
    chosen = {"0:4": "device", "1:2": "device"}
    assert fault_run.last_step(tmp_path).info["caches"] == chosen
    monkeypatch.setattr(TIER, lambda *_: "host")  # a resumed run would choose otherwise
    fault_run.assert_same_leaves(leaves(fit(run_of(tmp_path, *FIXED))), cached("device").leaves)
    assert_same_run(tmp_path, cached("device").workdir)


RULED = [
    {"generator": "rule", "signal": "grad_change", "decide": "percentile_cut", "every": 3}
    | {"batches": 1, "until": 12},
    "head@15",
    "block[-1:] + final + head",
]


RULED_LINE = (*FIXED, f"freeze.phases={json.dumps(RULED)}", "train.steps=16")


@pytest.fixture(scope="module")
def ruled_straight(tmp_path_factory):
    """(directory, leaves) of a run whose cuts a rule finds; tests only read it."""
    workdir = tmp_path_factory.mktemp("ruled")
    found = leaves(fit(run_of(workdir, *RULED_LINE)))
    phases = json.loads((workdir / "plan.json").read_text())["phases"]
    assert len(phases) > len(RULED), "the rule found no cut: this shows nothing"
    return workdir, found


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 11, 14])
def test_a_killed_cached_run_whose_cuts_a_rule_finds_ends_bitwise_equal(
    step, ruled_straight, tmp_path, monkeypatch
):
    workdir, straight = ruled_straight
    kill(monkeypatch, tmp_path, step, *RULED_LINE)
    fault_run.assert_same_leaves(leaves(fit(run_of(tmp_path, *RULED_LINE))), straight)
    assert_same_run(tmp_path, workdir)


def test_auto_says_why_it_does_not(tmp_path, messages):
    fit(run_of(tmp_path, "freeze.cache=auto", "freeze.phases=head", "train.steps=1"))
    said = [text for text in messages if text.startswith("cache below")]
    assert said and all("freeze.views=K allows it" in text for text in said)


def test_on_without_fixed_views_is_refused_with_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match="set freeze.views=K or switch augmentation off"):
        fit(run_of(tmp_path, "freeze.cache=on"))


def test_phases_with_one_cut_share_their_entries_and_the_decision(tmp_path, messages):
    phases = f"head@4 | {PHASES}"
    fit(run_of(tmp_path, "freeze.views=2", "freeze.cache=auto", f"freeze.phases={phases}"))
    said = [text for text in messages if text.startswith("cache below")]
    assert len(said) == 2 and ": yes, " in said[0] and "16 steps save" in said[0]
    filled = [text for text in messages if text.startswith("cache filled")]
    assert len(filled) == sum(": yes, " in text for text in said)


def test_what_lies_on_the_disk_for_a_shallower_cut_goes_once_the_deeper_is_filled(cached):
    assert cached("disk").files == [1] * 20 + [0] * 4


def full(*_, **__):
    raise DataError("no space left; or freeze.cache=off with --resume=force")


def short(*_, **__):
    raise MemoryError("3 GiB asked for\nand more")


def test_a_cache_that_cannot_be_filled_is_given_up_under_auto(
    uncached, tmp_path, monkeypatch, messages
):
    monkeypatch.setattr("jft.train.inputs.fill_cache", full)
    found = leaves(fit(run_of(tmp_path, "freeze.views=2", "freeze.cache=auto")))
    assert [text for text in messages if text.startswith("warning: no cache: no space left")]
    assert set(fault_run.last_step(tmp_path).info["caches"].values()) == {""}
    fault_run.assert_same_leaves(found, uncached)


@pytest.mark.parametrize(
    ("fill", "words"),
    [(full, "no space left"), (short, "^freeze.cache: 3 GiB asked for; auto does without it")],
)
def test_a_cache_that_cannot_be_filled_ends_a_run_that_must_have_it(
    fill, words, tmp_path, monkeypatch
):
    monkeypatch.setattr("jft.train.inputs.fill_cache", fill)
    with pytest.raises(DataError, match=words):
        fit(run_of(tmp_path, *FIXED, "freeze.phases=head", "train.steps=2"))


def test_on_is_refused_for_a_model_that_does_not_run_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("jft.caching.runs_in_parts", lambda _: False)
    with pytest.raises(ConfigError, match="freeze.cache: 'on' needs a model whose apply takes"):
        run_of(tmp_path, "freeze.views=1", "freeze.cache=on")
    assert run_of(tmp_path, "freeze.views=1", "freeze.cache=auto").inputs is not None


def test_the_reference_sees_the_views_that_a_cached_run_sees(uncached, tmp_path):
    found = leaves(fit(run_of(tmp_path, *FIXED, "freeze.enforce=optax")))
    assert_close(found, uncached, 1e-4)


AUTOFREEZE = [DEEP, "freeze.name=autofreeze", "freeze.phases=None", "freeze.args.intervals=4"]
FIRST_CUT = {"step": 8, "entry": 0, "train": "block[1:] + final + head", "values": {}}


@pytest.fixture
def ruled(tmp_path):
    """A run of AutoFreeze that caches by its costs."""
    return run_of(tmp_path, *AUTOFREEZE, "freeze.views=1", "freeze.cache=auto", "train.steps=1000")


def choices(run, log, step, chosen, phases):
    """What the phases of a schedule read for a run at `step`, chosen in turn."""
    feed, known = Feed(run, step, chosen, lambda _: None), run.freeze.phases(log)
    return [feed.choose(phase, known) for phase in phases], feed.chosen


def test_what_is_only_likely_is_neither_kept_nor_told_nor_refused(ruled, monkeypatch):
    likely = ruled.freeze.likely([], 0)
    assert len(likely) == 3
    found, chosen = choices(ruled, [], 0, {}, likely)
    assert chosen == {} and not any(each.text for each in found)
    # 750 of 1,000 steps are worth a cache, but not so the last five.
    assert {each.kind for each in found} == {"cache"}
    late = [{**FIRST_CUT, "step": 995}]
    (found,), chosen = choices(ruled, late, 995, {}, ruled.freeze.phases(late)[-1:])
    assert found.kind == "views" and "5 steps save" in found.text
    assert list(chosen.values()) == [""]
    monkeypatch.setattr(TIER, lambda *_: None)
    object.__setattr__(ruled.inputs, "mode", "on")
    ruled.inputs._memo.follow(())
    assert choices(ruled, [], 0, {}, likely)[1] == {}
    cut = ruled.freeze.phases(late[:1])[-1:]
    with pytest.raises(ConfigError, match="fit neither device, host nor disk"):
        choices(ruled, late, 995, {}, cut)


@pytest.mark.parametrize(
    ("tail", "divided"),
    [
        (["head@15", "block[-1:] + final + head"], [(2,), (2, 5), (2, 3)]),
        (["block[-1:] + final + head@15", "head"], [(2,), (2, 3), (2, 3, 5)]),
    ],
)
def test_a_resumed_run_divides_the_prefix_as_the_one_that_went_on(tail, divided, tmp_path):
    phases = json.dumps([RULED[0], *tail])
    line = (f"freeze.phases={phases}", "model.args.depth=3", "freeze.views=1", "freeze.cache=on")
    live, log, chosen = run_of(tmp_path / "live", *line), [], {}
    for record in ({"step": 3, "entry": 0, "values": {}}, {**FIRST_CUT, "step": 6}):
        at = record["step"] - 3
        everything = [*live.freeze.phases(log), *live.freeze.likely(log, at)]
        chosen = choices(live, log, at, chosen, everything)[1]
        log.append(record)
    runs = {}
    for at, cuts in zip((6, 12, 15), divided, strict=True):
        # What a resumed run asks first is about all that follows; see CompiledSteps.ahead.
        resumed = run_of(tmp_path / f"resumed{at}", *line)
        runs[at] = resumed, choices(resumed, log, at, chosen, live.freeze.phases(log))[1]
        phase = [live.freeze.at(at, log)]
        (found,), chosen = choices(live, log, at, chosen, phase)
        assert found.cuts == cuts
        for start, (run, kept) in runs.items():
            (found,), kept = choices(run, log, at, kept, phase)
            runs[start] = run, kept
            assert (found.cuts, kept) == (cuts, chosen), f"resumed at {start}"


def test_a_set_that_is_foreseen_may_have_a_prefix(tmp_path):
    line = (DEEP, "freeze.name=slimfit", "freeze.phases=None", "freeze.args.always=head")
    run = run_of(tmp_path, *line, "freeze.views=1", "freeze.cache=auto", "train.steps=200")
    foreseen = run.freeze.foreseen()
    assert any(run.inputs._cut(phase) and phase.index > 1 for phase in foreseen)
    found, chosen = choices(run, [], 0, {}, foreseen)
    assert chosen == {} and len(found) == len(foreseen)


def test_on_without_fixed_views_is_refused_before_a_rule_has_decided(tmp_path):
    line = (*AUTOFREEZE, "model.args.depth=2", "freeze.cache=on", "train.steps=40")
    with pytest.raises(ConfigError, match="set freeze.views=K or switch augmentation off"):
        fit(run_of(tmp_path, *line))
    assert not list((tmp_path / "checkpoints").glob("*")), "it was to stop before the first save"


def test_a_cache_that_is_given_up_is_nobodys_input(tmp_path):
    phases = "block[1:] + final + head@200 | head@300 | all"
    line = (
        DEEP,
        f"freeze.phases={phases}",
        "freeze.views=1",
        "freeze.cache=auto",
        "train.steps=400",
    )
    run = run_of(tmp_path, *line)
    known = run.freeze.phases()
    feed = Feed(run, 0, {}, lambda _: None)
    assert [feed.choose(phase, known).cuts for phase in known] == [(2,), (2, 6), ()]
    run.inputs.drop(known[0], feed.chosen)
    assert [feed.choose(phase, known).cuts for phase in known] == [(), (6,), ()]
