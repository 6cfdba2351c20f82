"""`fedsam report STUDY`: what a study found, as one HTML page and as Markdown with its pictures.

Both are made from the study's results alone, whether or not all of its trials have ended, and lie in
`studies/STUDY/report/` of the results store: index.html, which needs no other file, report.md and its PNGs.
"""

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import yaml

import fedsam_core
from cluster.store import open_store
from fedsam_core.errors import ConfigError
from fedsam_core.sam.backbones import ModelConfig
from fedsam_core.store import LocalStore, Store
from pipelines import console, figures
from pipelines.analysis import (
    MEGABYTE,
    Advice,
    Contribution,
    Estimate,
    Row,
    advise,
    atlas,
    pareto,
    rows_of,
    unfinished,
    versus,
)
from pipelines.commits import read_run_file
from pipelines.figures import Look
from pipelines.page import Lines, Page, Picture, Section, Table, Text, html, markdown
from pipelines.results import Kind, StudyAbout, TrialResult, read_about, read_results
from pipelines.stage import guarded

NONE = "–"  # in a cell of which nothing is known
DEFAULT_STORE = "~/.fedsam"
PACKAGES = ("torch", "peft", "monai", "ray", "numpy", "scipy", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the report of a study, and prints where it is."""
    parser = argparse.ArgumentParser(
        prog="fedsam report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY", help="name of the study")
    parser.add_argument(
        "--store",
        default=DEFAULT_STORE,
        metavar="PLACE",
        help="the results store, a folder or s3://bucket/prefix: storage.results or work_dir (default ~/.fedsam)",
    )
    parser.add_argument("--s3-endpoint", metavar="URL", help="address of an S3 server that is not Amazon's")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write here instead of studies/STUDY/report/ in the store"
    )
    options = parser.parse_args(arguments)
    sys.exit(guarded(lambda: _command(options)))


def _command(options: argparse.Namespace) -> None:
    place = options.store if "://" in options.store else str(Path(options.store).expanduser())
    console.out.print(console.plain(report(options.study, open_store(place, options.s3_endpoint), options.out)))


def report(study: str, store: Store, out: Path | None = None) -> str:
    """Writes the report and returns where its HTML page is.

    Raises:
        ConfigError: there is no such study, no trial of it has ended, or a file is of another version.
        StoreError: the store cannot be read or written.
    """
    page = page_of(store, read_about(store, study), list(read_results(store, study)))
    target, prefix = (store, f"studies/{study}/report/") if out is None else (LocalStore(out.expanduser()), "")
    for picture in page.pictures:
        target.write_bytes(prefix + picture.name, picture.data)
    target.write_bytes(f"{prefix}report.md", markdown(page).encode())
    target.write_bytes(f"{prefix}index.html", html(page).encode())
    return f"{target.url}/{prefix}index.html"


def page_of(store: Store, about: StudyAbout, found: Sequence[TrialResult]) -> Page:
    """The page of a study.

    Raises:
        ConfigError: no trial has ended.
    """
    order = {trial: place for place, trial in enumerate(about.planned)}
    trials = sorted((trial for trial in found if trial.id in order), key=lambda trial: order[trial.id])
    if not order:  # the study did not say
        trials = list(found)
    if not trials:
        raise ConfigError(
            f"study {about.name} in {store.url}: none of its {len(order)} planned trials has ended yet: wait for the "
            f"first, or run them with `{about.command}`"
        )
    rows = rows_of(trials)
    advice, contributions = advise(rows), atlas(rows)
    look = Look(about.cohort, about.synthetic, figures.styles_of(rows), "" if advice is None else advice.take.group)
    sections = [
        _results(rows, advice),
        _figure_1(rows, look),
        _atlas(rows, contributions, look),
        _curves(rows, look),
        _sites(rows, advice, look),
        _classes(rows),
        _overlays(store, about, advice),
        _provenance(store, about, trials),
    ]
    missing = f"; {len(order) - len(trials)} still missing" if len(order) > len(trials) else ""
    ended = f"{len(trials)} of {len(order)}" if order else str(len(trials))
    return Page(
        title=f"Study {about.name}",
        subtitle=f"Cohort {about.cohort}: classes {', '.join(about.classes)}; sites {', '.join(about.sites)}. "
        f"{ended} trials have ended{missing}.",
        finding=_finding(rows, advice),
        warnings=_warnings(store, about, found, trials, rows),
        sections=[section for section in sections if section.blocks],
    )


def _finding(rows: Sequence[Row], advice: Advice | None) -> list[str]:
    if advice is None:
        return ["No federated trial has finished with a score yet, so there is nothing to compare."]
    best, take = advice.best, advice.take
    if best.dice is None or take.dice is None:
        raise ValueError("a row on the front has a score")
    if best.dice.mean <= 0:
        told = ["No federated selection segments anything: every test Dice is 0."]
    elif advice.difference is not None:
        told = [
            f"“{take.group}” reaches {take.dice.mean / best.dice.mean:.0%} of the Dice of “{best.group}” "
            f"({take.dice.mean:.3f} beside {best.dice.mean:.3f}) with {take.bytes_total / best.bytes_total:.0%} of its "
            f"bytes ({_mb(take.bytes_total)} beside {_mb(best.bytes_total)} MB).",
            f"It is the cheapest selection on the Pareto front whose Dice cannot be told from the best: paired "
            f"difference {_signed(advice.difference)} over {advice.difference.seeds} seeds.",
        ]
    elif best.dice.seeds < 2:
        told = [
            f"“{best.group}” has the highest Dice, {best.dice.mean:.3f}, for {_mb(best.bytes_total)} MB.",
            "It is one seed: which differences are chance cannot be said.",
        ]
    else:
        told = [
            f"“{best.group}” has the highest Dice, {_value(best.dice)}, for {_mb(best.bytes_total)} MB.",
            "No cheaper selection on the Pareto front has a paired difference to it whose 95% interval holds 0.",
        ]
    if (alone := versus(take, rows, "local")) is not None:
        told.append(f"Beside sites that train alone (“{alone.baseline}”): {_signed(alone.difference)} Dice.")
    if (pooled := versus(take, rows, "centralized")) is not None:
        told.append(f"Beside training on pooled scans (“{pooled.baseline}”): {_signed(pooled.difference)} Dice.")
    return told


def _warnings(
    store: Store,
    about: StudyAbout,
    found: Sequence[TrialResult],
    trials: Sequence[TrialResult],
    rows: Sequence[Row],
) -> list[str]:
    told = []
    if about.synthetic:
        told.append("The scans are synthetic phantoms: nothing here says anything about patients.")
    if random := [row.group for row in rows if _random_weights(store, row)]:
        which = "All rows" if len(random) == len(rows) else ", ".join(random)
        told.append(f"{which} started from random weights, not from a SAM checkpoint.")
    if missing := len(set(about.planned) - {trial.id for trial in trials}):
        told.append(f"{missing} of {len(about.planned)} planned trials have no result yet; rows may lack seeds.")
    if other := len(found) - len(trials):
        told.append(f"{other} results of the store belong to no planned trial (other code or settings): left out.")
    for trial in unfinished(trials):
        why = f": {trial.error}" if trial.error else ""
        told.append(f"{trial.group}, seed {trial.seed}, {trial.status} and is in no mean{why}")
    if silent := [row.group for row in rows if row.dice is None]:
        told.append(f"Without a test score: {', '.join(silent)}.")
    seeds = {row.group: row.dice.seeds for row in rows if row.dice is not None}
    most = max(seeds.values(), default=0)
    if most == 1:
        told.append("There is one seed a row: no interval can be given, and no difference be told from chance.")
    elif fewer := [f"{group} ({count})" for group, count in seeds.items() if count < most]:
        told.append(f"Rows with fewer seeds than the {most} of the others: {', '.join(fewer)}.")
    if most == 2:
        told.append("There are two seeds a row: their intervals are so wide that hardly anything can be told apart.")
    if len({trial.code_hash for row in rows for trial in row.trials}) > 1:
        told.append("The trials were run by different versions of the code.")
    if len({trial.cohort_hash for row in rows for trial in row.trials}) > 1:
        told.append("The trials saw different versions of the cohort: their Dice is not of the same cases.")
    return told


def _results(rows: Sequence[Row], advice: Advice | None) -> Section:
    front = {row.group for row in pareto(rows)}
    locals_, pooled = _baselines(rows, "local"), _baselines(rows, "centralized")
    cells = []
    for row in rows:
        federated = row.kind == "federated"
        cells.append(
            [
                row.group,
                _value(row.dice),
                _versus(row, rows, "local", named=len(locals_) > 1),
                _versus(row, rows, "centralized", named=len(pooled) > 1),
                _mb(row.bytes_total) if federated else NONE,
                f"{row.paper_gb:.3g}" if federated else NONE,
                str(row.dice.seeds) if row.dice else "0",
                "yes" if row.group in front else "",
            ]
        )
    taken = frozenset(number for number, row in enumerate(rows) if advice and row.group == advice.take.group)
    note = (
        "Test Dice over all cases: mean over seeds [95% interval of the mean, Student's t]; intervals speak of other "
        "seeds on this cohort, not of other patients, and are not corrected for the number of rows. MB: serialized "
        "messages of the whole run, all sites, up and down. The paper's GB is FLAP-SAM's convention, "
        "trainable × 800 / 2³⁰: one client, one direction, 25 rounds. Differences are paired by seed"
        + "".join(
            f"; {what} is to “{baselines[0]}”"
            for what, baselines in (("the gain", locals_), ("the gap", pooled))
            if len(baselines) == 1
        )
        + ". On the front: no other federated row has as much Dice for as few bytes. The marked row is the one that "
        "the top of the page names."
    )
    columns = ["selection", "Dice", "gain over local", "gap to pooled", "MB", "paper's GB", "seeds", "on the front"]
    details = [
        [
            row.group,
            row.kind,
            row.trials[0].rule if row.kind == "federated" else NONE,
            str(row.trials[0].rank or NONE),
            str(row.trials[0].bits) if row.kind == "federated" else NONE,
            str(row.trials[0].rounds or NONE),
            f"{row.trainable:,}" if row.trainable else NONE,
            _mb(row.bytes_up) if row.kind == "federated" else NONE,
            _mb(row.bytes_down) if row.kind == "federated" else NONE,
            f"{row.dice.least:.3f}" if row.dice else NONE,
            f"{row.dice.most:.3f}" if row.dice else NONE,
            f"{sum(trial.minutes for trial in row.trials) / len(row.trials):.1f}",
        ]
        for row in rows
    ]
    more = ["selection", "kind", "rule", "rank", "bits", "rounds", "trainable", "MB up", "MB down"]
    more += ["least Dice", "most Dice", "minutes"]
    if not rows:
        return Section("Results", [])
    return Section(
        "Results",
        [Table(columns, cells, note, taken), Table(more, details, marked=taken, left=frozenset({0, 1, 2}))],
    )


def _figure_1(rows: Sequence[Row], look: Look) -> Section:
    blocks: list[Text | Picture] = []
    if (drawn := figures.dice_against_bytes(rows, look)) is not None:
        caption = (
            "FLAP-SAM's Figure 1 for this cohort. Bars: 95% interval over seeds. Filled: on the Pareto front of "
            "measured bytes (dashed line). Ring: the row named at the top. Horizontal lines with bands: baselines, "
            "which send nothing. Both axes of bytes are logarithmic."
        )
        if any(style.color == figures.OTHER for group, style in look.styles.items() if _federated(rows, group)):
            caption += " Gray points, without a name, are in the table."
        blocks.append(Picture("figure1.png", drawn, "Test Dice of each selection against its bytes", caption))
    gains = [(row, found) for row in rows if (found := versus(row, rows, "local")) is not None]
    if (drawn := figures.gain_against_bytes(gains, look)) is not None:
        caption = "Test Dice less that of the sites' own models on their own test cases, paired by seed."
        blocks.append(Picture("gain.png", drawn, "Collaborative gain of each selection against its bytes", caption))
    elif blocks:
        blocks.append(Text("No trial of kind local goes with these selections, so there is no collaborative gain."))
    return Section("Dice and gain against bytes", blocks)


def _atlas(rows: Sequence[Row], contributions: Sequence[Contribution], look: Look) -> Section:
    drawn = figures.atlas_map(contributions, look)
    if drawn is None:
        return Section("Contribution atlas", [])
    unit, factor = figures.unit_of(contributions)
    start = "the zero-shot trial" if any(row.kind == "zero-shot" and row.dice for row in rows) else "its own start"
    caption = (
        f"Dice gained over {start}, by bytes of the whole run (all sites, both directions). A cell above the line is "
        "one selection that trains the same component at places that follow one another: its number is that "
        "selection's, measured, and no share of a larger one. Below are selections of several components, colored "
        "wherever they train; the number is the whole selection's, and nothing says how it divides. Colors are "
        "logarithmic; gray: no gain. ±: half the 95% interval over seeds."
    )
    left_out = [row.group for row in rows if row.kind == "federated" and row not in [one.row for one in contributions]]
    cells = [
        [
            one.row.group,
            _trained(one),
            _signed(one.gain),
            _mb(one.row.bytes_total),
            figures.value_text(one.per_megabyte, factor),
        ]
        for one in contributions
    ]
    note = f"Not in the atlas, because bytes, Dice or parts are not known: {', '.join(left_out)}." if left_out else ""
    return Section(
        "Contribution atlas",
        [
            Picture("atlas.png", drawn, "Dice gained per megabyte by component and place in the model", caption),
            Table(["selection", "trains", "Dice gained", "MB", f"{unit} per MB"], cells, note, left=frozenset({0, 1})),
        ],
    )


def _curves(rows: Sequence[Row], look: Look) -> Section:
    drawn = figures.curves(rows, look)
    if drawn is None:
        return Section("Learning curves", [])
    caption = "Validation Dice, mean over seeds; bands from the least seed to the most. Round 0 is before training."
    if any(style.color == figures.OTHER for group, style in look.styles.items() if _federated(rows, group)):
        caption += " Pale lines, without a name, are the other selections."
    return Section("Learning curves", [Picture("curves.png", drawn, "Validation Dice by round", caption)])


def _sites(rows: Sequence[Row], advice: Advice | None, look: Look) -> Section:
    blocks: list[Picture | Table] = []
    if (drawn := figures.fairness(rows, look)) is not None:
        caption = "Test Dice by site, mean over seeds. Spread: from the worst site to the best."
        blocks.append(Picture("sites.png", drawn, "Test Dice by site", caption))
    sites = list(dict.fromkeys(site for row in rows for site in row.per_site))
    if sites:
        cells = [
            [
                row.group,
                *(_value(row.per_site.get(site)) for site in sites),
                f"{row.fairness.worst_site} {row.fairness.worst:.3f}" if row.fairness else NONE,
                f"{row.fairness.spread:.3f}" if row.fairness else NONE,
            ]
            for row in rows
        ]
        blocks.append(Table(["selection", *sites, "worst site", "spread"], cells))
    own = [row for row in rows if row.kind == "local" and row.cross()]
    if own:
        take = None if advice is None else advice.take
        beside = None if take is None else versus(take, rows, "local")
        local = next((row for row in own if beside and row.group == beside.baseline), own[0])
        if (drawn := figures.cross_matrix(local, take, look)) is not None:
            caption = (
                f"Test Dice of the models of “{local.group}”, each trained at one site (rows), on each site's test "
                "cases (columns), mean over seeds; bold: a site's own model on its own cases."
            )
            if take is not None:
                caption += f" The last row is the one model of “{take.group}”."
            blocks.append(Picture("cross.png", drawn, "Dice of each site's model on each site's cases", caption))
    return Section("Sites", blocks)


def _classes(rows: Sequence[Row]) -> Section:
    classes = list(dict.fromkeys(name for row in rows for name in row.per_class))
    cells = [[row.group, *(_value(row.per_class.get(name)) for name in classes)] for row in rows]
    return Section("Classes", [Table(["selection", *classes], cells)] if classes else [])


def _overlays(store: Store, about: StudyAbout, advice: Advice | None) -> Section:
    if advice is None:
        return Section("What it looks like", [])
    for trial in advice.take.trials:
        found = {site: trial.run and read_run_file(store, trial.run, f"pictures/{site}.png") for site in about.sites}
        shown = [(site, png) for site, png in found.items() if png]
        if shown:
            pictures = [
                Picture(
                    f"overlay-{number}.png",
                    png,
                    f"Truth and prediction on a test case of {site}",
                    f"{site}: “{trial.group}”, seed {trial.seed}; solid the truth, dashed the prediction.",
                )
                for number, (site, png) in enumerate(shown)
            ]
            return Section("What it looks like", pictures)
    text = f"No run of “{advice.take.group}” has left pictures in {store.url}: federation.share_pictures=true does."
    return Section("What it looks like", [Text(text)])


def _provenance(store: Store, about: StudyAbout, trials: Sequence[TrialResult]) -> Section:
    commands = [about.command, f"fedsam report {shlex.quote(about.name)} --store {shlex.quote(store.url)}"]
    blocks: list[Text | Lines | Table] = [Lines("The commands that made this page", "\n".join(commands))]
    key = f"studies/{about.name}/study.yaml"
    if store.exists(key):
        blocks.append(Lines("The study, resolved", store.read_bytes(key).decode(errors="replace")))
    named = [("study's cohort", about.cohort_hash)]
    named += [("cohort", one) for one in dict.fromkeys(t.cohort_hash for t in trials) if one != about.cohort_hash]
    named += [("code", one) for one in dict.fromkeys(trial.code_hash for trial in trials)]
    named += [("MLflow parent run", about.mlflow_run), ("MLflow experiment", about.experiment)]
    named += [("fedsam", fedsam_core.__version__), ("Python", platform.python_version())]
    named += [(package, version(package)) for package in PACKAGES]
    blocks.append(
        Table(
            ["what", "hash, name or version"],
            [[what, value] for what, value in named if value],
            "Hashes are SHA-256; the versions are those of the machine that made this page.",
            left=frozenset({0, 1}),
        )
    )
    cells = [
        [
            trial.group,
            str(trial.seed),
            trial.status,
            trial.id,
            trial.config_hash[:16] or NONE,
            trial.run or NONE,
            trial.mlflow_run or NONE,
        ]
        for trial in trials
    ]
    blocks.append(
        Table(
            ["selection", "seed", "status", "trial", "configuration", "run", "MLflow run"],
            cells,
            f"First 16 digits of the configuration's hash; all of it, and all else of a trial, is in "
            f"studies/{about.name}/trials/TRIAL.json.",
            left=frozenset(range(7)),
        )
    )
    return Section("Where it comes from", blocks)


def _random_weights(store: Store, row: Row) -> bool:
    """Whether a run of the row began with random weights; False where its folder is not in the store."""
    for trial in row.trials:
        if trial.run and (text := read_run_file(store, trial.run, "config.yaml")):
            model = ModelConfig.model_validate(yaml.safe_load(text)["model"])
            return model.weights_file is None
    return False


def _baselines(rows: Sequence[Row], kind: Kind) -> list[str]:
    found = (versus(row, rows, kind) for row in rows)
    return list(dict.fromkeys(one.baseline for one in found if one is not None))


def _versus(row: Row, rows: Sequence[Row], kind: Kind, named: bool) -> str:
    found = versus(row, rows, kind)
    if found is None:
        return NONE
    return _signed(found.difference) + (f" ({found.baseline})" if named else "")


def _trained(one: Contribution) -> str:
    """Places and what is trained there, equal neighbours together: "0 to 5: LoRA q, v; head: mask head"."""
    runs: list[tuple[list[str], str]] = []
    for place, components in one.places.items():
        text = figures.component_text(", ".join(components))
        if runs and runs[-1][1] == text:
            runs[-1][0].append(figures.place_text(place))
        else:
            runs.append(([figures.place_text(place)], text))
    return "; ".join(f"{places[0]}{f' to {places[-1]}' if len(places) > 1 else ''}: {text}" for places, text in runs)


def _federated(rows: Sequence[Row], group: str) -> bool:
    return any(row.group == group and row.kind == "federated" for row in rows)


def _value(one: Estimate | None) -> str:
    if one is None:
        return NONE
    return f"{one.mean:.3f}" + ("" if one.low is None else f" [{one.low:.3f}, {one.high:.3f}]")


def _signed(one: Estimate) -> str:
    return f"{one.mean:+.3f}" + ("" if one.low is None else f" [{one.low:+.3f}, {one.high:+.3f}]")


def _mb(count: float) -> str:
    """Megabytes of 10^6 bytes."""
    size = count / MEGABYTE
    return f"{size:,.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"


if __name__ == "__main__":
    main()
