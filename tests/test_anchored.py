"""The anchored objective: its distances by hand, its gradient, and a run that stores tokens."""

import csv
import json
import math

import pytest
import torch
import yaml

from sso_lightning.errors import InputError
from sso_lightning.losses import IPO, SimPO
from sso_lightning.objectives import Anchored, ContrastLogps
from sso_lightning.records import load_records, write_records
from sso_lightning.scoring import Tree, response_logps, token_logps

PAIR = (("query", "good"), ("query", "bad"))
LENGTHS = {"good": torch.tensor([2, 2]), "bad": torch.tensor([3, 1])}


def logps(shift=0.0, bad=((-1.0, -2.0, -3.0), (-4.0, 0.0, 0.0))):
    """Two examples; y- has three tokens and one. `shift` is added to every real token of y-."""
    real = torch.arange(3) < LENGTHS["bad"][:, None]
    tokens = (torch.tensor(bad, dtype=torch.float64) + shift) * real
    plain = {key: torch.tensor([-2.0, -3.0], dtype=torch.float64) for key in PAIR}
    good = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    return ContrastLogps(
        {**plain, ("bad", "bad"): tokens.sum(-1), ("good", "good"): good},
        LENGTHS,
        {("bad", "bad"): tokens},
    )


def test_square_worked_by_hand():
    """log-ratios of y- are .3 in three tokens and of one: means .3 and .3, so 3 * .09 both."""
    loss = Anchored(IPO(beta=5.0), bad_anchor=2.0)
    base, _ = Anchored(IPO(beta=5.0), bad_anchor=0.0)(logps(0.3), logps())
    total, metrics = loss(logps(0.3), logps())
    assert total - base == pytest.approx(2.0 * 3 * 0.09)
    assert metrics["anchor_bad"] == pytest.approx(0.27)
    # a mean over tokens, not over the sum: opposite moves of two tokens cancel
    moved = logps(bad=((-1.5, -1.5, -3.0), (-4.0, 0.0, 0.0)))
    assert loss.distance(moved, logps(), "bad").tolist() == pytest.approx([0.0, 0.0])


def test_k3_worked_by_hand():
    """d = -.3 in every token: exp(-.3) - 1 + .3; opposite moves of two tokens do not cancel."""
    loss = Anchored(IPO(beta=5.0), form="k3")
    one = math.exp(-0.3) - 1 + 0.3
    assert loss.distance(logps(0.3), logps(), "bad").tolist() == pytest.approx([one, one])
    moved = logps(bad=((-1.5, -1.5, -3.0), (-4.0, 0.0, 0.0)))
    both = (math.exp(0.5) - 1 - 0.5 + math.exp(-0.5) - 1 + 0.5) / 3
    assert loss.distance(moved, logps(), "bad").tolist() == pytest.approx([both, 0.0])


@pytest.mark.parametrize("form", ["square", "k3"])
def test_an_anchor_vanishes_at_the_reference_with_its_gradient(form):
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    distance = Anchored(IPO(), form=form).distance(logps(shift), logps(), "bad").sum()
    distance.backward()
    assert distance.item() == 0
    assert shift.grad == 0


def test_k3_estimates_the_divergence():
    """Over tokens drawn from the policy, mean(exp(d) - 1 - d) is KL(policy || reference)."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p.log_softmax(0), q.log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)[None]
    key, lengths = {("bad", "bad"): torch.zeros(1)}, {"bad": torch.tensor([drawn.shape[1]])}
    ours = Anchored(IPO(), form="k3").distance(
        ContrastLogps(key, lengths, {("bad", "bad"): p[drawn]}),
        ContrastLogps(key, lengths, {("bad", "bad"): q[drawn]}),
        "bad",
    )
    assert ours.item() == pytest.approx(exact.item(), rel=0.02)


def test_only_what_is_held_is_scored():
    assert Anchored(IPO()).sequences == (*PAIR, ("bad", "bad"))
    assert Anchored(IPO(), good_anchor=0.1).sequences == (*PAIR, ("bad", "bad"), ("good", "good"))
    assert Anchored(IPO(), bad_anchor=0.0).sequences == PAIR
    assert Anchored(IPO()).token_sequences == ()
    assert Anchored(IPO(), form="k3").token_sequences == (("bad", "bad"),)
    assert Anchored(SimPO()).needs_reference
    assert not Anchored(SimPO(), bad_anchor=0.0).needs_reference


def test_it_goes_with_a_loss_that_needs_no_reference():
    total, _ = Anchored(SimPO(), bad_anchor=1.0)(logps(0.3), logps())
    plain, _ = Anchored(SimPO(), bad_anchor=0.0)(logps(0.3))
    assert total - plain == pytest.approx(0.27)
    with pytest.raises(InputError, match="reference"):
        Anchored(SimPO())(logps())


@pytest.mark.parametrize("wrong", [{"bad_anchor": -1}, {"good_anchor": math.nan}, {"form": "kl"}])
def test_wrong_settings(wrong):
    with pytest.raises(InputError, match="Anchored"):
        Anchored(IPO(), **wrong)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_tokens_sum_to_the_sequence(architecture, tiny_model):
    """Also as plain rows, which are scored longest first."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    large = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    large |= {"num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 50}
    settings = small if architecture == "gpt2" else large
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    trees = [Tree([1, 2], [[3], [4, 5, 6], []]), Tree([7], [[8, 9]])]
    sums, lengths = response_logps(model, trees)
    parts = token_logps(model, trees, max_tokens=4)
    assert [len(part) for part in parts] == lengths.tolist() == [1, 3, 0, 2]
    assert torch.stack([part.sum() for part in parts]).tolist() == pytest.approx(sums.tolist())
    plain = model(torch.tensor([[1, 2, 4, 5, 6]])).logits[0].log_softmax(-1)
    want = [plain[i, token].item() for i, token in ((1, 4), (2, 5), (3, 6))]
    assert parts[1].tolist() == pytest.approx(want)


def test_a_run_stores_tokens_and_starts_at_no_distance(tiny_model, tmp_path, sso):
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds."} for i in range(5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ipo = {"class_path": "IPO", "init_args": {"beta": 5.0}}
    anchored = {"base": ipo, "form": "k3", "good_anchor": 0.1}
    sampler = {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 6}}
    principles = {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}}
    settings = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(tmp_path / "run"),
        },
        "model": {
            "policy": {"path": str(tiny_model)},
            "objective": {"class_path": "Anchored", "init_args": anchored},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"queries": str(tmp_path / "q.jsonl"), "batch_size": 2},
        "pairs": {"sampler": sampler, "principles": principles},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = sso("fit", "--config", tmp_path / "c.yaml")
    assert status == 0, err
    records = load_records(tmp_path / "run" / "pairs" / "iteration-00")
    for record in records:
        assert record.token_scores.keys() == {"policy/bad/bad", "policy/good/good"}
        for key, values in record.token_scores.items():
            assert len(values) == len(record.response_ids[key.rpartition("/")[2]])
            assert sum(values) == pytest.approx(record.scores[key])
    write_records(tmp_path / "copy.jsonl", records)
    assert load_records(tmp_path / "copy.jsonl") == records
    with (tmp_path / "run" / "metrics.csv").open() as file:
        distances = [float(r["train/anchor_bad"]) for r in csv.DictReader(file) if r["train/loss"]]
    assert distances[0] == pytest.approx(0.0, abs=1e-12)
    assert max(distances) > 1e-9
    # all that is scored can be stored for the report; what is trained on is the same
    settings["trainer"]["default_root_dir"] = str(tmp_path / "more")
    settings["pairs"]["token_scores"] = True
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert sso("fit", "--config", tmp_path / "c.yaml")[0] == 0
    for record, other in zip(
        load_records(tmp_path / "more/pairs/iteration-00"), records, strict=True
    ):
        assert record.token_scores.keys() == record.scores.keys() == other.scores.keys()
        assert len(record.scores) == 8
        for key, values in record.token_scores.items():
            assert sum(values) == pytest.approx(record.scores[key])
    ends = [torch.load(tmp_path / n / "checkpoints/last.ckpt") for n in ("run", "more")]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name])
