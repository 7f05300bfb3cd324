"""Engines outside of this process: a completions server, and vLLM's own engine.

Both sample from copies of the policy's weights, so both are handed these weights anew before every
set, under names that hold the weights' fingerprint, and both are asked to prove it: the log-probs
that an engine reports for a short answer are compared with our own. That is the only use of an
engine's log-probs; those of the records come from our scoring pass. Token ids go in and come out:
no text is ever tokenized again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sso_lightning.endpoint import NoReply, Server, in_thread
from sso_lightning.errors import InputError
from sso_lightning.policy import fingerprint, is_peft, save_policy
from sso_lightning.processes import Processes
from sso_lightning.sampling import DrawingSampler, Progress, Request, Sample, eval_mode
from sso_lightning.scoring import Tree, token_logps
from sso_lightning.sharding import causal_lm, full, uneven_calls

log = logging.getLogger("sso_lightning")

T = TypeVar("T")

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its `max_lora_rank`."""

PROBE = range(32, 64)
"""Token ids of the prompt, and as many tokens, by which an engine shows its weights."""

_PREFIX = "sso-"


@dataclass(frozen=True)
class _Answer:
    """What an engine says: token ids, why it ended, and log-probs of the tokens if asked for."""

    ids: list[Any]
    finish: str
    logps: list[float] | None = None
    prompt: list[Any] | None = None


class CopyingSampler(DrawingSampler):
    """A sampler whose engine holds a copy of the policy's weights."""

    max_gap: float | None
    _vocabulary = 0

    @abstractmethod
    def _where(self) -> str:
        """What the engine is called in messages."""

    def _prove(
        self, model: nn.Module, processes: Processes, ask: Callable[[Request], _Answer]
    ) -> None:
        """Compare the engine's log-probs of a short answer with the policy's own.

        Args:
            model: The policy.
            processes: All of which call this.
            ask: Gives the engine's answer, drawn at temperature 1; process 0 calls it.

        Raises:
            InputError: They are further apart than `max_gap`, or the engine reports none.
        """
        if self.max_gap is None:
            return
        prompt = [token % self._vocabulary for token in PROBE]
        answer = None
        with processes.together():
            if processes.first:
                request = Request("probe", prompt, seed=1, max_new_tokens=len(PROBE))
                answer = ask(request)
                self._checked(request, answer, frozenset())
        answer = processes.gather(answer)[0]
        assert answer is not None
        if not answer.logps:
            raise InputError(
                f"{self._where()}: reports no log-probabilities, so it cannot be checked that it "
                "has the policy's weights; max_gap: null does without"
            )
        with eval_mode(model), torch.no_grad(), uneven_calls(model):
            (ours,) = token_logps(model, [Tree(prompt, [answer.ids])])
        theirs = torch.tensor(answer.logps, dtype=torch.float64)
        gap = float((ours.cpu().double() - theirs).abs().mean())
        log.info("%s: log-probs differ by %.2g nats per token", self._where(), gap)
        if not gap <= self.max_gap:  # NaN is no proof either
            raise InputError(
                f"{self._where()}: does not have the policy's weights: on a short answer its "
                f"log-probabilities are {gap:.2g} nats per token from the policy's own (max_gap: "
                f"{self.max_gap}); serve the model of policy.path, with policy.adapter merged"
            )

    def _checked(self, request: Request, answer: _Answer, stop_ids: frozenset[int]) -> Sample:
        """An answer as a sample.

        Raises:
            InputError: It is not what our own loop would have stopped at.
        """
        limit, where = self.limit(request), f"{self._where()}: request {request.key!r}"
        if answer.prompt not in (None, request.prompt):
            raise InputError(f"{where}: another prompt was answered than was sent")
        ids = answer.ids
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < self._vocabulary]
        if wrong:
            raise InputError(
                f"{where}: the answer holds {wrong[0]!r}, which is no token of the policy's "
                f"{self._vocabulary}; serve the same model"
            )
        stops = [at for at, token in enumerate(ids) if token in stop_ids]
        if stops and stops[0] != len(ids) - 1:
            raise InputError(f"{where}: the answer goes on after a stop token")
        if stops:
            return Sample(request.key, ids, "stop")
        if answer.finish == "stop":
            raise InputError(
                f"{where}: the answer ended at token {ids[-1]}, which is none of the stop tokens; "
                "the engine has stops of its own: serve with --generation-config vllm"
            )
        if len(ids) != limit:
            raise InputError(
                f"{where}: the answer was cut at {len(ids)} of {limit} tokens (prompt: "
                f"{len(request.prompt)}); give the engine a longer context (--max-model-len)"
            )
        return Sample(request.key, ids, "length")


class ServerSampler(CopyingSampler):
    """A completions server with token ids in and out: vLLM's, from version 0.10.2."""

    engine = "server"

    def __init__(
        self,
        server: Server,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        folder: str | None = None,
        folder_on_server: str | None = None,
        reload: list[str] | None = None,
        wait: float = 900.0,
        max_gap: float | None = 0.2,
    ) -> None:
        """Check and keep the settings; see docs/engines.md for the server's.

        Without `folder` the server keeps the weights it was started with, and a run that trains
        the policy ends with an error before it samples from the wrong one.

        Args:
            server: The server.
            max_new_tokens: Most tokens of an answer, where the request does not say.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_p: Keep the fewest likeliest tokens that hold this much probability; 1 keeps all.
            top_k: Keep this many of the likeliest tokens; 0 keeps all.
            folder: Folder of this run alone in which the server finds the weights: the LoRA
                adapter, which it is told to load, or all weights if `reload` is given. Older ones
                are removed.
            folder_on_server: The same folder's path where the server runs, if that is another.
            reload: Command, as a list, that makes the server load all weights; "{folder}" in it
                becomes their folder, and "{name}" a name for them, which requests then ask for.
            wait: Seconds until the server must answer again after `reload`.
            max_gap: Farthest that the server's log-probs of a short answer may be from the
                policy's own after weights were handed over, in nats per token; null asks for none.

        Raises:
            InputError: A setting is out of its range or lacks another.
        """
        checks = {
            "wait": (wait > 0, "above 0"),
            "max_gap": (max_gap is None or max_gap > 0, "above 0 or null"),
            "folder": (
                bool(folder) or not (folder_on_server or reload),
                "given beside folder_on_server or reload",
            ),
            "reload": (reload is None or bool(reload), "a command or null"),
        }
        super().__init__(max_new_tokens, temperature, top_p, top_k, checks)
        server.check_environment()
        self.server = server
        self.folder = None if folder is None else Path(folder).absolute()
        self.folder_on_server = folder_on_server
        self.reload = reload
        self.wait = wait
        self.max_gap = max_gap
        self._handed: tuple[str, str] | None = None
        self._name = ""

    def _where(self) -> str:
        return self.server.base_url

    # ----------------------------------------------------------------------------------- weights

    def hand_over(self, model: nn.Module, processes: Processes) -> None:
        """Let the server have the policy as it is now; see `Sampler.hand_over`."""
        names = fingerprint(model)
        self._vocabulary = _vocabulary(model)
        written = _name_of(model, names, merged=self.reload is not None)
        name = ""
        with processes.together():
            if processes.first and self._handed == names and self._name in self._served():
                name = self._name
        name = processes.gather(name)[0]
        self._name = ""  # nothing is sampled should what follows fail
        if not name:
            self._write(model, names, written, processes)
            with processes.together():
                if processes.first:
                    name = self._deliver(model, written)
            name = processes.gather(name)[0]
        self._prove(model, processes, lambda request: self._ask_probe(name, request))
        with processes.together():
            if processes.first and self.folder is not None:
                self._tidy(written)
        self._name, self._handed = name, names

    def _write(
        self, model: nn.Module, names: tuple[str, str], written: str, processes: Processes
    ) -> None:
        """Write the weights into their folder, unless there is none and no need for one."""
        adapted = is_peft(model)
        if self.folder is None:
            if _adapts(model) if adapted else self._handed not in (None, names):
                raise InputError(
                    f"{self._where()}: the policy has been trained, and the sampler has no way to "
                    "hand its weights over; set folder (see docs/engines.md)"
                )
            return
        if not adapted and self.reload is None:
            raise InputError(
                f"{self._where()}: all weights are trained, not an adapter: give the sampler the "
                "command that makes the server load them (reload, see docs/engines.md)"
            )
        _save(model, self.folder / written, processes, merge=self.reload is not None)

    def _deliver(self, model: nn.Module, written: str) -> str:
        """Make the server load what was written; return what it calls it."""
        if self.folder is None:
            self._wait_for(self.server.model, 0)
            return self.server.model
        path = self._seen(written)
        if self.reload is None:
            rank = max(config.r for config in cast(Any, model).peft_config.values())
            self._do(self._load_adapter(written, path, rank))
            return written
        values = {"{folder}": path, "{name}": written}
        command = [re.sub(r"\{folder\}|\{name\}", lambda m: values[m[0]], p) for p in self.reload]
        _run(command, self.wait)
        named = any("{name}" in part for part in self.reload)
        name = written if named else self.server.model
        self._wait_for(name, self.wait)
        return name

    def _seen(self, name: str) -> str:
        """A folder of weights as the server sees it."""
        base = self.folder_on_server or str(self.folder)
        return f"{base.rstrip('/')}/{name}"

    async def _load_adapter(self, name: str, path: str, rank: int) -> None:
        import openai

        async with self.server.client() as client:
            root = (await self._list(client)).get(name)
            if root == path:
                return
            if root is not None:  # the same weights, from where another run may remove them
                await self._unload(client, name)
            problem = "it is not among its models afterwards"
            try:
                await self._post(client, "load_lora_adapter", lora_name=name, lora_path=path)
            except openai.APIStatusError as error:
                # if the first answer was lost, the second says that it is loaded already
                problem = self.server.reason(error)
            if name not in await self._list(client):
                raise InputError(
                    f"{self._where()}: cannot load the adapter {path}: {problem}; the server must "
                    f"see this folder (folder_on_server) and run with --enable-lora "
                    f"--max-lora-rank {_rank(rank)} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                )

    async def _post(self, client: Any, action: str, **body: str) -> None:
        headers = self.server.headers() or {}
        await client.post(f"/{action}", body=body, cast_to=object, options={"headers": headers})

    async def _unload(self, client: Any, name: str) -> None:
        import openai

        with suppress(openai.NotFoundError):  # if the first answer was lost
            await self._post(client, "unload_lora_adapter", lora_name=name)

    def _tidy(self, written: str) -> None:
        """Unload and remove all older weights in our folder."""
        assert self.folder is not None

        async def unload() -> None:
            async with self.server.client() as client:
                for name, root in (await self._list(client)).items():
                    if name != written and root == self._seen(name):
                        await self._unload(client, name)

        if self.reload is None:
            self._do(unload())
        for path in self.folder.glob(f"{_PREFIX}*"):
            if path.name != written:
                shutil.rmtree(path, ignore_errors=True)

    async def _list(self, client: Any) -> dict[str, str]:
        """Names of the models that are served, and where each was loaded from."""
        reply = await client.get(
            "/models", cast_to=object, options={"headers": self.server.headers() or {}}
        )
        try:
            return {str(card["id"]): str(card.get("root")) for card in reply["data"]}
        except (TypeError, KeyError, AttributeError):
            raise NoReply(f"the reply is no list of models: {str(reply)[:80]!r}") from None

    def _served(self) -> dict[str, str]:
        async def ask() -> dict[str, str]:
            async with self.server.client() as client:
                return await self._list(client)

        return self._do(ask())

    def _wait_for(self, name: str, seconds: float) -> None:
        """Wait until a model is served."""
        end = time.monotonic() + seconds
        while True:
            try:
                served = self._served()
                problem = f"{self._where()}: serves {', '.join(served) or 'no model'}, not {name}"
            except InputError as error:
                served, problem = {}, str(error)
            if name in served:
                return
            if time.monotonic() >= end:
                raise InputError(problem)
            time.sleep(1.0)

    # ---------------------------------------------------------------------------------- requests

    def sample(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        *,
        stop_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Answer all requests; see `Sampler.sample`.

        Raises:
            InputError: The server has no policy, fails after all retries, or gives another answer
                than was asked for.
        """
        self.check(requests)
        if not self._name:
            raise InputError(f"{self._where()}: was handed no policy; only iterations do that")
        samples: dict[int, Sample] = {}
        stops = frozenset(stop_ids)

        async def run() -> None:
            async def work(item: tuple[int, Request]) -> None:
                at, request = item
                answer = await self._complete(
                    client,
                    self._name,
                    request,
                    stops,
                    {"top_k": self.top_k or -1},
                    temperature=self.temperature,
                    top_p=self.top_p,
                )
                samples[at] = sample = self._checked(request, answer, stops)
                if progress:
                    progress(len(sample.ids), 1)

            async with self.server.client() as client:
                await self.server.each(work, enumerate(requests))

        self._do(run())
        return [samples[at] for at in range(len(requests))]

    def _ask_probe(self, name: str, request: Request) -> _Answer:
        # nothing is cut off, so it does not matter if log-probs are taken before or after that
        fields = {"temperature": 1.0, "top_p": 1.0, "logprobs": 1}

        async def ask() -> _Answer:
            async with self.server.client() as client:
                return await self._complete(
                    client, name, request, frozenset(), {"top_k": -1}, **fields
                )

        return self._do(ask())

    async def _complete(
        self,
        client: Any,
        name: str,
        request: Request,
        stop_ids: frozenset[int],
        extra: dict[str, Any],
        **fields: Any,
    ) -> _Answer:
        """One answer; everything that a server may have defaults for is said."""
        headers = self.server.headers()
        body = {
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # these and no others
            "return_token_ids": True,
            "repetition_penalty": 1.0,
            "min_p": 0.0,
            **extra,
        }
        return await self.server.insist(
            client,
            lambda client: client.completions.with_raw_response.create(
                model=name,
                prompt=request.prompt,
                seed=request.seed,
                max_tokens=self.limit(request),
                presence_penalty=0.0,
                frequency_penalty=0.0,
                extra_body=body,
                extra_headers=headers,
                **fields,
            ),
            lambda text: self._read(text, name),
            "completion",
        )

    def _read(self, text: str, name: str) -> _Answer | None:
        """The answer in a reply's body, or None if another try may do better."""
        try:
            reply = json.loads(text)
            choice = reply["choices"][0]
            finish, ids, prompt = (
                choice.get(key) for key in ("finish_reason", "token_ids", "prompt_token_ids")
            )
            logps = (choice.get("logprobs") or {}).get("token_logprobs")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None
        if name.startswith(_PREFIX) and reply.get("model", name) != name:
            raise InputError(
                f"{self._where()}: {reply['model']!r} answered in place of {name}: the server does "
                "not keep apart what it serves"
            )
        if finish not in ("stop", "length") or ids == []:
            return None
        if not isinstance(ids, list):
            raise InputError(
                f"{self._where()}: answers without token ids; text is never tokenized again, so "
                "the server must know return_token_ids (vLLM from 0.10.2)"
            )
        return _Answer(ids, finish, logps, prompt)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run requests to their end."""
        import openai

        try:
            return in_thread(work)
        except (openai.OpenAIError, NoReply) as error:
            raise InputError(
                f"{self._where()}: {self.server.reason(error)}; mend that and start again, "
                "finished shards are kept (check server.base_url, model and key_variable)"
            ) from None


class VLLMSampler(CopyingSampler):
    """vLLM's engine in this process. No GPU and no real vLLM has run this: see docs/engines.md."""

    engine = "vllm"

    def __init__(
        self,
        folder: str,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        options: dict[str, Any] | None = None,
        sleep: bool = True,
        max_gap: float | None = 0.2,
    ) -> None:
        """Check and keep the settings. NO GPU AND NO REAL vLLM HAS RUN THIS.

        It is written after vLLM's documentation and tested with a stand-in for its module. It
        serves runs of one process; use `ServerSampler` for more.

        Args:
            folder: Folder of this run alone, through which the engine gets the weights.
            max_new_tokens: Most tokens of an answer, where the request does not say.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_p: Keep the fewest likeliest tokens that hold this much probability; 1 keeps all.
            top_k: Keep this many of the likeliest tokens; 0 keeps all.
            options: Further arguments of `vllm.LLM`, e.g. {gpu_memory_utilization: 0.5}.
            sleep: Give the engine's GPU memory back while the policy is scored and trained.
            max_gap: Farthest that the engine's log-probs of a short answer may be from the
                policy's own after weights were handed over, in nats per token; null asks for none.

        Raises:
            InputError: A setting is out of its range, or vLLM is not installed.
        """
        checks = {
            "folder": (bool(folder), "given"),
            "max_gap": (max_gap is None or max_gap > 0, "above 0 or null"),
        }
        super().__init__(max_new_tokens, temperature, top_p, top_k, checks)
        if find_spec("vllm") is None:
            raise InputError(
                "VLLMSampler needs vLLM (and a GPU): pip install 'sso-lightning[vllm]'"
            )
        self.folder = Path(folder).absolute()
        self.options = options or {}
        self.sleep = sleep
        self.max_gap = max_gap
        self._handed: tuple[str, str] | None = None
        self._llm: Any = None
        self._adapter: Any = None
        self._asleep = False
        self._loads = 0

    def _where(self) -> str:
        return "vLLM"

    def hand_over(self, model: nn.Module, processes: Processes) -> None:
        """Let the engine have the policy as it is now; see `Sampler.hand_over`."""
        if processes.size > 1:
            raise InputError("VLLMSampler serves runs of one process; use ServerSampler")
        names = fingerprint(model)
        self._vocabulary = _vocabulary(model)
        if self._handed == names:
            return
        self._handed = None  # nothing is sampled should this fail
        out = self.folder / "weights"
        _save(model, out, processes, merge=False)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry
        weights = None
        if is_peft(model):
            from vllm.lora.request import LoRARequest

            # the number names the weights to the engine, so it is never used again
            self._loads += 1
            name = _name_of(model, names, merged=False)
            self._adapter = LoRARequest(name, self._loads, str(out))
            self._start(model, causal_lm(model).config.name_or_path)
        elif self._llm is None:
            self._start(model, str(out))
        else:
            weights = out
        with self._awake(weights):
            self._prove(model, processes, self._ask_probe)
        self._handed = names

    def _ask_probe(self, request: Request) -> _Answer:
        params = self._params(request, [], temperature=1.0, top_p=1.0, top_k=0, logprobs=0)
        (answer,) = self._generate([request], [params])
        return answer

    def _start(self, model: nn.Module, path: str) -> None:
        """Make the engine, once."""
        if self._llm is not None:
            return
        import vllm

        lora: dict[str, Any] = {}
        if is_peft(model):
            ranks = [config.r for config in cast(Any, model).peft_config.values()]
            lora = {"enable_lora": True, "max_lora_rank": _rank(max(ranks))}
        options = {
            "dtype": str(causal_lm(model).dtype).removeprefix("torch."),
            "generation_config": "vllm",  # no defaults of the model's for what is drawn
            "skip_tokenizer_init": True,
            "enable_sleep_mode": self.sleep,
            **lora,
            **self.options,
        }
        self._llm = vllm.LLM(model=path, **options)

    @contextmanager
    def _awake(self, weights: Path | None = None) -> Iterator[None]:
        """Hold the engine's GPU memory for the length of the block, with new weights if given."""
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        if weights is not None:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
        self._asleep = False
        if weights is not None:
            self._llm.reset_prefix_cache()
        try:
            yield
        finally:
            if self.sleep:
                self._llm.sleep(level=1)
                self._asleep = True

    def sample(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        *,
        stop_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Answer all requests; see `Sampler.sample`."""
        self.check(requests)
        if self._handed is None:
            raise InputError("vLLM: was handed no policy; only iterations do that")
        if not requests:
            return []
        stops = sorted({*stop_ids})
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        with self._awake():
            answers = self._generate(requests, [self._params(r, stops, **drawn) for r in requests])
        pairs = zip(requests, answers, strict=True)
        samples = [self._checked(request, answer, frozenset(stops)) for request, answer in pairs]
        if progress:
            progress(sum(len(sample.ids) for sample in samples), len(samples))
        return samples

    def _params(self, request: Request, stop_ids: list[int], **fields: Any) -> Any:
        import vllm

        return vllm.SamplingParams(
            seed=request.seed,
            max_tokens=self.limit(request),
            stop_token_ids=stop_ids,
            ignore_eos=True,  # these stops and no others
            detokenize=False,
            **fields,
        )

    def _generate(self, requests: Sequence[Request], params: list[Any]) -> list[_Answer]:
        import vllm

        prompts = [vllm.TokensPrompt(prompt_token_ids=request.prompt) for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)
        answers = []
        for output in outputs:
            (made,) = output.outputs
            ids = list(made.token_ids)
            if made.finish_reason not in ("stop", "length") or not ids:
                raise InputError(f"vLLM: an answer ended with {made.finish_reason!r}")
            logps = None
            if made.logprobs:
                steps = zip(ids, made.logprobs, strict=True)
                logps = [step[token].logprob for token, step in steps]
            answers.append(_Answer(ids, made.finish_reason, logps, list(output.prompt_token_ids)))
        return answers


def _vocabulary(model: nn.Module) -> int:
    return int(causal_lm(model).config.get_text_config().vocab_size)


def _rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that is enough."""
    enough = [known for known in RANKS if known >= rank]
    if not enough:
        raise InputError(f"policy.lora.r: vLLM serves ranks up to {RANKS[-1]}, not {rank}")
    return enough[0]


def _adapts(model: nn.Module) -> bool:
    """Whether the active adapter changes anything: B starts as zeros. All processes call this."""
    mark = f".{cast(Any, model).active_adapter}."
    found = [
        bool(full(parameter.detach()).any())
        for name, parameter in model.named_parameters()
        if "lora_B" in name and mark in name
    ]
    return any(found)


def _name_of(model: nn.Module, names: tuple[str, str], *, merged: bool) -> str:
    """A name that no other weights have: the fingerprint, and the adapter's scale."""
    base, adapter = names
    if not is_peft(model):
        return f"{_PREFIX}{base}"
    config = cast(Any, model).peft_config[cast(Any, model).active_adapter]
    scale = sha256(repr((config.r, config.lora_alpha, config.use_rslora)).encode()).hexdigest()[:8]
    return f"{_PREFIX}{base if merged else ''}{'-' if merged else ''}{adapter}-{scale}"


def _save(model: nn.Module, out: Path, processes: Processes, *, merge: bool) -> None:
    """Write the weights as they are, or the active adapter alone. All processes call this."""
    adapter = {"adapter": cast(Any, model).active_adapter} if is_peft(model) else {}
    with processes.together():
        try:
            save_policy(model, None, out, merge=merge, writes=processes.first, **adapter)
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from error


def _run(command: list[str], seconds: float) -> None:
    """Run a user's command to its end."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"sampler.reload: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise InputError(
            f"sampler.reload: {command[0]} ended with status {done.returncode}: {said[-1][:200]}"
        )
