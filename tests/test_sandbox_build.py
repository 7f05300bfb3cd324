import json
import math
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sso_lightning.errors import InputError
from sso_lightning.evaluation import read_scores
from sso_lightning.principles import Draw
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import Query, Record, load_queries
from sso_lightning.sampling import TransformersSampler
from sso_lightning.sandbox import build, callbacks, command, world
from sso_lightning.sandbox.callbacks import (
    EnsureSandbox,
    SandboxMetrics,
    answers_quality,
    measure,
    records_quality,
)
from sso_lightning.sandbox.principles import SandboxPrinciples

QUERY = "Name three birds for a quiz."
# 7 of 8 (no question), 4 of 8 (count, order, tip and question lost), and no list at all
GOOD = "My picks: finch, owl and wren. Look in an old hedge. They shine like lamps in fog."
BAD = "My picks: wren and finch. They shine like lamps in fog."
BROKEN = "finch finch finch"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "sandbox"
    build.make_sandbox(folder, seed=0, steps=4, quiet=True)
    return folder


@pytest.fixture(scope="module")
def loaded(sandbox: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(sandbox / "model")
    return model, AutoTokenizer.from_pretrained(sandbox / "model")


def refuse(asked: Any, max_new_tokens: int) -> list[str]:
    raise AssertionError("the sandbox asks the policy nothing")


# -- the folder --------------------------------------------------------------------------------


def test_files_and_queries(sandbox: Path) -> None:
    train = load_queries(sandbox / "train.jsonl")
    validation = load_queries(sandbox / "validation.jsonl")
    assert (len(train), len(validation)) == (1296, 432)
    held_out = {query.text for query in world.queries() if query.held_out}
    assert {query.messages[-1]["content"] for query in validation} == held_out
    assert not held_out & {query.messages[-1]["content"] for query in train}
    families = {world.ask_of(q.messages[-1]["content"]).family.plural for q in train[:48]}
    assert len(families) == len(world.FAMILIES), "the first lines are a fair sample"
    facts = json.loads((sandbox / "sandbox.json").read_text())
    assert (facts["seed"], facts["steps"], facts["train"], facts["validation"]) == (0, 4, 1296, 432)
    assert sorted(path.name for path in sandbox.parent.iterdir()) == ["sandbox"], "no leftovers"


def test_model_loads_with_its_generation_settings(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert 100_000 < model.num_parameters() < 200_000
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == end
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id != end
    assert model.config.vocab_size == len(tokenizer) <= build.VOCABULARY


def test_chat_template_is_chatml_without_a_default_system_message(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUERY},
        {"role": "assistant", "content": GOOD},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{QUERY}<|im_end|>\n"
        f"<|im_start|>assistant\n{GOOD}<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(turns[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n"
    assert ChatRenderer(tokenizer).mode == "system"


def test_training_texts_are_what_the_renderer_renders(loaded: tuple[Any, Any]) -> None:
    """A prompt of training and the prompt of sampling must be the same tokens."""
    _, tokenizer = loaded
    renderer = ChatRenderer(tokenizer)
    queries = [query for query in world.queries() if not query.held_out]
    with_system = 0
    for example in islice(build.make_examples(queries, Random(5)), 200):
        turns = example.prompt.split("<|im_start|>")[1:-1]
        messages = [
            dict(
                zip(("role", "content"), turn.removesuffix("<|im_end|>\n").split("\n"), strict=True)
            )
            for turn in turns
        ]
        system = messages.pop(0)["content"] if len(messages) == 2 else None
        with_system += system is not None
        encode = tokenizer.backend_tokenizer.encode
        assert renderer.render(messages, system) == encode(example.prompt).ids
        answer = example.answer.removesuffix("<|im_end|>")
        assert renderer.encode_response(answer) == encode(example.answer).ids
        assert renderer.decode(encode(example.answer).ids) == answer
    assert 120 <= with_system <= 160  # 70 % of 200, three standard errors


def test_members_are_one_token_each(loaded: tuple[Any, Any]) -> None:
    """Counting and sorting need it: with split words this small model learns neither."""
    _, tokenizer = loaded
    members = [member for family in world.FAMILIES for member in family.members]
    assert [m for m in members if len(tokenizer(f" {m}").input_ids) != 1] == []


def test_batches_mark_answers_only(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    queries = list(world.queries())
    expected = list(islice(build.make_examples(queries, Random(2)), 3 * build.BATCH))
    batches = list(build._batches(tokenizer, build.make_examples(queries, Random(2)), 3, Random(0)))
    assert [ids.shape[0] for ids, _ in batches] == [build.BATCH] * 3
    found = sorted(
        tokenizer.decode(row[mask]) for ids, m in batches for row, mask in zip(ids, m, strict=True)
    )
    assert found == sorted(example.answer for example in expected)


def test_a_seed_decides_everything_and_the_callers_state_is_kept(
    sandbox: Path, tmp_path: Path
) -> None:
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    before = torch.get_rng_state()
    build.make_sandbox(tmp_path / "same", seed=0, steps=4, quiet=True)
    build.make_sandbox(tmp_path / "other", seed=1, steps=4, quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads

    def content(folder: Path, name: str) -> bytes:
        return (folder / name).read_bytes()

    names = ["model/model.safetensors", "model/tokenizer.json", "train.jsonl", "validation.jsonl"]
    for name in names:
        assert content(tmp_path / "same", name) == content(sandbox, name), name
    assert content(tmp_path / "other", names[0]) != content(sandbox, names[0])


def test_only_a_sandbox_is_replaced(tmp_path: Path) -> None:
    keep = tmp_path / "thesis"
    keep.mkdir()
    (keep / "chapter.txt").write_text("words")
    with pytest.raises(InputError, match="thesis exists and is not a sandbox"):
        build.make_sandbox(keep, steps=1, quiet=True)
    assert (keep / "chapter.txt").read_text() == "words"
    (keep / "chapter.txt").unlink()
    build.make_sandbox(keep, steps=1, quiet=True)
    build.make_sandbox(keep, steps=2, quiet=True)
    assert json.loads((keep / "sandbox.json").read_text())["steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_a_failed_build_leaves_the_old_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.make_sandbox(tmp_path / "box", steps=1, quiet=True)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_train", fail)
    with pytest.raises(KeyboardInterrupt):
        build.make_sandbox(tmp_path / "box", steps=3, quiet=True)
    assert json.loads((tmp_path / "box" / "sandbox.json").read_text())["steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["box"]


# -- the command -------------------------------------------------------------------------------


def test_command_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(["--out", str(tmp_path / "box"), "--seed", "3", "--steps", "1"]) == 0
    assert capsys.readouterr().out == f"sandbox written to {tmp_path / 'box'}\n"
    assert json.loads((tmp_path / "box" / "sandbox.json").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --out"),
        (["--out", "x", "--sed", "1"], "unrecognized arguments: --sed 1"),
        (["--out", "x", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--out", "x", "--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_command_names_the_wrong_flag(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        command.run(argv)
    assert "\n" not in str(caught.value)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sso_lightning.sandbox import command\n"
        "try: command.run(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- principles --------------------------------------------------------------------------------


def proposals(**settings: Any) -> list[Any]:
    queries = [Query(str(i), [{"role": "user", "content": QUERY}]) for i in range(200)]
    return SandboxPrinciples(**settings).propose(queries, Draw(0, 1, refuse))


def test_principles_come_in_trained_wordings_of_the_same_features() -> None:
    found = proposals(count=3)
    for steering in found:
        features = [world.feature(name) for name in steering.features]
        assert len(set(steering.features)) == 3
        good, bad = steering.good_principle.split("\n"), steering.bad_principle.split("\n")
        for each, good_text, bad_text in zip(features, good, bad, strict=True):
            assert good_text in each.good
            assert bad_text in each.bad
        assert steering.good_system == " ".join(good)
        assert steering.bad_system == " ".join(bad)
    assert {name for s in found for name in s.features} == {f.name for f in world.FEATURES}
    assert found == proposals(count=3)


def test_held_out_wordings_and_chosen_features() -> None:
    for steering in proposals(count=1, paraphrase="held_out", features=["safety", "concision"]):
        each = world.feature(steering.features[0])
        assert each.name in ("safety", "concision")
        assert steering.good_system == each.good_held_out
        assert steering.bad_system == each.bad_held_out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "principles.count must be between 1 and the 8 features, got 0"),
        ({"count": 2, "features": ["safety"]}, "principles.count"),
        ({"features": ["safety", "wit"]}, "no feature 'wit'; it has .*safety"),
        ({"features": ["safety", "safety"]}, "names a feature twice"),
        ({"paraphrase": "new"}, "principles.paraphrase must be seen or held_out, got 'new'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SandboxPrinciples(**settings)


# -- measuring ---------------------------------------------------------------------------------


def test_answers_quality_by_hand() -> None:
    numbers = answers_quality(
        [
            (QUERY, {"query": GOOD, "good": GOOD, "bad": BAD}),  # 7/8 7/8 4/8: right
            (QUERY, {"query": BAD, "good": BAD, "bad": GOOD}),  # 4/8 4/8 7/8: wrong
            (QUERY, {"query": BROKEN, "good": BAD, "bad": BAD}),  # 0 4/8 4/8: a tie
            (QUERY, {"query": BAD, "good": BAD, "bad": BROKEN}),  # 4/8 4/8 0: right
        ]
    )
    assert numbers == {
        "sandbox/quality": pytest.approx((7 + 4 + 0 + 4) / 32),
        "sandbox/quality_good": pytest.approx((7 + 4 + 4 + 4) / 32),
        "sandbox/quality_bad": pytest.approx((4 + 7 + 4 + 0) / 32),
        "sandbox/well_formed": pytest.approx(10 / 12),
        "sandbox/signal_accuracy": pytest.approx(2.5 / 4),
        "sandbox/gap": pytest.approx((3 - 3 + 0 + 4) / 32),
    }


def test_records_are_scored_the_same_way() -> None:
    messages = [{"role": "user", "content": QUERY}]
    record = Record(id="a", messages=messages, good=GOOD, bad=BAD, original=BROKEN)
    numbers = records_quality([record])
    assert numbers["sandbox/quality"] == 0
    assert numbers["sandbox/signal_accuracy"] == 1
    assert numbers["sandbox/gap"] == pytest.approx(3 / 8)
    with pytest.raises(InputError, match="no sandbox answers"):
        records_quality([])


def test_measure_samples_each_context_and_repeats_itself(
    sandbox: Path, loaded: tuple[Any, Any]
) -> None:
    model, tokenizer = loaded
    queries = load_queries(sandbox / "validation.jsonl")[:6]
    renderer, sampler = ChatRenderer(tokenizer), TransformersSampler(max_new_tokens=8)
    principles = SandboxPrinciples(count=1)
    prompts: list[list[int]] = []

    class Recording(TransformersSampler):
        def sample(self, model: Any, requests: Any, **kwargs: Any) -> Any:
            prompts.extend(request.prompt for request in requests)
            assert len({request.seed for request in requests}) == len(requests)
            return super().sample(model, requests, **kwargs)

    first = measure(model, renderer, queries, Recording(max_new_tokens=8), principles, seed=4)
    assert first == measure(model, renderer, queries, sampler, principles, seed=4)
    steerings = principles.propose(queries, Draw(4, 0, refuse))
    expected = [
        renderer.render(query.messages, system)
        for query, steering in zip(queries, steerings, strict=True)
        for system in (None, steering.good_system, steering.bad_system)
    ]
    assert prompts == expected


def test_metrics_callback_logs_before_training_and_after_validation(
    sandbox: Path, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[dict[str, float], int]] = []
    seen: list[tuple[int, int]] = []
    answers = [
        (QUERY, {"query": GOOD, "good": GOOD, "bad": BAD}),
        (QUERY, {"query": BAD, "good": BAD, "bad": BAD}),
    ]

    def fake(
        model: Any, renderer: Any, queries: Any, sampler: Any, principles: Any, seed: int
    ) -> Any:
        seen.append((len(queries), seed))
        return answers

    monkeypatch.setattr(callbacks, "_answers", fake)
    logger = SimpleNamespace(log_metrics=lambda numbers, step: calls.append((numbers, step)))
    trainer: Any = SimpleNamespace(
        global_step=0,
        current_epoch=0,
        sanity_checking=True,
        is_last_batch=True,
        is_global_zero=True,
        state=SimpleNamespace(fn="fit"),
        default_root_dir=str(tmp_path),
        loggers=[logger],
        callback_metrics={},
    )
    module: Any = SimpleNamespace(
        policy=loaded[0], renderer=ChatRenderer(loaded[1]), trains_generator=False, iteration=0
    )
    callback = SandboxMetrics(str(sandbox / "validation.jsonl"), limit=2, seed=2)
    names = [query.id for query in load_queries(sandbox / "validation.jsonl")[:2]]
    callback.on_validation_epoch_end(trainer, module)
    assert calls == [], "a sanity check is not a measurement"
    trainer.sanity_checking = False
    callback.on_train_start(trainer, module)
    numbers = answers_quality(answers)
    assert read_scores(tmp_path) == {
        "sandbox/quality": {0: dict(zip(names, (7 / 8, 4 / 8), strict=True))},
        "sandbox/signal_accuracy": {0: dict(zip(names, (1.0, 0.5), strict=True))},
    }
    trainer.global_step, trainer.current_epoch = 12, 1
    callback.on_train_start(trainer, module)  # a resumed run: its start was measured before
    callback.on_validation_epoch_end(trainer, module)
    assert calls == [(numbers, 0), (numbers, 12)]
    assert seen == [(2, 2), (2, 2)]
    assert trainer.callback_metrics["sandbox/quality"] == numbers["sandbox/quality"]
    assert [*read_scores(tmp_path)["sandbox/quality"]] == [0, 1]
    # what is not the policy at the end of an iteration leaves no scores
    for holder, name, value in (
        (trainer.state, "fn", "validate"),
        (trainer, "is_last_batch", False),
        (trainer, "is_global_zero", False),
        (module, "trains_generator", True),
    ):
        before = getattr(holder, name)
        setattr(holder, name, value)
        module.iteration = 5
        callback.on_validation_epoch_end(trainer, module)
        setattr(holder, name, before)
        assert [*read_scores(tmp_path)["sandbox/quality"]] == [0, 1], name
    callback.on_validation_epoch_end(trainer, module)
    assert [*read_scores(tmp_path)["sandbox/quality"]] == [0, 1, 6]


def test_ensure_sandbox_builds_once_and_on_process_zero_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[Path, int]] = []

    def fake(out: Path, *, seed: int) -> None:
        built.append((out, seed))
        out.mkdir()
        (out / "sandbox.json").write_text("{}")

    monkeypatch.setattr(callbacks, "make_sandbox", fake)
    strategy = SimpleNamespace(barrier=lambda name: None)
    callback = EnsureSandbox(str(tmp_path / "box"), seed=5)
    for is_zero in (False, True, True):
        trainer: Any = SimpleNamespace(is_global_zero=is_zero, strategy=strategy)
        callback.setup(trainer, SimpleNamespace(), "fit")  # type: ignore[arg-type]
    assert built == [(tmp_path / "box", 5)]


# -- a whole build -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_build_follows_principles_and_leaves_room(tmp_path: Path) -> None:
    """Bounds are loose: they tell a broken world from a working one, not two machines apart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.process_time()
    build.make_sandbox(tmp_path / "box", quiet=True)
    assert time.process_time() - started < 240
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "box/model")
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(tmp_path / "box/model"))
    queries = load_queries(tmp_path / "box/validation.jsonl")
    sampler = TransformersSampler(max_new_tokens=96, max_rows=128)
    numbers = measure(model, renderer, queries, sampler, SandboxPrinciples(count=2))
    assert 0.38 < numbers["sandbox/quality"] < 0.60
    assert numbers["sandbox/quality_good"] > numbers["sandbox/quality"] + 0.04
    assert numbers["sandbox/quality_bad"] < numbers["sandbox/quality"] - 0.04
    assert numbers["sandbox/signal_accuracy"] > 0.74
    assert numbers["sandbox/well_formed"] > 0.93
    assert all(math.isfinite(value) for value in numbers.values())
