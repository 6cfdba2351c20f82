"""The hippocampus federation over the gateway: three hospitals' own processes, and every byte between them counted.

    FEDSAM_REAL_DATA=DATA python benchmarks/gateway.py [--rounds 3] [--ray]

DATA holds Task04_Hippocampus with its sites.csv. Each hospital is a process with its own scans, keys and file; with
--ray its site is an actor on a Ray cluster of that hospital's own, so that there are three clusters. Between them and
the aggregator stands a relay that counts what passes: TLS, WebSocket, heads and all. The same federation then runs in
one process. Prints JSON: global states equal or not, Dice, bytes of the ledger and on the wire, and their difference.
"""

import argparse
import asyncio
import csv
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.consortium import Consortium, free_port

from fedsam_core.secagg.record import read_chain
from pipelines.cli import main as fedsam

SITES = ("site-a", "site-b", "site-c")


class Relay:
    """Passes bytes on between sites and aggregator, and counts them by direction."""

    def __init__(self, to: int) -> None:
        self.port, self.bytes = free_port(), {"up": 0, "down": 0}
        self._to = to
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(asyncio.start_server(self._pass, "127.0.0.1", self.port), self._loop).result()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._count(reader, there[1], "up"), self._count(there[0], writer, "down"))

    async def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.bytes[direction] += len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def own_folders(data: Path, folder: Path) -> dict[str, Path]:
    """The scans of each site in a folder of its own, with its own splits.csv."""
    rows = list(csv.DictReader((data / "sites.csv").open()))
    for site in SITES:
        for part in ("imagesTr", "labelsTr"):
            (folder / site / part).mkdir(parents=True)
            for row in rows:
                if row["site"] == site:
                    (folder / site / part / f"{row['case']}.nii.gz").symlink_to(data / part / f"{row['case']}.nii.gz")
        described = json.loads((data / "dataset.json").read_text())
        (folder / site / "dataset.json").write_text(json.dumps(described))
        lines = [f"{row['case']},{row['split']}" for row in rows if row["site"] == site]
        (folder / site / "splits.csv").write_text("\n".join(["case,split", *lines]) + "\n")
    return {site: folder / site for site in SITES}


def federate(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """Runs `fedsam federate` here; the run's folder."""
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump({**settings, "work_dir": str(folder / kind)}))
    sys.argv = ["fedsam", "federate", "--config", str(file)]
    try:
        fedsam()
    except SystemExit as ended:
        if ended.code:
            raise
    (run,) = (folder / kind / "runs").iterdir()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of a site in a round")
    parser.add_argument("--ray", action="store_true", help="each site on a Ray cluster of its hospital's own")
    options = parser.parse_args()
    data = Path(os.environ["FEDSAM_REAL_DATA"]) / "Task04_Hippocampus"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scans = own_folders(data, folder / "scans")
        consortium = Consortium(folder / "consortium", SITES)
        relay = Relay(consortium.port)
        (folder / "keys").mkdir()
        for site in SITES:
            key = folder / "keys" / f"{site}.key"
            key.write_bytes((consortium.folder / site / "keys" / f"{site}.key").read_bytes())
            key.chmod(0o600)
        settings: dict[str, Any] = {
            "name": "hippocampus",
            "cohort": {"name": "hippocampus", "sites": {site: str(path) for site, path in scans.items()}},
            "model": {"backbone": "vit_t", "image_size": 112},
            "rank": 8,
            "slices": {"context_mm": 1.0, "augment": False},
            "learning": {"local_steps": options.steps, "learning_rate": 6e-3},
            "federation": {
                "rounds": options.rounds,
                "roster": str(consortium.roster),
                "key_dir": str(folder / "keys"),
                "site_dir": str(folder / "own"),
            },
        }
        try:
            for site in SITES:
                more: dict[str, Any] = {"ray": {}} if options.ray else {}
                consortium.serve(site, scans=str(scans[site]), aggregator=f"127.0.0.1:{relay.port}", **more)
            begun = perf_counter()
            across = federate(folder, "gateway", {**settings, "engine": {"kind": "gateway", **consortium.engine}})
            seconds = perf_counter() - begun
        finally:
            consortium.end()
            for site in SITES:
                print(f"== {site}\n{consortium.log(site)}", file=sys.stderr)
        inside = federate(folder, "in-process", {**settings, "engine": {"kind": "in-process"}})
        found = {kind: told(run) for kind, run in (("gateway", across), ("in-process", inside))}
    ledger = found["gateway"]["bytes"]
    result = {
        "sites": "three Ray clusters" if options.ray else "three processes",
        "states_equal": found["gateway"]["states"] == found["in-process"]["states"],
        "states": len(found["gateway"]["states"]),
        "dice": {kind: one["dice"] for kind, one in found.items()},
        "seconds": round(seconds),
        "ledger_bytes": ledger,
        "wire_bytes": relay.bytes,
        "overhead_percent": {way: round(100 * (relay.bytes[way] / ledger[way] - 1), 3) for way in ledger},
    }
    print(json.dumps(result, indent=1))


def told(run: Path) -> dict[str, Any]:
    """Hashes of the global states, test Dice, and the ledger's bytes of a run."""
    entries, _ = read_chain((run / "record.jsonl").read_bytes().splitlines())
    rows = list(csv.DictReader((run / "ledger.csv").open()))
    return {
        "states": [entry["state_hash"] for entry in entries if entry["kind"] == "state"],
        "dice": json.loads((run / "summary.json").read_text())["after"]["dice"],
        "bytes": {way: sum(int(row["bytes"]) for row in rows if row["direction"] == way) for way in ("up", "down")},
    }


if __name__ == "__main__":
    main()
