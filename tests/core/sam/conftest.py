"""The official SAM, at vit_t's size, with weights that are zero nowhere: the oracle of this folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn


def official_sam(image_size: int) -> Sam:
    """`segment_anything.build_sam._build_sam` with vit_t's encoder and another image size."""
    grid = image_size // 16
    sam = Sam(
        image_encoder=ImageEncoderViT(
            depth=6,
            embed_dim=192,
            img_size=image_size,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=3,
            use_rel_pos=True,
            global_attn_indexes=(2, 5),
            window_size=7,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=256,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8), transformer_dim=256
        ),
    )
    return sam.eval()


@pytest.fixture(scope="session")
def sam_factory() -> Callable[[int], Sam]:
    return official_sam


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official checkpoint (1024 px) whose position tables, norms and biases are random too."""
    path = tmp_path_factory.mktemp("official") / "sam_vit_t.pth"
    generator = torch.Generator().manual_seed(5)
    sam = official_sam(1024)
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.save(sam.state_dict(), path)
    return path
