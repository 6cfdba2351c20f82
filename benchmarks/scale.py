"""How time and memory grow with sites, with values that are shared, and with slices of a scan: rows, and the exponent.

    python benchmarks/scale.py                    # all three, some minutes
    python benchmarks/scale.py sites --json F     # one of them

Sites and values: the rounds of `round_overhead.py` (SAM ViT-B, stand-ins that do not train, one process, each stage
counted as the slowest site's): what a consortium waits for, and the driver's own time. Sites: 6 to 100 with
`partial-decoder` (0.48 million values). Values: 0.48 to 31.7 million, the paper's selections, with 6 sites. Slices: a
whole scan through a small SAM (`segment_scan`), 50 to 800 slices of 64 x 64.

An exponent is the slope of a line through the logarithms: 1 is proportional, 0 is constant. Each row is a process of
its own, whose peak of resident memory is what the system counted: of all sites and the driver together, some 600 MiB of
libraries included. Keys and their shares are exchanged between all pairs of sites, so that what the driver relays grows
with the square of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

SITES = (6, 12, 25, 50, 100)
SELECTIONS = ("partial-decoder", "lora", "flap", "decoder", "lora-decoder", "attention")
SLICES = (50, 100, 200, 400, 800)
KEYS = ("update/advertise", "update/share")
OPENING = ("update/confirm", "update/unmask")
HERE = Path(__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="sites, values, slices; nothing: all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--slices", type=int, help=argparse.SUPPRESS)  # one row of "slices", in a process of its own
    options = parser.parse_args()
    if options.slices:
        print(json.dumps(one_scan(options.slices)))
        return
    found = {name: GROWTH[name]() for name in options.what or GROWTH}
    for name, rows in found.items():
        print(table(name, rows), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def sites() -> list[dict[str, float]]:
    """A row a number of sites."""
    return [{"sites": count, **round_of(count, "partial-decoder")} for count in SITES]


def values() -> list[dict[str, float]]:
    """A row a selection."""
    rows = [round_of(6, selection) for selection in SELECTIONS]
    return sorted(({"values": row.pop("values"), **row} for row in rows), key=lambda row: row["values"])


def round_of(count: int, selection: str) -> dict[str, float]:
    """Seconds of a round by what they went into, and the peak of memory, MiB."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        arguments = ["--engine", "in-process", "--sites", str(count), "--training", "0", "--json", str(file)]
        script = HERE.with_name("round_overhead.py")
        peak = peak_of([sys.executable, str(script), *arguments, f"selection={selection}"])
        (row,) = json.loads(file.read_text())
    phases = row["by_phase"]
    return {
        "values": row["values"],
        "keys_s": sum(phases[name] for name in KEYS),
        "contribution_s": phases["update/fit"],
        "opening_s": sum(phases[name] for name in OPENING),
        "driver_s": phases["driver"],
        "round_s": row["overhead_s"],
        "peak_mib": peak,
    }


def slices() -> list[dict[str, float]]:
    """A row a length of a scan."""
    rows = []
    for count in SLICES:
        with tempfile.TemporaryFile("w+") as out:
            peak = peak_of([sys.executable, str(HERE), "--slices", str(count)], out)
            out.seek(0)
            rows.append({"slices": count, **json.loads(out.read()), "peak_mib": peak})
    return rows


def one_scan(count: int) -> dict[str, float]:
    """Seconds for a scan of so many slices."""
    from train import random_case

    from fedsam_core.data.slices import SliceConfig
    from fedsam_core.evaluation.inference import segment_scan
    from fedsam_core.sam.backbones import ModelConfig, build_segmenter
    from fedsam_core.selection import preset

    segmenter = build_segmenter(ModelConfig(backbone="vit_t", image_size=64), 2, preset("flap", 4), 0)
    case = random_case(count, 64)
    begun, cpu = perf_counter(), process_time()
    segment_scan(segmenter, case, SliceConfig(), 64, 16)
    return {"seconds": perf_counter() - begun, "cpu_s": process_time() - cpu}


def peak_of(command: Sequence[str], out: Any = subprocess.DEVNULL) -> float:
    """Runs it; its peak of resident memory in MiB."""
    process = subprocess.Popen(command, stdout=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-6)), 1)[0])


def table(name: str, rows: Sequence[Mapping[str, float]]) -> str:
    """Markdown; the last line has the exponents, over the larger half of the rows, where constants weigh less."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(f"{row[key]:,.4g}" for key in keys) + " |" for row in rows]
    large = rows[len(rows) // 2 :]
    slopes = [exponent([row[name] for row in large], [row[key] for row in large]) for key in keys[1:]]
    return "\n".join([*lines, "| exponent | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |"]) + "\n"


GROWTH = {"sites": sites, "values": values, "slices": slices}

if __name__ == "__main__":
    main()
