"""Which pairs an SSO variant compares, under which prompt, and how the terms are combined.

The three contexts of a query are data, not three copies of the code: a `Term` says "under this
context, prefer this response to that one", an objective is a list of terms and a rule that
combines them, and one loop evaluates the list. `Objective.sequences` follows from the terms, so
nothing else is ever computed.

| context | prompt | | response | sampled from |
|---|---|---|---|---|
| `query` | x | | `original` | x  (yo) |
| `good` | x+ = x with the good principle | | `good` | x+ (y+) |
| `bad` | x- = x with the bad principle | | `bad` | x- (y-) |

Simplifications against the papers: none in the formulas. Averages are over the batch; every
example counts once whatever its length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sso_lightning.errors import InputError
from sso_lightning.losses import IPO, PairLogps, PreferenceLoss

Sequence = tuple[str, str]
"""A (context, response) pair."""


@dataclass(frozen=True)
class ContrastLogps:
    """What one model says of a batch of records.

    Attributes:
        logps: (context, response) to summed log-probabilities in nats, shape `[batch]`.
        lengths: Response to its number of tokens, end-of-turn included, shape `[batch]`.
        tokens: (context, response) to the log-probability of every token, shape
            `[batch, longest]` with zeros at the end, for an objective's `token_sequences` only.
    """

    logps: Mapping[Sequence, Tensor]
    lengths: Mapping[str, Tensor]
    tokens: Mapping[Sequence, Tensor] = field(default_factory=dict)

    def pair(self, context: str, chosen: str, rejected: str) -> PairLogps:
        """The two responses under one context, as a preference loss takes them."""
        return PairLogps(
            self.logps[context, chosen],
            self.logps[context, rejected],
            self.lengths[chosen],
            self.lengths[rejected],
        )

    def mean(self, context: str, response: str) -> Tensor:
        """Per-token mean log-probability of a response, nats per token, shape `[batch]`."""
        logps = self.logps[context, response]
        wide = logps if logps.dtype in (torch.float32, torch.float64) else logps.float()
        return wide / self.lengths[response]


@dataclass(frozen=True)
class Term:
    """Under `context`, `chosen` is preferred to `rejected`; `name` is used in metrics."""

    name: str
    context: str
    chosen: str
    rejected: str


BASE = Term("query", "query", "good", "bad")
STEER_GOOD = Term("good", "good", "good", "bad")
# yo, not y-: training L(x-, y-, y+) would make the bad principle a back door that pulls y-
# off-policy, with yo the bad prompt is held near the policy's own distribution
STEER_BAD = Term("bad", "bad", "original", "good")


class Objective(ABC):
    """Base class of objectives; subclass it and name the class in the YAML to plug in your own.

    Attributes:
        base: The pair loss L used in every term.
        terms: The pairs this objective compares.
    """

    base: PreferenceLoss
    terms: tuple[Term, ...]
    token_sequences: tuple[Sequence, ...] = ()
    """Sequences whose log-probabilities are needed token by token."""

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The (context, response) sequences that must be scored, each once, in term order."""
        named = [(t.context, r) for t in self.terms for r in (t.chosen, t.rejected)]
        return tuple(dict.fromkeys(named))

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are used at all."""
        return self.base.needs_reference

    @abstractmethod
    def combine(
        self, losses: Mapping[str, Tensor], policy: ContrastLogps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Combine the terms.

        Args:
            losses: Term name to per-example losses, shape `[batch]`.
            policy: The policy's log-probabilities, with gradient.

        Returns:
            Per-example objective `[batch]`, and further detached metrics (may be empty).
        """

    def __call__(
        self, policy: ContrastLogps, reference: ContrastLogps | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of a batch.

        Args:
            policy: Log-probabilities of the model in training for all `sequences`.
            reference: The same of the reference; None is allowed if the base loss needs none.

        Returns:
            The mean over the batch (scalar, nats or nats squared as the base loss has it), and
            detached scalars: `loss_<term>`, and per term `reward_accuracy_<term>` (share of
            pairs with a positive implicit reward margin) and `reward_margin_<term>`; for IPO
            `ipo_margin` (mean h of the first term) and `ipo_progress` (h over its target).
        """
        losses, metrics = {}, {}
        for term in self.terms:
            key = (term.context, term.chosen, term.rejected)
            pair = policy.pair(*key)
            frozen = reference.pair(*key) if reference and self.base.needs_reference else None
            losses[term.name] = self.base(pair, frozen)
            margin = self.base.rewards(pair, frozen).margin
            metrics[f"loss_{term.name}"] = losses[term.name].detach().mean()
            metrics[f"reward_accuracy_{term.name}"] = (margin > 0).to(margin.dtype).mean()
            metrics[f"reward_margin_{term.name}"] = margin.mean()
        if isinstance(self.base, IPO):
            h = metrics[f"reward_margin_{self.terms[0].name}"] / self.base.beta
            metrics |= {"ipo_margin": h, "ipo_progress": h / self.base.target}
        total, further = self.combine(losses, policy)
        return total.mean(), metrics | further


class Contrastive(Objective):
    """Plain preference training on (x, y+, y-): the PBAA baseline and the 2025 policy step."""

    def __init__(self, base: PreferenceLoss) -> None:
        """Set the objective up.

        Args:
            base: The pair loss.
        """
        self.base = base
        self.terms = (BASE,)

    def combine(
        self, losses: Mapping[str, Tensor], policy: ContrastLogps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L(x, y+, y-)."""
        return losses["query"], {}


class SelfSteering(Objective):
    """The 2024 objective (arXiv 2410.17131, eq. 4 to 7): one model, iterated.

        G     = L(x+, y+, y-) + L(x-, yo, y+)
        W     = sigmoid(-(alpha avg(y+|x) + (1 - alpha) avg(y-|x)))
        all      : W * (L(x, y+, y-) + steering * G)
        steering : L(x, y+, y-) + W * steering * G

    avg <= 0, so W lies in [0.5, 1). Undetached, its gradient also raises avg(y+|x) and avg(y-|x):
    a pull towards on-policy data. The paper's ablation table fits only scope "all".
    """

    def __init__(
        self,
        base: PreferenceLoss,
        alpha: float = 0.66,
        steering: float = 0.1,
        weight: bool = True,
        scope: Literal["all", "steering"] = "all",
        detach_weight: bool = False,
    ) -> None:
        """Set the objective up.

        Args:
            base: The pair loss (the paper: IPO with beta 0.2).
            alpha: Share of y+ in the weight W, in [0, 1].
            steering: Factor g of the steering term; 0 is the ablation "without G", and then the
                two steering contexts are not even scored.
            weight: Whether W is used; false is the ablation "without W" (weight 1).
            scope: What W acts on: every term (the authors' first release, fits the paper), or
                the steering term only (their later release).
            detach_weight: Stop the gradient through W.
        """
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"SelfSteering alpha must be in [0, 1], got {alpha}")
        if not (math.isfinite(steering) and steering >= 0.0):
            raise InputError(f"SelfSteering steering must be 0 or more, got {steering}")
        if scope not in ("all", "steering"):
            raise InputError(f"SelfSteering scope must be all or steering, got {scope!r}")
        self.base = base
        self.alpha = float(alpha)
        self.steering = float(steering)
        self.weight = weight
        self.scope = scope
        self.detach_weight = detach_weight
        self.terms = (BASE, STEER_GOOD, STEER_BAD) if steering else (BASE,)

    def on_policy_weight(self, policy: ContrastLogps) -> Tensor:
        """W of each example, shape `[batch]`."""
        good, bad = policy.mean("query", "good"), policy.mean("query", "bad")
        return torch.sigmoid(-(self.alpha * good + (1.0 - self.alpha) * bad))

    def combine(
        self, losses: Mapping[str, Tensor], policy: ContrastLogps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        steer = torch.zeros_like(losses["query"])
        if self.steering:
            steer = self.steering * (losses["good"] + losses["bad"])
        if not self.weight:
            return losses["query"] + steer, {}
        w = self.on_policy_weight(policy)
        seen = w.detach()
        metrics = {
            "weight_mean": seen.mean(),
            "weight_std": seen.std(correction=0),
            "weight_min": seen.min(),
            "weight_max": seen.max(),
        }
        w = seen if self.detach_weight else w
        if self.scope == "all":
            return w * (losses["query"] + steer), metrics
        return losses["query"] + w * steer, metrics


class DataGenerator(Objective):
    """The 2025 objective (arXiv 2410.17131v2, eq. 1 to 4): trains the model that makes the data.

        L+ = L(x+, y+, y-) + sft * NLL(y+|x+)
        L- = L(x-, yo, y+) + sft * NLL(yo|x-)         NLL = -avg

    The mean of L+ + L- over the batch. The policy is then trained with `Contrastive` on pairs
    the generator samples.
    """

    def __init__(
        self,
        base: PreferenceLoss,
        sft: float = 0.1,
        bad: Literal["original", "bad"] = "original",
        terms: Literal["both", "good", "bad"] = "both",
    ) -> None:
        """Set the objective up.

        Args:
            base: The pair loss (the paper: DPO with beta 0.1).
            sft: Factor gamma of the negative log-likelihood of each term's chosen response.
            bad: The response that L- prefers: yo, or y- for the ablation.
            terms: L+ and L-, or one of them for the ablations.
        """
        if not (math.isfinite(sft) and sft >= 0.0):
            raise InputError(f"DataGenerator sft must be 0 or more, got {sft}")
        if bad not in ("original", "bad"):
            raise InputError(f"DataGenerator bad must be original or bad, got {bad!r}")
        chosen = {
            "both": (STEER_GOOD, Term("bad", "bad", bad, "good")),
            "good": (STEER_GOOD,),
            "bad": (Term("bad", "bad", bad, "good"),),
        }
        if terms not in chosen:
            raise InputError(f"DataGenerator terms must be both, good or bad, got {terms!r}")
        self.base = base
        self.sft = float(sft)
        self.terms = chosen[terms]

    def combine(
        self, losses: Mapping[str, Tensor], policy: ContrastLogps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        nll = {t.name: -policy.mean(t.context, t.chosen) for t in self.terms}
        total = torch.stack([losses[t.name] + self.sft * nll[t.name] for t in self.terms]).sum(0)
        return total, {f"nll_{name}": value.detach().mean() for name, value in nll.items()}


class Anchored(Objective):
    """EXPERIMENTAL, our own: hold the bad context in place instead of training it.

        L(x, y+, y-) + bad_anchor * A(x-, y-) + good_anchor * A(x+, y+)

    A(c, y) keeps the policy's log-probabilities of y under c near the reference's, which under
    `pairs.reference: previous` is the policy that sampled y. Training L(x, y+, y-) alone moves all
    contexts and wears out the principles; an anchor preserves them, where the steering term of
    `SelfSteering` trains them. With d = log p_ref - log p per token, averaged over the tokens of y:

        square : 3 mean(d)^2, from sequence log-probabilities alone
        k3     : mean(exp(d) - 1 - d), Schulman's estimate of KL(policy || reference)
                 (http://joschu.net/blog/kl-approx.html), from those of every token

    Both vanish at the reference together with their gradients, which a likelihood term does not.
    Needs neither yo nor the two steering contrasts. Not from the papers and not known to hold for
    large models; `benchmarks/results/` has what was measured.
    """

    def __init__(
        self,
        base: PreferenceLoss,
        bad_anchor: float = 1.0,
        good_anchor: float = 0.0,
        form: Literal["square", "k3"] = "square",
    ) -> None:
        """Set the objective up.

        Args:
            base: The pair loss; one that is bounded below, such as IPO, can be held.
            bad_anchor: Factor of the anchor on (x-, y-).
            good_anchor: Factor of the anchor on (x+, y+).
            form: How an anchor measures the distance.
        """
        factors = {"bad": bad_anchor, "good": good_anchor}
        for name, value in factors.items():
            if not (math.isfinite(value) and value >= 0.0):
                raise InputError(f"Anchored {name}_anchor must be 0 or more, got {value}")
        if form not in ("square", "k3"):
            raise InputError(f"Anchored form must be square or k3, got {form!r}")
        self.base = base
        self.form = form
        self.terms = (BASE,)
        self.anchors = {name: float(value) for name, value in factors.items() if value}
        held = tuple((name, name) for name in self.anchors)
        self.token_sequences = held if form == "k3" else ()

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The pair under the plain prompt, and what is held."""
        return (*super().sequences, *((name, name) for name in self.anchors))

    @property
    def needs_reference(self) -> bool:
        """An anchor does, whatever the pair loss needs."""
        return bool(self.anchors) or self.base.needs_reference

    def distance(self, policy: ContrastLogps, reference: ContrastLogps, name: str) -> Tensor:
        """A(c, y) of each example, shape `[batch]`, nats (square: nats squared)."""
        at = (name, name)
        if self.form == "square":
            return 3.0 * (reference.mean(*at) - policy.mean(*at)).square()
        # padding is 0 in both, so that it adds exp(0) - 1 - 0
        d = reference.tokens[at] - policy.tokens[at]
        return (d.expm1() - d).sum(-1) / policy.lengths[name]

    def combine(
        self, losses: Mapping[str, Tensor], policy: ContrastLogps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L(x, y+, y-); the anchors are added by `__call__`, as they read the reference."""
        return losses["query"], {}

    def __call__(
        self, policy: ContrastLogps, reference: ContrastLogps | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class; further metrics `anchor_<context>`: the mean distance of each."""
        total, metrics = super().__call__(policy, reference)
        for name, factor in self.anchors.items():
            if reference is None:
                raise InputError("Anchored needs the reference's log-probabilities")
            distance = self.distance(policy, reference, name).mean()
            metrics[f"anchor_{name}"] = distance.detach()
            total = total + factor * distance
        return total, metrics
