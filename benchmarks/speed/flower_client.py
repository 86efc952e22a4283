"""Flower's client of the works: local SGD as one compiled JAX program."""

import functools
from collections import OrderedDict

import functions
import jax
import nets
import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from work import ORDERS, WORKS, rows_of

app = ClientApp()


@functools.cache
def prepared(name: str):
    """Once in each process: the rows, θ, and the compiled local training."""
    work = WORKS[name]
    flat = nets.weights(work.net)
    theta = {p: v for p, v in flat.items() if not nets.trained(work.net, p)}
    return rows_of(work), theta, jax.jit(functions.local_of(work.net, work.rate))


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    rows, theta, local = prepared(str(config["work"]))
    client, t = int(context.node_config["partition-id"]), int(config["server-round"])
    index = rows.order[client, (t - 1) % ORDERS]
    phi = to_numpy(message.content["arrays"])
    end = local(phi, theta, rows.x[index], rows.y[index])
    told = MetricRecord({"num-examples": int(index.size)})
    content = RecordDict({"arrays": to_record(end), "metrics": told})
    return Message(content=content, reply_to=message)


def to_record(weights) -> ArrayRecord:
    from flwr.app import Array

    arrays = OrderedDict((p, Array(np.asarray(v))) for p, v in weights.items())
    return ArrayRecord(arrays)


def to_numpy(record) -> nets.Weights:
    return {path: array.numpy() for path, array in record.items()}
