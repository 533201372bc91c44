"""Files that are not read as they stand, and the command that makes of one what is read."""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from stages.data import files
from stages.data.source import DataFile
from stages.errors import DataError

LOOKED_AT = 16 << 20  # bytes, of all files of a source together
LEAST = 1 << 16  # of each
MARKS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # between columns; the first is read
QUOTED = re.compile(r'"[^"]*"')


def check_name(given: str) -> None:
    """Raises DataError: by its name it is a kind of file that says nothing of rows."""
    name = shlex.quote(given)
    if given.lower().endswith(".tsv"):
        hint = _other_mark(given, "\t", gzipped=False)
        raise DataError(f"{given}: {hint}")
    if given.lower().endswith(".xlsx"):
        raise DataError(
            f"{given}: a spreadsheet is not read; save it as CSV (UTF-8), with the names of the columns in the first line"
        )
    if given.lower().endswith((".txt", ".md")):
        program = (
            "import json, sys; "
            r"[print(json.dumps({'text': part})) for part in sys.stdin.read().split('\n\n') if part.strip()]"
        )
        raise DataError(
            f"{given}: it cannot be told what a row of plain text is; one for each paragraph is made by\n"
            f'  python -c "{program}" < {name} > {shlex.quote(Path(given).stem)}.jsonl'
        )


def check_text(given: str, found: Sequence[DataFile]) -> None:
    """Raises DataError: a file that is not UTF-8, or a table whose columns are separated by something else than commas."""
    for file in found:
        where = given if Path(given).is_file() else file.path
        head, whole = _head(file, max(LEAST, LOOKED_AT // len(found)))
        if file.kind == "json" and not json.detect_encoding(head).startswith("utf-8"):
            continue  # JSON may be UTF-16 or UTF-32
        text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode(head, final=whole)
        if _is_other(text):
            raise DataError(f"{where}: {_other_encoding(where, head, file.gzipped)}")
        if file.kind == "csv":
            names = QUOTED.sub("", re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0])
            mark = max(MARKS, key=names.count)
            if mark != ",":
                raise DataError(f"{where}: {_other_mark(where, mark, file.gzipped)}")


def _head(file: DataFile, most: int) -> tuple[bytes, bool]:
    """The first bytes of a file of text, and whether they are all."""
    if file.kind not in ("csv", "json", "jsonl"):
        return b"", True
    try:
        with files.open_stream(file) as data:
            head = data.read(most)
    except files.BROKEN:  # told with the row where the damage is
        return b"", True
    return head, len(head) < most


def _is_other(text: str) -> bool:
    """Whether bytes that are not UTF-8 are more than a few that went wrong: in UTF-8 they stand among letters that are no
    ASCII and whole, in another encoding there are hardly any of those. Rows with such bytes would be left out, and the
    others trained: of a German file those without umlauts."""
    if text.isascii():
        return False
    bad = len(text) - len(text.encode(errors="ignore").decode())
    good = len(text) - len(text.encode("ascii", "ignore")) - bad
    return bad > good


def _other_encoding(where: str, head: bytes, gzipped: bool) -> str:
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name, encoding = shlex.quote(where), "utf-16" if wide else "cp1252"
    convert = f"iconv -f {encoding} -t utf-8"
    convert = f"gunzip -c {name} | {convert}" if gzipped else f"{convert} {name}"
    target = shlex.quote(f"utf8-{Path(where).name.removesuffix('.gz')}")
    return f"it is not UTF-8{'' if wide else '; of Western European Windows'}: {convert} > {target}"


def _other_mark(where: str, mark: str, gzipped: bool) -> str:
    opened = "gzip.open(sys.argv[1], 'rt', " if gzipped else "open(sys.argv[1], "
    opened += "encoding='utf-8-sig', newline='')"
    program = f"import csv, gzip, sys; csv.writer(sys.stdout).writerows(csv.reader({opened}, delimiter={mark!r}))"
    return (
        f"its columns are separated by {MARKS[mark]}, commas are read; write it again with\n"
        f'  python -c "{program}" {shlex.quote(where)} > commas.csv'
    )
