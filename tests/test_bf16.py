"""Every family in bfloat16, weights and activations, against itself in float32.

float32 is compared with the original implementations, see tests/test_parity_*.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models.zoo import list_models, make_model
from jft.weights.convert import load_pretrained

pytestmark = pytest.mark.slow

BAR = 1e-2  # mean Kullback-Leibler divergence of the predicted classes, in nats


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_random_weights_in_bfloat16_predict_as_in_float32(name):
    exact = make_model(name=name, num_classes=10)
    half = make_model(name=name, args={"dtype": "bfloat16"}, num_classes=10)
    variables, _ = load_pretrained(exact, "random:0")
    size = exact.preprocess.image_size
    x = np.random.default_rng(0).normal(size=(16, size, size, 3)).astype(np.float32)
    apply = jax.jit(exact.apply)
    # Logits of deviation 1: those of classes that are all alike would prove nothing.
    spread = float(jnp.std(apply(variables, x)))
    variables["params"]["head"] = jax.tree.map(lambda w: w / spread, variables["params"]["head"])
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables)
    wanted = jax.nn.log_softmax(apply(variables, x))
    logits = jax.jit(half.apply)(rounded, x)
    assert logits.dtype == jnp.float32
    found = jax.nn.log_softmax(logits)
    divergence = jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found), axis=1))
    assert 0 < divergence <= BAR, float(divergence)
