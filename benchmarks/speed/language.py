"""A round of LoRA on a decoder: tokens a second, and its share of the matmul rate.

    python benchmarks/speed/language.py
    python benchmarks/speed/language.py --model smollm2 --dtype bfloat16 \
      --clients 8 --batch 8 --tokens 1024 --size 8192             # On a GPU.

Random weights and tokens; LoRA of rank 8 beside queries and values, one SGD step after
another on each client, FedAvg of the adapters. Only what the work needs is counted: the
frozen base forward and back to its inputs, the adapters forward and back. Rounds and
products of `--size` squared take turns, and medians are printed.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import matmul_rate
from ours import Given
from work import ORDERS, peak, schedule

import fedcl
from fedcl import algorithms, losses, models, phases, tree

CONFIGS = {
    "small": models.DecoderConfig(4096, 512, 6, 8, 1408),
    "smollm2": models.DecoderConfig(49152, 576, 30, 9, 1536, kv_heads=3),
}
RANK = 8


def flops(config: models.DecoderConfig, params: Any, length: int) -> float:
    """Of a token: products with kernels and the tied head, attention, adapters."""
    flat = [
        (tree.path_string(path), leaf.size)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    frozen = sum(n for path, n in flat if path.endswith(("kernel", "embed")))
    low = sum(n for path, n in flat if path.endswith(("lora/a", "lora/b")))
    attention = 2 * config.depth * length * config.width
    return 4 * frozen + 6 * attention + 6 * low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=CONFIGS, default="small")
    parser.add_argument("--dtype", default="float32", help="what is computed in")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="rows of a client's step")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--schedule", type=schedule, default="vmap")
    parser.add_argument("--size", type=int, default=1024, help="of the square products")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    config = CONFIGS[given.model]
    dtype = jnp.dtype(given.dtype)
    base = models.decoder(config, dtype=dtype, param_dtype=dtype, unroll=True)
    model, params = models.lora(
        base,
        base.init(jax.random.key(0)),
        rank=RANK,
        alpha=2.0 * RANK,
        where=lambda path: path.split("/")[-1] in ("q", "v"),
        key=jax.random.key(1),
    )
    phi, theta = tree.partition(params, models.lora_only)
    shape = (given.clients, ORDERS, given.steps, given.batch)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.vocab, (np.prod(shape), given.tokens), np.int32)
    order = jnp.arange(len(rows)).reshape(shape)
    stream = Given({"tokens": jnp.asarray(rows)}, order)
    algorithm = algorithms.fedavg(losses.next_token(model.apply), optax.sgd(0.01))
    state = algorithm.init(phi, stream.example(), given.clients, theta)
    parts = [phases.federated(algorithm, schedule=given.schedule)]

    def seconds() -> float:
        start = time.perf_counter()
        end, _ = fedcl.run(parts, state, stream, key=jax.random.key(2), rounds=1)
        jax.block_until_ready(end.server.params)
        return time.perf_counter() - start

    first = seconds()
    runs = [
        (seconds(), matmul_rate((given.size,) * 3, given.dtype))
        for _ in range(given.repeats)
    ]
    middle, rate = map(statistics.median, zip(*runs, strict=True))
    tokens = given.clients * given.steps * given.batch * given.tokens
    reached = tokens * flops(config, params, given.tokens) / middle / 1e9
    told = vars(given) | {
        "device": jax.devices()[0].device_kind,
        "compile": first - middle,
        "round": middle,
        "tokens_per_second": tokens / middle,
        "gflops": reached,
        "matmul_gflops": rate,
        "share": reached / rate,
        "peak_mb": peak(),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
