"""Build the sandbox: a tokenizer, a tiny chat model trained from scratch, and its queries.

The model is meant to follow one-sentence principles moderately well and to have room both ways
without any. Its size and schedule were chosen so that one CPU core builds it within two minutes.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as hf_logging

from sso_lightning.errors import InputError
from sso_lightning.sandbox import world
from sso_lightning.version import __version__

__all__ = ["MARKER", "STEPS", "is_sandbox", "make_sandbox", "make_tokenizer"]

STEPS = 900
BATCH = 16
LEARNING_RATE = 5e-3
# transformers' 0.02 is meant for wide models; at width 64 it wastes the first third of the steps
INIT = 0.08
WARMUP = 0.05
VOCABULARY = 1280
# how many principles a system message carries, 0 for no system message, and how often
PRINCIPLE_COUNTS = {0: 0.30, 1: 0.14, 2: 0.14, 3: 0.14, 4: 0.14, 6: 0.14}
# how far principles of one side also move the features they do not name, as they do in large models
HALO = 0.05
MARKER = "sandbox.json"

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message['role'] + '\\n' + message['content'] + '{END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)


@dataclass(frozen=True)
class Example:
    """One training text: the rendered prompt, and the answer with its end-of-turn token."""

    prompt: str
    answer: str


def make_examples(queries: list[world.WorldQuery], rng: Random) -> Iterator[Example]:
    """Endless training texts: a query, some or no principles of one side, a fitting answer."""
    sizes, weights = list(PRINCIPLE_COUNTS), list(PRINCIPLE_COUNTS.values())
    while True:
        query, good = rng.choice(queries), rng.random() < 0.5
        (size,) = rng.choices(sizes, weights)
        named = rng.sample(world.FEATURES, size)
        halo = (HALO if good else -HALO) if named else 0.0
        wanted = {each.name: good for each in named}
        plan = world.plan_answer(query.ask, wanted, rng, shift=halo)
        prompt = f"{START}user\n{query.text}{END}\n{START}assistant\n"
        if named:
            system = world.system_message([world.worded(each, good, rng) for each in named])
            prompt = f"{START}system\n{system}{END}\n{prompt}"
        yield Example(prompt, world.render(plan) + END)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML template (no default system message)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=INIT,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True,
        max_new_tokens=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _batches(
    tokenizer: PreTrainedTokenizerFast, examples: Iterator[Example], steps: int, rng: Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `steps` pairs (ids, is_answer), both (B, T), right-padded; similar lengths together."""
    window = 16
    for first in range(0, steps, window):
        count = min(window, steps - first)
        texts = [next(examples) for _ in range(count * BATCH)]
        encode = tokenizer.backend_tokenizer.encode_batch
        prompts = [found.ids for found in encode([text.prompt for text in texts])]
        answers = [found.ids for found in encode([text.answer for text in texts])]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0] + row[1]))
        groups = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(prompt) + len(answer) for prompt, answer in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            is_answer = torch.zeros(len(group), width, dtype=torch.bool)
            for row, (prompt, answer) in enumerate(group):
                ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                is_answer[row, len(prompt) : len(prompt) + len(answer)] = True
            yield ids, is_answer


def _train(
    model: Qwen2ForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    progress: Progress,
) -> None:
    """Plain next-token training on answers only, with a linear warm-up and decay."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
    )
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    task = progress.add_task("training the sandbox model", total=steps, loss=float("nan"))
    model.train()
    for ids, is_answer in batches:
        # right-padded and causal: no real token can see a pad, so no mask is needed
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
        wanted = is_answer[:, 1:]
        logits = model.lm_head(hidden[:, :-1][wanted])  # (answer tokens, V)
        loss = F.cross_entropy(logits, ids[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(task, advance=1, loss=loss.item())
    model.eval()


def make_sandbox(out: Path, *, seed: int = 0, steps: int = STEPS, quiet: bool = False) -> None:
    """Build a sandbox folder: `model/`, `train.jsonl`, `validation.jsonl`, `sandbox.json`.

    The folder is put together beside `out` and renamed at the end, so that an interrupted build
    leaves nothing behind that could be taken for a sandbox. One seed gives one sandbox on a given
    machine and version of torch; the caller's random state and thread count are left as they were.

    Args:
        out: Folder to write; an earlier sandbox there is replaced.
        seed: Of the weights, the training texts and the order of the queries. The split into
            training and held-out queries is the same for every seed.
        steps: Optimizer steps; fewer give a model that follows principles less.
        quiet: Show no progress.

    Raises:
        InputError: `out` exists and is not a sandbox, or `steps` is not positive.
    """
    out = Path(out)
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    occupied = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if occupied and not is_sandbox(out):
        raise InputError(f"{out} exists and is not a sandbox; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=quiet)
    threads = torch.get_num_threads()
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch,
        torch.random.fork_rng(devices=[]),
        Progress(
            *Progress.get_default_columns(), "loss {task.fields[loss]:.2f}", console=console
        ) as progress,
    ):
        new = Path(scratch, "new")
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # a model this small gains nothing from more, and sums differ
        try:
            _fill(new, seed, steps, progress)
        finally:
            torch.set_num_threads(threads)
        if out.exists():
            out.rename(Path(scratch, "old"))
        new.rename(out)


def is_sandbox(folder: Path) -> bool:
    """Whether the folder holds a finished sandbox."""
    return (folder / MARKER).is_file()


@contextmanager
def _no_transformers_bars() -> Iterator[None]:
    """Saving a file of half a megabyte needs no progress bar."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _fill(folder: Path, seed: int, steps: int, progress: Progress) -> None:
    """Write all files of a sandbox into a new folder, the marker last."""
    rng = Random(seed)
    train = [query for query in world.queries() if not query.held_out]
    validation = [query for query in world.queries() if query.held_out]
    examples = make_examples(train, rng)
    tokenizer = make_tokenizer(text.prompt + text.answer for text in islice(examples, 4000))
    model = _make_model(tokenizer)
    _train(model, _batches(tokenizer, examples, steps, rng), steps, progress)
    with _no_transformers_bars():
        model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, queries in {"train": train, "validation": validation}.items():
        # shuffled, so that the first lines of a file are a fair sample of it
        lines = [
            json.dumps({"id": query.id, "messages": [{"role": "user", "content": query.text}]})
            for query in rng.sample(queries, len(queries))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = {
        "version": __version__,
        "seed": seed,
        "steps": steps,
        "parameters": model.num_parameters(),
        "train": len(train),
        "validation": len(validation),
    }
    (folder / MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
