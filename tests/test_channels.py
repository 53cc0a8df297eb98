"""Images of other channels: what a grey image gives stays, whatever the number of channels."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_convert import replace, source_with, tiny

from jft import fit, load_config, setup
from jft.errors import WeightsError
from jft.models.family import Preprocess, adapt_preprocess
from jft.models.zoo import make_model
from jft.weights.channels import adapt_channels
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights, write_random

FIRST = {
    "vit_tiny": "embed/patch/kernel",
    "efficientnet_lite_tiny": "stem/conv/kernel",
    "swin_tiny": "embed/patch/kernel",
    "resnet_tiny": "stem/conv/kernel",
}
PATCH = "vit.embeddings.patch_embeddings.projection.weight"


def with_channels(model, channels):
    """The model, made for images of so many channels."""
    return type(model)(
        model.module,
        model.family,
        model.variant,
        model.num_classes,
        adapt_preprocess(model.preprocess, channels),
    )


def distance(a, b):
    return np.abs(a - b).max() / max(1, np.abs(b).max())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 13])
@pytest.mark.parametrize("have", [1, 2, 3, 4])
def test_the_sum_over_channels_is_kept_so_grey_gives_the_same(have, channels):
    kernel = np.random.default_rng(0).normal(size=(3, 3, have, 5)).astype(np.float32)
    adapted = adapt_channels(kernel, channels)
    assert adapted.shape == (3, 3, channels, 5) and adapted.dtype == np.float32
    np.testing.assert_allclose(adapted.sum(2), kernel.sum(2), rtol=0, atol=1e-6)
    assert all(np.abs(adapted[:, :, i]).max() > 0 for i in range(channels)), "no channel is deaf"
    if channels == have:
        np.testing.assert_array_equal(adapted, kernel)


def test_one_channel_is_the_sum_and_six_are_halves_of_three():
    kernel = np.random.default_rng(0).normal(size=(1, 1, 3, 4)).astype(np.float32)
    exact = kernel.astype(np.float64).sum(2, keepdims=True).astype(np.float32)
    np.testing.assert_array_equal(adapt_channels(kernel, 1), exact)
    np.testing.assert_array_equal(
        adapt_channels(kernel, 6), np.concatenate([kernel / 2, kernel / 2], axis=2)
    )


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("channels", [1, 4])
def test_a_loaded_model_answers_a_grey_image_as_before(tmp_path, name, channels):
    model = tiny(name, **({"depth": 1} if name == "vit_tiny" else {}))
    source = source_with(tmp_path, model)
    grey = np.random.default_rng(1).normal(size=(2, 32, 32, 1)).astype(np.float32)
    other = with_channels(model, channels)
    before, _ = load_pretrained(model, source)
    after, report = load_pretrained(other, source)
    (row,) = [row for row in report.rows if row.status == "adapted"]
    assert row.path == FIRST[name] and f"3 -> {channels} input channels" in row.note
    assert report.coverage == 1.0 and f"adapted   {FIRST[name]}" in report.text()
    first = jax.jit(lambda v, x: model.apply(v, x, stop=1))
    full = jax.jit(model.apply)
    wide, narrow = np.repeat(grey, channels, -1), np.repeat(grey, 3, -1)
    assert distance(first(after, wide), first(before, narrow)) <= 1e-6
    assert distance(full(after, wide), full(before, narrow)) <= 1e-5
    for path, leaf in load_pretrained(other, source, image_shape=(32, 32, channels))[0].items():
        same = jax.tree.map(np.array_equal, leaf, after[path])
        assert all(jax.tree.leaves(same)), "image_shape and the model's own channels agree"


def test_a_model_of_four_channels_exports_and_loads_again_and_adapts_back(tmp_path):
    model = tiny(depth=1)
    four = with_channels(model, 4)
    variables, report = load_pretrained(four, source_with(tmp_path, model))
    assert len(report.preprocess.mean) == 4
    out = export_weights(four, variables, tmp_path / "out", preprocess=report.preprocess)
    again, second = load_pretrained(four, f"file:{out}")
    assert not second.paths("adapted") and second.preprocess == report.preprocess
    np.testing.assert_array_equal(
        again["params"]["embed"]["patch"]["kernel"], variables["params"]["embed"]["patch"]["kernel"]
    )
    _, third = load_pretrained(model, f"file:{out}")
    assert third.paths("adapted") == ["embed/patch/kernel"]
    assert "averaged for each of 3" in third.text() and len(third.preprocess.std) == 3
    assert load_file(out / "model.safetensors")[PATCH].shape == (32, 4, 8, 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.ascontiguousarray(x[:, :2, :, :4]),  # another patch size too
        lambda x: np.ascontiguousarray(x[:16, :2]),  # another width too
        lambda x: np.zeros((32, 0, 8, 8), np.float32),
        lambda x: x[:, :2].astype(np.int32),
    ],
)
def test_only_the_number_of_channels_may_differ(tmp_path, change):
    with pytest.raises(WeightsError, match="'embed/patch/kernel' has shape"):
        load_pretrained(tiny(), source_with(tmp_path, tiny(), replace(PATCH, change)))


def test_a_lower_precision_is_raised_before_channels_are_summed(tmp_path):
    def lower(arrays):
        return {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()}

    source = source_with(tmp_path, tiny(depth=1), lower)
    full, _ = load_pretrained(tiny(depth=1), source, dtype="float32")
    three = full["params"]["embed"]["patch"]["kernel"]
    one, _ = load_pretrained(with_channels(tiny(depth=1), 1), source)
    np.testing.assert_allclose(
        one["params"]["embed"]["patch"]["kernel"][:, :, 0], three.sum(2), rtol=1e-6, atol=1e-7
    )


def test_preprocessing_is_the_same_for_every_new_channel():
    photo = Preprocess((123.0, 117.0, 105.0), (58.0, 57.0, 59.0), 32, crop_fraction=0.9)
    assert adapt_preprocess(photo, 3) is photo
    grey, five = adapt_preprocess(photo, 1), adapt_preprocess(photo, 5)
    assert grey.mean == (115.0,) and grey.std == (58.0,) and grey.crop_fraction == 0.9
    assert five.mean == (115.0,) * 5 and five.std == (58.0,) * 5
    assert jnp.asarray(five.mean).shape == (5,)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("channels", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_of_three_channels_learns_from_other_numbers_of_bands(tmp_path, channels):
    blocks = [[1, 3, 1, 1, 8], [1, 3, 2, 3, 16]]
    args = {"blocks": blocks, "final_features": 32}
    model = make_model(name="efficientnet_lite_tiny", args=args, num_classes=7)
    source = write_random(model, tmp_path / "w", 0)
    rng = np.random.default_rng(0)
    label = np.arange(120) % 3
    images = rng.integers(0, 60, (120, 16, 16, channels)) + 80 * label[:, None, None, None]
    np.savez(tmp_path / "bands.npz", image=images.astype(np.uint8), label=label)
    keys = [
        "data.name=npz",
        f"data.path={tmp_path}/bands.npz",
        f"data.channels={channels}",
        "data.image_size=16",
        f"model.args.blocks={blocks}",
        "model.args.final_features=32",
        "model.args.norm_momentum=0.8",  # 40 steps are too few to average over 100
        f"init.source=file:{source}",
        "freeze.phases=head@10% | all",
        "optim.learning_rate=0.01",
        "train.steps=40",
        "train.batch_size=24",
        "augment.crop=none",
        "eval.every_steps=None",
        "parallel.devices=1",
        "log.tensorboard=False",
    ]
    run = setup(load_config("folder:tiny", keys), tmp_path / "run")
    outcome = fit(run)
    rows = json.loads((tmp_path / "run" / "conversion.json").read_text())["rows"]
    adapted = [row["path"] for row in rows if row["status"] == "adapted"]
    assert adapted == ["stem/conv/kernel"]
    assert outcome.metrics["test/accuracy"] > 0.9
