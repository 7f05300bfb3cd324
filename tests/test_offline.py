"""Offline training from files: every loss, every kind of file, and TRL on what we export."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from sso_lightning.formats import preference_examples, reward_examples, write_examples
from sso_lightning.records import Record, load_records

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02, "weight_decay": 0.0}}


def make_records(count=4):
    """Pairs without token ids, one of them in several turns with a system message."""
    records = [
        Record(
            id=f"r{i}",
            messages=[{"role": "user", "content": f"Name {i} birds."}],
            good=f"A wren and {i} more, all small.",
            bad=f"No {'no ' * i}never.",
        )
        for i in range(count)
    ]
    records[1].messages = [
        {"role": "system", "content": "Be brief."},
        *({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}),
        *records[1].messages,
    ]
    return records


def fit(model, root, loss, data, *options):
    """Run `fit` in this process; rows of metrics.csv."""
    from sso_lightning.__main__ import main

    settings = {
        "trainer": {
            "default_root_dir": str(root),
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": {"path": str(model)},
            "objective": {"class_path": "Contrastive", "init_args": {"base": loss}},
            "optimizer": SGD,
            "schedule": {"kind": "constant", "warmup": 0.0},
        },
        "data": data,
    }
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(path), *options]) == 0
    with (root / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def plain_logps(folder, records):
    """(mean, sum) of the log-probabilities of good and bad, each sequence by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for record in records:
        told = tokenizer.apply_chat_template(
            record.messages, tokenize=False, add_generation_prompt=True
        )
        for text in (record.good, record.bad):
            prompt = tokenizer(told, add_special_tokens=False)["input_ids"]
            answer = tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, :-1]
            taken = logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            found.append((taken.mean().item(), taken.sum().item()))
    return found[::2], found[1::2]


def simpo(good, bad):
    return math.log1p(math.exp(-(2.0 * (good - bad) - 0.5)))


def orpo(good, bad):
    odds = [p - math.log(1 - math.exp(p)) for p in (good, bad)]
    return -good + 0.1 * math.log1p(math.exp(-(odds[0] - odds[1])))


# Against a reference that is still the policy every margin is 0, so these are known by hand:
# -log sigmoid(0) for any smoothing, (0 - 1 / (2 * 0.25))^2, and 1 - 0.
LOSSES = {
    "DPO": ({"beta": 0.1}, math.log(2)),
    "smoothed": ({"beta": 0.1, "label_smoothing": 0.2}, math.log(2)),
    "IPO": ({"beta": 0.25}, 4.0),
    "Hinge": ({"beta": 0.1}, 1.0),
    "SimPO": ({"beta": 2.0, "gamma": 0.5}, simpo),
    "ORPO": ({"beta": 0.1}, orpo),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_from_a_trl_file(name, tiny_model, tmp_path):
    records = make_records()
    write_examples(tmp_path / "train.jsonl", [*preference_examples(records)])
    write_examples(tmp_path / "held.parquet", [*preference_examples(records[:2])])
    given, first = LOSSES[name]
    loss = {"class_path": {"smoothed": "DPO"}.get(name, name), "init_args": given}
    data = {"pairs": str(tmp_path / "train.jsonl"), "val_pairs": str(tmp_path / "held.parquet")}
    rows = fit(tiny_model, tmp_path / "run", loss, data | {"batch_size": 4, "passes": 2})
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    if callable(first):
        means = zip(*plain_logps(tiny_model, records), strict=True)
        first = sum(first(good[0], bad[0]) for good, bad in means) / len(records)
    assert losses[0] == pytest.approx(first, abs=1e-4)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    (held,) = [row for row in rows if "val/loss" in row]
    assert held["val/reward_accuracy"] == 1.0
    assert held["val/loss"] < first


def test_a_table_with_other_names_trains_alike(tiny_model, tmp_path):
    records = make_records()
    for record in records:
        record.messages = record.messages[-1:]
    rows = [
        {"question": r.messages[0]["content"], "best": r.good, "worst": r.bad, "key": r.id}
        for r in records
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_examples(tmp_path / "b.json", [*reward_examples(records)])
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst", "id": "key"}
    found = []
    for name, more in (
        # the held-out pairs have our names already
        ("a.csv", {"columns": {"pairs": columns}, "val_pairs": str(tmp_path / "b.json")}),
        ("b.json", {}),
    ):
        data = {"pairs": str(tmp_path / name), "batch_size": 2, **more}
        rows = fit(tiny_model, tmp_path / f"run-{name[0]}", {"class_path": "DPO"}, data)
        found.append([row["train/loss"] for row in rows if "train/loss" in row])
        stored = load_records(tmp_path / f"run-{name[0]}" / "pairs" / "offline")
        assert [(r.id, r.messages, r.good, r.bad) for r in stored] == [
            (r.id, r.messages, r.good, r.bad) for r in records
        ]
    assert len(found[0]) == 2
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------- TRL


def trl_settings(folder, **more):
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1.0,
        "max_length": None,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory, request):
    """A model whose template has nothing after the end of a turn: there TRL adds it to answers."""
    conftest = request.config.pluginmanager.getplugin(str(Path(__file__).with_name("conftest.py")))
    return conftest.save_tiny(tmp_path_factory.mktemp("llama") / "model", "llama", conftest.LLAMA3)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Reads what we wrote as TRL's users do."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def read(path):
        kind = path.suffix.removeprefix(".").replace("jsonl", "json")
        return datasets.load_dataset(kind, data_files=str(path), split="train")

    return read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"class_path": "DPO", "init_args": {"beta": 0.5}}, {"loss_type": ["sigmoid"]}),
        ({"class_path": "Hinge", "init_args": {"beta": 0.5}}, {"loss_type": ["hinge"]}),
        ({"class_path": "IPO", "init_args": {"beta": 0.5}}, {"loss_type": ["ipo"]}),
    ],
    ids=["dpo", "hinge", "ipo"],
)
def test_trl_trains_alike_on_the_export(ours, theirs, llama, table, tmp_path):
    """Three full-batch steps of plain gradient descent: the same losses, the same weights."""
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = make_records()
    path = tmp_path / "pairs.jsonl"
    write_examples(path, [*preference_examples(records)])
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(llama),
        args=trl.DPOConfig(**trl_settings(tmp_path / "trl", beta=0.5, **theirs)),
        train_dataset=table(path),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "logps/chosen" in row]
    data = {"pairs": str(path), "batch_size": 4, "passes": 3}
    rows = fit(llama, tmp_path / "run", ours, data)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == len(logged) == 3
    assert losses == pytest.approx([row["loss"] for row in logged], abs=1e-4)
    margins = [row["train/reward_margin_query"] for row in rows if "train/loss" in row]
    if ours["class_path"] != "IPO":  # ours are of the averages that its loss is about
        assert margins == pytest.approx([row["rewards/margins"] for row in logged], abs=1e-4)
    assert losses[2] < losses[0] - 0.01  # it moved, so that more than the first step is compared
    scores = [r.scores for r in load_records(tmp_path / "run" / "pairs" / "offline")]
    for response, name in (("good", "logps/chosen"), ("bad", "logps/rejected")):
        mean = sum(s[f"reference/query/{response}"] for s in scores) / len(scores)
        assert mean == pytest.approx(logged[0][name], abs=1e-3)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").state_dict()
    for key, value in trainer.model.state_dict().items():
        torch.testing.assert_close(exported[key], value, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_trl_trains_a_reward_model_on_the_export(kind, llama, table, tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tmp_path / f"pairs.{kind}"
    write_examples(path, [*reward_examples(make_records())])
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**trl_settings(tmp_path / "trl", max_steps=2)),
        train_dataset=table(path),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(trainer.train_dataset) == 4
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[1] < losses[0]
    assert not torch.equal(before["score.weight"], model.state_dict()["score.weight"])
    # whole conversations: the template's ids of query and answer, and nothing cut
    record, row = make_records()[1], trainer.train_dataset[1]
    talk = [*record.messages, {"role": "assistant", "content": record.good}]
    assert row["chosen_ids"] == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]


@pytest.mark.slow
def test_sft_data_is_what_trls_trainer_expects(tmp_path, table):
    trl = pytest.importorskip("trl")
    from sso_lightning.formats import plain_examples

    write_examples(tmp_path / "s.jsonl", [*plain_examples(make_records())])
    rows = table(tmp_path / "s.jsonl")
    assert rows.column_names == ["messages"]
    assert all(trl.data_utils.is_conversational(row) for row in rows)
    assert json.dumps(rows[1]["messages"][-1]["content"]) == json.dumps(make_records()[1].good)
