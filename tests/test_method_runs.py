"""Every freezing method by its name alone, end to end: what it saves, what moves and what does not.

The trainer itself compares each compiled step with its plan, hashes what is frozen, and names what
was to train and did not move; here its word is asked for, and checked against the files.
"""

import json
import os
import re

import fault_run
import numpy as np
import pytest

from jft import fit, setup
from jft.config import load_config
from jft.errors import ConfigError
from jft.freeze.methods import METHODS
from jft.report.writers import RunWriter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]

SHORT = os.environ.get("JFT_FAULTS") == "short"
# model -> (config, what is changed in it)
CONFIGS = {
    "vit": ("configs/digits_vit.py:tiny", []),
    "efficientnet": ("configs/quickstart.py:tiny", []),
    **{
        name: ("configs/quickstart.py:tiny", [f"model.name={name}_tiny"])
        for name in ("resnet", "swin", "convnext", "dinov2", "clip", "siglip")
    },
}
# The compiler may compute depthwise products anew for each reader. In a wide network, as the
# published ones are, they are few beside the others.
CONFIGS["convnext"][1].extend(["model.args.widths=[192, 256]", "model.args.depths=[1, 1]"])
# Convolutional networks have no attention; everything else fits them.
LEFT_OUT = {(name, "attention_only") for name in ("efficientnet", "resnet", "convnext")}
# What the others run in the short form, beside what does not fit them.
IN_SHORT = {"efficientnet": "lp_ft", "resnet": "bitfit", "swin": "gradual_unfreezing"}
ELEMENTWISE = ("child_tuning", "fish", "saft")
CASES = [
    (model, name)
    for model in CONFIGS
    for name in METHODS
    if not SHORT or model == "vit" or name == IN_SHORT.get(model) or (model, name) in LEFT_OUT
]


@pytest.fixture
def messages(monkeypatch):
    said = []
    monkeypatch.setattr(RunWriter, "message", lambda _, text: said.append(text))
    return said


def config_of(model, name):
    path, changed = CONFIGS[model]
    if model == "vit" and SHORT:
        changed = ["model.args.depth=3"]
    return load_config(path, [f"freeze.name={name}", "parallel.devices=1", *changed])


@pytest.mark.parametrize(("model", "name"), CASES, ids=[f"{m}-{n}" for m, n in CASES])
def test_a_method_runs_by_its_name_and_saves_what_its_plan_says(model, name, tmp_path, messages):
    config = config_of(model, name)
    if (model, name) in LEFT_OUT:
        with pytest.raises(ConfigError, match=f"freeze.name: {name} needs") as error:
            setup(config, tmp_path)
        assert error.value.exit_code == 2 and "\n" not in str(error.value)
        return
    run = setup(config, tmp_path)
    start = run.start()[0]
    outcome = fit(run)
    assert outcome.exit_code == 0 and outcome.step == run.total_steps
    compared = [text for text in messages if text.startswith("step of phase")]
    assert compared and all(" planned (" in text for text in compared)
    assert not [text for text in messages if "warning" in text]
    for text in compared:  # nor less: then the plan would promise too little
        assert float(re.search(r"planned \(([+-][0-9.]+)%\)", text)[1]) > -5, text
    info = fault_run.last_step(tmp_path).info
    phases = run.freeze.phases(info["decisions"])
    trained = {path for phase in phases for path in phase.entered}
    moved = {p for p in start if np.asarray(outcome.params[p]).tobytes() != start[p].tobytes()}
    assert moved <= trained
    assert len(compared) == len({phase.key for phase in phases})
    recorded = json.loads((tmp_path / "plan.json").read_text())["phases"]
    spans = [(phase["start_step"], phase["stop_step"]) for phase in recorded]
    assert spans == [(phase.start_step, phase.stop_step) for phase in phases]
    assert (tmp_path / "decisions.json").exists() == bool(info["decisions"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    probed = max(row.get("time/probe_seconds", 0.0) for row in rows)
    assert (probed > 0) == any(record.get("entry") is not None for record in info["decisions"])
    if name in ELEMENTWISE:
        assert all(phase.elements is not None for phase in phases)


def test_a_head_that_trains_alone_costs_the_backbone_no_gradient(tmp_path, messages):
    """The saving is that of the plan: forward through the backbone, and no more."""
    run = setup(config_of("vit", "linear_probe"), tmp_path)
    fit(run)
    plan = run.plan(run.phases[0], run.inputs.choose(run.phases[0], run.phases, {}))
    assert plan.bound > 2.9
