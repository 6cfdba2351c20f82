"""`fedsam data check PATH`: whether a folder of scans can be used, what is wrong with it, and what to do."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from fedsam_core.data.check import Range, Report, SiteSummary, check
from fedsam_core.data.sources import Problem
from fedsam_core.data.sources.layouts import LAYOUTS
from fedsam_core.data.sources.tables import some
from pipelines import console
from pipelines.stage import guarded

UNUSABLE = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status: 0 usable; 1 not, or with --strict a case is left out; 2 the folder cannot be read as a cohort."""
    parser = argparse.ArgumentParser(prog="fedsam data", description="Looks at scans before anything is computed.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    one = commands.add_parser(
        "check",
        help="list and open every case of a folder, and say what is wrong",
        description="Finds out the layout of a folder (KiTS19, IXI Tiny, prostate, Decathlon, nnU-Net, one a site),\n"
        "opens every scan and mask, and lists sites, cases, spacings, orientations, label values and sizes,\n"
        "with everything that is wrong: files that cannot be read, masks that do not fit, scans that are there\n"
        "twice or in training and testing at once, rows and files without their counterpart. Writes nothing.",
        epilog="Exit status: 0 usable; 1 not, or with --strict a case is left out; 2 no cohort can be read there.\n\n"
        "examples:\n  fedsam data check /data/kits19\n  fedsam data check /data/mine --classes kidney tumour --json\n"
        "  fedsam data check /data/our-scans --site north",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("path", type=Path, metavar="PATH", help="the cohort's folder")
    one.add_argument("--source", choices=list(LAYOUTS), help="layout; default: found out")
    one.add_argument("--sites-csv", type=Path, metavar="FILE", help="table with the columns case,site,split")
    one.add_argument("--site", metavar="NAME", help="PATH is this one site's own folder; no other is looked at")
    one.add_argument("--classes", nargs="+", metavar="NAME", help="names of label values 1, 2, ...")
    one.add_argument("--workers", type=int, metavar="N", help="scans read at once (default: 4, or the number of CPUs)")
    one.add_argument("--strict", action="store_true", help="exit with 1 if a case is left out")
    one.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    options = parser.parse_args(arguments)
    if options.site is not None and options.source not in (None, "nifti"):
        parser.error("--site is for a folder of one's own: leave out --source")
    if options.workers is not None and options.workers < 1:
        parser.error("--workers must be 1 or more")
    reports: list[Report] = []
    status = guarded(lambda: reports.append(_check(options)))
    if status == 0:
        (report,) = reports
        show(report, options.json)
        bad = report.verdict == "unusable" or (options.strict and report.quarantined)
        status = UNUSABLE if bad else 0
    sys.exit(status)


def _check(options: argparse.Namespace) -> Report:
    given = {
        "path": options.path.expanduser(),
        "source": options.source,
        "sites_csv": options.sites_csv,
        "classes": options.classes,
        "site": options.site,
        "workers": options.workers,
    }
    if options.json:
        return check(**given)
    with console.Bars() as bars:
        return check(**given, progress=bars)


def show(report: Report, as_json: bool) -> None:
    """Prints what was found."""
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
        return
    title = f"{report.path}: {report.source}, {len(report.cases)} cases, classes {', '.join(report.classes) or 'none'}"
    drawn = any(site.cases["undecided"] for site in report.sites.values())
    splits = ("train", "val", "test", *(["undecided"] if drawn else []))
    columns = ("site", "\n".join(splits), "left\nout", "slices\nmm", "pixels\nmm", "axes", "labels", "voxels")
    rows = [_row(name, site, splits) for name, site in report.sites.items()]
    if homeless := sum(bool(problem.case and not problem.site) for problem in report.quarantined):
        rows.append(("?", "", homeless, "", "", "", "", ""))  # only a row of the table would say whose they are
    console.out.print(console.table(console.plain(title), columns, rows))
    for kind, problems in (
        ("left out", [problem for problem in report.problems if problem.quarantined]),
        ("to know", [problem for problem in report.problems if not problem.quarantined]),
    ):
        for line in _grouped(problems):
            console.out.print(f"[bold]{kind}[/] {console.plain(line)}")
    console.out.print(f"[bold]{_VERDICTS[report.verdict]}[/]")
    for line in report.advice:
        console.out.print(console.plain(f"- {line}"))
    if report.verdict != "unusable":
        settings = yaml.safe_dump({"name": report.cohort["name"], "cohort": report.cohort}, sort_keys=False)
        console.out.print(f"go on with these lines in a file, say {report.cohort['name']}.yaml:\n")
        print("".join(f"  {line}\n" for line in settings.splitlines()))
        console.out.print(f"then: fedsam prepare --config {report.cohort['name']}.yaml")


_VERDICTS = {
    "ready": "every case can be used",
    "usable": "can be used, without the cases that are left out",
    "unusable": "cannot be used as it is",
}


def _row(name: str, site: SiteSummary, splits: Sequence[str]) -> tuple[object, ...]:
    sizes = ["x".join(map(str, shape)) for shape in (site.smallest, site.largest) if shape is not None]
    return (
        console.plain(name),
        "\n".join(str(site.cases[split]) for split in splits),
        site.left_out,
        _range(site.slices_mm),
        _range(site.pixels_mm),
        "\n".join(
            f"{axes} {count}" if len(site.orientations) > 1 else axes for axes, count in site.orientations.items()
        ),
        " ".join(map(str, site.label_values)),
        "\n".join(dict.fromkeys(sizes)),
    )


def _range(values: Range | None) -> str:
    """Smallest, median and largest, a line each; once where they are the same."""
    return "-" if values is None else "\n".join(dict.fromkeys(f"{value:.3g}" for value in values))


def _grouped(problems: Sequence[Problem]) -> Iterator[str]:
    """The problems, those that say the same of different cases together."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        own = [rf"\b{re.escape(name)}\b" for name in (problem.case, problem.site) if name]
        words = re.sub("|".join([r"\S*/\S*", *own, r"[\d.]+"]), "*", problem.reason)
        groups.setdefault(words, []).append(problem)
    for first, *others in groups.values():
        line = " ".join(first.reason.split())
        if others:
            names = [other.case or other.site for other in others]
            line += f" (and {len(others)} more like it: {some(names)})"
        yield line


if __name__ == "__main__":
    main()
