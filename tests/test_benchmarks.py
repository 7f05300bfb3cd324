"""lm-eval on the policy in memory: the same as by hand on its export, and nothing else changes."""

import csv
import json
import math
import socket
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from sso_lightning.benchmarks import (
    Benchmarks,
    document_scores,
    load_tasks,
    numbers_of,
)
from sso_lightning.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["wren", "owl", "fox", "dog", "wizard", "potion", "bird", "poem"]
DPO = {"class_path": "DPO"}
OWN = """
import zlib


def text_sum(doc, results):
    return {"text_sum": zlib.crc32(results[0].encode()) / 2**32}
"""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, request) -> Path:
    """A model with as many embeddings as tokens: with `peft=` lm-eval cuts off what is more.

    Its tokenizer has no padding token, as Llama's: lm-eval sets one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conftest = request.config.pluginmanager.getplugin(str(Path(__file__).with_name("conftest.py")))
    folder, tokenizer = tmp_path_factory.mktemp("tiny") / "model", conftest.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    conftest.tiny_config().save_pretrained(folder)  # Qwen2's class of tokenizers adds a token
    size = len(AutoTokenizer.from_pretrained(folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(conftest.tiny_config(vocab_size=size))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Path]:
    """A task of choices, and one of generation whose score changes with any character."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Which is number {i}?",
            "choices": [WORDS[(i + k) % 8] for k in range(3)],
            "answer": i % 3,
        }
        for i in range(12)
    ]
    data = folder / "birds.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(OWN)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    choices = common | {
        "task": "birds",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    texts = common | {
        "task": "texts",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "text_sum", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "birds.yaml").write_text(yaml.safe_dump(choices))
    line = "process_results: !function own.text_sum\n"
    (folder / "texts.yaml").write_text(yaml.safe_dump(texts) + line)
    return {name: folder / f"{name}.yaml" for name in ("birds", "texts")}


def config(folder: Path, model: Path, name: str, *, change=None, **benchmarks) -> Path:
    """A LoRA run of two iterations of two steps; `change` is laid over its settings for a model."""
    queries = folder / "queries.jsonl"
    queries.write_text("".join(f'{{"prompt": "Name {i} birds."}}\n' for i in range(4)))
    settings = {
        "trainer": {
            "default_root_dir": str(folder / name),
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": {"path": str(model), "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
            "objective": {
                "class_path": "Contrastive",
                "init_args": {"base": {"class_path": "DPO"}},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {"queries": str(queries), "val_queries": str(queries), "batch_size": 2},
        "pairs": {
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 6}},
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
        },
        **({"benchmarks": benchmarks} if benchmarks else {}),
    }
    settings["model"] |= change or {}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def run(tiny_model, tasks, tmp_path_factory):
    """A finished run with benchmarks at the start and after both iterations."""
    from sso_lightning.__main__ import main

    folder = tmp_path_factory.mktemp("runs")
    names = [str(path) for path in tasks.values()]
    path = config(folder, tiny_model, "with", tasks=names, batch_size=4)
    assert main(["fit", "--config", str(path)]) == 0
    return folder / "with"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def measured(run: Path) -> list[dict[str, str]]:
    return [row for row in rows(run) if "lm_eval/birds/acc" in row]


def scores(run: Path, metric: str, iteration: int) -> dict[str, float]:
    path = run / "evaluations" / "lm_eval" / metric / f"iteration-{iteration:02d}.jsonl"
    return {row["id"]: row["score"] for row in map(json.loads, path.read_text().splitlines())}


def by_hand(tasks, **arguments) -> dict[str, float]:
    """`lm-eval run --apply_chat_template` on a folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf",
        model_args=arguments | {"device": "cpu"},
        tasks=[str(path) for path in tasks.values()],
        batch_size=4,
        apply_chat_template=True,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    return {
        f"{task}/{key.partition(',')[0]}": value
        for task, values in found["results"].items()
        for key, value in values.items()
        if key in ("acc,none", "text_sum,none")
    }


def test_the_export_scores_by_hand_what_the_callback_found(run, tiny_model, tasks, sso, tmp_path):
    last = measured(run)[-1]
    expected = {name: float(last[f"lm_eval/{name}"]) for name in ("birds/acc", "texts/text_sum")}
    adapter = by_hand(tasks, pretrained=str(tiny_model), peft=str(run / "export"))
    assert adapter == pytest.approx(expected, abs=1e-12)
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert sso("export", checkpoint, tmp_path / "merged", "--merge")[0] == 0
    assert by_hand(tasks, pretrained=str(tmp_path / "merged")) == pytest.approx(expected, abs=1e-12)
    # or neither would show that the adapter was on
    base = by_hand(tasks, pretrained=str(tiny_model))
    assert base["texts/text_sum"] != pytest.approx(expected["texts/text_sum"], abs=1e-3)
    first = measured(run)[0]
    assert float(first["lm_eval/texts/text_sum"]) == pytest.approx(base["texts/text_sum"])


def test_choices_are_those_of_plain_forwards(run, tiny_model, tasks):
    """Accuracy at the start from the sums of log-probabilities, counted here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    right = {}
    documents = (tasks["birds"].parent / "birds.json").read_text().splitlines()
    for number, row in enumerate(map(json.loads, documents)):
        turns = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        sums = []
        for choice in row["choices"]:
            ids = [tokenizer(text)["input_ids"] for text in (prompt, choice)]
            with torch.no_grad():
                logits = model(torch.tensor([ids[0] + ids[1]])).logits[0].double()
            logps = logits.log_softmax(-1)[len(ids[0]) - 1 : -1]
            sums.append(logps[range(len(ids[1])), ids[1]].sum().item())
        assert sorted(sums)[-1] - sorted(sums)[-2] > 1e-3, "no document may hang on rounding"
        right[str(number)] = float(sums.index(max(sums)) == row["answer"])
    assert scores(run, "birds/acc", 0) == right
    assert 0 < sum(right.values()) < 12
    assert float(measured(run)[0]["lm_eval/birds/acc"]) == pytest.approx(sum(right.values()) / 12)


def test_scores_are_kept_for_every_iteration(run):
    assert [int(row["step"]) for row in measured(run)] == [0, 1, 3]
    for iteration, row in enumerate(measured(run)):
        for metric in ("birds/acc", "texts/text_sum"):
            found = scores(run, metric, iteration)
            assert list(found) == [str(i) for i in range(12)]
            mean = math.fsum(found.values()) / 12
            assert mean == pytest.approx(float(row[f"lm_eval/{metric}"]))
        about = (run / "evaluations" / "lm_eval" / f"iteration-{iteration:02d}.json").read_text()
        assert json.loads(about)["documents"] == {"birds": 12, "texts": 12}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_nothing_else_of_the_run_changes(run, tiny_model, tmp_path, sso):
    status, _, err = sso("fit", "--config", config(tmp_path, tiny_model, "without"))
    assert status == 0, err
    assert not (tmp_path / "without" / "evaluations").exists()
    plain = weights(tmp_path / "without")
    for name, value in weights(run).items():
        assert torch.equal(value, plain[name]), name
    kept = [r for r in rows(run) if not any(key.startswith("lm_eval/") for key in r)]

    def numbers(found):
        return [{k: v for k, v in r.items() if "second" not in k} for r in found]

    assert numbers(kept) == numbers(rows(tmp_path / "without"))
    for file in ("tokenizer_config.json", "tokenizer.json"):
        written = [(folder / "export" / file).read_text() for folder in (run, tmp_path / "without")]
        assert written[0] == written[1]


def test_validate_measures_a_checkpoint_as_its_iteration(run, tiny_model, tasks, tmp_path, sso):
    path = config(tmp_path, tiny_model, "again")
    checkpoint = next((run / "checkpoints").glob("iteration-00-*.ckpt"))
    command = ["validate", "--config", path, "--ckpt_path", checkpoint]
    status, out, err = sso(*command, f"--benchmarks.tasks=[{tasks['texts']}]")
    assert status == 0, err
    assert "lm_eval/texts/text_sum" in out
    assert scores(tmp_path / "again", "texts/text_sum", 1) == scores(run, "texts/text_sum", 1)
    assert not list((tmp_path / "again").rglob("*birds*"))


def test_a_run_that_goes_on_repeats_no_measurement_and_makes_up_for_a_lost_one(
    run, tiny_model, tasks, tmp_path, sso
):
    names = [str(path) for path in tasks.values()]
    path = config(tmp_path, tiny_model, "part", tasks=names, batch_size=4)
    part = tmp_path / "part"
    assert sso("fit", "--config", path, "--trainer.max_epochs=1")[0] == 0
    lost = part / "evaluations" / "lm_eval" / "iteration-01.json"
    before = (part / "evaluations" / "lm_eval" / "iteration-00.json").stat().st_mtime_ns
    lost.unlink()  # as if it had been stopped in the measurement
    file = part / "metrics.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert "lm_eval" not in json.dumps(rows(part)[-1])
    status, _, err = sso("fit", "--config", path, "--ckpt_path", "last")
    assert status == 0, err
    assert lost.is_file()
    assert (part / "evaluations" / "lm_eval" / "iteration-00.json").stat().st_mtime_ns == before
    assert measured(part) == measured(run)
    # nothing is left to do: neither measured nor logged again
    assert sso("fit", "--config", path, "--ckpt_path", "last", "--trainer.max_epochs=3")[0] == 0
    assert measured(part)[:3] == measured(run)
    assert len(measured(part)) == 4


def test_a_generator_phase_is_no_iteration(tiny_model, tasks, tmp_path, sso):
    """Epochs 0 and 1 make iteration 1: nothing is measured between them, and the policy speaks."""
    change = {
        "generator": {"objective": {"class_path": "DataGenerator", "init_args": {"base": DPO}}}
    }
    path = config(tmp_path, tiny_model, "two", change=change, tasks=[str(tasks["texts"])])
    status, _, err = sso("fit", "--config", path)
    assert status == 0, err
    folder = tmp_path / "two" / "evaluations" / "lm_eval"
    assert sorted(p.name for p in folder.glob("*.json")) == [
        "iteration-00.json",
        "iteration-01.json",
    ]
    assert [
        int(row["step"]) for row in rows(tmp_path / "two") if "lm_eval/texts/text_sum" in row
    ] == [
        0,
        3,
    ]
    command = ["validate", "--config", path, "--benchmarks.batch_size=8"]
    trained = scores(tmp_path / "two", "texts/text_sum", 1)
    for checkpoint, iteration in (("iteration-00-*", 0), ("iteration-01-*", 1)):
        (found,) = (tmp_path / "two" / "checkpoints").glob(checkpoint)
        assert sso(*command, "--ckpt_path", found)[0] == 0
        again = scores(tmp_path / "two", "texts/text_sum", iteration)
        assert (again == trained) is (iteration == 1)


@pytest.mark.slow
def test_two_processes_with_sharded_weights_find_what_one_finds(tiny_model, tasks, tmp_path, forks):
    worker, port = Path(__file__).with_name("distributed_worker.py"), free_port()
    path = config(tmp_path, tiny_model, "shards", tasks=[str(tasks["texts"])], batch_size=4)
    options = ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--trainer.max_epochs=1"]
    jobs = [
        {"argv": ["fit", "--config", str(path), *options, "--export.merge=true"]},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    ranks |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "PATIENCE": 100}
    started = [
        forks.start(worker, tmp_path / "jobs.json", cwd=tmp_path, **ranks, RANK=r, LOCAL_RANK=r)
        for r in range(2)
    ]
    ends = [process.wait(120) for process in started]
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-3000:]
    found = scores(tmp_path / "shards", "texts/text_sum", 1)
    hand = by_hand({"texts": tasks["texts"]}, pretrained=str(tmp_path / "shards" / "export"))
    assert math.fsum(found.values()) / 12 == pytest.approx(hand["texts/text_sum"], abs=1e-12)
    last = [r for r in rows(tmp_path / "shards") if "lm_eval/texts/text_sum" in r][-1]
    assert float(last["lm_eval/texts/text_sum"]) == pytest.approx(hand["texts/text_sum"], abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "iterations"),
    [({}, [0, 1, 2, 3, 4]), ({"every": 2}, [0, 2, 4]), ({"at": [1, 4]}, [1, 4])],
)
def test_chosen_iterations(settings, iterations):
    assert [i for i in range(5) if Benchmarks(["t"], **settings).is_wanted(i)] == iterations
    assert not any(Benchmarks(**settings).is_wanted(i) for i in range(5))


def test_results_become_metrics_and_scores_by_document():
    """Two ways to read an answer, a group, a metric of which less is better, one without number."""
    samples = [
        {"doc_id": 1, "filter": "strict", "metrics": ["em"], "em": True},
        {"doc_id": 0, "filter": "strict", "metrics": ["em"], "em": False},
        {"doc_id": 0, "filter": "none", "metrics": ["em", "loss", "pair"],
         "em": 0.5, "loss": 3.0, "pair": (1.0, 2)},
    ]  # fmt: skip
    found = {
        "results": {
            "t|x": {"alias": "t", "sample_len": 2, "em,strict": 0.5, "em,none": 0.5,
                    "em_stderr,none": "N/A", "loss,none": 3, "pair,none": 0.1},
            "group": {"em,none": 0.25, "em_stderr,none": 0.1},
        },
        "samples": {"t|x": samples},
        "higher_is_better": {"t|x": {"em": True, "loss": False, "pair": True}},
    }  # fmt: skip
    assert numbers_of(found) == {
        "lm_eval/t_x/em.strict": 0.5,
        "lm_eval/t_x/em": 0.5,
        "lm_eval/t_x/loss": 3.0,
        "lm_eval/t_x/pair": 0.1,
        "lm_eval/group/em": 0.25,
    }
    assert document_scores(found) == {
        "lm_eval/t_x/em.strict": {"0": 0.0, "1": 1.0},
        "lm_eval/t_x/em": {"0": 0.5},
    }


def test_mistakes_are_one_line_before_weights_are_loaded(
    tiny_model, tasks, tmp_path, monkeypatch, sso
):
    from lm_eval.tasks import TaskManager

    small = TaskManager(include_path=tasks["birds"].parent, include_defaults=False)

    def says(**settings):
        status, _, err = sso("fit", "--config", config(tmp_path, tmp_path / "m", "bad", **settings))
        assert status == 2
        return err.splitlines()[-1]

    (tmp_path / "m").mkdir()
    for file in tiny_model.iterdir():  # a model without weights: loading them would fail
        if file.suffix != ".safetensors":
            (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    task = [str(tasks["birds"])]
    # lm-eval's own 14,000 tasks take seconds to look through
    with monkeypatch.context() as patch:
        patch.setattr("sso_lightning.benchmarks._manager", lambda *key: {(None, True): small}[key])
        assert says(tasks=["birdz"]) == (
            "error: benchmarks.tasks: there is no file and no lm-eval task birdz (is it birds?); "
            "`lm-eval ls tasks` lists them"
        )
    assert says(tasks=task, every=0, limit=-1.0) == (
        "error: benchmarks.every must be at least 1; benchmarks.limit must be above 0"
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text(tasks["birds"].read_text().replace("birds.json", "gone.json"))
    assert says(tasks=[str(broken)]).startswith(
        f"error: benchmarks.tasks: {broken} cannot be loaded (FileNotFoundError: Unable to find"
    )


def test_recipes_name_tasks_that_lm_eval_has():
    """The paper's: GPQA, MMLU-Pro, MATH, GSM8K, IFEval; starting them would need the hub."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    files = sorted((ROOT / "configs").glob("*/benchmarks.yaml"))
    assert [path.parent.name for path in files] == ["llama31_8b", "qwen2_7b"]
    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / name for name in ("gpqa", "mmlu_pro", "hendrycks_math", "gsm8k", "ifeval")]
    known = TaskManager(include_path=folders, include_defaults=False).all_tasks
    for path in files:
        (settings,) = yaml.safe_load(path.read_text()).values()
        Benchmarks(**settings)
        assert len(settings["tasks"]) == 5
        assert {*settings["tasks"]} <= {*known}


@pytest.mark.slow
def test_a_recipe_takes_the_benchmarks_as_a_second_file(tiny_model, tasks, tmp_path, sso):
    command = ["fit", "--config", config(tmp_path, tiny_model, "both")]
    command += ["--config", ROOT / "configs" / "qwen2_7b" / "benchmarks.yaml"]
    command += [f"--benchmarks.tasks=[{tasks['texts']}]", "--trainer.max_epochs=1"]
    status, _, err = sso(*command, "--benchmarks.limit=3")
    assert status == 0, err
    assert list(scores(tmp_path / "both", "texts/text_sum", 0)) == ["0", "1", "2"]


def test_a_template_without_system_role_has_no_system_instruction(tiny_model, tasks, tmp_path, sso):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = config(
        tmp_path, tiny_model, "fold", tasks=[str(tasks["birds"])], system_instruction="Be brief."
    )
    status, _, err = sso("fit", "--config", path, f"--model.policy.chat_template={template}")
    assert status == 2
    says = "error: benchmarks.system_instruction: the chat template has no system role"
    assert err.splitlines()[-1].startswith(says)


def test_what_lm_eval_cannot_do_is_refused(tiny_model, tasks, tmp_path, monkeypatch, sso):
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text(tasks["birds"].read_text() + "unsafe_code: true\n")
    with pytest.raises(InputError, match="birds runs code that the model wrote"):
        load_tasks([str(unsafe)])
    path = config(tmp_path, tiny_model, "fold", tasks=[str(unsafe)])
    monkeypatch.setattr("sso_lightning.benchmarks.find_spec", lambda name: None)
    status, _, err = sso("fit", "--config", path)
    assert status == 2
    line = "error: benchmarks.tasks need lm-eval: pip install 'sso-lightning[eval]'"
    assert err.splitlines()[-1] == line
