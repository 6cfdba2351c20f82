"""`fedsam export MODEL`: a trained model as PEFT adapter, as plain SAM checkpoint and as ONNX."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsam_core.errors import ConfigError
from fedsam_core.export import FORMATS, Exported, Format, export
from fedsam_core.trained import ModelCard, load_trained
from pipelines import console
from pipelines.stage import guarded

HELP = """
MODEL is a run's folder, an adapter's folder, or a merged checkpoint. What is written, each with a README:
  adapter/   what was trained, in PEFT's layout where PEFT can hold it, with a model card
  merged/    sam.pth: a plain SAM checkpoint that segment_anything's own classes load strictly, with card.json
  onnx/      segmenter.onnx: images [batch, 3, S, S] in [0, 1] to logits; any batch
Each is compared with the model before it gets its name; one that computes something else is not kept.

examples:
  fedsam export ~/.fedsam/runs/kits-20261123-141500-ab12cd-9f3e
  fedsam export adapter/ --checkpoint sam_vit_b_01ec64.pth -o kidney --format merged,onnx
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Exports, and says what was written and compared. Exit status: 0 done, 2 stopped; nothing wrong is left then."""
    parser = argparse.ArgumentParser(
        prog="fedsam export",
        description="Writes a trained model in the forms that other programs use, and checks each of them.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run, adapter or merged checkpoint")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="default: MODEL/export for a run, else ./NAME-export"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="SAM.pth", help="the SAM file that the model was trained from, where it was"
    )
    parser.add_argument(
        "--format",
        metavar="NAMES",
        help=f"some of {','.join(FORMATS)}; default: all that there can be (no adapter of a merged checkpoint)",
    )
    options = parser.parse_args(arguments)
    sys.exit(guarded(lambda: run(options.model, options.output, options.checkpoint, options.format)))


def run(model: Path, output: Path | None, checkpoint: Path | None, formats: str | None) -> None:
    """Loads the model, exports it, and prints a table.

    Raises:
        FedsamError: no model, no such format, or what was written is wrong.
    """
    wanted = parse_formats(formats)
    trained = load_trained(model, checkpoint)
    if not wanted:
        wanted = FORMATS if trained.card.merged_sha256 is None else tuple(name for name in FORMATS if name != "adapter")
    folder = output or default_folder(model, trained.card)
    with console.Bars() as bars:
        files = export(trained, folder, wanted, bars)
    show(files, folder, trained.card)


def parse_formats(names: str | None) -> tuple[Format, ...]:
    """The formats that `--format` names; none if it is left out. Raises ConfigError for others."""
    named = [] if names is None else [name.strip() for name in names.split(",")]
    if unknown := next((name for name in named if name not in FORMATS), None):
        raise ConfigError(f"--format: there is no {unknown!r}; name some of {','.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in named)


def default_folder(model: Path, card: ModelCard) -> Path:
    """Into the run that is exported; beside nothing else, where a model came without its run."""
    return model / "export" if (model / "adapter").is_dir() else Path(f"{card.run}-export")


def show(files: Sequence[Exported], folder: Path, card: ModelCard) -> None:
    """Prints what was written."""
    rows = [(str(one.file.relative_to(folder)), console.size(one.size), one.checked) for one in files]
    title = f"{card.run}: {', '.join(card.classes)} in {card.modality.upper()}"
    note = ", trained on made-up scans" if card.synthetic else ""
    console.out.print(console.table(console.plain(title + note), ("file", "size", "checked"), rows))
    console.out.print(console.plain(f"each folder has a README.md with code that loads it: {folder}"))


if __name__ == "__main__":
    main()
