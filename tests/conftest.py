"""Every test runs on eight virtual CPU devices, and rank promotion is an error."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (the flags above must be set before jax starts its backend)

jax.config.update("jax_numpy_rank_promotion", "raise")
