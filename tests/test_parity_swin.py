"""Swin against transformers: maps that windows do not divide, odd depths, all that it can be."""

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

from jft.models import windows
from jft.models.swin import Merge
from jft.models.zoo import make_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {
    # Maps of 10 and 5 tokens.
    "windows that do not divide": {},
    # An image of 31 pixels filled up to 11 patches; maps of 11, 6 and 3, the last a single window.
    "odd sides": {
        "image_size": 31,
        "patch_size": 3,
        "window_size": 3,
        "depths": (2, 1, 3),
        "num_heads": (2, 3, 4),
        "qkv_bias": False,
    },
    # Maps of 12 and 6.
    "positions": {
        "image_size": 60,
        "patch_size": 5,
        "window_size": 5,
        "use_absolute_embeddings": True,
        "hidden_act": "gelu_new",
        "mlp_ratio": 2.3,
        "layer_norm_eps": 1e-3,
    },
    # One stage of one window, no shift.
    "one window": {
        "depths": (3,),
        "num_heads": (4,),
        "window_size": 10,
        "hidden_act": "quick_gelu",
    },
}


def peer_of(**changed):
    sizes = {"embed_dim": 24, "depths": (3, 2), "num_heads": (3, 6), "mlp_ratio": 2.0}
    sizes |= {"image_size": 40, "window_size": 4, "num_labels": 7}
    config = transformers.SwinConfig(**(sizes | changed))
    return randomise(transformers.SwinForImageClassification(config))


def ours(peer, folder, **changed):
    family = make_model(name="swin_tiny", num_classes=1).family
    args = family.variant_from_config(peer.config.to_dict())
    args |= {"image_size": peer.config.image_size, **changed}
    model = make_model(name="swin_tiny", args=args, num_classes=peer.config.num_labels)
    return model, convert(model, saved_names(peer, folder), peer.config.image_size)


def states_of(peer, x):
    """Outputs of all stages but the last two, in float64: maps [B, D, H, W] as convolutions'."""
    found = {}

    def keep(name):
        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            side = round(out.shape[1] ** 0.5)
            found[name] = out.detach().mT.reshape(len(out), -1, side, side)

        return hook

    swin, block = peer.double().swin, 0
    handles = [swin.embeddings.register_forward_hook(keep("embed"))]
    for stage, layer in enumerate(swin.encoder.layers):
        for module in layer.blocks:
            handles.append(module.register_forward_hook(keep(f"blocks_{block}")))
            block += 1
        if layer.downsample is not None:
            handles.append(layer.downsample.register_forward_hook(keep(f"down_{stage + 1}")))
    with torch.no_grad():
        peer(torch_images(x).double())
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", CASES)
def test_swin_matches_transformers(case, tmp_path):
    peer = peer_of(**CASES[case])
    model, variables = ours(peer, tmp_path)
    x = pictures(peer.config.image_size)
    states = states_of(peer, x)
    assert tuple(states) == model.stages[:-2]
    assert_parity(model, variables, x, states, lambda image: peer(image).logits)


def test_swin_reads_a_backbone_and_masked_pretraining(tmp_path):
    whole = peer_of()
    head = {"classifier.weight": torch.zeros(7, 48), "classifier.bias": torch.zeros(7)}
    x = pictures(40)
    for kind in ("SwinModel", "SwinForMaskedImageModeling"):
        peer = randomise(getattr(transformers, kind)(whole.config))
        base = getattr(peer, "swin", peer)
        model, _ = ours(whole, tmp_path / "whole")
        variables = convert(model, saved_names(peer, tmp_path / kind) | head, 40)
        with torch.no_grad():
            wanted = base(torch_images(x)).last_hidden_state.mean(1)
        found = jax.jit(lambda v, x, m=model: m.apply(v, x, stop=-1))(variables, x)
        assert distance(found, from_torch(wanted)) <= HIDDEN, kind


def _rows_first(self, x):
    """Merge as it would be with rows outermost."""
    return _merge(self, x.swapaxes(1, 2)).swapaxes(1, 2)


_merge = Merge.__call__
MUTANTS = {
    "epsilon": {"epsilon": 1e-3},
    "gelu": {"gelu": "tanh"},
    "padding": {"padding": "after"},
    "shift": {},
    "mask": {},
    "merging": {},
    "table": {},
    "layers": {},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_swin_mutants_fail(mutant, tmp_path, monkeypatch):
    peer = peer_of()
    model, variables = ours(peer, tmp_path, **MUTANTS[mutant])
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    if mutant == "shift":
        own = windows.window_and_shift
        monkeypatch.setattr(windows, "window_and_shift", lambda *a: own(*a[:3], shifted=False))
    if mutant == "mask":
        monkeypatch.setattr(windows, "_APART", 0.0)
    if mutant == "merging":
        monkeypatch.setattr(Merge, "__call__", _rows_first)
    if mutant == "table":
        attn = params["blocks_1"]["attn"]
        attn["bias_table"] = attn["bias_table"][::-1]
    if mutant == "layers":
        params["blocks_0"], params["blocks_1"] = params["blocks_1"], params["blocks_0"]
    x = pictures(40)
    wanted = from_torch(states_of(peer, x)["blocks_4"])
    found = jax.jit(lambda v, x: model.apply(v, x, stop=-2))({"params": params}, x)
    assert distance(found, wanted) > 2 * HIDDEN


@pytest.mark.parametrize("args", [{}, {"window": 3, "qkv_bias": False}, {"positions": True}])
def test_a_fine_tuned_export_loads_strictly_in_transformers(args, tmp_path):
    model = make_model(name="swin_tiny", args=args, num_classes=5)
    assert_loads_strictly(model, *fine_tuned(model), tmp_path)
