"""A Run over TinyNet and in-memory batches, without a config: the loop's own tests use it."""

import jax
import numpy as np
from tiny_net import CLASSES, make_batch, make_parts

from jft.evaluation.split import run_split
from jft.freeze.groups import make_groups
from jft.freeze.methods import make_freeze
from jft.report.writers import RunWriter
from jft.train.checkpoint import Checkpoints
from jft.train.loop import Run
from jft.train.optim import make_optim
from jft.train.parallel import make_parallel
from jft.train.patience import Stopping

ON_TO_THE_END = Stopping()
OPTIM = dict(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0, warmup_steps=3)


def shapes(flat):
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat.items()}


def make_run(
    workdir,
    phases="head@8 | all@16 | head",
    steps=24,
    batches=None,
    mode="pmap",
    devices=1,
    enforce="split",
    eval_every_steps=6,
    save_every_steps=4,
    optim=OPTIM,
    stopping=ON_TO_THE_END,
    evaluate=None,
    **parts,
):
    """Returns a Run that trains TinyNet on seeded random batches, one per step."""
    parts = dict(dropout=0.2, augment=True, log_every_steps=3) | parts
    step_parts, params, stats = make_parts(**parts)
    groups = make_groups(sorted(params))
    freeze = make_freeze(groups, total_steps=steps, steps_per_epoch=6, phases=phases)
    batch = make_batch()
    batch_shape = shapes(batch)

    def batches_from(start):
        position = start
        while True:
            yield batches(position) if batches else make_batch(padding=position % 3, seed=position)
            position += 1

    def evaluate_split(predict_step, split, step):
        rows = [dict(make_batch(seed=100 + i), example=np.arange(16) + 16 * i) for i in range(3)]
        names = [f"class {i}" for i in range(CLASSES)]
        scalars, _ = run_split(
            predict_step,
            rows,
            label_names=names,
            split=split,
            workdir=workdir,
            step=step,
        )
        return scalars

    return Run(
        workdir=workdir,
        freeze=freeze,
        optim=make_optim(freeze.spans.all(), params, ("stem", "blocks_0", "head"), **optim),
        parallel=make_parallel(mode=mode, devices=devices),
        parts=step_parts,
        stages=("stem", "blocks_0", "head"),
        shapes=(shapes(params), shapes(stats)),
        start=lambda: (params, stats),
        batches=batches_from,
        batch_shape=batch_shape,
        evaluate=evaluate or evaluate_split,
        stopping=stopping,
        splits=("val", "test"),
        checkpoints=Checkpoints(workdir, keep=2, best_metric="eval/accuracy", best_mode="max"),
        make_writer=lambda step: RunWriter(
            workdir, step, total_steps=steps, tensorboard=False, progress=None
        ),
        enforce=enforce,
        eval_batch_shape=batch_shape,
        eval_every_steps=eval_every_steps,
        save_every_steps=save_every_steps,
    )
