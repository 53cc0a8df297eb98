"""Every config key of jft: default, type, meaning and limits."""

import difflib
from collections.abc import Iterable

from jft.values import Key

KEYS: dict[str, Key] = {
    "seed": Key(
        0,
        int,
        "the only source of randomness: fresh leaves, data order, augmentation, dropout",
        low=0,
        high=2**32 - 1,  # jax keeps 32 bits of it
    ),
    "model.name": Key("efficientnet_lite0", str, "architecture; `jft models` lists them"),
    "model.args": Key({}, dict, "fields of the model, `--config.model.args.patch=8`"),
    "init.source": Key(
        None,
        str | None,
        "starting weights: pkg:DISTRIBUTION/path, file:PATH, random:SEED; None trains from scratch",
    ),
    "init.fresh": Key(
        [], list, "patterns of leaves that may start fresh (a head whose classes differ always may)"
    ),
    "data.name": Key(
        "folder",
        str,
        "kind of data: folder, table, webdataset, hf, tfds, npz, csv (of pixels), sklearn;"
        " `jft data list` has their options",
    ),
    "data.path": Key(
        None,
        str | None,
        "file, folder, pkg:DISTRIBUTION/path, hf:owner/name, or the name of a scikit-learn set",
    ),
    "data.args": Key({}, dict, "options of that kind of data"),
    "data.val_fraction": Key(
        0.1,
        float,
        "share of the training examples held out as split `val`; unused when the data has one",
        low=0,
        high=1,
    ),
    "data.test_fraction": Key(
        0.0,
        float,
        "share of all examples held out as split `test`; unused when the data has one",
        low=0,
        high=1,
    ),
    "data.train_examples": Key(
        None, int | None, "train on only so many examples, balanced over classes", low=1
    ),
    "data.sampling": Key(
        "shuffle",
        str,
        "how often an epoch visits each class: shuffle, as the data has it; balanced, all equally;"
        " sqrt, by the square root of its size",
        choices=("shuffle", "balanced", "sqrt"),
    ),
    "data.image_size": Key(
        None, int | None, "side of the model's input in pixels; None is the model's own", low=1
    ),
    "data.channels": Key(
        None, int | None, "channels of the model's input; None is the model's own, 3", low=1
    ),
    "data.bands": Key(
        None, list | None, "bands of each picture that count, from 0, `[3, 2, 1]`; None is all"
    ),
    "data.depth": Key(
        None,
        int | None,
        "bits of a value that reach the device, 8 or 16; None keeps 16 where all images have more"
        " than 8",
        low=8,
        high=16,
    ),
    "data.range": Key(
        None,
        list | None,
        "values that become black and white, [low, high] or one such pair a band; None is the whole"
        " range of 8 or 16 bits",
    ),
    "data.mean": Key(
        None, list | None, "mean of each channel, on the scale 0..255; None is the weights' own"
    ),
    "data.std": Key(
        None, list | None, "deviation of each channel, same scale; None is the weights' own"
    ),
    "data.workers": Key(
        0, int, "processes that decode images; 0 decodes in threads", low=0, free=True
    ),
    "data.bad_image_quota": Key(
        0.0,
        float,
        "share of a split's images that may be unreadable and are left out; above 0 at least one",
        low=0,
        high=1,
    ),
    "data.cache": Key(
        "off",
        str,
        "decode every image once, before augmentation: disk keeps them in the user's cache folder"
        " for later runs, memory for this one",
        choices=("off", "disk", "memory"),
        free=True,
    ),
    "data.check": Key(
        "auto",
        str,
        "images that are looked at before a run: all; auto: all of up to 1,000 (100 MB), of up to"
        " 50,000 files the beginning; off",
        choices=("auto", "off", "all"),
        free=True,
    ),
    "augment.flip": Key(True, bool, "mirror half of the training images left to right"),
    "augment.crop": Key(
        "none", str, "random part of the image for training", choices=("none", "random_resized")
    ),
    "augment.scale": Key(
        [0.5, 1.0], list, "random_resized: smallest and largest share of the area"
    ),
    "augment.ratio": Key(
        [0.75, 4 / 3], list, "random_resized: smallest and largest width over height"
    ),
    "freeze.name": Key(
        "full", str, "freezing method, as docs/freezing.md lists them; phases go before it"
    ),
    "freeze.args": Key({}, dict, "options of the method, `--config.freeze.args.k=3`"),
    "freeze.phases": Key(
        None,
        str | list | None,
        'own phases instead of a method: "head@30% | block[-3:]+head@70% | all"',
    ),
    "freeze.groups": Key([], list, "further groups for phases: [name, pattern] pairs"),
    "freeze.max_sets": Key(
        None,
        int | None,
        "most distinct trainable sets, hence compiled steps; more are approximated by a menu",
        low=1,
    ),
    "freeze.cut_quantum": Key(1, int, "lower each cut to a multiple of so many blocks", low=1),
    "freeze.spoilers": Key(
        "train",
        str,
        "few low leaves that spoil a cut (class token, position table): train them, or freeze them",
        choices=("train", "freeze"),
    ),
    "freeze.cache": Key(
        "off",
        str,
        "keep the outputs of a frozen prefix: off, on, or auto where the plan says that it pays",
        choices=("off", "auto", "on"),
    ),
    "freeze.views": Key(
        None,
        int | None,
        "augmented views of each example that phases with a frozen prefix take in turn, which a"
        " cache can hold; None draws anew at every visit",
        low=1,
    ),
    "freeze.enforce": Key(
        "split",
        str,
        "split: frozen leaves stay out of the step; optax: reference by optax.partition",
        choices=("split", "optax"),
    ),
    "optim.name": Key("adamw", str, "optimizer: adamw, sgd"),
    "optim.args": Key({}, dict, "options of the optimizer, `--config.optim.args.b2=0.95`"),
    "optim.learning_rate": Key(1e-3, float, "peak learning rate", low=0),
    "optim.schedule": Key(
        "cosine",
        str,
        "shape of the learning rate after warm-up",
        choices=("cosine", "constant", "slanted_triangle"),
    ),
    "optim.warmup_steps": Key(0, int, "updates of linear warm-up from 0", low=0),
    "optim.final_lr_scale": Key(
        0.0, float, "last learning rate over the peak, for cosine", low=0, high=1
    ),
    "optim.weight_decay": Key(0.0, float, "decoupled weight decay", low=0),
    "optim.decay_rules": Key(
        [],
        list,
        "[pattern, true or false] pairs, first full match wins; [] decays leaves of 2+ dimensions",
    ),
    "optim.lr_rules": Key(
        [], list, "[pattern, factor on the learning rate] pairs, first full match wins"
    ),
    "optim.layer_decay": Key(
        None, float | None, "factor on the learning rate per stage below the head", low=0, high=1
    ),
    "optim.grad_clip_norm": Key(
        None, float | None, "largest global norm of the trainable gradients", low=0
    ),
    "optim.per_phase": Key(
        False, bool, "warm-up and schedule start again in each phase as written"
    ),
    "loss.name": Key(
        "softmax",
        str,
        "loss: softmax, focal; several classes an image: sigmoid, sigmoid_focal; numbers: squared,"
        " absolute, huber",
    ),
    "loss.args": Key({}, dict, "options of the loss, `--config.loss.args.label_smoothing=0.1`"),
    "loss.class_weights": Key(
        None,
        str | list | None,
        "factor on the training loss of each class: a list, or balanced: one over its frequency",
    ),
    "train.steps": Key(None, int | None, "updates of the run; or set train.epochs", low=1),
    "train.epochs": Key(
        None, float | None, "passes over the training split; or set train.steps", low=0
    ),
    "train.batch_size": Key(32, int, "examples per update, over all devices", low=1),
    "train.accum_steps": Key(1, int, "micro-batches per update", low=1),
    "train.dtype": Key(
        "float32", str, "compute type; parameters stay float32", choices=("float32", "bfloat16")
    ),
    "train.scan_blocks": Key(
        False, bool, "run equal blocks as a loop: the step compiles one of them for many"
    ),
    "train.nonfinite": Key(
        "stop",
        str,
        "when loss or gradient is not finite: stop (exit 5) or skip the update",
        choices=("stop", "skip"),
    ),
    "train.nonfinite_quota": Key(10, int, "skipped updates before the run stops after all", low=0),
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
    "checkpoint.every_steps": Key(
        None, int | None, "updates between saves; None saves at the end and on a signal only", low=1
    ),
    "checkpoint.keep": Key(2, int, "newest checkpoints kept, beside the best", low=1, free=True),
    "checkpoint.best": Key(
        "eval/accuracy",
        str | None,
        "metric whose best checkpoint is kept; None keeps the newest only",
    ),
    "parallel.mode": Key(
        "pmap",
        str,
        "pmap, or auto: jit with shardings (needed for several processes)",
        choices=("pmap", "auto"),
    ),
    "parallel.devices": Key(None, int | None, "devices to use; None is all", low=1),
    "log.every_steps": Key(10, int, "updates between lines of metrics.jsonl", low=1),
    "log.tensorboard": Key(True, bool, "write TensorBoard files", free=True),
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
