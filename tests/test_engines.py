"""Engines outside of this process, against a real completions server that runs `generate`."""

import json
import os
import socket
import sys
import threading
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from sso_lightning.endpoint import Server
from sso_lightning.engines import PROBE, ServerSampler, VLLMSampler
from sso_lightning.errors import InputError
from sso_lightning.policy import GENERATOR, LoRA, PolicyConfig, activate, add_generator, load_model
from sso_lightning.processes import Processes
from sso_lightning.records import load_records
from sso_lightning.sampling import Request, Sampler, TransformersSampler

pytest.importorskip("openai")

STOP = [3, 5, 260]
LIMIT = 8
ALONE = Processes()
PROVED = {"max_gap": 1e-3}
"""Copies in float32 differ by a thousandth of this."""


class CompletionServer(ThreadingHTTPServer):
    """Speaks the part of vLLM's protocol that is needed, with transformers' own `generate`.

    Attributes:
        models: Served models by name, with the folder each was loaded from.
        spoil: Given each completion's body and how often its prompt came before, says what goes
            wrong: a status, "drop", "cut", "late", a function that changes the reply, or None.
        log: Path and body of every request.
    """

    daemon_threads = True

    def __init__(self, base):
        super().__init__(("127.0.0.1", 0), CompletionHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.base = base
        self.models = {"base": (load_base(base), str(base))}
        self.spoil = lambda body, attempt: None
        self.log, self.seen, self.lock = [], [], threading.Lock()

    def handle_error(self, request, client_address):
        """Clients that give up are part of the tests."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def calls(self, end):
        """Bodies of the requests to a path."""
        return [body for path, body in self.log if path.endswith(end)]

    def asked(self):
        """Completions, the probe's left out."""
        return [body for body in self.calls("/completions") if body["prompt"] != [*PROBE]]

    def answer(self, body):
        model, _ = self.models[body["model"]]
        greedy = body["temperature"] == 0
        drawn = {"temperature": body["temperature"], "top_p": body["top_p"]} if not greedy else {}
        config = GenerationConfig(
            max_new_tokens=body["max_tokens"],
            do_sample=not greedy,
            **({"top_k": max(body["top_k"], 0), **drawn} if not greedy else {}),
            eos_token_id=body["stop_token_ids"] or None,
            pad_token_id=0,
        )
        prompt = torch.tensor([body["prompt"]])
        with self.lock, torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(body["seed"])
            ids = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config
            )
            new = ids[0, prompt.shape[1] :].tolist()
            logps = model(ids).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        picked = logps.gather(1, torch.tensor(new)[:, None])[:, 0].tolist()
        choice = {
            "finish_reason": "stop" if new[-1] in body["stop_token_ids"] else "length",
            "token_ids": new if body["return_token_ids"] else None,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": picked} if body.get("logprobs") else None,
            "text": "never read",
        }
        return {"model": body["model"], "choices": [choice]}


class CompletionHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status, body, length=None, **headers):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        kind = "text/plain" if isinstance(body, str) else "application/json"
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drop(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_GET(self):
        self.server.log.append((self.path, None))
        cards = [{"id": name, "root": root} for name, (_, root) in self.server.models.items()]
        self.reply(200, {"data": cards})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.log.append((self.path, body))
        getattr(self, self.path.rpartition("/")[2])(server, body)

    def completions(self, server, body):
        key = tuple(body["prompt"])
        with server.lock:
            attempt = server.seen.count(key)
            server.seen.append(key)
        spoilt = server.spoil(body, attempt)
        if isinstance(spoilt, int):
            return self.reply(spoilt, {"error": {"message": "no"}}, **{"Retry-After": "0"})
        if spoilt == "drop":
            return self.drop()
        if spoilt == "late":
            threading.Event().wait(1.5)
            return self.drop()
        if body["model"] not in server.models:
            return self.reply(404, {"error": {"message": f"no model {body['model']}"}})
        answer = server.answer(body)
        if spoilt == "cut":
            self.reply(200, answer, length=10_000)
            return self.drop()
        return self.reply(200, spoilt(answer) if spoilt else answer)

    def load_lora_adapter(self, server, body):
        name, path = body["lora_name"], body["lora_path"]
        spoilt = server.spoil(body | {"prompt": []}, 0)
        if name in server.models:
            return self.reply(400, {"error": {"message": "has already been loaded"}})
        if not (Path(path) / "adapter_config.json").exists():
            return self.reply(404, {"error": {"message": f"no adapter at {path}"}})
        adapted = PeftModel.from_pretrained(load_base(server.base), path).eval()
        server.models[name] = adapted, path
        return self.drop() if spoilt == "drop" else self.reply(200, f"Success: {name} added.")

    def unload_lora_adapter(self, server, body):
        spoilt = server.spoil(body | {"prompt": []}, 0)
        if server.models.pop(body["lora_name"], None) is None:
            return self.reply(404, {"error": {"message": "not found"}})
        if spoilt == "drop":
            return self.drop()
        return self.reply(200, "Success: removed.")

    def reload(self, server, body):
        server.models = {body["name"]: (load_base(body["folder"]), body["folder"])}
        self.reply(200, "done")

    def log_message(self, *_):
        pass


def load_base(path, kept={}):  # noqa: B006
    """A model from a folder; those of the first, which never changes, are copies."""
    if not kept:
        kept[path] = read_base(path)
    return deepcopy(kept[path]) if path in kept else read_base(path)


def read_base(path):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = None  # stops are those of the request alone
    return model


@pytest.fixture
def server(tiny_model):
    server = CompletionServer(tiny_model)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("sso_lightning.endpoint.FIRST_WAIT", 0.01)


def sampler(server, folder=None, *, model="base", timeout=30.0, **settings):
    settings = {"max_new_tokens": LIMIT, "temperature": 0.0, "max_gap": None, **settings}
    reached = Server(server.url, model, timeout=timeout, max_retries=2, concurrency=4)
    return ServerSampler(reached, folder=None if folder is None else str(folder), **settings)


@cache
def loaded(path, lora):
    return load_model(PolicyConfig(path, lora=LoRA(r=4, alpha=8) if lora else None))


def policy(tiny_model, *, lora=True, trained=1.0, seed=0):
    """The tiny model; an adapter that changes what it says, or other weights, if trained."""
    model = deepcopy(loaded(str(tiny_model), lora))
    train(model, trained, seed)
    return model


def train(model, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (parameter.requires_grad and "lora" not in name and size):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise * (1.0 if "lora" in name else 0.2))


def requests(count=5):
    prompts = [list(range(20, 24)) if i % 3 == 0 else list(range(30, 33 + i)) for i in range(count)]
    return [
        Request(f"{i}/good", prompt, seed=i, max_new_tokens=None if i else 3)
        for i, prompt in enumerate(prompts)
    ]


def in_process(model, stop_ids=STOP):
    engine = TransformersSampler(max_new_tokens=LIMIT, temperature=0.0)
    return engine.sample(model, requests(), stop_ids=stop_ids)


def handed(engine, model):
    engine.hand_over(model, ALONE)
    return engine


# --------------------------------------------------------------------------------------- answers


def test_greedy_answers_are_those_of_the_process(server, tiny_model, tmp_path):
    model = policy(tiny_model)
    free = in_process(model, stop_ids=[])
    stops = [3, free[1].ids[4], free[2].ids[0]]
    advanced = []
    engine = handed(sampler(server, tmp_path), model)
    samples = engine.sample(
        model, requests(), stop_ids=stops, progress=lambda *step: advanced.append(step)
    )
    assert samples == in_process(model, stop_ids=stops)
    assert {sample.finish for sample in samples} == {"stop", "length"}
    assert sum(tokens for tokens, _ in advanced) == sum(len(s.ids) for s in samples)
    assert [finished for _, finished in advanced] == [1] * len(samples)
    assert free != in_process(policy(tiny_model, trained=0.0), stop_ids=[])


def test_a_seed_decides_an_answer_whatever_is_asked_beside_it(server, tiny_model, tmp_path):
    model = policy(tiny_model)
    engine = handed(sampler(server, tmp_path, temperature=1.0), model)
    asked = [Request(str(i), list(range(20, 24)), seed=i) for i in range(6)]
    samples = engine.sample(model, asked, stop_ids=STOP)
    assert len({tuple(sample.ids) for sample in samples}) > 3
    assert engine.sample(model, asked[3:4], stop_ids=STOP) == samples[3:4]


def test_a_request_says_all_that_a_server_has_defaults_for(server, tiny_model):
    model = policy(tiny_model, trained=0.0)
    engine = handed(sampler(server, temperature=0.7, top_p=0.9, top_k=40), model)
    engine.sample(model, [Request("a", [20, 21], seed=2**62 + 1)], stop_ids=STOP)
    assert server.asked() == [
        {
            "model": "base",
            "prompt": [20, 21],
            "seed": 2**62 + 1,
            "max_tokens": LIMIT,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": STOP,
            "ignore_eos": True,
            "return_token_ids": True,
        }
    ]
    engine = handed(sampler(server), model)
    engine.sample(model, requests(1), stop_ids=STOP)
    assert server.asked()[-1]["top_k"] == -1


def change(**fields):
    def spoil(answer):
        answer["choices"][0] |= fields
        return answer

    return spoil


@pytest.mark.parametrize(
    "spoilt",
    [
        429,
        500,
        503,
        "drop",
        "cut",
        lambda answer: "not JSON",
        lambda answer: {"choices": []},
        change(token_ids=[]),
        change(finish_reason="abort"),
    ],
    ids=["429", "500", "503", "drop", "cut", "text", "no choice", "empty", "abort"],
)
def test_what_passes_is_tried_again_and_what_stays_ends_in_one_line(server, tiny_model, spoilt):
    model = policy(tiny_model, trained=0.0)
    engine = handed(sampler(server), model)
    server.spoil = lambda body, attempt: spoilt if attempt == 0 else None
    assert engine.sample(model, requests(2), stop_ids=STOP) == in_process(model)[:2]
    server.spoil = lambda body, attempt: spoilt
    with pytest.raises(InputError, match="finished shards are kept") as caught:
        engine.sample(model, requests(1), stop_ids=STOP)
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_keeps_silent_is_asked_again(server, tiny_model):
    model = policy(tiny_model, trained=0.0)
    engine = handed(sampler(server, timeout=1.0), model)
    server.spoil = lambda body, attempt: "late" if attempt == 0 else None
    assert engine.sample(model, requests(1), stop_ids=STOP) == in_process(model)[:1]
    server.spoil = lambda body, attempt: "late"
    engine.server.max_retries = 0
    with pytest.raises(InputError, match="timed out"):
        engine.sample(model, requests(1), stop_ids=STOP)


def shorten(answer):
    ids = answer["choices"][0]["token_ids"]
    return change(token_ids=ids[:2], finish_reason="length")(answer)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (change(token_ids=None), r"without token ids; .* return_token_ids \(vLLM from 0\.10\.2"),
        (change(token_ids=[7, 400]), "holds 400, which is no token of the policy's 400"),
        (change(token_ids=[7, -1]), "holds -1, which is no token"),
        (change(token_ids=[7, "8"]), "holds '8', which is no token"),
        (change(token_ids=[7, True]), "holds True, which is no token"),
        (change(prompt_token_ids=[30, 31]), "another prompt was answered than was sent"),
        (change(token_ids=[7, 3, 8], finish_reason="stop"), "goes on after a stop token"),
        (change(token_ids=[7, 8], finish_reason="stop"), "ended at token 8, which is none of"),
        (shorten, "was cut at 2 of 8 tokens .*--max-model-len"),
        (400, "status 400 .*; mend that and start again"),
        (404, "status 404"),
    ],
)
def test_what_no_retry_mends_is_told_at_once(server, tiny_model, spoilt, message):
    model = policy(tiny_model, trained=0.0)
    engine = handed(sampler(server), model)
    server.spoil = lambda body, attempt: spoilt
    with pytest.raises(InputError, match=message):
        engine.sample(model, [Request("7/good", list(range(30, 40)), seed=0)], stop_ids=STOP)
    assert len(server.asked()) == 1


def test_a_stop_token_at_the_limit_is_a_stop(server, tiny_model):
    model = policy(tiny_model, trained=0.0)
    engine = handed(sampler(server), model)
    server.spoil = lambda body, attempt: change(token_ids=[9, 9, 5], finish_reason="length")
    (sample,) = engine.sample(model, requests(1), stop_ids=STOP)
    assert (sample.ids, sample.finish) == ([9, 9, 5], "stop")


def test_prompts_that_cannot_be_answered_are_not_sent(server, tiny_model):
    model = policy(tiny_model, trained=0.0)
    engine = handed(sampler(server), model)
    for request in (Request("a", [], 0), Request("a", [1], 0, max_new_tokens=0)):
        with pytest.raises(InputError, match="request 'a'"):
            engine.sample(model, [request], stop_ids=STOP)
    assert engine.sample(model, [], stop_ids=STOP) == []
    assert server.asked() == []


# --------------------------------------------------------------------------------------- weights


def test_every_set_is_sampled_from_the_adapter_as_it_is_then(server, tiny_model, tmp_path):
    model = policy(tiny_model)
    engine = handed(sampler(server, tmp_path, **PROVED), model)
    first = engine._name
    before = engine.sample(model, requests(), stop_ids=STOP)
    count = len(server.log)
    engine.hand_over(model, ALONE)  # nothing moved
    paths = [path for path, _ in server.log[count:]]
    assert paths == ["/v1/models", "/v1/completions", "/v1/models"]  # it is asked to prove it

    train(model, 1.0, seed=1)
    engine.hand_over(model, ALONE)
    assert engine._name != first
    after = engine.sample(model, requests(), stop_ids=STOP)
    assert after == in_process(model) != before
    assert [*server.models] == ["base", engine._name]
    assert [path.name for path in tmp_path.iterdir()] == [engine._name]

    server.models = {"base": server.models["base"]}  # it was started again
    engine.hand_over(model, ALONE)
    assert engine.sample(model, requests(), stop_ids=STOP) == after


def test_an_adapters_scale_is_part_of_its_name(server, tiny_model, tmp_path):
    names = []
    for alpha in (8, 16):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = load_model(PolicyConfig(str(tiny_model), lora=LoRA(r=4, alpha=alpha)))
        train(model, 1.0)
        names.append(handed(sampler(server, tmp_path, **PROVED), model)._name)
    assert len({*names}) == 2


def test_the_adapter_that_is_active_writes(server, tiny_model, tmp_path):
    model = policy(tiny_model)
    add_generator(model)
    train(model, 0.5, seed=3)  # both, differently
    engine = sampler(server, tmp_path, **PROVED)
    said = {}
    for adapter in ("default", GENERATOR):
        activate(model, adapter)
        said[adapter] = handed(engine, model).sample(model, requests(), stop_ids=STOP)
        assert said[adapter] == in_process(model)
    assert said["default"] != said[GENERATOR]


def test_a_lost_answer_to_loading_or_unloading_does_no_harm(server, tiny_model, tmp_path):
    server.spoil = lambda body, attempt: "drop" if "lora_name" in body else None
    model = policy(tiny_model)
    engine = handed(sampler(server, tmp_path, **PROVED), model)
    assert engine.sample(model, requests(), stop_ids=STOP) == in_process(model)
    train(model, 1.0, seed=1)
    engine.hand_over(model, ALONE)
    assert [*server.models] == ["base", engine._name]


def test_another_runs_adapter_of_the_same_name_is_not_relied_on(server, tiny_model, tmp_path):
    model = policy(tiny_model)
    handed(sampler(server, tmp_path / "one"), model)
    engine = handed(sampler(server, tmp_path / "two"), model)
    assert server.models[engine._name][1] == str(tmp_path / "two" / engine._name)


def test_a_folder_that_the_server_does_not_see_is_told(server, tiny_model, tmp_path):
    with pytest.raises(
        InputError, match=r"cannot load the adapter /else/sso-.*no adapter at "
    ) as c:
        handed(sampler(server, tmp_path, folder_on_server="/else/"), policy(tiny_model))
    for hint in ("folder_on_server", "--max-lora-rank 8", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        assert hint in str(c.value)
    (tmp_path / "link").symlink_to(tmp_path)
    model = policy(tiny_model)
    engine = handed(sampler(server, tmp_path, folder_on_server=f"{tmp_path}/link"), model)
    assert server.models[engine._name][1] == f"{tmp_path}/link/{engine._name}"


def test_without_a_folder_only_weights_that_never_moved_are_sampled(server, tiny_model):
    model = policy(tiny_model, trained=0.0)
    engine = handed(sampler(server), model)
    assert engine.sample(model, requests(), stop_ids=STOP) == in_process(model)
    train(model, 1e-4)
    with pytest.raises(InputError, match="has been trained, and the sampler has no way"):
        engine.hand_over(model, ALONE)
    with pytest.raises(InputError, match="was handed no policy"):
        engine.sample(model, requests(), stop_ids=STOP)
    with pytest.raises(InputError, match="has been trained"):
        sampler(server).hand_over(model, ALONE)  # as after a resumed start
    whole = policy(tiny_model, lora=False, trained=0.0)
    engine = handed(sampler(server), whole)
    train(whole, 1e-4)
    with pytest.raises(InputError, match="has been trained"):
        engine.hand_over(whole, ALONE)


RELOAD = """
import json, sys, urllib.request
url, folder, name = sys.argv[1:]
body = json.dumps({"folder": folder, "name": name}).encode()
urllib.request.urlopen(urllib.request.Request(url + "/reload", body)).read()
"""


@pytest.mark.parametrize(
    ("lora", "name"), [(False, "{name}"), (True, "base")], ids=["full, named", "merged, in place"]
)
def test_all_weights_are_reloaded_by_the_users_command(server, tiny_model, tmp_path, name, lora):
    model = policy(tiny_model, lora=lora, trained=0.0)
    command = [sys.executable, "-c", RELOAD, server.url, "{folder}", name]
    engine = sampler(server, tmp_path, reload=command, **PROVED)
    for seed in range(2):
        train(model, 0.3, seed)
        samples = handed(engine, model).sample(model, requests(), stop_ids=STOP)
        assert samples == in_process(model)
        (written,) = tmp_path.iterdir()
        assert engine._name == ("base" if name == "base" else written.name)
    assert [*server.models] == [engine._name]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "-c", "raise SystemExit('out of memory')"], "status 1: out of memory"),
        ([sys.executable, "-c", "import time; time.sleep(9)"], "timed out after 0.3 seconds"),
        (["no-such-command"], "sampler.reload: .*no-such-command"),
        ([sys.executable, "-c", "'{name}'"], r"serves base, not sso-\w+"),
        ([sys.executable, "-c", "'{folder}'"], "does not have the policy's weights"),
    ],
)
def test_a_reload_that_fails_ends_the_run(server, tiny_model, tmp_path, command, message):
    engine = sampler(server, tmp_path, reload=command, wait=0.3, **PROVED)
    model = policy(tiny_model, lora=False)
    with pytest.raises(InputError, match=message):
        engine.hand_over(model, ALONE)
    with pytest.raises(InputError, match="was handed no policy"):
        engine.sample(model, requests(1), stop_ids=STOP)


def test_full_weights_need_a_command(server, tiny_model, tmp_path):
    with pytest.raises(InputError, match="the command that makes the server load them"):
        sampler(server, tmp_path, **PROVED).hand_over(policy(tiny_model, lora=False), ALONE)


# ----------------------------------------------------------------------------------------- probe


def test_another_model_behind_the_address_is_found_out(server, tiny_model, tmp_path):
    other = policy(tiny_model, lora=False)
    other.save_pretrained(tmp_path / "other")
    server.models["base"] = load_base(tmp_path / "other"), "other"
    model = policy(tiny_model, trained=0.0)
    with pytest.raises(InputError, match=r"does not have the policy's weights: .* nats per token"):
        sampler(server, max_gap=0.2).hand_over(model, ALONE)
    handed(sampler(server, max_gap=100.0), model)
    count = len(server.calls("/completions"))
    handed(sampler(server, max_gap=None), model)
    assert len(server.calls("/completions")) == count


def test_the_gap_is_the_mean_of_the_differences(server, tiny_model, caplog):
    def shift(answer):
        logps = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert len(logps) == 32
        return change(
            logprobs={"token_logprobs": [v + 0.064 * (i == 3) for i, v in enumerate(logps)]}
        )(answer)

    caplog.set_level("INFO", "sso_lightning")
    server.spoil = lambda body, attempt: shift
    model = policy(tiny_model, trained=0.0).train()
    handed(sampler(server, max_gap=0.2), model)
    assert "log-probs differ by 0.002 nats per token" in caplog.text
    assert model.training
    with pytest.raises(InputError, match=r"0.002 nats .*max_gap: 0.001"):
        sampler(server, max_gap=0.001).hand_over(model, ALONE)
    server.spoil = lambda body, attempt: change(logprobs=None)
    with pytest.raises(InputError, match="reports no log-probabilities"):
        sampler(server, max_gap=0.2).hand_over(model, ALONE)


def test_a_server_that_mixes_up_its_adapters_is_found_out(server, tiny_model, tmp_path):
    model = policy(tiny_model)
    engine = handed(sampler(server, tmp_path), model)
    server.spoil = lambda body, attempt: lambda answer: {**answer, "model": "base"}
    with pytest.raises(InputError, match="'base' answered in place of sso-"):
        engine.sample(model, requests(1), stop_ids=STOP)


def test_a_server_without_the_model_or_no_server_at_all_is_told(server, tiny_model):
    model = policy(tiny_model, trained=0.0)
    with pytest.raises(InputError, match="serves base, not large"):
        sampler(server, model="large").hand_over(model, ALONE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InputError, match=r"Connection error.*check server.base_url"):
        sampler(server).hand_over(model, ALONE)


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1, "top_p": 0}, "temperature must be 0 or more; top_p must be above 0"),
        ({"wait": 0}, "wait must be above 0"),
        ({"max_gap": 0}, "max_gap must be above 0 or null"),
        ({"reload": ["a"]}, "folder must be given beside"),
        ({"folder_on_server": "/a"}, "folder must be given beside"),
        ({"folder": "a", "reload": []}, "reload must be a command or null"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        ServerSampler(Server("http://localhost:8000/v1", "a"), **settings)


def test_settings_of_the_server_are_called_by_their_own_name():
    with pytest.raises(InputError, match=r"server.concurrency must be .*; server.model is empty"):
        Server("http://localhost:8000/v1", "", concurrency=0)


def test_only_what_decides_the_distribution_tells_sets_apart():
    drawn = {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 7}
    one = ServerSampler(Server("http://a/v1", "a", concurrency=3), **drawn)
    assert one.settings() == drawn == TransformersSampler(**drawn).settings()
    assert one.engine != TransformersSampler.engine


def test_a_sampler_comes_from_yaml_and_its_help_can_be_read(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Sampler, "sampler")
    text = """
    sampler:
      class_path: sso_lightning.engines.ServerSampler
      init_args:
        server: {base_url: http://localhost:8000/v1, model: a, key_variable: null}
        folder: runs/mine/engine
        reload: [reload.sh, "{folder}"]
    """
    made = parser.instantiate(parser.parse_string(text)).sampler
    assert made.reload == ["reload.sh", "{folder}"]
    assert made.server.concurrency == 64
    with pytest.raises(SystemExit):
        ArgumentParser().add_subclass_arguments(Sampler, "sampler") or parser.parse_args(
            ["--sampler.help", "sso_lightning.engines.ServerSampler"]
        )
    out = " ".join(capsys.readouterr().out.split())
    assert "Folder of this run alone in which the server finds the weights" in out
    assert "Address up to and with `/v1`" in out


# --------------------------------------------------------------------- vLLM, or rather its stand-in


@dataclass
class SamplingParams:
    """The fields that are used of vLLM's; another name is an error here as there."""

    seed: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list
    ignore_eos: bool
    detokenize: bool
    logprobs: int | None = None


@dataclass(frozen=True)
class LoRARequest:
    """See vllm/lora/request.py."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class FakeLLM:
    """Does what the documentation says of `vllm.LLM`, with transformers, and notes the calls.

    It keeps an adapter that was loaded under a number, whatever lies in the folder later.
    """

    made = None

    def __init__(
        self,
        model,
        *,
        dtype,
        generation_config,
        skip_tokenizer_init,
        enable_sleep_mode,
        enable_lora=False,
        max_lora_rank=16,
        gpu_memory_utilization=0.9,
    ):
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "model")}
        if FakeLLM.made is not None:
            raise RuntimeError("two engines")
        FakeLLM.made = self
        self.path, self.base, self.adapters = model, load_base(model), {}
        self.awake, self.calls = {"weights", "kv_cache"}, []

    def sleep(self, level):
        assert self.arguments["enable_sleep_mode"]
        assert level == 1  # the weights go to the host's memory
        self.awake = set()
        self.calls.append("sleep")

    def wake_up(self, tags):
        self.awake |= {*tags}
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method, *, kwargs):
        assert method == "reload_weights"
        assert "weights" in self.awake
        self.base = load_base(kwargs["weights_path"])
        self.calls.append("reload")

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        assert self.awake == {"weights", "kv_cache"}
        assert use_tqdm is False
        model = self.base
        if lora_request is not None:
            number = lora_request.lora_int_id
            if number not in self.adapters:
                adapted = PeftModel.from_pretrained(load_base(self.path), lora_request.lora_path)
                self.adapters[number] = adapted.eval()
            model = self.adapters[number]
        self.calls.append("generate")
        pairs = zip(prompts, sampling_params, strict=True)
        return [self.one(model, prompt["prompt_token_ids"], params) for prompt, params in pairs]

    def one(self, model, prompt, params):
        assert (params.ignore_eos, params.detokenize) == (True, False)
        drawn = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        greedy = params.temperature == 0
        engine = TransformersSampler(params.max_tokens, **drawn)
        request = Request("", prompt, params.seed)
        (sample,) = engine.sample(model, [request], stop_ids=params.stop_token_ids)
        logps = None
        if params.logprobs == 0:
            ids = torch.tensor([prompt + sample.ids])
            with torch.no_grad():
                table = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps = [
                {token: SimpleNamespace(logprob=row[token].item(), rank=1)}
                for token, row in zip(sample.ids, table, strict=True)
            ]
        assert greedy or logps
        made = SimpleNamespace(
            token_ids=tuple(sample.ids), finish_reason=sample.finish, logprobs=logps
        )
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[made])


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the module; its `LLM.made` is the engine."""
    main, lora, request = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    main.__spec__ = ModuleSpec("vllm", None)
    main.LLM, main.SamplingParams, main.TokensPrompt = FakeLLM, SamplingParams, dict
    request.LoRARequest = LoRARequest
    for module in (main, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(FakeLLM, "made", None)
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    return main


def offline(tmp_path, **settings):
    return VLLMSampler(str(tmp_path / "v"), LIMIT, temperature=0.0, **{**PROVED, **settings})


def test_vllm_gets_a_fresh_number_for_every_adapter(vllm, tiny_model, tmp_path):
    model = policy(tiny_model)
    engine = offline(tmp_path, options={"gpu_memory_utilization": 0.5})
    for seed in range(2):
        train(model, 1.0, seed)
        handed(engine, model)
        assert engine.sample(model, requests(), stop_ids=STOP) == in_process(model)
        engine.hand_over(model, ALONE)  # nothing moved
    made = vllm.LLM.made
    assert made.path == str(tiny_model)
    assert made.arguments == {
        "dtype": "float32",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "enable_sleep_mode": True,
        "enable_lora": True,
        "max_lora_rank": 8,
        "gpu_memory_utilization": 0.5,
    }
    assert [*made.adapters] == [1, 2]
    turn = ["wake weights", "wake kv_cache", "generate", "sleep"]
    assert made.calls == ["generate", "sleep", *turn, *turn, *turn]


def test_vllm_takes_all_weights_in_its_sleep(vllm, tiny_model, tmp_path):
    model = policy(tiny_model, lora=False, trained=0.0)
    engine = offline(tmp_path)
    for seed in range(2):
        train(model, 0.3, seed)
        samples = handed(engine, model).sample(model, requests(), stop_ids=STOP)
        assert samples == in_process(model)
    made = vllm.LLM.made
    assert "enable_lora" not in {k for k, v in made.arguments.items() if v}
    assert made.path == str(tmp_path / "v" / "weights")
    turn = ["wake weights", "wake kv_cache", "generate", "sleep"]
    update = ["wake weights", "reload", "wake kv_cache", "reset", "generate", "sleep"]
    assert made.calls == ["generate", "sleep", *turn, *update, *turn]


def test_vllm_stays_awake_if_told_and_reports_nothing_home(vllm, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "")  # restored afterwards
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    model = policy(tiny_model)
    handed(offline(tmp_path, sleep=False), model)
    assert vllm.LLM.made.calls == ["generate"]
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_vllm_with_other_weights_is_found_out(vllm, tiny_model, tmp_path):
    model = policy(tiny_model)
    engine = offline(tmp_path)
    handed(engine, model)
    engine._loads -= 1  # a number that is used twice means the first adapter
    train(model, 1.0, seed=5)
    with pytest.raises(InputError, match="vLLM: does not have the policy's weights"):
        engine.hand_over(model, ALONE)
    with pytest.raises(InputError, match="was handed no policy"):
        engine.sample(model, requests(1), stop_ids=STOP)


def test_vllm_says_what_it_cannot_do(vllm, tiny_model, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="serves runs of one process; use ServerSampler"):
        offline(tmp_path).hand_over(policy(tiny_model), Processes(0, 2))
    model = load_model(PolicyConfig(str(tiny_model), lora=LoRA(r=513)))
    with pytest.raises(InputError, match="ranks up to 512, not 513"):
        offline(tmp_path).hand_over(model, ALONE)
    with pytest.raises(InputError, match="folder must be given"):
        VLLMSampler("")
    monkeypatch.delitem(sys.modules, "vllm")
    with pytest.raises(InputError, match=r"pip install 'sso-lightning\[vllm\]'"):
        offline(tmp_path)


# ----------------------------------------------------------------------------------- a whole run


@pytest.fixture
def home(tmp_path, tiny_model, monkeypatch):
    """A folder with queries; gives a function that writes YAML and returns its name."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds{'!' * i}"} for i in range(5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name, engine, *, lora=True, **trainer):
        settings = {
            "trainer": {
                "default_root_dir": name,
                "max_epochs": 2,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                **trainer,
            },
            "model": {
                "policy": {
                    "path": str(tiny_model),
                    **({"lora": {"r": 4, "alpha": 8}} if lora else {}),
                },
                "objective": {
                    "class_path": "SelfSteering",
                    "init_args": {"base": {"class_path": "IPO", "init_args": {"beta": 5.0}}},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
            },
            "data": {"queries": "q.jsonl", "batch_size": 2},
            "pairs": {
                "sampler": engine,
                "principles": {
                    "class_path": "PredefinedPrinciples",
                    "init_args": {"pick": "random"},
                },
                "shard_size": 2,
            },
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        return f"{name}.yaml"

    return write


DRAWN = {"max_new_tokens": 6, "temperature": 0.0}


def by_server(url, folder, **settings):
    """The YAML of the sampler."""
    reached = {"base_url": url, "model": "base", "max_retries": 1}
    init = {"server": reached, "folder": folder, **PROVED, **DRAWN, **settings}
    return {"class_path": "sso_lightning.engines.ServerSampler", "init_args": init}


def pairs_of(run):
    return [load_records(folder) for folder in sorted(Path(run).glob("pairs/iteration-0?"))]


@pytest.mark.slow
def test_two_iterations_are_those_of_the_built_in_sampler(server, home, sso):
    built_in = {"class_path": "TransformersSampler", "init_args": DRAWN}
    for name, engine in (("ours", built_in), ("theirs", by_server(server.url, "engine"))):
        status, _, err = sso("fit", "--config", home(name, engine))
        assert status == 0, err
    theirs = pairs_of("theirs")
    for mine, other in zip(pairs_of("ours"), theirs, strict=True):
        assert mine
        assert [r.response_ids for r in mine] == [r.response_ids for r in other]
        assert [r.scores for r in mine] == [r.scores for r in other]
        assert {r.engine for r in other} == {"server"}
    assert len({body["lora_name"] for body in server.calls("/load_lora_adapter")}) == 2
    assert [r.response_ids for r in theirs[0]] != [r.response_ids for r in theirs[1]]
    assert len(list(Path("engine").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_hand_over_once_and_ask_for_their_own_shards(server, home, forks, tmp_path):
    strategy = {
        "devices": 2,
        "strategy": {"class_path": "sso_lightning.strategies.FSDP2Strategy"},
    }
    command = [sys.executable, "-c", RELOAD, server.url, "{folder}", "{name}"]
    warm = {"temperature": 1.0}  # greedy answers of random weights are too much alike
    configs = [
        home("lora", by_server(server.url, "one", **warm), max_epochs=1, **strategy),
        home("full", by_server(server.url, "two", reload=command, **warm), lora=False, **strategy),
        home("lost", by_server("http://127.0.0.1:9/v1", "three"), **strategy),
    ]
    jobs = [{"argv": ["fit", "--config", c], "status": 2 * (c == "lost.yaml")} for c in configs]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    worker = Path(__file__).with_name("distributed_worker.py")
    started = [
        forks.start(worker, "jobs.json", cwd=tmp_path, **common, RANK=rank, LOCAL_RANK=rank)
        for rank in range(2)
    ]
    for done in [process.wait(200) for process in started]:
        assert done.returncode == 0, done.stderr[-4000:]
    loads = [body["lora_name"] for body in server.calls("/load_lora_adapter")]
    loads += [body["name"] for body in server.calls("/reload")]
    assert len(loads) == len({*loads}) == 3
    asked = {name: [] for name in loads}
    for body in server.asked():
        asked[body["model"]].append(body["prompt"])
    for name, records in zip(loads, [*pairs_of("lora"), *pairs_of("full")], strict=True):
        assert len(asked[name]) == 15  # once for each answer to five queries
        assert records
        assert all(prompt in asked[name] for r in records for prompt in r.prompt_ids.values())
