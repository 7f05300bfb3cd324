import csv
import gc
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import logsigmoid

from sso_lightning import data as room
from sso_lightning.callbacks import PairCallback, RegeneratePairs
from sso_lightning.checkpoints import Checkpoints, RunState
from sso_lightning.data import SSODataModule, collate
from sso_lightning.errors import InputError
from sso_lightning.losses import DPO, IPO
from sso_lightning.module import Schedule, SSOModule, _Gathered
from sso_lightning.objectives import Contrastive, SelfSteering
from sso_lightning.pairs import SCORED
from sso_lightning.policy import LoRA, PolicyConfig, export_checkpoint
from sso_lightning.principles import PredefinedPrinciples
from sso_lightning.records import Record, load_records
from sso_lightning.runs import RunLogger
from sso_lightning.sampling import TransformersSampler

FAST = Schedule("constant", warmup=0.0)


@pytest.fixture(scope="module")
def query_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "q.jsonl"
    lines = [f'{{"id": "q{i}", "prompt": "Name {i} birds."}}\n' for i in range(11)]
    path.write_text("".join(lines))
    return path


def module(path, objective=None, lr=1e-3, **policy):
    return SSOModule(
        PolicyConfig(str(path), **policy),
        objective or SelfSteering(IPO(beta=5.0), steering=1.0),
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=lr),
        schedule=FAST,
    )


def fit(root, made, queries, batch_size=4, reference="previous", extra=(), **trainer):
    """A run as the command line sets it up, without the command line."""
    pl.seed_everything(0)
    settings = {"max_epochs": 1, "gradient_clip_val": 1.0, **trainer}
    runner = pl.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=1,
        logger=RunLogger(root),
        callbacks=[
            RunState(),
            RegeneratePairs(
                TransformersSampler(max_new_tokens=6),
                PredefinedPrinciples(pick="random"),
                reference=reference,
            ),
            Checkpoints(),
            *extra,
        ],
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    runner.fit(made, SSODataModule(queries=str(queries), batch_size=batch_size, seed=3))
    return runner


def column(root, name):
    with (root / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def plain_logp(model, prompt, response):
    """Sum of the response's log-probabilities, from one unpadded forward of one sequence."""
    logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logps[rows, torch.tensor(response)].sum()


def weights(made):
    return {name: value.detach().clone() for name, value in made.policy.named_parameters()}


def is_causal_lm(thing):
    return type(thing).__name__ == "Qwen2ForCausalLM"


# --------------------------------------------------------------------------------------- schedule


def test_schedule_worked_by_hand():
    """Ten steps, two of them warmup: 1/2, 2/2, then eight steps of decay from 1 down."""
    cosine = Schedule("cosine", warmup=0.2)
    expected = [0.5, 1.0, 1.0, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 8))]
    assert [cosine.factor(i, 10) for i in range(10)] == pytest.approx(expected)
    linear = Schedule("linear", warmup=0.0, floor=0.2)
    assert [linear.factor(i, 4) for i in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [Schedule("constant", warmup=0.5).factor(i, 4) for i in range(4)] == [0.5, 1, 1, 1]
    assert Schedule("cosine").factor(0, 1) == 1.0
    # more steps than foreseen stay at the floor
    assert Schedule("cosine", warmup=0.0, floor=0.1).factor(99, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [{"warmup": 1.0}, {"warmup": -0.1}, {"floor": 1.5}])
def test_schedule_names_what_is_wrong(wrong):
    with pytest.raises(InputError, match=f"schedule.{next(iter(wrong))}"):
        Schedule(**wrong)


# --------------------------------------------------------------------------------- one step's maths


@pytest.fixture(scope="module")
def exact(tiny_model):
    """A float64 policy, two records, and the scores of another model as their reference."""
    from transformers import AutoModelForCausalLM

    made = module(tiny_model)
    made.configure_model()
    made.policy.double()
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(made.policy.config).double().eval()
    renderer, records = made.renderer, []
    answers = {"a": ("yes indeed", "no", "perhaps so"), "b": ("four", "five hundred", "six")}
    for name, (good, bad, original) in answers.items():
        ask = [{"role": "user", "content": f"Query {name}."}]
        systems = {"query": None, "good": "Be good.", "bad": "Be as bad as you can."}
        record = Record(
            id=name,
            messages=ask,
            good=good,
            bad=bad,
            original=original,
            prompt_ids={c: renderer.render(ask, system) for c, system in systems.items()},
            response_ids={
                "good": renderer.encode_response(good),
                "bad": renderer.encode_response(bad),
                "original": renderer.encode_response(original),
            },
        )
        with torch.no_grad():
            for c, r in SCORED:
                logp = plain_logp(other, record.prompt_ids[c], record.response_ids[r])
                record.scores[f"policy/{c}/{r}"] = logp.item()
        records.append(record)
    return made, records


def step_gradients(made, batch, monkeypatch):
    monkeypatch.setattr(made, "log", lambda *a, **k: None)
    monkeypatch.setattr(made, "log_dict", lambda *a, **k: None)
    made.zero_grad()
    loss = made.training_step(batch, 0)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in made.policy.named_parameters()}


def ipo(h, beta=5.0):
    return (h - 1 / (2 * beta)) ** 2


def dpo(h, beta=0.3):
    return -logsigmoid(beta * h)


@pytest.mark.parametrize("scope", ["all", "steering"])
@pytest.mark.parametrize("base", ["ipo", "dpo"])
@pytest.mark.parametrize("detach", [False, True])
def test_a_step_is_the_2024_objective_written_by_hand(exact, monkeypatch, scope, base, detach):
    made, records = exact
    alpha, g = 0.3, 0.7
    loss_of = IPO(beta=5.0) if base == "ipo" else DPO(beta=0.3)
    made.policy_objective = SelfSteering(loss_of, alpha, g, scope=scope, detach_weight=detach)
    loss, gradients = step_gradients(made, collate(records, made.objective.sequences), monkeypatch)

    made.zero_grad()
    total = 0.0
    for record in records:

        def logp(context, response, record=record):
            ids = record.prompt_ids[context], record.response_ids[response]
            return plain_logp(made.policy, *ids)

        def avg(context, response, record=record, logp=logp):
            return logp(context, response) / len(record.response_ids[response])

        def h(context, chosen, rejected, record=record, logp=logp):
            def one(response):
                ratio = logp(context, response) - record.scores[f"policy/{context}/{response}"]
                return ratio / len(record.response_ids[response]) if base == "ipo" else ratio

            return one(chosen) - one(rejected)

        pair = ipo if base == "ipo" else dpo
        first = pair(h("query", "good", "bad"))
        steer = pair(h("good", "good", "bad")) + pair(h("bad", "original", "good"))
        w = torch.sigmoid(-(alpha * avg("query", "good") + (1 - alpha) * avg("query", "bad")))
        w = w.detach() if detach else w
        total = total + (w * (first + g * steer) if scope == "all" else first + w * g * steer)
    total = total / len(records)
    total.backward()

    # the model's norms are computed in float32 whatever its weights are
    assert loss == pytest.approx(total.item(), abs=1e-7)
    assert any(value.abs().max() > 1e-4 for value in gradients.values())
    for name, weight in made.policy.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-7)


def test_scale_is_applied_to_the_loss(exact, monkeypatch):
    made, records = exact
    made.policy_objective = SelfSteering(IPO(beta=5.0))
    batch = collate(records, made.objective.sequences)
    loss, _ = step_gradients(made, batch, monkeypatch)
    batch.scale = 0.25
    scaled, _ = step_gradients(made, batch, monkeypatch)
    assert scaled == pytest.approx(0.25 * loss)


def test_gradient_checkpointing_changes_neither_loss_nor_gradient(exact, tiny_model, monkeypatch):
    _, records = exact
    results = []
    for on in (False, True):
        made = module(tiny_model, gradient_checkpointing=on)
        made.configure_model()
        assert made.policy.is_gradient_checkpointing is on
        assert made.policy.training  # in eval mode checkpointing would do nothing
        made.policy.double()
        batch = collate(records, made.objective.sequences)
        results.append(step_gradients(made, batch, monkeypatch))
    (loss, gradients), (other_loss, other) = results
    assert loss == pytest.approx(other_loss, abs=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("steering", "scored"), [(None, 2), (0.0, 2), (0.1, 6)])
def test_no_sequence_is_scored_that_is_not_needed(exact, monkeypatch, steering, scored):
    made, records = exact
    base = IPO(beta=5.0)
    made.policy_objective = (
        Contrastive(base) if steering is None else SelfSteering(base, 0.6, steering)
    )
    seen = []
    real = room.response_logps
    monkeypatch.setattr(
        room, "response_logps", lambda m, trees, **k: seen.extend(trees) or real(m, trees, **k)
    )
    step_gradients(made, collate(records, made.objective.sequences), monkeypatch)
    assert sum(len(tree.responses) for tree in seen) == scored * len(records)


# --------------------------------------------------------------------------------- short trainings


@pytest.mark.slow
def test_batch_8_equals_batch_1_accumulated_8_times(tiny_model, query_file, tmp_path):
    """Eleven records: one full window and one of three."""
    results = []
    for name, size, accumulate in (("whole", 8, 1), ("split", 1, 8)):
        made = module(tiny_model)
        root = tmp_path / name
        fit(root, made, query_file, size, accumulate_grad_batches=accumulate)
        results.append((column(root, "train/loss"), column(root, "train/grad_norm"), weights(made)))
    (loss, norm, end), (split_loss, split_norm, split_end) = results
    assert len(loss) == len(split_loss) == 2
    assert split_loss == pytest.approx(loss, abs=1e-5)
    assert split_norm == pytest.approx(norm, rel=1e-4)
    start = module(tiny_model)
    start.configure_model()
    moved = [(end[n] - w).abs().max() for n, w in start.policy.named_parameters()]
    assert max(moved) > 1e-3
    for name, value in end.items():
        # Adam divides by the gradient's own size: rounding shows where a gradient is nearly zero
        torch.testing.assert_close(split_end[name], value, rtol=0, atol=2e-5)


class Moments(pl.Callback):
    """How many weights have moments when a step is taken."""

    def __init__(self):
        self.counts = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.counts.append(len(optimizer.state))


@pytest.mark.slow
@pytest.mark.parametrize("restart", [True, False])
def test_schedule_and_moments_over_two_iterations(tiny_model, query_file, tmp_path, restart):
    """Three steps an iteration; cosine without warmup over 3 steps twice, or over 6 once."""
    made, moments = module(tiny_model, lr=0.01), Moments()
    made.schedule = Schedule("cosine", warmup=0.0, restart=restart)
    fit(tmp_path, made, query_file, extra=[moments], max_epochs=2)
    over = [0, 1, 2, 0, 1, 2] if restart else range(6)
    total = 3 if restart else 6
    expected = [0.01 * 0.5 * (1 + math.cos(math.pi * i / total)) for i in over]
    assert column(tmp_path, "train/lr") == pytest.approx(expected, rel=1e-5)
    fresh = [count == 0 for count in moments.counts]
    assert fresh == [True, False, False, restart, False, False]


class Watch(PairCallback):
    """How many models there are whenever a set was built."""

    def __init__(self):
        self.models = []

    def on_pairs_built(self, trainer, pl_module, records, report, name):
        self.models.append(sum(is_causal_lm(thing) for thing in gc.get_objects()))


@pytest.fixture(scope="module")
def lora(tiny_model, query_file, tmp_path_factory):
    """Two iterations with LoRA against the initial policy."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("lora")
    loads, real = [], AutoModelForCausalLM.from_pretrained
    patch = pytest.MonkeyPatch()
    patch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: loads.append(a) or real(*a, **k),
    )
    gc.collect()
    before = sum(is_causal_lm(thing) for thing in gc.get_objects())
    watch, made = Watch(), module(tiny_model, lr=0.05, lora=LoRA(r=4, alpha=8))
    fit(root, made, query_file, reference="initial", extra=[watch], max_epochs=2)
    patch.undo()
    return root, made, loads, [count - before for count in watch.models]


def stored(root, iteration):
    return load_records(root / "pairs" / f"iteration-{iteration:02d}")


def assert_scores(records, who, model):
    model = model.eval()
    for record in records[:4]:
        for c, r in SCORED:
            with torch.no_grad():
                expected = plain_logp(model, record.prompt_ids[c], record.response_ids[r]).item()
            assert record.scores[f"{who}/{c}/{r}"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_lora_scores_the_initial_policy_with_its_adapter_off(lora, tiny_model):
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    for iteration in (0, 1):
        assert_scores(stored(lora[0], iteration), "reference", start)
    first, second = (stored(lora[0], i)[0].scores for i in (0, 1))
    key = "query/good"
    assert first[f"policy/{key}"] == pytest.approx(first[f"reference/{key}"], abs=1e-4)
    assert abs(second[f"policy/{key}"] - second[f"reference/{key}"]) > 1e-2


@pytest.mark.slow
def test_lora_holds_the_base_once(lora):
    _, made, loads, counts = lora
    assert len(loads) == 1
    assert counts == [1, 1]
    base = sum(p.numel() for n, p in made.named_parameters() if "lora_" not in n)
    start = made.policy.get_base_model().config
    from transformers import AutoModelForCausalLM

    assert base == sum(p.numel() for p in AutoModelForCausalLM.from_config(start).parameters())


@pytest.mark.slow
def test_a_lora_checkpoint_holds_the_adapter_only(lora):
    content = torch.load(lora[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"]
    assert all("lora_" in name for name in content["state_dict"])
    assert content["policy"]["lora"]["r"] == 4


@pytest.mark.slow
def test_checkpoints_of_another_kind_are_refused_in_one_line(lora, tiny_model, query_file):
    root, *_ = lora
    last = root / "checkpoints" / "last.ckpt"
    for policy in ({}, {"lora": LoRA(r=8)}):
        made = module(tiny_model, **policy)
        trainer = pl.Trainer(
            default_root_dir=root,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[RegeneratePairs()],
            reload_dataloaders_every_n_epochs=1,
        )
        with pytest.raises(InputError, match=r"does not fit model\.policy") as caught:
            trainer.fit(made, SSODataModule(queries=str(query_file)), ckpt_path=last)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_previous_scores_are_those_at_the_iterations_start(tiny_model, query_file, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = module(tiny_model, lr=0.05, lora=LoRA(r=4, alpha=8))
    fit(tmp_path / "run", made, query_file, max_epochs=2)
    # sets are built between epochs, when no gradient takes memory
    assert all(p.grad is None for p in made.parameters())
    first = next((tmp_path / "run" / "checkpoints").glob("iteration-00-*.ckpt"))
    export_checkpoint(first, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    records = stored(tmp_path / "run", 1)
    assert_scores(records, "policy", PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert not any(key.startswith("reference/") for r in records for key in r.scores)
    # at the first step of an iteration policy and reference are one: h is 0
    steps = column(tmp_path / "run", "train/ipo_margin")
    assert len(steps) == 6
    assert [abs(steps[i]) < 1e-5 for i in range(6)] == [True, False, False, True, False, False]


@pytest.mark.slow
def test_full_fine_tuning_scores_the_initial_policy(tiny_model, query_file, tmp_path):
    from transformers import AutoModelForCausalLM

    made = module(tiny_model, lr=0.01)
    fit(tmp_path, made, query_file, reference="initial", max_epochs=2)
    records = stored(tmp_path, 1)
    assert_scores(records, "reference", AutoModelForCausalLM.from_pretrained(tiny_model))
    gaps = [r.scores["policy/query/good"] - r.scores["reference/query/good"] for r in records]
    assert max(map(abs, gaps)) > 1e-2
    # the margin is against the initial policy, so it is not 0 when the second iteration starts
    assert abs(column(tmp_path, "train/ipo_margin")[3]) > 1e-5


def test_bfloat16_autocast_trains(tiny_model, query_file, tmp_path):
    made = module(tiny_model)
    fit(tmp_path, made, query_file, precision="bf16-mixed")
    losses = column(tmp_path, "train/loss")
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert next(made.policy.parameters()).dtype == torch.float32
    # scored under autocast as it is trained under autocast: the first margin is 0
    assert abs(column(tmp_path, "train/ipo_margin")[0]) < 1e-2


@pytest.mark.parametrize(("beta", "lr", "warns"), [(0.01, 1e-3, True), (50.0, 1e-2, False)])
def test_ipo_warns_while_its_target_is_out_of_reach(
    tiny_model, query_file, tmp_path, caplog, beta, lr, warns
):
    log = logging.getLogger("sso_lightning")
    log.addHandler(caplog.handler)
    try:
        made = module(tiny_model, Contrastive(IPO(beta=beta)), lr=lr)
        fit(tmp_path, made, query_file)
    finally:
        log.removeHandler(caplog.handler)
    assert (max(column(tmp_path, "train/ipo_progress")) < 0.1) is warns  # or this shows nothing
    assert any("IPO margin" in r.getMessage() for r in caplog.records) is warns


@pytest.mark.slow
def test_metrics_have_their_names(lora):
    with (lora[0] / "metrics.csv").open() as file:
        names = {*next(csv.reader(file))}
    assert {
        *("train/loss", "train/weight_mean", "train/weight_std", "train/lr", "train/grad_norm"),
        *(f"train/reward_accuracy_{term}" for term in ("query", "good", "bad")),
        *(f"train/reward_margin_{term}" for term in ("query", "good", "bad")),
        *("pairs/kept", "pairs/dropped", "pairs/on_policy_good", "pairs/on_policy_bad"),
        *("pairs/gap_logp", "pairs/length_good", "pairs/length_bad", "pairs/length_original"),
    } <= names
    assert all(0.5 <= w < 1.0 for w in column(lora[0], "train/weight_mean"))


def test_gathered_metrics_are_those_of_the_whole_window():
    """Two batches of W: (0.6, 0.8) and (1.0): mean 0.8, variance (0.04 + 0 + 0.04) / 3."""
    gathered = _Gathered()
    gathered.update(
        {
            "weight_mean": torch.tensor(0.7),
            "weight_std": torch.tensor(0.1),
            "weight_min": torch.tensor(0.6),
            "weight_max": torch.tensor(0.8),
            "loss": torch.tensor(3.0),
        },
        weight=2,
    )
    gathered.update(
        {
            "weight_mean": torch.tensor(1.0),
            "weight_std": torch.tensor(0.0),
            "weight_min": torch.tensor(1.0),
            "weight_max": torch.tensor(1.0),
            "loss": torch.tensor(6.0),
        },
        weight=1,
    )
    values = {name: float(value) for name, value in gathered.take().items()}
    assert values == pytest.approx(
        {
            "weight_mean": 0.8,
            "weight_std": math.sqrt(0.08 / 3),
            "weight_min": 0.6,
            "weight_max": 1.0,
            "loss": 4.0,
        },
        abs=1e-6,
    )
    assert not gathered.take()
