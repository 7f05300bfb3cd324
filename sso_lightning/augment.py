"""New queries from seed queries, in the manner of Self-Instruct (arXiv 2212.10560).

Each request shows a model a few random seeds and asks for one more of the same kind. What comes
back is cleaned, held to bounds of length and script, and dropped where it nearly repeats a seed or
an earlier one. Finished answers are kept in a file, so a command that was killed goes on.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from sso_lightning.endpoint import CUT, AnswerStore, Endpoint, Reply
from sso_lightning.errors import InputError
from sso_lightning.records import Message, Query, load_queries, replace_file, stream_seed

Ask = Callable[[Sequence[tuple[str, list[Message]]], AnswerStore], list[Reply | None]]
"""Has named requests answered, through the store; None where a request failed."""

_PROMPT = """\
Here are {count} requests that people made to an assistant.

{examples}

Think of one more request of the same kind and in the same language, about a matter that none of \
them is about. Reply with that request and nothing else: no number, no quotation marks, no remark \
and no answer."""

_LABEL = re.compile(r"^[#*\s]*(?:new\s+)?request(?:\s+\d+)?[*\s]*:[*\s]*", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u00ab": "\u00bb", "\u300c": "\u300d"}
_SHINGLE = 4  # characters
_FOREIGN = 0.1  # share of letters that may be of a script in which the seeds are not written


@dataclass
class Wanted:
    """What is asked for and what is kept.

    Attributes:
        count: Queries to keep.
        shots: Seeds shown in one request.
        seed: Decides which seeds are shown, and a policy's answers.
        near: Share of common character sequences from which two queries are near-duplicates.
        min_chars: Fewest characters of a query.
        max_chars: Most characters of a query.
        any_script: Keep queries in scripts that the seeds are not written in.
        max_requests: Requests after which to give up; None for four times `count`.
    """

    count: int
    shots: int = 3
    seed: int = 0
    near: float = 0.7
    min_chars: int = 8
    max_chars: int = 2000
    any_script: bool = False
    max_requests: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.max_requests is None:
            self.max_requests = 4 * self.count
        checks = {
            "count": (self.count >= 1, "at least 1"),
            "shots": (self.shots >= 1, "at least 1"),
            "near": (0 < self.near <= 1, "above 0 and at most 1"),
            "min-chars": (self.min_chars >= 1, "at least 1"),
            "max-chars": (self.max_chars >= self.min_chars, "at least --min-chars"),
            "max-requests": (self.max_requests >= 1, "at least 1"),
        }
        wrong = [f"--{name} must be {what}" for name, (fine, what) in checks.items() if not fine]
        if wrong:
            raise InputError("; ".join(wrong))


def shingles(text: str) -> frozenset[str]:
    """The character sequences of a text, without case, punctuation and runs of white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = " ".join("".join(c if c.isalnum() else " " for c in plain).split())
    return frozenset(plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1)))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity: the share of sequences that both have."""
    return len(one & other) / len(one | other)


class NearDuplicates:
    """Texts so far, to ask whether a new one is nearly one of them.

    MinHash finds candidates (Broder 1997), with hash functions that are the same in every run; what
    it finds is compared exactly, so nothing is dropped below the threshold.

    Args:
        threshold: Similarity from which texts are near-duplicates.

    Raises:
        InputError: datasketch is not installed.
    """

    def __init__(self, threshold: float) -> None:
        if find_spec("datasketch") is None:
            raise InputError("augment needs datasketch: pip install 'sso-lightning[data]'")
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._known: list[frozenset[str]] = []
        # a lower threshold and a dear miss: candidates are many, misses are rare
        self._index = MinHashLSH(threshold=0.8 * threshold, num_perm=128, weights=(0.1, 0.9))

    def __len__(self) -> int:
        return len(self._known)

    def find(self, text: str) -> int | None:
        """Number of the text added first of those that are as near as the threshold, or None."""
        mine = shingles(text)
        candidates = sorted(self._index.query(self._hash(mine)))
        near = (n for n in candidates if similarity(mine, self._known[n]) >= self._threshold)
        return next(near, None)

    def add(self, text: str) -> None:
        """Remember a text."""
        mine = shingles(text)
        self._index.insert(len(self._known), self._hash(mine))
        self._known.append(mine)

    @staticmethod
    def _hash(parts: frozenset[str]) -> Any:
        from datasketch import MinHash

        value = MinHash(num_perm=128, seed=1)
        value.update_batch([part.encode() for part in sorted(parts)])
        return value


def scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has, by the first word of a letter's Unicode name."""
    letters = (c for c in unicodedata.normalize("NFKC", text) if c.isalpha())
    return Counter(unicodedata.name(c, "UNKNOWN").split()[0] for c in letters)


def cleaned(answer: str) -> str:
    """A new query without a label before it, quotation marks around it, or a second one after it.

    What the prompt numbers "Request 1:" is answered with "Request 4:" now and then.
    """
    text = _LABEL.sub("", answer.strip(), count=1)
    text = re.split(r"\n[#*\s]*request\s+\d+[*\s]*:", text, maxsplit=1, flags=re.IGNORECASE)[0]
    text = text.strip()
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text.count(text[0]) <= 2:
        text = text[1:-1].strip()
    return text


class Sieve:
    """Decides about new queries, one after the other.

    Args:
        wanted: The bounds.
        seeds: Texts that no new query may nearly repeat, and whose scripts are kept to.
    """

    def __init__(self, wanted: Wanted, seeds: Sequence[str]) -> None:
        self._wanted = wanted
        self._near = NearDuplicates(wanted.near)
        for text in seeds:
            self._near.add(text)
        self._seeds = len(self._near)
        found = sum(map(scripts, seeds), Counter())
        # a foreign name in a seed does not open the door to its script
        self._scripts = {s for s, n in found.items() if n >= 0.01 * found.total()}

    def drop_reason(self, text: str) -> str:
        """Why a query is not kept, or ""; what is kept counts as known from now on."""
        if not text:
            return "empty"
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            return "not_text"
        if len(text) < self._wanted.min_chars:
            return "too_short"
        if len(text) > self._wanted.max_chars:
            return "too_long"
        found = scripts(text)
        foreign = sum(n for script, n in found.items() if script not in self._scripts)
        if not self._wanted.any_script and foreign > _FOREIGN * found.total():
            return "other_script"
        near = self._near.find(text)
        if near is not None:
            return "near_seed" if near < self._seeds else "near_new"
        self._near.add(text)
        return ""


def augment(
    seeds: Sequence[Query],
    wanted: Wanted,
    ask: Ask,
    store: AnswerStore,
    batch: int = 32,
    progress: Callable[[str], object] = lambda line: None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Make new queries.

    The outcome is a function of seeds, settings and answers; not of timing or of `batch`.

    Args:
        seeds: Queries to start from; conversations of several turns only serve as texts that no
            new query may repeat.
        wanted: What to ask for and to keep.
        ask: The model.
        store: Where finished answers are kept.
        batch: Requests that are asked together; what a killed run may have to ask again.
        progress: Called with a line after every batch.

    Returns:
        Rows of a query file, and the report: `asked`, `kept`, `dropped` by reason.

    Raises:
        InputError: No seed is a single turn.
    """
    assert wanted.max_requests is not None
    texts = {q.id: q.messages[-1]["content"] for q in seeds}
    shown = [q.id for q in seeds if sum(turn["role"] != "system" for turn in q.messages) == 1]
    if not shown:
        raise InputError("augment: every seed has several turns; give seeds of one user turn")
    sieve = Sieve(wanted, list(texts.values()))
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    asked = 0
    while len(rows) < wanted.count and asked < wanted.max_requests:
        numbers = range(asked, min(asked + batch, wanted.max_requests))
        drawn = [_draw(shown, wanted, number) for number in numbers]
        replies = ask(
            [
                (f"augment/{wanted.seed}/{number}", _request([texts[i] for i in ids]))
                for number, ids in zip(numbers, drawn, strict=True)
            ],
            store,
        )
        for ids, reply in zip(drawn, replies, strict=True):
            if len(rows) == wanted.count:
                break
            asked += 1
            text = "" if reply is None else cleaned(reply.text)
            if reply is None or reply.finish in CUT:
                reason = "failed" if reply is None else "cut"
            else:
                reason = sieve.drop_reason(text)
            dropped[reason] += bool(reason)
            if not reason:
                rows.append(
                    {
                        "id": f"augmented-{sha256(text.encode()).hexdigest()[:16]}",
                        "messages": [{"role": "user", "content": text}],
                        "source": f"augmented from {', '.join(ids)}",
                    }
                )
        progress(f"asked {asked}, kept {len(rows)} of {wanted.count}")
    report = {
        "asked": asked,
        "kept": len(rows),
        "dropped": dict(sorted((+dropped).items())),
        "seeds": len(seeds),
        "seeds_shown": len(shown),
    }
    return rows, report


def _draw(shown: Sequence[str], wanted: Wanted, number: int) -> list[str]:
    """Ids of the seeds of one request."""
    rng = Random(stream_seed(wanted.seed, "augment", number))
    return rng.sample(shown, min(wanted.shots, len(shown)))


def _request(texts: Sequence[str]) -> list[Message]:
    examples = "\n\n".join(f"Request {n}:\n{text}" for n, text in enumerate(texts, 1))
    return [{"role": "user", "content": _PROMPT.format(count=len(texts), examples=examples)}]


class Policy:
    """A model folder or hub name that answers through the built-in sampler.

    Args:
        path: The model.
        seed: Of the answers.
        max_new_tokens: Most tokens of an answer.
        temperature: Of the answers.
    """

    def __init__(self, path: str, seed: int, max_new_tokens: int, temperature: float) -> None:
        import torch

        from sso_lightning.policy import PolicyConfig, fingerprint, load_model, load_tokenizer
        from sso_lightning.prompts import ChatRenderer
        from sso_lightning.sampling import TransformersSampler

        config = PolicyConfig(path)
        self._sampler = TransformersSampler(max_new_tokens, temperature)
        self._renderer = ChatRenderer(load_tokenizer(config))
        self._model = load_model(config, trainable=False)
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._seed = seed
        self._identity = [self._sampler.settings(), fingerprint(self._model)]

    def __call__(
        self, requests: Sequence[tuple[str, list[Message]]], store: AnswerStore
    ) -> list[Reply | None]:
        """Answer requests; see `Ask`."""
        from sso_lightning.sampling import Request

        keys = [
            sha256(json.dumps([self._identity, name, messages]).encode()).hexdigest()
            for name, messages in requests
        ]
        open_requests = [
            Request(key, self._renderer.render(messages), stream_seed(self._seed, name))
            for key, (name, messages) in zip(keys, requests, strict=True)
            if key not in store
        ]
        if open_requests:
            stop_ids = self._renderer.stop_ids
            for sample in self._sampler.sample(self._model, open_requests, stop_ids=stop_ids):
                store.add(sample.key, Reply(self._renderer.decode(sample.ids), sample.finish))
        return [store.get(key) for key in keys]


def augment_file(
    seeds: str,
    out: Path,
    wanted: Wanted,
    model: Callable[[], Ask],
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Make new queries from a file into a file, with the report beside it.

    Args:
        seeds: What `load_queries` reads.
        out: A .jsonl file. Beside it are `OUT.answers`, which a killed run goes on with, and
            `OUT.report`.
        wanted: What to ask for and to keep.
        model: Gives what answers; called once the files are checked.
        progress: Called with a line after every batch.

    Returns:
        The report.

    Raises:
        InputError: A file is wrong, the model cannot be had, or nothing was kept.
    """
    answers, beside = (out.with_name(f"{out.name}.{end}") for end in ("answers", "report"))
    if out.suffix != ".jsonl":
        raise InputError(f"--out {out}: queries are written as .jsonl")
    if out.exists() and not answers.exists():
        raise InputError(f"--out {out}: exists already; choose another file")
    queries = load_queries(seeds)
    rows, report = augment(queries, wanted, model(), AnswerStore(answers), progress=progress)
    if not rows:
        reasons = ", ".join(f"{reason} {n}" for reason, n in report["dropped"].items())
        raise InputError(f"augment: none of {report['asked']} answers was kept ({reasons})")
    report |= {"settings": asdict(wanted)}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(out, lines.encode())
    replace_file(beside, (json.dumps(report, indent=1) + "\n").encode())
    return report


def run(argv: list[str]) -> str:
    """The command `sso-lightning augment`.

    Args:
        argv: What follows `sso-lightning augment` on the command line.

    Returns:
        The report as text.

    Raises:
        InputError: A flag or a file is wrong, or the model cannot be had.
    """
    import sys

    from sso_lightning.errors import OneLineParser

    parser = OneLineParser(
        prog="sso-lightning augment",
        description="Make new queries from seed queries: a model is shown a few seeds at a time "
        "and asked for one more of the same kind.",
        allow_abbrev=False,
    )
    parser.add_argument("seeds", help="query file, folder or hf:NAME")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write")
    parser.add_argument("--count", type=int, required=True, help="queries to keep")
    parser.add_argument("--model", required=True, help="folder, hub name, or the server's name")
    parser.add_argument("--base-url", help="chat server that has the model (else it is loaded)")
    parser.add_argument("--key-variable", help="environment variable that holds the server's key")
    parser.add_argument("--concurrency", type=int, default=8, help="parallel requests (8)")
    parser.add_argument("--shots", type=int, default=3, help="seeds shown at a time (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws and a policy's answers")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers (1.0)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (256)")
    parser.add_argument("--near", type=float, default=0.7, help="near-duplicates from here (0.7)")
    parser.add_argument("--min-chars", type=int, default=8, help="of a query (8)")
    parser.add_argument("--max-chars", type=int, default=2000, help="of a query (2000)")
    parser.add_argument(
        "--any-script", action="store_true", help="also keep scripts that the seeds do not use"
    )
    parser.add_argument("--max-requests", type=int, help="give up after these (4 x count)")
    given = parser.parse_args(argv)
    wanted = Wanted(
        given.count,
        given.shots,
        given.seed,
        given.near,
        given.min_chars,
        given.max_chars,
        given.any_script,
        given.max_requests,
    )

    def model() -> Ask:
        if given.base_url is None:
            return Policy(given.model, given.seed, given.max_new_tokens, given.temperature)
        return Endpoint(
            given.base_url,
            given.model,
            given.key_variable,
            concurrency=given.concurrency,
            temperature=given.temperature,
            max_new_tokens=given.max_new_tokens,
        ).ask

    report = augment_file(
        given.seeds, given.out, wanted, model, lambda line: sys.stderr.write(f"{line}\n")
    )
    lines = [f"asked    {report['asked']}", f"kept     {report['kept']}"]
    lines += [f"dropped  {n} {reason}" for reason, n in report["dropped"].items()]
    if report["kept"] < wanted.count:
        lines.append(f"fewer than the {wanted.count} asked for: raise --max-requests or --near")
    return "\n".join([*lines, f"written to {given.out}"]) + "\n"
