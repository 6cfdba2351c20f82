"""What a federation leaves behind: one folder with all that is needed to use, compare and repeat it.

run.json       what it was begun with (`pipelines.resume`)
config.yaml    the resolved configuration             manifest.json      parameters trained, sent and kept local
adapter/       the result, ready to load              state.safetensors  the global shared state after each round
initial.safetensors  the state before the first round  record.jsonl       what `fedsam verify` replays
sums/          each round's opened sum, packed
rounds.csv     a row a round                          ledger.csv         bytes by site, direction, round, purpose
layers.csv     a row a round and LoRA layer: how exact the rule was
scores.csv     a row a test case                      summary.json       Dice before and after, bytes, minutes
pictures/      an overlay a site, Dice by site
checkpoints/   all that the next round depends on, after the two newest rounds; gone when the run has ended
record.lost.jsonl  what a lost driver had recorded of a round that was then repeated
lease/         who drives the run (`cluster.lease`), where `storage.results` is unset
unsent/        what `storage.results` has not taken yet (`pipelines.commits`)
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import yaml

from fedsam_core.data.files import write_atomic, write_failed

SUMS = "sums"
RECORD = "record.jsonl"


def sum_file(entry: int) -> str:
    """Name of the file with the sum of that entry of the record."""
    return f"{SUMS}/{entry:06d}.bin"


class RunFolder:
    """A folder of results. Every file is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """Where a file of that name goes."""
        return self.path / name

    def write(self, name: str, data: bytes) -> Path:
        """A file of bytes. Raises DataError if the disk refuses."""
        path = self.file(name)
        write_atomic(path, data)
        return path

    def append(self, name: str, data: bytes) -> None:
        """Adds to a file what must not be lost. Raises DataError if the disk refuses."""
        path = self.file(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise write_failed(path, error) from error

    def write_json(self, name: str, value: Any) -> Path:
        """Indented JSON."""
        return self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def write_yaml(self, name: str, value: Any) -> Path:
        """YAML in the order of the keys."""
        return self.write(name, yaml.safe_dump(value, sort_keys=False).encode())

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A CSV file with a header; no rows, no file."""
        if not rows:
            return
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in rows for key in row))  # not every round has every metric
        writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write(name, text.getvalue().encode())

    def write_parquet(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A Parquet file; no rows, no file. None is null, and a column of nothing else is one of numbers."""
        if not rows:
            return
        names = dict.fromkeys(key for row in rows for key in row)
        columns = {column: pa.array([row.get(column) for row in rows]) for column in names}
        numbers = {column: data.cast(pa.float64()) for column, data in columns.items() if pa.types.is_null(data.type)}
        stream = io.BytesIO()
        pa.parquet.write_table(pa.table(columns | numbers), stream)
        self.write(name, stream.getvalue())
