"""Logs that a program reads: a JSON object a line, where FEDSAM_LOG_JSON is set (`fedsam --log-json ...` sets it).

{"time": "2026-11-23T14:15:00.120+00:00", "level": "WARNING", "logger": "fedsam_core.federation.summing",
 "message": "site north refused ...", "run": "spleen-...", "round": 3, "attempt": 7, "site": "north"}

run, round, attempt and site stand where they are known: a record's own (`extra=`), else the process's (`about`).
"""

import io
import json
import logging
import os
import sys
from datetime import UTC, datetime

VARIABLE = "FEDSAM_LOG_JSON"
FIELDS = ("run", "round", "attempt", "site")

_OURS = ("fedsam_core", "cluster", "pipelines")
_process: dict[str, str | int] = {}


def wanted() -> bool:
    """Whether logs are to be JSON lines."""
    return os.environ.get(VARIABLE, "0").lower() not in ("", "0", "false")


def about(**fields: str | int) -> None:
    """What every further line of this process is about: run, round, attempt or site."""
    _process.update(fields)


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {field: getattr(record, field, _process.get(field)) for field in FIELDS}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{field: value for field, value in fields.items() if value is not None},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up() -> None:
    """Has this process log JSON lines on stderr, from INFO for our own packages; without the variable, nothing."""
    if not wanted() or any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    for package in _OURS:
        logging.getLogger(package).setLevel(logging.INFO)


class LoggedStream(io.TextIOBase):
    """A stream whose lines become log records: what a person would have read, for a program."""

    def __init__(self, logger: logging.Logger, level: int) -> None:
        self._logger, self._level, self._begun = logger, level, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.log(self._level, "%s", line.rstrip())
        return len(text)
