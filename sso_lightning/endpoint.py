"""Principles from another model: a chat server that speaks the OpenAI protocol.

vLLM, `transformers serve` and hosted models answer the same requests, so one `Endpoint` serves for
all. Timeouts, retries and their back-off are the openai client's. Every finished answer goes to a
file at once, keyed by what was asked: a run that was killed asks only for the rest the next time.
`Server` is what every client of such a server needs; `engines` samples through it too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from sso_lightning.errors import InputError, hide_keys
from sso_lightning.principles import Draw, PolicyPrinciples
from sso_lightning.records import Message

log = logging.getLogger("sso_lightning")

T = TypeVar("T")

CUT = ("length", "content_filter")
"""Why an answer ended if the model had more to say."""

FIRST_WAIT = 0.5
"""Seconds before a reply of another kind is asked for again; they double each time."""

_KEY_FIELD = re.compile(r"authorization|(api|access|secret)[-_]?(key|token)", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """An answer: its text, and why it ended as the server says ("length" if it was cut)."""

    text: str
    finish: str


class AnswerStore:
    """Finished answers by key, each appended to a file and synced before it counts.

    Threads may share a store, and processes a file. What a crash left of a line is ignored.

    Args:
        path: A JSON lines file, made when the first answer comes; None keeps answers in memory.

    Raises:
        InputError: The file cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._answers = dict(self._lines())

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def get(self, key: str) -> Reply | None:
        """The answer under a key, or None."""
        return self._answers.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Keep an answer.

        Raises:
            InputError: The disk refuses; what was kept before stays.
        """
        line = json.dumps({"key": key, "text": reply.text, "finish": reply.finish}) + "\n"
        with self._lock:
            if self._path is not None:
                self._append(self._path, line.encode())
            self._answers[key] = reply

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+", buffering=0) as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a crash cut the last line: do not write onto it
                        line = b"\n" + line
                # in one call, so that lines of several processes do not mix
                if file.write(line) != len(line):
                    raise OSError(28, "no space left on device")
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); mend that and start again, "
                "finished answers are kept"
            ) from error

    def _lines(self) -> Iterator[tuple[str, Reply]]:
        if self._path is None or not self._path.exists():
            return
        try:
            lines = self._path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error.strerror})") from error
        for line in lines:
            try:
                values = json.loads(line)
                entry = values["key"], Reply(values["text"], values["finish"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if all(isinstance(part, str) for part in (entry[0], *vars(entry[1]).values())):
                yield entry


class NoReply(Exception):
    """A reply with status 200 that is not what was asked for."""


@dataclass
class Server:
    """A server that speaks the OpenAI protocol, and how it is reached.

    Attributes:
        base_url: Address up to and with `/v1`, such as http://localhost:8000/v1.
        model: Name of the model as the server knows it.
        key_variable: Name of the environment variable that holds the key; None sends no key. The
            key itself is never a setting: settings are written to files.
        concurrency: Most requests at the same time.
        timeout: Seconds that a request may keep silent.
        max_retries: How often a request is sent again after a timeout, a lost connection, status
            408, 409, 429 or 5xx, or a reply that is not what was asked for. Waits half a second at
            first, then twice as long each time, or as long as the server says.
    """

    label: ClassVar[str] = "server"
    """What these settings are called in messages."""

    base_url: str
    model: str
    key_variable: str | None = None
    concurrency: int = 64
    timeout: float = 600.0
    max_retries: int = 4

    def __post_init__(self) -> None:
        """Check the settings; the environment is looked at when the first request is sent."""
        wrong = self._problems()
        if wrong:
            raise InputError("; ".join(wrong))

    def _problems(self) -> list[str]:
        wrong = self._out_of_range(
            {
                "concurrency": (1 <= self.concurrency <= 1000, "between 1 and 1000"),
                "timeout": (0 < self.timeout < math.inf, "above 0"),
                "max_retries": (self.max_retries >= 0, "0 or more"),
            }
        )
        wrong += _wrong_url(self.base_url, self.label)
        if not self.model.strip():
            wrong.append(f"{self.label}.model is empty; give the name that the server knows")
        name = self.key_variable
        if name is not None and (
            hide_keys(name) != name or not re.fullmatch(r"[A-Za-z_]\w*", name)
        ):
            wrong.append(
                f"{self.label}.key_variable must be the name of an environment variable, never the "
                "key itself; export the key and give the variable's name"
            )
        return wrong

    def _out_of_range(self, checks: Mapping[str, tuple[bool, str]]) -> list[str]:
        return [
            f"{self.label}.{name} must be {what}, got {getattr(self, name)}"
            for name, (fine, what) in checks.items()
            if not fine
        ]

    def check_environment(self) -> None:
        """Make sure that requests can be sent: the client is installed and the key is there.

        Raises:
            InputError: Naming what is missing.
        """
        if find_spec("openai") is None:
            raise InputError(
                f"{self.label}: the openai client is missing: pip install 'sso-lightning[endpoint]'"
            )
        self._secret()

    def _secret(self) -> str:
        """The key; "" if none is named."""
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            # a key that was given instead of a name must not be shown
            shown = re.fullmatch(r"[A-Z][A-Z0-9_]{0,39}", self.key_variable)
            name = f"the environment variable {self.key_variable}" if shown else "this variable"
            what = "holds characters that no key has" if key else "is not set"
            raise InputError(
                f"{self.label}.key_variable: {name} {what}; export it, or leave key_variable out "
                "if the server wants no key"
            )
        return key

    def client(self) -> Any:
        """An `openai.AsyncOpenAI` for this server."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.base_url,
            # not None: the client would take OPENAI_API_KEY, which may be meant for another server
            api_key=self._secret() or "none",
            timeout=self.timeout,
            max_retries=self.max_retries,
        )

    def headers(self) -> Any:
        """What every request of the client is given as its extra headers."""
        import openai

        return None if self._secret() else {"Authorization": openai.Omit()}

    async def insist(
        self,
        client: Any,
        send: Callable[[Any], Awaitable[Any]],
        parse: Callable[[str], T | None],
        what: str,
    ) -> T:
        """Send a request until its reply can be read.

        Args:
            client: Made by `client`. It retries what failed; a reply of another kind is retried
                here.
            send: Sends the request through the client it is given and returns the raw response.
            parse: Reads a reply's body; None if it is of another kind.
            what: What the reply should be, for messages.

        Raises:
            openai.OpenAIError: The request failed after all retries.
            NoReply: The last reply was of another kind.
        """
        left = self.max_retries
        while True:
            raw = await send(client.with_options(max_retries=left))
            reply = parse(raw.text)
            if reply is not None:
                return reply
            left -= raw.retries_taken + 1
            if left < 0:
                start = " ".join(raw.text.split())[:80]
                raise NoReply(f"the reply is no {what}: {start!r}")
            await asyncio.sleep(min(FIRST_WAIT * 2 ** (self.max_retries - left - 1), 8.0))

    async def each(self, work: Callable[[T], Awaitable[None]], items: Iterable[T]) -> None:
        """Await `work` for all items, `concurrency` at a time; the first error cancels the rest."""
        waiting = iter(items)  # one iterator for all workers

        async def worker() -> None:
            for item in waiting:
                await work(item)

        tasks = [asyncio.create_task(worker()) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def reason(self, error: Exception) -> str:
        """An error in one line, without the key, should the server repeat it."""
        import openai

        text = f"{error} {error.__cause__ or ''}"
        if isinstance(error, openai.APIStatusError):
            text = f"status {error.status_code} {error.response.text}"
        line = " ".join(text.split())
        key = self._secret()
        return hide_keys(line.replace(key, "***") if key else line)[:200]


@dataclass
class Endpoint(Server):
    """A chat server that speaks the OpenAI protocol, and how it is asked.

    Attributes:
        base_url: Address up to and with `/v1`, such as http://localhost:8000/v1.
        model: Name of the model as the server knows it.
        key_variable: Name of the environment variable that holds the key; None sends no key. The
            key itself is never a setting: settings are written to files.
        concurrency: Most requests at the same time.
        timeout: Seconds that a request may keep silent.
        max_retries: How often a request is sent again; see `Server`.
        temperature: Of the answers.
        max_new_tokens: Most tokens of an answer.
        extra_body: Further fields of every request, e.g. {top_p: 0.8}.
        max_failed: Share of a shard's requests that may fail after all retries; one may in any
            case, unless this is 0. Over it the run ends.
        cache: Folder in which finished answers are kept, or null; runs may share it.
    """

    label: ClassVar[str] = "endpoint"

    concurrency: int = 8
    timeout: float = 120.0
    temperature: float = 0.7
    max_new_tokens: int = 1024
    extra_body: dict[str, Any] = field(default_factory=dict)
    max_failed: float = 0.1
    cache: str | None = "runs/endpoint-cache"

    def __post_init__(self) -> None:
        """See `Server`."""
        super().__post_init__()
        self._opened: AnswerStore | None = None
        self._reached = False

    def _problems(self) -> list[str]:
        numbers = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "max_failed": (0 <= self.max_failed <= 1, "in [0, 1]"),
        }
        return [*super()._problems(), *self._out_of_range(numbers), *_secrets(self.extra_body)]

    def settings(self) -> dict[str, Any]:
        """What decides the answers, as JSON values: no key, and not how the server is reached."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "extra_body": self.extra_body,
        }

    def ask(
        self,
        requests: Sequence[tuple[str, list[Message]]],
        store: AnswerStore | None = None,
    ) -> list[Reply | None]:
        """Have requests answered, those that are in the store without asking.

        Args:
            requests: Messages, each with a name that tells apart requests whose messages are
                equal; those with equal names too share one answer.
            store: Where finished answers are kept; that of `cache` if not given.

        Returns:
            The answers in the order of the requests; None where a request failed after all
            retries.

        Raises:
            InputError: The server refuses the first request, or too many requests fail.
        """
        if store is None:
            store = self._cache()
        keys = [self._cache_key(name, messages) for name, messages in requests]
        wanted = {
            key: messages
            for key, (_, messages) in zip(keys, requests, strict=True)
            if key not in store
        }
        if wanted:
            self.check_environment()
            allowed = max(1, int(self.max_failed * len(requests))) if self.max_failed else 0
            in_thread(self._send(wanted, store, allowed))
        return [store.get(key) for key in keys]

    def _cache(self) -> AnswerStore:
        if self._opened is None:
            folder = self.cache
            self._opened = AnswerStore(None if folder is None else Path(folder) / "answers.jsonl")
        return self._opened

    def _cache_key(self, name: str, messages: list[Message]) -> str:
        asked = [self.settings(), name, messages]
        return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    async def _send(
        self, wanted: Mapping[str, list[Message]], store: AnswerStore, allowed: int
    ) -> None:
        """Have requests answered into the store; the first one alone, to see if there is a server.

        Raises:
            InputError: The server refuses the first request, or more than `allowed` fail.
        """
        import openai

        failed, reason = 0, ""

        async def answer(request: tuple[str, list[Message]]) -> None:
            nonlocal failed, reason
            key, messages = request
            try:
                reply = await self._request(client, messages)
            except (openai.OpenAIError, NoReply) as error:
                failed, reason = failed + 1, self.reason(error)
                if not self._reached and _is_refusal(error):
                    raise InputError(
                        f"{self.base_url} refuses the first request: {reason}; check that the "
                        "server runs, and endpoint.base_url, model and key_variable"
                    ) from None
                if failed > allowed:
                    raise InputError(
                        f"{failed} of {len(wanted)} requests to {self.base_url} failed "
                        f"(endpoint.max_failed: {self.max_failed}), the last one with: {reason}; "
                        "mend that and start again, finished answers are kept"
                    ) from None
            else:
                self._reached = True
                store.add(key, reply)

        waiting = iter(wanted.items())
        async with self.client() as client:
            if not self._reached:
                await answer(next(waiting))
            await self.each(answer, waiting)
        if failed:
            log.warning(
                "%d of %d requests to %s failed after all retries, the last one with: %s",
                *(failed, len(wanted), self.base_url, reason),
            )

    async def _request(self, client: Any, messages: list[Message]) -> Reply:
        headers = self.headers()
        return await self.insist(
            client,
            lambda client: client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                temperature=self.temperature,
                max_tokens=self.max_new_tokens,
                extra_body=self.extra_body or None,
                extra_headers=headers,
            ),
            _completion,
            "chat completion",
        )


class EndpointPrinciples(PolicyPrinciples):
    """Principles that another model writes, with the predefined ones to fall back on.

    Args:
        endpoint: The server.
        format: "guidelines" asks for one bad and one good guideline per query under two fixed
            headings (2025), and draws predefined features only where that does not parse;
            "features" asks for the good and bad principle of each picked feature as JSON (2024).
        **predefined: Arguments of `PredefinedPrinciples`.

    Raises:
        InputError: A setting is wrong; the message names it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        format: Literal["guidelines", "features"] = "guidelines",
        **predefined: Any,
    ) -> None:
        super().__init__(format=format, **predefined)
        endpoint.check_environment()
        self.name = f"endpoint {endpoint.model}"
        self.endpoint = endpoint

    def settings(self) -> dict[str, Any]:
        """See `PrincipleSource.settings`."""
        return {**super().settings(), **self.endpoint.settings()}

    def _write(
        self,
        prompts: Sequence[tuple[str, str]],
        max_new_tokens: int,
        parse: Callable[[str], tuple[str, str] | None],
        draw: Draw,
    ) -> list[tuple[str, str] | None]:
        # no names: equal requests of two queries, or of two iterations, share an answer
        requests = [("", [{"role": "user", "content": prompt}]) for _, prompt in prompts]
        replies = self.endpoint.ask(requests)
        # what was cut may parse, and would end in the middle of a sentence
        written = [None if r is None or r.finish in CUT else parse(r.text) for r in replies]
        failed = replies.count(None)
        draw.counts["principles_requested"] += len(replies)
        draw.counts["principles_sent"] += len(replies)
        draw.counts["principles_failed"] += failed
        draw.counts["principles_fallback"] += written.count(None) - failed
        return written


def _completion(body: str) -> Reply | None:
    """The answer in a reply's body, or None if the body is no chat completion."""
    try:
        choice = json.loads(body)["choices"][0]
        # a model that spent all its tokens on reasoning has no content
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str | None) or not isinstance(finish, str | None):
        return None
    return Reply(text or "", finish or "")


def _is_refusal(error: Exception) -> bool:
    """Whether other requests will fail like this one: no server, no such page, wrong key."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (401, 403, 404, 405)
    return isinstance(error, openai.APIConnectionError) and not isinstance(
        error, openai.APITimeoutError
    )


def _wrong_url(url: str, key: str) -> list[str]:
    """What is wrong with an address; the address is not repeated where it may hold a key."""
    try:
        parts = urlsplit(url.strip())
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fine = False
        parts = urlsplit("")
    if "@" in url or "?" in url or "#" in url or hide_keys(url) != url:
        return [
            f"{key}.base_url must hold no user, key or query; name the variable that holds the key "
            f"in {key}.key_variable"
        ]
    if not fine:
        return [f"{key}.base_url: {url!r} is no address such as http://localhost:8000/v1"]
    return []


def _secrets(value: object, where: str = "endpoint.extra_body") -> list[str]:
    """Places in extra_body that look like they hold a key: it is written to files."""
    if isinstance(value, str) and hide_keys(value) != value:
        return [f"{where} looks like a key; use endpoint.key_variable"]
    if isinstance(value, Mapping):
        found = [f"{where}.{k}: keys go into endpoint.key_variable" for k in value if _names_key(k)]
        return found + [s for k, v in value.items() for s in _secrets(v, f"{where}.{k}")]
    if isinstance(value, list | tuple):
        return [s for item in value for s in _secrets(item, where)]
    return []


def _names_key(name: object) -> bool:
    return bool(_KEY_FIELD.search(str(name)))


def in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread of its own, and cancel it when this one is interrupted.

    The caller may be in a running loop (a notebook); and an interrupt must not wait for the
    requests in flight.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await work

    with ThreadPoolExecutor(1, "endpoint") as pool:
        outcome = pool.submit(asyncio.run, main())
        loop, task = started.result()
        try:
            return outcome.result()
        except BaseException:
            if not outcome.done():
                loop.call_soon_threadsafe(task.cancel)
            raise
