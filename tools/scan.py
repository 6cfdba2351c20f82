"""`make lint`'s look for secrets in the sources, and for known weaknesses in the pinned packages.

    python tools/scan.py secrets            # fails on what detect-secrets finds and .secrets.baseline does not list
    python tools/scan.py secrets --accept   # lists all that is found: look at `git diff .secrets.baseline` first
    python tools/scan.py packages           # fails on a known weakness; says so, and passes, without its database

Golden hashes of the tests are no secrets: strings of hex digits are looked at in the product alone.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / ".secrets.baseline"
PROGRAMS = Path(sys.executable).parent
AUDIT_SECONDS = 90.0

Found = set[tuple[str, str, str]]  # file, kind, hash of the secret: lines move, and a move is no news


def main() -> int:
    """The exit status."""
    match sys.argv[1:]:
        case ["secrets"]:
            return secrets(accept=False)
        case ["secrets", "--accept"]:
            return secrets(accept=True)
        case ["packages"]:
            return packages()
    print(__doc__, file=sys.stderr)
    return 2


def secrets(accept: bool) -> int:
    """Compares what is found with the baseline, by content."""
    git = ["git", "ls-files"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()  # noqa: S603
    files = [name for name in listed if name and name not in (BASELINE.name, "constraints.txt")]
    command = [str(PROGRAMS / "detect-secrets"), "scan", *files]
    scan = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)  # noqa: S603
    for name, results in scan["results"].items():
        if name.startswith(("tests/", "benchmarks/")):
            results[:] = [one for one in results if one["type"] != "Hex High Entropy String"]
    scan["results"] = {name: results for name, results in scan["results"].items() if results}
    if accept:
        del scan["generated_at"]
        BASELINE.write_text(json.dumps(scan, indent=1) + "\n")
        print(f"{BASELINE.name} lists {len(_found(scan))} places")
        return 0
    known = _found(json.loads(BASELINE.read_text()))
    lines = {
        f"{name}:{one['line_number']}: {one['type']}"
        for name, results in scan["results"].items()
        for one in results
        if (name, one["type"], one["hashed_secret"]) not in known
    }
    for line in sorted(lines):
        print(f"{line}: take it out, or accept it (python tools/scan.py secrets --accept)")
    print(f"secrets: {len(files)} files, {len(known)} accepted places, {len(lines)} new")
    return int(bool(lines))


def _found(scan: dict[str, dict[str, list[dict[str, str]]]]) -> Found:
    return {(name, one["type"], one["hashed_secret"]) for name, found in scan["results"].items() for one in found}


def packages() -> int:
    """Asks pip-audit about every pinned package."""
    command = [str(PROGRAMS / "pip-audit"), "-r", "constraints.txt", "--no-deps", "--disable-pip", "-f", "json"]
    command += ["--progress-spinner", "off", "--timeout", "5"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=AUDIT_SECONDS, check=False)  # noqa: S603
        pinned = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        pinned = []
    audited = [one for one in pinned if "vulns" in one]
    if not audited:
        print("packages: NOT audited, as the database of known weaknesses cannot be reached from here")
        return 0
    weak = [(one["name"], one["version"], weakness) for one in audited for weakness in one["vulns"]]
    for name, version, weakness in weak:
        fixed = ", ".join(weakness["fix_versions"]) or "no version yet"
        print(f"{name} {version}: {weakness['id']}, mended in {fixed}")
    skipped = len(pinned) - len(audited)
    print(f"packages: {len(audited)} audited, {skipped} unknown to the database, {len(weak)} known weaknesses")
    return int(bool(weak))


if __name__ == "__main__":
    sys.exit(main())
