"""Every test runs on eight virtual CPU devices, and rank promotion is an error."""

import os
import tempfile

# Tests compile far more than they run: the quick code generator gives the same values sooner.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that tests start keep their compiled steps here, not in the user's home.
_CACHE = tempfile.TemporaryDirectory(prefix="jft-tests-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

import fault_run  # noqa: E402  (the flags above must be set before jax starts its backend)
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Compiles each program of a module once, with little optimisation."""
    with fault_run.quick_compiles(tmp_path_factory.mktemp("compiled")):
        yield
