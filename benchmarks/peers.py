"""One federation here and in Flower's Ray simulation: same model, scans, steps and seeds, side by side.

    python benchmarks/peers.py                     # the demo's three sites and model, masked and plain: some minutes
    python benchmarks/peers.py --rounds 6 --json FILE key=value ...

Both train with `fedsam_core`'s learner from the same first state, site by site with the same draws, so plain FedAvg
must give the same global state but for the order of a float sum, and what AdamW makes of that where a gradient is
almost zero: the largest difference is printed. Flower's masked sums are its SecAgg+, with its own defaults. Each side
is a process with a Ray of its own and room for every site.

wall: median seconds of a round after the first; ours has in it what Flower does not do: record, checkpoint, tables and
MLflow. training: of the slowest site, the same work on both sides (timed on ours). memory: peak of the proportional set
size of all processes of a side. bytes: of a round's messages as they are serialized, headers and keys included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import psutil
from flower_secagg import FLOWER, NEEDED, flower_python

from cluster.session import ray_session
from pipelines.config import load_config
from pipelines.federate import site_specs
from pipelines.prepare import prepare_sites

HERE = Path(__file__).resolve().parent
RAY = "2.55.1"  # what flwr 1.42.0 asks for
MORE = ("grpcio-health-checking>=1.70.0,<2.0.0",)
READY = f"import flwr.simulation, ray, torch\nassert ray.__version__ == '{RAY}' and flwr.__version__ == '{FLOWER}'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--environment", type=Path, default=HERE.parent / ".venv" / "flower-sim", help="Flower's venv")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # our side, in a process of its own
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run, on top of the demo's")
    options = parser.parse_intermixed_args()
    settings = [f"federation.rounds={options.rounds}", "federation.validate_every=0", *options.overrides]
    if options.ours:
        our_rounds(options.ours, settings)
        return
    python = flower_python(
        options.environment,
        alone=(f"flwr=={FLOWER}", f"ray=={RAY}"),
        needed=(*NEEDED, *MORE),
        ready=READY,
        borrowed=Path(np.__file__).parents[1],  # torch, MONAI, PEFT and SAM of this one
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings.insert(0, f"work_dir={folder / 'work'}")
        config = load_config("demo", [*settings, "engine.kind=in-process"])
        about = prepare_sites(config)
        specs = site_specs(config, about.sites, "peers", config.science_hash(about.hash))
        rows: dict[str, dict[str, Any]] = {}
        for masked in (False, True):
            kind = "masked" if masked else "plain"
            ours = [*settings, f"federation.secure_sum={kind}"]
            command = [sys.executable, __file__, "--rounds", str(options.rounds), "--ours", str(folder / kind), *ours]
            rows[f"fedsam, {kind}"] = side(command, folder / kind)
            there = folder / f"flower-{kind}"
            asked = {
                "specs": [spec.model_dump(mode="json") for spec in specs],
                "rounds": options.rounds,
                "masked": masked,
                "folder": str(there),
            }
            command = [str(python), str(HERE / "flower_sim.py"), json.dumps(asked)]
            rows[f"Flower, {'SecAgg+' if masked else kind}"] = side(command, there)
        states = [np.load(folder / name / "state.npz") for name in ("plain", "flower-plain")]
        difference = max(float(np.abs(states[0][key] - states[1][key]).max()) for key in states[0].files)
    training = rows["fedsam, plain"]["training"]
    print(table(rows, training, difference))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "difference": difference}, indent=1))


def our_rounds(folder: Path, settings: list[str]) -> None:
    """Our side: writes FOLDER/result.json and FOLDER/state.npz, as Flower's does."""
    from functools import partial

    from round_overhead import Clock, TimedEngine, TimedSite
    from safetensors.numpy import load_file

    from cluster.placement import SiteNeeds, cluster_nodes, plan
    from cluster.site import create_sites
    from pipelines.federate import run_federation

    config = load_config("demo", settings)
    clock = Clock(side_by_side=False)
    (folder / "notes").mkdir(parents=True)
    with ray_session():
        about = prepare_sites(
            config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "in-process"})})
        )

        def engine(specs: Any) -> Any:
            placed = plan([spec.site for spec in specs], cluster_nodes(), SiteNeeds(cpus=0, pin="never"))
            return TimedEngine(create_sites(specs, placed, partial(TimedSite, notes=folder / "notes")), clock)

        outcome = run_federation(config, about, engine, clock.hear)
    np.savez(folder / "state.npz", **load_file(outcome.folder / "state.safetensors"))
    trained = [float(note.read_text()) for note in (folder / "notes").iterdir() if not note.name.startswith("1-")]
    result = {
        "seconds": [clock.rounds[number][0] for number in range(2, config.federation.rounds + 1)],
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "training": median(trained),
    }
    (folder / "result.json").write_text(json.dumps(result))


def side(command: list[str], folder: Path) -> dict[str, Any]:
    """Runs a side; its figures and the peak of its memory, MiB."""
    peak, over = 0.0, threading.Event()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.5):
            peak = max(peak, memory_of(process.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    _, said = process.communicate()
    over.set()
    watching.join()
    if process.returncode or not (folder / "result.json").exists():
        raise SystemExit(f"{command[1]} failed:\n{said[-3000:]}")
    return {**json.loads((folder / "result.json").read_text()), "memory_mib": peak}


def memory_of(pid: int) -> float:
    """Proportional set size of a process and all below it, MiB."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def table(rows: Mapping[str, Mapping[str, Any]], training: float, difference: float) -> str:
    """Markdown."""
    lines = [
        f"median training of a site {training:.2f} s; states of the plain runs differ by {difference:.2g} at most",
        "",
        "| | wall, s a round | beyond training | memory, MiB | up, MB a round | down, MB a round |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        wall, up, down = median(row["seconds"]), row["bytes_up"] / 1e6, row["bytes_down"] / 1e6
        beyond = f"{wall - training:+.2f} s"
        lines.append(f"| {name} | {wall:.2f} | {beyond} | {row['memory_mib']:.0f} | {up:.2f} | {down:.2f} |")
    for kind, (ours, theirs) in {"plain": list(rows)[:2], "masked": list(rows)[2:]}.items():
        one, other = rows[ours], rows[theirs]
        ratio = median(other["seconds"]) / median(one["seconds"])
        memory = other["memory_mib"] / one["memory_mib"]
        up, down = (other[f"bytes_{way}"] / one[f"bytes_{way}"] for way in ("up", "down"))
        lines.append(f"| Flower / fedsam, {kind} | {ratio:.2f} | | {memory:.2f} | {up:.2f} | {down:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
