"""JSON lines: one object a line whatever is logged, with what is known of run, round, attempt and site."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsam_core import logs
from fedsam_core.logs import JsonLines, LoggedStream


def lines(record: logging.LogRecord) -> dict[str, object]:
    text = JsonLines().format(record)
    assert "\n" not in text
    parsed: dict[str, object] = json.loads(text)
    return parsed


def record(message: str, **extra: object) -> logging.LogRecord:
    return logging.getLogger("fedsam_core.test").makeRecord(
        "fedsam_core.test", logging.WARNING, __file__, 1, message, (), None, extra=extra
    )


def test_a_record_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_process", {})
    nasty = 'two\nlines, "quotes", \\ and \x00'
    plain = lines(record(nasty))
    assert plain["message"] == nasty
    assert (plain["level"], plain["logger"]) == ("WARNING", "fedsam_core.test")
    assert not set(plain) & set(logs.FIELDS)
    logs.about(site="north", run="r-1")
    told = lines(record("x", round=3, attempt=2, site="south"))
    assert {field: told[field] for field in logs.FIELDS} == {"run": "r-1", "round": 3, "attempt": 2, "site": "south"}
    try:
        raise ValueError("why")
    except ValueError:
        failed = record("x")
        failed.exc_info = sys.exc_info()
    assert "ValueError: why" in str(lines(failed)["error"])


def test_what_is_printed_becomes_records(caplog: pytest.LogCaptureFixture) -> None:
    stream = LoggedStream(logging.getLogger("fedsam_core.test"), logging.INFO)
    with caplog.at_level(logging.INFO, "fedsam_core.test"):
        for piece in ("one ", "line\n\ntwo", "\nrest"):
            stream.write(piece)
    assert [entry.message for entry in caplog.records] == ["one line", "two"]
    assert isinstance(stream, io.TextIOBase)


def test_every_line_of_a_command_is_json(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != logs.VARIABLE}
    command = [sys.executable, "-m", "pipelines.cli", "--log-json", "keys", "show", str(tmp_path / "none.pub")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (told,) = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert told["level"] == "ERROR"
    assert "none.pub" in told["message"]
