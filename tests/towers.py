"""What the tests of CLIP's and SigLIP's image towers share; no torch here."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file

from jft.freeze.groups import make_groups
from jft.freeze.methods import make_phases
from jft.models.layers import Training
from jft.models.zoo import make_model
from jft.train.stacks import make_stacks
from jft.tree import flatten, unflatten
from jft.weights import naming as namings
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights


def written_as(model, variables, table):
    """The arrays of a model under the names of one of its family's tables, exported or not."""
    leaves = {path: leaf for path, (_, leaf) in namings.join(variables).items()}
    return namings.to_source_arrays(namings.naming_of(model, leaves, table), leaves)


def exported(model, folder, table=0):
    """(config.json, title of the names, variables) of a random model's export."""
    variables, _ = load_pretrained(model, "random:0")
    out = export_weights(model, variables, folder / "out", table=table)
    again, report = load_pretrained(model, f"file:{out}")
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    assert report.coverage == 1.0 and set(load_file(out / "model.safetensors"))
    config = json.loads((out / "config.json").read_text())
    return config, model.family.tables[report.table].title, variables


def assert_scanned_is_unrolled(name, phases, **args):
    """Logits and gradients, with dropout and stochastic depth, of stacked and of single blocks."""
    drops = {"depth": 3, "dropout_rate": 0.2, "drop_path_rate": 0.3}
    model = make_model(name=name, args=drops | args, num_classes=5)
    image = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    params = flatten(load_pretrained(model, "random:0")[0]["params"])
    groups = make_groups(sorted(params), model.family.groups, model.family.sets)
    (phase,) = make_phases(groups, total_steps=9, steps_per_epoch=9, phases=phases)
    stacks = make_stacks(phase, params, model.stages, "blocks", dict.fromkeys(params, True))
    assert [held.name for held in stacks.ranges] == ["blocks_1..2"]
    training = Training(np.ones(4, np.float32), np.arange(4))

    def loss(params):
        rngs = {"dropout": jax.random.key(7)}
        return jax.nn.logsumexp(
            model.apply({"params": params}, image, training=training, rngs=rngs)
        )

    single = jax.jit(jax.value_and_grad(loss))(unflatten(params))
    looped = jax.jit(jax.value_and_grad(loss))(unflatten(stacks.stack(params)))
    np.testing.assert_allclose(looped[0], single[0], rtol=1e-6)
    wanted = stacks.stack(flatten(single[1]))
    for path, found in flatten(looped[1]).items():
        scale = max(np.abs(wanted[path]).max(), 1e-3)
        assert np.abs(found - wanted[path]).max() <= 1e-4 * scale, path
