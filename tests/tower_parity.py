"""What the parity tests of CLIP's and SigLIP's image towers share."""

import jax.numpy as jnp
from parity import (
    LOGITS,
    assert_loads_strictly,
    convert,
    distance,
    fine_tuned,
    pictures,
    saved_names,
    torch_images,
)

from jft.models.zoo import make_model
from jft.weights.convert import load_pretrained

SWAPS = {"query and key": ("query", "key"), "key and value": ("key", "value")}


def ours(tiny, peer, folder, classes=7, **changed):
    """(model, variables, image size) of a peer that transformers saved, its head included."""
    family = make_model(name=tiny, num_classes=1).family
    config = peer.config.to_dict()
    size = config.get("vision_config", config)["image_size"]
    args = family.variant_from_config(config) | {"image_size": size, **changed}
    model = make_model(name=tiny, args=args, num_classes=classes)
    return model, convert(model, saved_names(peer, folder), size), size


def hidden_states(peer, x, first):
    """{stage: torch tensor} of a transformers tower in float64, up to its last block."""
    found = peer.double()(torch_images(x).double(), output_hidden_states=True)
    names = [first, *(f"blocks_{i}" for i in range(len(found.hidden_states) - 1))]
    return dict(zip(names, found.hidden_states, strict=True))


def mutated(variables, mutant):
    """The variables with layers or matrices in each other's place."""
    params = dict(variables["params"])
    if mutant == "layers":
        params["blocks_0"], params["blocks_1"] = params["blocks_1"], params["blocks_0"]
    if mutant in SWAPS:
        attn = dict(params["blocks_1"]["attn"])
        one, other = SWAPS[mutant]
        attn[one], attn[other] = attn[other], attn[one]
        params["blocks_1"] = {**params["blocks_1"], "attn": attn}
    return {"params": params}


def assert_exports_strictly(tiny, kind, folder):
    """A fine-tuned model in jft's own folder is the same function in transformers."""
    model = make_model(name=tiny, num_classes=5)
    variables, table = fine_tuned(model)
    wanted = assert_loads_strictly(model, variables, table, folder, kind)
    start, _ = load_pretrained(model, "random:0")
    found = model.apply(start, jnp.asarray(pictures(model.preprocess.image_size)))
    assert distance(found, wanted) > LOGITS, "it was fine-tuned"
