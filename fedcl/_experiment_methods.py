"""Methods by name, for experiment files: found in fedcl's own namespaces."""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

REDUCTIONS = ("weighted_mean", "mean", "median", "trimmed_mean")
# The data's, the model's and the run's.
FILLED = ("num_classes", "dimension", "loss_fn", "oracle", "key")
TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def methods() -> dict[str, Callable[..., Any]]:
    """Client methods: what in `fedcl.algorithms` returns a `ClientTransform`."""
    from fedcl import algorithms, base

    found = returning(algorithms, base.ClientTransform)
    del found["task_free"]  # Takes a method; an arm's `detector` says it.
    return found


def servers() -> dict[str, Callable[..., Any]]:
    """Server chains of `fedcl.algorithms`, and the reductions."""
    from fedcl import aggregation, algorithms

    kinds = (aggregation.Server, aggregation.Stage)
    reductions = {name: getattr(aggregation, name) for name in REDUCTIONS}
    return {**reductions, **returning(algorithms, *kinds)}


def algorithms() -> dict[str, Callable[..., Any]]:
    """What in `fedcl.algorithms` makes an `Algorithm` of the loss alone."""
    from fedcl import algorithms, base

    found = returning(algorithms, base.Algorithm)
    others = ("algorithm", "client_opt")  # They wrap one, or take an optimiser.
    return {k: v for k, v in found.items() if not any(needs(v, key) for key in others)}


def predicates() -> dict[str, Callable[[str], bool]]:
    """What in `fedcl.models` selects parameters by their path."""
    from fedcl import models

    found = returning(models, bool)
    return {k: v for k, v in found.items() if "path" in v.__annotations__}


def predicate(name: str) -> Callable[[str], bool]:
    """The predicate of that name, or for a pattern such as "*lora/b" its paths."""
    if "*" in name:
        return lambda path: fnmatch.fnmatchcase(path, name)
    return predicates()[name]


def makers() -> dict[str, Callable[..., Any]]:
    """Phases: what returns a `Phase`, or one that waits for the task's loss."""
    from fedcl import algorithms, phases

    return returning(algorithms, phases.Maker, phases.Phase)


def switches() -> dict[str, Callable[..., Any]]:
    """When the server's phase runs: what returns a `Switch`."""
    from fedcl import phases

    found = returning(phases, phases.Switch)
    return {k: v for k, v in found.items() if not k.endswith("_of")}


def detectors() -> dict[str, Callable[..., Any]]:
    """What returns a `Detector` of boundaries."""
    from fedcl import algorithms

    return returning(algorithms, algorithms.Detector)


def streams() -> dict[str, Callable[..., Any]]:
    """Builders of streams and what they are built from."""
    from fedcl import streams as s

    shapes = (s.Schedule, s.Partition, s.Domains, s.Grouping)
    return returning(s, s.Stream, s.Hosted, s.Packed, s.Corpus, s.Tokens, *shapes)


def models() -> dict[str, Callable[..., Any]]:
    """What returns a `Model`."""
    from fedcl import models as m

    return returning(m, m.Model)


def returning(module: Any, *kinds: Any) -> dict[str, Callable[..., Any]]:
    """The functions of a module that return one of these, by name."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if inspect.isfunction(value) and value.__annotations__.get("return") in kinds
    }


def summary(fn: Callable[..., Any]) -> str:
    """The first line of a docstring, formulas as they are written."""
    line = (inspect.getdoc(fn) or "").split("\n", 1)[0]
    return re.sub(r":math:`([^`]*)`", r"\1", line)


def nearest(name: str, allowed: Any) -> str:
    """`; did you mean "x"?`, or a full stop."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], 1, 0.6)
    return f'; did you mean "{close[0]}"?' if close else "."


def resolve_method(given: Mapping[str, Any]) -> dict[str, Any]:
    """A client method with all its arguments; see `_resolved`."""
    return _resolved(given, methods(), "method")


def resolve_algorithm(given: Mapping[str, Any]) -> dict[str, Any]:
    """A whole algorithm with all its arguments."""
    return _resolved(given, algorithms(), "algorithm")


def resolve_predicate(name: str) -> str:
    """The name of a predicate, or a pattern of paths.

    Raises:
      ValueError: for an unknown name.
    """
    known = predicates()
    if "*" not in name and name not in known:
        raise ValueError(
            f"{name!r} selects no parameters{nearest(name, known)} Give one of "
            f'{", ".join(known)}, or a pattern of paths such as "*lora/b"'
        )
    return name


def resolve_server(given: Mapping[str, Any]) -> dict[str, Any]:
    """A server chain with all its arguments."""
    return _resolved(given, servers(), "server")


def resolve_phase(given: Mapping[str, Any]) -> dict[str, Any]:
    """A phase with all its arguments."""
    return _resolved(given, makers(), "phase")


def resolve_switch(given: Mapping[str, Any]) -> dict[str, Any]:
    """A switch with all its arguments."""
    return _resolved(given, switches(), "switch")


def resolve_detector(given: Mapping[str, Any]) -> dict[str, Any]:
    """A detector with all its arguments."""
    return _resolved(given, detectors(), "detector")


def _resolved(
    given: Mapping[str, Any], known: Mapping[str, Callable[..., Any]], what: str
) -> dict[str, Any]:
    """The table with defaults filled in.

    Raises:
      ValueError: for an unknown name, unknown, missing or wrongly typed arguments.
    """
    name = str(given.get("method"))
    if name not in known:
        raise ValueError(
            f"the {what} {name!r} is not known{nearest(name, known)} Give "
            f"method = one of {', '.join(known)}"
        )
    parameters = inspect.signature(known[name]).parameters
    arguments = {k: v for k, v in given.items() if k != "method"}
    for key in arguments:
        if key not in parameters:
            listed = ", ".join(map(str, parameters.values())) or "no arguments"
            raise ValueError(
                f"{name} has no argument {key!r}{nearest(key, parameters)} It takes "
                f"{listed}"
            )
    out: dict[str, Any] = {"method": name}
    for key, parameter in parameters.items():
        out |= _argument(name, key, parameter, arguments)
    return out


def _argument(
    name: str, key: str, parameter: inspect.Parameter, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    if key not in arguments:
        required = parameter.default is inspect.Parameter.empty
        # The number of classes is the data's; `fedcl.experiment` fills it in.
        if parameter.default is None or (required and key in FILLED):
            return {}
        if required:
            raise ValueError(f"{name} needs {parameter}; add {key} = ...")
        return {key: parameter.default}
    if key == "key":
        raise ValueError(f"{name}: key is drawn from `seeds`; leave it out")
    if key == "where":
        return {key: resolve_predicate(str(arguments[key]))}
    value, kinds = arguments[key], _kinds(parameter.annotation)
    wrong = not isinstance(value, kinds) or (
        isinstance(value, bool) and bool not in kinds
    )
    if kinds and wrong:
        raise ValueError(f"{name}: {key} is {value!r}; it must be {parameter}")
    return {key: value}


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The types that an annotation such as `int | None` admits; () for anything."""
    found: list[type] = []
    for part in getattr(annotation, "__args__", (annotation,)):
        name = getattr(part, "__name__", str(part))
        kinds = TYPES.get(name)
        if kinds is None and name != "NoneType":
            return ()
        found += kinds or ()
    return tuple(found)


def needs(fn: Callable[..., Any], key: str) -> bool:
    """Whether a factory has an argument without a default."""
    parameter = inspect.signature(fn).parameters.get(key)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def made(
    link: Mapping[str, Any], known: Mapping[str, Callable[..., Any]], **filled: Any
) -> Any:
    """What a resolved table names, with what it needs of the data and the model.

    Args:
      link: "method" and its arguments.
      known: by name.
      **filled: arguments that only the experiment knows; those not needed are left out.
    """
    build = known[link["method"]]
    given = {k: v for k, v in filled.items() if needs(build, k)}
    given |= {k: v for k, v in link.items() if k != "method"}
    if "where" in given:
        given["where"] = predicate(given["where"])
    return build(**given)
