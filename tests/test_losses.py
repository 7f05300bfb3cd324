"""Losses and objectives: golden numbers, numbers worked out by hand, and extreme inputs."""

import json
import math
from pathlib import Path

import pytest
import torch

from sso_lightning.losses import DPO, IPO, ORPO, Hinge, PairLogps, PreferenceLoss, SimPO
from sso_lightning.objectives import Contrastive, ContrastLogps, DataGenerator, SelfSteering

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
NAMES = {"sigmoid": DPO, "ipo": IPO, "hinge": Hinge, "simpo": SimPO, "orpo": ORPO}
CONTEXTS = {"x": "query", "xgood": "good", "xbad": "bad"}
ALL_LOSSES = [DPO(), DPO(label_smoothing=0.1), IPO(), Hinge(), SimPO(), ORPO()]


def golden_logps(case: dict, who: str) -> ContrastLogps:
    """The `who_<context>_<response>` columns of a case as float64 leaves."""
    logps = {}
    for key, values in case.items():
        if key.startswith(who + "_"):
            _, context, response = key.split("_")
            leaf = torch.tensor(values, dtype=torch.float64, requires_grad=who == "policy")
            logps[CONTEXTS[context], response] = leaf
    lengths = {
        r: torch.tensor(case[f"len_{r}"], dtype=torch.float64) for r in ("good", "bad", "original")
    }
    return ContrastLogps(logps, lengths)


def golden_objective(case: dict):
    base = NAMES[case["loss"]](beta=case["beta"])
    if case.get("objective") == "generator":
        return DataGenerator(base, sft=case["gamma"], bad=case["bad_response"])
    return SelfSteering(
        base,
        alpha=case["alpha"],
        steering=case["G_beta"],
        weight=case["W"],
        scope=case["scope"] or "all",
        detach_weight=case["detach_weight"],
    )


def test_golden_file_is_whole():
    assert len(GOLDEN) == 50


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['loss']}-{c.get('scope')}")
def test_golden(case):
    policy, reference = golden_logps(case, "policy"), golden_logps(case, "reference")
    objective = golden_objective(case)
    loss, metrics = objective(policy, reference)
    assert loss.item() == pytest.approx(case["expected"]["loss"], abs=1e-9, rel=1e-9)
    loss.backward()
    expected_grads = case["expected"]["grad"]
    for (context, response), leaf in policy.logps.items():
        short = {v: k for k, v in CONTEXTS.items()}[context]
        expected = expected_grads.get(f"policy_{short}_{response}", [0.0] * len(leaf))
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(
            grad, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9
        )
    if "rewards/margins" in case["expected"]:
        expected = case["expected"]
        assert metrics["reward_margin_query"].item() == pytest.approx(expected["rewards/margins"])
        assert metrics["reward_accuracy_query"].item() == expected["rewards/accuracies"]


def pair(chosen, rejected, n_chosen=1, n_rejected=1) -> PairLogps:
    as_tensor = [torch.tensor([float(v)], dtype=torch.float64) for v in (chosen, rejected)]
    lengths = [torch.tensor([n]) for n in (n_chosen, n_rejected)]
    return PairLogps(*as_tensor, *lengths)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # policy -4 over 2 tokens and -9 over 3; reference -5 and -8: sums h = 5 - 3 = 2
        (DPO(beta=0.5), math.log(1 + math.exp(-1.0))),
        # 0.9 log(1 + e^-1) + 0.1 log(1 + e^1)
        (
            DPO(beta=0.5, label_smoothing=0.1),
            0.9 * math.log(1 + math.exp(-1.0)) + 0.1 * math.log(1 + math.e),
        ),
        (Hinge(beta=0.25), 1 - 0.25 * 2),
        (Hinge(beta=1.0), 0.0),
        # means: policy -2 and -3, reference -2.5 and -8/3: h = 1 - 1/6 = 5/6, target 1/(2*0.5) = 1
        (IPO(beta=0.5), (5 / 6 - 1) ** 2),
        # 2 * (-2 + 3) - 0.5 = 1.5
        (SimPO(beta=2.0, gamma=0.5), math.log(1 + math.exp(-1.5))),
        # odds e^-2/(1-e^-2) = 0.156518, e^-3/(1-e^-3) = 0.052396; their ratio 2.98722
        (ORPO(beta=0.1), 2.0 + 0.1 * math.log(1 + 1 / 2.98722)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, PreferenceLoss) else "",
)
def test_losses_by_hand(loss, expected):
    policy, reference = pair(-4, -9, 2, 3), pair(-5, -8, 2, 3)
    assert loss(policy, reference).tolist() == pytest.approx([expected], abs=1e-6)


def contrast(**values) -> ContrastLogps:
    """contrast(query_good=-4, ...) with lengths good 2, bad 4, original 1."""
    logps = {
        tuple(k.split("_")): torch.tensor([float(v)], dtype=torch.float64)
        for k, v in values.items()
    }
    lengths = {"good": torch.tensor([2]), "bad": torch.tensor([4]), "original": torch.tensor([1])}
    return ContrastLogps(logps, lengths)


POLICY = dict(query_good=-4, query_bad=-4, good_good=-2, good_bad=-8, bad_original=-1, bad_good=-6)
EVEN = dict.fromkeys(POLICY, 0.0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # hinge, beta 0.1, reference 0: base h = 0 -> 1; good h = 6 -> 0.4; bad h = 5 -> 0.5
        # G = 0.9; avg(y+|x) = -2, avg(y-|x) = -1; W = sigmoid(0.5 * 2 + 0.5 * 1) = sigmoid(1.5)
        ({"scope": "all"}, 1 / (1 + math.exp(-1.5)) * (1 + 0.1 * 0.9)),
        ({"scope": "steering"}, 1 + 1 / (1 + math.exp(-1.5)) * 0.1 * 0.9),
        ({"weight": False}, 1.09),
        ({"steering": 0.0}, 1 / (1 + math.exp(-1.5))),
        ({"steering": 0.0, "scope": "steering"}, 1.0),
        ({"steering": 0.0, "weight": False}, 1.0),
    ],
)
def test_self_steering_by_hand(settings, expected):
    objective = SelfSteering(Hinge(0.1), alpha=0.5, **{"steering": 0.1, **settings})
    loss, _ = objective(contrast(**POLICY), contrast(**EVEN))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_without_both_is_pbaa():
    both_off = SelfSteering(IPO(0.2), steering=0.0, weight=False)
    pbaa = Contrastive(IPO(0.2))
    assert both_off.sequences == pbaa.sequences == (("query", "good"), ("query", "bad"))
    policy, even = contrast(**POLICY), contrast(**EVEN)
    assert both_off(policy, even)[0].item() == pbaa(policy, even)[0].item()


def test_generator_by_hand():
    # hinge terms 0.4 and 0.5 as above; NLL(y+|x+) = 2/2 = 1, NLL(yo|x-) = 1/1 = 1
    policy, even = contrast(**POLICY), contrast(**EVEN)
    for terms, expected in (("both", 0.9 + 0.2), ("good", 0.5), ("bad", 0.6)):
        loss, _ = DataGenerator(Hinge(0.1), sft=0.1, terms=terms)(policy, even)
        assert loss.item() == pytest.approx(expected)


def test_sequences_are_exactly_what_is_read():
    full = SelfSteering(IPO()).sequences
    assert full == (
        ("query", "good"),
        ("query", "bad"),
        ("good", "good"),
        ("good", "bad"),
        ("bad", "original"),
        ("bad", "good"),
    )
    assert len(DataGenerator(DPO()).sequences) == 4
    assert DataGenerator(DPO(), terms="bad", bad="bad").sequences == (
        ("bad", "bad"),
        ("bad", "good"),
    )


def test_weight_gradient_pulls_on_policy():
    policy = contrast(**POLICY)
    for leaf in policy.logps.values():
        leaf.requires_grad_()
    # hinge at zero loss slope: beta so large that only W carries gradient would be 0 * dW; use IPO
    SelfSteering(IPO(0.2), steering=0.0)(policy, contrast(**EVEN))[0].backward()
    attached = policy.logps["query", "good"].grad.clone()
    policy.logps["query", "good"].grad = None
    SelfSteering(IPO(0.2), steering=0.0, detach_weight=True)(policy, contrast(**EVEN))[0].backward()
    detached = policy.logps["query", "good"].grad
    # dW/davg(y+) = -alpha W (1 - W) < 0 and L > 0: descending the loss raises logp(y+|x) further
    assert attached.item() < detached.item()


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("beta", [1e-3, 10.0])
@pytest.mark.parametrize("length", [1, 1000])
@pytest.mark.parametrize("logps", [(-1e4, -1e-7), (-1e-7, -1e4), (0.0, -1e4), (0.0, 0.0)])
def test_extremes_are_finite(loss, beta, length, logps):
    loss = type(loss)(beta=beta)
    n = torch.full((1,), length)
    chosen, rejected = (torch.tensor([v], requires_grad=True) for v in logps)
    policy = PairLogps(chosen, rejected, n, n)
    reference = PairLogps(torch.tensor([-1e4]), torch.tensor([0.0]), n, n)
    values = loss(policy, reference)
    values.sum().backward()
    assert values.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda v: type(v).__name__)
def test_half_precision_is_computed_in_float32(loss):
    low = [torch.tensor([v], dtype=torch.bfloat16) for v in (-200.0, -204.0, -198.0, -206.0)]
    n = torch.tensor([7])

    def both(cast):
        p, q = (cast(low[i]) for i in (0, 1)), (cast(low[i]) for i in (2, 3))
        return loss(PairLogps(*p, n, n), PairLogps(*q, n, n))

    half, full = both(lambda t: t), both(lambda t: t.float())
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
    policy = contrast(**POLICY)
    as_half = ContrastLogps({k: v.bfloat16() for k, v in policy.logps.items()}, policy.lengths)
    assert SelfSteering(IPO())(as_half, as_half)[0].dtype == torch.float32


def test_reference_free_losses_take_none():
    for loss in (SimPO(), ORPO()):
        assert loss(pair(-4, -9), None).shape == (1,)
    with pytest.raises(ValueError, match="needs the reference"):
        DPO()(pair(-4, -9), None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPO(beta=0.0),
        lambda: DPO(label_smoothing=0.5),
        lambda: IPO(beta=float("nan")),
        lambda: SimPO(gamma=float("inf")),
        lambda: SelfSteering(IPO(), alpha=1.5),
        lambda: SelfSteering(IPO(), steering=-1.0),
        lambda: SelfSteering(IPO(), scope="some"),
        lambda: DataGenerator(DPO(), sft=-0.1),
        lambda: DataGenerator(DPO(), terms="none"),
    ],
)
def test_settings_out_of_range_name_the_setting(make):
    with pytest.raises(ValueError, match=r"must be"):
        make()
