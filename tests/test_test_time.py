"""Views at test time: what they show, and that the mean is one of probabilities."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import load_config
from jft.data.images import make_eval_transform
from jft.data.test_time import link_of, make_test_time, make_views, mean_logits, read_views
from jft.errors import ConfigError
from jft.losses import softmax
from jft.models.family import Preprocess
from jft.parts import make_parts
from jft.task import make_data, make_task
from jft.train.step import make_eval_step
from jft.tree import flatten

pytestmark = pytest.mark.usefixtures("quick")

RGB = Preprocess((120.0, 110.0, 100.0), (60.0, 61.0, 62.0), 28, 0.875, "bilinear")  # canvas 32


def images(rows=2, side=32):
    return np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)


def seen(text, given=None, preprocess=RGB):
    """The views [V, B, S, S, C] of a text, on the scale of pixels."""
    views = make_views(text, preprocess)
    assert views is not None
    raw = np.asarray(views(images() if given is None else given))
    return raw * np.float32(preprocess.std) + np.float32(preprocess.mean)


def test_one_view_is_plain_evaluation():
    assert make_views("", RGB) is None and make_views("scales(1)", RGB) is None
    assert make_test_time(None, "softmax") is None


def test_views_multiply_and_none_counts_twice():
    counts = {"flip": 2, "flips": 4, "rot90": 4, "flip | rot90": 8, "flips | rot90": 8}
    counts |= {"five_crop": 5, "ten_crop": 10, "ten_crop | flip": 10, "five_crop | flip": 10}
    counts |= {"scales(1, 1.1, 1.2)": 3, "flip | scales(1, 1.25)": 4, "flip | flip": 2}
    assert {text: len(read_views(text)) for text in counts} == counts
    assert set(read_views("ten_crop")) == set(read_views("flip | five_crop"))


def test_the_eight_symmetries_are_exact():
    plain = seen("flip")[0]
    wanted = [
        np.rot90(picture, turns, axes=(1, 2))
        for picture in (plain, plain[:, :, ::-1])
        for turns in range(4)
    ]
    for text, count in {"flip": 2, "flips": 4, "rot90": 4, "rot90 | flip": 8}.items():
        found = seen(text)
        hits = [sum(np.array_equal(view, other) for other in wanted) for view in found]
        assert hits == [1] * count
        assert len({view.tobytes() for view in found}) == count
    np.testing.assert_array_equal(seen("flips")[2], plain[:, ::-1])
    np.testing.assert_array_equal(seen("rot90")[1], np.rot90(plain, axes=(1, 2)))


def test_crops_are_corners_and_centre_of_the_whole_picture():
    given = images()
    found = np.rint(seen("five_crop", given))
    corners = [given[:, r : r + 28, c : c + 28] for r in (0, 4) for c in (0, 4)]
    for view, wanted in zip(found, [*corners, given[:, 2:30, 2:30]], strict=True):
        np.testing.assert_array_equal(view, wanted)
    ten = np.rint(seen("ten_crop", given))
    np.testing.assert_array_equal(ten[0::2], found)
    np.testing.assert_array_equal(ten[1::2], found[:, :, :, ::-1])


def test_views_of_a_square_are_views_of_the_whole_picture():
    squashed = replace(RGB, resize="square", rounding="down")
    given = np.repeat(images(side=32), 2, axis=2)  # twice as wide: every column stands twice
    box = replace(squashed, interpolation="box")
    for text in ("five_crop", "flip | rot90"):
        np.testing.assert_allclose(seen(text, given, box), seen(text), atol=1e-3)
    zoomed = seen("scales(1.2, 1.3)", given, squashed)
    assert zoomed.shape == (2, 2, 28, 28, 3) and np.isfinite(zoomed).all()


def test_scales_enlarge_about_the_centre():
    given = images(side=64)
    whole = Preprocess((0.0,) * 3, (1.0,) * 3, 32, 1.0, "bilinear")
    found = seen("scales(1, 2)", given, whole)
    np.testing.assert_allclose(found[0], make_eval_transform(whole)(given), atol=1e-3)
    np.testing.assert_allclose(found[1], given[:, 16:48, 16:48], atol=1e-3)
    with pytest.raises(ConfigError, match=r"scales\(0.9\) sees more than the picture.* allow 1 "):
        make_views("scales(0.9)", whole)
    assert make_views("scales(0.9)", RGB) is not None  # the canvas has that much


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flop", "eval.tta, character 1: no op 'flop' (did you mean 'flip'?)"),
        ("five_crop | scales(1.1)", "five_crop and scales both crop"),
        ("scales", "give enlargements"),
        ("scales(0)", "scales: a value should be float from 0.1 to 10, not 0"),
        ("five_crop(2)", "share should be float from 0.1 to 1"),
    ],
)
def test_a_wrong_text_is_one_line(text, words):
    with pytest.raises(ConfigError) as caught:
        read_views(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config("digits_vit:tiny", [f"eval.tta={text}"])
    assert str(caught.value).startswith("config.eval.tta")


def test_the_mean_is_one_of_probabilities():
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32) * 3
    found = mean_logits(jnp.asarray(logits), "softmax")
    wanted = jax.nn.softmax(logits, axis=-1).mean(0)
    np.testing.assert_allclose(jax.nn.softmax(found), wanted, rtol=1e-5)
    label = np.array([0, 4, 2])
    np.testing.assert_allclose(
        softmax()(found, label), -np.log(wanted[np.arange(3), label]), rtol=1e-5
    )
    found = mean_logits(jnp.asarray(logits), "sigmoid")
    np.testing.assert_allclose(jax.nn.sigmoid(found), jax.nn.sigmoid(logits).mean(0), rtol=1e-5)
    found = mean_logits(jnp.asarray(logits), "identity")
    np.testing.assert_allclose(found, logits.mean(0), rtol=1e-5)
    extreme = jnp.array([[[500.0, -500.0]], [[-500.0, 500.0]]])
    assert np.isfinite(mean_logits(extreme, "sigmoid")).all()
    assert [link_of(*pair) for pair in (("value", "huber"), ("class", "focal"))] == [
        "identity",
        "softmax",
    ]
    assert link_of("multi", "sigmoid_focal") == link_of("class", "sigmoid") == "sigmoid"


def test_the_evaluation_step_of_a_config_averages_over_its_views():
    def logits_of(text, image):
        config = load_config("digits_vit:tiny", [f"eval.tta={text}"])
        splits = make_data(config)
        task = make_task(config, splits.label_names, splits.train.image_shape)
        variables = task.model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        params = flatten(variables["params"])
        # The head starts at zero: other values, so that views differ.
        params["head/kernel"] = jax.random.normal(jax.random.key(1), params["head/kernel"].shape)
        step = jax.jit(make_eval_step(make_parts(task)))
        batch = {"image": image, "label": np.zeros(len(image), np.int32)}
        return step(params, {}, batch)

    image = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    views = [logits_of("", x)["logits"] for x in (image, image[:, :, ::-1])]
    wanted = np.mean([jax.nn.softmax(view) for view in views], axis=0)
    found = logits_of("flip", image)
    np.testing.assert_allclose(jax.nn.softmax(found["logits"]), wanted, rtol=2e-5)
    np.testing.assert_allclose(found["loss"], -np.log(wanted[:, 0]), rtol=2e-5)
    assert np.abs(views[0] - views[1]).max() > 1e-3
