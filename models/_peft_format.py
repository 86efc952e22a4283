"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT keeps, beside a module W, `lora_A.weight` [r, in] and `lora_B.weight` [out, r], and
adds (alpha / r) B A x; ours are a = Aᵀ and b = Bᵀ, stacked over layers.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedcl.models import _layers, _lora, _safetensors
from fedcl.models._family import Source, same, transposed
from fedcl.models._model import Params, leaves
from fedcl.models._pretrained import Pretrained, bare_name
from fedcl.models._safetensors import Array, shortened
from fedcl.models._save import readme

CONFIG, WEIGHTS, TOP = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.model.",
)
_TASKS = {"CausalLM": "CAUSAL_LM", "LMHead": "CAUSAL_LM", "Sequence": "SEQ_CLS"}
# What an adapter may set to other values than these is not LoRA as we have it.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
_BESIDE = ("gaussian", "eva", "orthogonal")  # Starts that leave the base as it is.


class _Factors(NamedTuple):
    """One module's adapter as PEFT has it: A [r, in], B [out, r], and alpha."""

    a: Array
    b: Array
    alpha: float


def save_adapter(folder: str | Path, base: Pretrained, params: Params) -> Path:
    """Saves the LoRA leaves of `params` so that PEFT loads them onto the same base.

    Args:
      folder: made if it is not there.
      base: the model before `lora`, as loaded: its family names the modules.
      params: parameters with adapters of one client or the server. Masked ranks are
        left out; ranks and scales that differ go into `rank_pattern` and
        `alpha_pattern`.

    Returns:
      The folder.

    Raises:
      ValueError: if there is no adapter, one lies beside a layer that is no linear
        module of Hugging Face's, or there are other new leaves, which would be lost.
    """
    sources = _linear_sources(base)
    carried = _carried(params)
    _check(base, params, carried, sources)
    factors: dict[str, _Factors] = {}
    for path, parts in carried.items():
        factors |= _split(_module(sources[path]), parts)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Array] = {}
    for name, f in factors.items():
        tensors[f"{TOP}{name}.lora_A.weight"] = f.a
        tensors[f"{TOP}{name}.lora_B.weight"] = f.b
    _safetensors.save_file(out / WEIGHTS, tensors)
    (out / "README.md").write_text(readme(base), encoding="utf-8")
    _safetensors.write_json(out / CONFIG, _config(base, factors, sources, carried))
    return out


def load_adapter(folder: str | Path, base: Pretrained) -> Pretrained:
    """Puts an adapter that PEFT, or `save_adapter`, has saved beside a base's kernels.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      base: the model it was trained on, quantised or not, without adapters.

    Returns:
      `base` with the adapted model and parameters. A module of a smaller rank than
      others of its kind, or none, has the rest masked.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for what is not plain LoRA, naming the entry, a start that changes
        the base's kernels (PiSSA and its like), a missing `lora_alpha`, tensors that
        match no module of the base, and shapes that do not fit.
    """
    at = Path(folder)
    raw, tensors = _opened(at)
    sources = _linear_sources(base)
    kernels = _layers.candidates(base.model, "load_adapter")
    both = sources.keys() & kernels.keys()
    shapes = {path: kernels[path].kernel.shape for path in both}
    gather = functools.partial(_gathered, base, raw, tensors)
    found = {p: gather(_module(sources[p]), shapes[p]) for p in sorted(both)}
    found = {path: layers for path, layers in found.items() if any(layers)}
    _check_all_used(at, base, tensors, found, sources)
    ranks = {p: max(f.a.shape[0] for f in fs if f) for p, fs in found.items()}
    model, params = _lora.lora(
        base.model,
        base.params,
        rank=ranks,
        alpha=1.0,
        where=lambda path: path in ranks,
        key=jax.random.key(0),
    )
    rooted = bool(raw.get("use_rslora"))
    for path, layers in found.items():
        leaf = _joined(layers, ranks[path], shapes[path], rooted)
        params = _layers.insert(params, [*_layers.split(path), "lora"], leaf)
    return base._replace(model=model, params=params)


def _linear_sources(base: Pretrained) -> dict[str, Source]:
    """The sources of the kernels of linear modules, by the path of the layer."""
    return {
        path.removesuffix("kernel").rstrip("/"): source
        for path, source in base.family.sources(base.config).items()
        if path.split("/")[-1] == "kernel" and source.read in (same, transposed)
    }


def _module(source: Source) -> str:
    return source.name.removesuffix(".weight")


def _carried(params: Params) -> dict[str, Params]:
    """The `lora` leaves, by the path of the layer."""
    ends = "lora/a"
    flat = [path for path, _ in leaves(params) if f"/{path}".endswith(f"/{ends}")]
    paths = [path.removesuffix(ends).rstrip("/") for path in flat]
    return {path: _layers.at(params, path, "save_adapter")["lora"] for path in paths}


def _check(
    base: Pretrained,
    params: Params,
    carried: Mapping[str, Params],
    sources: Mapping[str, Source],
) -> None:
    if not carried:
        raise ValueError("save_adapter: the parameters have no `lora` leaves to save.")
    strange = sorted(path for path in carried if path not in sources)
    if strange:
        raise ValueError(
            f"save_adapter: {shortened(strange)} carry adapters, but are no linear "
            f"modules of a checkpoint of {base.family.kind}; merge them and use `save`."
        )
    known = {path for path, _ in leaves(base.params)}
    new = [path for path, _ in leaves(params) if path not in known]
    lost = [path for path in new if "lora/" not in path]
    if lost:
        raise ValueError(
            f"save_adapter: besides adapters there are {shortened(lost)}, which PEFT's "
            "layout has no place for; merge all of them and use `save`."
        )


def _split(name: str, parts: Params) -> dict[str, _Factors]:
    """`{module: its factors}`, one for each layer of the stack."""
    host = {k: np.asarray(jax.device_get(v)) for k, v in parts.items()}
    if "{layer}" not in name:
        return {name: _factors(**host)}
    return {
        name.format(layer=i): _factors(**{k: v[i] for k, v in host.items()})
        for i in range(len(host["a"]))
    }


def _factors(a: Array, b: Array, scale: Array, mask: Array) -> _Factors:
    keep = np.flatnonzero(mask)
    keep = keep if len(keep) else np.array([0])  # PEFT has no rank 0.
    gated = (b * mask[:, None])[keep]
    return _Factors(a.T[keep], gated.T.astype(b.dtype), float(scale) * len(keep))


def _config(
    base: Pretrained,
    factors: Mapping[str, _Factors],
    sources: Mapping[str, Source],
    carried: Mapping[str, Params],
) -> dict[str, Any]:
    ranks = {name: f.a.shape[0] for name, f in factors.items()}
    alphas = {name: float(f"{f.alpha:.7g}") for name, f in factors.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    kind = (base.family.hf_config(base.config).get("architectures") or [""])[0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base.card.get("source"),
        "task_type": next((t for sign, t in _TASKS.items() if sign in kind), None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(sources[path].read is same for path in carried),
        "target_modules": _targets(sources, carried),
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
    }


def _commonest(values: Iterable[Any]) -> Any:
    listed = list(values)
    return max(sorted(set(listed)), key=listed.count)


def _targets(
    sources: Mapping[str, Source], carried: Mapping[str, Params]
) -> list[str] | str:
    """Last names of the modules, as is usual, if they mean these modules alone."""
    modules = {path: _module(source) for path, source in sources.items()}
    last = {modules[path].rsplit(".", 1)[-1] for path in carried}
    others = {m.rsplit(".", 1)[-1] for p, m in modules.items() if p not in carried}
    if not last & others:
        return sorted(last)
    escaped = (re.escape(modules[path]) for path in sorted(carried))
    return "|".join(name.replace(re.escape("{layer}"), r"\d+") for name in escaped)


def _opened(folder: Path) -> tuple[dict[str, Any], _safetensors.Tensors]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"load_adapter: {folder} has no {name}. Pass the folder of a LoRA "
                "adapter that PEFT saved with safe_serialization=True."
            )
    raw = _safetensors.read_json(folder / CONFIG)
    wrong = [
        f"{key}={raw[key]!r}"
        for key, plain in _PLAIN.items()
        if key in raw and raw[key] != plain and raw[key]
    ]
    if wrong:
        raise ValueError(
            f"load_adapter: {folder / CONFIG} has {', '.join(wrong)}; only plain LoRA "
            "is read. Merge it into its base with PEFT and load the result."
        )
    _check_start(folder / CONFIG, raw)
    return raw, _safetensors.open_files([folder / WEIGHTS])


def _check_start(path: Path, raw: Mapping[str, Any]) -> None:
    start, alpha = raw.get("init_lora_weights"), raw.get("lora_alpha")
    if isinstance(start, str) and start.lower() not in _BESIDE:
        raise ValueError(
            f"load_adapter: {path} has init_lora_weights={start!r}, a start with which "
            "PEFT changes the kernels of the base, which the adapter does not hold. "
            "Merge it into its base with PEFT and load the result, or let PEFT convert "
            "it (path_initial_model_for_weight_conversion) when it saves."
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        given = f"lora_alpha={alpha!r}" if "lora_alpha" in raw else "no 'lora_alpha'"
        raise ValueError(
            f"load_adapter: {path} has {given}; the adapter is scaled by lora_alpha / "
            "r, so it must be a number. Take the file that PEFT has written."
        )


def _gathered(
    base: Pretrained,
    raw: Mapping[str, Any],
    tensors: _safetensors.Tensors,
    plain: str,
    shape: tuple[int, ...],
) -> list[_Factors | None]:
    """The factors of each layer of a stack (or of one module), None where absent."""
    count = shape[0] if "{layer}" in plain else 1
    names = [plain.format(layer=i) for i in range(count)]
    return [_found(base, raw, tensors, name, shape) for name in names]


def _found(
    base: Pretrained,
    raw: Mapping[str, Any],
    tensors: _safetensors.Tensors,
    name: str,
    shape: tuple[int, ...],
) -> _Factors | None:
    by_bare = {_bare(base, full): full for full in tensors.shapes}
    at = {x: by_bare.get(_bare(base, f"{name}.lora_{x}.weight")) for x in "AB"}
    if at["A"] is None or at["B"] is None:
        return None
    a, b = tensors.read(at["A"]), tensors.read(at["B"])
    if a.shape != (b.shape[1], shape[-2]) or b.shape[0] != shape[-1]:
        raise ValueError(
            f"load_adapter: {name} has A {a.shape} and B {b.shape}, but the base's "
            f"module takes {shape[-2]} and gives {shape[-1]}: the adapter is of "
            "another base."
        )
    return _Factors(a, b, _alpha(raw, name))


def _alpha(raw: Mapping[str, Any], name: str) -> float:
    for pattern, alpha in (raw.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(alpha)
    return float(raw["lora_alpha"])


def _bare(base: Pretrained, name: str) -> str:
    return bare_name(name.removeprefix(TOP), base.family.prefixes)


def _check_all_used(
    folder: Path,
    base: Pretrained,
    tensors: _safetensors.Tensors,
    found: Mapping[str, list[_Factors | None]],
    sources: Mapping[str, Source],
) -> None:
    used = {
        _bare(base, _module(sources[p]).format(layer=i))
        for p, layers in found.items()
        for i, factors in enumerate(layers)
        if factors is not None
    }
    pattern = r"\.lora_[AB]\.weight$"
    left = [
        n for n in tensors.shapes if re.sub(pattern, "", _bare(base, n)) not in used
    ]
    if left or not found:
        raise ValueError(
            f"load_adapter: {folder} has tensors that match no linear module of "
            f"{base.card.get('source')}: {shortened(left) or 'none at all'}. The adapter "
            "is of another base."
        )


def _joined(
    layers: list[_Factors | None], rank: int, shape: tuple[int, ...], rooted: bool
) -> Params:
    lead = shape[:-2]
    a = np.zeros((len(layers), shape[-2], rank), np.float32)
    b = np.zeros((len(layers), rank, shape[-1]), np.float32)
    scale, mask = np.zeros(len(layers), np.float32), np.zeros((len(layers), rank))
    for i, factors in enumerate(layers):
        if factors is None:
            continue
        r = factors.a.shape[0]
        a[i, :, :r], b[i, :r] = factors.a.T, factors.b.T
        scale[i], mask[i, :r] = factors.alpha / (r**0.5 if rooted else r), 1.0
    parts = {"a": a, "b": b, "scale": scale, "mask": mask.astype(np.float32)}
    return {k: jnp.asarray(x.reshape(*lead, *x.shape[1:])) for k, x in parts.items()}
