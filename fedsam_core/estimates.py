"""What a configuration will need, before anything is allocated: memory of a GPU, and space on disks.

Estimates, to be compared with what a machine has: they are meant to find a run that cannot fit, not to fill a GPU.
"""

from dataclasses import dataclass

import torch

from fedsam_core.learning.config import LearningConfig
from fedsam_core.sam.adapters import adapt
from fedsam_core.sam.backbones import ModelConfig, unallocated_segmenter
from fedsam_core.selection import LayerSelection

# CUDA's context and libraries, and what the allocator cannot hand out for want of a contiguous piece.
_CONTEXT_BYTES = 600 * 2**20
_FRAGMENTED = 1.15


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step holds at its peak, in fp32.

    Attributes:
        weights: of the whole model.
        optimiser: gradients of the trained parameters and AdamW's two moments.
        activations: what the forward pass keeps for the backward pass, of a whole batch.
    """

    weights: int
    optimiser: int
    activations: int

    @property
    def most(self) -> int:
        """Bytes on a GPU if all is computed in fp32."""
        return int((self.weights + self.optimiser + self.activations) * _FRAGMENTED) + _CONTEXT_BYTES

    @property
    def least(self) -> int:
        """Bytes on a GPU if every activation is bf16, and frozen weights are held in both dtypes; autocast keeps some
        activations in fp32."""
        held = self.weights + self.weights // 2 + self.optimiser + self.activations // 2
        return min(held + _CONTEXT_BYTES, self.most)


def training_memory(
    model: ModelConfig, classes: int, selection: LayerSelection, learning: LearningConfig
) -> TrainingMemory:
    """What a step of a site needs. The model is run on the meta device: nothing is computed, all sizes are exact.

    Raises:
        SelectionError: the selection does not fit the model.
    """
    segmenter = unallocated_segmenter(model, classes, selection)
    with torch.device("meta"):
        adapt(segmenter, selection)
    parameters = list(segmenter.parameters())
    resident = {tensor.untyped_storage()._cdata for tensor in (*parameters, *segmenter.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, or a new tensor could get the place of one that was counted

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            kept[storage._cdata] = storage
        return tensor

    # The grid's positions are computed with autocast switched off, which the meta device has none of.
    segmenter._positions = segmenter.prompt_encoder.get_dense_pe  # type: ignore[method-assign]
    images = torch.empty(learning.batch_size, 3, model.image_size, model.image_size, device="meta")
    inputs, stages = 0, [0]  # bytes of what the encoder's stages are given, and of what each keeps
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if learning.checkpointing:
            # A checkpointed stage holds its input; what it would keep beside is there for one stage at a time.
            x = segmenter.train().begin(images, 1)
            for number in range(1, len(segmenter.stages())):
                before, inputs = sum(storage.nbytes() for storage in kept.values()), inputs + x.nbytes
                x = segmenter.advance(x, number, number + 1)
                stages.append(sum(storage.nbytes() for storage in kept.values()) - before)
            segmenter.decode(x).softmax(1).sum()
        else:
            segmenter.train()(images).softmax(1).sum()
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return TrainingMemory(
        weights=4 * sum(parameter.numel() for parameter in parameters),
        optimiser=4 * trained * (3 if learning.optimizer == "adamw" else 2 if learning.momentum else 1),
        activations=sum(storage.nbytes() for storage in kept.values()) - sum(stages) + max(stages) + inputs,
    )
