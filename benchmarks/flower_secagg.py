"""Flower's SecAgg+ and our secure sum on the same payload, side by side, with the ratios of time and of bytes.

    python benchmarks/flower_secagg.py --sites 10 --values 1000000 --lost 1 --json

Both get float32 vectors of the same numpy seed (normal, deviation 0.01), the same number of sites, the same threshold
and the same lost sites: those that share keys but never send their vector. Columns:

  ours     `secagg.measure`: clip 1.0
  flower   clipping_range 1.0 and the finest quantization_range whose sum fits Flower's default modulus_range 2**32,
           which is as near to our accuracy as Flower comes with that modulus
  default  Flower's default clipping_range 8.0 and quantization_range 2**22, run once, for its accuracy
  ratio    flower / ours

clients_s, whole_s, client_s, server_s: seconds of all clients, of the whole protocol in turn in one process, of one
client (median), of the server; clients_s is sites * client_s on both sides, so a lost site counts as a whole one.
Medians over --repeats, which alternate between the systems so that a busy machine slows both, each after a run that
does not count. What is timed of Flower is said in `flower_side.py`. `survives_loss_at`: from which of its stages on
Flower can miss sites (--lost, at least 1), tried with a short vector.

Flower lives in an environment of its own (made once, then reused) because its dependencies are not ours. It is
installed without them, and then with those that its SecAgg+ imports, in the ranges Flower gives: flwr 1.42.0 also asks
for a web server, a database, and a certifi newer than some package indexes have; the secure sum uses none of them.
"""

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from secagg import measure

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg import default_threshold

FLOWER = "1.42.0"
NEEDED = (
    "numpy>=1.26.0,<3.0.0",
    "protobuf>=5.28.0,<7.0.0",
    "grpcio>=1.70.0,<2.0.0",
    "cryptography>=50.0.0,<51.0.0",
    "pycryptodome>=3.18.0,<4.0.0",
    "iterators>=0.0.2,<0.0.3",
    "httpx>=0.28.1,<1.0.0",
    "typer>=0.13.0,<0.21.0",
    "click>=8.0.0,<9.0.0",
    "rich>=14.0.0,<15.0.0",
)
READY = (
    "import flwr.client.mod, flwr.server.workflow\n"
    "from importlib.metadata import version\n"
    f"assert version('flwr') == '{FLOWER}'"
)
HERE = Path(__file__).resolve().parent
STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")
MEASURED = ("client_s", "server_s", "bytes_up", "bytes_per_value", "max_error")
COMPARED = ("clients_s", "whole_s", *MEASURED)
CLIP = 1.0
MODULUS = 2**32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=6)
    parser.add_argument("--values", type=int, default=1_850_000)
    parser.add_argument("--lost", type=int, default=0, help="sites that share keys but never send their vector")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--environment", type=Path, default=HERE.parent / ".venv" / "flower-env", help="Flower's venv")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.sites < 3 or not 0 <= options.lost <= options.sites - 2 or options.repeats < 1:
        parser.error("take at least 3 sites, of which at least 2 are not lost, and at least 1 repeat")
    result = compare(flower_python(options.environment), options.sites, options.values, options.lost, options.repeats)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


def compare(python: Path, sites: int, values: int, lost: int, repeats: int) -> dict[str, object]:
    """Ours and Flower's in turn, `repeats` times, then Flower's defaults and its losses once."""
    threshold = min(default_threshold(sites), sites - lost)  # as secagg.measure takes it
    run = {"sites": sites, "values": values, "lost": lost, "threshold": threshold}
    matched = run | {"parameters": {"clipping_range": CLIP, "quantization_range": finest_range(sites)}}
    our_run(sites, values, lost)  # the first run in a process is slower; Flower's processes drop theirs too
    ours, flower = [], []
    for _ in range(repeats):
        ours.append(our_run(sites, values, lost))
        flower.append(flower_side(python, [matched, matched])[1])
    ours, flower = figures(ours, sites), figures(flower, sites)
    short = run | {"values": 1000, "lost": max(lost, 1), "threshold": min(threshold, sites - max(lost, 1))}
    _, default, *losses = flower_side(python, [matched, run] + [short | {"lost_at": stage} for stage in STAGES])
    comparable = flower["survived"] and ours["survived"]
    return {
        "flwr": FLOWER,
        **run,
        "repeats": repeats,
        "ours": ours,
        "flower": flower,
        "default": figures([default], sites),
        "ratio": {key: flower[key] / ours[key] for key in COMPARED} if comparable else {},
        "survives_loss_at": dict(zip(STAGES, [outcome(loss) for loss in losses], strict=True)),
    }


def finest_range(sites: int) -> int:
    """The largest power of two of which `sites` fit below the modulus: each site's value, and its weight, can reach
    it, and a sum at the modulus would wrap to 0."""
    return 2 ** (((MODULUS - 1) // sites).bit_length() - 1)


def our_run(sites: int, values: int, lost: int) -> dict[str, object]:
    """One `secagg.measure`; where it refuses such a loss, that is a result too."""
    try:
        run = measure(sites, values, lost)
    except SecureSumError as error:
        return {"survived": False, "errors": [str(error)]}
    return {
        "client_s": run["client_s"],
        "server_s": run["server_s"],
        "bytes_up": run["bytes_per_value"] * values,
        "bytes_per_value": run["bytes_per_value"],
        "max_error": run["max_error"],
        "bound": run["bound"],
        "survived": run["max_error"] <= run["bound"],
        "errors": [],
    }


def figures(runs: list[dict[str, object]], sites: int) -> dict[str, object]:
    """The medians of what is measured, the rest as in the first run; survived only where every run did."""
    medians = {key: median(run[key] for run in runs) for key in MEASURED if all(key in run for run in runs)}
    return totals(medians, sites) | runs[0] | medians | {"survived": all(run["survived"] for run in runs)}


def totals(run: dict[str, float], sites: int) -> dict[str, float]:
    """The times the systems are compared by, none of a run that was refused; every site counts as the median one."""
    if "client_s" not in run:
        return {}
    clients_s = sites * run["client_s"]
    return {"clients_s": clients_s, "whole_s": clients_s + run["server_s"]}


def outcome(loss: dict[str, object]) -> str:
    """Yes, or why not: the first thing that Flower said."""
    if loss["survived"]:
        return "yes"
    return "no: " + (loss["errors"][0] if loss["errors"] else "the sum is wrong")


def flower_side(python: Path, runs: list[dict[str, object]]) -> list[dict[str, object]]:
    """What `flower_side.py` measures of these runs."""
    command = [python, "-I", HERE / "flower_side.py", json.dumps(runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def flower_python(
    directory: Path,
    alone: Sequence[str] = (f"flwr=={FLOWER}",),
    needed: Sequence[str] = NEEDED,
    ready: str = READY,
    borrowed: Path | None = None,
) -> Path:
    """The interpreter of Flower's environment, which is made if it is not there. Exits with 2 where it cannot be.

    Args:
        alone: packages to install without their dependencies.
        needed: packages to install with them.
        ready: a program that runs through where the environment is whole.
        borrowed: a folder of packages that is searched after the environment's own.
    """
    python = directory / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", ready], capture_output=True).returncode == 0:
        return python
    print(f"making an environment with {' and '.join(alone)} in {directory}", file=sys.stderr)
    try:
        venv.create(directory, with_pip=True, symlinks=True)
        for what in (["--no-deps", *alone], list(needed)):
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
            subprocess.run(pip, check=True, capture_output=True, text=True)
        if borrowed is not None:
            (own,) = (directory / "lib").glob("python3*/site-packages")
            (own / "zz-fedsam.pth").write_text(f"{borrowed}\n")
        subprocess.run([python, "-c", ready], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(f"no environment for Flower in {directory}: {said[-1]}", file=sys.stderr)
        raise SystemExit(2) from None
    return python


def show(result: dict[str, object]) -> None:
    """A row for each figure, a column for each system."""
    print("  ".join(f"{key} {result[key]}" for key in ("flwr", "sites", "values", "lost", "threshold", "repeats")))
    columns = ("ours", "flower", "default", "ratio")
    print(f"{'':>20}" + "".join(f"{column:>16}" for column in columns))
    for key in result["flower"]:
        cells = (result[column].get(key, "") for column in columns)
        print(f"{key:>20}" + "".join(f"{cell(value):>16}" for value in cells))
    for stage, text in result["survives_loss_at"].items():
        print(f"flower survives a loss at {stage}: {text}")


def cell(value: object) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "; ".join(value) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
