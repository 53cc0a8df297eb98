"""EfficientNets with random weights and statistics against both originals that can be installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import (
    GRADIENTS,
    HIDDEN,
    LOGITS,
    assert_loads_strictly,
    convert,
    distance,
    fine_tuned,
    pictures,
    randomise_with_statistics,
    saved_names,
    torch_images,
)

from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

CLASSES = 7
COUNTER = "num_batches_tracked"  # torch's own; nothing reads it in evaluation


@functools.cache
def port(name, size):
    """(efficientnet-lite-pytorch's model in float64, ours, its weights in ours) at a size."""
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    # The rates are off: the statistics come from a pass in training mode.
    off = {"drop_connect_rate": 0.0, "dropout_rate": 0.0}
    peer = reference.from_name(name, image_size=size, num_classes=CLASSES, **off)
    if "lite" not in name:
        peer.set_swish(memory_efficient=False)
    randomise_with_statistics(peer, size)
    model = make_model(name=name.replace("-", "_"), num_classes=CLASSES)
    variables = convert(model, peer.state_dict(), size)
    return peer.double(), model, variables


def port_states(peer, image):
    """The output of every stage that has images: stem and blocks."""
    states = [peer._swish(peer._bn0(peer._conv_stem(image)))]
    for block in peer._blocks:
        states.append(block(states[-1]))
    return states


def everything(model, variables, x):
    """(outputs of stem and blocks, logits)."""

    def run(variables, x):
        states = []
        for stage in range(len(model.stages) - 2):
            x = model.apply(variables, x, start=stage, stop=stage + 1)
            states.append(x)
        return states, model.apply(variables, x, start=len(model.stages) - 2)

    return jax.jit(run)(variables, x)


def assert_same_outputs(model, variables, x, states, logits):
    found, ours = everything(model, variables, x)
    assert len(found) == len(states)
    for stage, (one, wanted) in enumerate(zip(found, states, strict=True)):
        wanted = wanted.detach().numpy().transpose(0, 2, 3, 1)
        assert np.abs(wanted).max() > 0.1, "a layer that says nothing proves nothing"
        assert distance(one, wanted) <= HIDDEN, model.stages[stage]
    assert distance(ours, logits.detach().numpy()) <= LOGITS


def swapped(model, variables):
    """The weights with two neighbours of one shape in each other's place, statistics too."""
    shapes = {
        stage: [leaf.shape for leaf in jax.tree.leaves(variables["params"][stage])]
        for stage in model.stages
    }
    pairs = zip(model.stages[1:], model.stages[2:], strict=False)
    one, other = next((a, b) for a, b in pairs if shapes[a] == shapes[b])
    return {kind: {**tree, one: tree[other], other: tree[one]} for kind, tree in variables.items()}


PORTS = [(f"efficientnet-lite{number}", size) for number in (1, 2, 3, 4) for size in (64, 45)]
PORTS += [("efficientnet-b0", 64), ("efficientnet-b1", 45)]


@pytest.mark.parametrize(("name", "size"), PORTS)
def test_scaled_variants_match_the_port(name, size):
    peer, model, variables = port(name, size)
    x = pictures(size)
    image = torch_images(x).double()
    with torch.no_grad():
        states, logits = port_states(peer, image), peer(image)
    assert_same_outputs(model, variables, x, states, logits)


@pytest.mark.parametrize("name", ["efficientnet-lite1", "efficientnet-b0"])
def test_input_gradients_match_the_port(name):
    peer, model, variables = port(name, 64)
    gradient = jax.jit(jax.grad(lambda x: jax.nn.logsumexp(model.apply(variables, x))))
    far = []
    for picture in pictures(64, 4):
        image = torch_images(picture[None]).double().requires_grad_()
        torch.logsumexp(peer(image), 1).sum().backward()
        wanted = image.grad.numpy().transpose(0, 2, 3, 1)
        found = np.asarray(gradient(picture[None]))
        off = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        far.append(distance(found, wanted) > GRADIENTS or off > 1e-3)
    # As in test_lite0_input_gradients_match: a unit at a corner of ReLU6 has either gradient, and
    # on the small maps of the last blocks one such unit is 2 % of an image's.
    assert sum(far) <= (1 if "lite" in name else 0)


@pytest.mark.parametrize("name", ["efficientnet-lite2", "efficientnet-b1"])
@pytest.mark.parametrize("mutant", ["epsilon", "layers"])
def test_mutants_of_scaled_variants_fail(name, mutant):
    size = 45
    peer, model, variables = port(name, size)
    x = pictures(size)
    if mutant == "epsilon":
        args = {"norm_epsilon": 1e-5}
        model = make_model(name=model.variant, args=args, num_classes=CLASSES)
    else:
        variables = swapped(model, variables)
    with torch.no_grad():
        wanted = peer(torch_images(x).double()).numpy()
    found = jax.jit(lambda v, x: model.apply(v, x))(variables, x)
    assert distance(found, wanted) > 10 * LOGITS


# --- transformers, at odd widths, depths and sizes --------------------------------------------

CONFIG = {
    "width_coefficient": 0.4,
    "depth_coefficient": 1.3,
    "depth_divisor": 4,
    "kernel_sizes": [3, 5, 3, 3],
    "in_channels": [32, 24, 40, 64],
    "out_channels": [24, 40, 64, 70],
    "strides": [1, 2, 2, 1],
    "num_block_repeats": [1, 2, 2, 1],
    "expand_ratios": [1, 6, 3, 4],
    "squeeze_expansion_ratio": 0.3,
    "hidden_dim": 512,
    "image_size": 46,
    "num_labels": CLASSES,
}
CASES = {
    "as an even size": {},
    "as TensorFlow": {"depthwise_padding": [2]},
    "an odd image": {"image_size": 47, "depthwise_padding": [4]},
    "wider, shallower, another epsilon": {
        "width_coefficient": 0.73,
        "depth_coefficient": 1.0,
        "hidden_dim": 936,
        "batch_norm_eps": 1e-5,
        "image_size": 36,
    },
    "no sum where a group's first block keeps its shape": {
        "in_channels": [32, 32, 40, 40],
        "out_channels": [32, 40, 40, 40],
    },
}


@functools.cache
def hugging_face(case):
    transformers = pytest.importorskip("transformers")
    config = transformers.EfficientNetConfig(**CONFIG | CASES[case])
    peer = transformers.EfficientNetForImageClassification(config)
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return randomise_with_statistics(peer, config.image_size)


def ours(peer, folder, **changed):
    family = make_model(name="efficientnet_tiny", num_classes=1).family
    fields = family.variant_from_config(peer.config.to_dict())
    args = {**fields, "image_size": peer.config.image_size, **changed}
    model = make_model(name="efficientnet_tiny", args=args, num_classes=CLASSES)
    return model, convert(model, saved_names(peer, folder), peer.config.image_size)


@pytest.mark.parametrize("case", CASES)
def test_efficientnet_matches_transformers(case, tmp_path):
    peer = hugging_face(case)
    model, variables = ours(peer, tmp_path)
    assert model.module.padding == ("same" if case == "as TensorFlow" else "fixed")
    x = pictures(peer.config.image_size)
    image = torch_images(x).requires_grad_()
    out = peer(image, output_hidden_states=True)
    torch.logsumexp(out.logits, 1).sum().backward()
    assert_same_outputs(model, variables, x, out.hidden_states, out.logits)
    whole = jax.jit(jax.grad(lambda x: jax.nn.logsumexp(model.apply(variables, x), axis=1).sum()))
    assert distance(whole(x), image.grad.numpy().transpose(0, 2, 3, 1)) <= GRADIENTS


@pytest.mark.parametrize("mutant", ["epsilon", "padding", "squeeze", "layers"])
def test_efficientnet_mutants_fail(mutant, tmp_path):
    peer = hugging_face("an odd image")
    changed = {"epsilon": {"norm_epsilon": 1e-5}, "padding": {"symmetric_blocks": (2,)}}
    model, variables = ours(peer, tmp_path, **changed.get(mutant, {}))
    variables = jax.tree.map(jnp.asarray, variables)
    if mutant == "squeeze":
        bias = variables["params"]["blocks_5"]["se"]["expand"]["bias"]
        variables["params"]["blocks_5"]["se"]["expand"]["bias"] = bias * 0.0
    if mutant == "layers":
        variables = swapped(model, variables)
    x = pictures(peer.config.image_size)
    with torch.no_grad():
        wanted = peer(torch_images(x)).logits.numpy()
    found = jax.jit(lambda v, x: model.apply(v, x))(variables, x)
    assert distance(found, wanted) > 10 * LOGITS


def test_a_fine_tuned_export_loads_strictly_in_transformers(tmp_path):
    model = make_model(name="efficientnet_tiny", num_classes=5)
    assert_loads_strictly(model, *fine_tuned(model), tmp_path)


def test_efficientnet_that_transformers_saves_is_read_whole_and_exported_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = hugging_face("as TensorFlow")
    peer.save_pretrained(tmp_path / "theirs")
    model, _ = ours(peer, tmp_path / "theirs")
    variables, report = load_pretrained(model, f"file:{tmp_path / 'theirs'}")
    assert report.coverage == 1.0
    assert all(name.endswith(COUNTER) for name in report.unread)
    out = export_weights(model, variables, tmp_path / "ours")
    again, info = transformers.EfficientNetForImageClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info[key] for key in info), info
    for name, tensor in again.state_dict().items():
        assert name.endswith(COUNTER) or torch.equal(tensor, peer.state_dict()[name]), name
    written, config = again.config.to_dict(), peer.config.to_dict()
    for field in (
        "architectures",
        "depthwise_padding",
        "hidden_dim",
        *CONFIG.keys() - {"num_labels"},
    ):
        assert written[field] == config[field], field
    x = torch_images(pictures(46))
    with torch.no_grad():
        # The weights are equal bits; torch itself sums in another order now and then.
        assert distance(again.eval()(x).logits, peer(x).logits) <= 1e-6


def test_what_transformers_can_say_and_jft_cannot_is_refused():
    from jft.errors import WeightsError

    family = make_model(name="efficientnet_tiny", num_classes=1).family
    for wrong in (
        {"hidden_act": "relu"},
        {"pooling_type": "max"},
        {"hidden_dim": 640},
        {"in_channels": [32, 24, 40, 128]},
    ):
        with pytest.raises(WeightsError, match=next(iter(wrong))):
            family.variant_from_config(CONFIG | wrong)


@pytest.mark.parametrize(
    "changed",
    [{}, {"include_top": False}, {"rescale_offset": True, "rescale_factor": 1 / 127.5}],
)
def test_preprocessing_is_that_of_transformers_own_processor(changed):
    pytest.importorskip("transformers")
    from transformers.models.efficientnet import image_processing_pil_efficientnet as theirs

    from jft.weights.processor_file import from_hugging_face

    # As google/efficientnet-b0 to b7 have it: the roots of ImageNet's deviations.
    roots = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.47853944, 0.4732864, 0.47434163]}
    size = {"height": 24, "width": 24}
    processor = theirs.EfficientNetImageProcessorPil(size=size, **roots, **changed)
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
    own = make_model(name="efficientnet_b0", num_classes=1).preprocess
    found, _ = from_hugging_face(processor.to_dict(), own)
    ours = (image - np.array(found.mean)) / np.array(found.std)
    assert distance(ours.transpose(2, 0, 1), wanted) <= 1e-6
    if not changed:
        assert np.abs(np.array(found.std) - own.std).max() < 1e-4 and found.mean == own.mean
