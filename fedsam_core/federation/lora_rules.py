"""How LoRA's factors become a sum that may be opened, and how the opened sum becomes factors again.

| rule | in a round, trained and summed of each layer B A | the global product is the mean of the sites' products |
|---|---|---|
| `factors` | A and B | no: mean(B) mean(A) is not mean(B A) |
| `ffa` | B; A stays as it was drawn (FFA-LoRA, arXiv 2403.12313) | exactly |
| `rolora` | B in odd rounds, A in even ones (RoLoRA, arXiv 2502.01755) | exactly |
| `product-dense` | A and B; summed is the change of B A, cut to the rank (FlexLoRA, 2402.11505) | up to the rank |
| `product-sketch` | the same from two small sums, see below | up to the rank and the sketch |

A randomized SVD (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.1, 4.4 and 5.1) of the mean product
P = sum w_i B_i A_i needs P only as P R and Q' P, and both are linear in the sites' products:

    stage 0   sites sum B_i (A_i R), R random signs drawn from the round's seed; Q = orth(sum), sent down
    stage 1   sites sum (Q' B_i) A_i; P is close to Q times it, whose SVD is small

Each power iteration puts two stages between them: W = orth(P' Q) takes the place of R. Sites send changes of their
products since the start of the round, as the global product is known to all. A site that is lost between two stages
ends the round's LoRA step, because two sums with and without it would show its own sketch: LoRA then stays as it was
in that round, all else goes on (see `Course`).

Layers trained whole are summed as they are under all rules. `ffa` and `rolora` need one sum of about half of LoRA's
values, `factors` one of all, `product-sketch` (out + in) (r + oversampling) values a layer in two sums and the bases
down, `product-dense` out times in. All work with any set of survivors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.products import (
    dense,
    from_dense,
    from_sketch,
    orthonormal,
    probe,
    sketch_left,
    sketch_right,
    test_matrix,
)
from fedsam_core.federation.signs import signs
from fedsam_core.selection import ALL_KINDS, Kind, ManifestEntry, ParameterManifest

Vector = NDArray[np.float64]
Basis = dict[str, NDArray[np.float64]]


def trained_kinds(config: FederationConfig, round_number: int) -> frozenset[Kind]:
    """What sites train in a round; the rest of the shared values stays as it is."""
    if config.rule == "ffa":
        return ALL_KINDS - {"lora_A"}
    if config.rule == "rolora":
        return ALL_KINDS - {"lora_A" if round_number % 2 else "lora_B"}
    return ALL_KINDS


def summed_kinds(config: FederationConfig, round_number: int) -> frozenset[Kind]:
    """What is summed value by value."""
    return frozenset({"whole"}) if config.is_product else trained_kinds(config, round_number)


def stages(config: FederationConfig, manifest: ParameterManifest) -> int:
    """Sums of updates in a round."""
    return 2 + 2 * config.power_iterations if config.rule == "product-sketch" and lora_layers(manifest) else 1


@dataclass(frozen=True)
class LoraLayer:
    """One adapted layer: its factors' places in the flat vector.

    Attributes:
        name: the module's.
        group: `lora.encoder` or `lora.decoder`.
        a, b: entries of A [rank, inner] and B [outer, rank].
        a_place, b_place: where they lie.
    """

    name: str
    group: str
    a: ManifestEntry
    b: ManifestEntry
    a_place: slice
    b_place: slice

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def inner(self) -> int:
        return self.a.shape[1]

    @property
    def outer(self) -> int:
        return self.b.shape[0]

    def factors(self, vector: NDArray[np.floating]) -> tuple[Vector, Vector]:
        """B and A (float64) in a flat vector."""
        b = vector[self.b_place].astype(np.float64).reshape(self.b.shape)
        return b, vector[self.a_place].astype(np.float64).reshape(self.a.shape)

    def width(self, config: FederationConfig) -> int:
        """Columns of the sketch."""
        return min(self.rank + config.oversampling, self.inner, self.outer)


def lora_layers(manifest: ParameterManifest) -> tuple[LoraLayer, ...]:
    """The layers with LoRA, in the manifest's order."""
    entries, places = {entry.name: entry for entry in manifest.shared}, manifest.places
    found = []
    for name, a in entries.items():
        if a.kind == "lora_A":
            module = name.removesuffix(".lora_A.weight")
            b = entries[f"{module}.lora_B.weight"]
            found.append(LoraLayer(module, a.group, a, b, places[name], places[b.name]))
    return tuple(found)


def product_sizes(config: FederationConfig, manifest: ParameterManifest, stage: int) -> dict[str, int]:
    """How many values of products are summed in a stage, by lane."""
    if not config.is_product:
        return {}
    sizes: dict[str, int] = {}
    for layer in lora_layers(manifest):
        if config.rule == "product-dense":
            size = layer.outer * layer.inner
        else:
            size = (layer.inner if stage % 2 else layer.outer) * layer.width(config)
        name = _lane(config, layer, stage)
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def product_values(
    config: FederationConfig,
    manifest: ParameterManifest,
    stage: int,
    basis: Basis,
    start: NDArray[np.floating],
    trained: NDArray[np.floating],
) -> dict[str, Vector]:
    """What a site sums in a stage, by lane: its products' change, or that change's sketch.

    Args:
        basis: from `first_basis` or the server, by layer; unused by `product-dense`.
        start, trained: flat vectors before and after the site's training.
    """
    values: dict[str, list[Vector]] = {}
    for layer in lora_layers(manifest) if config.is_product else ():
        old_b, old_a = layer.factors(start)
        new_b, new_a = layer.factors(trained)
        if config.rule == "product-dense":
            change = dense(new_b, new_a) - dense(old_b, old_a)
        elif stage % 2:
            change = sketch_left(basis[layer.name], new_b, new_a) - sketch_left(basis[layer.name], old_b, old_a)
        else:
            change = sketch_right(new_b, new_a, basis[layer.name]) - sketch_right(old_b, old_a, basis[layer.name])
        values.setdefault(_lane(config, layer, stage), []).append(change.ravel())
    return {name: np.concatenate(parts) for name, parts in values.items()}


def first_basis(config: FederationConfig, manifest: ParameterManifest, seed: int, round_number: int) -> Basis:
    """R of every layer (float64 [inner, width], random signs over sqrt(inner)): drawn alike by sites and server."""
    if config.rule != "product-sketch":
        return {}
    return {
        layer.name: test_matrix(layer.inner, layer.width(config), seed, "sketch", round_number, layer.name)
        / np.sqrt(layer.inner)
        for layer in lora_layers(manifest)
    }


def basis_shapes(config: FederationConfig, manifest: ParameterManifest, stage: int) -> dict[str, tuple[int, int]]:
    """Shapes of what a stage after the first projects on, by layer."""
    return {
        layer.name: (layer.outer if stage % 2 else layer.inner, layer.width(config)) for layer in lora_layers(manifest)
    }


def unfold(config: FederationConfig, manifest: ParameterManifest, stage: int, means: Mapping[str, Vector]) -> Basis:
    """The mean change of every layer, as the stage's sum has it, from the lanes' means."""
    taken = dict.fromkeys(means, 0)
    unfolded: Basis = {}
    for layer in lora_layers(manifest):
        if config.rule == "product-dense":
            shape = (layer.outer, layer.inner)
        else:
            width = layer.width(config)
            shape = (width, layer.inner) if stage % 2 else (layer.outer, width)
        name = _lane(config, layer, stage)
        at, size = taken[name], shape[0] * shape[1]
        unfolded[layer.name] = means[name][at : at + size].reshape(shape)
        taken[name] = at + size
    return unfolded


def next_basis(stage: int, changes: Basis, basis: Basis, layers: tuple[LoraLayer, ...], start: Vector) -> Basis:
    """What the stage after `stage` projects on: an orthonormal basis of the mean product's range, or of its rows'."""
    bases = {}
    for layer in layers:
        b, a = layer.factors(start)
        if stage % 2:
            bases[layer.name] = orthonormal((changes[layer.name] + sketch_left(basis[layer.name], b, a)).T)
        else:
            bases[layer.name] = orthonormal(changes[layer.name] + sketch_right(b, a, basis[layer.name]))
    return bases


def new_factors(
    config: FederationConfig, changes: Basis, basis: Basis, layers: tuple[LoraLayer, ...], start: Vector
) -> tuple[Vector, dict[str, float]]:
    """The flat vector with each layer's factors those of the mean product cut to the rank, and by layer the share of
    the product (Frobenius) that the cut left out, as far as the sketch shows it."""
    vector = start.copy()
    truncation = {}
    for layer in layers:
        b, a = layer.factors(start)
        if config.rule == "product-dense":
            factors, cut = from_dense(changes[layer.name] + dense(b, a), layer.rank)
        else:
            q = basis[layer.name]
            factors, cut = from_sketch(q, changes[layer.name] + sketch_left(q, b, a), layer.rank)
        vector[layer.a_place], vector[layer.b_place] = factors.a.ravel(), factors.b.ravel()
        truncation[layer.name] = cut
    return vector, truncation


class Meter:
    """Random probes u' (B A) v of every layer: how far factors are from a mean product that nobody sees.

    For independent random signs the mean square of u' M v is ||M||_F squared, so a few of them, summed over sites like
    anything else, tell ||mean(BA) - B A|| for the global factors B and A.
    """

    def __init__(self, config: FederationConfig, manifest: ParameterManifest, seed: int, round_number: int) -> None:
        self._layers = lora_layers(manifest)
        self.probes = config.meter_probes
        self._signs = {
            layer.name: (
                signs(self.probes * layer.outer, seed, "meter u", round_number, layer.name).reshape(self.probes, -1),
                signs(self.probes * layer.inner, seed, "meter v", round_number, layer.name).reshape(self.probes, -1),
            )
            for layer in self._layers
        }

    def read(self, vector: NDArray[np.floating]) -> Vector:
        """float64 [layers, probes] of the factors in a flat vector."""
        return np.array([probe(*layer.factors(vector), *self._signs[layer.name]) for layer in self._layers])


def meter_size(config: FederationConfig, manifest: ParameterManifest) -> int:
    """Values of the probes in an update: none for differential privacy, which they would leak past."""
    return 0 if config.privacy else config.meter_probes * len(lora_layers(manifest))


def _lane(config: FederationConfig, layer: LoraLayer, stage: int) -> str:
    return f"{layer.group}.product" if config.rule == "product-dense" else f"{layer.group}.sketch{stage}"
