"""A policy's answers to the questions of AlpacaEval and MT-Bench, in the files their judges read.

AlpacaEval (github.com/tatsu-lab/alpaca_eval) takes a JSON list of objects with `instruction`,
`output` and `generator`; the questions are such a list too, whose outputs are replaced. MT-Bench
(arXiv 2306.05685; github.com/lm-sys/FastChat, fastchat/llm_judge) has one question a line with
`question_id`, `category` and `turns`, and takes one line per question with `question_id`,
`answer_id`, `model_id`, `choices` and `tstamp`, in `model_answer/MODEL_ID.jsonl`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sso_lightning.errors import InputError, OneLineParser
from sso_lightning.records import Message, replace_file, stream_seed
from sso_lightning.sources import Row, rows_of

SUFFIX = {"alpaca_eval": ".json", "mt_bench": ".jsonl"}
"""The formats, and how their files end."""

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("stem", "humanities"), 0.1),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
}
"""MT-Bench's temperature of each category (FastChat, fastchat/llm_judge/common.py)."""

BY_CATEGORY = "by-category"
_OTHER = 0.7  # of a category that is not there, as in FastChat


@dataclass(frozen=True)
class Question:
    """What is asked: the user's turns, one after the other, and the row they were read from."""

    id: str
    turns: list[str]
    row: dict[str, Any]

    @property
    def temperature(self) -> float:
        """MT-Bench's temperature for it."""
        return TEMPERATURES.get(self.row.get("category", ""), _OTHER)


@dataclass(frozen=True)
class Turn:
    """A conversation that waits for its next answer; `key` decides the answer's randomness."""

    key: str
    messages: list[Message]
    temperature: float


Ask = Callable[[Sequence[Turn]], list[tuple[str, bool]]]
"""Answers turns: text, and whether the length limit cut it."""


def load_questions(source: str, to: str) -> list[Question]:
    """Read the questions of a benchmark.

    Args:
        source: File in the benchmark's own format, or `hf:NAME`.
        to: `alpaca_eval` or `mt_bench`.

    Raises:
        InputError: Naming the line of what is wrong.
    """
    rows = rows_of(source)
    read = {"alpaca_eval": _alpaca_eval, "mt_bench": _mt_bench}[to]
    questions = [read(row, number) for number, row in enumerate(rows)]
    seen = set()
    for question, row in zip(questions, rows, strict=True):
        if question.id in seen:
            raise InputError(f"{row.where}: question_id {question.id} is there twice")
        seen.add(question.id)
    return questions


def _alpaca_eval(row: Row, number: int) -> Question:
    instruction, more = row.values.get("instruction"), row.values.get("input")
    for key, value in (("instruction", instruction), ("input", more or "")):
        if not isinstance(value, str):
            raise InputError(f"{row.where}: {key!r} must be text")
    text = "\n\n".join(part for part in (instruction, more) if part)
    if not text.strip():
        raise InputError(f"{row.where}: 'instruction' is empty")
    return Question(str(number), [text], row.values)


def _mt_bench(row: Row, number: int) -> Question:
    own, turns = row.values.get("question_id"), row.values.get("turns")
    if not isinstance(own, int) or isinstance(own, bool):
        raise InputError(f"{row.where}: 'question_id' must be a whole number")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise InputError(f"{row.where}: 'turns' must be a list of texts")
    if not isinstance(row.values.get("category", ""), str):
        raise InputError(f"{row.where}: 'category' must be text")
    return Question(str(own), turns, row.values)


def answer(
    questions: Sequence[Question], ask: Ask, temperature: float | None = None
) -> tuple[list[list[str]], int]:
    """Have all turns of all questions answered; a later turn sees the own earlier answers.

    Args:
        questions: What to ask.
        ask: Answers.
        temperature: Of all answers; by MT-Bench's categories if not given.

    Returns:
        The answers of each question, one per turn, and how many of all were cut.
    """
    answers: list[list[str]] = [[] for _ in questions]
    cut = 0
    for number in range(max(len(question.turns) for question in questions)):
        rest = [(q, a) for q, a in zip(questions, answers, strict=True) if len(q.turns) > number]
        turns = [
            Turn(
                f"{question.id}/{number}",
                _conversation(question.turns[: number + 1], own),
                question.temperature if temperature is None else temperature,
            )
            for question, own in rest
        ]
        for (_, own), (text, was_cut) in zip(rest, ask(turns), strict=True):
            own.append(text)
            cut += was_cut
    return answers, cut


def _conversation(asked: Sequence[str], answered: Sequence[str]) -> list[Message]:
    """The user's turns with the answers in between.

    >>> [turn["content"] for turn in _conversation(["a", "b", "c"], ["1", "2"])]
    ['a', '1', 'b', '2', 'c']
    """
    messages: list[Message] = [{"role": "user", "content": asked[0]}]
    for reply, text in zip(answered, asked[1:], strict=True):
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": text}]
    return messages


def as_file(
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    to: str,
    name: str,
    now: float,
) -> str:
    """The answers in a benchmark's own format.

    Args:
        questions: What was asked.
        answers: Of each question, one per turn.
        to: `alpaca_eval` or `mt_bench`.
        name: What the model is called in the leaderboard.
        now: Time of the answers, seconds since 1970.
    """
    pairs = list(zip(questions, answers, strict=True))
    if to == "alpaca_eval":
        outputs = [{**q.row, "output": own[0], "generator": name} for q, own in pairs]
        return json.dumps(outputs, ensure_ascii=False, indent=1) + "\n"
    lines = [
        {
            "question_id": int(question.id),
            "answer_id": sha256(json.dumps([name, question.id, own]).encode()).hexdigest()[:22],
            "model_id": name,
            "choices": [{"index": 0, "turns": list(own)}],
            "tstamp": now,
        }
        for question, own in pairs
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


class Policy:
    """A model that answers through the built-in sampler; its tokens depend on seed and turn only.

    Args:
        path: Folder or hub name of a model or of a PEFT adapter.
        temperatures: Those that turns will have.
        seed: Of the answers.
        max_new_tokens: Most tokens of an answer.
        top_p: See `sampling.TransformersSampler`.
        rows: Most answers that grow at the same time.
        dtype: Type of the weights.
        device: Where it runs; a GPU if there is one and nothing is said.
    """

    def __init__(
        self,
        path: str,
        temperatures: Iterable[float],
        seed: int = 0,
        max_new_tokens: int = 1024,
        top_p: float = 1.0,
        rows: int = 32,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        import torch
        from transformers.utils import logging

        from sso_lightning.policy import PolicyConfig, load_model, load_tokenizer
        from sso_lightning.prompts import ChatRenderer
        from sso_lightning.sampling import TransformersSampler

        def sampler(temperature: float) -> TransformersSampler:
            return TransformersSampler(max_new_tokens, temperature, top_p, max_rows=rows)

        self._sampler = sampler
        for temperature in temperatures:  # a wrong setting shows before seconds of loading
            sampler(temperature)
        logging.disable_progress_bar()
        try:
            config = PolicyConfig(path, dtype=dtype)  # type: ignore[arg-type]
            self._renderer = ChatRenderer(load_tokenizer(config))
            self._model = load_model(config, trainable=False)
        except InputError as error:
            raise InputError(str(error).replace("policy.path", "MODEL")) from error
        self._model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._seed = seed

    def __call__(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """Answer turns; see `Ask`."""
        from sso_lightning.progress import progress
        from sso_lightning.sampling import Request

        samples = {}
        with progress("answering", len(turns), "turns") as advance:
            for temperature in sorted({turn.temperature for turn in turns}):
                requests = [
                    Request(
                        turn.key,
                        self._renderer.render(turn.messages),
                        stream_seed(self._seed, "generate", turn.key),
                    )
                    for turn in turns
                    if turn.temperature == temperature
                ]
                found = self._sampler(temperature).sample(
                    self._model, requests, stop_ids=self._renderer.stop_ids, progress=advance
                )
                samples.update({sample.key: sample for sample in found})
        return [
            (self._renderer.decode(samples[turn.key].ids), samples[turn.key].finish == "length")
            for turn in turns
        ]


def _model_of(given: str) -> str:
    """The export of a run folder; anything else as it is."""
    run = Path(given)
    if (run / "export").is_dir():
        return str(run / "export")
    if (run / "checkpoints").is_dir():
        raise InputError(
            f"MODEL: the run {run} has no export yet; write one with "
            f"sso-lightning export {run}/checkpoints/last.ckpt {run}/export"
        )
    return given


def run(arguments: list[str]) -> str:
    """`sso-lightning generate`.

    Returns:
        What was written, as a line.

    Raises:
        InputError: A flag or a file is wrong, or the model cannot be had.
    """
    parser = OneLineParser(
        prog="sso-lightning generate",
        description="Answer the questions of AlpacaEval or MT-Bench and write the answers as their "
        "judges read them.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a run folder, or any folder or hub name of a model")
    parser.add_argument("--to", required=True, choices=tuple(SUFFIX), help="the benchmark")
    parser.add_argument("--questions", required=True, help="its questions: a file or hf:NAME")
    parser.add_argument(
        "--out", required=True, type=Path, help=".json (alpaca_eval) or .jsonl (mt_bench) file"
    )
    parser.add_argument("--name", help="the model's name in the file (OUT's name)")
    parser.add_argument(
        "--temperature",
        help=f"a number, or {BY_CATEGORY} (mt_bench's default); 0.7 for alpaca_eval",
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="of the answers (1.0)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="of an answer (1024; for alpaca_eval 2048)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the answers (0)")
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--batch-size", type=int, default=32, help="answers at a time (32)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights")
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU if there is one")
    given = parser.parse_args(arguments)
    if given.out.suffix != SUFFIX[given.to]:
        raise InputError(f"--out {given.out}: {given.to} takes a {SUFFIX[given.to]} file")
    if given.out.exists():
        raise InputError(f"--out {given.out}: exists already; choose another file")
    if given.limit is not None and given.limit < 1:
        raise InputError(f"--limit must be at least 1, got {given.limit}")
    temperature = _temperature(given.temperature, given.to)
    questions = load_questions(given.questions, given.to)[: given.limit]
    policy = Policy(
        _model_of(given.model),
        [q.temperature for q in questions] if temperature is None else [temperature],
        given.seed,
        given.max_new_tokens or {"alpaca_eval": 2048, "mt_bench": 1024}[given.to],
        given.top_p,
        given.batch_size,
        given.dtype,
        given.device,
    )
    answers, cut = answer(questions, policy, temperature)
    name = given.name or given.out.stem
    replace_file(given.out, as_file(questions, answers, given.to, name, time.time()).encode())
    note = f", {cut} of them cut by --max-new-tokens" if cut else ""
    return f"{sum(map(len, answers))} answers{note}, written to {given.out}\n"


def _temperature(given: str | None, to: str) -> float | None:
    """The temperature of all answers; None by category."""
    if given is None:
        return None if to == "mt_bench" else 0.7
    if given == BY_CATEGORY and to == "mt_bench":
        return None
    try:
        value = float(given)
    except ValueError as error:
        choice = f" or {BY_CATEGORY}" if to == "mt_bench" else ""
        raise InputError(f"--temperature must be a number{choice}, not {given}") from error
    return value
