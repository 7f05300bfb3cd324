"""Tiny random models and tokenizers made on the spot: no test touches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog while seven wizards brew a potion.",
    "Name three birds for a poem. Give me a good answer, a bad answer and a plain one.",
]


def tiny_tokenizer(template: str = CHATML, bos: str | None = None, eos: str = "<|im_end|>"):
    """A byte-level BPE tokenizer of 400 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", "<|begin|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, pad_token="<pad>", bos_token=bos
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(architecture: str = "qwen2", **changes):
    """A config of a real architecture, a few thousand parameters large."""
    from transformers import AutoConfig

    settings = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **changes,
    }
    return AutoConfig.for_model(architecture, **settings)


def save_tiny(folder: Path, architecture: str = "qwen2", template: str = CHATML, **changes) -> Path:
    """A model folder as `from_pretrained` reads it."""
    from transformers import AutoModelForCausalLM

    bos, eos = ("<|begin|>", "<|eot_id|>") if template is LLAMA3 else (None, "<|im_end|>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    model.save_pretrained(folder)
    tiny_tokenizer(template, bos, eos).save_pretrained(folder)
    return folder


def write_queries(path: Path, count: int) -> Path:
    """A query file of `count` lines."""
    rows = [
        {"id": f"q{i}", "messages": [{"role": "user", "content": f"Name {i} birds for a poem."}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Qwen2 model with a ChatML tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


class ChatServer(ThreadingHTTPServer):
    """A chat server on loopback that answers as `script(request, attempt)` says.

    It is given the query ("Request N?", or the whole prompt) and how often it came before, and
    gives body, status and headers, or None to drop the connection.

    Attributes:
        asked: The query of every request, in the order they came.
        headers: Their headers.
        bodies: Their bodies.
        most: Most requests at the same time.
    """

    daemon_threads = True
    script = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked, self.headers, self.bodies = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """Nothing: clients that give up are part of the tests."""


class ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        found = re.search(r"Request \w+\?", prompt)
        request = found[0] if found else prompt
        server = self.server
        with server.lock:
            attempt = server.asked.count(request)
            server.asked.append(request)
            server.headers.append({k.lower(): v for k, v in self.headers.items()})
            server.bodies.append(body)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            assert self.path == "/v1/chat/completions"
            answer = server.script(request, attempt)
        finally:
            with server.lock:
                server.now -= 1
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        data = answer["body"].encode()
        self.send_response(answer["status"])
        for name, value in answer["headers"].items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.get("length", len(data))))
        self.end_headers()
        self.wfile.write(data)
        if "length" in answer:
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


@pytest.fixture
def chat_server():
    """A running `ChatServer`."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Fork:
    """A process of its own.

    Attributes:
        pid: Its id; it is not reused before `wait`.
    """

    def __init__(self, ask, pid, out, err):
        self.pid, self._ask, self._out, self._err = pid, ask, out, err

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its end; it is killed if that does not come in time."""
        end = time.monotonic() + timeout
        while (status := self._ask({"ended": self.pid})) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"not ended: {self._err.read_text()}")
            time.sleep(0.02)
        texts = [p.read_text() if p.exists() else "" for p in (self._out, self._err)]
        return subprocess.CompletedProcess(self.pid, status, *texts)


class Forks:
    """Python programs in processes that have done their imports; see `forkserver.py`.

    Not for what imports are part of, nor for what ends after `main`: threads, `atexit`.
    """

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forkserver.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, request):
        self._server.stdin.write(f"{json.dumps(request)}\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments: object, cwd: Path, **env: object) -> Fork:
        """Start `python ARGUMENTS` with more in its environment."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{kind}" for kind in ("out", "err"))
        pid = self._ask(
            {
                "arguments": [str(a) for a in arguments],
                "cwd": str(cwd),
                "out": str(out),
                "err": str(err),
                "env": {**os.environ, **{k: str(v) for k, v in env.items()}},
            }
        )
        return Fork(self._ask, pid, out, err)

    def run(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
        """Start it and wait for its end."""
        return self.start(*arguments, cwd=cwd).wait()

    def close(self):
        """End."""
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts processes that need no imports."""
    starter = Forks(tmp_path_factory.mktemp("forks"))
    yield starter
    starter.close()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def sso(capsys, monkeypatch):
    """Run the command line in this process: `status, stdout, stderr = sso("fit", ...)`."""
    import logging

    from sso_lightning.__main__ import main

    # libraries' log handlers keep the stderr of the test that imported them, which is closed by now
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call
