"""`sso-lightning plan`: against sums made by hand, torch's allocator and torch's FLOP counter."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM

from sso_lightning.errors import InputError
from sso_lightning.losses import IPO
from sso_lightning.objectives import SelfSteering
from sso_lightning.plan.command import bytes_of
from sso_lightning.plan.hours import Epoch, Rates, Shape, Work, costs
from sso_lightning.plan.memory import CONTEXT, Lengths, Planner, Run, Training, changes, fullest
from sso_lightning.plan.simulate import (
    DEPTHS,
    Births,
    Deep,
    Pass,
    Precision,
    Simulation,
    optimizer_bytes,
)
from sso_lightning.policy import LoRA, PolicyConfig, make_trainable
from sso_lightning.sampling import Request, TransformersSampler
from sso_lightning.scoring import Tree, response_logps

ROOT = Path(__file__).resolve().parent.parent
SSO = SelfSteering(IPO(beta=0.2)).sequences
# of config.json: type, layers, width, MLP width, heads, key heads, vocabulary
QWEN2_7B = ("qwen2", 28, 3584, 18944, 28, 4, 152064)
LLAMA31_8B = ("llama", 32, 4096, 14336, 32, 8, 128256)
SMALL = ("qwen2", 3, 64, 176, 4, 2, 900)


def config_of(kind, layers, width, mlp, heads, key_heads, vocabulary):
    return {
        "model_type": kind,
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def made_of(numbers, **policy):
    values = config_of(*numbers)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return PolicyConfig("model", **{"dtype": "float32", **policy}), config


def run_of(numbers=SMALL, *, policy=None, prompt=50, answer=40, batch=1, **more):
    own, config = made_of(numbers, **(policy or {}))
    prompts = {"query": prompt, "good": 2 * prompt, "bad": 2 * prompt}
    answers = dict.fromkeys(("good", "bad", "original"), answer)
    settings = {
        "lengths": Lengths(prompts, prompts, answers, answers),
        "trainings": {"training": Training(SSO, batch)},
        "optimizer": torch.optim.AdamW,
        "kind": "cpu",
        "rows": 3,
        "shard_size": 2,
        "score_tokens": 500,
        **more,
    }
    return Run(own, config, **settings)


# ------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("numbers", "parameters", "adapters"),
    [
        # 2 V d + L (2 d^2 + 2 d k + 3 d m + 2 d) + d, Qwen2 with L (d + 2 k) biases
        # rank 16: 16 L (2 (d + d) + 2 (d + k) + 3 (d + m))
        (QWEN2_7B, 7_615_616_512, 40_370_176),
        (LLAMA31_8B, 8_030_261_248, 41_943_040),
    ],
)
def test_large_models_are_counted_from_their_config(numbers, parameters, adapters):
    policy, config = made_of(numbers, lora=LoRA(r=16), dtype="bfloat16")
    made = Simulation(policy, config)
    assert made.parameters() == parameters
    # bfloat16 base, float32 adapters
    assert made.weight_bytes() == (2 * parameters, 4 * adapters)
    assert sum(p.numel() for p in made.trained()) == adapters
    assert all(p.is_meta for p in made.model.parameters())  # nothing was allocated


def test_quantised_bases_keep_head_and_embeddings_whole():
    whole = 2 * 900 * 64 + 3 * (2 * 64 + 64 + 2 * 32) + 64  # norms and biases too
    linear = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
    policy, config = made_of(SMALL, lora=LoRA(), dtype="bfloat16")
    base, _ = Simulation(replace(policy, quantize="8bit"), config).weight_bytes()
    rows = 3 * (64 + 32 + 32 + 64 + 176 + 176 + 64)
    assert base == 2 * whole + linear + 4 * rows
    base, _ = Simulation(replace(policy, quantize="4bit"), config).weight_bytes()
    # half a byte each, a scale of a byte for 64 of them; the rest is small
    assert base == pytest.approx(2 * whole + linear / 2 + linear / 64, rel=0.1)
    assert 2 * whole + linear / 2 < base


def test_optimizers_are_asked_for_what_they_keep():
    trained = [torch.empty(1000, 100), torch.empty(300, 100)]
    kept, extra = optimizer_bytes(torch.optim.AdamW, trained)
    assert kept == 8 * 130_000  # two float32 moments
    assert extra == 2 * 4 * 100_000  # one weight after the other: a root and what is divided by
    on_gpu = optimizer_bytes(torch.optim.AdamW, trained, "cuda")
    assert on_gpu == (8 * 130_000, 4 * 130_000)  # the roots of all second moments at once
    assert optimizer_bytes(torch.optim.SGD, trained)[0] == 0
    from bitsandbytes.optim import AdamW8bit

    kept, _ = optimizer_bytes(AdamW8bit, [*trained, torch.empty(50, 64)])
    # two bytes and their scales; below 4096 numbers 32 bits are kept
    assert 2 * 130_000 + 8 * 3200 <= kept <= 2.2 * 130_000 + 8 * 3200

    def refused(parameters):
        raise ValueError("Invalid learning rate: -1")

    with pytest.raises(InputError, match=r"model\.optimizer: Invalid learning rate"):
        optimizer_bytes(refused, trained)


# ------------------------------------------------------------------------- passes


def test_storages_are_counted_from_birth_to_end():
    with Births() as births:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.double()  # 8000 more
        del a
        c = b + 1  # 8000 + 8000
        view = c.view(10, 100)
        del b, c
        assert view.shape == (10, 100)
    assert Pass(births).peak() == {"gradients": 0, "activations": 16000}


def allocated(run):
    """Bytes that torch's allocator hands out at the most; not the plan's way of counting."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("lora", [None, LoRA()], ids=["all weights", "lora"])
@pytest.mark.parametrize(
    ("again", "precision"), [(False, "32"), (True, "32"), (False, "bf16-mixed")]
)
def test_the_plan_is_what_the_allocator_says(lora, again, precision):
    policy, config = made_of(SMALL, lora=lora, gradient_checkpointing=again)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = make_trainable(base, policy).train()
    made = Simulation(policy, config, Precision.of(precision))
    mixed = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision != "32")
    trees = [Tree([5] * n, [[6] * 60, [7] * 60]) for n in (20, 90, 90)]

    def train():
        with mixed():
            logps, _ = response_logps(model, trees)
        logps.sum().backward()

    def score():
        with torch.no_grad(), mixed():
            response_logps(model, trees, max_tokens=300)

    def sample():
        requests = [Request(str(i), [i] * 90, i) for i in range(8)]
        with mixed():
            TransformersSampler(max_new_tokens=4, max_rows=8).sample(model, requests, stop_ids=[])

    train()
    model.zero_grad()
    passes = {
        train: made.training(trees, None),
        score: made.scoring(trees, 300),
        sample: made.sampling([90] * 8, 8, 94),
    }
    for run, found in passes.items():
        assert sum(found.peak().values()) == pytest.approx(allocated(run), rel=0.03), run.__name__
        model.zero_grad()


def test_gradients_of_the_step_before_are_there_until_the_backward_pass():
    policy, config = made_of(SMALL)
    found = Simulation(policy, config).training([Tree([5] * 9, [[6] * 9])], None)
    assert found.gradients == 4 * Simulation(policy, config).parameters()
    forward, *_ = found.windows(kept=True)
    alone, *_ = found.windows()
    assert forward["gradients"] == found.gradients
    assert alone["gradients"] == 0
    assert found.windows(kept=True, share=4)[0]["gradients"] == found.gradients // 4
    accumulated = found.windows(kept=True, accumulates=True)
    assert all(parts["gradients"] >= found.gradients for parts in accumulated)


@pytest.mark.parametrize(
    ("lora", "again"), [(None, False), (None, True), (LoRA(), False), (LoRA(), True)]
)
def test_two_shallow_models_stand_for_a_deep_one(lora, again):
    # wide MLPs: what one layer takes is more than what all keep for the backward pass
    policy, config = made_of(
        ("llama", 9, 32, 400, 4, 2, 300), lora=lora, gradient_checkpointing=again
    )
    trees = [Tree([5] * 90, [[6] * 30, [7] * 30])]
    mixed = Precision.of("bf16-mixed")

    def found(depth):
        return Simulation(policy, config, mixed, "cuda", depth).training(trees, None)

    whole, deep = found(None), Deep(tuple(found(depth) for depth in DEPTHS), 9)
    for how in ({}, {"kept": True}, {"kept": True, "accumulates": True}):
        for share in (1, 8):
            one, other = (p.peak(**how, share=share) for p in (whole, deep))
            assert sum(other.values()) == pytest.approx(sum(one.values()), rel=1e-3)
            assert all(size >= 0 for size in other.values())


def test_scoring_holds_no_more_for_a_larger_set():
    policy, config = made_of(SMALL)
    made = Simulation(policy, config)
    tree = Tree([5] * 40, [[6] * 40, [7] * 40])
    few, many = (sum(made.scoring([tree] * n, 120).peak().values()) for n in (2, 12))
    assert many < few + 12 * 80 * 60  # a few numbers for each scored token, not its hidden state


# ------------------------------------------------------------------------- phases


def test_memory_of_a_large_run_by_hand():
    run = run_of(
        (*QWEN2_7B[:1], 2, *QWEN2_7B[2:]),
        policy={"lora": LoRA(r=16), "dtype": "bfloat16", "gradient_checkpointing": True},
        prompt=100,
        answer=56,
        precision=Precision.of("bf16-mixed"),
        kind="cuda",
        rows=10,
        shard_size=2,
    )
    found = Planner().phases(run)
    # 2 V d + 2 (2 d^2 + 2 d k + 3 d m + 2 d + d + 2 k) + d
    base = 2 * 152064 * 3584 + 2 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 3584
    base += 2 * (3 * 3584 + 2 * 512)
    adapters = 16 * 2 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    for parts in found.values():
        assert parts["weights"] == 2 * base
        assert parts["adapters"] == 4 * adapters
        assert parts["optimizer"] == 8 * adapters
        assert parts["context"] == CONTEXT
    # keys and values of 2 layers and 4 heads of 128 numbers in bfloat16; the shard of 2 queries has
    # 6 answers, each with room for 200 + 56 tokens
    assert run.slots() == (6, 256)
    assert found["sampling"]["cache"] == 2 * 2 * 4 * 128 * 2 * 6 * 256
    # the training before left its moments, and no gradients
    assert "gradients" not in found["scoring"]
    once = Planner().phases(replace(run, repeats=False))
    assert "optimizer" not in once["scoring"]


def test_processes_share_or_copy_what_they_hold():
    planner, alone = Planner(), run_of()
    one = planner.phases(alone)["scoring"]
    weights = one["weights"]
    together = planner.phases(replace(alone, devices=4))["scoring"]
    # all-reduce keeps buckets as large as the gradients
    assert together["gradients"] == weights
    assert "gradients" not in one
    assert together["weights"] == weights
    sharded = planner.phases(replace(alone, devices=4, sharded=True, kind="cuda"))
    scoring = sharded["scoring"]
    assert scoring["weights"] == weights // 4
    assert "gradients" not in scoring
    assert scoring["optimizer"] == weights // 2
    assert scoring["gathered"] == weights  # whole, as there is no bound
    layer = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176 + 2 * 64 + 64 + 2 * 32)
    rest = weights - 3 * layer
    # two layers, what is outside of them, and gradients of the larger one, twice in float32
    assert sharded["training"]["gathered"] == 2 * layer + rest + 2 * rest
    few = planner.phases(replace(alone, devices=4, sharded=True, kind="cuda", memory=10**6))
    assert few["scoring"]["gathered"] == 2 * layer + rest
    offloaded = planner.phases(replace(alone, devices=4, sharded=True, offload=True))["scoring"]
    assert not {"weights", "optimizer", "gradients"} & offloaded.keys()


def test_an_initial_reference_is_a_second_copy_of_all_weights_only():
    planner = Planner()
    full = planner.phases(run_of(initial=True))
    assert full["scoring"]["reference"] == full["scoring"]["weights"]
    assert "reference" not in full["training"]
    assert (
        "reference" not in planner.phases(run_of(initial=True, policy={"lora": LoRA()}))["scoring"]
    )


def test_a_batch_has_as_many_records_as_its_budget_holds():
    run = run_of(prompt=50, answer=41, batch=8)
    # x 50, x+ and x- 100, and two answers of 40 fed tokens each
    assert sum(tree.tokens for tree in run.trees(SSO)) == 250 + 6 * 40
    training = run.trainings["training"]
    assert run.records(training) == 8
    assert replace(run, batch_tokens=1500).records(training) == 3
    assert replace(run, batch_tokens=10).records(training) == 1


def test_remedies_are_only_those_that_change_something():
    plain = run_of(batch=4, kind="cuda", devices=2)
    names = changes(plain)
    assert "trainer.strategy: fsdp2" in names
    assert "model.policy.lora: {r: 16}" in names
    assert "model.policy.quantize: 4bit" not in names  # needs LoRA
    assert names["data.batch_size: 1, with more accumulate_grad_batches"].accumulates
    sharded = changes(names["trainer.strategy: fsdp2"])
    assert not any("8bit" in name or "quantize" in name for name in sharded)
    least = changes(
        run_of(policy={"lora": LoRA(), "quantize": "4bit", "gradient_checkpointing": True})
    )
    assert not any("checkpointing" in name or "lora" in name for name in least)


# ------------------------------------------------------------------------- hours


class Products(TorchDispatchMode):
    """FLOPs of all operators but attention, by torch's own formulas."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count and "attention" not in str(func):
            self.flops += count(*args, **(kwargs or {}), out_val=made)
        return made


@pytest.mark.parametrize("lora", [None, LoRA()], ids=["all weights", "lora"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_products_are_those_that_torch_counts(lora, again):
    numbers = ("llama", 3, 64, 176, 4, 2, 900)
    policy, config = made_of(numbers, lora=lora, gradient_checkpointing=again)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = make_trainable(base, policy).train()
    shape = Shape.of(Simulation(policy, config), config)
    trees = [Tree([5] * n, [[6] * 60, [7] * 60]) for n in (20, 90, 90)]
    work = Work(sum(tree.tokens for tree in trees), 6 * 60, seen=0.0)

    def products(run):
        with Products() as counter:
            run()
        return counter.flops

    def train():
        logps, _ = response_logps(model, trees)
        logps.sum().backward()

    with torch.no_grad():
        assert shape.forward(work) == pytest.approx(
            products(lambda: response_logps(model, trees)), rel=0.01
        )
    # small logits are kept for the backward pass: a trained head makes three products of four
    counted = products(train) + (2 * shape.head * work.scored if lora is None else 0)
    assert shape.step(work) == pytest.approx(counted, rel=0.03)


def test_work_of_a_record_by_hand():
    lengths = run_of(prompt=10, answer=4).lengths
    work = Work.of(lengths, (("query", "good"), ("query", "bad"), ("good", "good")))
    # x 10 and twice 3 fed tokens; x+ 20 and once 3
    assert work.tokens == 10 + 6 + 20 + 3
    assert work.scored == 12
    # causal: 55 pairs of x, 210 of x+, each answer its prompt and itself (6 pairs)
    assert work.seen == 55 + 2 * (30 + 6) + 210 + 60 + 6


def test_hours_by_hand():
    run = run_of(prompt=10, answer=100)
    policy, config = made_of(SMALL)
    shape = replace(Shape.of(Simulation(policy, config), config), kept=10**9, layers=10)
    lengths = replace(run.lengths, mean_answers=dict.fromkeys(run.lengths.answers, 50))
    epochs = [Epoch("training", 1000, 1000, 10, SSO)]
    found = costs(shape, lengths, epochs, Rates(1.0, 1e9, 0.5, 2), rows=30, shard_size=100)
    assert found["training"].hours == pytest.approx(found["training"].flops / 1e12 / 3600)
    # ten shards of 300 answers on two devices: each decodes (300 - 30) * 50 / 30 + 100 steps five
    # times, in which it reads the weights and 30 rows of (10 + 20 + 20) / 3 + 25 tokens
    reads = (10**9 + 30 * (50 / 3 + 25) * shape.cache) / (0.6 * 1e9)
    prefill = 2 * shape.linear * 50 * 1000 / 1e12
    assert found["sampling"].hours == pytest.approx((5 * 550 * reads + prefill) / 3600)
    assert found["sampling"].tokens == 150_000
    assert (
        costs(shape, lengths, epochs, Rates(None), rows=None, shard_size=9)["scoring"].hours is None
    )


# ------------------------------------------------------------------------- the command


def objective(name, base):
    return {"class_path": name, "init_args": {"base": {"class_path": base}}}


@pytest.fixture
def recipe(tmp_path, tiny_model):
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds for a poem."} for i in range(40)]
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
        },
        "model": {
            "policy": {"path": str(tiny_model)},
            "objective": objective("SelfSteering", "IPO"),
        },
        "data": {"queries": str(queries), "batch_size": 4},
        "pairs": {
            "score_tokens": 1500,
            "shard_size": 4,
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 32}},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_plan_says_what_a_record_becomes_and_leaves_nothing(recipe, sso, tmp_path):
    status, out, _ = sso("plan", "--config", recipe, "--tflops", "1")
    assert status == 0
    assert "it fits" in out
    assert "41,248 parameters" in out
    assert max(map(len, out.splitlines())) <= 80
    # the principle is marked, and only in the two steered prompts
    assert out.count("\u27e6") == out.count("\u27e7") == 2
    assert "picked at random" in " ".join(out.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["queries.jsonl", "recipe.yaml"]

    status, out, _ = sso("plan", "--config", recipe, "--json", "--answer-tokens", "8")
    found = json.loads(out)
    assert status == 0
    assert found["fits"] is True
    assert found["queries"] == 40
    sequences = {s["name"]: s for s in found["dry_run"]["sequences"]}
    assert list(sequences) == [
        "(x, y+)", "(x, y-)", "(x+, y+)", "(x+, y-)", "(x-, yo)", "(x-, y+)"
    ]  # fmt: skip
    assert sequences["(x, y+)"]["principle"] is None
    begin, end = sequences["(x+, y+)"]["principle"]
    assert 0 < begin < end < sequences["(x+, y+)"]["prompt_tokens"]
    # three answers of 8 tokens to each of 40 queries; no hours without a CPU's rate
    assert found["costs"]["sampling"]["tokens"] == 3 * 8 * 40
    assert found["costs"]["training"]["hours"] is None


def test_everything_wrong_is_told_at_once(recipe, sso):
    overrides = {
        "data.batch_size": 0,
        "pairs.sampler.init_args.temperature": -1,
        "model.schedule.warmup": 3,
        "model.policy.quantize": "4bit",
        "model.objective.init_args.alpha": 7,
        "data.val_queries": "nothing.jsonl",
        "pairs.max_prompt_tokens": 30,
        "trainer.gradient_clip_val": -2,
        "trainer.strategy": "deepspeed",
        "trainer.reload_dataloaders_every_n_epochs": 0,
    }
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    status, out, _ = sso("plan", "--config", recipe, "--json", *arguments)
    assert status == 2
    told = "\n".join(json.loads(out)["problems"])
    for part in (
        "data.batch_size must be at least 1, got 0",
        "temperature must be 0 or more",
        "schedule.warmup must be in [0, 1), got 3.0",
        "policy.quantize needs policy.lora",
        "alpha must be in [0, 1], got 7.0",
        "data.val_queries: no file nothing.jsonl",
        "40 of 40 queries are longer with their principles than pairs.max_prompt_tokens (30)",
        "trainer.gradient_clip_val must be at least 0, got -2",
        "trainer.strategy: deepspeed is not supported",
        "trainer.reload_dataloaders_every_n_epochs is 0",
    ):
        assert part in told
    assert len(told.splitlines()) == len(overrides)


def test_what_does_not_fit_is_told_with_what_would(recipe, capsys):
    from sso_lightning.plan.make import make_plan
    from sso_lightning.plan.show import show

    plan = make_plan(["--config", str(recipe)], memory=17 * 10**6)
    assert not plan.fine
    assert plan.problems == []
    assert plan.peak[1] > 17e6
    assert all(remedy.bytes < plan.peak[1] for remedy in plan.remedies)
    assert any(remedy.fits for remedy in plan.remedies)
    show(plan)
    out = capsys.readouterr().out
    assert "IT DOES NOT FIT" in out
    assert "What would take less" in out


def test_a_model_out_of_reach_is_planned_from_its_config(recipe, sso, tmp_path):
    status, out, _ = sso("plan", "--config", recipe, "--model.policy.path", "some/model", "--json")
    told = json.loads(out)["problems"]
    assert status == 2
    assert "policy.path: cannot read the config of some/model" in told[0]
    assert "--model-config FILE" in told[0]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of("qwen2", 2, *QWEN2_7B[2:])))
    given = ["--model.policy.path", "some/model", "--model-config", file, "--json"]
    more = ["--trainer.accelerator", "gpu", "--model.policy.lora", "{r: 8}"]
    status, out, _ = sso("plan", "--config", recipe, *given, *more, "--devices", "8")
    found = json.loads(out)
    assert (status, found["problems"], found["devices"]) == (0, [], 8)
    assert found["strategy"] == "ddp"
    assert any("no dry run" in note for note in found["notes"])
    assert found["memory"] == 80 * 10**9
    assert found["costs"]["training"]["hours"] > 0


@pytest.mark.parametrize("name", ["sso_2024_qlora", "sso_2025"])
def test_large_recipes_are_planned(name, sso, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of("qwen2", 2, 128, 352, 4, 2, 2000)))
    path = ROOT / "configs" / "qwen2_7b" / f"{name}.yaml"
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(f'{{"prompt": "Why {i}?"}}\n' for i in range(9000)))
    given = ["--data.queries", queries, "--model-config", file, "--json"]
    status, out, _ = sso("plan", "--config", path, *given)
    found = json.loads(out)
    assert (status, found["problems"]) == (0, [])
    assert found["queries"] == 9000
    training = found["phases"]["training"]
    # 2 V d in bfloat16 is not quantised
    whole = 2 * 2 * 2000 * 128
    linear = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 352)
    if name == "sso_2025":
        assert list(found["costs"]) == ["sampling", "scoring", "generator training", "training"]
        assert training["weights"] > whole + 2 * linear
        # four sequences of 8000 records, three prompts in all of 100 + 150 tokens
        tokens = 2 * 250 + 4 * (2048 - 1)
        assert found["costs"]["generator training"]["tokens"] == 8000 * tokens
    else:
        assert whole < training["weights"] < whole + 0.7 * linear + 10_000


def test_finished_pairs_are_measured(recipe, sso, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Why {i}?", "chosen": "Because of it.", "rejected": "No."} for i in range(5)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = yaml.safe_load(recipe.read_text())
    tree["data"] = {"pairs": str(pairs)}
    tree["model"]["objective"] = objective("Contrastive", "DPO")
    recipe.write_text(yaml.safe_dump(tree))
    status, out, _ = sso("plan", "--config", recipe, "--json")
    found = json.loads(out)
    assert (status, found["problems"]) == (0, [])
    assert "sampling" not in found["phases"]
    good, bad = found["dry_run"]["sequences"]
    assert (good["sampled"], good["name"]) == (False, "(x, y+)")
    assert good["answer_tokens"] > bad["answer_tokens"] > 1
    tree["model"]["objective"] = objective("SelfSteering", "IPO")
    recipe.write_text(yaml.safe_dump(tree))
    status, out, _ = sso("plan", "--config", recipe, "--json")
    assert status == 2
    assert "no good_system, which SelfSteering needs" in json.loads(out)["problems"][0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory", "80"], "--memory: '80' is no size such as 80GB or 24GiB"),
        (["--devices", "0"], "--devices must be above 0, got 0"),
        (["--mfu", "2"], "--mfu must be at most 1, got 2"),
        (["--model-config", "none.json"], "--model-config: no file none.json"),
        (["--config", "none.yaml"], "--config: no file none.yaml"),
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
    ],
)
def test_wrong_flags_are_one_line(recipe, sso, arguments, says):
    status, _, err = sso("plan", "--config", recipe, *arguments)
    assert status == 2
    assert f"error: {says}" in err
    assert "Traceback" not in err


def test_reward_runs_are_refused(sso, tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text("data: {sets: [{path: a}]}\n")
    status, _, err = sso("plan", "--config", path)
    assert status == 2
    assert err.endswith("trains a reward model, which plan does not know; it plans `fit`\n")


def test_sizes():
    assert bytes_of("80GB") == 80 * 10**9
    assert bytes_of("1.5GiB") == 1.5 * 2**30
    for wrong in ("80", "GB", "-1GB", "0GB", "80 gigabytes"):
        with pytest.raises(InputError, match="--memory"):
            bytes_of(wrong)


def test_fullest():
    assert fullest({"a": {"x": 1, "y": 4}, "b": {"x": 3}}) == ("a", 5)
