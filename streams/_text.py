"""Documents from files, folders, data sets and iterables, with what is known of each."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from fedcl.streams import _checks

Record = dict[str, Any]
Placed = Iterator[tuple[str, Any]]  # (where it lies, what lies there)

_KINDS = (".jsonl", ".json", ".txt")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in order.

    Attributes:
      texts: the documents.
      prompts: what comes before each and is not to be learnt, or None.
      records: everything else that the source says of each document: author, year, ...
      places: where each lies, such as "speeches.jsonl:12", for messages.
      empty: the documents without text that were left out.
    """

    texts: tuple[str, ...]
    prompts: tuple[str, ...] | None
    records: tuple[Record, ...]
    places: tuple[str, ...]
    empty: int = 0

    def __len__(self) -> int:
        """D, the documents."""
        return len(self.texts)

    def fingerprint(self) -> str:
        """A hash of the text, whatever file it came from and whatever is known of it."""
        digest = hashlib.sha256()
        for text in (*self.texts, *(self.prompts or ())):
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


def text(
    source: Any,
    *,
    text: str | Callable[[Record], str] = "text",
    prompt: str | Callable[[Record], str] | None = None,
    pattern: str | None = None,
    strict: bool = False,
) -> Corpus:
    r"""Documents with their metadata, from nearly anything that holds them.

    Args:
      source: a `.jsonl` file (one object a line), a `.json` file (an object, or a list
        of them), a `.txt` file (one document), a folder of one of these kinds, read in
        the order of the names; or an iterable of mappings: a list, a generator, a
        Hugging Face data set, a TFDS data source (`tfds_source`).
      text: the field with the text, or a function of the record.
      prompt: the field with what comes before it and is not to be learnt (a question
        whose answer is the text), or a function of the record.
      pattern: which files of a folder, such as "*.json"; needed when it holds several
        kinds.
      strict: refuse a document without text; otherwise it is left out and counted.

    Returns:
      The documents; records keep every other field, and files add "file".

    Raises:
      ValueError: text that is not UTF-8 (with the file and the byte), a line that is
        not JSON, a document that is no mapping, has not the field, or not a string
        there, nothing to read.
      TypeError: `source` is of another kind.

    Cost: the text is held in memory; tokens and rows need not be, see `tokenised`.

    >>> from fedcl import streams
    >>> corpus = streams.text([{"text": "We the people", "year": 1787}, {"text": " "}])
    >>> len(corpus), corpus.empty, corpus.records[0]
    (1, 1, {'year': 1787})
    """
    texts, prompts, records, places, empty = [], [], [], [], 0
    for place, given in _placed(source, pattern):
        record = _record(given, place)
        content = _read(record, text, "text", place)
        before = "" if prompt is None else _read(record, prompt, "prompt", place)
        if not content.strip():
            empty += _refused(place) if strict else 1
            continue
        texts.append(content)
        prompts.append(before)
        records.append({k: v for k, v in record.items() if k not in (text, prompt)})
        places.append(place)
    if not texts:
        raise ValueError(f"{_name(source)} holds no document with text ({empty} empty)")
    kept = tuple(prompts) if prompt is not None else None
    return Corpus(tuple(texts), kept, tuple(records), tuple(places), empty)


def _refused(place: str) -> int:
    raise ValueError(
        f"{place}: the document has no text; drop it, or leave out strict=True and it is "
        "skipped and counted"
    )


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | PathLike) else "the source"


def _record(given: Any, place: str) -> Record:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{place}: a document must be a mapping of fields, such as {{'text': ...}}, "
            f"got {type(given).__name__}"
        )
    return {str(k): _plain(v, f"{place}, field {k!r}") for k, v in given.items()}


def _plain(value: Any, place: str) -> Any:
    """Bytes as text, NumPy scalars as Python's."""
    if isinstance(value, bytes):
        return _decoded(value, place)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(value.item(), place)
    return value


def _read(
    record: Record, field: str | Callable[[Record], str], what: str, place: str
) -> str:
    if not callable(field) and field not in record:
        raise ValueError(
            f'{place} has no field "{field}"; it has {sorted(record)}; name the one '
            f"that holds the {what} with {what}=..."
        )
    value = field(record) if callable(field) else record[field]
    if not isinstance(value, str):
        raise ValueError(f"{place}: the {what} must be a string, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: the {what} holds half of a surrogate pair at character "
            f"{error.start}, which is no text; repair or drop it"
        ) from error
    return value


def _decoded(content: bytes, place: str, start: int = 0) -> str:
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8: byte {start + error.start} is "
            f"0x{content[error.start]:02x} ({error.reason}); convert it to UTF-8 first"
        ) from error


def _placed(source: Any, pattern: str | None) -> Placed:
    if isinstance(source, str | PathLike):
        return _files(Path(source), pattern)
    if pattern is not None:
        raise ValueError(f'pattern="{pattern}" is for a folder, got {type(source)}')
    if isinstance(source, Mapping) or not (
        isinstance(source, Iterable) or hasattr(source, "__getitem__")
    ):
        hint = f" of {sorted(map(str, source))}" if isinstance(source, Mapping) else ""
        raise TypeError(
            f"source must be a path or an iterable of records, got a "
            f"{type(source).__name__}{hint}; give one split, or a list of records"
        )
    return ((f"document {i}", record) for i, record in enumerate(_each(source)))


def _each(source: Any) -> Iterator[Any]:
    """The records; random-access sources (TFDS) need not be iterable."""
    if isinstance(source, Iterable):
        return iter(source)
    return (source[i] for i in range(len(source)))


def _files(path: Path, pattern: str | None) -> Placed:
    if not path.exists():
        raise FileNotFoundError(f"{path} is neither a file nor a folder")
    if path.is_file():
        yield from _file(path, str(path))
        return
    found = sorted(p for p in path.rglob(pattern or "*") if p.suffix in _KINDS)
    kinds = sorted({p.suffix for p in found})
    if len(kinds) != 1:
        held = (
            f"files of several kinds, {kinds}" if kinds else f"no {pattern or _KINDS}"
        )
        hint = f'; say which with pattern="*{kinds[0]}"' if kinds else ""
        raise ValueError(f"{path} holds {held}{hint}")
    for file in found:
        yield from _file(file, str(file.relative_to(path)))


def _file(path: Path, name: str) -> Placed:
    kind = _checks.choice("the kind of file", path.suffix, _KINDS)
    read = {".jsonl": _jsonl, ".json": json_items, ".txt": _txt}[kind]
    for place, record in read(path, name):
        named = isinstance(record, Mapping) and "file" not in record
        yield place, {**record, "file": name} if named else record


def _jsonl(path: Path, name: str) -> Placed:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{name}:{number}"
            content = _decoded(line, place, start)
            start += len(line)
            if content.strip():
                yield place, _parsed(content, place)


def json_items(path: Path, name: str) -> Placed:
    """What a .json file holds: the items of its list, or one.

    Raises:
      ValueError: if it is not UTF-8 or not JSON, with the place in the file.
    """
    parsed = _parsed(_decoded(path.read_bytes(), name), name)
    if not isinstance(parsed, list):
        parsed, place = [parsed], lambda i: name
    else:
        place = lambda i: f"{name}[{i}]"
    yield from ((place(i), record) for i, record in enumerate(parsed))


def _txt(path: Path, name: str) -> Placed:
    yield name, {"text": _decoded(path.read_bytes(), name)}


def _parsed(content: str, place: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place} is not JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno} of {content[:40]!r}"
        ) from error
