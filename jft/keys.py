"""Every config key of jft: default, type, meaning and limits."""

import difflib
from collections.abc import Iterable

from jft.input_keys import INPUT_KEYS
from jft.training_keys import TRAINING_KEYS
from jft.values import Key

KEYS: dict[str, Key] = {
    **INPUT_KEYS,
    **TRAINING_KEYS,
    "eval.every_steps": Key(
        None,
        int | None,
        "updates between evaluations of split `val`; None evaluates at the end only",
        low=1,
    ),
    "eval.batch_size": Key(
        None, int | None, "examples per evaluation batch; None is train.batch_size", low=1
    ),
    "eval.splits": Key(
        ["val", "test"], list, "splits evaluated after the last update, where the data has them"
    ),
    "eval.tta": Key(
        "",
        str,
        'views of each image whose probabilities are averaged, "flip", "ten_crop"; see'
        " docs/augmentation.md",
    ),
    "eval.raw": Key(
        False,
        bool,
        "with optim.ema_decay: also evaluate the parameters as they are, logged as eval_raw/...",
    ),
    "checkpoint.every_steps": Key(
        None, int | None, "updates between saves; None saves at the end and on a signal only", low=1
    ),
    "checkpoint.keep": Key(2, int, "newest checkpoints kept, beside the best", low=1, free=True),
    "checkpoint.best": Key(
        "auto",
        str | None,
        "metric whose best checkpoint is kept (docs/evaluation.md lists them); auto is"
        " eval/accuracy, of several classes an image eval/average_precision, of numbers eval/loss;"
        " None keeps the newest only",
        free=True,
    ),
    "parallel.mode": Key(
        "pmap",
        str,
        "pmap, shard_map, or auto: jit with shardings; several processes need one of the last two",
        choices=("pmap", "shard_map", "auto"),
    ),
    "parallel.devices": Key(None, int | None, "devices to use; None is all", low=1),
    "log.every_steps": Key(10, int, "updates between lines of metrics.jsonl", low=1),
    "log.tensorboard": Key(True, bool, "write TensorBoard files", free=True),
    "log.trackers": Key(
        [], list, "further writers of the rows: wandb, mlflow, trackio (docs/seeing.md)", free=True
    ),
    "log.project": Key("jft", str, "project of the trackers, experiment in MLflow", free=True),
    "log.name": Key(
        None, str | None, "name of the run at the trackers; None is the run directory's", free=True
    ),
    "report.baselines": Key(
        [],
        list,
        "to compare with in the report: logistic_regression, run directories, JSON files of rows",
        free=True,
    ),
}


def nearest_key(dotted: str, known: Iterable[str]) -> str:
    """Returns " (did you mean config.train.steps?)": by the last part first, else by spelling."""
    names = list(known)
    last = dotted.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    query = dotted if "." in dotted else f"train.{dotted}"  # of equals, the one for training
    found = difflib.get_close_matches(
        query if same else dotted, same or names, n=1, cutoff=0.0 if same else 0.75
    )
    if not found:
        short = [n for n in names if last == "".join(w[0] for w in n.rpartition(".")[2].split("_"))]
        found = short if len(last) > 1 else []  # "lr" is learning_rate
    if not found:
        lasts = {name.rpartition(".")[2]: name for name in reversed(names)}
        close = difflib.get_close_matches(last, lasts, n=1, cutoff=0.7)
        found = [lasts[close[0]]] if close else difflib.get_close_matches(dotted, names, n=1)
    return f" (did you mean config.{found[0]}?)" if found else ""
