"""What was measured once on this machine, in the user's cache directory.

`$FEDCL_CACHE`, else `$XDG_CACHE_HOME/fedcl`, else `~/.cache/fedcl`.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax


def folder() -> Path:
    """Where it is kept."""
    own = os.environ.get("FEDCL_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fedcl"


def programs() -> Path | None:
    """Where compiled programs are kept, made if absent; None if that cannot be."""
    place = folder() / "programs"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        return place if os.access(place, os.W_OK) else None
    return None


def name(*what: str) -> str:
    """A name for a measurement of a program on this backend, by this JAX."""
    device = jax.local_devices()[0]
    here = (device.platform, device.device_kind, str(len(jax.devices())))
    parts = (*what, *here, str(os.cpu_count()), jax.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def read(name: str) -> Any:
    """The value kept under that name, or None."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((folder() / f"{name}.json").read_text())
    return None


def write(name: str, value: Any) -> None:
    """Keeps a JSON value, whole or not at all; without a writable cache, not at all."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        aside = folder() / f"{name}.{os.getpid()}.tmp"
        aside.write_text(json.dumps(value))
        os.replace(aside, folder() / f"{name}.json")
