"""Adapters on 4-bit and 8-bit bases, with optimizers that keep their moments in 8 bit."""

import csv
import json

import pytest
import torch
import yaml

from sso_lightning.checkpoint_files import read_checkpoint
from sso_lightning.policy import LoRA, PolicyConfig, load_model, load_tokenizer, save_policy
from sso_lightning.scoring import Tree, response_logps

QUANTIZED = {"4bit": "PagedAdamW8bit", "8bit": "AdamW8bit"}
PROMPT, ANSWERS = [5, 6, 7, 8, 9], [[10, 11, 12], [13, 14]]


def write_queries(path, count):
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds for a poem."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(*arguments):
    from sso_lightning.__main__ import main

    return main([str(a) for a in arguments])


def configure(folder, name, model, queries, quantize, **trainer):
    settings = {
        "trainer": {
            "default_root_dir": str(folder / name),
            "max_epochs": 2,
            "accelerator": "cpu",
            "precision": "bf16-mixed",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
        "model": {
            "policy": {
                "path": str(model),
                "dtype": "bfloat16",
                "quantize": quantize,
                "lora": {"r": 4},
                "gradient_checkpointing": True,
            },
            "objective": {
                "class_path": "Contrastive",
                "init_args": {"base": {"class_path": "DPO"}},
            },
            "optimizer": {
                "class_path": f"bitsandbytes.optim.{QUANTIZED[quantize]}",
                # this model's adapters are smaller than what is kept in 8 bit by default
                "init_args": {"lr": 0.02, "min_8bit_size": 16},
            },
        },
        "data": {"queries": str(queries), "batch_size": 2},
        "checkpoint": {"every_n_steps": 1},
        "pairs": {
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 5}},
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module", params=list(QUANTIZED))
def run(request, tmp_path_factory, tiny_model):
    """A run of two iterations of two steps, and one that was cut within the second."""
    folder = tmp_path_factory.mktemp(request.param)
    queries = write_queries(folder / "queries.jsonl", 4)
    whole = configure(folder, "whole", tiny_model, queries, request.param)
    assert main("fit", "--config", whole) == 0
    cut = configure(folder, "cut", tiny_model, queries, request.param)
    assert main("fit", "--config", cut, "--trainer.max_steps", 3) == 0
    assert main("fit", "--config", cut, "--ckpt_path", "last") == 0
    return request.param, folder


def checkpoint(folder, name):
    return read_checkpoint(folder / name / "checkpoints/last.ckpt")


def moments(content):
    """What the optimizer keeps, which bitsandbytes nests, as one dict of tensors."""
    found = {}
    for number, values in content["optimizer_states"][0]["state"].items():
        flat = {k: v for k, v in values.items() if not isinstance(v, dict)}
        flat |= {
            k: v
            for nested in values.values()
            if isinstance(nested, dict)
            for k, v in nested.items()
        }
        found |= {f"{number}/{key}": torch.as_tensor(value) for key, value in flat.items()}
    return found


def test_a_cut_run_ends_as_the_whole_one(run):
    """Weights and 8-bit moments, to the bit; the base is in no checkpoint."""
    _, folder = run
    whole, cut = checkpoint(folder, "whole"), checkpoint(folder, "cut")
    assert all("lora_" in name for name in whole["state_dict"])
    for name, value in whole["state_dict"].items():
        assert torch.equal(cut["state_dict"][name], value), name
    ours, theirs = moments(cut), moments(whole)
    assert {value.dtype for key, value in theirs.items() if "state1" in key} == {torch.uint8}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    losses = []
    for name in ("whole", "cut"):
        with (folder / name / "metrics.csv").open() as file:
            losses.append([r["train/loss"] for r in csv.DictReader(file) if r.get("train/loss")])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_the_merged_export_is_the_policy_that_was_trained(run, tiny_model):
    """Not the adapter on weights that were never quantised: that is another model."""
    from transformers import AutoModelForCausalLM

    quantize, folder = run
    out = folder / "merged"
    assert main("export", folder / "whole/checkpoints/last.ckpt", out, "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    config = PolicyConfig(str(tiny_model), lora=LoRA(r=4), quantize=quantize, dtype="float32")
    live = load_model(config)
    state = checkpoint(folder, "whole")["state_dict"]
    live.load_state_dict({k.removeprefix("policy."): v for k, v in state.items()}, strict=False)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = live.eval()(ids).logits
        # 8 bit rounds activations too, and the export rounds the sum to bfloat16
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=0.03)
        with live.disable_adapter():
            assert (live(ids).logits - expected).abs().max() > 0.3


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_merging_leaves_the_model_as_it_was(tiny_model, tmp_path, quantize):
    config = PolicyConfig(str(tiny_model), lora=LoRA(r=4), quantize=quantize, dtype="float32")
    model = load_model(config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        before = model(ids).logits
        save_policy(model, load_tokenizer(config), tmp_path / "out", merge=True)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_shared_prompts_score_as_rows_of_their_own(tiny_model, quantize):
    """With gradients, against the plain forward of the same quantised model."""
    config = PolicyConfig(str(tiny_model), lora=LoRA(r=4), quantize=quantize, dtype="float32")
    model = load_model(config).eval()
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    for parameter in adapters:
        torch.nn.init.normal_(parameter, std=0.1)
    found, _ = response_logps(model, [Tree(PROMPT, ANSWERS)])
    rows = []
    for answer in ANSWERS:
        logits = model(torch.tensor([PROMPT + answer])).logits[0, len(PROMPT) - 1 : -1]
        rows.append(logits.log_softmax(-1)[range(len(answer)), answer].sum())
    expected = torch.stack(rows).double()
    # the activations of 8-bit layers are rounded by rows, whose numbers differ in the last bit
    bound = 1e-4 if quantize == "4bit" else 5e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    ours = torch.autograd.grad(found.sum(), adapters)
    theirs = torch.autograd.grad(expected.sum(), adapters)
    scale = max(g.abs().max() for g in theirs)
    assert all((a - b).abs().max() < 20 * bound * scale for a, b in zip(ours, theirs, strict=True))


def test_sharded_weights_refuse_8_bit_optimizers(tmp_path, tiny_model, capsys):
    queries = write_queries(tmp_path / "queries.jsonl", 4)
    path = configure(tmp_path, "run", tiny_model, queries, "8bit", devices=1, strategy="fsdp2")
    assert main("fit", "--config", path, "--model.policy.quantize", "null") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "AdamW8bit of bitsandbytes cannot step sharded weights" in line


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_trained_weights_that_round_steps_away_are_told(tmp_path, tiny_model, capsys, precision):
    """The adapters of a bfloat16 base are float32, unless the trainer casts them."""
    queries = write_queries(tmp_path / "queries.jsonl", 2)
    path = configure(tmp_path, "run", tiny_model, queries, "4bit", precision=precision)
    assert main("fit", "--config", path, "--trainer.max_epochs", 1) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "rounded away" in line]
    assert len(told) == (precision == "bf16-true")
    if told:
        # bfloat16 has 8 bits: between 1 and 2 its numbers are 1/128 apart
        assert "1/256 of a weight" in told[0]
        assert torch.tensor(1.0, dtype=torch.bfloat16) + 1 / 257 == 1
