"""Experiments on text: documents, tokenizer, language model, losses in nats per token."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fedcl import _experiment_build as _build
from fedcl import base, losses, metrics, tree
from fedcl._experiment_config import (
    Decoder,
    Documents,
    Experiment,
    Peft,
    Pretrained,
    Reader,
    Text,
)

if TYPE_CHECKING:
    from fedcl._experiment_run import Own, Setup, Tell

EXACT = ("fedex_lora", "flora")  # Servers that need accumulators beside the adapters.
BYTES, END = 256, 256


class Bytes:
    """Text as its bytes, for models from scratch; 256 ends a document."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Table(NamedTuple):
    """The texts of an experiment as rows."""

    packed: Any
    test: base.Batch
    general: base.Batch | None
    public: base.Batch | None
    classes: int = 0


class Base(NamedTuple):
    """A model before adapters, with the tokenizer that it reads by."""

    model: Any
    params: Any  # [S, ...]
    tokenizer: Any
    vocab: int
    end: int | bool
    card: dict[str, Any]


def prepare(e: Experiment, tell: "Tell") -> "Setup":
    """Texts, stream, model; see `fedcl._experiment_run.prepare`."""
    from fedcl._experiment_run import Event, Setup

    keys = jax.vmap(jax.random.key)(np.asarray(e.seeds, np.uint32))
    fold = lambda n: jax.vmap(lambda k: jax.random.fold_in(k, n))(keys)
    given = _given(e)
    own = _base(e.model, fold(_build.INIT))
    rows = table(e, given, own)
    tell(Event(_told(own, rows)))
    stream = _stream(e, rows)
    made, trained, frozen = _adapted(e, own, fold(_build.ADAPTER))
    loss_fn = losses.next_token(made.apply)
    return Setup(
        stream,
        made,
        loss_fn,
        trained,
        frozen,
        evaluator(e, rows, stream, loss_fn),
        fold(_build.RUN),
        rows,
        _build.ends(e, stream.num_rounds),
        _build.seen(e, stream),
        "nats",
        {"model": own.card, "text": rows.packed.report.record()},
    )


def _given(e: Experiment) -> Text:
    assert e.data.text is not None
    return e.data.text


def _told(own: Base, rows: Table) -> str:
    p, card = rows.packed, own.card
    return (
        f"base: {card['source']}, licence {card['licence']}, {card['parameters']:,} "
        f"parameters; text: {len(p.clients):,} rows of {p.num_clients} clients in "
        f"{p.num_contexts} contexts"
    )


def table(e: Experiment, given: Text, own: Base) -> Table:
    """Reads, tokenises and packs all texts."""
    from fedcl import streams

    s, limit = e.stream, e.evaluation.limit
    field = given.clients is not None
    aligned = given.aligned
    held_out = (lambda r: r["number"] % aligned == 0) if aligned else e.data.test
    packed = streams.packed(
        _tokens(given, own, given.cache),
        given.length,
        clients=given.clients if field else _build._partition(s.partition),
        num_clients=None if field else s.clients,
        contexts=_contexts(given),
        held_out=held_out,
        seed=e.data.seed,
    )
    if packed.num_clients != s.clients:
        raise ValueError(
            f"stream.clients is {s.clients}, but the text has {packed.num_clients} by "
            f"{given.clients!r}; give that number."
        )
    other = lambda d: None if d is None else _tokens(d, own, given.cache)
    general, public = other(given.general), other(given.public)
    unseen = None
    if general is not None:
        unseen = _some(streams.held_out_text(general, given.length), limit, e.data.seed)
    columns = streams.packed(public, given.length).columns if public else None
    shared = {k: jnp.asarray(v[:]) for k, v in columns.items()} if columns else None
    test = _some(packed.test or {}, limit, e.data.seed)
    return Table(packed, test, unseen, shared)


def _contexts(given: Text) -> Any:
    from fedcl import streams

    c = given.contexts
    if c.edges is not None:
        edges = [int(x) if x == int(x) else x for x in c.edges]
        return streams.eras(c.by, edges, missing="drop")
    return streams.by(c.by, c.values, missing="drop")


def _tokens(d: Documents, own: Base, cache: str | None) -> Any:
    from fedcl import streams

    kept = None if isinstance(own.tokenizer, Bytes) else cache
    end = own.end if getattr(d, "eos", True) else False
    return streams.tokenised(
        corpus(d), own.tokenizer, eos=end, vocab_size=own.vocab, cache=kept
    )


def corpus(d: Documents) -> Any:
    """The documents of a section.

    Raises:
      ValueError: if there is nothing, with the section's own hint.
    """
    from fedcl import streams

    if not Path(d.path).expanduser().exists():
        raise ValueError(f"data.text: there is nothing at {d.path!r}. {d.hint}".strip())
    folder = Path(d.path).expanduser()
    if d.parts:
        return streams.text(list(_sentences(d, folder)))
    read = streams.text(folder, text=d.field, pattern=d.pattern)
    cut = slice(d.first, None if d.limit is None else d.first + d.limit)
    names = ("texts", "records", "places")
    return dataclasses.replace(read, **{n: getattr(read, n)[cut] for n in names})


def _sentences(d: Documents, folder: Path) -> Iterator[dict[str, Any]]:
    """Documents of some sentences each, part by part."""
    stop = None if d.limit is None else d.first + d.limit
    for part, pattern in d.parts.items():
        files = sorted(folder.glob(pattern))
        if not files:
            raise ValueError(f"data.text.parts: {folder} holds no {pattern}. {d.hint}")
        lines = _joined(_lines(files), d.together)
        for number, text in itertools.islice(enumerate(lines), d.first, stop):
            yield {"text": text, "part": part, "number": number}


def _lines(files: list[Path]) -> Iterator[str]:
    """The sentences of JSON lists, whose items are texts or begin with one."""
    from fedcl.streams._text import json_items

    for file in files:
        for place, item in json_items(file, str(file)):
            line = item[0] if isinstance(item, list) and item else item
            if not isinstance(line, str):
                raise ValueError(
                    f"data.text.parts: {place} is {item!r:.60}; it must be a text, or a "
                    "list that begins with one."
                )
            yield line


def _joined(lines: Iterator[str], together: int) -> Iterator[str]:
    while several := list(itertools.islice(lines, together)):
        yield " ".join(several)


def _some(test: base.Batch, limit: int | None, seed: int) -> base.Batch:
    """At most `limit` real rows of each context, drawn without replacement."""
    if limit is None or limit >= test["mask"].shape[1]:
        return test
    rng, many = np.random.default_rng(seed), np.asarray(test["mask"]).sum(axis=1)
    index = np.zeros((len(many), limit), int)
    for k, n in enumerate(many.astype(int)):
        index[k] = np.resize(np.sort(rng.permutation(n)[:limit]), limit)
    at = np.arange(len(many))[:, None]
    real = np.arange(limit)[None, :] < many[:, None]
    rows = {k: v[at, index] for k, v in test.items()}
    return rows | {"mask": jnp.asarray(real, jnp.float32)}


def _base(m: Any, keys: jax.Array) -> Base:
    from fedcl import models

    if isinstance(m, Decoder):
        config = models.DecoderConfig(
            vocab=BYTES + 1,
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            hidden=m.hidden,
            layout=m.layout,
        )
        made = models.decoder(config)
        params = jax.jit(jax.vmap(made.init))(keys)
        size = tree.size(jax.eval_shape(made.init, keys[0])) // 4
        card = {"source": "random", "licence": "none", "parameters": size}
        return Base(made, params, Bytes(), BYTES + 1, END, card)
    path = find(m)
    allow = models.PERMISSIVE if m.allow is None else m.allow
    loaded = models.load(path, allow=allow)
    tokenizer = models.tokenizer(path)
    models.check_tokenizer(tokenizer, loaded)
    params = tree.stack(loaded.params, len(keys))
    vocab = loaded.config.vocab
    return Base(loaded.model, params, tokenizer, vocab, True, loaded.card)


def find(m: Pretrained | Reader) -> Path:
    """The file of a base: of a path, or beneath an installed package, not imported.

    Raises:
      ValueError: if it is not there, with the section's hint.
    """
    if m.path is not None:
        if Path(m.path).expanduser().exists():
            return Path(m.path).expanduser()
        raise ValueError(
            f"model.path: there is nothing at {m.path!r}. {m.hint}".strip()
        )
    spec = find_spec(str(m.package))
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(p for f in folders for p in Path(f).glob(m.file))
    if not files:
        what = "is not installed" if spec is None else f"holds no {m.file}"
        raise ValueError(
            f"model.package: {m.package} {what}. {m.hint} Or give model.path, a folder "
            "in Hugging Face's layout or a .gguf file."
        )
    return files[0]


def _adapted(e: Experiment, own: Base, keys: jax.Array) -> tuple[Any, Any, Any]:
    """The model and its parameters [S, ...], split into φ and θ."""

    peft = getattr(e.model, "peft", None)
    if peft is None:
        return own.model, own.params, None
    put, trained = _beside(own.model, peft)
    made = put(_first(own.params), keys[0])[0]
    params = jax.jit(jax.vmap(lambda p, k: put(p, k)[1]))(own.params, keys)
    return made, *tree.partition(params, trained)


def _beside(model: Any, peft: Peft) -> tuple[Callable[..., Any], Callable[[str], bool]]:
    """`(params, key) -> (model, params)` with new leaves, and which they are."""
    from fedcl import models

    if peft.method == "prompt":
        length = peft.length
        put = lambda p, k: models.soft_prompt(model, p, length=length, key=k)
        return put, models.prompts_only
    where = lambda path: path.split("/")[-1] in peft.targets
    low = partial(models.lora, rank=peft.rank, alpha=peft.alpha, where=where)
    return lambda p, k: low(model, p, key=k), models.lora_only


def _first(params: Any) -> Any:
    return jax.tree.map(lambda x: x[0], params)


def _stream(e: Experiment, rows: Table) -> Any:
    s, f = e.stream, e.federation
    return rows.packed.stream(
        _build.schedule(e),
        steps=f.steps if s.draw == "replacement" else None,
        batch_size=f.batch_size,
        draw=s.draw,
        epochs=f.epochs,
        hidden=s.hidden,
        seed=s.seed,
    )


def evaluator(e: Experiment, rows: Table, s: Any, loss_fn: base.LossFn) -> Partial:
    """Nats per token of each context, each client, and of the general text."""
    size = np.asarray(s.size, np.float32).T
    shares = size / np.maximum(size.sum(axis=1, keepdims=True), 1)
    chunk = e.evaluation.chunk
    own = metrics.loss_evaluator(loss_fn, rows.test, shares, chunk=chunk)
    if rows.general is None:
        return own
    general = metrics.loss_evaluator(loss_fn, rows.general, chunk=chunk)
    return Partial(_both, own, general)


def _both(own: Partial, general: Partial, state: base.State) -> dict[str, jax.Array]:
    return {**own(state), "general": general(state)["loss"][0]}


def own(e: Experiment, setup: "Setup", arm: Any, optimizer: Any) -> "Own":
    """What an arm has beside its methods: accumulators, adapters in turn."""
    from fedcl import _experiment_engine as _engine
    from fedcl import algorithms, models
    from fedcl._experiment_run import Own

    server = (arm.server or e.federation.server)["method"]
    made, loss_fn = setup.model, setup.loss_fn
    trained, frozen = setup.params, setup.frozen
    evaluate: Any = setup.evaluate
    if server in EXACT:
        whole = tree.merge(setup.params, frozen)
        grown = lambda p: models.accumulated(setup.model, p)
        made = grown(_first(whole))[0]
        params = jax.jit(jax.vmap(lambda p: grown(p)[1]))(whole)
        trained, frozen = tree.partition(params, models.lora_only)
        loss_fn = losses.next_token(made.apply)
        evaluate = evaluator(e, setup.table, setup.stream, loss_fn)
    client = arm.client or e.federation.client
    next_token = lambda m: losses.next_token(m.apply)
    steps = _engine.local_loss(client, loss_fn, next_token, made)
    begun = (loss_fn, steps, trained, frozen, evaluate)
    if not arm.lorm:
        return Own(*begun, optimizer)
    tapped = models.tapped(made, _first(tree.merge(trained, frozen)))
    grams = losses.next_token(tapped.apply)
    merged = lambda algorithm: algorithms.lorm(algorithm, grams)
    turns = algorithms.rolora(optimizer)
    return Own(*begun, turns, merged)
