"""DINOv2 with and without registers against transformers, at odd sizes."""

import jax
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
from jft.weights.convert import load_pretrained

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
    "plain": {},
    "gated": {"use_swiglu_ffn": True, "num_attention_heads": 6, "mlp_ratio": 3},
    "no biases, tanh": {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh", "image_size": 45},
    "registers": {"num_register_tokens": 3},
    "gated registers": {"num_register_tokens": 1, "use_swiglu_ffn": True, "patch_size": 7},
}


def peer_of(**changed):
    kind = "Dinov2WithRegisters" if "num_register_tokens" in changed else "Dinov2"
    sizes = {"hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 5}
    sizes |= {"image_size": 47, "patch_size": 9, "mlp_ratio": 2, "num_labels": 7}
    config = getattr(transformers, f"{kind}Config")(**(sizes | changed))
    return randomise(getattr(transformers, f"{kind}ForImageClassification")(config))


def ours(peer, folder, **changed):
    family = make_model(name="dinov2_tiny", num_classes=1).family
    args = family.variant_from_config(peer.config.to_dict())
    args |= {"image_size": peer.config.image_size, **changed}
    model = make_model(name="dinov2_tiny", args=args, num_classes=peer.config.num_labels)
    return model, convert(model, saved_names(peer, folder), peer.config.image_size)


def states_of(peer, x):
    """Outputs of embed and blocks, in float64."""
    found = peer.double()(torch_images(x).double(), output_hidden_states=True)
    names = ["embed", *(f"blocks_{i}" for i in range(len(found.hidden_states) - 1))]
    return dict(zip(names, found.hidden_states, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_dinov2_matches_transformers(case, tmp_path):
    peer = peer_of(**CASES[case])
    model, variables = ours(peer, tmp_path)
    x = pictures(peer.config.image_size)
    states = states_of(peer, x)
    assert_parity(model, variables, x, states, lambda image: peer(image).logits)


@pytest.mark.parametrize("case", ["plain", "registers"])
@pytest.mark.parametrize("size", [29, 65])
def test_positions_on_another_grid_are_those_of_transformers(case, size, tmp_path):
    peer = peer_of(**CASES[case])
    peer.save_pretrained(tmp_path)
    family = make_model(name="dinov2_tiny", num_classes=1).family
    args = family.variant_from_config(peer.config.to_dict()) | {"image_size": size}
    model = make_model(name="dinov2_tiny", args=args, num_classes=7)
    variables, report = load_pretrained(model, f"file:{tmp_path}")
    assert report.paths("resized") == ["embed/pos_embedding"]
    x = pictures(size)
    assert_parity(model, variables, x, states_of(peer, x), lambda image: peer(image).logits)


@pytest.mark.parametrize("mutant", ["epsilon", "gelu", "layers", "gate and up", "registers"])
def test_dinov2_mutants_fail(mutant, tmp_path):
    gated = {"use_swiglu_ffn": True} if mutant == "gate and up" else {}
    peer = peer_of(num_register_tokens=3, **gated)
    changed = {"epsilon": {"epsilon": 1e-2}, "gelu": {"gelu": "tanh"}}
    model, variables = ours(peer, tmp_path, **changed.get(mutant, {}))
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    if mutant == "layers":
        params["blocks_0"], params["blocks_1"] = params["blocks_1"], params["blocks_0"]
    if mutant == "gate and up":
        mlp = params["blocks_1"]["mlp"]
        mlp["gate"], mlp["up"] = mlp["up"], mlp["gate"]
    if mutant == "registers":
        params["embed"]["registers"] = params["embed"]["registers"][:, ::-1] * 1.01
    x = pictures(47)
    wanted = from_torch(states_of(peer, x)["blocks_2"])
    assert distance(model.apply({"params": params}, x, stop=4), wanted) > 2 * HIDDEN


@pytest.mark.parametrize("args", [{}, {"registers": 0}, {"gated": True, "mlp_features": 88}])
def test_a_fine_tuned_export_loads_strictly_in_transformers(args, tmp_path):
    model = make_model(name="dinov2_tiny", args=args, num_classes=5)
    assert_loads_strictly(model, *fine_tuned(model), tmp_path)
