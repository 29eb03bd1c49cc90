"""The history of a folder: what is appended is read, and a torn line spoils no other."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.history import HISTORY_FILE, HistoryEntry, StageHistory, append_history, read_history


def entry(started: str, **changes: object) -> HistoryEntry:
    values: dict[str, object] = {
        "started": started,
        "seconds": 12.5,
        "cellpair": "0.1.0",
        "dataset": "da7a",
        "failures": {"run-b": "BadInput"},
        "stages": (
            StageHistory(run="a", stage="cells", fingerprint="f00", reused=False, seconds=3.25),
        ),
    }
    return HistoryEntry.model_validate({**values, **changes})


FIRST, SECOND = entry("2025-01-01T00:00:00Z"), entry("2025-01-02T00:00:00Z", dataset=None)


def test_entries_are_read_in_the_order_in_which_they_were_appended(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there yet"
    assert read_history(out) == []
    append_history(out, FIRST)
    append_history(out, SECOND)
    assert read_history(out) == [FIRST, SECOND]
    assert (out / HISTORY_FILE).read_bytes().count(b"\n") == 2


def test_a_line_break_in_a_name_makes_no_second_line(tmp_path: Path) -> None:
    hostile = entry("2025-01-01T00:00:00.5+00:00", failures={"a\r\nb\u2028\x85": "<script>\n"})
    append_history(tmp_path, hostile)
    append_history(tmp_path, FIRST)
    assert read_history(tmp_path) == [hostile, FIRST]


@given(cut=st.integers(min_value=1))
def test_a_torn_last_line_is_told_and_spoils_nothing(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("out")
    append_history(out, FIRST)
    whole = (out / HISTORY_FILE).read_bytes()
    append_history(out, SECOND)
    both = (out / HISTORY_FILE).read_bytes()
    torn = len(whole) + cut % (len(both) - len(whole))
    (out / HISTORY_FILE).write_bytes(both[:torn])
    # Without its line break alone, or without any byte of it, nothing is torn.
    second = [SECOND] if torn == len(both) - 1 else []
    assert read_history(out) == [FIRST, *second]
    append_history(out, FIRST)
    assert read_history(out) == [FIRST, *second, FIRST]


def test_lines_that_are_no_entries_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append_history(tmp_path, FIRST)
    with (tmp_path / HISTORY_FILE).open("ab") as f:
        f.write(b'{"schema_version":2}\n\xff\xfe')
    with caplog.at_level(logging.WARNING, "cellpair"):
        assert read_history(tmp_path) == [FIRST]
    assert [r.message.split(", ")[1] for r in caplog.records] == [
        "line 2: torn or of another version; left out",
        "line 3: torn or of another version; left out",
    ]


def test_several_may_append_at_once(tmp_path: Path) -> None:
    entries = [entry(f"2025-01-01T00:00:{i:02d}Z") for i in range(60)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda e: append_history(tmp_path, e), entries))
    assert sorted(e.started for e in read_history(tmp_path)) == [e.started for e in entries]


@pytest.mark.parametrize("started", ["yesterday", "2025-01-01", "2025-01-01T00:00:00+02:00"])
def test_an_entry_starts_at_a_time_in_utc(started: str) -> None:
    with pytest.raises(ValidationError, match="started"):
        entry(started)


def test_an_entry_of_unknown_fields_is_refused() -> None:
    with pytest.raises(ValidationError, match="host"):
        entry("2025-01-01T00:00:00Z", host="somewhere")
