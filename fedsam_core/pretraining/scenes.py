"""An endless stream of scenes and the masks of what is in them, drawn by a program.

A scene is a stack of shapes on a textured ground: bent and dented ellipses, boxes, bars, rings, polygons, thresholded
noise, some inside one another, many hardly brighter than what is around them. Then comes what scanners do: blur, uneven
brightness, noise or speckle, contrast, cropped intensities, black borders. The three channels are the scene and its
neighbours, a small deformation to either side, as `fedsam_core.data.slices` gives them; or the scene three times.

No anatomy is drawn: nothing here has the organs, intensities or scanners of `fedsam_core.data.sources.phantom`, nor of
any patient. Batch n of a seed depends on (seed, n, count, size) and the device alone. All images of a batch are drawn
at once, a shape at a time, so that drawing costs a fraction of a training step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam_core.hashing import derive_seed

SHAPES = 9  # painted one over the other; some fall outside, or are hidden
TARGETS = 4  # masks given of each scene
_SMALLEST, _LARGEST = 0.004, 0.7  # of the image's area that a target covers
_CELLS = (3, 5, 9, 17)  # knots a side of the smooth noises, coarse to fine


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Attributes:
        images: float32 [B, 3, S, S] in [0, 1].
        masks: bool [B, TARGETS, S, S]; they may contain one another.
        real: bool [B, TARGETS]: False where a scene has too few targets and a mask is only there to fill the place.
        clean: float32 [B, S, S]: the scene as it was painted, before any scanner; mean 0, deviation 1.
        outlines: bool [B, S, S]: where one shape ends and another begins.
    """

    images: Tensor
    masks: Tensor
    real: Tensor
    clean: Tensor
    outlines: Tensor


def draw_scenes(seed: int, step: int, count: int, size: int, device: torch.device) -> Scenes:
    """Batch `step` of the stream of `seed`: `count` scenes of `size` pixels a side."""
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "scenes", step, count, size))
    draw = _Draw(generator, count, size)
    clean, top, masks = _paint(draw)
    inside = _borders(draw)
    kept, real = _choose(draw, masks & inside)
    images = _photograph(draw, clean) * inside
    spread, mean = torch.std_mean(clean, dim=(1, 2), keepdim=True)
    clean = (clean - mean) / spread.clamp(min=1e-3)
    return Scenes(images, kept, real, clean * inside[:, 0], _outlines(top) & inside[:, 0])


class _Draw:
    """Random numbers and smooth fields for a batch: every method gives one value, or one field, an image."""

    def __init__(self, generator: torch.Generator, count: int, size: int) -> None:
        self.generator, self.count, self.size = generator, count, size
        self.device = generator.device
        line = (torch.arange(size, device=self.device) + 0.5) * (2 / size) - 1
        self.y, self.x = line.view(1, -1, 1), line.view(1, 1, -1)

    def uniform(self, low: float, high: float) -> Tensor:
        """[B, 1, 1], even between the bounds."""
        return low + (high - low) * torch.rand(self.count, 1, 1, generator=self.generator, device=self.device)

    def log_uniform(self, low: float, high: float) -> Tensor:
        """[B, 1, 1], even in its logarithm."""
        return self.uniform(math.log(low), math.log(high)).exp()

    def chance(self, share: float) -> Tensor:
        """bool [B, 1, 1]."""
        return self.uniform(0, 1) < share

    def sign(self) -> Tensor:
        """[B, 1, 1] of -1 and 1."""
        return 1 - 2 * self.chance(0.5).float()

    def smooth(self, cells: int) -> Tensor:
        """[B, S, S]: noise of about unit deviation with `cells` knots a side, bicubic between them."""
        knots = torch.randn(self.count, 1, cells, cells, generator=self.generator, device=self.device)
        return F.interpolate(knots, size=(self.size, self.size), mode="bicubic", align_corners=True)[:, 0]

    def white(self, channels: int) -> Tensor:
        """[B, channels, S, S]: standard normal."""
        shape = (self.count, channels, self.size, self.size)
        return torch.randn(shape, generator=self.generator, device=self.device)


def _paint(draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
    """The scene before any scanner [B, S, S], the number of the shape on top, and candidates for masks.

    Candidates are bool [B, 2 SHAPES, S, S]: what is seen of a shape, or that together with the shapes inside it.
    """
    coarse, middle, fine, finest = (draw.smooth(cells) for cells in _CELLS)
    warped = draw.x + draw.uniform(0, 0.12) * coarse + draw.uniform(0, 0.04) * fine
    warped_y = draw.y + draw.uniform(0, 0.12) * draw.smooth(_CELLS[0]) + draw.uniform(0, 0.04) * draw.smooth(_CELLS[2])
    textures = torch.stack([middle, fine + 0.5 * finest, draw.white(1)[:, 0], _stripes(draw, coarse)], dim=1)

    image = draw.uniform(0, 1) * draw.chance(0.6) + draw.uniform(0, 0.25) * coarse * draw.chance(0.5)
    image = image + _texture(draw, textures)
    top = torch.full((draw.count, draw.size, draw.size), -1, dtype=torch.int8, device=draw.device)
    parent_x, parent_y, parent_radius = draw.uniform(-0.3, 0.3), draw.uniform(-0.3, 0.3), draw.uniform(0.5, 1.0)
    father = torch.full((draw.count, 1, 1), -1, device=draw.device)
    fathers = []
    for shape in range(SHAPES):
        # The first shape is often as large as a body; later ones lie anywhere or inside the one before.
        nested = draw.chance(0.45) if shape else draw.chance(0)
        radius = draw.log_uniform(0.12, 0.6) if shape else draw.log_uniform(0.3, 0.95)
        radius = torch.where(nested, parent_radius * draw.uniform(0.25, 0.7), radius).clamp(min=0.06)
        lean = draw.uniform(0, 2 * math.pi)
        away = parent_radius * draw.uniform(0, 0.45)
        x = torch.where(nested, parent_x + away * lean.cos(), draw.uniform(-0.9, 0.9) * (1 if shape else 0.3))
        y = torch.where(nested, parent_y + away * lean.sin(), draw.uniform(-0.9, 0.9) * (1 if shape else 0.3))
        depth = _outline(draw, warped - x, warped_y - y, radius, (middle, fine, finest))
        inside = (depth > 0) & draw.chance(1.0 if shape < 3 else 0.75)

        edge = (depth * draw.size / (2 * draw.log_uniform(0.2, 1.2))).sigmoid() * inside.any(dim=(1, 2), keepdim=True)
        around = (image * inside).sum(dim=(1, 2), keepdim=True) / inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
        similar = around + draw.sign() * draw.log_uniform(0.05, 0.35)
        level = torch.where(draw.chance(0.6), similar, draw.uniform(0, 1))
        image = torch.lerp(image, level + _texture(draw, textures), edge)
        top = torch.where(inside, torch.tensor(shape, dtype=torch.int8, device=draw.device), top)

        fathers.append(torch.where(nested, father, -1))
        father = torch.where(nested & draw.chance(0.5), father, torch.tensor(shape, device=draw.device))
        latest = father == shape
        parent_x, parent_y = torch.where(latest, x, parent_x), torch.where(latest, y, parent_y)
        parent_radius = torch.where(latest, radius, parent_radius)

    seen = torch.stack([top == shape for shape in range(SHAPES)], dim=1)
    whole = seen.clone()
    for shape in reversed(range(1, SHAPES)):  # children come after their parents
        for ancestor in range(shape):
            whole[:, ancestor] |= whole[:, shape] & (fathers[shape] == ancestor)
    different = (whole ^ seen).any(dim=(2, 3), keepdim=True)
    return image, top, torch.cat([seen, whole & different], dim=1)


def _outline(draw: _Draw, x: Tensor, y: Tensor, radius: Tensor, noises: tuple[Tensor, ...]) -> Tensor:
    """[B, S, S]: about the distance to the rim of a shape around (0, 0), positive inside; half an image is 1."""
    turn = draw.uniform(0, 2 * math.pi)
    cos, sin = turn.cos(), turn.sin()
    thin = draw.chance(0.2)
    flat = torch.where(thin, draw.uniform(0.12, 0.35), draw.log_uniform(0.4, 1))
    u = (x * cos + y * sin) / radius
    v = (y * cos - x * sin) / (radius * flat)
    # A thin shape may be bent into a bow, by as much as its own length.
    v = v + torch.where(thin, draw.uniform(-1, 1) / flat, draw.uniform(-0.3, 0.3)) * (u * u - 0.4) * draw.chance(0.6)
    u, v = u.abs(), v.abs()
    kind = draw.uniform(0, 1)
    ellipse = (u * u + v * v).sqrt()
    box = torch.maximum(u, v) * 1.1
    diamond = torch.maximum(torch.maximum(u, v), (u + v) * draw.uniform(0.55, 0.95))  # or octagon, or hexagon
    distance = torch.where(kind < 0.65, ellipse, torch.where(kind < 0.8, box, diamond))
    dents = sum(draw.uniform(0, 0.16) * noise * draw.chance(0.5) for noise in noises)
    wide = draw.uniform(0.12, 0.3)
    ring = draw.chance(0.08) & (radius > 0.25)
    depth = torch.where(ring, wide - (distance - 0.7).abs(), 1 - distance)
    # Thresholded noise: lumps scattered in and around the place of the shape.
    lumps = torch.minimum(0.5 * noises[1] - draw.uniform(0, 0.5), 1.3 - ellipse)
    return torch.where(draw.chance(0.08), lumps, depth + dents) * radius * flat.clamp(min=0.3)


def _outlines(top: Tensor) -> Tensor:
    """bool [B, S, S]: pixels whose neighbour to the right or below belongs to another shape."""
    down, right = F.pad(top[:, 1:] != top[:, :-1], (0, 0, 0, 1)), F.pad(top[:, :, 1:] != top[:, :, :-1], (0, 1))
    return down | right


def _stripes(draw: _Draw, bend: Tensor) -> Tensor:
    turn, waves = draw.uniform(0, math.pi), draw.log_uniform(8, 60)
    return (waves * (draw.x * turn.cos() + draw.y * turn.sin()) + draw.uniform(0, 4) * bend).sin()


def _texture(draw: _Draw, textures: Tensor) -> Tensor:
    """[B, S, S]: a mixture of the scene's textures with a mean of about 0; often faint."""
    kinds = textures.shape[1]
    weights = torch.cat([draw.log_uniform(0.003, 0.12) * draw.chance(0.5) for _ in range(kinds)], dim=1)
    return torch.einsum("bk,bkhw->bhw", weights[..., 0], textures)


def _photograph(draw: _Draw, clean: Tensor) -> Tensor:
    """The scanner: neighbours, blur, bias, noise, contrast. Scenes [B, S, S] to images [B, 3, S, S] in [0, 1]."""
    flow_x = draw.uniform(0, 0.05) * draw.smooth(_CELLS[0]) + draw.uniform(-0.02, 0.02)
    flow_y = draw.uniform(0, 0.05) * draw.smooth(_CELLS[0]) + draw.uniform(-0.02, 0.02)
    growth = draw.uniform(-0.05, 0.05)
    single = draw.chance(0.25)
    flow = torch.stack([flow_x + growth * draw.x, flow_y + growth * draw.y], dim=-1) * ~single[..., None]
    across = draw.x.expand(1, draw.size, -1)
    place = torch.stack([across, across.mT], dim=-1)
    source = clean[:, None]
    below, above = (
        F.grid_sample(source, place + side * flow, mode="bilinear", padding_mode="border", align_corners=False)
        for side in (-1, 1)
    )
    images = torch.cat([below, source, above], dim=1)

    for share in (0.7, 0.35):
        blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        images = torch.lerp(images, blurred, (draw.uniform(0, 1) * draw.chance(share))[:, None])
    images = images * (draw.uniform(0, 0.25) * draw.smooth(_CELLS[0])).exp()[:, None]

    noise = draw.white(3)
    noise = torch.where(single[:, None], noise[:, :1], noise)
    grains = torch.where(draw.chance(0.3)[:, None], 2 * F.avg_pool2d(noise, 3, stride=1, padding=1), noise)
    speckle = draw.chance(0.15)[:, None]
    strength = draw.log_uniform(0.004, 0.12)[:, None]
    images = torch.where(speckle, images * (1 + 3 * strength * grains), images + strength * grains)
    images = torch.where(draw.chance(0.5)[:, None], images.abs(), images)  # magnitudes, as MR has them

    # Intensities as preparation leaves them: percentiles become 0 and 1; or a window that may cut off more.
    sample = images[:, 1, ::3, ::3].flatten(1)
    low, high = torch.quantile(sample, torch.tensor([0.005, 0.995], device=draw.device), dim=1)[..., None, None, None]
    narrower = draw.uniform(0, 0.25)[:, None] * draw.chance(0.3)[:, None] * (high - low)
    low, high = low + narrower, high - narrower * draw.uniform(0, 1)[:, None]
    images = ((images - low) / (high - low).clamp(min=1e-3)).clamp(0, 1)
    return torch.pow(images, draw.log_uniform(0.6, 1.7)[:, None])


def _borders(draw: _Draw) -> Tensor:
    """bool [B, 1, S, S]: False in the black bars with which oblong slices become square; most images have none."""
    width = draw.uniform(0, 0.5) * draw.chance(0.25)
    upright = draw.chance(0.5)
    across = torch.where(upright, draw.x.abs().expand(1, draw.size, -1), draw.y.abs().expand(1, -1, draw.size))
    return (across <= 1 - width)[:, None]


def _choose(draw: _Draw, masks: Tensor) -> tuple[Tensor, Tensor]:
    """TARGETS of the candidates that are neither too small nor too large, at random; and which of them are real."""
    areas = masks.float().mean(dim=(2, 3))
    fit = (areas > max(_SMALLEST, 10 / draw.size**2)) & (areas < _LARGEST)
    lot = torch.rand(fit.shape, generator=draw.generator, device=draw.device) + fit
    chosen = lot.topk(TARGETS, dim=1).indices
    picked = masks.gather(1, chosen[..., None, None].expand(-1, -1, draw.size, draw.size))
    return picked, fit.gather(1, chosen)
