"""Strict settings for every test: eight CPU devices, no silent rank promotion."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Level 0 compiles small programs more than twice as fast; without the emitters, which
# later versions always use, another 1.7 times.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Not the user's own; also of the processes that tests start.
os.environ.setdefault("FEDCL_CACHE", str(Path(__file__).parent / ".xla" / "fedcl"))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The same small programs are compiled in many tests.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent / ".xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def room_for_programs():
    """Drops compiled programs in time: each takes memory maps, of which Linux gives a
    process 65530, and XLA crashes when there are no more."""
    yield
    if MAPS.exists() and len(MAPS.read_text().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()
