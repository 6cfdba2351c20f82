"""The aggregator's arithmetic: from opened sums to the next global state, and to the message that tells it.

Pure and without I/O, so that `verify` repeats it from the stored sums. Read `Server` first: `begin` a round, hand each
opened sum to the `Course` it gives, then `finish` it. All of it is public to whoever sees the sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsam_core.errors import CheckpointError
from fedsam_core.federation.broadcast import decode_step, encode_step
from fedsam_core.federation.groups import tensor_groups
from fedsam_core.federation.lanes import (
    CONTROL,
    Lanes,
    Precision,
    Round,
    Update,
    accountant,
    parts_of,
    read_magnitudes,
    read_update,
)
from fedsam_core.federation.lora_rules import (
    Basis,
    Meter,
    basis_shapes,
    first_basis,
    lora_layers,
    new_factors,
    next_basis,
    stages,
    unfold,
)
from fedsam_core.federation.products import estimate_norm
from fedsam_core.federation.state import GlobalState, first_state, pack_changes
from fedsam_core.federation.strategies import ServerStrategy
from fedsam_core.federation.tasks import Task
from fedsam_core.secagg.layout import VectorLayout

Vector = NDArray[np.float64]

_STRATEGY = "strategy/"
NO_ERROR = Precision(bound=0.0, largest=0.0, rms=0.0, cut=0.0)


@dataclass(frozen=True)
class LoraReport:
    """How a round's rule did, by layer.

    Attributes:
        inexactness: ||mean(BA) - B A||, Frobenius, for the factors B and A that the rule makes of the sums, estimated
            from probes; before the server's strategy and the coding of the step.
        change: ||mean(BA) - B A|| for the factors before the round: what there was to learn.
        truncation: share of the mean product beyond the rank, under the product rules.
        skipped: the round's LoRA step was given up, as sites were lost between its sums.
    """

    inexactness: dict[str, float] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)
    truncation: dict[str, float] = field(default_factory=dict)
    skipped: bool = False

    @property
    def relative(self) -> float:
        """Inexactness of all layers together, over the change; nan where nothing was measured or changed."""
        change = float(np.linalg.norm(list(self.change.values()))) if self.change else 0.0
        return float(np.linalg.norm(list(self.inexactness.values()))) / change if change > 0 else float("nan")


@dataclass(frozen=True)
class Step:
    """What a round came to.

    Attributes:
        state: the next global state.
        message: what tells it to a site that holds the one before.
        update: what the round's first sum of updates says.
        lora: how the rule did.
        precision: the worst over the round's sums.
        epsilon: spent up to here; None without differential privacy.
        given_up: the round's sum could not be opened, and the state is the one before.
    """

    state: GlobalState
    message: bytes
    update: Update
    lora: LoraReport
    precision: Precision
    epsilon: float | None
    given_up: bool = False


class Server:
    """The global state and what belongs to it: clips, the strategy's moments, what coding left over."""

    def __init__(self, about: Round, state: Mapping[str, NDArray[Any]]) -> None:
        """`about` is round 1; `state` the shared values before it."""
        self._first = about
        manifest, config = about.manifest, about.config
        self.state = first_state(manifest, state, config.scaffold)
        self.clips: dict[str, float] = {}
        self.residual = np.zeros(manifest.shared_size)
        self.control_residual = np.zeros(manifest.shared_size)  # the same of the common control variate
        self.strategy = ServerStrategy(config.strategy, manifest.shared_size)
        self.accountant = accountant(about) if config.privacy is not None else None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the next round depends on, as far as it is arrays: "vector" and "control" of the state, "residual" and
        "control_residual" where steps are coded, "strategy/NAME" for the strategy's moments; [shared size] each."""
        found: dict[str, NDArray[Any]] = {"vector": self.state.vector}
        if self.state.control is not None:
            found["control"] = self.state.control
        if self._first.config.broadcast_bits != 32:
            found["residual"] = self.residual
            if self.state.control is not None:
                found["control_residual"] = self.control_residual
        return found | {f"{_STRATEGY}{name}": moment for name, moment in self.strategy.arrays().items()}

    def facts(self) -> dict[str, Any]:
        """The rest, as JSON values: "clips", and under differential privacy "spent", the contributors of each sum."""
        return {"clips": self.clips, "spent": [] if self.accountant is None else self.accountant.rounds}

    def load(self, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Goes on from what `arrays` and `facts` gave, bit for bit.

        Raises:
            CheckpointError: they are another configuration's.
        """
        moments = {name.removeprefix(_STRATEGY): array for name, array in arrays.items() if name.startswith(_STRATEGY)}
        self.strategy.load(moments)
        own = self.arrays()
        if set(arrays) != set(own):
            odd = ", ".join(sorted(set(arrays) ^ set(own)))
            raise CheckpointError(f"the checkpoint is of another configuration: {odd} is in only one of the two")
        for name, array in own.items():
            if (arrays[name].shape, arrays[name].dtype) != (array.shape, array.dtype):
                raise CheckpointError(f"the checkpoint is of another selection: its {name} is {arrays[name].shape}")
        control = arrays["control"].copy() if "control" in arrays else None
        self.state = GlobalState(self._first.manifest, arrays["vector"].copy(), control)
        self.residual = arrays.get("residual", self.residual).copy()
        self.control_residual = arrays.get("control_residual", self.control_residual).copy()
        self.clips = {str(name): float(clip) for name, clip in facts["clips"].items()}
        if self.accountant is not None:
            for contributors in facts["spent"]:
                self.accountant.spend(int(contributors))

    def begin(self, number: int, total: float) -> "Course":
        """The course of a round's sums; `total` is the weight of all sites."""
        first = self._first
        about = Round(number, first.seed, first.sites, first.manifest, first.classes, first.config)
        return Course(self, about, total)


class Course:
    """One round: which sum is due, and what came of those before."""

    def __init__(self, server: Server, about: Round, total: float) -> None:
        self.about = about
        self.basis_message: bytes | None = None  # for the sites, with the task of a stage after the first
        self._server = server
        self._total = total
        self._start = server.state.vector.astype(np.float64)
        self._stage = 0
        self._stages = stages(about.config, about.manifest)
        self._basis: Basis = first_basis(about.config, about.manifest, about.seed, about.number)
        self._changes: Basis = {}
        self._updates: list[Update] = []
        self._given_up = False

    def task(self) -> Task | None:
        """The sum that is due; None when the round has all it needs."""
        if self._stage == self._stages or self._given_up:
            return None
        basis = sha256(self.basis_message).hexdigest() if self.basis_message is not None else None
        about: dict[str, Any] = {"total": self._total, "stage": self._stage, "basis": basis}
        config = self.about.config
        if config.privacy is not None:
            return Task(purpose="update", **about)
        clips = self._known_clips()
        if clips is None and config.bits < 32:
            return Task(purpose="magnitudes", **about)
        return Task(purpose="update", clips=clips, **about)

    def take(self, task: Task, layout: VectorLayout, lanes: Lanes, contributors: Sequence[str]) -> None:
        """An opened sum of the task that was due."""
        about, server = self.about, self._server
        if task.purpose == "magnitudes":
            server.clips |= read_magnitudes(lanes, about, self._stage)
            return
        update = read_update(layout, lanes, contributors, about, self._stage)
        self._updates.append(update)
        server.clips |= update.clips
        if server.accountant is not None:
            server.accountant.spend(len(contributors))
        config, manifest = about.config, about.manifest
        layers = lora_layers(manifest)
        if config.is_product and layers:
            self._changes = unfold(config, manifest, self._stage, update.means)
            if self._stage + 1 < self._stages:
                basis = next_basis(self._stage, self._changes, self._basis, layers, self._start)
                self.basis_message = pack_basis(basis, config.broadcast_bits)
                shapes = basis_shapes(config, manifest, self._stage + 1)
                # What is decoded counts, as it is what sites project on.
                self._basis = unpack_basis(self.basis_message, shapes, config.broadcast_bits)
        self._stage += 1

    def give_up(self) -> bool:
        """Ends the round without the stages that are left, if it can end so: LoRA then stays as it was."""
        self._given_up = self._stage > 0
        return self._given_up

    def forgo(self, survivors: Sequence[str]) -> Step:
        """Ends the round with the state that it began with: its first sum was asked of `survivors`, some of whom may
        have answered, and cannot be opened. Privacy is spent as if it had been."""
        server, nothing = self._server, float("nan")
        if server.accountant is not None:
            server.accountant.spend(len(survivors))
        update = Update({}, nothing, (nothing,) * self.about.classes, dict(server.clips), NO_ERROR, np.empty(0))
        epsilon = None if server.accountant is None else server.accountant.epsilon
        return Step(server.state, b"", update, LoraReport(), NO_ERROR, epsilon, given_up=True)

    def finish(self) -> Step:
        """The next global state, which the server then holds."""
        about, server, start = self.about, self._server, self._start
        config, manifest = about.config, about.manifest
        update = self._updates[0]
        mean = np.zeros(manifest.shared_size)
        control = None if server.state.control is None else server.state.control.astype(np.float64)
        groups = about.groups
        summed = np.zeros(manifest.shared_size, np.bool_)
        for name, group in groups.items():
            summed[group.index] = True
            mean[group.index] = update.means[name]
            if control is not None:
                control[group.index] += update.means[CONTROL + name]
        desired = start + mean
        truncation: dict[str, float] = {}
        target, active = start.copy(), np.flatnonzero(summed)
        target[active] += server.strategy.step(mean[active], active)
        if config.is_product and self._changes and not self._given_up:
            layers = lora_layers(manifest)
            factors, truncation = new_factors(config, self._changes, self._basis, layers, start)
            for layer in layers:
                for place in (layer.a_place, layer.b_place):
                    desired[place] = target[place] = factors[place]
        lora = self._lora(update, desired, truncation)
        self._code(target, control)
        epsilon = None if server.accountant is None else server.accountant.epsilon
        return Step(server.state, self._message, update, lora, _worst([u.precision for u in self._updates]), epsilon)

    def _code(self, target: Vector, control: Vector | None) -> None:
        """Codes the step to `target`; the server goes on from what sites decode, and keeps what coding left over."""
        server, manifest, config = self._server, self.about.manifest, self.about.config
        old = server.state
        if config.broadcast_bits == 32:
            vector = target.astype(np.float32)
            new = GlobalState(manifest, vector, None if control is None else control.astype(np.float32))
            self._message = pack_changes(old, new)
        else:
            groups = tensor_groups(manifest)
            wanted = target - self._start + server.residual
            changed = {name for name, group in groups.items() if (target != self._start)[group.index].any()}
            values = {
                name: wanted[group.index] if name in changed else np.zeros(group.index.size)
                for name, group in groups.items()
            }
            if control is not None and old.control is not None:
                change = control - old.control + server.control_residual
                values |= {CONTROL + name: change[group.index] for name, group in groups.items()}
            self._message = encode_step(values, config.broadcast_bits)
            new = take_step(old, self._message)
            if control is not None and old.control is not None and new.control is not None:
                server.control_residual = change - (new.control.astype(np.float64) - old.control)
            for name in changed:
                index = groups[name].index
                left = wanted[index] - (new.vector[index].astype(np.float64) - self._start[index])
                # Under a product rule the next round's factors are made anew: nothing of these is left to add.
                server.residual[index] = 0.0 if config.is_product and name.startswith("lora.") else left
        server.state = new

    def _known_clips(self) -> dict[str, float] | None:
        parts = parts_of(self.about, self._stage)
        return {name: self._server.clips[name] for name in parts} if set(parts) <= set(self._server.clips) else None

    def _lora(self, update: Update, desired: Vector, truncation: dict[str, float]) -> LoraReport:
        config, manifest = self.about.config, self.about.manifest
        layers = lora_layers(manifest)
        inexactness, change = {}, {}
        if update.probes.size:
            meter = Meter(config, manifest, self.about.seed, self.about.number)
            learned = update.probes.reshape(len(layers), -1)
            off = learned + meter.read(self._start) - meter.read(desired)
            inexactness = {layer.name: estimate_norm(row) for layer, row in zip(layers, off, strict=True)}
            change = {layer.name: estimate_norm(row) for layer, row in zip(layers, learned, strict=True)}
        return LoraReport(inexactness, change, truncation, self._given_up)


def take_step(state: GlobalState, message: bytes) -> GlobalState:
    """The global state after a coded step, as server and sites compute it, bit for bit.

    Raises:
        CheckpointError: the message is damaged, or for other parameters.
    """
    groups = tensor_groups(state.manifest)
    sizes = {name: group.index.size for name, group in groups.items()}
    if state.control is not None:
        sizes |= {CONTROL + name: size for name, size in sizes.items()}
    steps = decode_step(message, sizes)
    vector = state.vector.astype(np.float64)
    control = None if state.control is None else state.control.astype(np.float64)
    for name, group in groups.items():
        vector[group.index] += steps[name]
        if control is not None:
            control[group.index] += steps[CONTROL + name]
    return GlobalState(
        state.manifest, vector.astype(np.float32), None if control is None else control.astype(np.float32)
    )


def pack_basis(basis: Basis, bits: int) -> bytes:
    """What sites project on in a later stage, as it is sent down."""
    if bits == 32:
        return b"".join(basis[name].astype("<f4").tobytes() for name in sorted(basis))
    return encode_step({name: matrix.ravel() for name, matrix in basis.items()}, bits)


def unpack_basis(data: bytes, shapes: Mapping[str, tuple[int, int]], bits: int) -> Basis:
    """The inverse of `pack_basis` (float64 by layer).

    Raises:
        CheckpointError: it has another length, or is damaged.
    """
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    if bits != 32:
        return {name: flat.reshape(shapes[name]) for name, flat in decode_step(data, sizes).items()}
    if len(data) != 4 * sum(sizes.values()):
        raise CheckpointError(f"a basis of {len(data)} bytes came where {4 * sum(sizes.values())} were due")
    flat, at, basis = np.frombuffer(data, "<f4").astype(np.float64), 0, {}
    if not np.isfinite(flat).all():
        raise CheckpointError("a basis holds NaN or infinity")
    for name in sorted(shapes):
        basis[name] = flat[at : at + sizes[name]].reshape(shapes[name])
        at += sizes[name]
    return basis


def _worst(found: Sequence[Precision]) -> Precision:
    return Precision(
        bound=max(one.bound for one in found),
        largest=max(one.largest for one in found),
        rms=max(one.rms for one in found),
        cut=max(one.cut for one in found),
    )
