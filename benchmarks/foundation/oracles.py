"""How far every family of models is from transformers' own outputs in torch.

python benchmarks/foundation/oracles.py

writes oracles.csv and oracles.md beside this file: the largest |Δ| over whole outputs, in
float32 on a CPU, at random weights in the configurations of the tests, the goldens' and
others; with FEDCL_SMOLLM2, a GGUF file, and FEDCL_MINILM, a folder, the real weights too.
Needs torch and transformers.
"""

import csv
import datetime
import importlib.metadata
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.oracles import live, make_decoder_goldens, make_encoder_goldens

REAL = {"FEDCL_SMOLLM2": live.smollm2, "FEDCL_MINILM": live.minilm}
COLUMNS = ("family", "case", "output", "largest difference", "largest output", "config")
VERSIONS = ("jax", "torch", "transformers", "numpy")
ABOUT = """\
Largest |Δ| between fedcl and transformers' torch models over whole outputs, float32, on
a CPU; random weights but for the last rows. A configuration is what differs from the
defaults of fedcl's own config. Measured on {date} with
{versions}:

    {given}python benchmarks/foundation/oracles.py
"""


def rows() -> list[live.Row]:
    found = list(live.decoders(make_decoder_goldens.cases()))
    found += live.decoders()
    found += live.encoders(small=make_encoder_goldens.SMALL, act="gelu")
    found += live.encoders()
    given = {name: os.environ[name] for name in REAL if name in os.environ}
    return found + [REAL[name](path) for name, path in given.items()]


def written(found: list[live.Row]) -> list[list[str]]:
    cells = lambda r: [
        *(r.family, r.name, r.output),
        f"{r.gap:.1e}",
        f"{r.size:.3g}",
        live.described(r.config),
    ]
    return [cells(r) for r in found]


def page(table: list[list[str]]) -> str:
    versions = (f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    given = "".join(f"{name}=… " for name in REAL if name in os.environ)
    told = {"versions": ", ".join(versions), "given": given}
    head = ABOUT.format(date=datetime.date.today(), **told)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table]
    return head + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    table, here = written(rows()), Path(__file__).with_suffix("")
    with here.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])
    here.with_suffix(".md").write_text(page(table))
    print(page(table))


if __name__ == "__main__":
    main()
