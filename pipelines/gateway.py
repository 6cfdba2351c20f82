"""`fedsam gateway`: certificates for hospitals that dial in, and for the aggregator that they dial."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.gateway.certificates import (
    create_authority,
    create_request,
    fingerprint,
    sign_aggregator,
    sign_site,
)
from pipelines.stage import guarded

FOLDER = Path("~/.fedsam/gateway")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `authority`, `request` or `sign`, and exits with 0, or with 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="fedsam gateway",
        description="Certificates of a consortium. They say who may dial in and who is dialled; what is summed is\n"
        "protected by the sites' own keys (`fedsam keys`), which no authority can replace.",
        epilog="example, once for a consortium:\n"
        "  who signs:           fedsam gateway authority             then send authority.crt to everybody\n"
        "  at each site:        fedsam gateway request charite       then send charite.csr, read out its fingerprint\n"
        "  who signs:           fedsam gateway sign charite.csr --site charite        then send charite.crt back\n"
        "  at the aggregator:   fedsam gateway request aggregator\n"
        "  who signs:           fedsam gateway sign aggregator.csr --aggregator fedsam.example.org\n\n"
        "and then, for a run:\n"
        "  at each site:        fedsam site serve charite.yaml\n"
        "  at the aggregator:   fedsam federate --config kidneys engine.kind=gateway \\\n"
        "                         engine.gateway.certificate=aggregator.crt engine.gateway.key=aggregator.tls.key \\\n"
        "                         engine.gateway.authority=authority.crt federation.roster=roster.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    authority = commands.add_parser(
        "authority",
        help="make authority.key, which signs, and authority.crt, which everybody has",
        description="Makes the consortium's authority. Keep authority.key off the machines that run anything.",
    )
    request = commands.add_parser(
        "request",
        help="make NAME.tls.key, which stays, and NAME.csr, which goes to whoever signs",
        description="Makes a key and a request for its certificate, where the certificate will be used.",
    )
    request.add_argument("name", metavar="NAME", help="the site's name as in the roster; or any, for the aggregator")
    for command in (authority, request):
        command.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"default {FOLDER}")

    sign = commands.add_parser(
        "sign",
        help="sign a request: NAME.crt, beside it",
        description="Signs a request after you have compared its fingerprint with whoever sent it, by telephone.",
    )
    sign.add_argument("request", type=Path, metavar="NAME.csr")
    whom = sign.add_mutually_exclusive_group(required=True)
    whom.add_argument("--site", metavar="NAME", help="the certificate of this site, for dialling in")
    whom.add_argument("--aggregator", nargs="+", metavar="HOST", help="of the aggregator, by these names")
    sign.add_argument("--authority", type=Path, default=FOLDER, metavar="DIR", help=f"default {FOLDER}")
    sign.add_argument("--days", type=_days, default=365, help="how long it is valid (default 365)")

    options = parser.parse_args(arguments)
    if options.command == "authority":
        sys.exit(guarded(lambda: _authority(options.folder.expanduser())))
    if options.command == "request":
        sys.exit(guarded(lambda: _request(options.name, options.folder.expanduser())))
    sys.exit(guarded(lambda: _sign(options)))


def _authority(folder: Path) -> None:
    key, certificate = create_authority(folder)
    print(f"secret: {key}\npublic: {certificate}, for everybody\nfingerprint: {fingerprint(certificate)}")


def _request(name: str, folder: Path) -> None:
    key, request = create_request(name, folder)
    print(f"secret: {key}, which stays here\nrequest: {request}, to be signed\nfingerprint: {fingerprint(request)}")


def _sign(options: argparse.Namespace) -> None:
    print(f"fingerprint: {fingerprint(options.request)}")
    authority = options.authority.expanduser()
    if options.site:
        path = sign_site(options.request, options.site, authority, options.days)
    else:
        path = sign_aggregator(options.request, options.aggregator, authority, options.days)
    print(f"certificate: {path}, valid for {options.days} days")


def _days(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError("a number of days, 1 or more")
    return int(text)


if __name__ == "__main__":
    main()
