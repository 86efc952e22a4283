"""Every name that an experiment file takes, for `fedcl list`."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from fedcl import _experiment_methods as _methods


def groups() -> dict[str, dict[str, str]]:
    """Titles, and beneath each the names with what they are."""
    from fedcl import experiment, phases

    found: dict[str, dict[str, Any]] = {
        "experiments": dict(experiment.shipped()),
        "methods, of an arm's chain": _methods.methods(),
        "algorithms": _methods.algorithms(),
        "servers": _methods.servers(),
        "phases": _methods.makers(),
        "phases of fedcl.phases, in Python": _methods.returning(phases, phases.Phase),
        "switches": _methods.switches(),
        "detectors": _methods.detectors(),
        "parameters, for personal and where": _methods.predicates(),
        "streams": _methods.streams(),
        "models": _methods.models(),
        "settings with fixed choices": {k: ", ".join(v) for k, v in choices().items()},
    }
    told = lambda v: v if isinstance(v, str) else _methods.summary(v)
    return {t: {name: told(v) for name, v in of.items()} for t, of in found.items()}


def choices() -> dict[str, list[str]]:
    """The words that each setting admits, by its path in the file."""
    from fedcl._experiment_config import Experiment

    found: dict[str, list[str]] = {}
    for path, words in _choices(Experiment, ""):
        known = found.setdefault(path, [])
        known += [word for word in words if word not in known]
    return dict(sorted(found.items()))


def _choices(section: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    for name, field in section.model_fields.items():
        at = f"{path}.{name}" if path else name
        yield from _of(field.annotation, at)


def _of(annotation: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Of a section those beneath it, of `Literal` its words, of others their parts'."""
    if hasattr(annotation, "model_fields"):
        yield from _choices(annotation, path)
    elif get_origin(annotation) is Literal:
        yield path, [word for word in get_args(annotation) if isinstance(word, str)]
    else:
        inner = f"{path}.NAME" if get_origin(annotation) is dict else path
        for part in get_args(annotation):
            yield from _of(part, inner)
