"""Small models and a full training step for the tests of counted and analytic FLOPs."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jft.tree import split

# The program is the same; LLVM only spends less on machine code that never runs.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BATCH = 16
WIDTH = 32


def shapes(**dims):
    return {path: jax.ShapeDtypeStruct(dim, jnp.float32) for path, dim in dims.items()}


def mlp_params():
    dims = {
        f"blocks_{i}/{leaf}": dim
        for i in range(6)
        for leaf, dim in (("kernel", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    }
    return shapes(
        **{"stem/kernel": (48, WIDTH), "stem/bias": (WIDTH,)},
        **dims,
        **{"head/kernel": (WIDTH, 10), "head/bias": (10,)},
    )


def dense(p, name, x):
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"][None]


def mlp(p, x):
    x = jnp.tanh(dense(p, "stem", x.reshape(x.shape[0], -1)))
    for i in range(4):
        x = x + jnp.tanh(dense(p, f"blocks_{i}", x))
    return dense(p, "head", x)


def conv_params():
    dims = {"stem/kernel": (3, 3, 3, 16), "stem/bias": (16,)}
    for i in range(2):
        dims |= {
            f"blocks_{i}/expand/kernel": (1, 1, 16, 32),
            f"blocks_{i}/expand/bias": (32,),
            f"blocks_{i}/conv/kernel": (3, 3, 32, 16),
            f"blocks_{i}/conv/bias": (16,),
        }
    return shapes(**dims, **{"head/kernel": (16, 10), "head/bias": (10,)})


def conv(p, name, x, stride=1):
    x = lax.conv_general_dilated(
        x, p[f"{name}/kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return x + p[f"{name}/bias"][None, None, None]


def conv_net(p, x):
    x = jax.nn.relu(conv(p, "stem", x, 2))
    for i in range(2):
        y = jax.nn.relu(conv(p, f"blocks_{i}/expand", x))
        x = x + jax.nn.relu(conv(p, f"blocks_{i}/conv", y, 1))
    return dense(p, "head", x.mean((1, 2)))


def transformer_params(blocks=2):
    dims = {"embed/kernel": (12, WIDTH), "embed/bias": (WIDTH,), "embed/pos": (1, 16, WIDTH)}
    for i in range(blocks):
        name = f"blocks_{i}"
        dims |= {f"{name}/norm1/scale": (WIDTH,), f"{name}/norm2/scale": (WIDTH,)}
        for part, dim in (("qkv", 3 * WIDTH), ("out", WIDTH)):
            dims |= {f"{name}/attn/{part}/kernel": (WIDTH, dim), f"{name}/attn/{part}/bias": (dim,)}
        dims |= {
            f"{name}/mlp/up/kernel": (WIDTH, 4 * WIDTH),
            f"{name}/mlp/up/bias": (4 * WIDTH,),
            f"{name}/mlp/down/kernel": (4 * WIDTH, WIDTH),
            f"{name}/mlp/down/bias": (WIDTH,),
        }
    return shapes(**dims, **{"head/kernel": (WIDTH, 10), "head/bias": (10,)})


def norm(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale[None, None]


def block(p, name, x):
    b, n, d = x.shape
    y = norm(x, p[f"{name}/norm1/scale"])
    wide = y @ p[f"{name}/attn/qkv/kernel"] + p[f"{name}/attn/qkv/bias"][None, None]
    q, k, v = jnp.split(wide.reshape(b, n, 4, 3 * d // 4), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v).reshape(b, n, d)
    x = x + y @ p[f"{name}/attn/out/kernel"] + p[f"{name}/attn/out/bias"][None, None]
    y = norm(x, p[f"{name}/norm2/scale"])
    y = jax.nn.gelu(y @ p[f"{name}/mlp/up/kernel"] + p[f"{name}/mlp/up/bias"][None, None])
    return x + y @ p[f"{name}/mlp/down/kernel"] + p[f"{name}/mlp/down/bias"][None, None]


def transformer(p, x, wrap=lambda f: f):
    x = x.reshape(x.shape[0], 16, 12)
    x = x @ p["embed/kernel"] + p["embed/bias"][None, None] + p["embed/pos"]
    for i in range(sum(path.endswith("norm1/scale") for path in p)):
        x = wrap(lambda p, x, i=i: block(p, f"blocks_{i}", x))(p, x)
    return dense(p, "head", x.mean(1))


MODELS = {
    "mlp": (mlp, mlp_params),
    "conv": (conv_net, conv_params),
    "transformer": (transformer, transformer_params),
}
IMAGE = {"mlp": (4, 4, 3), "conv": (16, 16, 3), "transformer": (8, 8, 3)}


def batch_shapes(name, size=BATCH):
    return {
        "image": jax.ShapeDtypeStruct((size, *IMAGE[name]), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


def make_masks(params):
    """Head only, top half, bottom half, scattered and full, by stage."""
    stages = list(dict.fromkeys(path.split("/")[0] for path in params))
    half = len(stages) // 2
    tests = {
        "head": lambda path: path.startswith("head/"),
        "top": lambda path: stages.index(path.split("/")[0]) >= half,
        "bottom": lambda path: stages.index(path.split("/")[0]) < half,
        "scattered": lambda path: path.endswith("bias") or path.startswith("blocks_1/"),
        "full": lambda _: True,
    }
    return {name: {path: test(path) for path in params} for name, test in tests.items()}


def make_loss(forward):
    def loss_fn(trainable, frozen, batch):
        logits = forward({**trainable, **frozen}, batch["image"])
        log = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log, batch["label"][:, None], axis=1)
        correct = (logits.argmax(-1) == batch["label"]).sum()
        return -picked.sum(), correct

    return loss_fn


def make_step(loss_fn, mask, accum_steps=1, clip_everything=False):
    """(step, tx): split, accumulate in a scan, clip, log the norm, check finiteness, SGD."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3, momentum=0.9))

    def grads_of(trainable, frozen, batch):
        if not clip_everything:
            return jax.grad(loss_fn, has_aux=True)(trainable, frozen, batch)
        whole = {**trainable, **frozen}
        return jax.grad(lambda p: loss_fn(p, {}, batch), has_aux=True)(whole)

    def step(state, frozen, batch):
        trainable, opt_state = state
        rows = jax.tree.map(lambda a: a.reshape(accum_steps, -1, *a.shape[1:]), batch)

        def body(carry, micro):
            grads, correct = grads_of(trainable, frozen, micro)
            return jax.tree.map(jnp.add, carry, (grads, correct)), None

        first = jax.eval_shape(grads_of, trainable, frozen, jax.tree.map(lambda a: a[0], rows))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        (grads, correct), _ = lax.scan(body, zeros, rows)
        if clip_everything:
            size = optax.tree.norm(grads)
            grads = {k: g / jnp.maximum(size, 1.0) for k, g in grads.items() if mask[k]}
        size = optax.tree.norm(grads)
        updates, new = tx.update(grads, opt_state, trainable)
        moved = optax.apply_updates(trainable, updates)
        finite = jnp.isfinite(size)
        keep = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (moved, new), state)
        return keep, {"norm": size, "correct": correct, "finite": finite}

    return step, tx


def compile_step(loss_fn, params, mask, batch, **options):
    step, tx = make_step(loss_fn, mask, **options)
    trainable, frozen = split(params, mask)
    state = (trainable, jax.eval_shape(tx.init, trainable))
    return jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile(FAST)


def taps(x, size):
    """(i, j, view of SAME-padded x that this tap multiplies) of a stride-1 convolution."""
    low = (size - 1) // 2
    x = jnp.pad(x, ((0, 0), (low, size - 1 - low), (low, size - 1 - low), (0, 0)))
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    for i in range(size):
        for j in range(size):
            yield i, j, x[:, i : i + height, j : j + width]


def _shifted(x, kernel):
    with jax.named_scope("depthwise"):
        return sum(view * kernel[i, j][None, None] for i, j, view in taps(x, kernel.shape[0]))


@jax.custom_vjp
def shifted(x, kernel):
    """Depthwise convolution as shifted multiply-adds, stride 1, SAME padding."""
    return _shifted(x, kernel)


def _shifted_forward(x, kernel):
    return shifted(x, kernel), (x, kernel)


def shifted_backward(kept, grad):
    x, kernel = kept
    dx = _shifted(grad, kernel[::-1, ::-1])
    with jax.named_scope("depthwise"):
        dk = [(view * grad).sum((0, 1, 2)) for _, _, view in taps(x, kernel.shape[0])]
        return dx, jnp.stack(dk).reshape(kernel.shape)


shifted.defvjp(_shifted_forward, shifted_backward)


def depthwise_params():
    dims = {"stem/kernel": (3, 3, 3, 16), "stem/bias": (16,)}
    for i in range(2):
        dims |= {
            f"blocks_{i}/dw/kernel": (3, 3, 1, 16),
            f"blocks_{i}/conv/kernel": (1, 1, 16, 16),
            f"blocks_{i}/conv/bias": (16,),
        }
    return shapes(**dims, **{"head/kernel": (16, 10), "head/bias": (10,)})


def depthwise_net(p, x):
    x = jax.nn.relu(conv(p, "stem", x, 2))
    for i in range(2):
        y = jax.nn.relu(shifted(x, p[f"blocks_{i}/dw/kernel"]))
        y = jax.nn.relu(conv(p, f"blocks_{i}/conv", y, 1))
        x = x + y
    return dense(p, "head", x.mean((1, 2)))


MODELS["depthwise"] = (depthwise_net, depthwise_params)
IMAGE["depthwise"] = (16, 16, 3)
