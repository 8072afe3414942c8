"""Files to rows: bad rows are named by file and line, and never lost in silence."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from research.data import rows
from research.data.rows import RowError

ROWS = [{"instruction": f"do {i}", "input": "", "output": "é" * i} for i in range(1, 5)]


def write_jsonl(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    write_jsonl(tmp_path / "a.jsonl", lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.txt", ["first", "", "  second "])
    return tmp_path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_kind_gives_the_rows(files, suffix):
    found = rows.read(files / f"a.{suffix}", required=("instruction", "output"))
    assert [row for _, row in found] == ROWS and len(found) == 4
    assert isinstance(found.dataset, datasets.Dataset)


def test_text_is_a_row_a_line(files):
    found = list(rows.read(files / "a.txt"))
    assert [row["text"] for _, row in found] == ["first", "  second "]
    assert found[1][0].endswith("a.txt:3")


BAD = [
    '{"instruction": "x", "output": "y"}',
    "",
    '{"instruction": "x", ',
    '{"instruction": "z"}',
    "[1]",
]


def test_bad_line_is_named(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", BAD)
    with pytest.raises(RowError, match=r"bad\.jsonl:3: not JSON: .* at column 21"):
        rows.read(path)


def test_missing_field_is_named(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [BAD[0], BAD[3]])
    with pytest.raises(
        RowError, match=r"bad\.jsonl:2: lacks field 'output'; it has \['instruction'\]"
    ):
        rows.read(path, required=("instruction", "output"))


def test_null_counts_as_missing_and_bytes_must_be_utf8(tmp_path):
    path = write_jsonl(tmp_path / "null.jsonl", ['{"output": null}'])
    with pytest.raises(RowError, match=r"null\.jsonl:1: lacks field 'output'"):
        rows.read(path, required=("output",))
    path.write_bytes(b'{"output": "x"}\n{"output": "\xff"}\n')
    with pytest.raises(RowError, match=r"null\.jsonl:2: not UTF-8"):
        rows.read(path)


def test_skip_counts(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", BAD)
    found = rows.read(path, required=("output",), on_bad="skip")
    assert (len(found), found.skipped) == (1, 3)
    assert next(iter(found))[0].endswith("bad.jsonl:1")


def test_empty_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(RowError, match=r"empty\.jsonl: empty data set \(0 rows skipped\)"):
        rows.read(tmp_path / "empty.jsonl")
    write_jsonl(tmp_path / "bad.jsonl", ["{"])
    with pytest.raises(RowError, match=r"bad\.jsonl: empty data set \(1 rows skipped\)"):
        rows.read(tmp_path / "bad.jsonl", on_bad="skip")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(RowError, match="empty data set"):
        rows.read(tmp_path / "none.json")
    with pytest.raises(RowError, match="empty data set"):
        rows.from_list([])


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(RowError, match="no such file"):
        rows.read(tmp_path / "absent.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(RowError, match=r"a\.csv: unknown kind '\.csv'"):
        rows.read(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text('[{"a": 1},\n{"a": }]')
    with pytest.raises(RowError, match=r"a\.json:2: not JSON"):
        rows.read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(RowError, match="expected a list of objects, got dict"):
        rows.read(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(RowError, match=r"a\.parquet: not a Parquet file"):
        rows.read(tmp_path / "a.parquet")


def test_mixed_rows_keep_their_form(tmp_path):
    mixed = [
        {"messages": [{"role": "user", "content": "text"}]},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}],
            "label": True,
        },
    ]
    path = write_jsonl(tmp_path / "mixed.jsonl", [json.dumps(row) for row in mixed])
    first, second = (row for _, row in rows.read(path))
    assert first["messages"][0]["content"] == "text" and first["label"] is None
    assert second["messages"][0]["content"][0]["text"] == "part" and second["label"] is True
