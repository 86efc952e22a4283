"""What a local LoRA step of K clients needs, from the compiled program: nothing runs.

    python benchmarks/foundation/memory.py [--tokens 8] [--remat]

compiles one step of Adam on rank 8 beside queries and values of a decoder in the shape
of SmolLM2-135M, for K clients under vmap over one frozen base, and writes memory.csv and
memory.md beside this file: the bytes of what goes in and of the temporaries, with the
low-rank path beside the kernels, as `models.lora` has it, and for contrast with
W + s A B formed per client. No array is allocated.
"""

import argparse
import csv
import datetime
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from fedcl import models

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.memory import Need, local_training

CONFIG = models.DecoderConfig(
    vocab=49152, width=576, depth=30, heads=9, hidden=1536, kv_heads=3
)
CLIENTS = (1, 4, 16, 64)
MIB = 2**20
COLUMNS = (
    "clients",
    "base",
    "φ",
    "optimiser",
    "temporaries",
    "in all",
    "with a base each",
    "with W + s A B formed",
)
ABOUT = """\
MiB of one step of Adam on LoRA adapters of rank 8 (queries and values of all 30 layers of
a decoder in the shape of SmolLM2-135M, float32) for K clients at once, {tokens} tokens a
client{remat}. From the compiled program's own account on a CPU; nothing was run. φ and the
optimiser's state are those of all K clients. "In all" is what goes in and the temporaries.
For contrast, "with a base each" is the same with K copies of the base, as of libraries that
hold a whole model for each client (not compiled: its temporaries are at least these), and
the last column the same step with the merged kernels formed in each client (compiled).
Measured on {date} with jax {jax}:

    python benchmarks/foundation/memory.py{options}
"""


def needs(clients: int, tokens: int, remat: bool, merged: bool = False) -> Need:
    """The bytes of one step, by K."""
    key, plain = jax.random.key(0), models.decoder(CONFIG, remat=remat)
    shapes = jax.eval_shape(plain.init, key)
    model, params = models.lora(
        plain, shapes, rank=8, alpha=16.0, where=is_target, key=key
    )
    dense = lambda params, x: plain.apply(models.merge_lora(params), x)
    x = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    apply = dense if merged else model.apply
    return local_training(apply, params, models.lora_only, x, clients)


def is_target(path: str) -> bool:
    """Queries and values, as in the paper."""
    return path.endswith(("attention/q", "attention/v"))


def row(k: int, tokens: int, remat: bool) -> list[float]:
    """MiB, as the columns say."""
    one, merged = (needs(k, tokens, remat, formed) for formed in (False, True))
    parts = (one.base, k * one.phi, k * one.optimiser, one.temporary)
    whole = sum(parts)
    each, formed = (k - 1) * one.base, merged.temporary - one.temporary
    return [size / MIB for size in (*parts, whole, whole + each, whole + formed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--remat", action="store_true")
    args = parser.parse_args()
    table = []
    for k in CLIENTS:
        sizes = (f"{size:.1f}" for size in row(k, args.tokens, args.remat))
        table.append([str(k), *sizes])
        print(" | ".join(table[-1]), flush=True)
    write(table, args)


def write(table: list[list[str]], args: argparse.Namespace) -> None:
    here = Path(__file__).with_suffix("")
    with here.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])
    options = f" --tokens {args.tokens}" + (" --remat" if args.remat else "")
    head = ABOUT.format(
        tokens=args.tokens,
        remat=", blocks rematerialised" if args.remat else "",
        date=datetime.date.today(),
        jax=jax.__version__,
        options=options,
    )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table]
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    here.with_suffix(".md").write_text(f"{head}\n{rows}")


if __name__ == "__main__":
    main()
