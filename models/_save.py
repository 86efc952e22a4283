"""Saving in Hugging Face's layout, so that transformers loads the result."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedcl.models import _safetensors
from fedcl.models._model import Params, leaves
from fedcl.models._pretrained import Pretrained
from fedcl.models._safetensors import Array


def save(
    folder: str | Path,
    base: Pretrained,
    params: Params | None = None,
    *,
    tokenizer: Any = None,
    max_bytes: int = 5_000_000_000,
) -> Path:
    """Saves a model as config.json, safetensors and a README with its licence.

    Args:
      folder: made if it is not there; files of the same names are replaced, each at
        once and the configuration last.
      base: what was loaded, or `Pretrained(model, params, config, {}, family)` of a
        model of one's own, with the family from `fedcl.models.families()`.
      params: what it has become; `base.params` if None. Adapters must be merged.
      tokenizer: saved beside it, if given.
      max_bytes: of one file; a larger model is saved in parts with an index.

    Returns:
      The folder.

    Raises:
      ValueError: if the parameters are not those of the base's model.

    Cost: the host holds one file's tensors at a time.
    """
    out = Path(folder)
    values = dict(leaves(base.params if params is None else params))
    _check(base, values)
    out.mkdir(parents=True, exist_ok=True)
    files = _safetensors.write_parts(out, _tensors(base, values), max_bytes)
    _remove_others(out, files)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(out))
    (out / "README.md").write_text(readme(base), encoding="utf-8")
    kinds = {str(x.dtype) for x in values.values()}
    raw = base.family.hf_config(base.config)
    raw |= {"torch_dtype": kinds.pop() if len(kinds) == 1 else "float32"}
    _safetensors.write_json(out / "config.json", raw)
    return out


def readme(base: Pretrained) -> str:
    """A model card's front matter: the licence travels with the weights."""
    licence = base.card.get("licence", "undeclared")
    source = Path(base.card.get("source", "scratch")).name
    known = licence != "undeclared"
    listed = [f"license: {licence}"] if known and ", " not in licence else []
    if ", " in licence:
        listed = ["license:", *(f"- {one}" for one in licence.split(", "))]
    front = "\n".join(["---", *listed, f"base_model: {source}", "---"])
    return f"{front}\n\nTrained with fedcl from {source}.\n"


def _tensors(base: Pretrained, values: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    for path, source in base.family.sources(base.config).items():
        if path not in values:
            continue
        whole = np.asarray(jax.device_get(values[path]))
        if "{layer}" not in source.name:
            yield source.name, source.write(whole)
            continue
        for i, part in enumerate(whole):
            yield source.name.format(layer=i), source.write(part)


def _check(base: Pretrained, values: dict[str, Any]) -> None:
    shapes = dict(leaves(jax.eval_shape(base.model.init, jax.random.key(0))))
    given = {path: tuple(x.shape) for path, x in values.items()}
    wanted = {path: tuple(s.shape) for path, s in shapes.items()}
    wrong = [
        f"{path}: given {given.get(path, 'nothing')}, "
        f"expected {wanted.get(path, 'nothing')}"
        for path in sorted(given.keys() | wanted.keys())
        if given.get(path) != wanted.get(path)
    ]
    unnamed = sorted(wanted.keys() - base.family.sources(base.config).keys())
    wrong += [
        f"{path}: has no place in {base.family.kind}'s layout" for path in unnamed
    ]
    if wrong:
        raise ValueError(
            "save: the parameters are not those of the base's model.\n  "
            + "\n  ".join(wrong[:8])
            + ("\n  …" if len(wrong) > 8 else "")
            + "\nMerge adapters with `merge_lora` or `merge_ia3`, or save them by "
            "`save_adapter`; restore quantised kernels with `dequantise`."
        )


def _remove_others(folder: Path, files: list[str]) -> None:
    """Parts of what was saved here before, which would be read with the new ones."""
    old = [path for path in folder.glob("model*.safetensors") if path.name not in files]
    stale = [folder / _safetensors.INDEX] if len(files) == 1 else []
    for path in [*old, *stale]:
        path.unlink(missing_ok=True)
