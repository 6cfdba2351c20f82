"""`fedsam certs`: certificates with which a Ray cluster's nodes know each other and encrypt."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.certificates import make_certificates, tls_variables
from pipelines.stage import guarded


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes them, and says what to set on each node."""
    parser = argparse.ArgumentParser(
        prog="fedsam certs",
        description="Makes an authority (ca.crt, ca.key) and for each node HOST.crt and HOST.key. Nothing is ever\n"
        "overwritten; a folder that has an authority makes certificates for further nodes with it.",
        epilog="example:\n"
        "  fedsam certs certs 10.0.0.1 10.0.0.2 10.0.0.3     then copy ca.crt, HOST.crt and HOST.key to each node,\n"
        "                                                    and set there what is printed, before `ray start`\n\n"
        "Keep ca.key off the nodes: whoever has it makes nodes. The dashboard stays plain HTTP: it listens on\n"
        "127.0.0.1 unless told otherwise, reach it by `ssh -L 8265:127.0.0.1:8265 HEAD`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to put them")
    parser.add_argument("hosts", nargs="+", metavar="HOST", help="a node's IP address, or its name if Ray uses that")
    parser.add_argument("--days", type=int, default=365, help="for which they hold (default 365)")
    options = parser.parse_args(arguments)
    sys.exit(guarded(lambda: _make(options.folder, options.hosts, options.days)))


def _make(folder: Path, hosts: Sequence[str], days: int) -> None:
    for host, name in zip(hosts, make_certificates(folder, hosts, days), strict=True):
        settings = {"RAY_AUTH_MODE": "token", **tls_variables(folder.absolute(), name)}
        print(f"# {host}, and `ray get-auth-token --generate` once, the same token on all nodes")
        print("export " + " ".join(f"{key}={shlex.quote(value)}" for key, value in settings.items()))


if __name__ == "__main__":
    main()
