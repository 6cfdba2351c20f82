"""The one training loop: processes that share a batch take the step that the mean of their gradients gives."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsam_core.errors import TrainingError
from fedsam_core.learning.steps import fit_steps, worker

BATCH = np.array([3, 0, 5, 1, 4])


class Slices:
    """Stands in for a SliceDataset: a slice's content follows from its number alone."""

    def batch(self, indices: Any, seed: int, train: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        made = [torch.Generator().manual_seed(int(index)) for index in indices]
        images = torch.stack([torch.rand(3, 8, 8, generator=one) for one in made])
        return images, (images[:, 0] > 0.5).long()


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels[:, 0])


def take(batches: list[Any], clip: float = 0.0, rate: float = 1.0) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Weights after a step of SGD for each batch, the loss and the overlaps."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 3, padding=1)
    loss, overlap = fit_steps(
        model,
        Slices(),  # type: ignore[arg-type]
        batches,
        [rate] * len(batches),
        torch.optim.SGD(model.parameters(), lr=rate),
        loss_of,  # type: ignore[arg-type]
        parameters=list(model.parameters()),
        corrections=[],
        gradient_clip=clip,
        autocast=None,
        device=torch.device("cpu"),
        seed=1,
        who="site north",
        round_number=3,
    )
    return torch.cat([value.detach().flatten() for value in model.parameters()]), loss, overlap


def in_a_group(rank: int, count: int, folder: str) -> None:
    """What a process of a group does: the same call as one alone."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    try:
        assert worker() == (rank, count)
        torch.save([take([BATCH]), take([BATCH] * 3, clip=0.1)], f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def grouped(count: int, folder: Path) -> list[Any]:
    torch.multiprocessing.spawn(in_a_group, (count, str(folder)), nprocs=count)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def test_two_processes_take_the_step_of_the_mean_gradient(tmp_path: Path) -> None:
    first, second = grouped(2, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])  # they never part, whatever the rounding
        assert one[1] == other[1]
    start = take([BATCH], rate=0.0)[0]
    parts = [take([BATCH[rank::2]]) for rank in range(2)]
    share = 3 / 5  # of the first process
    mean = share * (parts[0][0] - start) + (1 - share) * (parts[1][0] - start)
    torch.testing.assert_close(first[0][0] - start, mean)
    # The loss is a mean over pixels here, so that two processes do what one does; also what they tell of it.
    alone = take([BATCH])
    torch.testing.assert_close(first[0][0], alone[0])
    assert first[0][1] == pytest.approx(alone[1])
    torch.testing.assert_close(first[0][2], alone[2])
    torch.testing.assert_close(first[1][0], take([BATCH] * 3, clip=0.1)[0])


def test_a_group_of_one_is_a_process_alone(tmp_path: Path) -> None:
    (only,) = grouped(1, tmp_path)
    alone = take([BATCH])
    assert torch.equal(only[0][0], alone[0])
    assert torch.equal(only[0][2], alone[2])
    assert only[0][1] == alone[1]


def test_what_is_not_finite_is_told_with_who_and_when() -> None:
    with pytest.raises(TrainingError, match=r"site north: .* is not finite in round 3, step 2.*learning_rate") as told:
        take([BATCH] * 4, rate=1e38)
    # No thread goes on with the model, not while somebody looks at the error either.
    assert told.tb is not None
    assert not [one for one in threading.enumerate() if one.name.startswith("samples")]
    with pytest.raises(TrainingError, match=r"is not finite in round 3, step 2"):  # the last one is looked at too
        take([BATCH] * 2, rate=1e38)
