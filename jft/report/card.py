"""The card of an exported model: README.md with what it is, how it was trained, how good it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jft.report.markup import count, listed, number, percent, share_of, text
from jft.report.rundir import read_json

_METRICS = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "auroc",
    "average_precision",
    "ece",
    "mae",
    "rmse",
    "r2",
    "loss",
)
_SHARES = {"accuracy", "balanced_accuracy", "macro_f1"}


def model_card(workdir: Path | str, step: int | None = None) -> str:
    """Returns Markdown with the front matter that the Hugging Face hub reads.

    It takes files of the run directory alone; what is missing there is left out. Scores are those
    of the parameters at `step`; None takes whatever was evaluated last.
    """
    workdir = Path(workdir)
    config, data, run, conversion, plan = (
        _mapping(workdir / f"{name}.json")
        for name in ("config", "data", "run", "conversion", "plan")
    )
    model = text(_inside(config, "model").get("name"), "model")
    evaluations = [_mapping(path) for path in sorted((workdir / "eval").glob("*.json"))]
    if step is not None:
        evaluations = [found for found in evaluations if found.get("step") == step]
    parts = [
        _front(config, evaluations),
        f"# {workdir.resolve().name}: {model}, fine-tuned with jft\n",
        _weights(conversion),
        _data(config, data),
        _training(config, run, plan),
        _results(evaluations),
        _use(workdir),
    ]
    return "\n".join(part for part in parts if part)


def _front(config: Mapping[str, Any], evaluations: list[dict[str, Any]]) -> str:
    kind = "image-classification" if any("accuracy" in e for e in evaluations) else "other"
    model = text(_inside(config, "model").get("name"), "model")
    lines = ["---", "library_name: jft", f"pipeline_tag: {kind}", "tags:", "- jft", "- jax"]
    return "\n".join([*lines, f"- {model}", "---", ""])


def _weights(conversion: Mapping[str, Any]) -> str:
    if not conversion:
        return "Trained from random weights.\n"
    covered = percent(share_of(conversion.get("coverage")))
    return (
        f"Starting weights: `{text(conversion.get('source'))}` (SHA-256"
        f" `{text(conversion.get('sha256'))}`), {covered} of the parameters pre-trained. Their"
        " licence holds for what is made of them.\n"
    )


def _data(config: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    names = [text(name) for name in listed(data.get("label_names"))]
    if not names:
        return ""
    sizes = _inside(data, "examples")
    shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
    source = _inside(config, "data")
    sized = ", ".join(f"{count(size)} {split}" for split, size in sizes.items())
    kind = {"multi": "Labels, any number of them an image", "value": "Values to predict"}
    return (
        f"## Data\n\n`{text(source.get('name'))}` from `{text(source.get('path'))}`: {sized}."
        f" {kind.get(text(data.get('kind')), 'Classes')}: {shown}.\n"
    )


def _training(config: Mapping[str, Any], run: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    optim, train = _inside(config, "optim"), _inside(config, "train")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    versions = _inside(run, "versions")
    lines = [
        "## Training",
        "",
        f"{text(optim.get('name'))}, peak learning rate {number(optim.get('learning_rate'))},"
        f" batch {count(train.get('batch_size'))}, seed {count(config.get('seed'))}, compute in"
        f" {text(train.get('dtype'))}; config SHA-256 `{digest}`.",
        "",
        "| phase | trains | steps |",
        "|---|---|---|",
    ]
    for phase in listed(plan.get("phases")):
        if isinstance(phase, Mapping):
            steps = f"{count(phase.get('start_step'))} to {count(phase.get('stop_step'))}"
            name = text(phase.get("name")).replace("|", "\\|")
            lines.append(f"| {count(phase.get('index'))} | {name} | {steps} |")
    used = ", ".join(
        f"{name} {text(versions[name])}" for name in ("jft", "jax") if name in versions
    )
    return "\n".join([*lines, "", f"Made with {used}." if used else "", ""])


def _results(evaluations: list[dict[str, Any]]) -> str:
    rows = []
    for found in evaluations:
        for name in _METRICS:
            if isinstance(found.get(name), int | float):
                value = found[name]
                shown = percent(value) if name in _SHARES else number(value)
                rows.append(f"| {text(found.get('split'))} | {name} | {shown} |")
    head = "## Results\n\n| split | metric | value |\n|---|---|---|\n"
    return head + "\n".join(rows) + "\n" if rows else ""


def _use(workdir: Path) -> str:
    name = workdir.resolve().name
    return (
        "## Use\n\n```\n"
        f"jft predict --workdir={name} FILE...             # from the run directory\n"
        f"--config.init.source=file:{name}-export           # as the start of another run\n"
        "```\n\nThe tensors have the names of the source of the weights, so that its own tools load"
        " `model.safetensors` with `config.json`.\n"
    )


def _inside(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    return content if isinstance(content, dict) else {}
