"""What FedProx and SCAFFOLD add to a site's gradients, so that its local steps drift less from the other sites'; and
what a site of a lower rank leaves out of them.

The first two work on any parameters with any optimiser. The order within a step is: backward, `correct()`, clip the
gradient norm, optimiser step. Clipping comes last, so that it bounds what the optimiser really takes; it is the raw
gradient that SCAFFOLD learns from, so that a clipped step does not teach it a shortened one. With both, SCAFFOLD goes
first.

Where a site trains by AdamW, the corrected gradient goes through its moments like any other. The closed forms of the
papers are for SGD; their idea, local gradients that add up to the global one, holds for any optimiser.

A parameter without a gradient (`.grad` is None) took no part in the step. It is left alone, as optimisers do.
"""

from collections.abc import Sequence

import torch
from torch.nn import Parameter

from fedsam_core.errors import TrainingError


class Proximal:
    """FedProx: adds the gradient of mu/2 ||x - x0||^2, x0 being the parameters that a round started from.

    Li et al. 2018, Federated Optimization in Heterogeneous Networks, arXiv 1812.06127, equation 2.
    """

    def __init__(self, parameters: Sequence[Parameter], mu: float) -> None:
        """Remembers the parameters as they are now. Without the term (mu = 0), build none: that is FedAvg."""
        self._parameters = list(parameters)
        self._starts = [parameter.detach().clone() for parameter in self._parameters]
        self.mu = mu

    @torch.no_grad()
    def correct(self) -> None:
        """Adds mu * (x - x0) to every gradient. After each backward pass, before clipping."""
        for parameter, start in zip(self._parameters, self._starts, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.mu)


class ControlVariate:
    """SCAFFOLD: replaces the site's usual gradient in every gradient by that of all sites.

    Karimireddy et al. 2020, SCAFFOLD, arXiv 1910.06378, algorithm 1. A site keeps `own` (c_i), the server `common`
    (c); both start at zero, which makes the first round FedAvg. After a round the site's new `own` is the mean of its
    raw gradients. For plain SGD that is the paper's option II (equation 4), c_i - c + (x - y_i) / (K * learning rate),
    which for any other optimiser has no meaning.

    What the server must do: c has to stay the mean of all sites' c_i, *with the weights that their updates have*. So
    the sum carries w_i * (new c_i - old c_i), and c grows by that sum over the total weight of all sites, those that
    were lost included (they keep their c_i, as does a site whose contribution was not in the opened sum).
    """

    def __init__(
        self, parameters: Sequence[Parameter], own: Sequence[torch.Tensor], common: Sequence[torch.Tensor]
    ) -> None:
        """For one round.

        Args:
            parameters: in an order of the caller's.
            own: the site's control variate, a tensor of the same shape for each parameter, any device and dtype.
            common: the server's, likewise.

        Raises:
            TrainingError: a control variate does not have the parameters' shapes.
        """
        self._parameters = list(parameters)
        for name, variate in (("own", own), ("common", common)):
            if [tensor.shape for tensor in variate] != [parameter.shape for parameter in self._parameters]:
                raise TrainingError(
                    f"SCAFFOLD's {name} control variate is of another selection: begin a new run, or resume with the "
                    "selection that it began with"
                )
        # The difference is taken before it is rounded to the gradient's dtype, and once for all steps.
        self._offsets = [
            (c.to(parameter.device, torch.float64) - c_i.to(parameter.device, torch.float64)).to(parameter.dtype)
            for parameter, c_i, c in zip(self._parameters, own, common, strict=True)
        ]
        self._sums = [
            torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in self._parameters
        ]
        self._steps = 0

    @torch.no_grad()
    def correct(self) -> None:
        """Notes every raw gradient, then adds common - own to it. After each backward pass, before clipping."""
        for parameter, offset, total in zip(self._parameters, self._offsets, self._sums, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad.add_(offset)
        self._steps += 1

    def new_own(self) -> list[torch.Tensor]:
        """The site's control variate after the round: the mean of the raw gradients over the steps seen.

        Returns:
            A tensor for each parameter, of its shape, on its device, float32 (float64 for float64 parameters).

        Raises:
            TrainingError: no step was seen.
        """
        if self._steps == 0:
            raise TrainingError("SCAFFOLD has seen no step: set learning.local_steps to 1 or more")
        return [total / self._steps for total in self._sums]


class Holes:
    """What a site of a lower rank does not have stays at zero: gradients there are set to zero."""

    def __init__(self, missing: Sequence[tuple[Parameter, torch.Tensor]]) -> None:
        """Parameters, and where (bool, of their shape) they are missing."""
        self._missing = list(missing)

    @torch.no_grad()
    def correct(self) -> None:
        """After all other corrections, before clipping."""
        for parameter, missing in self._missing:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(missing, 0.0)
