"""ConvNeXt and ConvNeXt V2 against transformers, at odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import (
    HIDDEN,
    assert_loads_strictly,
    assert_parity,
    convert,
    distance,
    fine_tuned,
    from_torch,
    pictures,
    randomise,
    saved_names,
    torch_images,
)

from jft.models.zoo import make_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
    "v1": {},
    "v1 without layer scale": {"layer_scale_init_value": 0.0, "hidden_act": "gelu_new"},
    "v1, three stages, other patch": {
        "num_stages": 3,
        "depths": [2, 1, 1],
        "hidden_sizes": [8, 12, 20],
        "patch_size": 3,
        "image_size": 41,
    },
    "v2": {"v2": True},
    "v2, deeper": {"v2": True, "depths": [1, 1, 3, 1], "image_size": 71, "layer_norm_eps": 1e-6},
}


def peer_of(v2=False, **changed):
    kind = "ConvNextV2" if v2 else "ConvNext"
    sizes = {"depths": [2, 1, 2, 1], "hidden_sizes": [12, 20, 28, 36], "num_labels": 7}
    config = getattr(transformers, f"{kind}Config")(**(sizes | {"image_size": 67} | changed))
    peer = randomise(getattr(transformers, f"{kind}ForImageClassification")(config), 0.2)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "layer_scale" in name:
                parameter += 1.0
    return peer


def ours(peer, folder, **changed):
    family = make_model(name="convnext_tiny", num_classes=1).family
    args = family.variant_from_config(peer.config.to_dict())
    args |= {"image_size": peer.config.image_size, **changed}
    model = make_model(name="convnext_tiny", args=args, num_classes=peer.config.num_labels)
    return model, convert(model, saved_names(peer, folder), peer.config.image_size)


def states_of(peer, x, stages):
    """Outputs of stem, downsampling and blocks, in float64, by the stages' names."""
    body = peer.double().base_model
    layers, blocks = {"stem": body.embeddings}, 0
    for at, stage in enumerate(body.encoder.stages):
        if at:
            layers[f"down_{at}"] = stage.downsampling_layer[-1]
        for layer in stage.layers:
            layers[f"blocks_{blocks}"] = layer
            blocks += 1
    found, hooks = {}, []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_hook(lambda *a, n=name: found.update({n: a[2]})))
    peer(torch_images(x).double())
    for hook in hooks:
        hook.remove()
    assert list(found) == [stage for stage in stages if stage not in ("norm", "head")]
    return found


@pytest.mark.parametrize("case", CASES)
def test_convnext_matches_transformers(case, tmp_path):
    peer = peer_of(**CASES[case])
    model, variables = ours(peer, tmp_path)
    x = pictures(peer.config.image_size)
    states = states_of(peer, x, model.stages)
    assert_parity(model, variables, x, states, lambda image: peer(image).logits)


@pytest.mark.parametrize("mutant", ["epsilon", "gelu", "layers", "layer scale", "response norm"])
def test_convnext_mutants_fail(mutant, tmp_path):
    peer = peer_of(v2=mutant == "response norm")
    changed = {"epsilon": {"final_epsilon": 1e-2}, "gelu": {"gelu": "tanh"}}
    model, variables = ours(peer, tmp_path, **changed.get(mutant, {}))
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    if mutant == "layers":
        params["blocks_0"], params["blocks_1"] = params["blocks_1"], params["blocks_0"]
    if mutant == "layer scale":
        params["blocks_2"]["layer_scale"] = params["blocks_2"]["layer_scale"][::-1]
    if mutant == "response norm":
        params["blocks_3"]["grn"]["scale"] = params["blocks_3"]["grn"]["scale"] * 1.01
    x = pictures(67)
    with torch.no_grad():
        wanted = from_torch(peer.double()(torch_images(x).double()).logits)
    assert distance(model.apply({"params": params}, x), wanted) > 2 * HIDDEN


def test_a_channel_that_is_zero_everywhere_has_torchs_gradient():
    norm = transformers.models.convnextv2.modeling_convnextv2.ConvNextV2GRN(5)
    from jft.models.convnext import ResponseNorm

    x = np.random.default_rng(0).normal(size=(2, 3, 3, 5)).astype(np.float32)
    x[0, :, :, 2] = 0
    with torch.no_grad():
        norm.weight += torch.arange(5.0)
        norm.bias += 0.5
    params = {"scale": np.arange(5, dtype=np.float32), "bias": np.full(5, 0.5, np.float32)}
    image = torch.from_numpy(x).requires_grad_()
    norm(image).square().sum().backward()
    run = ResponseNorm(jnp.float32)
    found = jax.grad(lambda x: jnp.sum(run.apply({"params": params}, x) ** 2))(x)
    assert distance(found, image.grad.numpy()) <= 1e-5


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
def test_a_fine_tuned_export_loads_strictly_in_transformers(name, tmp_path):
    model = make_model(name=name, num_classes=5)
    assert_loads_strictly(model, *fine_tuned(model), tmp_path)
