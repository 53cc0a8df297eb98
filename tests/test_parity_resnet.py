"""ResNets with random weights and statistics against transformers, at odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import (
    GRADIENTS,
    HIDDEN,
    LOGITS,
    assert_loads_strictly,
    assert_parity,
    convert,
    distance,
    fine_tuned,
    from_torch,
    pictures,
    randomise_with_statistics,
    saved_names,
    torch_images,
)

from jft.models.layers import Training
from jft.models.zoo import make_model
from jft.tree import flatten
from jft.weights.convert import load_pretrained

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES = 7
SIZES = {"embedding_size": 10, "hidden_sizes": [24, 40, 52], "depths": [2, 1, 2]}
# case -> (image size, its config)
CASES = {
    "bottleneck": (75, SIZES),
    "basic, no first shortcut, gelu": (
        46,
        {
            "layer_type": "basic",
            "embedding_size": 12,
            "hidden_sizes": [12, 20],
            "depths": [2, 3],
            "hidden_act": "gelu",
        },
    ),
    "v1, strides at once, silu": (
        81,
        SIZES
        | {
            "depths": [1, 3, 1],
            "hidden_act": "silu",
            "downsample_in_bottleneck": True,
            "downsample_in_first_stage": True,
        },
    ),
    "maps of one pixel": (20, {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 1]}),
}


def peer_of(case):
    size, config = CASES[case]
    config = transformers.ResNetConfig(**config, num_labels=CLASSES)
    return randomise_with_statistics(transformers.ResNetForImageClassification(config), size), size


def ours(peer, size, folder, **changed):
    family = make_model(name="resnet_tiny", num_classes=1).family
    args = family.variant_from_config(peer.config.to_dict()) | {"image_size": size} | changed
    model = make_model(name="resnet_tiny", args=args, num_classes=CLASSES)
    return model, convert(model, saved_names(peer, folder), size)


def states_of(peer, model, x):
    """Outputs of the stem and of the last block of each stage, in float64; the last one pooled."""
    hidden = peer.double()(torch_images(x).double(), output_hidden_states=True).hidden_states
    ends = np.cumsum(model.module.depths) - 1
    names = ["stem", *(f"blocks_{end}" for end in ends)]
    return dict(zip(names, (*hidden[:-1], hidden[-1].mean((2, 3))), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_resnet_matches_transformers(case, tmp_path):
    peer, size = peer_of(case)
    model, variables = ours(peer, size, tmp_path)
    x = pictures(size)
    states = states_of(peer, model, x)
    assert_parity(model, variables, x, states, lambda image: peer(image).logits)


def test_training_moves_statistics_and_gives_gradients_as_transformers_does(tmp_path):
    peer, size = peer_of("bottleneck")
    model, variables = ours(peer, size, tmp_path)
    # Of six images no unit is at the corner of its ReLU: there rounding would choose the gradient.
    peer, x = peer.double(), pictures(size, 6)
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1 - model.module.norm_momentum
    logits = peer.train()(torch_images(x).double()).logits
    torch.logsumexp(logits, 1).sum().backward()

    def loss(params):
        whole = variables | {"params": params}
        training = Training(jnp.ones(len(x)), jnp.arange(len(x)))
        logits, changed = model.apply(whole, x, training=training, mutable=["batch_stats"])
        return jax.nn.logsumexp(logits, axis=1).sum(), (logits, changed["batch_stats"])

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradients, (found, moved) = run(variables["params"])
    assert distance(found, from_torch(logits)) <= LOGITS
    kinds = {"params": (gradients, "grad"), "batch_stats": (moved, "data")}
    tensors = dict(peer.named_parameters()) | dict(peer.named_buffers())
    table = model.family.tables[0]
    for kind, (tree, attribute) in kinds.items():
        assert flatten(tree).keys() == flatten(variables[kind]).keys()
        for path, leaf in flatten(tree).items():
            origin = table.source_of(path, depths=model.module.depths)
            wanted = getattr(tensors[origin.name], attribute).numpy()
            wanted = wanted.transpose(2, 3, 1, 0) if wanted.ndim == 4 else wanted.T
            bar = GRADIENTS if kind == "params" else HIDDEN
            assert distance(leaf, wanted) <= bar, path


MUTANTS = {
    "epsilon": {"norm_epsilon": 1e-3},
    "stride": {"stride_in": "conv2"},
    "act": {"act": "relu"},
    "inner act": {"inner_act": "silu"},
    "first stride": {"first_stride": 1},
    "layers": {},
    "statistics": {},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_resnet_mutants_fail(mutant, tmp_path):
    peer, size = peer_of("v1, strides at once, silu")
    model, variables = ours(peer, size, tmp_path, **MUTANTS[mutant])
    variables = jax.tree.map(lambda leaf: leaf, variables)
    one, other = "blocks_2", "blocks_3"
    if mutant == "layers":
        for tree in variables.values():
            tree[one], tree[other] = tree[other], tree[one]
    if mutant == "statistics":
        stats = variables["batch_stats"]
        stats[one]["bn1"], stats[one]["bn2"] = stats[one]["bn2"], stats[one]["bn1"]
    x = pictures(size)
    with torch.no_grad():
        wanted = from_torch(peer.double()(torch_images(x).double()).logits)
    found = jax.jit(lambda v, x: model.apply(v, x))(variables, x)
    assert distance(found, wanted) > 10 * LOGITS


def test_bfloat16_predicts_the_same(tmp_path):
    peer, size = peer_of("bottleneck")
    model, variables = ours(peer, size, tmp_path, dtype="bfloat16")
    x = pictures(size, 8)
    with torch.no_grad():
        wanted = torch.log_softmax(peer.double()(torch_images(x).double()).logits, 1).numpy()
    found = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)(variables, x)), np.float64)
    assert (np.exp(wanted) * (wanted - found)).sum(1).mean() <= 1e-2


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"bottleneck": False, "stem_width": 20, "act": "gelu"},
        {"stride_in": "conv1", "first_stride": 2, "act": "silu"},
    ],
)
def test_a_fine_tuned_export_loads_strictly_in_transformers(args, tmp_path):
    model = make_model(name="resnet_tiny", args=args, num_classes=5)
    assert_loads_strictly(model, *fine_tuned(model), tmp_path)


def test_the_bare_model_that_transformers_saves_is_read_but_for_the_head(tmp_path):
    peer, size = peer_of("bottleneck")
    peer.resnet.save_pretrained(tmp_path / "bare")
    model, variables = ours(peer, size, tmp_path)
    found, report = load_pretrained(model, f"file:{tmp_path / 'bare'}", fresh=["head/.*"])
    assert report.paths("fresh") == ["head/bias", "head/kernel"]
    for kind, tree in variables.items():
        for path, leaf in flatten(tree).items():
            if not path.startswith("head/"):
                np.testing.assert_array_equal(flatten(found[kind])[path], leaf)
