"""Stage `prepare`: read and check every scan of the cohort, and store it ready for training."""

from pathlib import Path

from fedsam_core.data.cohort import Progress, read_cohort
from fedsam_core.data.files import write_atomic
from fedsam_core.data.preprocess import PreparedCohort, prepare
from fedsam_core.errors import DataError
from fedsam_core.hashing import stable_hash
from pipelines import console
from pipelines.config import Config
from pipelines.stage import Stage

SOURCES = "sources.sha256"


def prepared_folder(config: Config) -> Path:
    """Where the prepared cohort of this configuration lies: another cohort or preprocessing has another folder."""
    key = stable_hash([config.cohort.model_dump(mode="json"), config.preprocess.model_dump(mode="json")])
    return config.work_dir / "cohorts" / f"{config.cohort.name}-{key[:10]}"


def prepare_cohort(config: Config, progress: Progress | None = None) -> PreparedCohort:
    """Reads, checks and prepares the cohort; what is already done is not done again.

    Raises:
        DataError: naming the file, row or site that is wrong, and the fix.
    """
    folder, sources = prepared_folder(config), source_fingerprint(config)
    cohort = read_cohort(config.cohort, config.work_dir, progress)
    prepared = prepare(cohort, config.preprocess, folder, progress)
    write_atomic(folder / SOURCES, sources.encode())
    return prepared


def prepared_cohort(config: Config, progress: Progress | None = None) -> PreparedCohort:
    """The prepared cohort; made now if it is not there yet, or if a file of its source has changed since."""
    folder = prepared_folder(config)
    try:
        if (folder / SOURCES).read_text() == source_fingerprint(config):
            return PreparedCohort.open(folder)
    except (OSError, DataError):
        pass  # not prepared yet
    return prepare_cohort(config, progress)


def source_fingerprint(config: Config) -> str:
    """Hash over names, sizes and times of all files of the source: quick, and enough to notice a change."""
    root, table = config.cohort.path, config.cohort.sites_csv
    files = [path for path in sorted(root.rglob("*")) if path.is_file()] if root is not None else []
    files += [table] if table is not None and table.is_file() else []
    return stable_hash([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def run(config: Config) -> None:
    """Prepares the cohort and prints what is in it."""
    with console.Bars() as bars:
        prepared = prepare_cohort(config, bars)
    show(prepared)


def show(prepared: PreparedCohort) -> None:
    """Prints sites, splits and where the prepared cohort is."""
    cohort = prepared.cohort
    rows = [
        (site, *(len(cohort.select(site, split)) for split in ("train", "val", "test")), _spacings(prepared, site))
        for site in cohort.sites
    ]
    note = " (synthetic: made by a program, no patient)" if cohort.synthetic else ""
    title = f"cohort {cohort.name}{note}: {len(cohort.cases)} cases, classes {', '.join(cohort.classes)}"
    console.out.print(console.table(title, ("site", "train", "val", "test", "median spacing, mm"), rows))
    console.out.print(f"prepared in {prepared.root}")


def _spacings(prepared: PreparedCohort, site: str) -> str:
    spacings = sorted(case.spacing for case in prepared.cohort.select(site))
    return " x ".join(f"{size:g}" for size in (round(s, 3) for s in spacings[len(spacings) // 2]))


STAGE = Stage("prepare", __doc__ or "", run)

if __name__ == "__main__":
    STAGE.main()
