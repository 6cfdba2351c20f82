"""`fedsam pretrain`: trains vit_t as a promptable SAM on scenes drawn by a program; writes weights, card and picture.

No scan or photograph is read. The folder holds

    checkpoint.pt        all that the run needs to go on; the same command resumes it
    vit_t.safetensors    the weights: model.checkpoint takes them
    vit_t.md             their model card
    vit_t.png            what the model answers on scenes that it was not trained on
"""

import argparse
import platform
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

import fedsam_core
from fedsam_core.data.files import write_atomic
from fedsam_core.errors import ConfigError
from fedsam_core.hashing import file_sha256
from fedsam_core.learning.device import describe_device, pick_device
from fedsam_core.pretraining.card import examples, model_card
from fedsam_core.pretraining.scoring import mean_iou
from fedsam_core.pretraining.trainer import PretrainConfig, Pretraining, StepReport, packed_sam
from fedsam_core.sam.shipped import pack
from pipelines import console
from pipelines.config import config_tree, explain, inline
from pipelines.stage import guarded

CHECKPOINT, WEIGHTS, CARD, PICTURE = "checkpoint.pt", "vit_t.safetensors", "vit_t.md", "vit_t.png"
_TOLD = 20  # steps that a line of the log is the mean of
_KEPT = 100  # steps between two checkpoints


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or goes on training."""
    parser = argparse.ArgumentParser(
        prog="fedsam pretrain",
        description=__doc__,
        epilog="keys:\n"
        + "\n".join(
            f"  {name}={inline(field.default)}  {field.description}"
            for name, field in PretrainConfig.model_fields.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where everything is written")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings other than the defaults")
    options = parser.parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: pretrain(options.out, options.overrides)))


def pretrain(folder: Path, overrides: Sequence[str]) -> None:
    """Trains to the end and writes everything.

    Raises:
        ConfigError: an unknown key or a wrong value.
        CheckpointError: the folder's checkpoint is of another configuration, or damaged.
        DataError: the disk refuses.
    """
    try:
        config = PretrainConfig.model_validate(config_tree(None, list(overrides)))
    except ValidationError as error:
        raise ConfigError("; ".join(explain(e, None) for e in error.errors())) from error
    run = Pretraining(config, pick_device())
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        run.load(checkpoint)
        console.out.print(f"goes on after step {run.step}, from {console.plain(str(checkpoint))}")
    with console.Bars() as bars:
        last: deque[StepReport] = deque(maxlen=_TOLD)

        def tell(report: StepReport) -> None:
            last.append(report)
            bars("pretrain", report.step + 1, config.steps)
            if (report.step + 1) % _TOLD == 0:
                console.out.print(_line(last))

        run.run(checkpoint, _KEPT, tell)
    finish(run, folder, f"fedsam pretrain {' '.join(overrides)}".strip())


def finish(run: Pretraining, folder: Path, command: str) -> None:
    """Writes weights, card and picture of a finished run, and prints how good they are."""
    config, device = run.config, run.device
    facts: dict[str, Any] = {
        "command": command,
        "config": config.model_dump(mode="json"),
        "fedsam": fedsam_core.__version__,
        "torch": torch.__version__,
        "device": describe_device(device),
        "machine": platform.machine(),
    }
    trained = run.sam.eval()
    pack(folder / WEIGHTS, trained.state_dict(), facts)
    packed = packed_sam(folder / WEIGHTS).to(device)
    scores = {
        (size, kept): mean_iou(sam, size, config.seed, batches=4, count=16, device=device)
        for size in sorted(config.sizes)
        for kept, sam in (("float32", trained), ("packed", packed))
    }
    digest = file_sha256(folder / WEIGHTS)
    write_atomic(folder / CARD, model_card(facts, digest, (folder / WEIGHTS).stat().st_size, scores).encode())
    write_atomic(
        folder / PICTURE, examples(packed, max(config.sizes, key=lambda s: config.sizes[s]), config.seed, device)
    )
    rows = [(size, kept, *(f"{value:.3f}" for value in found.values())) for (size, kept), found in scores.items()]
    columns = ("pixels", "weights", *next(iter(scores.values())))
    console.out.print(console.table("mean IoU on held-out scenes", columns, rows))
    console.out.print(f"{console.plain(str(folder / WEIGHTS))}: fedsam:{digest[:12]}")


def _line(last: Sequence[StepReport]) -> str:
    def mean(name: str) -> float:
        return float(np.mean([getattr(report, name) for report in last]))

    return (
        f"step {last[-1].step + 1}: loss {mean('loss'):.3f}, IoU {mean('first_iou'):.3f} at first, "
        f"{mean('last_iou'):.3f} corrected"
    )


if __name__ == "__main__":
    main()
