"""The optimiser's steps, the same for a site's round, a site that learns alone, and one learner on all sites' slices.

Where `torch.distributed` is at work (data-parallel training of pooled data), every process draws the same batches from
the same seed and takes every n-th slice of them: a batch is one batch, however many processes share it, and slices,
augmentation, schedule and the number of steps are those of one process. The gradients of the parts are averaged before
the step. Only the Dice loss differs, as each process takes it over its own part of the batch.
"""

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedsam_core.errors import TrainingError
from fedsam_core.hashing import derive_seed

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Samples(Protocol):
    """Where a step's samples come from: the site's slices, or what frozen stages made of them."""

    def batch(self, indices: Indices, seed: int, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs of the model, and labels int64 [B, H, W], on the device."""
        ...


class Correction(Protocol):
    """Changes the gradients of a step, before they are clipped."""

    def correct(self) -> None:
        """After each backward pass."""
        ...


def fit_steps(
    model: Callable[[Tensor], Tensor],
    samples: Samples,
    batches: Sequence[Indices],
    rates: Sequence[float],
    optimizer: torch.optim.Optimizer,
    loss_of: nn.Module,
    *,
    parameters: Sequence[Parameter],
    corrections: Sequence[Correction],
    gradient_clip: float,
    autocast: torch.dtype | None,
    device: torch.device,
    seed: int,
    who: str,
    round_number: int,
) -> tuple[float, Tensor]:
    """A step for each batch, in place.

    A thread of its own makes each batch while the step before it is computed.

    Args:
        model: inputs that `samples` gives, to logits.
        batches: slices of each step, of at least one for each process.
        rates: learning rate of each step.
        loss_of: (logits [B, 1 + classes, H, W], labels [B, 1, H, W]) -> scalar.
        parameters: those whose gradients are clipped together, all that the optimiser has.
        corrections: in their order; after the mean over processes.
        gradient_clip: largest norm of a gradient; 0 for any.
        seed: of the augmentation, with the number of the step.
        who: takes the steps, for errors; "site north", say.
        round_number: likewise.

    Returns:
        Mean loss over the steps, and float64 [2, classes]: numerator and denominator of the Dice of each foreground
        class over the steps, as shares of all pixels seen.

    Raises:
        TrainingError: a loss or a gradient is not finite; names the step. The parameters are of no use then.
    """
    rank, count = worker()
    losses: list[float] = []
    overlap: Tensor | None = None
    unread: tuple[Tensor, Tensor] | None = None  # loss and norm of the step before

    def read() -> None:
        """Looks at the step before: waiting for this one would leave a GPU idle until the next one is launched."""
        if unread is None:
            return
        for what, value in zip(("the loss", "a gradient"), unread, strict=True):
            if not torch.isfinite(value):
                step = len(losses)
                raise TrainingError(
                    f"{who}: {what} is not finite in round {round_number}, step {step + 1}; nothing of this round is "
                    f"kept or sent. Lower learning.learning_rate ({rates[step]:g} in this step), or set "
                    "learning.precision=fp32"
                )
        losses.append(float(unread[0]))

    parts = [indices[rank::count] for indices in batches]
    # Closed, and its thread ended, before whoever prepared the model for these steps puts it back, an error's case too.
    with closing(_prefetched(samples, parts, seed, device)) as ahead:
        for step, (indices, rate, (inputs, labels)) in enumerate(zip(batches, rates, ahead, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            share = len(parts[step]) / len(indices)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = model(inputs)
            loss = loss_of(logits.float(), labels[:, None])
            loss.backward()
            if count > 1:
                average_gradients(parameters, share)
            for correction in corrections:
                correction.correct()
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip or math.inf)
            optimizer.step()
            read()
            unread = loss.detach().double() * share, norm
            seen = share * _overlap(logits.detach(), labels) / len(batches)
            overlap = seen if overlap is None else overlap + seen
    read()
    assert overlap is not None  # a round has a step
    mean = torch.tensor(float(np.mean(losses)), dtype=torch.float64, device=device)
    if count > 1:
        torch.distributed.all_reduce(mean)
        torch.distributed.all_reduce(overlap)
    return float(mean), overlap


def _prefetched(
    samples: Samples, parts: Sequence[Indices], seed: int, device: torch.device
) -> Generator[tuple[Tensor, Tensor]]:
    """The samples of each step in turn, made one step ahead."""

    def make(step: int) -> tuple[Tensor, Tensor]:
        return samples.batch(parts[step], seed=derive_seed(seed, step), train=True, device=device)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples") as pool:
        coming = pool.submit(make, 0)
        for step in range(len(parts)):
            ready = coming.result()
            if step + 1 < len(parts):
                coming = pool.submit(make, step + 1)
            yield ready


def worker() -> tuple[int, int]:
    """This process's number among those that train together, and how many they are: (0, 1) where it trains alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@torch.no_grad()
def average_gradients(parameters: Sequence[Parameter], share: float) -> None:
    """Replaces every gradient by its mean over the processes, each weighted by its share of the batch; one message.

    A parameter without a gradient has none in any process: it takes no part, as in a step of one process.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).mul_(share)
    torch.distributed.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _overlap(logits: Tensor, labels: Tensor) -> Tensor:
    """Numerator and denominator of the Dice of each foreground class, as shares of the pixels: float64 [2, classes].

    Args:
        logits: float [B, 1 + classes, H, W].
        labels: int [B, H, W].
    """
    predicted = logits.max(dim=1).indices  # as argmax gives, which takes eight times as long on a CPU
    rows = []
    for index in range(1, logits.shape[1]):
        guess, truth = predicted == index, labels == index
        rows.append(torch.stack([2 * (guess & truth).sum(), guess.sum() + truth.sum()]))
    return torch.stack(rows, dim=1).double() / labels.numel()
