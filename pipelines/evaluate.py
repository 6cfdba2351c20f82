"""Stage `evaluate`: segments a cohort's cases with a trained adapter and scores them in the scans' own grid.

Writes masks (NIfTI, in the scan's geometry), scores.csv, summary.json and pictures into the run's folder, under
evaluation/SPLIT.
"""

import json
from pathlib import Path

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import CheckpointError, DataError
from fedsam_core.evaluation.inference import save_segmentation, segment_scan
from fedsam_core.evaluation.metrics import CaseScore, score_case, summarize
from fedsam_core.evaluation.overlays import dice_bars, overlay
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.device import autocast_dtype, pick_device
from fedsam_core.sam.adapters import load_adapter
from fedsam_core.sam.backbones import build_segmenter
from fedsam_core.sam.segmenter import SamSegmenter
from pipelines import console
from pipelines.config import Config
from pipelines.prepare import prepared_cohort
from pipelines.recorder import inputs_of
from pipelines.run_folder import RunFolder
from pipelines.stage import Stage


def run(config: Config) -> None:
    """Scores every case of the split and prints the table."""
    adapter = find_adapter(config)
    with console.Bars() as bars:
        prepared = prepared_cohort(config, bars)
        segmenter = load_segmenter(config, len(prepared.cohort.classes), adapter)
        folder = RunFolder(adapter.parent / "evaluation" / config.evaluation.split)
        scores = evaluate(config, prepared, segmenter, folder, bars)
    summary = summarize(scores, prepared.cohort.classes)
    folder.write_json("summary.json", summary)
    folder.write_table("scores.csv", [score.row() for score in scores])
    dice_bars(summary, prepared.cohort, folder.path / "pictures" / "dice.png")
    show(summary, folder.path)


def evaluate(
    config: Config, prepared: PreparedCohort, segmenter: SamSegmenter, folder: RunFolder, bars: console.Bars
) -> list[CaseScore]:
    """A score for each case of the split; masks and pictures go into `folder`.

    Raises:
        DataError: the split has no case, or a case cannot be read.
    """
    cases = prepared.cohort.select(split=config.evaluation.split)
    if not cases:
        raise DataError(f"cohort {prepared.cohort.name} has no {config.evaluation.split} case: see its sites.csv")
    autocast = autocast_dtype(config.learning.precision, pick_device())
    scores = []
    for done, case in enumerate(cases, start=1):
        mask = segment_scan(
            segmenter,
            prepared.load(case.id),
            config.slices,
            config.model.image_size,
            config.evaluation.batch_size,
            autocast,
        )
        score = score_case(mask, case, prepared.cohort.classes)
        if config.evaluation.save_masks:
            save_segmentation(mask, case, folder.file(f"masks/{case.id}.nii.gz"))
        overlay(prepared.cohort, score, mask, folder.file(f"pictures/{case.id}.png"))
        scores.append(score)
        bars("segment", done, len(cases))
    return scores


def find_adapter(config: Config) -> Path:
    """The adapter folder that the configuration names, else that of the newest run of this name.

    Raises:
        CheckpointError: there is none.
    """
    if config.evaluation.adapter is not None:
        named = config.evaluation.adapter
        candidates = [named / "adapter", named]
    else:
        runs = sorted((config.work_dir / "runs").glob(f"{config.name}-[0-9]*-[0-9]*-*/adapter"), reverse=True)
        candidates = runs[:1]
    for candidate in candidates:
        if (candidate / "manifest.json").is_file():
            return candidate
    where = config.evaluation.adapter or f"{config.work_dir}/runs/{config.name}-*"
    raise CheckpointError(
        f"no adapter in {where}: run `fedsam federate` first, or set evaluation.adapter to its folder"
    )


def load_segmenter(config: Config, classes: int, adapter: Path) -> SamSegmenter:
    """The backbone of the configuration with the adapter in it, on this machine's device.

    Raises:
        CheckpointError: the adapter was trained for another backbone, selection, number of classes or preprocessing.
    """
    segmenter = build_segmenter(config.model, classes, config.layers, seed=derive_seed(config.seed, "model"))
    load_adapter(segmenter, adapter)
    card = json.loads((adapter / "card.json").read_text())
    for key, value in inputs_of(config).items():
        if key in card and card[key] != value:
            raise CheckpointError(
                f"{adapter} was trained with {key} {card[key]}, the configuration has {value}: evaluate with the "
                f"settings of its run ({adapter.parent / 'config.yaml'})"
            )
    return segmenter.to(pick_device())


def show(summary: dict, folder: Path) -> None:  # type: ignore[type-arg]
    """Prints Dice by site and class."""
    names = list(summary["per_class"])
    rows = [
        (site, group["cases"], *(group["per_class"][name]["dice"] for name in names), group["dice"])
        for site, group in [*summary["per_site"].items(), ("all cases", summary)]
    ]
    console.out.print(console.table("Dice in the scans' own grid", ("site", "cases", *names, "mean"), rows))
    missed = {name: group["n_missed"] for name, group in summary["per_class"].items() if group["n_missed"]}
    if missed:
        console.out.print("missed altogether: " + ", ".join(f"{name} in {n} cases" for name, n in missed.items()))
    console.out.print(f"masks, scores and pictures: {folder}")


STAGE = Stage("evaluate", __doc__ or "", run)

if __name__ == "__main__":
    STAGE.main()
