"""JSON lines end at line feeds; a line that cannot be read is its own problem."""

import json

import pytest

from jaxspark.jsonlines import JsonLines, MalformedRow, read_json_lines

# At each of these str.splitlines or bytes.splitlines ends a line.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"a{each}b"} for each in SEPARATORS]
    lines = []
    for row in rows:
        text = row["text"]
        escaped = text if text[1] >= "\x80" else json.dumps(text)[1:-1]
        lines.append(f'{{"text":\x20"{escaped}"}}')
    path.write_bytes("\n".join(lines).encode())
    assert [row for _, row in read_json_lines(path)] == rows


def test_what_was_added_is_read_back(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl")
    entries = [{"text": f"a{each}b\r\n"} for each in SEPARATORS]
    entries.append({"loss": float("inf")})
    for entry in entries:
        lines.add(entry)
    assert JsonLines(tmp_path / "a.jsonl").entries == entries
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"cut')
    assert JsonLines(tmp_path / "a.jsonl").entries == entries


def test_foreign_beginnings_and_ends_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\r\n{"a": 3}')
    read = list(read_json_lines(path))
    assert read == [(f"{path}:{n}", {"a": i}) for n, i in ((1, 1), (4, 2), (5, 3))]
    path.write_bytes(b"")
    assert list(read_json_lines(path)) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\\ud83d"}', "half of a surrogate pair (\\ud83d)"),
        (b'{"\\uDC00": 1}', "half of a surrogate pair (\\udc00)"),
        (
            b'{"a": "\xed\xa0\xbd"}',
            "is not UTF-8 (invalid continuation byte at byte 7)",
        ),
        (b"1" * 5000, "digits"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": "\0"}', "is not JSON (Invalid control character at column 8)"),
        (b'{"a": 1} {"a": 2}', "is not JSON (Extra data at column 10)"),
        (b'{"a": 1', "is not JSON"),
    ],
    ids=range(8),
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n"\\ud83d\\ude00"\n')
    first, (_, bad), last = read_json_lines(path)
    assert first[1] == {"a": 1} and last[1] == "\N{GRINNING FACE}"
    assert isinstance(bad, MalformedRow) and bad.where == f"{path}:2"
    assert reason in bad.reason


def test_a_compressed_file_is_refused_as_a_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"\x1f\x8b\x08\n\n")
    with pytest.raises(ValueError, match="a.jsonl.gz: is compressed by gzip"):
        list(read_json_lines(path))
