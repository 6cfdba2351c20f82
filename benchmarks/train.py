"""Time of a training step, beside a plain loop in fp32 and beside the matrix products that it is made of.

    python benchmarks/train.py --json train.json                     # ViT-B, 224 px, flap and decoder: ten minutes
    python benchmarks/train.py --attention                           # the encoder's attention alone, by size and dtype
    python benchmarks/train.py --batch 32 --steps 10                 # on a GPU, where there is one

Each selection is trained from the same batches by, in turn and again and again:

    plain            what one writes first: fp32, the official attention, a batch made when it is needed
    fp32, bf16       `Learner.fit` with learning.precision set so
    checkpointed     bf16, with learning.checkpointing
    cached           bf16, with learning.cache_views=1, once the cache is filled (where a selection freezes a prefix)

and what is printed for each is the time of a slice (median over `--repeats`; of the process's CPU time, all threads,
and of the clock, which is what counts on a GPU), how many times faster than plain it is, and its ratio to the floor:
the floating point operations of the plain step, as torch counts them, at the rate that the encoder's own largest
products reach in that dtype, measured between the steps. The cached rows' floor counts the operations that are left. A
measurement is of the steps alone: what a round does once before them (the state put into the model) is not in it, what
the first of them does (frozen weights packed) is. Random weights and images: the time does not depend on them.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedsam_core.data.cohort import Case
from fedsam_core.data.geometry import Geometry
from fedsam_core.data.preprocess import PreparedCase
from fedsam_core.data.slices import SliceConfig, SliceDataset
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.device import describe_device, pick_device
from fedsam_core.learning.learner import Learner
from fedsam_core.learning.steps import fit_steps
from fedsam_core.sam.adapters import State, adapt, shared_state
from fedsam_core.sam.attention import SplitAttention
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.geometry import BACKBONES
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import preset

CLASSES = 2
PLAIN_STEPS = 2
COUNTS = {"cuda": 0, "cpu": 1}
"""Which of `timed`'s two times a device is judged by."""
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "checkpointed": {"precision": "bf16", "checkpointing": True},
    "cached": {"precision": "bf16", "cache_views": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_b")
    parser.add_argument("--size", type=int, default=224, help="side of the images, px")
    parser.add_argument("--selections", nargs="+", default=["flap", "decoder"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a measurement; the plain loop takes two of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=pick_device())
    parser.add_argument("--attention", action="store_true", help="measure the encoder's attention alone")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = attention_rows(options) if options.attention else step_rows(options)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"options": told(options), "rows": rows}, indent=1))


def told(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON has them, and what the device is."""
    return vars(options) | {"json": None, "device": describe_device(options.device), "torch": torch.__version__}


def step_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each selection and variant, "plain" first."""
    dataset = SliceDataset([random_case(4 * options.batch, options.size)], options.size, SliceConfig())
    rows = []
    for name in options.selections:
        runs = runs_of(name, dataset, options)
        times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in runs}
        rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        for repeat in range(options.repeats + 1):  # in turn, so that what else the machine does falls on all alike
            for variant, (run, _) in runs.items():
                clock, cpu = run()
                slices = options.batch * steps_of(variant, options)
                if repeat:  # the first one fills caches, the allocator's too
                    times[variant].append((1000 * clock / slices, 1000 * cpu / slices))
                elif options.device.type == "cuda":
                    run()  # the second one finds what kernels it chose
            for dtype, found in rates.items():
                found.append(gemm_rate(options, dtype))
        counts = COUNTS[options.device.type]
        plain = median(pair[counts] for pair in times["plain"])
        for variant, (_, flops) in runs.items():
            rate = median(rates[torch.float32 if variant in ("plain", "fp32") else torch.bfloat16])
            spent = [median(values) for values in zip(*times[variant], strict=True)]
            floor = 1000 * flops / rate
            rows.append(
                {
                    "selection": name,
                    "variant": variant,
                    "cpu_ms_per_slice": round(spent[1], 3),
                    "clock_ms_per_slice": round(spent[0], 3),
                    "times_plain": round(plain / spent[counts], 2),
                    "gflop_per_slice": round(flops / 1e9, 1),
                    "gemm_gflop_per_s": round(rate / 1e9),
                    "floor_ms": round(floor, 3),
                    "over_floor": round(spent[counts] / floor, 2),
                }
            )
    return rows


def runs_of(
    name: str, dataset: SliceDataset, options: argparse.Namespace
) -> dict[str, tuple[Callable[[], tuple[float, float]], float]]:
    """By variant: a function that takes the steps and says how long they took, and the operations of a slice."""
    selection, model = preset(name), ModelConfig(backbone=options.backbone, image_size=options.size)
    found: dict[str, tuple[Callable[[], tuple[float, float]], float]] = {}
    for variant in ("plain", *options.variants):
        segmenter = build_segmenter(model, CLASSES, selection, seed=0)
        manifest = adapt(segmenter, selection)
        config = LearningConfig(
            local_steps=options.steps, batch_size=options.batch, threads=options.threads, **VARIANTS.get(variant, {})
        )
        learner = Learner("site", segmenter, manifest, dataset, config, options.device)
        state = shared_state(segmenter, manifest)
        if variant == "plain":
            all_flops, left = counted(segmenter, options)
            found[variant] = (partial(timed, plain_loop(learner, options)), all_flops)
        elif variant == "cached":
            assert learner.prefix is not None
            if learner.prefix.stages:
                found[variant] = (partial(timed_steps, learner, state), left)
        else:
            found[variant] = (partial(timed_steps, learner, state), all_flops)
    return found


def steps_of(variant: str, options: argparse.Namespace) -> int:
    """Steps of a measurement: the plain loop, slow as it is, does nothing once that more of them would spread."""
    return min(PLAIN_STEPS, options.steps) if variant == "plain" else options.steps


def timed_steps(learner: Learner, state: State) -> tuple[float, float]:
    """Seconds of the clock and of the CPU that the steps of a round take; the same round whenever it is asked for."""
    taken: list[tuple[float, float]] = []

    def steps(*args: Any, **options: Any) -> Any:
        results: list[Any] = []
        taken.append(timed(lambda: results.append(fit_steps(*args, **options))))
        return results[0]

    with patch("fedsam_core.learning.learner.fit_steps", steps):
        learner.fit(state, 1, 1, 0)
    return taken[0]


def plain_loop(learner: Learner, options: argparse.Namespace) -> Callable[[], None]:
    """The training loop without any of the means that this benchmark is about."""
    segmenter = learner.segmenter
    install_official_attention(segmenter)
    trained = [parameter for parameter in segmenter.parameters() if parameter.requires_grad]
    batches = learner._draw_batches(np.random.default_rng(0), steps_of("plain", options))

    def loop() -> None:
        optimizer = torch.optim.AdamW(trained)
        segmenter.train()
        for step, indices in enumerate(batches):
            images, labels = (each.to(learner.device) for each in learner.dataset.batch(indices, step, train=True))
            segmenter.zero_grad()
            loss = learner.loss(segmenter(images), labels[:, None])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    return loop


def install_official_attention(segmenter: SamSegmenter) -> None:
    """Lets the encoder compute attention as `segment_anything` does, on the same weights."""
    for module in segmenter.modules():
        if isinstance(module, SplitAttention):
            module.forward = OfficialAttention(module)  # type: ignore[method-assign]


class OfficialAttention(nn.Module):
    """`segment_anything`'s attention, on the layers of a `SplitAttention`."""

    def __init__(self, layers: SplitAttention) -> None:
        super().__init__()
        self.layers = [layers]  # no submodule: the layers stay where they are

    def forward(self, x: Tensor) -> Tensor:
        (own,) = self.layers
        batch, height, width, dim = x.shape
        q, k, v = (
            layer(x).view(batch, height * width, own.heads, -1).transpose(1, 2).flatten(0, 1)
            for layer in (own.q_proj, own.k_proj, own.v_proj)
        )
        grid = q.view(-1, height, width, q.shape[-1])
        by_row = torch.einsum("bhwc,hkc->bhwk", grid, own.rel_pos_h[own.offsets])
        by_column = torch.einsum("bhwc,wkc->bhwk", grid, own.rel_pos_w[own.offsets])
        logits = ((q * own.scale) @ k.transpose(1, 2)).view(-1, height, width, height, width)
        weights = (logits + by_row[..., :, None] + by_column[..., None, :]).flatten(3).flatten(1, 2).softmax(dim=-1)
        out = (weights @ v).view(batch, own.heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return own.proj(out.reshape(batch, height, width, dim))  # type: ignore[no-any-return]


def counted(segmenter: SamSegmenter, options: argparse.Namespace) -> tuple[float, float]:
    """Floating point operations of a slice's step, and of what is left of it once the frozen stages are cached."""
    images = torch.rand(1, 3, options.size, options.size, device=options.device)
    with FlopCounterMode(display=False) as every:
        segmenter(images).sum().backward()
    frozen = segmenter.frozen_stages()
    with torch.no_grad(), FlopCounterMode(display=False) as prefix:
        if frozen:
            segmenter.begin(images, frozen)
    segmenter.zero_grad()
    return float(every.get_total_flops()), float(every.get_total_flops() - prefix.get_total_flops())


def gemm_rate(options: argparse.Namespace, dtype: torch.dtype) -> float:
    """Operations a second of a batch's tokens times the MLP's weights, one block after the other."""
    width = BACKBONES[options.backbone].embed_dim
    tokens = options.batch * (options.size // 16) ** 2
    draw = partial(torch.randn, dtype=dtype, device=options.device)
    x, wide, weights = draw(tokens, width), draw(tokens, 4 * width), [draw(4 * width, width) for _ in range(6)]

    def products() -> None:
        for weight in weights:
            F.linear(x, weight)
            F.linear(wide, weight.T)

    products()
    counts = COUNTS[options.device.type]
    return 2 * tokens * 4 * width * width * 2 * len(weights) / min(timed(products)[counts] for _ in range(3))


def attention_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the three ways to compute attention with positions: one row for each grid, dtype and way."""
    rows = []
    for size, batch in ((224, 8), (512, 1)):
        grid, heads, width = size // 16, 12, 64
        layer = SplitAttention(heads * width, heads, grid).requires_grad_(False).to(options.device)
        nn.init.normal_(layer.rel_pos_h, std=0.02)
        nn.init.normal_(layer.rel_pos_w, std=0.02)
        for dtype in (torch.float32, torch.bfloat16):
            ways = {
                "added": OfficialAttention(layer),
                "folded": layer,
                "folded, torch's kernel": WithKernel(layer),
            }
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(options.repeats + 1):
                for way, module in ways.items():
                    x = torch.randn(batch, grid, grid, heads * width, device=options.device)
                    times[way].append(attention_times(module, x, dtype))
            for way, found in times.items():
                forward, both = (median(values) for values in zip(*found[1:], strict=True))
                rows.append(
                    {
                        "size": size,
                        "dtype": str(dtype).removeprefix("torch."),
                        "attention": way,
                        "forward_ms_per_slice": round(1000 * forward / batch, 3),
                        "step_ms_per_slice": round(1000 * both / batch, 3),
                    }
                )
    return rows


class WithKernel(nn.Module):
    """`SplitAttention` with torch's own attention kernel in place of the two products."""

    def __init__(self, layers: SplitAttention) -> None:
        super().__init__()
        self.layers = [layers]

    def forward(self, x: Tensor) -> Tensor:
        where = "fedsam_core.sam.attention"
        with patch(f"{where}.attend", kernel), patch(f"{where}.written_out", lambda *_: False):
            return self.layers[0](x)  # type: ignore[no-any-return]


def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attend` by torch's kernel, which on a CPU wants values as long as keys."""
    longer = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    return F.scaled_dot_product_attention(query, key, longer, scale=1.0)[..., : value.shape[-1]]


def attention_times(module: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds, of the CPU or of a GPU's clock, of a pass without gradients, and of one with the backward pass."""

    def forward() -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            return module(x)  # type: ignore[no-any-return]

    counts, times = COUNTS[x.device.type], 20 if x.is_cuda else 1

    def taken(function: Callable[[], Any]) -> float:
        return timed(lambda: [function() for _ in range(times)])[counts] / times

    with torch.no_grad():
        alone = taken(forward)
    x.requires_grad_()
    return alone, taken(lambda: forward().sum().backward())


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock, until a GPU has done its part too, and of the process's CPU time."""
    settle()
    clock, cpu = perf_counter(), process_time()
    function()
    settle()
    return perf_counter() - clock, process_time() - cpu


def settle() -> None:
    """Waits for a GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_case(depth: int, size: int) -> PreparedCase:
    """A prepared case of noise; every slice shows both structures."""
    rng = np.random.default_rng(0)
    shape = (depth, size, size)
    label = np.zeros(shape, np.uint8)
    label[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    label[:, size // 3 : size // 2, size // 3 : size // 2] = 2
    about = Case(
        id="noise",
        site="site",
        split="train",
        image="-",
        label=None,
        shape=shape[::-1],
        spacing=(1.0, 1.0, 1.0),
        orientation="LPS",
        label_values=(),
        intensity={},
        image_sha256="",
        label_sha256=None,
    )
    geometry = Geometry.plan(np.diag([-1.0, -1.0, 1.0, 1.0]), shape[::-1], "axial", None)
    return PreparedCase(about, rng.random(shape, dtype=np.float32), label, (1.0, 1.0, 1.0), geometry)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
