"""Rows on the host: the same draw as on the device, from any source."""

import socket
import time
from typing import Any

import jax
import numpy as np
import pytest

from fedcl import streams

DATA = {
    "x": np.random.default_rng(0).integers(0, 256, (36, 3, 3), dtype=np.uint8),
    "y": np.arange(36) % 3,
}
CONTEXTS = np.arange(36) // 18


indices = jax.jit(streams.Stream.indices)
sample, sweep = jax.jit(streams.Stream.sample), jax.jit(streams.Stream.sweep)


def pair(source, **options):
    """A stream on the device and one on the host over the same rows."""
    given: dict[str, Any] = {
        "contexts": CONTEXTS,
        "steps": 2,
        "batch_size": 4,
        "seed": 3,
    } | options
    schedule = given.pop("schedule", streams.abrupt(2, 3, 2))
    columns = given.pop("columns", None)
    device = streams.from_arrays(DATA, schedule, **given)
    host = streams.hosted(source, schedule, labels=DATA["y"], columns=columns, **given)
    return device, host


def agree(device, host):
    for t in (0, 3):
        for client in (0, 2):
            key = jax.random.key(10 * t + client)
            one, two = sample(device, key, client, t), host.sample(key, client, t)
            assert all(isinstance(column, np.ndarray) for column in two.values())
            assert {k: v.dtype for k, v in one.items()} == {
                k: v.dtype for k, v in two.items()
            }
            jax.tree.map(np.testing.assert_array_equal, one, two)
            sweeps = sweep(device, client, t), host.sweep(client, t)
            jax.tree.map(np.testing.assert_array_equal, *sweeps)
            for name in ("task", "present", "ends"):
                facts = [getattr(s, name)(client, t) for s in (device, host)]
                assert facts[0] == facts[1]
    assert device.example() == host.example()
    for name in ("num_clients", "num_contexts", "num_rounds", "ragged"):
        assert getattr(device, name) == getattr(host, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draw": "epochs", "steps": None},
        {"head": np.eye(2, 3)},
        {"partition": streams.dirichlet(0.5)},
        {"prior": np.full((1, 1, 3), 1 / 3)},
        {"transform": streams.rotations([0, 90]).transform,
         "tables": streams.rotations([0, 90]).tables},
    ],
    ids=["plain", "epochs", "head", "dirichlet", "prior", "transform"],
)  # fmt: skip
def test_hosted_equals_device(options):
    agree(*pair(DATA, **options))


def test_a_memory_map(tmp_path):
    np.save(tmp_path / "x.npy", DATA["x"])
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    agree(*pair({"image": x, "y": DATA["y"]}, columns={"x": "image", "y": "y"}))


class Records:
    """A random-access source that counts what is read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 36

    def __getitem__(self, i):
        self.read.append(i)
        return {"image": DATA["x"][i], "label": int(DATA["y"][i])}


def test_records_and_only_those_drawn():
    source = Records()
    device, host = pair(source)
    agree(device, host)
    source.read.clear()
    index, mask, context = indices(device, jax.random.key(0), 1, 0)
    host.fetch(index, mask, context)
    assert sorted(source.read) == np.unique(np.asarray(index)).tolist()


def test_fetch_takes_any_leading_axes():
    device, host = pair(DATA)
    keys, clients = jax.random.split(jax.random.key(0), 2), np.array([2, 0])
    cohort = (None, 0, 0, None)
    drawn = jax.jit(jax.vmap(streams.Stream.indices, cohort))(device, keys, clients, 1)
    batch = jax.jit(jax.vmap(streams.Stream.sample, cohort))(device, keys, clients, 1)
    jax.tree.map(np.testing.assert_array_equal, batch, host.fetch(*drawn))


def test_a_grain_source():
    grain = pytest.importorskip("grain.python")
    rows = [{"x": DATA["x"][i], "y": DATA["y"][i]} for i in range(36)]
    source = grain.MapDataset.source(rows)
    agree(*pair(source, columns={"x": "x", "y": "y"}))


def test_natural_owners_on_the_host():
    owners = np.arange(36) % 3
    host = streams.hosted(
        DATA,
        streams.abrupt(2, 3, 1),
        labels={"y": DATA["y"], "user": owners},
        contexts=CONTEXTS,
        partition=streams.natural("user"),
        steps=3,
        batch_size=8,
    )
    index, _, _ = indices(host.stream, jax.random.key(0), 2, 0)
    assert set(owners[np.asarray(index)].ravel().tolist()) == {2}


def test_errors_name_both_sides():
    schedule = streams.abrupt(1, 1, 1)
    with pytest.raises(ValueError, match=r"36 rows, but the labels have {'y': 35}"):
        streams.hosted(DATA, schedule, labels=DATA["y"][1:], steps=1)
    host = streams.hosted(
        Records(), schedule, labels=DATA["y"], columns={"x": "pixels"}, steps=1
    )
    with pytest.raises(KeyError, match=r"no field .*pixels.*; they have .*image"):
        host.sample(jax.random.key(0), 0, 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS dataset of the same rows, written as array_record without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(3, 3), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(36):
                yield i, {"image": DATA["x"][i], "label": int(DATA["y"][i])}

    folder = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_round_trip(prepared):
    table = streams.tfds_arrays("tiny", "train", data_dir=prepared)
    order = lambda x: np.lexsort(x.reshape(36, -1).T)
    assert table["x"].dtype == np.uint8 and table["y"].dtype == np.int32
    read, known = order(table["x"]), order(DATA["x"])
    np.testing.assert_array_equal(table["x"][read], DATA["x"][known])
    np.testing.assert_array_equal(table["y"][read], DATA["y"][known])
    by_folder = streams.tfds_source(str(prepared / "tiny" / "1.0.0"), "train[:25%]")
    assert len(by_folder) == 9
    source = streams.tfds_source("tiny", "train", data_dir=prepared)
    options: dict[str, Any] = {"contexts": CONTEXTS, "steps": 2, "batch_size": 4}
    schedule = streams.abrupt(2, 2, 1)
    device = streams.from_arrays(table, schedule, **options)
    agree(device, streams.hosted(source, schedule, labels=table["y"], **options))


def test_tfds_says_at_once_what_is_missing(tmp_path, monkeypatch, prepared):
    begin = time.monotonic()
    with pytest.raises(
        FileNotFoundError, match=r'"mnist" is not prepared in .*download'
    ):
        streams.tfds_source("mnist", "train", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match='"tyni" is not prepared'):
        streams.tfds_source("tyni", "train", data_dir=prepared)

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(ConnectionError, match="cannot be reached to download"):
        streams.tfds_source("mnist", "train", data_dir=tmp_path, download=True)
    assert time.monotonic() - begin < 20
    with pytest.raises(KeyError, match=r"no field .*pixels"):
        streams.tfds_arrays("tiny", "train", data_dir=prepared, columns={"x": "pixels"})
