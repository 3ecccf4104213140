"""One clinical CSV file -> checked records, or one error that lists everything wrong in it.

Spreadsheets write the same table in many ways (byte-order marks, ``;`` and tabs, decimal commas); all of
those are read. A value that can be read in two ways is refused, because a wrong guess here is a wrong patient
later. Dates of birth become ages in this file and go no further, not even into error texts.
"""

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

# Compared without regard to case. Anything else is a value and has to be readable.
MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "unknown", "?", "-"})
MAX_AGE = 120.0  # years
MAX_LYMPHOCYTE_COUNT = 2000.0  # 10^9/L; beyond any leukaemia reported, and where cells per microlitre begin
CHALLENGE_LABELS = {"0": "reactive", "1": "tumoral", "-1": None}  # -1 marks a patient whose label is withheld

_SHOWN_PROBLEMS = 10
_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}
_NUMBER = re.compile(r"[+-]?([0-9]+([.,][0-9]*)?|[.,][0-9]+)([eE][+-]?[0-9]+)?")
_MAYBE_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}([.,])[0-9]{3}")
_WHOLE_NUMBER = re.compile(r"(-?[0-9]+)([.,]0*)?")
_DATE_LIKE = re.compile(r"\d{1,4}\s*[-/.]\s*\d{1,2}\s*[-/.]\s*\d{1,4}|(?<!\d)\d{8}(?!\d)")
_BIRTH_DATES = (  # year, month, day by the separator that tells the order
    re.compile(r"(?P<month>[0-9]{1,2})/(?P<day>[0-9]{1,2})/(?P<year>[0-9]{4})"),
    re.compile(r"(?P<day>[0-9]{1,2})-(?P<month>[0-9]{1,2})-(?P<year>[0-9]{4})"),
)
_BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class CohortError(ValueError):
    """A cohort cannot be read as it stands; names file, row, column, value and what was expected."""


@dataclass(frozen=True)
class Record:
    """One checked row of a clinical table; ``None`` = missing."""

    patient_id: str
    where: str  # file and line, as an editor counts lines; the header is line 1
    label: str | None = None
    age: float | None = field(default=None, repr=False)  # years
    sex: str | None = None  # "F" or "M"
    lymphocyte_count: float | None = None  # 10^9 cells per litre


@dataclass
class CsvTable:
    """A CSV file as text, and the problems found in it so far."""

    name: str
    delimiter: str
    key: str  # the column that names the patient
    titles: dict[str, str]  # column -> as written in the file; columns are lower case
    rows: dict[int, dict[str, str]] = field(default_factory=dict)  # line in the file -> cells by column
    problems: list[str] = field(default_factory=list)

    def values(self, column: str | None) -> dict[int, str]:
        """Line -> value, without missing ones; empty when the file has no such column."""
        if column not in self.titles:
            return {}
        return {line: cells[column] for line, cells in self.rows.items() if not is_missing(cells[column])}

    def refuse(self, line: int, column: str, expected: object, *, private: bool = False) -> None:
        value, patient = self.rows[line][column], self.rows[line][self.key]
        whose = f"patient {_shown(patient)}, " if patient and column != self.key else ""
        title, shown = self.titles[column], _shown(value, private=private)
        self.problems.append(f"line {line}, {whose}column {title!r}: {shown}; {expected}")

    def raise_problems(self) -> None:
        if not self.problems:
            return
        listed = "\n  ".join(self.problems[:_SHOWN_PROBLEMS])
        more = len(self.problems) - _SHOWN_PROBLEMS
        rest = f"\n  and {more} more" if more > 0 else ""
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        raise CohortError(f"{self.name}: {count}; correct the file and read it again\n  {listed}{rest}")


@dataclass(frozen=True)
class Schema:
    """Which column of a layout holds what; ``age`` and ``birth`` exclude each other. Names are lower case."""

    patient_id: str
    label: str
    sex: str
    lymphocyte_count: str
    parse_label: Callable[[str], str | None]
    age: str | None = None
    birth: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        names = (self.patient_id, self.label, self.sex, self.lymphocyte_count, self.age, self.birth)
        return tuple(name for name in names if name)


def read_records(path: Path, name: str, schema: Schema, reference: date) -> tuple[dict[str, Record], list[str]]:
    """Read and check one clinical table.

    Args:
        path: the CSV file.
        name: how errors call it, e.g. ``trainset/trainset_true.csv``.
        schema: the layout's columns; only the patient's identifier has to be there.
        reference: the day at which dates of birth become ages.

    Returns:
        Records by patient identifier in file order, and warnings (ignored columns).

    Raises:
        CohortError: listing up to ten problems of the file and their total number.
    """
    table = read_csv(path, name, key=schema.patient_id)
    ids = _patient_ids(table)
    columns = {
        "label": _parsed(table, schema.label, schema.parse_label),
        "sex": _parsed(table, schema.sex, parse_sex),
        "lymphocyte_count": _numbers(table, schema.lymphocyte_count, check_count),
        "age": _numbers(table, schema.age, check_age) | _ages_from_birth(table, schema.birth, reference),
    }
    _refuse_labels_spelled_alike(table, schema.label, columns["label"])
    table.raise_problems()
    if not ids:
        raise CohortError(f"{name}: no patient below the header; expected one row per patient")
    records = {
        patient_id: Record(
            patient_id, f"{name}, line {line}", **{key: values.get(line) for key, values in columns.items()}
        )
        for line, patient_id in ids.items()
    }
    ignored = [title for column, title in table.titles.items() if column not in schema.columns]
    return records, [f"{name}: columns not used: {', '.join(ignored)}"] if ignored else []


# --- the file as text ---------------------------------------------------------------------------------------


def read_csv(path: Path, name: str, *, key: str) -> CsvTable:
    """Read a CSV file (``,``, ``;`` or tab; UTF-8 or UTF-16; any case of header) into stripped text cells.

    Raises:
        CohortError: no text table, broken quotes, or no column ``key``.
    """
    text = _decode(path, name)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: dict[int, list[str]] = {}
    line = 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows[line] = cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise CohortError(f"{name}, line {line}: not a valid CSV row ({error}); check its quotes") from None
    if not rows:
        raise CohortError(f"{name}: the file is empty; expected a header with the column {key!r}")
    header_line = next(iter(rows))
    columns, titles = _header(rows.pop(header_line), f"{name}, line {header_line}", key)
    table = CsvTable(name, delimiter, key, titles)
    for line, cells in rows.items():
        _add_row(table, line, columns, cells)
    return table


def _decode(path: Path, name: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CohortError(f"{name}: cannot be read ({error.strerror})") from error
    encoding = next((codec for mark, codec in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise CohortError(f"{name}: not a UTF-8 or UTF-16 text table; save it as 'CSV UTF-8'")
    return text


def _header(cells: list[str], where: str, key: str) -> tuple[list[str], dict[str, str]]:
    columns = ["_".join(cell.casefold().split()) for cell in cells]
    titles = {column: cell for column, cell in zip(columns, cells, strict=True) if column}
    if key not in columns:
        # A file without header shows its first patient here, which must not be repeated in an error.
        looks_like_data = any(_NUMBER.fullmatch(cell) or _DATE_LIKE.search(cell) for cell in cells)
        found = "the line looks like data" if looks_like_data else f"found {', '.join(map(repr, titles.values()))}"
        raise CohortError(f"{where}: no column {key!r}; {found}; write a header line with this column")
    doubled = [column for column in titles if columns.count(column) > 1]
    if doubled:
        raise CohortError(f"{where}: the column {doubled[0]!r} stands more than once; keep one of them")
    return columns, titles


def _add_row(table: CsvTable, line: int, columns: list[str], cells: list[str]) -> None:
    if len(cells) < len(columns) or any(cells[len(columns) :]):
        hint = "; put a value with a decimal comma in quotes" if table.delimiter == "," else ""
        table.problems.append(f"line {line}: {len(cells)} values; expected {len(columns)} as in the header{hint}")
        return
    table.rows[line] = dict(zip(columns, cells, strict=False))


# --- cells -> values ----------------------------------------------------------------------------------------


def is_missing(text: str) -> bool:
    """Whether a cell of the table says that nothing is known."""
    return text.casefold() in MISSING


def parse_sex(text: str) -> str:
    """`"F"` or `"M"`."""
    sex = _SEXES.get(text.casefold())
    if sex is None:
        raise ValueError("expected F, M, female or male, or empty if unknown")
    return sex


def check_age(years: float) -> float:
    """The age, if a person can have it."""
    if not 0 <= years <= MAX_AGE:
        raise ValueError(f"expected an age from 0 to {MAX_AGE:g} years, or empty if unknown")
    return years


def check_count(count: float) -> float:
    """0 is refused: in exports it stands for 'not measured' far more often than for no lymphocyte."""
    if count <= 0:
        raise ValueError("expected a lymphocyte count above 0 in 10^9/L; leave it empty if it was not measured")
    if count > MAX_LYMPHOCYTE_COUNT:
        limit = f"{MAX_LYMPHOCYTE_COUNT:g}"
        raise ValueError(f"expected 10^9 cells per litre, at most {limit}; divide cells per microlitre by 1000")
    return count


def parse_label(text: str) -> str:
    """A class name as it is, or a whole number without decimals (``1.0`` -> ``1``)."""
    number = _WHOLE_NUMBER.fullmatch(text)
    if _DATE_LIKE.search(text) or (number is None and _NUMBER.fullmatch(text)):
        raise ValueError("expected a class name or a whole number")
    if number is None:
        return text
    label = int(number[1])
    if label < 0:
        raise ValueError("a negative label may mean a class or 'unlabelled'; leave it empty if unlabelled")
    return str(label)


def parse_challenge_label(text: str) -> str | None:
    """The class name of the challenge's number; `None` for -1, a label that is withheld."""
    number = _WHOLE_NUMBER.fullmatch(text)
    if number is None or number[1] not in CHALLENGE_LABELS:
        raise ValueError("expected 0 (reactive), 1 (tumoral) or -1 (unlabelled)")
    return CHALLENGE_LABELS[number[1]]


def parse_birth_date(text: str) -> date:
    """``month/day/year`` with slashes, ``day-month-year`` with dashes; four-digit years only."""
    for pattern in _BIRTH_DATES:
        if parts := pattern.fullmatch(text):
            try:
                return date(int(parts["year"]), int(parts["month"]), int(parts["day"]))
            except ValueError:
                break
    raise ValueError("expected month/day/year or day-month-year with a four-digit year, or empty if unknown")


def age_at(birth: date, reference: date) -> float:
    """Exact age in years of 365.25 days."""
    if birth > reference:
        raise ValueError(f"the date of birth lies after the reference date {reference.isoformat()}")
    return check_age((reference - birth).days / 365.25)


def parse_number(text: str, marks_in_doubt: str) -> float:
    """A finite number with a decimal point or comma.

    A mark in ``marks_in_doubt`` followed by exactly three digits could as well separate thousands: refused.
    """
    thousands = _MAYBE_THOUSANDS.fullmatch(text)
    if thousands and thousands[1] in marks_in_doubt:
        raise ValueError(
            "could be a decimal or a thousands separator; write decimals with a point, thousands without mark"
        )
    number = float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(number):
        raise ValueError("expected a finite number, or empty if unknown")
    return number


# --- columns ------------------------------------------------------------------------------------------------


def _parsed(
    table: CsvTable, column: str | None, parse: Callable[[str], Any], *, private: bool = False
) -> dict[int, Any]:
    """Line -> parsed value of the column's present values; what cannot be parsed becomes a problem."""
    parsed = {}
    for line, text in table.values(column).items():
        try:
            parsed[line] = parse(text)
        except ValueError as expected:
            table.refuse(line, column, expected, private=private)
    return parsed


def _numbers(table: CsvTable, column: str | None, check: Callable[[float], float]) -> dict[int, float]:
    used = {mark for text in table.values(column).values() for mark in ",." if mark in text}
    # Spreadsheets write ';' between cells exactly where the comma is the decimal mark.
    in_doubt = ",." if len(used) == 2 else "" if table.delimiter == ";" else ","
    return _parsed(table, column, lambda text: check(parse_number(text, in_doubt)))


def _ages_from_birth(table: CsvTable, column: str | None, reference: date) -> dict[int, float]:
    return _parsed(table, column, lambda text: age_at(parse_birth_date(text), reference), private=True)


def _patient_ids(table: CsvTable) -> dict[int, str]:
    """Line -> identifier. Identifiers are folder names: none may lead out of the cohort's folder."""
    lines: dict[str, int] = {}
    for line, cells in table.rows.items():
        patient_id = cells[table.key]
        if is_missing(patient_id):
            table.refuse(line, table.key, "expected an identifier that is not empty and no word for a missing value")
        elif re.search(r"[/\\]|\.\.|^\.$", patient_id) or not patient_id.isprintable():
            table.refuse(line, table.key, "expected a plain folder name without '/', '\\' or '..'")
        elif patient_id in lines:
            table.refuse(line, table.key, f"already on line {lines[patient_id]}; expected one row per patient")
        else:
            lines[patient_id] = line
    return {line: patient_id for patient_id, line in lines.items()}


def _refuse_labels_spelled_alike(table: CsvTable, column: str, labels: dict[int, str | None]) -> None:
    spellings: dict[str, str] = {}
    for line, label in labels.items():
        first = spellings.setdefault("".join((label or "").casefold().split()), label)
        if first != label:
            table.refuse(line, column, f"differs from {first!r} only in case or spaces; spell each class one way")


def _shown(text: str, *, private: bool = False) -> str:
    """A value for an error text; private ones and any date only by their shape: ``'dd/dd/dddd'``.

    Columns get swapped, so a date of birth may stand in any of them.
    """
    if private or _DATE_LIKE.search(text):
        text = re.sub(r"\d", "d", re.sub(r"[^\W\d_]", "a", text))
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
