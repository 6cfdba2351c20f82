"""Stage `evaluate`: segments a cohort's cases with a trained adapter and scores them in the scans' own grid.

Into the run's folder, under evaluation/SPLIT:

summary.json    means by class and site, pooled and with every site alike, with 95% bootstrap intervals; counts
scores.parquet  a row a case and class                scores.csv  a row a case
masks/          NIfTI in the scan's geometry          pictures/   best, median and worst case of every site; Dice

What Dice, HD95 and NSD mean to the voxel, and how empty and missed structures count, is written in
fedsam_core/evaluation/metrics.py and surfaces.py. The MLflow run is a child of the federation's.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedsam_core
from cluster.tracking import RunTracker
from fedsam_core.data.cohort import Cohort
from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import CheckpointError, DataError
from fedsam_core.evaluation.inference import save_segmentation, segment_scan
from fedsam_core.evaluation.metrics import METRICS, CaseScore, score_case, summarize
from fedsam_core.evaluation.overlays import dice_bars, overlay, pick_cases
from fedsam_core.evaluation.surfaces import SurfaceConfig
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.device import autocast_dtype, describe_device, pick_device
from fedsam_core.sam.adapters import adapt, load_adapter, named_parameters
from fedsam_core.sam.backbones import build_segmenter
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import ParameterManifest
from pipelines import console
from pipelines.config import Config
from pipelines.federate import open_tracking, run_params
from pipelines.prepare import prepared_cohort
from pipelines.recorder import inputs_of
from pipelines.run_folder import RunFolder
from pipelines.sources import code_hash
from pipelines.stage import Stage

Summary = dict[str, Any]


def run(config: Config) -> None:
    """Scores every case of the split, records it, and prints the table."""
    adapter = find_adapter(config)
    tracking = open_tracking(config)
    tracking.check()  # before hours are spent; from then on a server that is away costs a warning
    with console.Bars() as bars:
        prepared = prepared_cohort(config, bars)
        segmenter = load_segmenter(config, prepared, adapter)
        folder = RunFolder(adapter.parent / "evaluation" / config.evaluation.split)
        settled = config.model_copy(update={"preprocess": prepared.config})  # what a cohort left open, by its value
        tags = run_tags(config, prepared.cohort, segmenter, adapter)
        if untrained := untrained_groups(config, segmenter, adapter):
            tags["fedsam.untrained"] = untrained
        name = f"{tags['fedsam.run']}-evaluate-{config.evaluation.split}"
        with tracking.start(name, run_params(settled), tags, parent_run(adapter)) as tracker:
            scores = evaluate(config, prepared, segmenter, folder, bars)
            summary = summarize(scores, prepared.cohort.classes, intervals=True, seed=config.seed)
            keep(summary, scores, prepared.cohort, config.evaluation.split, folder, tracker)
    show(summary, folder.path)
    if untrained:
        console.out.print(
            console.plain(
                f"{untrained} stayed at the sites: this adapter has them as they were before training. The closing "
                "table of `fedsam federate` scores each site's own model, which has them trained"
            )
        )
    console.out.print(f"MLflow UI: {tracking.ui_command()}")


def evaluate(
    config: Config, prepared: PreparedCohort, segmenter: SamSegmenter, folder: RunFolder, bars: console.Bars
) -> list[CaseScore]:
    """A score for each case of the split; masks and pictures of cases go into `folder`.

    Raises:
        DataError: the split has no case, or a case cannot be read.
    """
    cohort, split = prepared.cohort, config.evaluation.split
    cases = {case.id: case for case in cohort.select(split=split)}
    if not cases:
        raise DataError(f"cohort {cohort.name} has no {split} case: see its sites.csv")
    autocast = autocast_dtype(config.learning.precision, pick_device())
    surfaces = SurfaceConfig(config.evaluation.nsd_tolerance_mm)
    scores, masks = [], {}
    for done, case in enumerate(cases.values(), start=1):
        mask = segment_scan(
            segmenter,
            prepared.load(case.id),
            config.slices,
            config.model.image_size,
            config.evaluation.batch_size,
            autocast,
        )
        scores.append(score_case(mask, case, cohort.classes, cohort.structures, surfaces))
        if config.evaluation.save_masks:
            save_segmentation(mask, case, folder.file(f"masks/{case.id}.nii.gz"))
        # Which cases are drawn is known when all are scored. Packed, the mask of a long scan takes about 1 MB.
        masks[case.id] = zlib.compress(mask.tobytes(), 1)
        bars("segment", done, len(cases))
    for site, picks in pick_cases(scores).items():
        of = sum(score.site == site for score in scores)
        for what, score in picks.items():
            mask = np.frombuffer(zlib.decompress(masks[score.case]), np.uint8).reshape(cases[score.case].shape)
            caption = f"{site} · {what} of {of} {split} cases · {score.case}" if of > 1 else None
            overlay(cohort, score, mask, folder.file(f"pictures/{site}-{what}.png"), caption=caption)
    return scores


def keep(
    summary: Summary,
    scores: list[CaseScore],
    cohort: Cohort,
    split: str,
    folder: RunFolder,
    tracker: RunTracker,
) -> None:
    """Writes tables and pictures into the folder, then sends them to MLflow."""
    rows = [row for score in scores for row in score.class_rows()]
    folder.write_json("summary.json", summary | {"split": split, "mlflow_run": tracker.run_id})
    folder.write_table("scores.csv", [score.row() for score in scores])
    folder.write_parquet("scores.parquet", rows)
    dice_bars(summary, cohort, folder.file("pictures/dice.png"), scores=scores)
    tracker.log_round(0, metrics(summary, split))
    tracker.log_table("cases", rows)
    for name in ("summary.json", "scores.csv", "scores.parquet"):
        tracker.log_artifact(folder.file(name))
    tracker.log_artifact(folder.file("pictures"), "pictures")


def metrics(summary: Summary, split: str) -> dict[str, float]:
    """Flat names, those of the federation's own run where it has them: SPLIT/METRIC, SPLIT/METRIC_CLASS,
    site/ID/test_METRIC (site/ID/METRIC for val); besides SPLIT/macro_METRIC, SPLIT/worst_METRIC, the ends of the 95%
    intervals as SPLIT/ci_low_METRIC and SPLIT/ci_high_METRIC, and SPLIT/n_missed_CLASS and the like. What could not be
    scored is left out.
    """
    by_site = "test_" if split == "test" else ""
    named: dict[str, float | None] = {}
    for metric in METRICS:
        if metric not in summary:
            continue
        named[f"{split}/{metric}"] = summary[metric]
        named[f"{split}/macro_{metric}"] = summary["macro"][metric]
        named[f"{split}/worst_{metric}"] = (summary["worst"][metric] or {}).get("value")
        named |= {f"{split}/{metric}_{name}": group[metric] for name, group in summary["per_class"].items()}
        named |= {f"site/{site}/{by_site}{metric}": group[metric] for site, group in summary["per_site"].items()}
        low, high = summary["ci95"][metric] or (None, None)
        named |= {f"{split}/ci_low_{metric}": low, f"{split}/ci_high_{metric}": high}
    for count in ("n_empty", "n_missed", "n_false_positive"):
        named |= {f"{split}/{count}_{name}": group[count] for name, group in summary["per_class"].items()}
    return {name: float(value) for name, value in named.items() if value is not None}


def run_tags(config: Config, cohort: Cohort, segmenter: SamSegmenter, adapter: Path) -> dict[str, str]:
    """Tags of the MLflow run: what was scored with what, by name and hash."""
    device = pick_device()
    return {
        "fedsam.stage": "evaluate",
        "fedsam.version": fedsam_core.__version__,
        "fedsam.run": json.loads((adapter / "card.json").read_text()).get("run", adapter.parent.name),
        "fedsam.config_hash": config.science_hash(cohort.hash),
        "fedsam.cohort_hash": cohort.hash,
        "fedsam.code_hash": code_hash(),
        "fedsam.synthetic": str(cohort.synthetic).lower(),
        "fedsam.weights": segmenter.weights,
        "fedsam.device": describe_device(device),
        "fedsam.precision": "bf16" if autocast_dtype(config.learning.precision, device) else "fp32",
    }


def parent_run(adapter: Path) -> str | None:
    """Id of the MLflow run of the federation that made the adapter, as its folder tells; None if it does not."""
    try:
        told = json.loads((adapter.parent / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return told.get("mlflow_run") if isinstance(told, dict) else None


def find_adapter(config: Config) -> Path:
    """The adapter folder that the configuration names, else that of the newest run of this name.

    Raises:
        CheckpointError: there is none.
    """
    if config.evaluation.adapter is not None:
        named = config.evaluation.adapter
        candidates = [named / "adapter", named]
    elif config.run is not None:
        candidates = [config.work_dir / "runs" / config.run / "adapter"]
    else:
        runs = sorted((config.work_dir / "runs").glob(f"{config.name}-[0-9]*-[0-9]*-*/adapter"), reverse=True)
        candidates = runs[:1]
    for candidate in candidates:
        if (candidate / "manifest.json").is_file():
            return candidate
    where = config.evaluation.adapter or f"{config.work_dir}/runs/{config.run or f'{config.name}-*'}"
    raise CheckpointError(
        f"no adapter in {where}: run `fedsam federate` first, or set evaluation.adapter to its folder"
    )


def load_segmenter(config: Config, prepared: PreparedCohort, adapter: Path) -> SamSegmenter:
    """The backbone of the configuration with the adapter in it, on this machine's device.

    Raises:
        CheckpointError: the adapter was trained for another backbone, selection, number of classes or preprocessing.
    """
    classes = len(prepared.cohort.classes)
    segmenter = build_segmenter(config.model, classes, config.layers, seed=derive_seed(config.seed, "model"))
    load_adapter(segmenter, adapter)
    card = json.loads((adapter / "card.json").read_text())
    for key, value in inputs_of(config, prepared.config).items():
        if key in card and card[key] != value:
            raise CheckpointError(
                f"{adapter} was trained with {key} {card[key]}, the configuration has {value}: evaluate with the "
                f"settings of its run ({adapter.parent / 'config.yaml'})"
            )
    return segmenter.to(pick_device())


def untrained_groups(config: Config, segmenter: SamSegmenter, adapter: Path) -> str:
    """Groups that sites kept and that the adapter has as they were before training, listed; "" where there are none.

    A run's adapter has none of them trained; one that a site fine-tuned for itself has all.
    """
    manifest = ParameterManifest.from_json((adapter / "manifest.json").read_text())
    if not manifest.local:
        return ""
    fresh = build_segmenter(config.model, segmenter.classes, config.layers, seed=derive_seed(config.seed, "model"))
    adapt(fresh, manifest.selection)
    before, now = named_parameters(fresh), named_parameters(segmenter)
    same = {e.group for e in manifest.local if torch.equal(before[e.name].cpu(), now[e.name].cpu())}
    moved = {e.group for e in manifest.local} - same
    return "" if moved else ", ".join(sorted(same))


def show(summary: Summary, folder: Path) -> None:
    """Prints Dice, HD95 and NSD by site and class, and what the means hide."""
    groups = {**summary["per_site"], "all cases": summary}
    if len(summary["per_site"]) > 1:
        groups["sites alike"] = summary["macro"]
    rows = [row for title, group in groups.items() for row in _rows(title, group)]
    nsd = f"NSD\n{summary['nsd_tolerance_mm']:g} mm"
    columns = ("", "cases", "Dice", "95% CI", "HD95\nmm", "penal-\nised", nsd, "missed,\nfalse")
    console.out.print(console.table("Scores in the scans' own grid, means over cases", columns, rows))
    worst = {metric: found for metric, found in summary["worst"].items() if found is not None and metric != "hd95"}
    if len(summary["per_site"]) > 1 and worst:
        words = {"dice": "Dice", "hd95_penalised": "penalised HD95", "nsd": "NSD"}
        told = (f"{words[metric]} {found['value']:.3g} at {found['site']}" for metric, found in worst.items())
        console.out.print(console.plain(f"worst site: {', '.join(told)}"))
    for count, what in (
        ("n_missed", "missed altogether"),
        ("n_false_positive", "predicted where there is none"),
        ("n_empty", "left out, as neither truth nor prediction has it"),
    ):
        found = {name: group[count] for name, group in summary["per_class"].items() if group[count]}
        if found:
            told = (f"{name} in {n} case{'s' * (n > 1)}" for name, n in found.items())
            console.out.print(console.plain(f"{what}: {', '.join(told)}"))
    console.out.print(f"masks, scores and pictures: {folder}")


def _rows(title: str, group: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """A row of the means over classes and, where there are several, one a class below it."""
    classes: Mapping[str, Mapping[str, Any]] = group["per_class"]
    total = {**group, "n": group.get("cases", "")}
    for count in ("n_missed", "n_false_positive"):
        if "cases" in group:
            total[count] = sum(one[count] for one in classes.values())
    below = [(f"  {name}", one) for name, one in classes.items()] if len(classes) > 1 else []
    for name, one in [(title, total), *below]:
        ends = one["ci95"]["dice"]
        yield (
            console.plain(name),
            one.get("n", ""),
            one["dice"],
            f"{ends[0]:.2f}–{ends[1]:.2f}" if ends else "",
            *(None if one[metric] is None else f"{one[metric]:.1f}" for metric in ("hd95", "hd95_penalised")),
            one["nsd"],
            f"{one['n_missed']}, {one['n_false_positive']}" if "n_missed" in one else "",
        )


STAGE = Stage("evaluate", __doc__ or "", run)

if __name__ == "__main__":
    STAGE.main()
