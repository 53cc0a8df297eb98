"""ViT weights as Google saved them, npz in Flax's names: the same model as Hugging Face's names."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file
from test_convert import assert_bitwise, tiny

from jft.errors import WeightsError
from jft.weights import naming as namings
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights, write_random

ARGS = {"epsilon": 1e-6, "gelu": "tanh", "depth": 2}
HEADS, WIDTH = 4, 32
AUGREG = {"attn": "MultiHeadDotProductAttention_1", "norm2": "LayerNorm_2", "mlp": "MlpBlock_3"}
BIG_VISION = {"attn": "MultiHeadDotProductAttention_0", "norm2": "LayerNorm_1", "mlp": "MlpBlock_0"}


def hugging_face(tmp_path, model):
    """(source, arrays) in Hugging Face's names."""
    folder = write_random(model, tmp_path / "hf", seed=3)
    return f"file:{folder}", load_file(folder / "model.safetensors")


def as_flax(arrays, names=AUGREG, depth=2):
    """The arrays of a Hugging Face file as the Flax original keeps them, written out by hand."""

    def dense(source):
        return arrays[f"{source}.weight"].T, arrays[f"{source}.bias"]

    embeddings, out = "vit.embeddings", {}
    position = "Transformer/posembed_input/pos_embedding"
    out["cls"] = arrays[f"{embeddings}.cls_token"]
    out[position] = arrays[f"{embeddings}.position_embeddings"]
    patch = f"{embeddings}.patch_embeddings.projection"
    out["embedding/kernel"] = np.einsum("oihw->hwio", arrays[f"{patch}.weight"])
    out["embedding/bias"] = arrays[f"{patch}.bias"]
    norms = {"Transformer/encoder_norm": "vit.layernorm"}
    for i in range(depth):
        layer, block = f"vit.encoder.layer.{i}", f"Transformer/encoderblock_{i}"
        norms[f"{block}/LayerNorm_0"] = f"{layer}.layernorm_before"
        norms[f"{block}/{names['norm2']}"] = f"{layer}.layernorm_after"
        attn = f"{block}/{names['attn']}"
        for part in ("query", "key", "value"):
            kernel, bias = dense(f"{layer}.attention.attention.{part}")
            out[f"{attn}/{part}/kernel"] = kernel.reshape(WIDTH, HEADS, WIDTH // HEADS)
            out[f"{attn}/{part}/bias"] = bias.reshape(HEADS, WIDTH // HEADS)
        kernel, bias = dense(f"{layer}.attention.output.dense")
        out[f"{attn}/out/kernel"] = kernel.reshape(HEADS, WIDTH // HEADS, WIDTH)
        out[f"{attn}/out/bias"] = bias
        for number, source in enumerate(("intermediate", "output")):
            kernel, bias = dense(f"{layer}.{source}.dense")
            mlp = f"{block}/{names['mlp']}/Dense_{number}"
            out[f"{mlp}/kernel"], out[f"{mlp}/bias"] = kernel, bias
    for ours, theirs in norms.items():
        out[f"{ours}/scale"], out[f"{ours}/bias"] = (
            arrays[f"{theirs}.weight"],
            arrays[f"{theirs}.bias"],
        )
    out["head/kernel"], out["head/bias"] = dense("classifier")
    return out


def npz(tmp_path, arrays, name="weights.npz"):
    np.savez(tmp_path / name, **arrays)
    return f"file:{tmp_path / name}"


@pytest.fixture
def model():
    return tiny(**ARGS)


def test_both_namings_give_the_same_leaves_bit_for_bit_and_the_same_logits(tmp_path, model):
    source, arrays = hugging_face(tmp_path, model)
    wanted, _ = load_pretrained(model, source)
    found, report = load_pretrained(model, npz(tmp_path, as_flax(arrays)))
    assert_bitwise(found, wanted)
    assert report.table == 1 and report.coverage == 1.0 and not report.unread
    assert report.preprocess.mean == report.preprocess.std == (127.5,) * 3
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(found, image), apply(wanted, image))


class Original(nn.Module):
    """The encoder block of the published files as Linen's own layers compute it."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        y = nn.MultiHeadDotProductAttention(HEADS, name="MultiHeadDotProductAttention_1")(y, y)
        x = x + y
        y = nn.LayerNorm(name="LayerNorm_2")(x)
        y = nn.gelu(nn.Dense(2 * WIDTH, name="Dense_0")(y))
        return x + nn.Dense(WIDTH, name="Dense_1")(y)


def test_a_block_computes_what_linens_own_layers_compute(tmp_path, model):
    """Heads, epsilon and GELU as in the original; each of them wrong shows."""
    _, arrays = hugging_face(tmp_path, model)
    flax = as_flax(arrays)
    variables, _ = load_pretrained(model, npz(tmp_path, flax))
    prefix = "Transformer/encoderblock_1/"
    nested = {}
    for name, value in flax.items():
        if name.startswith(prefix):
            *parents, leaf = name.removeprefix(prefix).removeprefix("MlpBlock_3/").split("/")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = jnp.asarray(value)
    tokens = np.random.default_rng(0).normal(size=(2, 17, WIDTH)).astype(np.float32)
    wanted = jax.jit(Original().apply)({"params": nested}, tokens)
    for args, close in (
        (ARGS, True),
        (ARGS | {"gelu": "exact"}, False),
        (ARGS | {"heads": 2}, False),
        (ARGS | {"epsilon": 1e-2}, False),
    ):
        run = functools.partial(tiny(**args).apply, start=2, stop=3)
        far = np.abs(jax.jit(run)(variables, tokens) - wanted).max() / np.abs(wanted).max()
        assert (far <= 1e-5) == close, (args, far)


def test_the_table_writes_what_it_reads(tmp_path, model):
    source, arrays = hugging_face(tmp_path, model)
    variables, _ = load_pretrained(model, source)
    leaves = {path: leaf for path, (_, leaf) in namings.join(variables).items()}
    naming = namings.naming_of(model, leaves, 1)
    written = namings.to_source_arrays(naming, leaves)
    wanted = as_flax(arrays)
    assert written.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(written[name], wanted[name], err_msg=name)


@pytest.mark.parametrize(
    "args",
    [{"class_token": False, "pooling": "mean"}, {"class_position": False}],
    ids=["without a class token", "with a class token that has no position"],
)
def test_big_vision_names_are_read_with_and_without_their_folder(tmp_path, args):
    model = tiny(**ARGS, **args)
    wanted, _ = load_pretrained(model, "random:3")
    leaves = {path: leaf for path, (_, leaf) in namings.join(wanted).items()}
    arrays = namings.to_source_arrays(namings.naming_of(model, leaves), leaves)
    flax = as_flax({"vit.embeddings.cls_token": None} | arrays, BIG_VISION)
    flax["pos_embedding"] = flax.pop("Transformer/posembed_input/pos_embedding")
    if flax["cls"] is None:
        del flax["cls"]
    in_folder = {f"params/{name}": value for name, value in flax.items()}
    in_folder["opt/0/count"] = np.zeros((), np.int32)
    for number, named in enumerate((flax, in_folder)):
        found, report = load_pretrained(model, npz(tmp_path, named, f"{number}.npz"))
        assert_bitwise(found, wanted)
        assert report.table == 2
    assert report.unread == ["opt/0/count"]


def test_epsilon_and_gelu_of_the_original_are_asked_for(tmp_path, model):
    _, arrays = hugging_face(tmp_path, model)
    source = npz(tmp_path, as_flax(arrays))
    with pytest.raises(WeightsError) as caught:
        load_pretrained(tiny(depth=2), source)
    text = str(caught.value)
    assert "epsilon = 1e-06 and gelu = 'tanh', the model has 1e-12 and 'exact'" in text
    assert "set model.args.epsilon and model.args.gelu to match" in text and "\n" not in text


def test_another_number_of_heads_is_refused_though_the_sizes_agree(tmp_path, model):
    _, arrays = hugging_face(tmp_path, model)
    with pytest.raises(WeightsError, match="it has 4 heads, the model 2"):
        load_pretrained(tiny(**ARGS, heads=2), npz(tmp_path, as_flax(arrays)))


def test_heads_that_are_not_apart_are_refused(tmp_path, model):
    _, arrays = hugging_face(tmp_path, model)
    flax = as_flax(arrays)
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    flax[name] = flax[name].reshape(WIDTH, WIDTH)
    with pytest.raises(WeightsError, match="'blocks_0/attn/query/kernel' .* heads apart"):
        load_pretrained(model, npz(tmp_path, flax))


def test_a_layer_before_the_head_leaves_with_the_head_and_not_without(tmp_path, model):
    _, arrays = hugging_face(tmp_path, model)
    flax = as_flax(arrays)
    flax["pre_logits/kernel"] = np.eye(WIDTH, dtype=np.float32)
    flax["pre_logits/bias"] = np.zeros(WIDTH, np.float32)
    source = npz(tmp_path, flax)
    with pytest.raises(WeightsError, match=r"'pre_logits/kernel' .* fresh = \['head/\.\*'\]"):
        load_pretrained(model, source)
    for report in (
        load_pretrained(model, source, fresh=["head/.*"])[1],
        load_pretrained(tiny(num_classes=3, **ARGS), source)[1],
    ):
        assert set(report.unread) >= {"pre_logits/kernel", "pre_logits/bias"}
        assert report.paths("fresh") == ["head/bias", "head/kernel"]


def test_positions_resize_and_channels_adapt_from_npz_too(tmp_path, model):
    _, arrays = hugging_face(tmp_path, model)
    _, report = load_pretrained(
        tiny(**ARGS), npz(tmp_path, as_flax(arrays)), image_shape=(48, 48, 2)
    )
    assert report.paths("resized") == ["embed/pos_embedding"]
    assert report.paths("adapted") == ["embed/patch/kernel"]


def test_exports_are_in_hugging_faces_names_with_the_epsilon_and_gelu_that_were_read(
    tmp_path, model
):
    _, arrays = hugging_face(tmp_path, model)
    variables, report = load_pretrained(model, npz(tmp_path, as_flax(arrays)))
    out = export_weights(model, variables, tmp_path / "out", table=report.table)
    again, second = load_pretrained(model, f"file:{out}")
    assert_bitwise(again, variables)
    assert second.table == 0
    config = json.loads((out / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6 and config["hidden_act"] == "gelu_new"
    assert json.loads((out / "jft.json").read_text())["table"] == 0
