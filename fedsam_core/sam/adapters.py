"""A selection put to work on a segmenter: LoRA by PEFT, what is trained, its values in and out, files, merging.

Parameters go by canonical names, as in the `ParameterManifest`: PEFT's `.base_layer` and adapter name never show.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsam_core.errors import CheckpointError, SelectionError
from fedsam_core.folders import whole_folder
from fedsam_core.hashing import derive_seed
from fedsam_core.sam.backbones import seeded
from fedsam_core.sam.decoder import SAM_TOKENS, HeadLayout
from fedsam_core.sam.geometry import PATCH, BackboneName
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import (
    LORA_SCALE,
    LayerSelection,
    LoraSpec,
    ManifestEntry,
    ParameterManifest,
    check_state,
    lora_modules,
    resolve,
)
from fedsam_core.settings import Settings

State = dict[str, npt.NDArray[np.float32]]

_ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."
_PEFT_WEIGHTS = "adapter_model.safetensors"
_PLAIN_WEIGHTS = "trained.safetensors"


class BuiltModel(Settings):
    """What a segmenter was built as: an adapter's values only make sense on it."""

    backbone: BackboneName = Field(description="image encoder")
    image_size: int = Field(gt=0, multiple_of=PATCH, description="side of the square input in pixels")
    classes: int = Field(ge=1, description="foreground classes")
    head: HeadLayout = Field(description="mask head: flap, sam or pretrained")
    weights: str = Field(
        pattern=r"^(random\(seed=\d+\)|(fed)?sam:[0-9a-f]{12})$",
        description="random(seed=N), or sam: or fedsam: and the first 12 hex digits of the SHA-256 of the checkpoint",
    )
    seed: int = Field(ge=0, description="what new weights are drawn from")

    @classmethod
    def of(cls, segmenter: SamSegmenter) -> Self:
        """Of a segmenter at hand."""
        return cls.model_validate({key: getattr(segmenter, key) for key in cls.model_fields})

    @property
    def tokens(self) -> int:
        """Mask tokens of the decoder: SAM's own, or one a class and one for background."""
        return SAM_TOKENS if self.head == "pretrained" else self.classes + 1


def adapt(segmenter: SamSegmenter, selection: LayerSelection) -> ParameterManifest:
    """Put LoRA where the selection says and let exactly its manifest require gradients, in place.

    LoRA's B starts at zero, so the logits do not change; A is drawn from the segmenter's own seed, PEFT's way; factors
    of local group lora.scale start at 1.

    Raises:
        SelectionError: the selection does not fit (see `resolve`), or the segmenter was adapted before.
    """
    if segmenter.manifest is not None:
        raise SelectionError(
            f"the segmenter already carries selection {segmenter.manifest.selection.name!r}: build a fresh one"
        )
    shapes = {name: tuple(value.shape) for name, value in segmenter.named_parameters()}
    manifest = resolve(selection, shapes)
    if modules := lora_modules(selection, shapes):
        with seeded(derive_seed(segmenter.seed, "lora")):
            inject_adapter_in_model(_lora_config(modules), segmenter, _ADAPTER)
        for module in modules:
            layer: Any = segmenter.get_submodule(module)
            layer.cast_input_dtype_enabled = False  # autocast brings the input to the dtype that it is multiplied in
            if LORA_SCALE in selection.local:
                _add_scale(layer)
    selected = {entry.name for entry in (*manifest.shared, *manifest.local)}
    parameters = named_parameters(segmenter)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in selected)
    if unknown := selected - parameters.keys():
        raise RuntimeError(f"the manifest names parameters that the adapted model lacks: {sorted(unknown)[:3]}")
    segmenter.manifest = manifest
    return manifest


def shared_state(segmenter: SamSegmenter, manifest: ParameterManifest) -> State:
    """The values that are sent, by canonical name: float32 copies on the CPU."""
    return _read(segmenter, manifest.shared)


def load_shared_state(
    segmenter: SamSegmenter, manifest: ParameterManifest, state: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Overwrite the values that are sent.

    Raises:
        SelectionError: names or shapes other than the manifest's.
    """
    _write(segmenter, manifest.shared, state, manifest.selection.name)


def local_state(segmenter: SamSegmenter, manifest: ParameterManifest) -> State:
    """The trained values that stay at the site, by canonical name: float32 copies on the CPU."""
    return _read(segmenter, manifest.local)


def load_local_state(
    segmenter: SamSegmenter, manifest: ParameterManifest, state: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Overwrite the trained values that stay at the site.

    Raises:
        SelectionError: names or shapes other than the manifest's.
    """
    _write(segmenter, manifest.local, state, manifest.selection.name)


def merge(segmenter: SamSegmenter) -> SamSegmenter:
    """Fold LoRA, with its factors, into the weights it adapts, in place: a plain segmenter again.

    All of it is frozen, and ready to be adapted anew.
    """
    wrapped: list[tuple[str, Any]] = [
        (name, module) for name, module in segmenter.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, module in wrapped:
        if hasattr(module, "lora_scale"):
            with torch.no_grad():
                module.lora_B[_ADAPTER].weight.mul_(module.lora_scale)
        module.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(segmenter.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(segmenter, "peft_config"):
        del segmenter.peft_config
    segmenter.manifest = None
    return segmenter.requires_grad_(False)


def has_peft_layout(segmenter: SamSegmenter, manifest: ParameterManifest) -> bool:
    """Whether PEFT can hold the selection: it has LoRA, and its other parameters make up whole leaf modules."""
    if not any(entry.kind == "lora_A" for entry in manifest.shared):
        return False
    names = {entry.name for entry in (*manifest.shared, *manifest.local)}
    return all(
        not list(owner.children())
        and all(_canonical(f"{path}.{leaf}") in names for leaf, _ in owner.named_parameters())
        for path, owner in _whole_modules(segmenter, manifest)
    )


def save_adapter(
    segmenter: SamSegmenter, manifest: ParameterManifest, folder: Path, card: Mapping[str, Any] | None
) -> None:
    """Write what was trained to a folder, whole or not at all; an adapter that was there is replaced.

    Two layouts, beside `manifest.json` and `card.json` (`card`, and what it was trained on under "model"):
    - `adapter_config.json` and `adapter_model.safetensors`, PEFT's: `peft.PeftModel.from_pretrained` puts them on a
      segmenter freshly built the same way. Parameters trained whole are in it as PEFT's `modules_to_save`.
    - `trained.safetensors`, canonical name -> value, where PEFT has no place for them: a selection without LoRA, or
      with parameters that are no module's whole, such as position tables and the factors of lora.scale.

    Raises:
        CheckpointError: the folder exists and is not an adapter's.
        DataError: the disk refuses.
    """
    trained = {
        name: value.detach().cpu().contiguous()
        for name, value in named_parameters(segmenter).items()
        if name in {entry.name for entry in (*manifest.shared, *manifest.local)}
    }
    with whole_folder(folder, "manifest.json", "an adapter") as part:
        if has_peft_layout(segmenter, manifest):
            config = _exported_config(segmenter, manifest)
            (part / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
            inside = {_canonical(name): name.replace(f".{_ADAPTER}.", ".") for name, _ in segmenter.named_parameters()}
            save_file({_PEFT_PREFIX + inside[name]: value for name, value in trained.items()}, part / _PEFT_WEIGHTS)
        else:
            save_file(trained, part / _PLAIN_WEIGHTS)
        (part / "manifest.json").write_text(manifest.to_json())
        model = BuiltModel.of(segmenter).model_dump(mode="json")
        (part / "card.json").write_text(json.dumps({**(card or {}), "model": model}, indent=2))


def load_adapter(segmenter: SamSegmenter, folder: Path) -> ParameterManifest:
    """Adapt a fresh segmenter as an adapter folder says and give it the trained values, in place.

    Raises:
        CheckpointError: not an adapter folder, a damaged file, or an adapter that was trained on another model.
    """
    try:
        manifest = ParameterManifest.from_json((folder / "manifest.json").read_text())
        model = dict(json.loads((folder / "card.json").read_text())["model"])
        peft_layout = (folder / _PEFT_WEIGHTS).exists()
        values = load_file(folder / (_PEFT_WEIGHTS if peft_layout else _PLAIN_WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, SelectionError) as error:
        raise CheckpointError(f"{folder} is not a complete adapter ({error}): export it again") from error
    for key, value in BuiltModel.of(segmenter).model_dump(mode="json").items():
        if model.get(key) != value:
            raise CheckpointError(
                f"{folder} was trained with {key} {model.get(key)} but the segmenter has {value}: build the segmenter "
                "with the adapter's own model settings"
            )
    if adapt(segmenter, manifest.selection).layout_hash != manifest.layout_hash:
        raise CheckpointError(f"{folder} has another parameter layout than this version gives: export it again")
    state = {_canonical(name.removeprefix(_PEFT_PREFIX)): value.float().numpy() for name, value in values.items()}
    try:
        _write(segmenter, (*manifest.shared, *manifest.local), state, manifest.selection.name)
    except SelectionError as error:
        raise CheckpointError(f"{folder}: its values are not those of its manifest ({error})") from error
    return manifest


class _Scaled:
    """A forward hook on the A of a LoRA layer of PEFT's that multiplies the branch by the layer's factor.

    After A, where the branch is narrow: of B's outputs there are many times more to multiply and to sum over.
    It holds the layer, not the factor, so that it follows a parameter that is replaced. An object, not a closure: a
    copy of the model has a hook on its own layer.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # The product in fp32, as the factor is: bf16 would round the factor itself to steps of 1/128.
        scaled: Tensor = output * self.layer.lora_scale
        return scaled.to(output.dtype)


def _add_scale(layer: Any) -> None:
    """Give a LoRA layer of PEFT's the factor `lora_scale` [1] = 1, on the device of its A."""
    linear = layer.lora_A[_ADAPTER]
    layer.register_parameter("lora_scale", nn.Parameter(torch.ones_like(linear.weight[0, :1])))
    linear.register_forward_hook(_Scaled(layer))


def _lora_config(modules: Mapping[str, LoraSpec], **options: Any) -> LoraConfig:
    """Every module by its full name; those unlike the first one in PEFT's rank and alpha patterns."""
    first = next(iter(modules.values()))
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too, its annotation does not
        target_modules=list(modules),
        rank_pattern={name: spec.rank for name, spec in modules.items() if spec.rank != first.rank},
        alpha_pattern={name: spec.alpha for name, spec in modules.items() if spec.alpha != first.alpha},
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=True,
        **options,
    )


def _exported_config(segmenter: SamSegmenter, manifest: ParameterManifest) -> dict[str, Any]:
    shapes = {_canonical(n): tuple(v.shape) for n, v in segmenter.named_parameters() if ".lora_" not in n}
    config = _lora_config(
        lora_modules(manifest.selection, shapes),
        modules_to_save=[path for path, _ in _whole_modules(segmenter, manifest)] or None,
        inference_mode=True,
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}  # type: ignore[no-untyped-call]


def _whole_modules(segmenter: SamSegmenter, manifest: ParameterManifest) -> list[tuple[str, nn.Module]]:
    """The modules that own the parameters trained whole, by their path in the adapted model."""
    inside = {_canonical(name): name for name, _ in segmenter.named_parameters()}
    whole = [inside[entry.name] for entry in (*manifest.shared, *manifest.local) if entry.kind == "whole"]
    return [(path, segmenter.get_submodule(path)) for path in dict.fromkeys(name.rpartition(".")[0] for name in whole)]


def _canonical(name: str) -> str:
    """`x.base_layer.weight` -> `x.weight`, `x.lora_A.default.weight` -> `x.lora_A.weight`."""
    return name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.", ".")


def named_parameters(segmenter: SamSegmenter) -> dict[str, nn.Parameter]:
    """Parameters by canonical name, as manifests call them."""
    return {_canonical(name): parameter for name, parameter in segmenter.named_parameters()}


def _read(segmenter: SamSegmenter, entries: Sequence[ManifestEntry]) -> State:
    parameters = named_parameters(segmenter)
    return {e.name: parameters[e.name].detach().to("cpu", torch.float32, copy=True).numpy() for e in entries}


def _write(
    segmenter: SamSegmenter, entries: Sequence[ManifestEntry], state: Mapping[str, npt.NDArray[Any]], selection: str
) -> None:
    check_state(entries, state, selection)
    parameters = named_parameters(segmenter)
    with torch.no_grad():
        for entry in entries:
            # A copy: arrays from an object store are read-only, which torch warns about.
            parameters[entry.name].copy_(torch.from_numpy(np.array(state[entry.name], dtype=np.float32)))
