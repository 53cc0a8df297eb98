"""No export computes another function than its model: a field is written, shown, or refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jft.errors import ConfigError, WeightsError
from jft.models.layers import GELUS
from jft.models.own_config import config_of
from jft.models.zoo import list_models, make_model, model_args
from jft.weights.agreement import stated_fields
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.naming import abstract_leaves
from jft.weights.source import Source

WORDS = {
    "gelu": GELUS,
    "act": ("relu", "gelu", "silu"),
    "inner_act": ("relu", "gelu", "silu"),
    "stride_in": ("conv1", "conv2"),
    "pooling": ("cls", "mean", "cls+mean", "probe"),
    "padding": ("same", "fixed", "symmetric", "before", "after"),
}
IN_TRAINING = ("_rate", "momentum")
FOUR_STAGES = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "final_epsilon": 1e-6}
# From which the changes start: what most libraries can compute, in few blocks.
GIVEN = {
    "vit_tiny": {"depth": 2, "epsilon": 1e-6},
    "deit_tiny": {"depth": 2, "epsilon": 1e-6},
    "dinov2_tiny": {"depth": 2, "registers": 0},
    "clip_tiny": {"depth": 2},
    "siglip_tiny": {"depth": 2},
    "convnext_tiny": FOUR_STAGES,
    "convnextv2_tiny": FOUR_STAGES,
    # Where windows do not divide the maps, which shows on which side they are padded.
    "swin_tiny": {"image_size": 40},
}


def other_values(name, value):
    """Further values of a field; one that its family has not is left out by the caller."""
    if name in WORDS:
        return [word for word in WORDS[name] if word != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, float):
        return [value * 2]
    if isinstance(value, int):
        return [value * 2, value // 2] if value else [2]
    if name == "symmetric_blocks":
        return [(1,)]
    assert isinstance(value, tuple), f"how might {name} be changed?"
    return [value[:-1]] if isinstance(value[0], tuple) else [tuple(2 * x for x in value)]


def changes(variant):
    """(arguments, name, value) of each change alone and after one that no shape shows."""
    usual = model_args(variant) | GIVEN.get(variant, {})
    usual = {k: v for k, v in usual.items() if k not in ("image_size", "dtype")}
    usual = {k: v for k, v in usual.items() if not k.endswith(IN_TRAINING)}
    single = [(name, new) for name in usual for new in other_values(name, usual[name])]
    quiet = [(k, v) for k, v in single if isinstance(v, bool | str) or "epsilon" in k]
    for first in ({}, *({k: v} for k, v in quiet)):
        yield from ((first, name, value) for name, value in single if name not in first)


def same_leaves(*models):
    first, second = ({k: v[1].shape for k, v in abstract_leaves(m).items()} for m in models)
    return first == second


def same_function(*models):
    """Whether two models are one computation, as where pooling ends what a field is about."""
    size = models[0].preprocess.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(models[0].init, jax.random.key(0), image)
    first, second = (str(jax.make_jaxpr(model.apply)(variables, image)) for model in models)
    return first == second


@pytest.mark.parametrize("variant", list_models("*_tiny"))
def test_a_class_of_transformers_is_named_beside_its_own_names_alone(variant):
    """It would load other names without an error, and start from random numbers."""
    model = make_model(name=variant, args=GIVEN.get(variant, {}), num_classes=3)
    titles = [
        table.title
        for table in model.family.tables
        if table.writes(model) and "architectures" in config_of(model, table)
    ]
    assert all(title.startswith("Hugging Face") for title in titles)
    assert titles or variant == "efficientnet_lite_tiny", "which transformers has not"


@pytest.mark.parametrize("names_alone", [False, True])
@pytest.mark.parametrize("title", ["Hugging Face", "timm"])
def test_a_head_behind_the_probe_is_not_kept_behind_the_mean(tmp_path, title, names_alone):
    form = {"depth": 1, "pooling": "probe", "epsilon": 1e-6 if title == "timm" else 1e-5}
    first = make_model(name="siglip_tiny", args=form, num_classes=3)
    table = [table.title for table in first.family.tables].index(title)
    variables, _ = load_pretrained(first, "random:0")
    out = export_weights(first, variables, tmp_path / "out", table=table)
    for file in out.glob("*.json") if names_alone else ():
        file.unlink()
    other = make_model(name="siglip_tiny", args=form | {"pooling": "mean"}, num_classes=3)
    if names_alone and title == "Hugging Face":  # as files of the averaging class have it too
        _, report = load_pretrained(other, f"file:{out}")
        assert any("do not say pooling: taken to be 'mean'" in note for note in report.notes)
        return
    with pytest.raises(WeightsError, match="pooling|does not fit"):
        load_pretrained(other, f"file:{out}")


def test_a_head_of_another_width_and_other_classes_is_made_anew(tmp_path):
    first = make_model(name="dinov2_tiny", args={"depth": 1}, num_classes=3)
    variables, _ = load_pretrained(first, "random:0")
    out = export_weights(first, variables, tmp_path / "out")
    other = make_model(name="dinov2_tiny", args={"depth": 1, "pooling": "cls"}, num_classes=4)
    _, report = load_pretrained(other, f"file:{out}", key=jax.random.key(0))
    assert report.paths("fresh") == ["head/bias", "head/kernel"]


# Two that the family offers: that of Hugging Face's classifier, and another.
POOLINGS = {
    "vit_tiny": ("cls", "mean"),
    "dinov2_tiny": ("cls+mean", "cls"),
    "clip_tiny": ("mean", "cls"),
    "siglip_tiny": ("mean", "probe"),
}


@pytest.mark.parametrize("names_alone", [False, True])
@pytest.mark.parametrize("variant", POOLINGS)
def test_a_head_is_kept_only_behind_the_pooling_that_it_read(tmp_path, variant, names_alone):
    def model_with(pooling):
        args = {"depth": 1, "pooling": pooling}
        return make_model(name=variant, args=args, num_classes=3)

    first, other = map(model_with, POOLINGS[variant])
    variables, _ = load_pretrained(first, "random:0")
    out = export_weights(first, variables, tmp_path / "out")
    for file in out.glob("*.json") if names_alone else ():
        file.unlink()
    load_pretrained(first, f"file:{out}")
    if names_alone and variant == "clip_tiny":  # names of two classes, one without a classifier
        _, report = load_pretrained(other, f"file:{out}")
        assert any("do not say pooling: taken to be 'cls'" in note for note in report.notes)
        return
    # SigLIP's shows by its leaves.
    with pytest.raises(WeightsError, match="pooling|missing"):
        load_pretrained(other, f"file:{out}")
    if variant in ("vit_tiny", "dinov2_tiny"):
        _, report = load_pretrained(other, f"file:{out}", fresh=["head/.*"], key=jax.random.key(0))
        assert report.paths("fresh") == ["head/bias", "head/kernel"]


@pytest.mark.parametrize("variant", list_models("*_tiny"))
def test_every_field_is_written_or_shown_by_leaves_or_the_model_is_not_exported(variant):
    checked, given = 0, GIVEN.get(variant, {})
    for args, name, value in changes(variant):
        both = args, args | {name: value}
        try:
            models = [make_model(name=variant, args=given | a, num_classes=3) for a in both]
        except ConfigError:
            continue
        model, equal = models[1], None
        for table in model.family.tables:
            if not table.writes(model) or equal:
                continue
            config = json.loads(json.dumps(config_of(model, table)))
            stated = stated_fields(model.family, Source("", Path(), (), config), table)
            checked += 1
            if stated.get(name) == value:
                continue
            if equal is None:
                equal = not same_leaves(*models) or same_function(*models)
            assert equal, f"{table.title} keeps quiet of {name} = {value!r} beside {args}"
    assert checked > 10
