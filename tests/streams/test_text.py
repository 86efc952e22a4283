"""Documents from files, folders and records: what is read, and what is refused."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from fedcl import streams

ROWS = [
    {"text": "one two", "year": 1790, "who": "A"},
    {"text": "drei – vier", "year": 1791, "who": "B"},
]


def same(corpus: streams.Corpus, extra=()):
    assert corpus.texts == ("one two", "drei – vier") and corpus.prompts is None
    known = [{k: r[k] for k in r if k not in extra} for r in corpus.records]
    assert known == [{"year": 1790, "who": "A"}, {"year": 1791, "who": "B"}]


def test_records_of_every_kind():
    class Hub:
        """As a Hugging Face data set."""

        column_names = ("text", "year", "who")

        def __iter__(self) -> Iterator[dict]:
            return iter(ROWS)

    class Prepared:
        """As a TFDS data source: random access, bytes and NumPy numbers."""

        def __len__(self):
            return 2

        def __getitem__(self, i):
            row = ROWS[i]
            return {
                "text": row["text"].encode(),
                "year": np.int64(row["year"]),
                "who": row["who"].encode(),
            }

    for source in (ROWS, iter(ROWS), Hub(), Prepared()):
        same(streams.text(source))


def test_files_and_folders(tmp_path):
    lines = "\n".join(json.dumps(r, ensure_ascii=i > 0) for i, r in enumerate(ROWS))
    (tmp_path / "all.jsonl").write_text("\ufeff" + lines + "\n\n", "utf-8")
    same(streams.text(tmp_path / "all.jsonl"), extra=["file"])
    (tmp_path / "all.json").write_text(json.dumps(ROWS))
    corpus = streams.text(str(tmp_path / "all.json"))
    same(corpus, extra=["file"])
    assert corpus.places[1].endswith("all.json[1]")
    folder = tmp_path / "many"
    (folder / "b").mkdir(parents=True)
    for name, row in zip(("a.json", "b/c.json"), ROWS, strict=True):
        (folder / name).write_text(json.dumps(row))
    (folder / "a.txt").write_text("plain")
    corpus = streams.text(folder, pattern="*.json")
    same(corpus, extra=["file"])
    assert corpus.places == ("a.json", "b/c.json")
    assert [r["file"] for r in corpus.records] == ["a.json", "b/c.json"]
    assert streams.text(folder, pattern="*.txt").texts == ("plain",)
    with pytest.raises(ValueError, match=r"of several kinds, \['.json', '.txt'\]"):
        streams.text(folder)


def test_prompts_functions_and_empty_documents():
    rows = [
        {"q": "Why?", "a": "So."},
        {"q": "When?", "a": " \n"},
        {"q": "", "a": "Now."},
    ]
    corpus = streams.text(rows, text="a", prompt="q")
    assert corpus.texts == ("So.", "Now.") and corpus.prompts == ("Why?", "")
    assert corpus.empty == 1 and corpus.places == ("document 0", "document 2")
    joined = streams.text(rows, text=lambda r: r["q"] + r["a"])
    assert joined.texts == ("Why?So.", "When? \n", "Now.")
    assert joined.records[0] == rows[0]
    with pytest.raises(ValueError, match="document 1: the document has no text"):
        streams.text(rows, text="a", strict=True)


def test_the_fingerprint_is_of_the_text_alone(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS))
    ours = streams.text(ROWS).fingerprint()
    assert streams.text(tmp_path / "one.json").fingerprint() == ours
    for rows in (
        ROWS[::-1],
        ROWS[:1],
        [{"text": "one twodrei – vier"}],
        [{"text": "one"}, {"text": " twodrei – vier"}],
    ):
        assert streams.text(rows).fingerprint() != ours


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff", r"a.txt is not UTF-8: byte 5 is 0xff"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\xe9"}',
            r"a.jsonl:2 .* byte 24 is 0xe9",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', r"a.jsonl:3 is not JSON: Expecting"),
        ("a.json", b'[{"text": 1}]', r"a.json\[0\]: the text must be a string, got 1"),
        ("a.json", b'["bare"]', r"a.json\[0\]: a document must be a mapping"),
        ("a.json", b'[{"body": "x"}]', r'a.json\[0\] has no field "text"; it has'),
        (
            "a.json",
            rb'[{"text": "\ud800"}]',
            r"half of a surrogate pair at character 0",
        ),
        ("a.json", b"[]", r"a.json holds no document with text \(0 empty\)"),
        ("a.txt", b"  ", r"holds no document with text \(1 empty\)"),
        ("a.csv", b"x", r"the kind of file must be one of .jsonl, .json, .txt"),
    ],
)
def test_files_are_refused_with_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        streams.text(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "a path or an iterable of records, got a int"),
        (
            {"train": [], "test": []},
            TypeError,
            r"dict of \['test', 'train'\]; give one",
        ),
        (["bare"], ValueError, "document 0: a document must be a mapping"),
        (
            [{"text": b"\xe9"}],
            ValueError,
            "document 0, field 'text' is not UTF-8: byte 0",
        ),
        ("/no/such/file", FileNotFoundError, "neither a file nor a folder"),
    ],
)
def test_sources_are_refused(source, error, message, tmp_path):
    with pytest.raises(error, match=message):
        streams.text(source)
    with pytest.raises(ValueError, match=r"holds no \*\.json"):
        streams.text(tmp_path, pattern="*.json")
    with pytest.raises(ValueError, match=r'pattern="\*" is for a folder'):
        streams.text([], pattern="*")


def test_prepared_text_needs_no_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Speeches(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "year": tfds.features.Scalar(dtype=np.int64),
                "who": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(ROWS)

    Speeches(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = streams.tfds_source("speeches", "train", data_dir=tmp_path)
    corpus = streams.text(sorted(source, key=lambda row: int(row["year"])))
    same(corpus)
    assert sorted(streams.text(source).texts) == sorted(corpus.texts)


def test_a_hugging_face_data_set():
    datasets = pytest.importorskip("datasets")
    same(streams.text(datasets.Dataset.from_list(ROWS)))
