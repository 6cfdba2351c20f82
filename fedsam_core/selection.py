"""Which parameters are adapted, trained, kept at the site and sent.

A `LayerSelection` is what a person writes; a `ParameterManifest` is that selection resolved on the parameter names and
shapes of a real model. The manifest alone decides what is trained, masked, sent and counted. Nothing here needs torch.

The presets are the rows of FLAP-SAM (arXiv 2407.21739), Fig. 1; LoRA is Hu et al. (arXiv 2106.09685), eq. 3.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from fedsam_core.errors import SelectionError
from fedsam_core.hashing import stable_hash
from fedsam_core.settings import Settings

Projection = Literal["q", "k", "v", "o", "mlp"]
Kind = Literal["lora_A", "lora_B", "whole"]
ALL_KINDS: frozenset[Kind] = frozenset(("lora_A", "lora_B", "whole"))

_BLOCK = r"image_encoder\.blocks\.\d+"
_TRANSFORMER = r"mask_decoder\.transformer"
_DECODER_ATTENTION = rf"{_TRANSFORMER}\.(?:layers\.\d+\.(?:self|cross)_attn\w*|final_attn_token_to_image)"
_ENCODER_NORMS = rf"{_BLOCK}\.norm[12]\..*"
_DECODER_NORMS = rf"{_TRANSFORMER}\.(?:layers\.\d+\.norm\d|norm_final_attn)\..*"
_NECK_NORMS = r"image_encoder\.neck\.[13]\..*"
_UPSCALING_NORMS = r"mask_decoder\.output_upscaling\.(?:1|4|7)\..*"
_UPSCALING = r"mask_decoder\.output_upscaling\..*"
_HYPERNETWORKS = r"mask_decoder\.output_hypernetworks_mlps\..*"
_MASK_TOKENS = r"mask_decoder\.mask_tokens\..*"

# What a group's name stands for: a pattern that a whole parameter name must match. Groups may contain one another.
GROUPS: dict[str, str] = {
    "all": r".*",
    "encoder": r"image_encoder\..*",
    "encoder.patch_embed": r"image_encoder\.patch_embed\..*",
    "encoder.pos_embed": r"image_encoder\.pos_embed",
    "encoder.attention": rf"{_BLOCK}\.attn\..*",
    "encoder.rel_pos": rf"{_BLOCK}\.attn\.rel_pos(?:_[hw])?",
    "encoder.mlp": rf"{_BLOCK}\.mlp\..*",
    "encoder.norms": _ENCODER_NORMS,
    "encoder.neck": r"image_encoder\.neck\..*",
    "prompt_encoder": r"prompt_encoder\..*",
    "decoder": r"mask_decoder\..*",
    "decoder.transformer": rf"{_TRANSFORMER}\..*",
    "decoder.attention": rf"{_DECODER_ATTENTION}\..*",
    "decoder.mlp": rf"{_TRANSFORMER}\.layers\.\d+\.mlp\..*",
    "decoder.norms": _DECODER_NORMS,
    "head": rf"{_UPSCALING}|{_HYPERNETWORKS}|{_MASK_TOKENS}",
    "upscaling": _UPSCALING,
    "hypernetworks": _HYPERNETWORKS,
    "mask_tokens": _MASK_TOKENS,
    "iou_head": r"mask_decoder\.iou_prediction_head\..*",
    "iou_token": r"mask_decoder\.iou_token\..*",
    # Every layer norm: of the blocks, of the neck (1, 3), of the decoder and of the upscaling (1, 4, 7).
    "norms": rf"{_ENCODER_NORMS}|{_NECK_NORMS}|{_DECODER_NORMS}|{_UPSCALING_NORMS}",
}

# Not of the model but of its LoRA: one factor a layer, `MODULE.lora_scale` [1], that the layer's LoRA branch is
# multiplied by; it starts at 1. Only ever local: how much of what all sites learned together is right for this one.
LORA_SCALE = "lora.scale"

# Linear layers that LoRA goes into, as patterns on module names. The encoder's carry the block's number.
_ENCODER_LORA: dict[Projection, str] = {
    "q": r"attn\.q_proj",
    "k": r"attn\.k_proj",
    "v": r"attn\.v_proj",
    "o": r"attn\.proj",
    "mlp": r"mlp\.lin[12]",
}
_DECODER_LORA: dict[Projection, str] = {
    "q": rf"{_DECODER_ATTENTION}\.q_proj",
    "k": rf"{_DECODER_ATTENTION}\.k_proj",
    "v": rf"{_DECODER_ATTENTION}\.v_proj",
    "o": rf"{_DECODER_ATTENTION}\.out_proj",
    "mlp": rf"{_TRANSFORMER}\.layers\.\d+\.mlp\.lin[12]",
}


class LoraTargets(Settings):
    """Where LoRA goes and how wide it is. B starts at zero; the update is (alpha / rank) B A."""

    encoder: tuple[Projection, ...] = Field(
        default=(), description="layers of each image encoder block that get LoRA: q, k, v, o (output projection), mlp"
    )
    decoder: tuple[Projection, ...] = Field(
        default=(),
        description="layers of the seven mask decoder attentions that get LoRA (mlp: of its two MLPs)",
    )
    encoder_blocks: tuple[int, ...] | None = Field(
        default=None, description="image encoder blocks that get LoRA, counted from 0; none given means all"
    )
    rank: int = Field(default=32, description="inner dimension of every A and B that block_ranks does not name")
    alpha: float | None = Field(default=None, description="LoRA alpha; left out, it equals each layer's rank (scale 1)")
    block_ranks: dict[int, int] = Field(default={}, description="image encoder block -> its own rank")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        for where, rank in [("rank", self.rank), *((f"block_ranks[{b}]", r) for b, r in self.block_ranks.items())]:
            if rank <= 0:
                raise SelectionError(f"lora.{where} is {rank}: give at least 1, or leave the layer out")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise SelectionError(f"lora.alpha is {self.alpha}: give a number above 0, or leave it out for scale 1")
        for block in [*(self.encoder_blocks or ()), *self.block_ranks]:
            if block < 0:
                raise SelectionError(f"lora: image encoder block {block} does not exist: blocks are counted from 0")
        if (unused := set(self.block_ranks) - set(self.encoder_blocks or self.block_ranks)) or (
            self.block_ranks and not self.encoder
        ):
            named = sorted(unused or self.block_ranks)
            raise SelectionError(
                f"lora.block_ranks names blocks {named} that get no LoRA: add them to lora.encoder_blocks, set "
                "lora.encoder, or remove them"
            )
        return self


class LayerSelection(Settings):
    """Which layers get LoRA, which are trained whole and sent, which are trained and never leave the site.

    Raises:
        SelectionError: an unknown group, a group in both lists, a rank below 1, lora.scale without LoRA or in train, or
            nothing to train.
    """

    name: str = Field(description="short name, used in runs and folders")
    lora: LoraTargets | None = Field(default=None, description="low-rank adapters; left out, there are none")
    train: tuple[str, ...] = Field(default=(), description=f"groups trained whole and sent: {', '.join(GROUPS)}")
    local: tuple[str, ...] = Field(
        default=(),
        description=f"groups trained whole but kept at the site; also {LORA_SCALE}, a factor for each LoRA layer",
    )

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise SelectionError(f"selection name {self.name!r}: use letters, digits, '.', '_' and '-' only")
        if LORA_SCALE in self.train:
            raise SelectionError(f"selection {self.name!r}: {LORA_SCALE} is each site's own: list it in local")
        for part, groups in (("train", GROUPS), ("local", (*GROUPS, LORA_SCALE))):
            for group in getattr(self, part):
                if group not in groups:
                    raise SelectionError(f"selection {self.name!r}: unknown group {group!r}{_known(group, groups)}")
        if both := set(self.train) & set(self.local):
            raise SelectionError(
                f"selection {self.name!r}: group {min(both)!r} is in both train and local: remove it from one of them"
            )
        has_lora = self.lora is not None and bool(self.lora.encoder or self.lora.decoder)
        if LORA_SCALE in self.local and not has_lora:
            raise SelectionError(
                f"selection {self.name!r}: {LORA_SCALE} is a factor of LoRA layers and there are none: set "
                "lora.encoder or lora.decoder, or remove it"
            )
        if not (self.train or self.local or has_lora):
            raise SelectionError(
                f"selection {self.name!r} trains nothing: set lora.encoder, lora.decoder, train or local"
            )
        return self

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the written form."""
        return stable_hash(self.model_dump(mode="json"))

    def trains(self, part: Literal["upscaling", "hypernetworks", "mask_tokens"]) -> bool:
        """Whether the whole of this part of the head is trained, shared or local."""
        return not {"all", "decoder", "head", part}.isdisjoint((*self.train, *self.local))


@dataclass(frozen=True)
class ManifestEntry:
    """One trainable tensor. `name` is canonical: no adapter name and no wrapper of a library in it."""

    name: str
    shape: tuple[int, ...]
    numel: int
    kind: Kind
    group: str


@dataclass(frozen=True)
class ParameterManifest:
    """A selection resolved on a model: ordered tensors that are sent (`shared`) and that stay at the site (`local`)."""

    selection: LayerSelection
    shared: tuple[ManifestEntry, ...]
    local: tuple[ManifestEntry, ...]

    @property
    def trainable(self) -> int:
        """Number of trainable values, shared and local."""
        return self.shared_size + sum(entry.numel for entry in self.local)

    @property
    def shared_size(self) -> int:
        """Number of values that a site sends in a round."""
        return sum(entry.numel for entry in self.shared)

    @property
    def bytes_per_site_round(self) -> int:
        """Bytes of the shared values in fp32: one site, one round, one direction."""
        return 4 * self.shared_size

    @property
    def paper_gb(self) -> float:
        """The unit of FLAP-SAM, Fig. 1: trainable x 800 / 2^30 (25 rounds of 32 bits, so gibibits, called GB there)."""
        return self.trainable * 800 / 2**30

    @cached_property
    def layout_hash(self) -> str:
        """SHA-256 (hex) of what both ends must agree on: names, shapes, kinds, order, and what is shared or local."""
        return stable_hash(
            {part: [[e.name, list(e.shape), e.kind] for e in getattr(self, part)] for part in ("shared", "local")}
        )

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each shared tensor lies in the flat vector, by name, in entry order."""
        stops = np.cumsum([entry.numel for entry in self.shared], dtype=np.int64).tolist()
        return {entry.name: slice(stop - entry.numel, stop) for entry, stop in zip(self.shared, stops, strict=True)}

    def flatten(self, state: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Shared tensors, by canonical name, as one vector in entry order.

        Args:
            state: exactly the shared names, each of its entry's shape.

        Returns:
            float32 [shared_size], a copy.

        Raises:
            SelectionError: a missing or unknown name, or another shape.
        """
        check_state(self.shared, state, self.selection.name)
        vector = np.empty(self.shared_size, dtype=np.float32)
        for name, place in self.places.items():
            vector[place] = state[name].ravel()
        return vector

    def unflatten(self, vector: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]:
        """The inverse of `flatten`: vector [shared_size] to float32 arrays by name (copies).

        Raises:
            SelectionError: the vector has another length or is not one-dimensional.
        """
        if vector.shape != (self.shared_size,):
            raise SelectionError(
                f"selection {self.selection.name!r} shares {self.shared_size} values but the vector has shape "
                f"{vector.shape}: both ends must use the same selection and model"
            )
        return {
            entry.name: np.array(vector[self.places[entry.name]], dtype=np.float32).reshape(entry.shape)
            for entry in self.shared
        }

    def to_json(self) -> str:
        """The manifest as indented JSON, with its layout hash."""
        content = {
            "selection": self.selection.model_dump(mode="json"),
            "layout_hash": self.layout_hash,
            "shared": [asdict(entry) for entry in self.shared],
            "local": [asdict(entry) for entry in self.local],
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            SelectionError: not a manifest, or its layout hash does not fit its entries.
        """
        try:
            content = json.loads(text)
            parts = [
                tuple(ManifestEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in content[part])
                for part in ("shared", "local")
            ]
            manifest = cls(LayerSelection.model_validate(content["selection"]), *parts)
            written = content["layout_hash"]
        except (ValueError, TypeError, KeyError, ValidationError) as error:
            raise SelectionError(f"not a parameter manifest ({error!r:.200}): export it again") from error
        if manifest.layout_hash != written:
            raise SelectionError("the manifest's layout hash does not fit its entries, it was altered: export it again")
        return manifest


@dataclass(frozen=True)
class LoraSpec:
    """LoRA of one linear layer."""

    rank: int
    alpha: float


def preset(name: str, rank: int | None = None) -> LayerSelection:
    """A selection of the paper by name, at another LoRA rank if one is given.

    Raises:
        SelectionError: no such preset (close matches are listed), or a rank below 1.
    """
    if name not in PRESETS:
        raise SelectionError(
            f"unknown selection {name!r}{_known(name, PRESETS)}; or write one out: name, lora, train, local"
        )
    selection = PRESETS[name]
    if rank is None or selection.lora is None:
        return selection
    lora = LoraTargets.model_validate({**selection.lora.model_dump(), "rank": rank})
    return selection.model_copy(update={"lora": lora})


def resolve(selection: LayerSelection, shapes: Mapping[str, tuple[int, ...]]) -> ParameterManifest:
    """Resolve a selection on a model.

    Args:
        selection: what to train.
        shapes: every parameter of the model without LoRA, canonical name -> shape, in the model's order. A linear
            layer `x` is known by its `x.weight` of shape [out, in]; its LoRA is A [rank, in] and B [out, rank], with
            lora.scale also a factor [1].

    Raises:
        SelectionError: a parameter is both shared and local, a block does not exist, a rank is over a layer's own, or a
            group is empty here.
    """
    lora = lora_modules(selection, shapes)
    train, local = _members(selection, selection.train, shapes), _members(selection, selection.local, shapes)
    if both := next((name for name in shapes if name in train and name in local), None):
        raise SelectionError(
            f"selection {selection.name!r}: {both} is in train group {train[both]!r} and in local group "
            f"{local[both]!r}: name narrower groups"
        )
    shared_entries: list[ManifestEntry] = []
    local_entries: list[ManifestEntry] = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name in train:
            shared_entries.append(_entry(name, shape, "whole", train[name]))
        if name in local:
            local_entries.append(_entry(name, shape, "whole", local[name]))
        if module != name and module in lora:
            rank = lora[module].rank
            group = "lora.encoder" if module.startswith("image_encoder.") else "lora.decoder"
            shared_entries.append(_entry(f"{module}.lora_A.weight", (rank, shape[1]), "lora_A", group))
            shared_entries.append(_entry(f"{module}.lora_B.weight", (shape[0], rank), "lora_B", group))
            if LORA_SCALE in selection.local:
                local_entries.append(_entry(f"{module}.lora_scale", (1,), "whole", LORA_SCALE))
    return ParameterManifest(selection, tuple(shared_entries), tuple(local_entries))


def lora_modules(selection: LayerSelection, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LoraSpec]:
    """The linear layers that get LoRA, by module name in the model's order; arguments and errors as in `resolve`."""
    lora = selection.lora
    if lora is None:
        return {}
    depth = 1 + max(
        (int(found[1]) for name in shapes if (found := re.match(r"image_encoder\.blocks\.(\d+)\.", name))), default=-1
    )
    for block in [*(lora.encoder_blocks or ()), *lora.block_ranks]:
        if block >= depth:
            raise SelectionError(
                f"selection {selection.name!r}: image encoder block {block} does not exist: this backbone has blocks "
                f"0 to {depth - 1}"
            )
    encoder = "|".join(_ENCODER_LORA[target] for target in lora.encoder)
    decoder = "|".join(_DECODER_LORA[target] for target in lora.decoder)
    modules: dict[str, LoraSpec] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            continue
        if encoder and (found := re.fullmatch(rf"image_encoder\.blocks\.(\d+)\.(?:{encoder})", module)):
            block = int(found[1])
            if lora.encoder_blocks is not None and block not in lora.encoder_blocks:
                continue
            rank = lora.block_ranks.get(block, lora.rank)
        elif decoder and re.fullmatch(decoder, module):
            rank = lora.rank
        else:
            continue
        if rank > min(shape):
            raise SelectionError(
                f"selection {selection.name!r}: rank {rank} is over the {min(shape)} of {module}, where LoRA would be "
                f"larger than the layer itself: take at most {min(shape)}, or train the layer whole"
            )
        modules[module] = LoraSpec(rank, float(rank) if lora.alpha is None else lora.alpha)
    if not modules and (lora.encoder or lora.decoder):
        raise SelectionError(f"selection {selection.name!r}: no layer gets LoRA: name a block in lora.encoder_blocks")
    return modules


def check_state(entries: Sequence[ManifestEntry], state: Mapping[str, npt.NDArray[Any]], selection: str) -> None:
    """Demand exactly the entries' names and shapes.

    Raises:
        SelectionError: names the first tensor that is missing, unknown or of another shape.
    """
    fix = "both ends must use the same selection and model"
    expected = {entry.name: entry.shape for entry in entries}
    if missing := next((name for name in expected if name not in state), None):
        raise SelectionError(f"selection {selection!r}: the state lacks {missing}: {fix}")
    if unknown := next((name for name in state if name not in expected), None):
        raise SelectionError(f"selection {selection!r}: the state has {unknown}, which is not selected: {fix}")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise SelectionError(f"selection {selection!r}: {name} has shape {state[name].shape}, not {shape}: {fix}")


def _entry(name: str, shape: tuple[int, ...], kind: Kind, group: str) -> ManifestEntry:
    return ManifestEntry(name, tuple(shape), int(np.prod(shape, dtype=np.int64)), kind, group)


def _members(selection: LayerSelection, groups: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Parameter name -> the first of these groups that holds it."""
    members: dict[str, str] = {}
    for group in (one for one in groups if one != LORA_SCALE):  # which is no parameter of the model without LoRA
        names = [name for name in shapes if re.fullmatch(GROUPS[group], name)]
        if not names:
            raise SelectionError(f"selection {selection.name!r}: group {group!r} is empty on this model: remove it")
        for name in names:
            members.setdefault(name, group)
    return members


def _known(name: str, names: Iterable[str]) -> str:
    """': did you mean ...? known: ...' for an error message."""
    listed = list(names)
    close = difflib.get_close_matches(name, listed, n=3)
    return (f": did you mean {' or '.join(close)}?" if close else ":") + f" known: {', '.join(listed)}"


_ATTENTION_LORA = LoraTargets(encoder=("q", "v"), decoder=("q", "v"))

PRESETS: dict[str, LayerSelection] = {
    selection.name: selection
    for selection in (
        LayerSelection(name="full", train=("all",)),
        LayerSelection(name="attention", train=("encoder.attention", "decoder.transformer")),
        LayerSelection(name="decoder", train=("decoder",)),
        LayerSelection(name="partial-decoder", train=("head",)),
        LayerSelection(name="lora", lora=_ATTENTION_LORA),
        LayerSelection(name="lora-decoder", lora=_ATTENTION_LORA, train=("decoder",)),
        LayerSelection(name="flap", lora=_ATTENTION_LORA, train=("head",)),
    )
}
