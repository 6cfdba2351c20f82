"""What a federation leaves behind: one folder with all that is needed to use, compare and repeat it.

    config.yaml       the resolved configuration          manifest.json     parameters trained, sent, kept local
    adapter/          the result (PEFT layout)            state.safetensors the global shared state
    rounds.csv        a row a round                       ledger.csv        bytes by site, direction, round, purpose
    scores.csv        a row a test case                   summary.json      Dice before and after, bytes, minutes, hashes
    pictures/         an overlay a site, Dice by site
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedsam_core.data.cohort import Cohort
from fedsam_core.data.files import write_atomic
from fedsam_core.evaluation.metrics import CaseScore, summarize
from fedsam_core.evaluation.overlays import dice_bars
from fedsam_core.federation.rounds import Scores
from fedsam_core.selection import ParameterManifest
from pipelines.config import Config


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a header, whole or not at all; nothing for no rows."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())
