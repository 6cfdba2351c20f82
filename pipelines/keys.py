"""`fedsam keys`: make a site's identity, and see whom a roster trusts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsam_core.secagg.keyfiles import (
    PASSPHRASE_VARIABLE,
    create_identity,
    format_roster,
    passphrase_from_environment,
    read_identity,
    read_roster,
)
from fedsam_core.secagg.keys import Roster
from pipelines import console
from pipelines.stage import guarded

FOLDER = Path("~/.fedsam/keys")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `new` or `show`, and exits with 0, or with 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="fedsam keys",
        description="The identities of a consortium. Each site makes its own key pair: SITE.key, which never leaves\n"
        "the site, and SITE.pub, one line of text. The coordinator joins the lines to the roster that\n"
        "every site pins; a message that is not signed by a key in it is refused.",
        epilog="example, from key to roster:\n"
        "  at each site:         fedsam keys new north        then send north.pub to the coordinator\n"
        "  at the coordinator:   cat *.pub > roster.txt       then send roster.txt to every site\n"
        "  everywhere:           fedsam keys show roster.txt  then compare the fingerprint by telephone\n\n"
        f"A passphrase comes from the environment variable {PASSPHRASE_VARIABLE}, never from the command line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    new = commands.add_parser(
        "new",
        help="make SITE.key and SITE.pub",
        description="Makes the identity of a site: SITE.key (secret, mode 0600) and SITE.pub (one line to send).\n"
        "Neither is ever overwritten.",
        epilog=f"If {PASSPHRASE_VARIABLE} is set, SITE.key is encrypted with it: choose a long, random one.\n\n"
        "examples:\n  fedsam keys new north\n"
        f"  read -rs {PASSPHRASE_VARIABLE} && export {PASSPHRASE_VARIABLE}   # typed unseen, not in the history\n"
        "  fedsam keys new north --folder /secure/keys",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument("site", metavar="SITE", help="the site's name in the cohort, such as north")
    new.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help=f"where to put them (default {FOLDER})")

    show = commands.add_parser(
        "show",
        help="print the sites, keys and fingerprint of a roster",
        description="Prints the sites and keys of a roster or of a SITE.pub, and the fingerprint over all of them.\n"
        "Of a private SITE.key it prints the public line only, which is what SITE.pub holds.",
        epilog="The fingerprint is equal where names and keys are: read it out over the telephone, and go on only if\n"
        "every site has the same.\n\n"
        "examples:\n  fedsam keys show roster.txt\n  fedsam keys show north.key > north.pub",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("file", type=Path, metavar="FILE", help="a roster, a SITE.pub or a SITE.key")

    options = parser.parse_args(arguments)
    if options.command == "new":
        sys.exit(guarded(lambda: _new(options.site, options.folder)))
    sys.exit(guarded(lambda: _show(options.file)))


def _new(site: str, folder: Path) -> None:
    passphrase = passphrase_from_environment()
    key_path, pub_path = create_identity(site, folder.expanduser(), passphrase)
    state = f"encrypted, open it with {PASSPHRASE_VARIABLE}" if passphrase else "not encrypted"
    public = read_roster(pub_path)
    # print, not the console: paths and keys stay whole and unstyled however wide the terminal is
    print(f"secret ({state}): {key_path}\npublic: {pub_path}\n")
    print(format_roster(public))
    print(_fingerprint(public))
    print(f"\nSend {pub_path.name} to the coordinator. Keep {key_path.name} at the site: nobody asks for it.")
    print("The coordinator joins the lines (cat *.pub > roster.txt) and sends roster.txt to every site. Then all run")
    print("fedsam keys show roster.txt and compare the fingerprint by telephone.")


def _show(path: Path) -> None:
    if path.suffix == ".key":
        identity = read_identity(path, passphrase_from_environment())
        print(format_roster(Roster({path.stem: identity.public})), end="")
        return
    roster = read_roster(path)
    rows = sorted((site, key.hex()) for site, key in roster.keys.items())
    console.out.print(console.table(console.plain(str(path)), ("site", "key"), rows))
    print(_fingerprint(roster))


def _fingerprint(roster: Roster) -> str:
    """The roster's hash for reading aloud: two lines of eight groups of four hex digits."""
    groups = [roster.hash[start : start + 4] for start in range(0, len(roster.hash), 4)]
    return f"fingerprint:\n  {' '.join(groups[:8])}\n  {' '.join(groups[8:])}"


if __name__ == "__main__":
    main()
