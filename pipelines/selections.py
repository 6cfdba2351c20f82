"""`fedsam selections`: what each preset trains and sends on a given backbone."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from fedsam_core.errors import ConfigError
from fedsam_core.sam.backbones import ModelConfig, manifest_for
from fedsam_core.selection import PRESETS, preset
from pipelines import console
from pipelines.config import explain
from pipelines.stage import guarded


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="fedsam selections",
        description="Which parameters each preset trains, and what a site sends in a round.",
        epilog="Write any other selection in YAML: `selection: {name: ..., lora: {...}, train: [...], local: [...]}`.",
    )
    parser.add_argument("--backbone", default="vit_b", help="vit_t, vit_b, vit_l, vit_h or lite_medsam (default vit_b)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the input in pixels (default 224)")
    parser.add_argument("--classes", type=int, default=2, help="foreground classes (default 2)")
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank (default 32)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: _run(options)))


def rows(backbone: str, image_size: int, classes: int, rank: int) -> list[dict[str, Any]]:
    """A row a preset: parameters, bytes measured in fp32, and the paper's convention."""
    try:
        model = ModelConfig.model_validate({"backbone": backbone, "image_size": image_size})
    except ValidationError as error:
        raise ConfigError("; ".join(explain(e, None) for e in error.errors())) from error
    manifests = {name: manifest_for(model, classes, preset(name, rank)) for name in PRESETS}
    full = manifests["full"].bytes_per_site_round
    return [
        {
            "name": name,
            "trainable": manifest.trainable,
            "bytes_per_site_round": manifest.bytes_per_site_round,
            "reduction": full / manifest.bytes_per_site_round,
            "paper_gb": manifest.paper_gb,
            "layout_hash": manifest.layout_hash,
        }
        for name, manifest in manifests.items()
    ]


def _run(options: argparse.Namespace) -> None:
    found = rows(options.backbone, options.image_size, options.classes, options.rank)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    columns = ("preset", "trainable", "fp32 a site and round, one way", "less than full", "paper's GB*")
    cells = [
        (
            row["name"],
            row["trainable"],
            console.size(row["bytes_per_site_round"]),
            f"{row['reduction']:.1f}x",
            f"{row['paper_gb']:.2f}",
        )
        for row in found
    ]
    title = f"{options.backbone}, {options.image_size} px, {options.classes} classes, rank {options.rank}"
    console.out.print(console.table(title, columns, cells))
    console.out.print(
        "* FLAP-SAM's Figure 1: trainable x 800 / 2^30, which is one client, one direction, 25 rounds, in gibibits.\n"
        "  The bytes of a real run, both directions and all messages, are in its ledger.csv and in MLflow."
    )


if __name__ == "__main__":
    main()
