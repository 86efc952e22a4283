"""What an experiment's sections must be to each other, checked before anything runs."""

from collections.abc import Iterator

import jax

from fedcl import _experiment_engine as _engine
from fedcl import _experiment_methods as _methods
from fedcl import _experiment_study as _study
from fedcl import reservoir
from fedcl._experiment_config import (
    Abrupt,
    Arm,
    ClassGroups,
    Convnet,
    Decoder,
    Encoder,
    Experiment,
    Iid,
    Mlp,
    Pretrained,
    Rotations,
    Vit,
)

DIGITS = (8, 8, 1)
BLOCKS = ("prompt", "dual_adapters")  # What beside a network needs a transformer.
# What an algorithm of its own has no place for.
AVERAGED = ("chain", "detector", "review_every", "personal", "server", "client", "lorm")
PAIRS = {"bic": "bic_correction", "ewc_shared": "shared_fisher"}
MNIST_360 = {  # What kind = "mnist_360" fixes.
    "contexts": 27,
    "rounds_per_context": 1,
    "clients": 1,
    "draw": "order",
    "hidden": True,
    "drift": Abrupt(),
    "partition": Iid(),
    "order": None,
    "join": None,
    "leave": None,
}


def filled(e: Experiment) -> Experiment:
    """The experiment with the number of classes written in, here and in its methods."""
    data = e.data.model_copy(update={"classes": _classes(e)})
    outputs = outputs_of(e.model_copy(update={"data": data}))
    arms = {name: _with_classes(arm, outputs) for name, arm in e.arms.items()}
    return e.model_copy(update={"data": data, "arms": arms})


def _classes(e: Experiment) -> int | None:
    listed = e.data.labelled
    return 10 if _digits(e) else len(listed.classes) if listed else e.data.classes


def _with_classes(arm: Arm, classes: int | None) -> Arm:
    known = {**_methods.methods(), **_methods.makers()}

    def filled(link):
        needs = _methods.needs(known[link["method"]], "num_classes")
        return {**({"num_classes": classes} if needs else {}), **link}

    lists = {"chain": arm.chain, "before": arm.before, "phases": arm.phases}
    return arm.model_copy(
        update={k: [filled(link) for link in v] for k, v in lists.items()}
    )


def outputs_of(e: Experiment) -> int | None:
    """The model's outputs: the classes, or those of one group of them."""
    if e.stream.kind == "mnist_360":
        return 9
    if e.data.classes and isinstance(e.stream.domains, ClassGroups):
        return e.data.classes // e.stream.contexts
    return e.data.classes


def problems(e: Experiment) -> Iterator[str]:
    """Every impossible combination, one text each."""
    yield from _text(e)
    yield from _data(e)
    yield from _study.problems(e)
    yield from _stream(e)
    yield from _model(e)
    yield from _federation(e)
    yield from _engine.problems(e)
    for name, arm in e.arms.items():
        yield from _arm(e, f"arms.{name}", arm)
    if len(set(e.seeds)) < len(e.seeds):
        yield f"seeds: given {e.seeds}; each seed may be listed once"
    rounds = e.stream.rounds_per_context * e.stream.contexts
    if e.evaluation.every > rounds:
        yield (
            f"evaluation.every: given {e.evaluation.every}; at most the number of "
            f"rounds, {rounds}"
        )


def _digits(e: Experiment) -> bool:
    return e.data.source == "digits"


def _data(e: Experiment) -> Iterator[str]:
    d, p = e.data, e.public
    takes = {
        "digits": (),
        "npz": ("path",),
        "idx": ("path", "labels"),
        "mnist": ("path",),
        "tfds": ("path",),
        "text": (),
        "labelled": (),
    }
    for key in ("path", "labels"):
        given = getattr(d, key)
        if key in takes[d.source] and given is None:
            yield f'data.{key}: missing; source = "{d.source}" needs it'
        if key not in takes[d.source] and given is not None:
            yield f'data.{key}: given {given!r}; source = "{d.source}" takes none'
    if d.data_dir is not None and d.source != "tfds":
        yield f'data.data_dir: given {d.data_dir!r}; only source = "tfds" takes it'
    if _digits(e) and d.classes not in (None, 10):
        yield f"data.classes: given {d.classes}; digits have 10"
    if (d.source == "labelled") != (d.labelled is not None):
        yield 'data.labelled: it and source = "labelled" belong together'
    if d.labelled and d.labelled.reader.kind == "file":
        reader = d.labelled.reader
        if (reader.path is None) == (reader.package is None):
            yield (
                "data.labelled.reader: give path, or the package that carries the "
                "file, and not both"
            )
    if isinstance(e.model, Encoder) and d.labelled is None:
        yield 'model.kind: given "encoder"; it reads data.labelled, which is missing'
    if d.source not in ("digits", "text", "labelled") and d.classes is None:
        yield "data.classes: missing; how many labels the data have"
    if d.test == "official" and d.source not in ("mnist", "tfds"):
        yield f'data.test: given "official"; source = "{d.source}" brings no test set'
    if d.validation and (d.source == "text" or e.stream.kind == "mnist_360"):
        yield (
            f"data.validation: given {d.validation}; text and mnist_360 hold no rows of "
            "the clients out. Leave it out"
        )
    if d.test != "official" and d.test + p.fraction >= 1:
        yield (
            f"public.fraction: given {p.fraction} beside data.test = {d.test}; "
            "together they must leave rows for the clients, so less than 1"
        )
    public = p.fraction or (d.text is not None and d.text.public is not None)
    if not public and (p.steps or p.every):
        key = "steps" if p.steps else "every"
        yield (
            f"public.{key}: given {getattr(p, key)}; a public phase needs public "
            "data, public.fraction above 0"
        )
    if p.every and e.federation.schedule == "auto":
        yield (
            'federation.schedule: given "auto" with public.every; it times a round of '
            'one phase. Allowed: "vmap", "scan" or a number'
        )


def _text(e: Experiment) -> Iterator[str]:
    reads, language = e.data.source == "text", isinstance(e.model, Decoder | Pretrained)
    if reads != (e.data.text is not None):
        yield 'data.text: it belongs to source = "text", and source = "text" needs it'
    if reads != language:
        yield (
            f'model.kind: given "{e.model.kind}" with data.source = "{e.data.source}"; '
            'source = "text" and the kinds "decoder", "pretrained" belong together'
        )
    if not reads or e.data.text is None:
        return
    if e.public.steps or e.public.fraction:
        yield "public: text has data.text.public and public.every; leave the others out"
    contexts = e.data.text.contexts
    if (contexts.values is None) == (contexts.edges is None):
        yield "data.text.contexts: give values, or edges, and not both"
    count = len(contexts.values or ()) or len(contexts.edges or ()) - 1
    if count != e.stream.contexts:
        yield (
            f"stream.contexts: given {e.stream.contexts}; data.text.contexts makes {count}"
        )
    if e.stream.kind != "domain_incremental":
        yield f'stream.kind: given "{e.stream.kind}"; of text it is "domain_incremental"'


def _stream(e: Experiment) -> Iterator[str]:
    s, classes = e.stream, _classes(e)
    if s.kind == "mnist_360":
        yield from _mnist_360(e)
    groups = s.kind.startswith(("class", "task")) or isinstance(s.domains, ClassGroups)
    if groups and classes and classes % s.contexts:
        fits = [k for k in range(1, classes + 1) if classes % k == 0]
        yield (
            f"stream.contexts: given {s.contexts}; {classes} classes cannot be divided "
            f"evenly over them. Allowed: {', '.join(map(str, fits))}"
        )
    if s.order is not None and classes and sorted(s.order) != list(range(classes)):
        yield f"stream.order: given {s.order}; it must list 0 to {classes - 1} once each"
    images = s.kind == "domain_incremental" and e.data.source != "text"
    if (s.domains is not None) != images:
        what = "missing" if s.domains is None else f"given with kind = {s.kind!r}"
        yield f'stream.domains: {what}; it is for kind = "domain_incremental"'
    turns = s.domains.degrees if isinstance(s.domains, Rotations) else None
    if turns is not None and len(turns) != s.contexts:
        yield (
            f"stream.domains.degrees: given {len(turns)}; there are {s.contexts} contexts"
        )
    if s.drift.kind == "gradual" and s.drift.width > s.rounds_per_context:
        yield (
            f"stream.drift.width: given {s.drift.width}; at most "
            f"rounds_per_context, {s.rounds_per_context}"
        )
    if s.draw != "replacement" and s.drift.kind in ("gradual", "blurry"):
        yield (
            f'stream.draw: given "{s.draw}" with drift "{s.drift.kind}"; it passes '
            'through one context at a time. Allowed: "replacement"'
        )
    if s.draw == "order" and e.federation.epochs > 1:
        yield (
            f'federation.epochs: given {e.federation.epochs} with stream.draw = "order", '
            'which is one pass. Allowed: 1, or stream.draw = "epochs"'
        )
    if s.partition.kind == "natural" and _digits(e):
        yield "stream.partition.kind: given 'natural'; digits have no column of owners"
    for key in ("join", "leave"):
        given = getattr(s, key)
        if given is not None and len(given) != s.clients:
            yield f"stream.{key}: given {len(given)} rounds; there are {s.clients} clients"


def _mnist_360(e: Experiment) -> Iterator[str]:
    for key, fixed in MNIST_360.items():
        given = getattr(e.stream, key)
        if given != fixed:
            yield f'stream.{key}: given {given!r}; with kind = "mnist_360" it is {fixed!r}'
    if e.data.classes not in (None, 10):
        yield f"data.classes: given {e.data.classes}; MNIST-360 is made from 10 digits"
    if e.public.fraction:
        yield (
            f"public.fraction: given {e.public.fraction}; MNIST-360 turns the clients' "
            "digits alone, so there are no public rows. Allowed: 0"
        )


def _model(e: Experiment) -> Iterator[str]:
    m = e.model
    if isinstance(m, Vit):
        if m.width % m.heads:
            yield f"model.heads: given {m.heads}; it must divide width, {m.width}"
        if _digits(e) and DIGITS[0] % m.patch:
            yield f"model.patch: given {m.patch}; it must divide the image's side, 8"
    if isinstance(m, Convnet):
        if any(w % m.groups for w in m.widths):
            yield f"model.groups: given {m.groups}; it must divide widths, {m.widths}"
        if _digits(e) and DIGITS[0] % 2 ** len(m.widths):
            yield f"model.widths: given {m.widths}; 8 pixels can be halved 3 times"
    if isinstance(m, Decoder) and m.width % m.heads:
        yield f"model.heads: given {m.heads}; it must divide width, {m.width}"
    if isinstance(m, Pretrained) and (m.path is None) == (m.package is None):
        yield "model: give path, or the package that carries the file, and not both"
    if isinstance(m, Decoder | Pretrained):
        return
    if m.train in BLOCKS and isinstance(m, Mlp | Convnet):
        yield (
            f"model.train: given {m.train!r}; only transformers have it. Allowed for "
            f"{m.kind!r}: 'full', 'head', 'lora' (mlp)"
        )
    if m.train != "lora":
        return
    if isinstance(m, Convnet):
        yield "model.train: given 'lora'; a convnet has none. Allowed: 'full', 'head'"
    widths = m.hidden if isinstance(m, Mlp) else [m.width] if isinstance(m, Vit) else []
    if any(m.rank > w for w in widths):
        yield f"model.rank: given {m.rank}; at most the width, {min(widths)}"


def _federation(e: Experiment) -> Iterator[str]:
    f, n = e.federation, e.stream.clients
    if f.cohort > n:
        yield (
            f"federation.cohort: given {f.cohort}; a cohort is drawn without "
            f"replacement from stream.clients = {n}. Allowed: 1 to {n}"
        )
    if f.cohort % f.shards or n % f.shards:
        yield (
            f"federation.shards: given {f.shards}; it must divide federation.cohort = "
            f"{f.cohort} and stream.clients = {n}"
        )
    if f.client.momentum and f.client.optimizer != "sgd":
        yield f"federation.client.momentum: {f.client.optimizer} takes none"
    if f.client.weight_decay and f.client.optimizer != "adamw":
        yield f"federation.client.weight_decay: {f.client.optimizer} takes none"


def _arm(e: Experiment, key: str, arm: Arm) -> Iterator[str]:
    names = [link["method"] for link in arm.chain]
    server = (arm.server or e.federation.server)["method"]
    if ("feddyn" in names) != (server == "feddyn_server"):
        yield (
            f"{key}: the method feddyn and the server feddyn_server belong together; "
            f"given chain {names} and server {server!r}"
        )
    for other in AVERAGED if arm.algorithm else ():
        if getattr(arm, other):
            yield (
                f"{key}.{other}: given beside {key}.algorithm, which takes the place of "
                "federated averaging and all that belongs to it"
            )
    if "feddat" in names and arm.personal is None:
        yield (
            f"{key}.personal: missing; the own adapters of feddat stay on their clients: "
            'personal = "own_adapter", and model.train = "dual_adapters"'
        )
    mixes = arm.joint is None or (e.stream.kind == "mnist_360" and arm.joint == "all")
    if e.stream.draw == "order" and not mixes:
        yield (
            f'{key}.joint: given "{arm.joint}" with stream.draw = "order"; only '
            'stream.kind = "mnist_360" mixes such rows, and "all" of them'
        )
    if ("icarl" in names) != (arm.loss == "sigmoid"):
        yield (
            f'{key}: the method icarl and loss = "sigmoid" belong together; given '
            f"chain {names} and loss {arm.loss!r}"
        )
    after = [link["method"] for link in arm.phases]
    for method, phase in PAIRS.items():
        if (method in names) != (phase in after):
            yield (
                f"{key}: the method {method} and the phase {phase} belong together; "
                f"given chain {names} and phases {after}"
            )
    classes = outputs_of(e)
    for i, link in enumerate(arm.chain):
        yield from _capacity(f"{key}.chain.{i}", link.get("capacity", 1))
        if classes and link.get("num_classes", classes) < classes:
            yield (
                f"{key}.chain.{i}.num_classes: given {link['num_classes']}; the data "
                f"have {classes}. Leave it out"
            )


def _capacity(key: str, capacity: int | str) -> Iterator[str]:
    """Whether it can be read; if the rows fit is seen when the memory is made."""
    try:
        reservoir.rows_in(capacity, jax.ShapeDtypeStruct((1,), "u1"))
    except ValueError as error:
        yield f"{key}: {error}"
