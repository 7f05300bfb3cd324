"""Reward models: the loss by hand, rewards of plain forwards, mixtures, resume, exports, TRL."""

import csv
import json
import math
import sys

import pytest
import torch
import yaml

from sso_lightning.checkpoint_files import read_checkpoint
from sso_lightning.errors import InputError
from sso_lightning.formats import write_examples
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import Record, write_records
from sso_lightning.reward import (
    PairSet,
    bradley_terry,
    find_pad_id,
    rewards_of,
    tokenize,
    tree_of,
)

LORA = {"r": 4, "alpha": 8}
PAIRS = [
    {"prompt": "Name a bird.", "chosen": "A wren, small and brown.", "rejected": "No.", "gap": 1},
    {"prompt": "Name two.", "chosen": "Owl.", "rejected": "It is five, surely.", "gap": 0.5},
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
        ],
        "chosen": "4",
        "rejected": "3, or 5",
        "gap": 0,
    },
    {"prompt": "Why?", "chosen": "Because of the fox.", "rejected": "Because.", "gap": 2},
]
HELD = [
    {"prompt": "Name a fish.", "chosen": "A carp and a trout.", "rejected": "Never."},
    {"prompt": "Name a tree.", "chosen": "Oak.", "rejected": "Seven wizards brew a potion."},
    {"prompt": "Who?", "chosen": "The dog.", "rejected": "The dog!"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(folder, **options):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def reward_alone(model, tokenizer, row, answer):
    """The reward of one conversation by a plain, unpadded forward."""
    prompt = row["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    talk = [*turns, {"role": "assistant", "content": row[answer]}]
    ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


def both_alone(folder, rows=PAIRS, **options):
    """Rewards of the better and of the worse answers."""
    model, tokenizer = load(folder, **options)
    return [
        [reward_alone(model, tokenizer, row, answer) for row in rows]
        for answer in ("chosen", "rejected")
    ]


def softplus(x):
    """`-log sigmoid(-x)`."""
    return math.log1p(math.exp(x))


def mean(values):
    return math.fsum(values) / len(values)


def save_classifier(folder, model, seed=1):
    """A reward model with a random head that tells answers apart."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        torch.nn.init.normal_(made.score.weight)
    tokenizer = AutoTokenizer.from_pretrained(model)
    made.config.pad_token_id = tokenizer.pad_token_id
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(tiny_model, tmp_path_factory):
    """A reward model to go on from."""
    return save_classifier(tmp_path_factory.mktemp("start") / "model", tiny_model)


def settings(folder, name, model, sets, **more):
    """A configuration file; `more` sets dotted keys."""
    tree = {
        "trainer": {
            "default_root_dir": str(folder / name),
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "gradient_clip_val": None,
        },
        "model": {
            "policy": {"path": str(model)},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02}},
            "schedule": {"kind": "constant", "warmup": 0.0, "restart": False},
        },
        "data": {"sets": sets, "batch_size": 4},
    }
    for key, value in more.items():
        *way, last = key.split(".")
        at = tree
        for part in way:
            at = at.setdefault(part, {})
        at[last] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def fit(*arguments, **more):
    """Train; rows of metrics.csv as numbers. Arguments as for `settings`."""
    from sso_lightning.__main__ import main

    path = settings(*arguments, **more)
    assert main(["reward", "fit", "--config", path]) == 0
    return metrics(arguments[0] / arguments[1])


def metrics(root):
    with (root / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def column(rows, key):
    return [row[key] for row in rows if key in row]


# ---------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("better", "worse", "margin", "center", "expected"),
    [
        (1.0, 1.0, 0.0, 0.0, math.log(2)),
        # sigmoid(log 3) = 3/4
        (math.log(3), 0.0, 0.0, 0.0, math.log(4 / 3)),
        (0.0, math.log(3), 0.0, 0.0, math.log(4)),
        (math.log(3) + 2, 0.0, 2.0, 0.0, math.log(4 / 3)),
        # (2 + 2)^2 = 16
        (2.0, 2.0, 0.0, 0.01, math.log(2) + 0.16),
        (2.0, -2.0, 4.0, 0.5, math.log(2)),
    ],
)
def test_loss_by_hand(better, worse, margin, center, expected):
    loss = bradley_terry(torch.tensor([better]), torch.tensor([worse]), margin, center)
    assert loss.tolist() == pytest.approx([expected])


def test_margins_are_per_pair_and_gradients_by_hand():
    """d/dr_w = -sigmoid(-(r_w - r_l - m)) + 2 c (r_w + r_l); for r_l the first term's sign turns.

    Pair 0: -1/2 and 1/2. Pair 1: h = log 3, so -1/4 + 2 * .1 * 1 and 1/4 + .2 with r_w + r_l = 1.
    """
    half = (math.log(3) + 1) / 2
    chosen = torch.tensor([0.5, half], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.5, 1 - half], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss = bradley_terry(chosen, rejected, margin, 0.1)
    assert loss.tolist() == pytest.approx([math.log(2), math.log(4 / 3) + 0.1])
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.5, -0.05])
    assert rejected.grad.tolist() == pytest.approx([0.5, 0.45])


# ------------------------------------------------------------------------------------- the rewards


def test_what_rows_share():
    assert tree_of([[1, 2, 3, 4], [1, 2, 4]]) == tree_of([[1, 2, 3, 4], [1, 2, 4]])
    cases = {
        "one begins the other": ([[1, 2], [1, 2, 3]], [1], [[2], [2, 3]]),
        "equal": ([[1, 2], [1, 2]], [1], [[2], [2]]),
        "nothing shared": ([[1, 2], [3, 2]], [], [[1, 2], [3, 2]]),
        "one row": ([[1, 2, 3]], [1, 2], [[3]]),
        "three rows": ([[1, 2, 3], [1, 2, 4], [1, 5, 3]], [1], [[2, 3], [2, 4], [5, 3]]),
    }
    for name, (rows, prompt, responses) in cases.items():
        tree = tree_of(rows)
        assert (tree.prompt, tree.responses) == (prompt, responses), name


@pytest.mark.parametrize("shared", [True, False])
def test_rewards_are_those_of_single_rows(start, shared, monkeypatch):
    """By shared prompts, and by padded rows, whose padding must not be read."""
    monkeypatch.setattr("sso_lightning.reward.shares_prompts", lambda model: shared)
    model, tokenizer = load(start)
    renderer = ChatRenderer(tokenizer)
    records = [r for r in PairSet(write(start.parent / "pairs.jsonl", PAIRS)).read()[0]]
    rows = [*tokenize(records, renderer, "here")]
    with torch.no_grad():
        found = rewards_of(model, rows).view(-1, 2)
    chosen, rejected = both_alone(start)
    assert found[:, 0].tolist() == pytest.approx(chosen, abs=1e-5)
    assert found[:, 1].tolist() == pytest.approx(rejected, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(chosen, rejected, strict=True)) > 0.1


def test_an_unproven_architecture_takes_padded_rows():
    from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=0,
    )
    model = GPTNeoXForSequenceClassification(config).eval()
    rows = [[1, 2, 3, 4, 5], [1, 2], [7, 0, 8]]  # the padding token may stand within a row
    with torch.no_grad():
        found = rewards_of(model, [rows[:2], rows[2:]]).tolist()
        alone = [model(torch.tensor([row])).logits.item() for row in rows]
    assert found == pytest.approx(alone, abs=1e-5)


PADDING = {
    "its own": ({}, "<pad>"),
    "one that ends answers beside one named pad": ({"pad_token": "<|im_end|>"}, "<pad>"),
    "none named, as with Llama 3": ({"pad_token": None}, "<pad>"),
}


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("name", PADDING)
def test_padding_token(name, tokenizer):
    changes, expected = PADDING[name]
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    found = find_pad_id(ChatRenderer(tokenizer), tokenizer)
    assert tokenizer.convert_ids_to_tokens(found) == expected
    assert find_pad_id(ChatRenderer(tokenizer), tokenizer, "<|begin|>") != found


def tiny_without_padding(tokenizer):
    """The same tokenizer with another name for what would be padding."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = tokenizer.backend_tokenizer.to_str().replace("<pad>", "<extra>")
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>"
    )
    made.chat_template = tokenizer.chat_template
    return made


def test_a_padding_token_that_ends_answers_is_refused(tokenizer):
    for name, says in {"<|im_end|>": "ends answers as well", "<none>": "no token '<none>'"}.items():
        with pytest.raises(InputError, match=rf"model\.pad_token: .*{says}"):
            find_pad_id(ChatRenderer(tokenizer), tokenizer, name)
    # a tokenizer without any, as Mistral's
    plain = tiny_without_padding(tokenizer)
    with pytest.raises(InputError, match=r"^model\.pad_token: the tokenizer has none; name one"):
        find_pad_id(ChatRenderer(plain), plain)
    # a template that closes with the padding token would be read one token early
    closing = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<pad>{% endfor %}"
    tokenizer.chat_template = closing + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(InputError, match=r"model\.pad_token: .*ends answers as well"):
        find_pad_id(ChatRenderer(tokenizer), tokenizer)


# ---------------------------------------------------------------------------------------- the data


def make_run(folder):
    """A run folder with two iterations."""
    for iteration in range(2):
        part = folder / "pairs" / f"iteration-{iteration:02d}"
        part.mkdir(parents=True)
        records = [
            Record(
                id=f"q{i}",
                messages=[{"role": "user", "content": f"Name {i} birds."}],
                good=f"A wren, in iteration {iteration}.",
                bad="Never.",
                original=f"An owl, in iteration {iteration}." if i else "",
                good_system="Be good.",
                bad_system="Be bad.",
                iteration=iteration,
            )
            for i in range(2)
        ]
        write_records(part / "shard-00.parquet", records)
    return folder


def test_a_run_folder_gives_its_pairs_of_an_iteration(tmp_path):
    run = str(make_run(tmp_path / "run"))
    assert len(PairSet(run).read()[0]) == 4
    records, margins = PairSet(run, iteration=1).read()
    assert [r.good for r in records] == ["A wren, in iteration 1."] * 2
    assert margins == [0.0, 0.0]
    assert PairSet(run).label == "run"
    with pytest.raises(InputError, match=r"no record of iteration 2; has 0, 1"):
        PairSet(run, iteration=2).read()


def test_contexts_compare_what_the_objective_compares(tmp_path, tokenizer):
    renderer = ChatRenderer(tokenizer)
    records = PairSet(str(make_run(tmp_path / "run")), iteration=0).read()[0][1:]
    texts = {
        context: [tokenizer.decode(ids) for ids in next(tokenize(records, renderer, "x", context))]
        for context in ("query", "good", "bad")
    }
    closed = "<|im_end|>\n"
    user, assistant = f"<|im_start|>user\nName 1 birds.{closed}", "<|im_start|>assistant\n"
    good, bad, original = "A wren, in iteration 0.", "Never.", "An owl, in iteration 0."
    assert texts["query"] == [f"{user}{assistant}{answer}{closed}" for answer in (good, bad)]
    system = "<|im_start|>system\nBe {}." + closed
    for context, answers in {"good": (good, bad), "bad": (original, good)}.items():
        whole = system.format(context) + user + assistant
        assert texts[context] == [f"{whole}{answer}{closed}" for answer in answers]


@pytest.mark.parametrize(
    ("context", "changes", "says"),
    [("bad", {"original": ""}, "original"), ("good", {"good_system": ""}, "good_system")],
)
def test_a_record_that_lacks_what_is_compared_is_named(context, changes, says, tokenizer):
    values = {"original": "o", "good_system": "g", "bad_system": "b", **changes}
    record = Record(
        id="r", messages=[{"role": "user", "content": "a"}], good="g", bad="b", **values
    )
    with pytest.raises(InputError, match=f"^here: record 'r' has no {says}, which context"):
        next(tokenize([record], ChatRenderer(tokenizer), "here", context))


def test_margins_and_columns_of_other_files(tmp_path):
    path = write(tmp_path / "p.jsonl", PAIRS)
    assert PairSet(path, margin="gap").read()[1] == [1.0, 0.5, 0.0, 2.0]
    rows = [{"q": "Why?", "best": "a", "worst": "b"}]
    other = write(tmp_path / "o.jsonl", rows)
    names = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    ((record,), _) = PairSet(other, columns=names).read()
    assert (record.good, record.bad) == ("a", "b")
    with pytest.raises(InputError, match=r"o\.jsonl, line 1: 'gap' must be a number, got None"):
        PairSet(other, columns=names, margin="gap").read()


# ------------------------------------------------------------------------------------ the training


def test_a_step_is_the_weighted_mean_of_a_mixture(start, tmp_path):
    """Two sets, one of weight 2 and with margins: loss, accuracy, margin and reward by hand."""
    sets = [
        {"path": write(tmp_path / "a.jsonl", PAIRS[:2]), "weight": 2.0, "margin": "gap"},
        {"path": write(tmp_path / "b.jsonl", PAIRS[2:])},
    ]
    chosen, rejected = both_alone(start)
    gaps, weights = [1, 0.5, 0, 0], [2, 2, 1, 1]
    losses = [
        softplus(-(up - down - gap)) + 0.05 * (up + down) ** 2
        for up, down, gap in zip(chosen, rejected, gaps, strict=True)
    ]
    (first, *_) = fit(tmp_path, "run", start, sets, **{"model.center": 0.05})
    expected = mean([w * loss for w, loss in zip(weights, losses, strict=True)]) / mean(weights)
    assert first["train/loss"] == pytest.approx(expected, abs=1e-5)
    apart = [up - down for up, down in zip(chosen, rejected, strict=True)]
    assert first["train/margin"] == pytest.approx(mean(apart), abs=1e-5)
    assert first["train/accuracy"] == mean([float(a > 0) for a in apart])
    assert first["train/reward"] == pytest.approx(mean([*chosen, *rejected]), abs=1e-5)


def exported(folder, name):
    from safetensors.torch import load_file

    return load_file(folder / name / "export/model.safetensors")


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=key)


def test_weight_2_is_twice_and_batches_accumulate(start, tmp_path):
    """One SGD step of four ways to say the same mixture."""
    a, b = (write(tmp_path / f"{n}.jsonl", p) for n, p in (("a", PAIRS[:2]), ("b", PAIRS[2:])))
    twice = write(tmp_path / "twice.jsonl", PAIRS[:2] * 2)
    weighted = [{"path": a, "weight": 2.0}, {"path": b}]
    large = {"model.optimizer.init_args": {"lr": 0.5}}
    ways = {
        "weighted": (weighted, {}),
        "scaled": ([{"path": a, "weight": 6.0}, {"path": b, "weight": 3.0}], {}),
        "doubled": ([{"path": twice}, {"path": b}], {"data.batch_size": 6}),
        "accumulated": (
            weighted,
            {"data.batch_size": 1, "trainer.accumulate_grad_batches": 4},
        ),
    }
    losses = {
        name: column(fit(tmp_path, name, start, sets, **large, **more), "train/loss")
        for name, (sets, more) in ways.items()
    }
    before = load(start)[0].state_dict()
    expected = exported(tmp_path, "weighted")
    moved = max((expected[key] - before[key]).abs().max().item() for key in expected)
    assert moved > 0.01
    for name in ways:
        assert losses[name] == pytest.approx(losses["weighted"], abs=1e-5), name
        assert_close(exported(tmp_path, name), expected, 1e-5)


def test_a_limit_is_drawn_by_the_seed(start, tmp_path):
    rows = [{**PAIRS[0], "prompt": f"Name bird {i}."} for i in range(8)]
    sets = [{"path": write(tmp_path / "a.jsonl", rows), "limit": 3}]
    more = {"data.batch_size": 1, "trainer.max_steps": 9}
    losses = [
        sorted(column(fit(tmp_path, f"s{i}", start, sets, seed_everything=s, **more), "train/loss"))
        for i, s in enumerate((0, 0, 1))
    ]
    assert [len(each) for each in losses] == [3, 3, 3]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_long_pairs_are_left_out(start, tmp_path, capsys):
    sets = [{"path": write(tmp_path / "a.jsonl", PAIRS), "name": "mine"}]
    tokenizer = load(start)[1]
    lengths = [
        max(len(row) for row in next(tokenize([record], ChatRenderer(tokenizer), "x")))
        for record in PairSet(sets[0]["path"]).read()[0]
    ]
    bound = sorted(lengths)[1]
    rows = fit(tmp_path, "run", start, sets, **{"data.max_length": bound, "data.batch_size": 1})
    assert len(column(rows, "train/loss")) == sum(length <= bound for length in lengths)
    assert "2 pairs, 2 longer than data.max_length left out" in capsys.readouterr().err


def test_held_out_sets_are_measured_each_and_together(start, tmp_path, capsys):
    """A mean over sets, each of which counts alike; the last rows see the exported weights."""
    held = [
        {"path": write(tmp_path / f"{name}.jsonl", rows), "weight": 5.0}
        for name, rows in (("h1", HELD), ("h2", PAIRS[:1]))
    ]
    more = {"data.val_sets": held, "data.batch_size": 2}
    sets = [{"path": write(tmp_path / "a.jsonl", PAIRS)}]
    last = fit(tmp_path, "run", start, sets, **more)[-1]
    err = capsys.readouterr().err
    apart = {}
    for name, rows in (("h1", HELD), ("h2", PAIRS[:1])):
        chosen, rejected = both_alone(tmp_path / "run/export", rows)
        apart[name] = [up - down for up, down in zip(chosen, rejected, strict=True)]
        assert last[f"val/{name}/margin"] == pytest.approx(mean(apart[name]), abs=1e-4)
        assert last[f"val/{name}/accuracy"] == pytest.approx(mean([x > 0 for x in apart[name]]))
        told = f"{name}: accuracy {mean([x > 0 for x in apart[name]]):.3f}, loss "
        assert told in err
    losses = [mean([softplus(-x) for x in each]) for each in apart.values()]
    assert last["val/loss"] == pytest.approx(mean(losses), abs=1e-4)


STOP = """
import os, signal
from lightning.pytorch import Callback


class StopAtStep(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_cut_run_ends_as_the_whole_one(start, tmp_path, lora, monkeypatch):
    """Bit for bit, stopped within an epoch; a schedule over the run, and dropout in the adapter."""
    from sso_lightning.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    (tmp_path / "stop_at_step.py").write_text(STOP)
    sets = [{"path": write(tmp_path / "a.jsonl", PAIRS)}]
    more = {
        "trainer.max_epochs": 2,
        "data.batch_size": 1,
        "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "model.schedule": {"kind": "cosine", "warmup": 0.2, "restart": False},
    }
    if lora:
        more["model.policy.lora"] = {**lora, "dropout": 0.3}
    whole = fit(tmp_path, "whole", start, sets, **more)
    assert len(column(whole, "train/loss")) == 8
    command = ["reward", "fit", "--config", settings(tmp_path, "cut", start, sets, **more)]
    assert main([*command, "--trainer.callbacks+=stop_at_step.StopAtStep"]) == 143
    assert len(column(metrics(tmp_path / "cut"), "train/loss")) == 6
    assert main([*command, "--ckpt_path", "last"]) == 0
    found = metrics(tmp_path / "cut")
    for key in ("train/loss", "train/lr", "train/grad_norm"):
        assert column(found, key) == column(whole, key), key
    one, two = (
        read_checkpoint(tmp_path / n / "checkpoints/last.ckpt")["state_dict"]
        for n in ("whole", "cut")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(two[key], value) for key, value in one.items())


# ------------------------------------------------------------------------------------- the exports

BASES = {
    "all weights": {},
    "lora": {"model.policy.lora": LORA},
    "4bit": {"model.policy.lora": LORA, "model.policy.quantize": "4bit"},
}


@pytest.mark.parametrize(
    ("base", "merge"),
    [("all weights", True), *((base, merge) for base in ("lora", "4bit") for merge in (0, 1))],
)
def test_exports_give_the_rewards_that_were_trained(tiny_model, tmp_path, base, merge, sso):
    """From a chat model with a fresh head; the last validation saw the exported weights."""
    sets = [{"path": write(tmp_path / "a.jsonl", PAIRS)}]
    held = [{"path": write(tmp_path / "held.jsonl", HELD)}]
    more = {
        **BASES[base],
        "data.val_sets": held,
        "trainer.max_epochs": 6,
        "data.batch_size": 2,
        "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
        "export.merge": bool(merge),
        "model.policy.dtype": "float32",
    }
    rows = fit(tmp_path, "run", tiny_model, sets, **more)
    losses = column(rows, "train/loss")
    assert losses[-1] < losses[0] - 0.05
    state = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    assert any("score" in key for key in state), "the head is trained with an adapter too"
    export = tmp_path / "run/export"
    model, tokenizer = load_export(export, tiny_model, BASES[base], merge)
    chosen, rejected = (
        [reward_alone(model, tokenizer, row, answer) for row in HELD]
        for answer in ("chosen", "rejected")
    )
    apart = [up - down for up, down in zip(chosen, rejected, strict=True)]
    # a merged 4-bit base is dequantised to the bit, and its sums are rounded to float32
    assert rows[-1]["val/margin"] == pytest.approx(mean(apart), abs=2e-4)
    assert rows[-1]["val/reward"] == pytest.approx(mean([*chosen, *rejected]), abs=2e-4)
    assert max(map(abs, apart)) > 0.02
    # padded together, as its own padding token and side have it
    talks = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]
        for r in HELD
    ]
    batch = tokenizer.apply_chat_template(
        talks, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        together = model(**batch).logits[:, 0].tolist()
    assert together == pytest.approx(chosen, abs=1e-4)
    # a checkpoint gives the same folder
    out = tmp_path / "again"
    options = ["--merge"] if merge else []
    assert sso("export", tmp_path / "run/checkpoints/last.ckpt", out, *options)[0] == 0
    again, _ = load_export(out, tiny_model, BASES[base], merge)
    assert [reward_alone(again, tokenizer, r, "chosen") for r in HELD] == pytest.approx(chosen)


def load_export(folder, model, base, merge):
    """As the documentation says to load it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

    if merge:
        return load(folder)
    options = {}
    if "model.policy.quantize" in base:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["score"],
        )
    plain = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32, **options
    )
    for module in plain.modules():  # as in `policy.load_model`
        module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain.config.pad_token_id = tokenizer.pad_token_id
    return PeftModel.from_pretrained(plain, folder).eval(), tokenizer


def test_validate_and_test_read_a_checkpoint(start, tmp_path, sso):
    sets = [{"path": write(tmp_path / "a.jsonl", PAIRS)}]
    held = [{"path": write(tmp_path / "held.jsonl", HELD)}]
    last = fit(tmp_path, "run", start, sets, **{"data.val_sets": held})[-1]
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    for command, stage in (("validate", "val"), ("test", "test")):
        given = ("reward", command, "--config", tmp_path / "run.yaml", "--ckpt_path", checkpoint)
        status, out, err = sso(*given)
        assert status == 0, err
        assert f"{stage}/accuracy" in out
        found = {line.split()[1]: line.split()[3] for line in out.splitlines() if "/" in line}
        assert float(found[f"{stage}/loss"]) == pytest.approx(last["val/loss"], abs=1e-5)


@pytest.mark.slow
def test_trl_goes_on_from_the_export(start, tmp_path):
    """The same loss on the same pairs before and after a step, with the centring term."""
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    path = write(tmp_path / "a.jsonl", PAIRS)
    more = {"model.center": 0.02, "data.val_sets": [{"path": path}]}
    ours = fit(tmp_path, "run", start, [{"path": path}], **more)[-1]["val/loss"]
    talks = [
        {
            key: [
                *(r["prompt"] if isinstance(r["prompt"], list) else [said("user", r["prompt"])]),
                said("assistant", r[key]),
            ]
            for key in ("chosen", "rejected")
        }
        for r in PAIRS
    ]
    write_examples(tmp_path / "trl.jsonl", talks)
    model, tokenizer = load(tmp_path / "run/export")
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=4,
            max_steps=2,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            center_rewards_coefficient=0.02,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(tmp_path / "trl.jsonl"), split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert theirs[0] == pytest.approx(ours, abs=2e-4)
    # the step that our own run takes from there
    second = {"model.center": 0.02, "trainer.max_epochs": 2}
    rows = fit(tmp_path, "more", tmp_path / "run/export", [{"path": path}], **second)
    assert column(rows, "train/loss") == pytest.approx(theirs, abs=2e-4)


def said(role, text):
    return {"role": role, "content": text}
