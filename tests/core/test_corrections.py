"""What FedProx and SCAFFOLD add to gradients. Their fixed points are in `federation/test_strategies.py`."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedsam_core.errors import TrainingError
from fedsam_core.learning.corrections import ControlVariate, Proximal

Correction = Proximal | ControlVariate


def small_net(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Callable[[], torch.Tensor]]:
    """Parameters of a net, and the loss of the next batch. Two calls give the same net and batches."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2)).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)

    def loss() -> torch.Tensor:
        inputs, targets = torch.randn(2, 8, 5, generator=generator, dtype=dtype)
        return nn.functional.mse_loss(net(inputs), targets[:, :2])

    return list(net.parameters()), loss


def train(
    correct: Callable[[list[nn.Parameter]], Correction] | None, steps: int = 4
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]], Correction | None]:
    """AdamW as a site's learner runs it: backward, correct, clip, step.

    Returns:
        The trained parameters, the raw gradients of every step, and the correction.
    """
    parameters, loss = small_net()
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    correction = correct(parameters) if correct else None
    raw = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        raw.append([parameter.grad.clone() for parameter in parameters])
        if correction:
            correction.correct()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
    return [parameter.detach() for parameter in parameters], raw, correction


def zeros(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [torch.zeros(parameter.shape) for parameter in parameters]


def test_the_proximal_gradient_is_that_of_the_papers_term() -> None:
    parameters, loss = small_net(torch.float64)
    proximal = Proximal(parameters, mu=0.3)
    starts = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn_like(parameter)
    value = loss()
    term = sum(((p - s) ** 2).sum() for p, s in zip(parameters, starts, strict=True)) * 0.3 / 2
    expected = torch.autograd.grad(value + term, parameters, retain_graph=True)
    value.backward()
    proximal.correct()
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected), rtol=1e-12, atol=1e-12)


def test_a_proximal_term_holds_the_parameters_back() -> None:
    start, _, _ = train(None, steps=0)
    moved = [
        sum(float((a - b).norm() ** 2) for a, b in zip(train(correct)[0], start, strict=True))
        for correct in (
            None,
            lambda parameters: Proximal(parameters, 1.0),
            lambda parameters: Proximal(parameters, 9.0),
        )
    ]
    assert moved[0] > moved[1] > moved[2] > 0


@pytest.mark.parametrize(
    "correct",
    [
        lambda parameters: Proximal(parameters, 0.0),
        lambda parameters: ControlVariate(parameters, zeros(parameters), zeros(parameters)),
    ],
    ids=["mu = 0", "SCAFFOLD's first round"],
)
def test_without_anything_to_add_training_is_fedavg_bit_for_bit(
    correct: Callable[[list[nn.Parameter]], Correction],
) -> None:
    plain, corrected = train(None)[0], train(correct)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, corrected, strict=True))


def test_scaffold_learns_from_raw_gradients_under_any_optimiser() -> None:
    """Neither the correction, nor clipping, nor AdamW's scaling is in the new control variate."""

    def correct(parameters: list[nn.Parameter]) -> ControlVariate:
        return ControlVariate(parameters, [x + 0.5 for x in zeros(parameters)], [x - 0.2 for x in zeros(parameters)])

    trained, raw, correction = train(correct)
    assert isinstance(correction, ControlVariate)
    means = [torch.stack(steps).mean(0) for steps in zip(*raw, strict=True)]
    torch.testing.assert_close(correction.new_own(), means, rtol=1e-5, atol=1e-7)
    assert not torch.equal(trained[0], train(None)[0][0])


def test_the_correction_adds_common_and_takes_own_away() -> None:
    parameters, loss = small_net()
    own, common = ([torch.full(p.shape, value, dtype=torch.float64) for p in parameters] for value in (0.75, 0.25))
    variate = ControlVariate(parameters, own, common)
    loss().backward()
    raw = [parameter.grad.clone() for parameter in parameters]
    variate.correct()
    assert all(torch.equal(p.grad, gradient - 0.5) for p, gradient in zip(parameters, raw, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(variate.new_own(), raw, strict=True))
    assert all(new.dtype == torch.float32 and not new.requires_grad for new in variate.new_own())


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.0)],
    ids=["momentum", "AdamW"],
)
def test_the_optimum_is_a_fixed_point_of_scaffold_under_any_optimiser(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """Sites' gradients there are no zeros but sum to zero: with their control variates no site moves."""
    start, pulls = torch.tensor([0.5, -1.0]), torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    for corrected in (True, False):
        for pull in pulls:
            parameter = nn.Parameter(start.clone())
            step = optimizer([parameter])
            variate = ControlVariate([parameter], [pull if corrected else pull * 0], [pull * 0])
            for _ in range(3):
                step.zero_grad()
                (parameter * pull).sum().backward()
                variate.correct()
                step.step()
            assert torch.equal(parameter, start) == corrected
            assert torch.equal(variate.new_own()[0], pull)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    proximal = Proximal([used, idle], 0.1)
    variate = ControlVariate([used, idle], [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)])
    (used * 2).sum().backward()
    proximal.correct()
    variate.correct()
    assert idle.grad is None
    assert variate.new_own()[1].tolist() == [0, 0, 0]


def test_what_does_not_fit_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    right, wrong = [torch.zeros(2), torch.zeros(3)], [torch.zeros(2), torch.zeros(1)]  # the last would broadcast
    with pytest.raises(TrainingError, match="SCAFFOLD's own control variate is of another selection: begin a new run"):
        ControlVariate(parameters, wrong, right)
    with pytest.raises(TrainingError, match="SCAFFOLD's common control variate"):
        ControlVariate(parameters, right, right[:1])
    with pytest.raises(TrainingError, match=r"set learning\.local_steps to 1 or more"):
        ControlVariate(parameters, right, right).new_own()
