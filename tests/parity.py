"""What the parity tests share: distances, bars, and torch's models and images."""

import jax
import jax.numpy as jnp
import numpy as np

from jft.models.forms import to_jft
from jft.models.layers import Training
from jft.tree import flatten, unflatten
from jft.weights.convert import load_pretrained
from jft.weights.export import export_weights
from jft.weights.naming import choose_naming

# max abs(a - b) / max(1, max abs(b)), in float32.
HIDDEN, LOGITS, GRADIENTS = 1e-5, 1e-4, 1e-4
# Mean Kullback-Leibler divergence in nats, of bfloat16 from float32.
KL = 1e-2


def distance(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())


def kl(found, wanted):
    """Mean over rows of KL(softmax(wanted) || softmax(found)), in nats; logits [B, K] both."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (wanted, found))
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def convert(model, state_dict, image_size):
    """The variables of a torch state dict through the family's own table; all names are used."""
    # Copies: torch updates running statistics in place.
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in state_dict.items()}
    image = jnp.zeros((1, image_size, image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    paths = [path for tree in shapes.values() for path in flatten(tree)]
    naming = choose_naming(model, paths, arrays, "the peer")
    variables, used = {}, set()
    for kind, tree in shapes.items():
        leaves = {}
        for path, leaf in flatten(tree).items():
            origin = naming.names[path]
            used.add(origin.name)
            leaves[path] = to_jft(origin, arrays[origin.name], naming.heads)
            assert leaves[path].shape == leaf.shape
        variables[kind] = unflatten(leaves)
    assert not [name for name in arrays if name not in used and not naming.table.ignored(name)]
    return variables


def pictures(size, count=2):
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def torch_images(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def from_torch(x):
    """A torch tensor as an array; images [B, C, H, W] become [B, H, W, C]."""
    x = x.detach().numpy()
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def saved_names(peer, folder):
    """The state dict under the names in which transformers saves it."""
    from safetensors.torch import load_file

    peer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def randomise(peer, scale=0.15):
    """Random weights, larger than the default 0.02, so that every layer matters."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(one + torch.randn_like(parameter) * scale)
    return peer.eval()


def randomise_with_statistics(peer, size):
    """Random weights, and statistics near those of the activations, so that every layer matters."""
    import torch

    torch.manual_seed(0)
    norms = [module for module in peer.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in peer.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * scale)
        for norm in norms:
            norm.weight += 1.0
            norm.momentum = 1.0
        peer.train()(torch_images(pictures(size, 16)))
        for norm in norms:
            noise = torch.randn_like(norm.running_mean)
            norm.running_mean += 0.1 * noise * norm.running_var.sqrt()
            # A channel that hardly varies would blow up the rounding of thirty blocks: with it the
            # float32 of torch alone is 2e-5 from its float64.
            norm.running_var.clamp_(min=float(norm.running_var.mean()))
            norm.running_var *= torch.exp(0.2 * torch.randn_like(noise))
    return peer.eval()


def assert_loads_strictly(model, variables, table, folder, kind=None):
    """An export is the same function in transformers, and the same arrays when read again.

    Args:
      model: a Model.
      variables: its weights.
      table: index of the names to export it under.
      folder: where.
      kind: class of transformers; by default the classifier that config.json names.
    """
    import torch
    import transformers

    out = export_weights(model, variables, folder / "out", table=table)
    kind = kind or transformers.AutoModelForImageClassification
    peer, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    x = pictures(model.preprocess.image_size)
    with torch.no_grad():
        wanted = from_torch(peer.eval()(torch_images(x)).logits)
    found = jax.jit(lambda v, x: model.apply(v, x))(variables, jnp.asarray(x))
    assert distance(found, wanted) <= LOGITS
    again, report = load_pretrained(model, f"file:{out}")
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    assert report.coverage == 1.0
    return wanted


def fine_tuned(model, steps=3):
    """(random weights after a few training steps on all leaves, index of their names).

    Every leaf has moved, statistics too.
    """
    start, report = load_pretrained(model, "random:0")
    x, label = pictures(model.preprocess.image_size, 8), np.arange(8) % model.num_classes
    state, rngs = Training(jnp.ones(8), jnp.arange(8)), {"dropout": jax.random.key(0)}

    @jax.jit
    def step(variables):
        def loss(params):
            whole = {**variables, "params": params}
            logits, changed = model.apply(
                whole, x, training=state, rngs=rngs, mutable=["batch_stats"]
            )
            rows = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(rows, label[:, None], 1).mean(), changed

        grads, changed = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], grads)
        return {**variables, **changed, "params": params}

    variables = start
    for _ in range(steps):
        variables = step(variables)
    variables = jax.tree.map(np.asarray, variables)
    still = [
        path
        for kind in start
        for path, leaf in flatten(variables[kind]).items()
        if np.array_equal(leaf, flatten(start[kind])[path])
    ]
    assert not [path for path in still if not path.endswith("attn/key/bias")], still
    return variables, report.table


def assert_parity(model, variables, x, states, peer_logits):
    """Hidden states, logits and input gradients of a model against torch's.

    Args:
      model: a Model.
      variables: its weights.
      x: images [B, H, W, C].
      states: {stage: torch tensor}, the stage's output; float32 or float64.
      peer_logits: torch images that require a gradient -> logits.
    """
    import torch

    found, at = x, 0
    for stage, wanted in states.items():
        stop = model.stages.index(stage) + 1
        found = jax.jit(lambda v, y, a=at, b=stop: model.apply(v, y, start=a, stop=b))(
            variables, found
        )
        at, wanted = stop, from_torch(wanted)
        assert np.abs(wanted).max() > 0.05, f"{stage}: a layer that says nothing proves nothing"
        assert distance(found, wanted) <= HIDDEN, stage
    image = torch_images(x).to(next(iter(states.values())).dtype).requires_grad_()
    logits = peer_logits(image)
    torch.logsumexp(logits, 1).sum().backward()
    run = jax.jit(
        jax.value_and_grad(
            lambda x: (lambda y: (jax.nn.logsumexp(y, axis=1).sum(), y))(model.apply(variables, x)),
            has_aux=True,
        )
    )
    (_, ours), gradient = run(x)
    assert distance(ours, from_torch(logits)) <= LOGITS
    assert image.grad is not None
    assert distance(gradient, from_torch(image.grad)) <= GRADIENTS
