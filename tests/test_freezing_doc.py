"""docs/freezing.md names every method and every key of a phase, and shows schedules that work."""

import ast
import re
from pathlib import Path

from jft.freeze.entries import PHASE_KEYS
from jft.freeze.groups import make_groups
from jft.freeze.methods import METHODS, make_freeze
from jft.freeze.rules import SIGNALS

TEXT = (Path(__file__).parents[1] / "docs" / "freezing.md").read_text()
PATHS = ["stem/kernel", *(f"block_{i}/kernel" for i in range(6)), "final/norm/scale", "head/kernel"]
GROUPS = (("stem", "stem/.*"), ("block", r"block_(\d+)/.*"), ("final", "final/.*"), ("head", ".*"))


def test_every_method_stands_in_the_table_and_no_other():
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert METHODS.keys() <= named
    assert named - METHODS.keys() <= set(PHASE_KEYS)


def test_every_key_and_signal_is_explained():
    assert all(f"`{key}`" in TEXT for key in PHASE_KEYS if key != "name")
    assert all(f"`{signal}`" in TEXT for signal in SIGNALS)


def test_the_schedules_it_shows_expand():
    groups = make_groups(PATHS, GROUPS)
    shown = re.search(r'freeze.phases="([^"]+)"', TEXT)
    listed = re.search(r"config.freeze.phases = (\[.*?\n\])", TEXT, re.DOTALL)
    assert shown and listed
    for phases in (shown[1], ast.literal_eval(listed[1])):
        plan = make_freeze(groups, total_steps=100, steps_per_epoch=5, phases=phases).phases()
        assert plan[0].start_step == 0 and plan[-1].stop_step == 100
