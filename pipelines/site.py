"""`fedsam site`: at a hospital, dial in to an aggregator and take part in what this site agrees to."""

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path

from cluster.gateway.hospital import Hospital, HospitalConfig, in_this_process, on_own_cluster, read_hospital
from cluster.session import ray_session
from fedsam_core.secagg.keyfiles import passphrase_from_environment, read_identity, read_roster
from pipelines import console
from pipelines.config import describe
from pipelines.stage import guarded

EXAMPLE = """\
example, charite.yaml:
  site: charite
  aggregator: fedsam.example.org:8443
  certificate: /etc/fedsam/charite.crt       # signed by the consortium, see `fedsam gateway --help`
  key: /etc/fedsam/charite.tls.key
  authority: /etc/fedsam/authority.crt
  roster: /etc/fedsam/roster.txt             # compared by telephone, see `fedsam keys --help`
  key_dir: /etc/fedsam/keys                  # has charite.key
  scans: /data/kidneys
  policy: {min_contributors: 4, max_rounds: 50}
  accepts: any                               # within the policy; or hashes of settings, from asked/
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `serve` or `check`, and exits with 0, or with 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="fedsam site",
        description="A hospital's own process. It dials out, so no port is opened; it goes by its own file, so an\n"
        "aggregator decides neither where scans and keys lie nor what is disclosed. What it is asked to do\n"
        "is written to work_dir/asked/HASH.yaml before it does anything.",
        epilog=f"{EXAMPLE}\nkeys of the file (defaults in brackets):\n{_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, meaning in (
        ("serve", "dial in, take part in runs, wait for the next; ends with Ctrl-C or SIGTERM"),
        ("check", "read the file and all that it names, and dial nobody"),
    ):
        command = commands.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        command.add_argument("file", type=Path, metavar="FILE", help="the site's own file, YAML: fedsam site --help")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    sys.exit(guarded(partial(_serve if options.command == "serve" else _check, options.file)))


def _serve(file: Path) -> None:
    own = _checked(file)
    with nullcontext() if own.ray is None else ray_session():
        start = in_this_process if own.ray is None else partial(on_own_cluster, own.ray)
        hospital = Hospital(own, start, _note)
        _note(f"site {own.site} dials {own.aggregator}")
        asyncio.run(hospital.serve())


def _check(file: Path) -> None:
    own = _checked(file)
    Hospital(own, in_this_process, _note)  # reads certificate, key and authority
    print(f"site {own.site} can dial {own.aggregator}; roster {read_roster(own.roster).hash}")


def _checked(file: Path) -> HospitalConfig:
    """What would only fail in a run is found when the process starts."""
    own = read_hospital(file)
    read_roster(own.roster).key(own.site)
    read_identity(own.key_dir / f"{own.site}.key", passphrase_from_environment())
    return own


def _note(text: str) -> None:
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", flush=True)


def _keys() -> str:
    rows = describe(HospitalConfig)
    width = max(len(key) for key, _, _ in rows) + 2
    return "\n".join(f"  {key:<{width}}{console.plain(meaning)} [{default}]" for key, default, meaning in rows)


if __name__ == "__main__":
    main()
