"""TensorFlow Datasets as a source, read through array_record without TensorFlow."""

import socket
from collections.abc import Mapping, Sequence
from os import PathLike, path
from typing import Any

import numpy as np

from fedcl.streams import _checks

_HOST = ("storage.googleapis.com", 443)


def tfds_source(
    name: str,
    split: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    download: bool = False,
) -> Sequence[Mapping[str, Any]]:
    """A prepared dataset as a random-access sequence of records, for `hosted`.

    Args:
      name: a dataset's name ("mnist", "cifar10:3.0.2"), or the directory of one
        version of a prepared dataset.
      split: "train", "test[:10%]", ...
      data_dir: where prepared datasets are kept; None is TFDS's own place.
      download: whether to download and prepare the dataset when it is not there.

    Raises:
      FileNotFoundError: the dataset is not there and `download` is False.
      ConnectionError: it is to be downloaded and there is no network. Said at once:
        TFDS itself would try for minutes.
      ValueError: it was prepared in a format that needs TensorFlow; no such split.
    """
    import tensorflow_datasets as tfds

    builder = _prepared(tfds, name, data_dir)
    if builder is None:
        builder = _download(tfds, name, data_dir, download)
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_dir} is stored as {builder.info.file_format}, which needs "
            "TensorFlow; prepare it again with "
            f'tfds.builder("{name}", file_format="array_record")'
        ) from error


def tfds_arrays(
    name: str,
    split: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    download: bool = False,
    columns: Mapping[str, str] | None = None,
) -> _checks.Columns:
    """A whole split as a table in memory.

    Args:
      name: see `tfds_source`, as `split`, `data_dir` and `download`.
      split: "train", ...
      data_dir: where prepared datasets are kept.
      download: whether to fetch what is missing.
      columns: our names to the dataset's; None is `{"x": "image", "y": "label"}`.

    Returns:
      The columns, [M, ...] each.
    """
    source = tfds_source(name, split, data_dir=data_dir, download=download)
    return _checks.columns(stacked([source[i] for i in range(len(source))], columns))


def stacked(
    records: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None
) -> dict[str, np.ndarray]:
    """Records as columns, renamed."""
    names = {"x": "image", "y": "label"} if columns is None else columns
    missing = sorted(set(names.values()) - set(records[0]))
    if missing:
        raise KeyError(
            f"the records have no field {missing}; they have {sorted(records[0])}; "
            'name yours with columns={"x": ..., "y": ...}'
        )
    return {
        ours: np.stack([np.asarray(record[theirs]) for record in records])
        for ours, theirs in names.items()
    }


def _prepared(tfds: Any, name: str, data_dir: str | PathLike[str] | None) -> Any:
    if path.exists(path.join(name, "dataset_info.json")):
        return tfds.builder_from_directory(name)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        return None
    return builder if builder.is_prepared() else None


def _download(
    tfds: Any, name: str, data_dir: str | PathLike[str] | None, download: bool
) -> Any:
    where = "TFDS's own data directory" if data_dir is None else data_dir
    missing = f'the dataset "{name}" is not prepared in {where}'
    if not download:
        raise FileNotFoundError(
            f"{missing}; give its data_dir, or download=True to fetch it"
        )
    if not _online():
        raise ConnectionError(
            f"{missing}, and {_HOST[0]} cannot be reached to download it; prepare it "
            "on a machine with a network and copy the directory, or use a local source"
        )
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def _online(timeout: float = 3.0) -> bool:
    try:
        socket.create_connection(_HOST, timeout).close()
    except OSError:
        return False
    return True
