"""Answers for AlpacaEval and MT-Bench: their formats, and our own answers between the turns."""

import json

import pytest
import torch

from sso_lightning.errors import InputError
from sso_lightning.generate import answer, load_questions

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Name a bird.", "And another?"]},
    {"question_id": 111, "category": "math", "turns": ["2 + 2?", "Twice that?"],
     "reference": ["4", "8"]},
    {"question_id": 141, "category": "stem", "turns": ["Why is the sky blue?"]},
    {"question_id": 300, "category": "cooking", "turns": ["Boil an egg."]},
]  # fmt: skip
ALPACA = [
    {"dataset": "helpful_base", "instruction": "Name a bird.", "output": "A wren.",
     "generator": "text_davinci_003", "datasplit": "eval"},
    {"dataset": "koala", "instruction": "Translate.", "input": "chat", "output": "cat"},
]  # fmt: skip


@pytest.fixture
def mt_bench(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MT_BENCH))
    return path


@pytest.fixture
def alpaca(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(ALPACA))
    return path


def test_the_second_turn_sees_the_own_first_answer(mt_bench):
    asked = []

    def ask(turns):
        asked.extend(turns)
        return [(f"reply to {turn.messages[-1]['content']}", False) for turn in turns]

    answers, cut = answer(load_questions(str(mt_bench), "mt_bench"), ask)
    assert cut == 0
    assert answers[0] == ["reply to Name a bird.", "reply to And another?"]
    assert [len(own) for own in answers] == [2, 2, 1, 1]
    second = next(turn for turn in asked if turn.key == "81/1")
    assert second.messages == [
        {"role": "user", "content": "Name a bird."},
        {"role": "assistant", "content": "reply to Name a bird."},
        {"role": "user", "content": "And another?"},
    ]
    # FastChat's table, and 0.7 for what is not in it
    found = {turn.key: turn.temperature for turn in asked}
    assert found == {
        **{"81/0": 0.7, "81/1": 0.7, "111/0": 0.0, "111/1": 0.0},
        **{"141/0": 0.1, "300/0": 0.7},
    }


def greedy(model, tokenizer, turns, count):
    """transformers' own greedy answer."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    rows = tokenizer(text, return_tensors="pt")
    ids = rows["input_ids"]
    with torch.no_grad():
        out = model.generate(**rows, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_mt_bench_answers_are_the_models_own(tiny_model, mt_bench, tmp_path, sso):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model_answer" / "mine.jsonl"
    command = ["generate", tiny_model, "--to", "mt_bench", "--questions", mt_bench]
    command += ["--max-new-tokens", 12]
    status, said, err = sso(*command, "--out", out)
    assert status == 0, err
    assert said == f"6 answers, 6 of them cut by --max-new-tokens, written to {out}\n"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 111, 141, 300]
    keys = {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert all(line.keys() == keys and line["model_id"] == "mine" for line in lines)
    assert len({line["answer_id"] for line in lines}) == 4
    # math is answered greedily, so transformers can say the same
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first = greedy(model, tokenizer, [{"role": "user", "content": "2 + 2?"}], 12)
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Twice that?"},
    ]
    expected = [first, greedy(model, tokenizer, turns, 12)]
    assert lines[1]["choices"] == [{"index": 0, "turns": expected}]
    # an answer depends on seed and question only, not on what is asked beside it
    assert sso(*command, "--limit", 1, "--out", tmp_path / "again.jsonl")[0] == 0
    (again,) = map(json.loads, (tmp_path / "again.jsonl").read_text().splitlines())
    assert again["choices"] == lines[0]["choices"]
    assert sso(*command, "--limit", 1, "--seed", 1, "--out", tmp_path / "other.jsonl")[0] == 0
    (other,) = map(json.loads, (tmp_path / "other.jsonl").read_text().splitlines())
    assert other["choices"] != lines[0]["choices"]


def test_alpaca_eval_outputs_replace_those_of_the_questions(tiny_model, alpaca, tmp_path, sso):
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    for file in tiny_model.iterdir():
        (run / "export" / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "outputs.json"
    command = ["generate", run, "--to", "alpaca_eval", "--questions", alpaca, "--out", out]
    status, _, err = sso(*command, "--name", "ours", "--max-new-tokens", 5, "--temperature", 0)
    assert status == 0, err
    found = json.loads(out.read_text())
    for row, question in zip(found, ALPACA, strict=True):
        kept = {k: v for k, v in question.items() if k not in ("output", "generator")}
        assert row == kept | {"output": row["output"], "generator": "ours"}
        assert row["output"] != question["output"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = [{"role": "user", "content": "Translate.\n\nchat"}]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert found[1]["output"] == greedy(model, tokenizer, turns, 5)


BAD = {
    "no id": ("mt_bench", {"turns": ["a"]}, "'question_id' must be a whole number"),
    "no turns": ("mt_bench", {"question_id": 1, "prompt": ["a"]}, "'turns' must be a list"),
    "no text": ("alpaca_eval", {"instruction": 3}, "'instruction' must be text"),
    "empty": ("alpaca_eval", {"instruction": " "}, "'instruction' is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_question_is_named(name, tmp_path):
    to, row, says = BAD[name]
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="line 1: " + says):
        load_questions(str(tmp_path / "q.jsonl"), to)


def test_mistakes_are_one_line(tiny_model, mt_bench, tmp_path, sso):
    (tmp_path / "twice.jsonl").write_text(f"{json.dumps(MT_BENCH[0])}\n" * 2)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    def says(*options, model=tiny_model, questions=mt_bench, out="x.jsonl"):
        common = ["--to", "mt_bench", "--questions", questions, "--out", tmp_path / out]
        status, _, err = sso("generate", model, *common, *options)
        assert status == 2
        return err.strip().replace(str(tmp_path), "TMP")

    assert says(out="x.json") == "error: --out TMP/x.json: mt_bench takes a .jsonl file"
    assert says(out="question.jsonl") == (
        "error: --out TMP/question.jsonl: exists already; choose another file"
    )
    assert says("--temperature", "hot") == (
        "error: --temperature must be a number or by-category, not hot"
    )
    assert says("--temperature", "-1") == "error: sampler: temperature must be 0 or more"
    assert says(questions=tmp_path / "twice.jsonl") == (
        "error: TMP/twice.jsonl, line 2: question_id 81 is there twice"
    )
    assert says(model=tmp_path / "none") == "error: MODEL: no folder TMP/none"
    assert says(model=tmp_path / "run") == (
        "error: MODEL: the run TMP/run has no export yet; write one with "
        "sso-lightning export TMP/run/checkpoints/last.ckpt TMP/run/export"
    )
