"""RewardBench: its rules on numbers worked out by hand, and scores of real models."""

import json
import math

import pytest
import torch

from sso_lightning.errors import InputError
from sso_lightning.rewardbench import (
    SECTIONS,
    implicit_scorer,
    load_items,
    report_of,
    reward_scorer,
)


def rows_v1(*rows):
    return [
        {"id": i, "subset": subset, "prompt": f"Ask {i}?", "chosen": "Yes.", "rejected": "No."}
        for i, subset in enumerate(rows)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_version_1_by_hand(tmp_path):
    """Accuracies: alpacaeval-easy 1/2, mt-bench-med 1, math-prm 0, hep-go 1, hep-js 1/2 (equal
    scores are no win), shp 1.

    Chat (100 * 1/2 + 40 * 1) / 140 = 90/140 = 9/14.
    Reasoning (984 * 0 + 164 * 1 + 164 * 1/2) / (984 + 164 + 164) = 246/1312 = 3/16.
    Prior 1, half weight: total (9/14 + 3/16 + 1/2) / 2.5.
    """
    subsets = ["alpacaeval-easy"] * 2 + ["mt-bench-med", "math-prm", "hep-go"] + ["hep-js"] * 2
    items = load_items(write(tmp_path / "v1.jsonl", rows_v1(*subsets, "shp")))
    scores = [[2, 1], [1, 2], [-1, -3], [0.1, 0.2], [9, 0], [5, 5], [5, 4], [0.5, 0.4]]
    report = report_of(items, scores)
    assert report.sections["Chat"] == pytest.approx(9 / 14)
    assert report.sections["Reasoning"] == pytest.approx(3 / 16)
    assert report.total == pytest.approx((9 / 14 + 3 / 16 + 0.5) / 2.5)
    assert report.subsets["hep-js"] == (0.5, 2)
    assert not report.complete
    assert list(report.sections) == ["Chat", "Reasoning", "Prior Sets (0.5 weight)"]


def test_version_1_is_complete_with_all_subsets(tmp_path):
    subsets = [name for section in SECTIONS.values() for name in section]
    assert len(subsets) == 23
    # math weighs as much as the six code subsets together
    reasoning = SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(v for k, v in reasoning.items() if k.startswith("hep-"))
    items = load_items(write(tmp_path / "v1.jsonl", rows_v1(*subsets)))
    scores = [[0.0, 1.0] if item.subset == "math-prm" else [1.0, 0.0] for item in items]
    report = report_of(items, scores)
    assert report.complete
    assert report.sections == {"Chat": 1, "Chat Hard": 1, "Safety": 1, "Reasoning": 0.5}
    assert report.total == 0.875


def test_standard_errors_by_hand(tmp_path):
    """Two of four right: deviation sqrt(4 * .25 / 3), over sqrt(4): 1 / sqrt(12).

    mt-bench-easy 28 of 128 in Chat, alpacaeval-easy 100; Chat is one of two sections.
    """
    subsets = ["alpacaeval-easy"] * 4 + ["mt-bench-easy"] * 4 + ["hep-go"] * 2
    items = load_items(write(tmp_path / "v1.jsonl", rows_v1(*subsets)))
    report = report_of(items, [[1, 0], [0, 1]] * 4 + [[1, 0]] * 2)
    one = 1 / math.sqrt(12)
    assert report.errors["alpacaeval-easy"] == pytest.approx(one)
    assert report.errors["hep-go"] == 0
    chat = math.hypot(100 * one, 28 * one) / 128
    assert report.errors["Chat"] == pytest.approx(chat)
    assert report.errors["total"] == pytest.approx(chat / 2)
    alone = report_of(items[:5], [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    assert alone.errors["mt-bench-easy"] is alone.errors["Chat"] is alone.errors["total"] is None


TIES = [
    ("ref:0", ["r"], ["w", "w"]),
    ("tied:0", ["r", "r"], ["w"]),
    ("ref:1", ["r"], ["w"]),
    ("tied:1", ["r", "r", "r"], ["w"]),
]


def test_version_2_by_hand(tmp_path):
    """Math: the best is right (1), shared by two (1/2), by a wrong one alone (0): 1/2.

    Ties. Pair 0: the reference's gap is 5 - 3 = 2; the tied prompt's gap is 4 - 1 = 3, its spread
    6 - 4 = 2. Pair 1: gap of the reference 1 - 2 = -1; tied gap 1 - 0 = 1, spread 1.5 - 1 = .5.
    Tied prompts 2/2, references 1/2; tied gap > spread 2/2; both > spread 0/2 (2 is not above 2).
    tanh(2 / 2 - 1) = 0 and tanh(-1 / .5 - 1) = tanh(-3).
    .3 + .15 + .2 + 0 + .01 * tanh(-3) / 2 = .65 - .005 * .995055 = .645025.
    """
    rows = [
        {"subset": "Math", "prompt": "?", "chosen": ["r"], "rejected": ["w"] * 3, "id": str(i)}
        for i in range(3)
    ]
    rows += [
        {"subset": "Ties", "prompt": "?", "chosen": right, "rejected": wrong, "id": name}
        for name, right, wrong in TIES
    ]
    items = load_items(write(tmp_path / "v2.jsonl", rows))
    scores = [[4, 1, 2, 3], [4, 4, 2, 3], [1, 4, 2, 3]]
    scores += [[5, 3, -1], [6, 4, 1], [1, 2], [1.5, 1, 1.2, 0]]
    report = report_of(items, scores)
    assert report.version == 2
    assert report.subsets["Math"] == (0.5, 3)
    assert report.subsets["Ties"][0] == pytest.approx(0.645025, abs=1e-6)
    assert report.total == pytest.approx((0.5 + 0.645025) / 2, abs=1e-6)
    # Math: values 1, 1/2, 0, deviation 1/2, over sqrt(3). Ties by the jackknife: pair 0 alone is
    # .3 + .3 + .2 + 0 + .01 tanh(0) = .8, pair 1 alone .3 + 0 + .2 + 0 + .01 tanh(-3); of two
    # values the deviation is their distance over sqrt(2), and the error half their distance.
    math_error, ties_error = 0.5 / math.sqrt(3), (0.8 - (0.5 - 0.00995055)) / 2
    assert report.errors["Math"] == pytest.approx(math_error)
    assert report.errors["Ties"] == pytest.approx(ties_error, abs=1e-6)
    assert report.errors["total"] == pytest.approx(math.hypot(math_error, ties_error) / 2, abs=1e-6)
    assert not report.sections


@pytest.mark.parametrize(
    ("right", "last"), [([2.0, 2.0], 1.0), ([1.0, 1.0], 0.0), ([0.0, 0.0], -1.0)]
)
def test_equal_right_answers_have_no_spread(right, last, tmp_path):
    """Gap 1, 0 or -1 over a spread of 0: tanh's limit, and 0 for 0 / 0."""
    rows = [
        {"subset": "Ties", "prompt": "?", "chosen": ["r"] * n, "rejected": ["w"], "id": f"{kind}:0"}
        for kind, n in (("ref", 1), ("tied", 2))
    ]
    items = load_items(write(tmp_path / "v2.jsonl", rows))
    total = report_of(items, [[9.0, 0.0], [*right, 1.0]]).total
    won = 0.3 + 0.2 + 0.2 if right[0] > 1 else 0.0
    assert total == pytest.approx(0.3 + won + 0.01 * last)


BAD = {
    "no subset": ({"prompt": "?", "chosen": "a", "rejected": "b"}, "'subset' must be text"),
    "no prompt": ({"subset": "Math", "chosen": "a", "rejected": "b"}, "'prompt' must be text"),
    "a number": ({"subset": "s", "prompt": "?", "chosen": 3, "rejected": "b"}, "'chosen' must be"),
    "one list": ({"subset": "s", "prompt": "?", "chosen": ["a"], "rejected": "b"}, "'rejected'"),
    "two right ones": (
        {"subset": "Math", "prompt": "?", "chosen": ["a", "b"], "rejected": ["c"]},
        "only Ties have several",
    ),
    "a tie without its kind": (
        {"subset": "Ties", "prompt": "?", "chosen": ["a", "b"], "rejected": ["c"], "id": "7"},
        "must be ref:N or tied:N",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_row_is_named(name, tmp_path):
    row, says = BAD[name]
    with pytest.raises(InputError, match="line 1.*" + says):
        load_items(write(tmp_path / "x.jsonl", [row]))


def test_versions_do_not_mix_and_scores_are_finite(tmp_path):
    both = [
        *rows_v1("hep-go"),
        {"subset": "Math", "prompt": "?", "chosen": ["a"], "rejected": ["b"]},
    ]
    with pytest.raises(InputError, match="mixes rows of both versions"):
        load_items(write(tmp_path / "x.jsonl", both))
    items = load_items(write(tmp_path / "y.jsonl", rows_v1("hep-go")))
    with pytest.raises(InputError, match=r"line 1.*nan"):
        report_of(items, [[math.nan, 1.0]])


# -------------------------------------------------------------------------------------- the models


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two prompts with answers of different lengths."""
    rows = [
        {"subset": "hep-go", "prompt": "Name a bird.", "chosen": "A wren, small and brown.",
         "rejected": "No."},
        {"subset": "math-prm", "prompt": [{"role": "system", "content": "Be brief."},
         {"role": "user", "content": "2 + 2?"}], "chosen": "4", "rejected": "It is five, surely."},
    ]  # fmt: skip
    return write(tmp_path_factory.mktemp("bench") / "v1.jsonl", rows)


def flat(scores):
    return [score for own in scores for score in own]


def conversations(bench):
    for item in load_items(bench):
        for answer in item.answers:
            yield item.messages, {"role": "assistant", "content": answer}


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory):
    """The tiny model with a random head, as a folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    out = tmp_path_factory.mktemp("reward") / "model"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
    return out


def test_rewards_are_those_of_single_rows(reward_model, bench):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    expected = []
    for messages, answer in conversations(bench):
        ids = tokenizer.apply_chat_template(
            [*messages, answer], return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            expected.append(model(**ids).logits.item())
    scores = reward_scorer(str(reward_model), batch=3)(load_items(bench))
    assert [len(own) for own in scores] == [2, 2]
    assert flat(scores) == pytest.approx(expected, abs=1e-5)


def mean_logp(model, tokenizer, messages, answer):
    """Log-probability of an answer with its end token by a plain forward, and its length."""
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt)["input_ids"]
    reply = [*tokenizer(answer["content"])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids + reply])).logits[0].double()
    logps = logits.log_softmax(-1)[len(ids) - 1 : -1]
    return logps[range(len(reply)), reply].sum().item(), len(reply)


def test_implicit_rewards_are_those_of_plain_forwards(tiny_model, tmp_path, bench):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn_like(weight)
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    own = [mean_logp(policy, tokenizer, *each) for each in conversations(bench)]
    other = [mean_logp(reference, tokenizer, *each) for each in conversations(bench)]
    items = load_items(bench)
    free = implicit_scorer(str(tmp_path / "policy"), batch=1)(items)
    assert flat(free) == pytest.approx([total / n for total, n in own], abs=1e-5)
    ratio = implicit_scorer(str(tmp_path / "policy"), str(tiny_model), beta=0.5)(items)
    expected = [0.5 * (a - b) for (a, _), (b, _) in zip(own, other, strict=True)]
    assert flat(ratio) == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.1


def test_command(reward_model, tiny_model, bench, tmp_path, sso):
    out = tmp_path / "scores.jsonl"
    status, table, err = sso("rewardbench", reward_model, "--data", bench, "--scores", out)
    assert status == 0, err
    assert "Reasoning" in table
    assert "math-prm" in table
    assert "total of what is there" in table
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(row["scores"]) for row in written] == [2, 2]
    won = [float(row["scores"][0] > row["scores"][1]) for row in written]
    status, text, err = sso("rewardbench", reward_model, "--data", bench, "--json")
    assert status == 0, err
    report = json.loads(text)
    assert report["subsets"]["hep-go"] == {"score": won[0], "error": None, "prompts": 1}
    assert report["total"] == pytest.approx((164 * won[0] + 984 * won[1]) / 1148)
    status, text, err = sso("rewardbench", tiny_model, "--data", bench, "--policy", "--json")
    assert (status, json.loads(text)["version"]) == (0, 1), err


def test_mistakes_are_one_line(tiny_model, bench, tmp_path, sso):
    status, _, err = sso("rewardbench", tmp_path / "none", "--data", bench)
    assert status == 2
    assert err.strip() == f"error: MODEL: no folder {tmp_path / 'none'}"
    status, _, err = sso("rewardbench", tiny_model, "--data", bench)
    says = f"error: MODEL: {tiny_model} is no reward model (Qwen2ForCausalLM); --policy scores it"
    assert (status, err.strip()) == (2, f"{says} too")
    status, _, err = sso("rewardbench", tiny_model, "--data", tmp_path / "x.jsonl")
    assert (status, err) == (2, f"error: {tmp_path / 'x.jsonl'}: no such file\n")
    status, _, err = sso("rewardbench", tiny_model, "--data", bench, "--beta", "0", "--policy")
    assert (status, err) == (2, "error: --beta must be above 0, got 0.0\n")
