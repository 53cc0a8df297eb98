"""The ops of augment.ops: their language, their definitions, and draws that only rows decide."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from jft.data import colour, geometry, policy
from jft.data.augment import OPS, PRESETS, make_ops, read_ops
from jft.data.erase import erase
from jft.data.images import (
    augmented_pixels,
    is_random,
    make_keyed_pixels,
    make_train_transform,
    make_view_transform,
)
from jft.errors import ConfigError
from jft.models.family import Preprocess

pytestmark = pytest.mark.usefixtures("quick")

SIDE = 24
MEAN = (120.0, 110.0, 100.0)
RGB = Preprocess(MEAN, (60.0, 61.0, 62.0), SIDE, 1.0, "bilinear")
NO_FILL = jnp.zeros(3)


def photo(side: int = SIDE, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise, uint8 [side, side, C]."""
    rows, columns = np.mgrid[0:side, 0:side]
    waves = [np.sin(rows / (3 + c)) * np.cos(columns / (4 + c)) for c in range(channels)]
    noise = np.random.default_rng(seed).normal(0, 8, (side, side, channels))
    return np.clip(127 + 110 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def photos(rows: int = 16, channels: int = 3) -> jax.Array:
    return jnp.stack([jnp.float32(photo(channels=channels, seed=i)) for i in range(rows)])


def keys(rows: int = 16, seed: int = 0) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rotat(3)", "character 1: no op 'rotat' (did you mean 'rotate'?)"),
        ("flip | qqq", "character 8: no op 'qqq'; there are flip, flip_vertical, "),
        ("flip || grey", "character 7: a name is missing before '|'"),
        ("flip grey", "character 6: '|' is missing before 'grey'"),
        ("rotate(30", "character 10: ',' or ')' is missing before 'the end'"),
        ("rotate(30,)", "character 11: a value is missing before ')'"),
        ("rotate(,)", "character 8: a value is missing before ','"),
        ("rotate(degree=30)", "character 8: rotate has no 'degree' (did you mean 'degrees'?)"),
        ("rotate(30, degrees=3)", "character 12: rotate: degrees is given twice"),
        ("rotate(p=1, 30)", "character 13: rotate: give values by name after the first such"),
        ("rotate(far)", "degrees should be float from 0 to 180, not 'far'"),
        ("rotate(181)", "degrees should be float from 0 to 180, not 181"),
        ("rotate(border=mirror)", "border should be one of reflect, edge, constant"),
        ("rand_augment(1.5)", "layers should be int from 1 to 8, not 1.5"),
        ("rand_augment(true)", "layers should be int from 1 to 8, not True"),
        ("grey(1e999)", "p should be float from 0 to 1, not inf"),
        ("flip(0.5, 2)", "flip takes p; 2 is too many"),
        ("overhead(3)", "overhead takes no arguments"),
        ("scale(2, 1)", "scale: low 2 should be at most high 1"),
        ("__import__('os')", 'character 12: "\'" has no meaning here'),
        ("flip.grey", "character 5: '.' has no meaning here"),
        ("3", "a name is missing before '3'"),
    ],
)
def test_a_wrong_text_is_one_line_with_its_place(text, words):
    with pytest.raises(ConfigError) as caught:
        read_ops(text)
    assert words in str(caught.value) and str(caught.value).startswith("augment.ops, character")
    assert "\n" not in str(caught.value)


def test_arguments_go_by_place_or_by_name_and_blanks_mean_nothing():
    assert make_ops("", MEAN) is None and make_ops("  ", MEAN) is None
    by_place = make_ops("rotate(30, 1, edge)|posterize( 1,3 )", MEAN)
    by_name = make_ops(" rotate(border=edge, degrees=3e1) | posterize(bits=3, p=1.0)", MEAN)
    assert by_place and by_name
    programs = [str(jax.make_jaxpr(run)(photos(2), keys(2))) for run in (by_place, by_name)]
    assert programs[0] == programs[1]
    assert [name for name, _ in read_ops(PRESETS["overhead"] + "|flip()")] == [
        *(name for name, _ in read_ops("overhead")),
        "flip",
    ]


def test_randomness_is_that_of_the_ops():
    assert not is_random(flip=False, crop="none", ops="equalize(1) | grey(1) | flip(1)")
    assert all(
        is_random(flip=False, crop="none", ops=text) for text in ("equalize(0.5)", "rot90", "blur")
    )


@functools.cache
def everything():
    """f(images, keys) -> {op: images} of every op, with arguments that change something."""
    texts = {name: name for name in OPS} | {
        "colour": "colour(0.4, 0.4, 0.4, 0.1)",
        "erase": "erase(1, mode=pixel)",
        "constant": "rotate(border=constant) | shear(border=edge) | translate(border=edge)",
    }
    made = {name: make_ops(text, MEAN) for name, text in texts.items()}
    return lambda images, keys: {name: run(images, keys) for name, run in made.items() if run}


def over_devices(function, count: int, *given):
    """(the program, its result) with rows spread over so many devices."""
    devices = jax.devices()[:count]
    mesh = jax.make_mesh(
        (count,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )
    spread = jax.NamedSharding(mesh, jax.P("batch"))
    given = jax.device_put(given, spread)
    compiled = jax.jit(function, out_shardings=spread).lower(*given).compile()
    return compiled, jax.device_get(compiled(*given))


@functools.cache
def spread():
    return over_devices(everything(), 8, photos(), keys())


def test_every_op_changes_some_rows_and_keeps_shape_and_range():
    found = spread()[1]
    assert found.keys() >= OPS.keys()
    for name, images in found.items():
        assert images.shape == (16, SIDE, SIDE, 3) and images.dtype == np.float32, name
        assert np.isfinite(images).all() and images.min() >= 0 and images.max() <= 255.001, name
        assert not np.array_equal(images, photos()), name


def test_the_place_of_a_row_changes_nothing_and_no_pixel_leaves_its_device():
    program, found = spread()
    again = program(*jax.device_put((photos()[::-1], keys()[::-1]), program.input_shardings[0]))
    for name, images in found.items():
        np.testing.assert_array_equal(images, again[name][::-1], err_msg=name)
    moves = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not [word for word in moves if f" {word}" in program.as_text()]


def test_the_number_of_devices_changes_nothing():
    run = make_ops("rotate | equalize", MEAN)
    one, many = (over_devices(run, count, photos(), keys())[1] for count in (1, 4))
    np.testing.assert_array_equal(one, many)


def test_nothing_at_zero_strength_bit_for_bit():
    text = (
        "rotate(0) | translate(0, 0) | shear(0, 0, border=constant) | scale(1, 1)"
        " | sharpness(1, 0) | flips(0) | rot90(0) | colour(0, 0, 0, 0) | grey(0) | invert(0)"
        " | autocontrast(0) | equalize(0) | posterize(1, 8) | solarize(1, 256) | blur(0) | erase(0)"
    )
    images = photos(4) * 0.9 + 0.3
    run = make_ops(text, MEAN)
    assert run is not None
    np.testing.assert_array_equal(jax.jit(run)(images, keys(4)), images)


PILLOW = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "posterize": lambda image: ImageOps.posterize(image, 3),
    "solarize": lambda image: ImageOps.solarize(image, 100),
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
}
OURS = {
    "autocontrast": "autocontrast(1)",
    "equalize": "equalize(1)",
    "invert": "invert(1)",
    "posterize": "posterize(1, 3)",
    "solarize": "solarize(1, 100)",
    "grey": "grey(1)",
}


def test_values_are_those_of_pillow():
    pixels = photo()
    dull = (pixels // 3 + 40).astype(np.uint8)
    flat = np.full((SIDE, SIDE, 3), 90, np.uint8)
    flat[0, 0] = 91
    pictures = np.stack([pixels, dull, flat])
    runs = {name: make_ops(text, MEAN) for name, text in OURS.items()}
    found = jax.jit(lambda x, k: {n: run(x, k) for n, run in runs.items() if run})(
        jnp.float32(pictures), keys(3)
    )
    for name, function in PILLOW.items():
        for picture, got in zip(pictures, np.asarray(found[name]), strict=True):
            wanted = np.asarray(function(Image.fromarray(picture)), np.float32)
            assert np.abs(got - wanted).max() <= 1.0, name


def of_pillow(name: str, picture: Image.Image, amount: float, signed: float) -> Image.Image:
    """An op of RandAugment by Pillow, with jft's ranges."""
    side, sign = picture.width, np.sign(signed)
    blends = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "color": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in blends:
        return blends[name](picture).enhance(1 + 0.9 * signed)
    if name == "posterize":
        return ImageOps.posterize(picture, 8 - round(4 * amount))
    if name == "solarize":
        return ImageOps.solarize(picture, 256 * (1 - amount))
    if name in ("autocontrast", "equalize"):
        return PILLOW[name](picture)
    if name == "rotate":
        return picture.rotate(30 * amount * sign, Image.Resampling.BILINEAR)
    centre, far = side / 2, 150 / 331 * side * signed
    slope = 0.3 * signed
    matrices = {
        "shear_x": (1, slope, -slope * centre, 0, 1, 0),
        "shear_y": (1, 0, 0, slope, 1, -slope * centre),
        "translate_x": (1, 0, -far, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -far),
        "identity": (1, 0, 0, 0, 1, 0),
    }
    affine = Image.Transform.AFFINE
    return picture.transform((side, side), affine, matrices[name], Image.Resampling.BILINEAR)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_op_of_rand_augment_is_pillows(sign):
    pixels = photo()
    amount = 0.9

    def one(op):
        signed = jnp.float32(amount * sign)
        image = policy._values(jnp.float32(pixels), op, jnp.float32(amount), signed, policy.RAND)
        matrix = policy._map(op, signed, policy.RAND, SIDE)
        return geometry.sample(image, matrix, "constant", NO_FILL)

    found = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(len(policy.NAMES))))
    for name, got in zip(policy.NAMES, found, strict=True):
        picture = of_pillow(name, Image.fromarray(pixels), amount, amount * sign)
        wanted = np.asarray(picture, np.float32)
        # Where Pillow's picture is black the border shows; it has no half-covered pixels there.
        seen = ndimage.binary_erosion(ndimage.binary_fill_holes((wanted > 0).any(-1)))
        if name not in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
            seen = np.ones((SIDE, SIDE), bool)
        assert seen.mean() > 0.3
        assert np.abs(got - wanted)[seen].max() <= 2.0, name


def test_rand_augment_at_magnitude_0_leaves_all_but_two_ops_bit_for_bit():
    image = jnp.float32(photo()) * 0.7 + 20.3

    def one(op):
        zero = jnp.zeros(())
        matrix = policy._map(op, zero, policy.RAND, SIDE)
        return geometry.sample(
            policy._values(image, op, zero, zero, policy.RAND), matrix, "reflect", NO_FILL
        )

    found = jax.jit(jax.vmap(one))(jnp.arange(len(policy.NAMES)))
    changed = {
        name
        for name, got in zip(policy.NAMES, found, strict=True)
        if not np.array_equal(got, image)
    }
    assert changed == {"autocontrast", "equalize"}


def test_quarter_turns_are_exact_by_sampling_too():
    sampled = jax.jit(lambda image, matrix, fill: geometry.sample(image, matrix, "constant", fill))
    for channels in (1, 3):
        image = jnp.float32(photo(channels=channels))
        fill = jnp.zeros(channels)
        for turns in range(4):
            matrix = geometry.turn(jnp.float32(turns * np.pi / 2))
            got = sampled(image, matrix, fill)
            np.testing.assert_array_equal(got, np.rot90(image, turns))
    odd = jnp.float32(photo(side=15))
    turned = geometry.sample(odd, geometry.turn(jnp.float32(np.pi / 2)), "reflect", NO_FILL)
    np.testing.assert_array_equal(turned, np.rot90(odd))


def test_exact_ops_are_the_same_alone_and_within_a_map():
    images, kinds = photos(), {}
    for text in ("flips | rot90", "flip | flip_vertical"):
        alone, mapped = make_ops(text, MEAN), make_ops(f"{text} | rotate(0)", MEAN)
        assert alone and mapped
        got = jax.jit(alone)(images, keys())
        np.testing.assert_array_equal(got, jax.jit(mapped)(images, keys()), err_msg=text)
        kinds[text] = set()
        for row, image in zip(np.asarray(got), np.asarray(images), strict=True):
            symmetric = [
                np.rot90(flipped, k) for flipped in (image, image[:, ::-1]) for k in range(4)
            ]
            hits = [at for at, other in enumerate(symmetric) if np.array_equal(row, other)]
            assert len(hits) == 1, text
            kinds[text].update(hits)
    # Ops draw apart from each other, so that none of the symmetries is missing.
    assert [len(found) for found in kinds.values()] == [8, 4]


def test_maps_in_a_row_are_sampled_once_and_in_the_written_order():
    def gathers(text):
        run = make_ops(text, MEAN)
        assert run is not None
        return str(jax.make_jaxpr(run)(photos(1), keys(1))).count(" gather[")

    assert gathers("rotate | shear | flips | scale(0.9, 1.1) | translate") == gathers("rotate")
    assert gathers("rotate | grey | shear") == gathers("rotate | shear(border=edge)")
    assert gathers("rotate | grey | shear") == 2 * gathers("rotate")

    rows, columns = np.mgrid[0:64, 0:64]
    smooth = jnp.float32(np.stack([rows * 3, columns * 2, 128 + rows - columns], -1))
    first, second = geometry.shift(6.0, -3.0), geometry.turn(jnp.float32(0.5))
    sample = jax.jit(lambda image, matrix: geometry.sample(image, matrix, "edge", NO_FILL))
    twice = sample(sample(smooth, first), second)
    once = sample(smooth, geometry.compose(first, second))
    assert np.abs(twice - once)[20:44, 20:44].max() < 0.05
    other = sample(smooth, geometry.compose(second, first))
    assert np.abs(twice - other)[20:44, 20:44].max() > 1


def test_borders_mirror_repeat_or_show_the_fill():
    image = jnp.float32(photo())
    away = geometry.shift(5.0, 0.0)
    fill = jnp.array([1.0, 2.0, 3.0])
    sampled = jax.jit(geometry.sample, static_argnums=2)
    shown = {b: sampled(image, away, b, fill) for b in ("reflect", "edge", "constant")}
    for got in shown.values():
        np.testing.assert_array_equal(got[:, 5:], image[:, :-5])
    np.testing.assert_array_equal(shown["reflect"][:, :5], image[:, :5][:, ::-1])
    np.testing.assert_array_equal(shown["edge"][:, :5], np.repeat(image[:, :1], 5, axis=1))
    assert (np.asarray(shown["constant"][:, :5]) == [1, 2, 3]).all()
    far = sampled(image, geometry.shift(1000.0, -777.0), "reflect", fill)
    assert np.isfinite(far).all()


def test_hue_is_that_of_colorsys():
    rng, shifted = np.random.default_rng(0), jax.jit(colour.shifted_hue)
    image = np.concatenate([rng.integers(0, 256, (60, 3)), [[7, 7, 7], [255, 0, 0], [0, 0, 0]]])
    for turns in (0.0, 0.1, -0.37, 0.5):
        got = shifted(jnp.float32(image[None]), jnp.float32(turns))[0]
        for row, pixel in zip(np.asarray(got), image / 255, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            wanted = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
            np.testing.assert_allclose(row, np.multiply(wanted, 255), atol=1e-2)
    still = jnp.float32(photo()) + 0.25
    np.testing.assert_array_equal(colour.shifted_hue(still, jnp.float32(0)), still)


blurred = jax.jit(colour.blurred, static_argnums=2)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur_is_a_gaussian(sigma):
    image = np.float32(photo())
    got = blurred(jnp.asarray(image), jnp.float32(sigma), 6)
    wanted = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="reflect", radius=(6, 6, 0))
    np.testing.assert_allclose(got, wanted, atol=0.05)


def test_what_is_erased_has_the_stated_area_and_content():
    image = jnp.float32(photo()) * 0.9 + 0.5  # no value is whole
    fill = jnp.array(MEAN)
    modes = ("const", "colour", "pixel")
    runs = {mode: erase(1.0, 0.1, 0.3, 0.5, mode).run for mode in modes} | {"some": erase().run}

    def one(key):
        return {name: run(image, key, fill) for name, run in runs.items()}

    found = jax.device_get(jax.jit(jax.vmap(one))(keys(256)))
    gone = {name: (images != np.asarray(image)).any(-1) for name, images in found.items()}
    for mode in modes:
        shares = gone[mode].mean((1, 2))
        assert 0.08 < shares.min() < 0.15 and 0.25 < shares.max() < 0.32
        assert all(row.sum() == row.any(0).sum() * row.any(1).sum() for row in gone[mode])  # a box
        inner = found[mode][0][gone[mode][0]]
        assert (len(np.unique(inner, axis=0)) == 1) == (mode != "pixel")
    assert (found["const"][gone["const"]] == MEAN).all()
    assert 0.17 < gone["some"].any((1, 2)).mean() < 0.33


def test_any_number_of_channels_but_colours_need_three():
    text = "colour(0.4, 0.4) | rand_augment | erase(1)"
    run = make_ops(text, (100.0,) * 5)
    assert run is not None
    found = jax.jit(run)(photos(2, channels=5), keys(2))
    assert found.shape == (2, SIDE, SIDE, 5) and np.isfinite(found).all()
    for wrong, words in {
        "flip | grey": "grey needs images of 3 channels, the model takes 5",
        "colour(0.1, 0.1, 0.1)": "colour's saturation needs",
        "colour(hue=0.1)": "colour's hue needs",
    }.items():
        with pytest.raises(ConfigError, match=words):
            make_ops(wrong, (100.0,) * 5)
    # A grey picture for a model of three channels: its colours cannot change.
    grey = photos(2, channels=1)
    run = make_ops("grey(1) | colour(0, 0, 0.9, 0.5)", MEAN)
    assert run is not None
    np.testing.assert_array_equal(jax.jit(run)(grey, keys(2)), grey)


def test_ops_leave_the_draws_of_crop_and_flip_alone():
    images = np.stack([photo(30, seed=i) for i in range(8)])
    index = jnp.arange(8)
    given = (images, jax.random.key(1), index)
    plain = make_train_transform(RGB, crop="random_resized")
    with_ops = make_train_transform(RGB, crop="random_resized", ops="rotate(0)")
    np.testing.assert_allclose(jax.jit(with_ops)(*given), jax.jit(plain)(*given), atol=1e-5)


def test_a_view_has_the_same_pixels_in_any_batch():
    make = functools.partial(make_view_transform, RGB, seed=3, ops="rotate | grey(0.5)")
    images = np.stack([photo(30, seed=i) for i in range(6)])
    example, view = np.arange(6, dtype=np.int32), np.array([0, 1, 0, 1, 0, 1], np.int32)
    together = jax.jit(make())(images, example, view)
    pair = jax.jit(make())(images[[4, 1]], example[[4, 1]], view[[4, 1]])
    np.testing.assert_array_equal(pair, together[np.array([4, 1])])
    other = jax.jit(make())(images[[4, 1]], example[[4, 1]], 1 - view[[4, 1]])
    assert not np.array_equal(other, pair)


def test_what_is_shown_of_an_augmentation_is_what_training_sees():
    images = np.stack([photo(30, seed=i) for i in range(4)])
    augment = dict(ops="rotate(20) | colour")
    shown = augmented_pixels(RGB, images, seed=5, **augment)
    assert shown.dtype == np.uint8 and shown.shape == (4, SIDE, SIDE, 3)
    train = jax.jit(make_train_transform(RGB, **augment))
    trained = train(images, jax.random.key(5), jnp.arange(4))
    raw = np.asarray(trained) * np.float32(RGB.std) + np.float32(RGB.mean)
    assert np.abs(raw - shown).max() <= 0.51
    grey = augmented_pixels(RGB, images[..., :1], seed=5, ops="flips")
    assert grey.shape == (4, SIDE, SIDE, 1)


def test_ops_see_no_value_beyond_the_range_of_an_image():
    """A cubic filter overshoots at an edge of black and white."""
    cubic = Preprocess((0.0,), (1.0,), SIDE, 1.0, "bicubic")
    edge = np.zeros((1, 8, 8, 1), np.uint8)
    edge[:, :, 4:] = 255
    plain = jax.jit(make_keyed_pixels(cubic, flip=False))(edge, keys(1))
    assert plain.min() < -1 and plain.max() > 256
    inverted = jax.jit(make_keyed_pixels(cubic, flip=False, ops="invert(1)"))(edge, keys(1))
    assert inverted.min() == 0 and inverted.max() == 255
