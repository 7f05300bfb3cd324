"""Preference losses L(x, y_w, y_l): pure functions of log-probabilities.

Every loss takes sequence log-probabilities in nats and returns one value per example, so who
averages over the batch is decided by the caller (`objectives`). Symbols: p = policy,
r = reference, w = chosen, l = rejected, and

    h = [log p(w) - log p(l)] - [log r(w) - log r(l)]

DPO, hinge (SLiC) and the reward margin read h from *summed* log-probabilities; IPO, SimPO and
ORPO read *per-token means* (sum divided by the number of response tokens).

Inputs below float32 are computed in float32; float64 stays float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sso_lightning.errors import InputError


@dataclass(frozen=True)
class PairLogps:
    """What one model says of a batch of (chosen, rejected) responses to the same prompts.

    Attributes:
        chosen: Summed log-probabilities of the chosen responses in nats, shape `[batch]`.
        rejected: The same for the rejected responses, shape `[batch]`.
        chosen_length: Response tokens that were summed, end-of-turn included, shape `[batch]`.
        rejected_length: The same for the rejected responses, shape `[batch]`.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    def exact(self) -> PairLogps:
        """The same pairs with half-precision log-probabilities widened to float32."""
        return PairLogps(
            _widen(self.chosen), _widen(self.rejected), self.chosen_length, self.rejected_length
        )

    def mean(self) -> PairLogps:
        """The same pairs as per-token means: nats per token, lengths unchanged."""
        wide = self.exact()
        return PairLogps(
            wide.chosen / self.chosen_length,
            wide.rejected / self.rejected_length,
            self.chosen_length,
            self.rejected_length,
        )

    def minus(self, other: PairLogps) -> PairLogps:
        """Log-ratios against `other`, lengths unchanged."""
        return PairLogps(
            self.chosen - other.chosen,
            self.rejected - other.rejected,
            self.chosen_length,
            self.rejected_length,
        )

    @property
    def margin(self) -> Tensor:
        """Chosen minus rejected, shape `[batch]`."""
        return self.chosen - self.rejected


def _widen(logps: Tensor) -> Tensor:
    return logps if logps.dtype in (torch.float32, torch.float64) else logps.float()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, eq. 7)."""
    # A mean log-probability of exactly 0 (a certain answer) has infinite odds: hold it one step off
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near_zero = x > -math.log(2.0)
    # each branch sees a harmless value where it is not chosen, or its NaN gradient would leak
    safe_near = torch.where(near_zero, x, torch.full_like(x, -0.5))
    safe_far = torch.where(near_zero, torch.full_like(x, -1.0), x)
    return torch.where(near_zero, (-torch.expm1(safe_near)).log(), torch.log1p(-safe_far.exp()))


class PreferenceLoss(ABC):
    """A loss over pairs; subclass it and name the class in the YAML to plug in your own.

    Attributes:
        needs_reference: Whether `reference` must be given.
        per_token: Whether log-probabilities enter as per-token means instead of sums.
    """

    needs_reference: bool = True
    per_token: bool = False
    beta: float

    def __call__(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Per-example losses.

        Args:
            policy: What the model in training says of the pairs.
            reference: What the frozen reference says; may be None for a reference-free loss.

        Returns:
            Losses of shape `[batch]`; the caller divides by the batch size.

        Raises:
            ValueError: If the loss needs a reference and got none.
        """
        return self.per_example(self._scale(policy, reference).exact())

    def rewards(self, policy: PairLogps, reference: PairLogps | None = None) -> PairLogps:
        """Implicit rewards of both responses: beta times what the loss compares, no gradient."""
        scale = self._scale(policy, reference).exact()
        return PairLogps(
            self.beta * scale.chosen.detach(),
            self.beta * scale.rejected.detach(),
            scale.chosen_length,
            scale.rejected_length,
        )

    def _scale(self, policy: PairLogps, reference: PairLogps | None) -> PairLogps:
        scores = policy.mean() if self.per_token else policy.exact()
        if not self.needs_reference:
            return scores
        if reference is None:
            raise ValueError(f"{type(self).__name__} needs the reference log-probabilities")
        return scores.minus(reference.mean() if self.per_token else reference.exact())

    @abstractmethod
    def per_example(self, scores: PairLogps) -> Tensor:
        """The loss of log-ratios (or of log-probabilities, where no reference is needed).

        Args:
            scores: Log-ratios against the reference, or the policy's log-probabilities if
                `needs_reference` is false; per-token means if `per_token`. Shape `[batch]`.

        Returns:
            Losses, shape `[batch]`.
        """


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be a positive number, got {value}")
    return float(value)


class DPO(PreferenceLoss):
    r"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)` with summed log-probabilities.

    >>> pair = PairLogps(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.ones(1), torch.ones(1))
    >>> even = PairLogps(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1))
    >>> DPO(beta=0.5)(pair, even)  # h = 2: log(1 + exp(-1))
    tensor([0.3133])
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        """Set the loss up.

        Args:
            beta: Strength of the pull towards the reference, per nat.
            label_smoothing: Assumed share e of wrong labels, in [0, 0.5)
                (conservative DPO, Mitchell 2023).
        """
        self.beta = _positive("DPO beta", beta)
        if not 0.0 <= label_smoothing < 0.5:
            raise InputError(f"DPO label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.label_smoothing = float(label_smoothing)

    def per_example(self, scores: PairLogps) -> Tensor:
        """See the class."""
        logits = self.beta * scores.margin
        e = self.label_smoothing
        loss = -(1 - e) * F.logsigmoid(logits)
        return loss - e * F.logsigmoid(-logits) if e else loss


class IPO(PreferenceLoss):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    `(h - 1 / (2 beta))^2` with per-token means, as the SSO authors train: the target of h is
    `1 / (2 beta)` nats *per token*, which is far beyond one iteration's movement at small beta.
    """

    per_token = True

    def __init__(self, beta: float = 0.1) -> None:
        """Set the loss up.

        Args:
            beta: Half the inverse of the target margin, in tokens per nat.
        """
        self.beta = _positive("IPO beta", beta)

    @property
    def target(self) -> float:
        """The margin h that has zero loss, in nats per token."""
        return 1.0 / (2.0 * self.beta)

    def per_example(self, scores: PairLogps) -> Tensor:
        """See the class."""
        return (scores.margin - self.target) ** 2


class Hinge(PreferenceLoss):
    """SLiC-style hinge on the DPO margin (Zhao et al. 2023, arXiv 2305.10425): max(0, 1 - beta h).

    With summed log-probabilities.
    """

    def __init__(self, beta: float = 0.1) -> None:
        """Set the loss up.

        Args:
            beta: Inverse of the margin at which the loss ends, per nat.
        """
        self.beta = _positive("Hinge beta", beta)

    def per_example(self, scores: PairLogps) -> Tensor:
        """See the class."""
        return torch.relu(1.0 - self.beta * scores.margin)


class SimPO(PreferenceLoss):
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6), reference-free.

    `-log sigmoid(beta (avg_w - avg_l) - gamma)` with per-token means of the policy alone.
    """

    needs_reference = False
    per_token = True

    def __init__(self, beta: float = 2.0, gamma: float = 0.5) -> None:
        """Set the loss up.

        Args:
            beta: Scale of the per-token log-probability difference.
            gamma: Reward margin that the chosen response must win by.
        """
        self.beta = _positive("SimPO beta", beta)
        if not math.isfinite(gamma):
            raise InputError(f"SimPO gamma must be a finite number, got {gamma}")
        self.gamma = float(gamma)

    def per_example(self, scores: PairLogps) -> Tensor:
        """See the class."""
        return -F.logsigmoid(self.beta * scores.margin - self.gamma)


class ORPO(PreferenceLoss):
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7), reference-free.

    `-avg_w - beta log sigmoid(logodds_w - logodds_l)`, `logodds = avg - log(1 - exp(avg))`.
    """

    needs_reference = False
    per_token = True

    def __init__(self, beta: float = 0.1) -> None:
        """Set the loss up.

        Args:
            beta: Weight of the odds-ratio term (lambda in the paper).
        """
        self.beta = _positive("ORPO beta", beta)

    def per_example(self, scores: PairLogps) -> Tensor:
        """See the class."""
        log_odds = scores.margin - (_log1mexp(scores.chosen) - _log1mexp(scores.rejected))
        return -scores.chosen - self.beta * F.logsigmoid(log_odds)
