"""The segmenter as ONNX: images in, class logits out, for programs that have no PyTorch."""

import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from fedsam_core.errors import CheckpointError
from fedsam_core.sam.segmenter import SamSegmenter

FILE = "segmenter.onnx"
CARD_KEY = "fedsam.card"
OPSET = 20
TOLERANCE = 1e-3  # of logits, against torch
LARGEST = 1_900_000_000  # bytes of weights in one file: protobuf ends at 2 GiB


def write_onnx(segmenter: SamSegmenter, folder: Path, card: str) -> list[Path]:
    """Write `segmenter.onnx`: `images` float32 [batch, 3, S, S] in [0, 1] to `logits` [batch, classes + 1, S, S].

    The batch is free. Weights are in the file, or beside it in `segmenter.onnx.data` where they are over 1.9 GB.

    Args:
        segmenter: merged, on the CPU, in evaluation mode, fp32.
        folder: must exist.
        card: JSON of the model's card; it goes into the model's `metadata_props` as "fedsam.card".

    Returns:
        the files written.
    """
    size = segmenter.image_size
    images = torch.zeros(2, 3, size, size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's words about itself
        program = torch.onnx.export(
            segmenter,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # None stands for the old exporter
    graph = program.model.graph
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
        value.metadata_props.clear()
    program.model.metadata_props[CARD_KEY] = card
    weights = sum(value.numel() * value.element_size() for value in segmenter.state_dict().values())
    program.save(str(folder / FILE), external_data=weights > LARGEST)
    return sorted(folder.glob(f"{FILE}*"))


def check_onnx(path: Path, images: Tensor, expected: Tensor) -> float:
    """Run an ONNX segmenter on the CPU by onnxruntime, for batches of one and of all images.

    Args:
        images: [B, 3, S, S]; expected: torch's logits for them.

    Returns:
        largest absolute difference of a logit.

    Raises:
        CheckpointError: it is not valid, other sizes come out, or a logit differs by more than 1e-3.
    """
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in (1, len(images)):
        (logits,) = session.run(["logits"], {"images": images[:batch].numpy()})
        if logits.shape != expected[:batch].shape:
            raise CheckpointError(f"{path.name}: logits of shape {logits.shape} for {batch} images: report this")
        largest = max(largest, float((torch.from_numpy(logits) - expected[:batch]).abs().max()))
    if not largest <= TOLERANCE:
        raise CheckpointError(
            f"{path.name}: a logit differs from torch's by {largest:.1e}, over {TOLERANCE:g}: nothing is written; use "
            "the merged checkpoint, and report this"
        )
    return largest
