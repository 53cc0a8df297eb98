"""The config keys of how a run learns: freezing, optimizer, loss, teacher, steps."""

from jft.values import Key

TRAINING_KEYS: dict[str, Key] = {
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
    "optim.name": Key(
        "adamw",
        str,
        "optimizer: adamw, sgd, adam, nadamw, lion, adafactor, lamb, lars, muon, prodigy,"
        " schedule_free_adamw, or another of docs/optimization.md",
    ),
    "optim.args": Key({}, dict, "options of the optimizer, `--config.optim.args.b2=0.95`"),
    "optim.learning_rate": Key(1e-3, float, "peak learning rate", low=0),
    "optim.schedule": Key(
        "cosine",
        str,
        "shape of the learning rate after warm-up",
        choices=(
            "cosine",
            "constant",
            "linear",
            "polynomial",
            "exponential",
            "rsqrt",
            "step",
            "one_cycle",
            "cosine_restarts",
            "wsd",
            "slanted_triangle",
        ),
    ),
    "optim.schedule_args": Key(
        {}, dict, "options of the schedule, `--config.optim.schedule_args.timescale=1000`"
    ),
    "optim.group_schedules": Key(
        [],
        list,
        "[pattern, schedule] or [pattern, schedule, {option: value}]: leaves with another schedule",
    ),
    "optim.warmup_steps": Key(0, int, "updates of linear warm-up from 0", low=0),
    "optim.final_lr_scale": Key(
        0.0,
        float,
        "last learning rate over the peak: cosine, linear, polynomial, exponential, restarts, wsd",
        low=0,
        high=1,
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
    "optim.ema_decay": Key(
        None,
        float | None,
        "decay of a moving average of what trains, to evaluate and export; None keeps none",
        low=0,
        high=1,
    ),
    "optim.sam_rho": Key(
        None,
        float | None,
        "radius of sharpness-aware minimisation, which takes two passes a step; None takes one",
        low=0,
    ),
    "optim.grad_noise": Key(
        0.0, float, "Gaussian noise on gradients, of variance grad_noise / (1 + step)^0.55", low=0
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
    "distill.teacher": Key(
        None,
        str | None,
        "a model to learn from: the directory of a finished run, or weights as of init.source",
    ),
    "distill.model": Key(
        None, str | None, "architecture of the teacher's weights; a run has its own"
    ),
    "distill.args": Key({}, dict, "fields of that architecture, a dict"),
    "distill.temperature": Key(
        2.0, float, "softens both predictions before they are compared", low=0
    ),
    "distill.weight": Key(
        0.5, float, "share of the teacher in the loss; the labels have the rest", low=0, high=1
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
    "train.patience_evals": Key(
        None,
        int | None,
        "evaluations in a row without an improvement that end the run, with its best checkpoint;"
        " counted once every leaf that is to train has begun to; None never ends it early",
        low=1,
    ),
    "train.patience_metric": Key(
        None, str | None, "metric that has to improve; None is checkpoint.best"
    ),
    "train.min_delta": Key(0.0, float, "an improvement is larger than this", low=0),
    "train.restore_best": Key(
        False, bool, "end with the best checkpoint by checkpoint.best, also without stopping early"
    ),
}
