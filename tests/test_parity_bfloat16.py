"""bfloat16 weights and products against transformers in float32, on random weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import KL, kl, pictures, torch_images

from jft.models.zoo import list_models, make_model
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES, ROWS = 9, 8
SPREAD = 2.0  # standard deviation of the logits
VITS = {
    "vit": {},
    "odd": {"features": 60, "heads": 5, "depth": 6, "mlp_features": 83, "patch": 5},
    "tanh": {"gelu": "tanh", "epsilon": 1e-6, "qkv_bias": False},
}
# Other families with a classifier in transformers.
OTHERS = [name for name in list_models("*_tiny") if name.split("_")[0] != "vit"]


def peer_logits(folder, x):
    """What transformers computes in float32 of a folder of weights; None without a classifier."""
    architecture = json.loads((folder / "config.json").read_text()).get("architectures", [""])[0]
    if not architecture.endswith("ForImageClassification"):
        return None
    peer = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return peer(torch_images(x)).logits.numpy()


def written(model, folder):
    """An export of random weights, with a head whose distributions are far from even."""
    variables, _ = load_pretrained(model, "random:0")
    logits = jax.jit(model.apply)(variables, pictures(model.preprocess.image_size, ROWS))
    variables["params"]["head"]["kernel"] *= SPREAD / float(jnp.std(logits))
    return export_weights(model, variables, folder / "weights")


def low_logits(model, folder, x):
    """bfloat16 leaves and products."""
    module = model.module.clone(dtype=jnp.bfloat16)
    variables, _ = load_pretrained(model, f"file:{folder}", dtype="bfloat16")
    return jax.jit(dataclasses.replace(model, module=module).apply)(variables, x)


def assert_close_in_bfloat16(model, folder):
    folder = written(model, folder)
    x = pictures(model.preprocess.image_size, ROWS)
    wanted = peer_logits(folder, x)
    if wanted is None:  # then what jft computes in float32, which other tests hold against it
        exact, _ = load_pretrained(model, f"file:{folder}")
        wanted = np.asarray(jax.jit(model.apply)(exact, x))
    even = np.zeros_like(wanted)
    assert kl(even, wanted) > 5 * KL, "an even distribution would pass"
    found = low_logits(model, folder, x)
    assert found.dtype == jnp.float32 and kl(found, wanted) <= KL
    return wanted, found


@pytest.mark.parametrize("case", VITS)
def test_vit_in_bfloat16_is_within_the_bar(case, tmp_path):
    model = make_model(name="vit_tiny", args=VITS[case], num_classes=CLASSES)
    assert_close_in_bfloat16(model, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_in_bfloat16_are_within_the_bar(name, tmp_path):
    assert_close_in_bfloat16(make_model(name=name, num_classes=CLASSES), tmp_path)


@pytest.mark.parametrize("mutant", ["two blocks", "epsilon"])
def test_mutants_are_beyond_the_bar(mutant, tmp_path):
    model = make_model(name="vit_tiny", num_classes=CLASSES)
    wanted, _ = assert_close_in_bfloat16(model, tmp_path)
    x = pictures(model.preprocess.image_size, ROWS)
    variables, _ = load_pretrained(model, f"file:{tmp_path / 'weights'}", dtype="bfloat16")
    params = dict(variables["params"])
    if mutant == "two blocks":
        params["blocks_0"], params["blocks_1"] = params["blocks_1"], params["blocks_0"]
    changed = {"epsilon": 0.3} if mutant == "epsilon" else {}
    module = model.module.clone(dtype=jnp.bfloat16, **changed)
    found = module.apply({"params": params}, x)
    assert kl(found, wanted) > KL


def test_the_divergence_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 4))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    assert kl(b, a) == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert kl(a + 7, a) == pytest.approx(0, abs=1e-12)
