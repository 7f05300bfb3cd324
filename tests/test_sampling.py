import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from sso_lightning.continuous import ContinuousBatchingSampler
from sso_lightning.errors import InputError
from sso_lightning.sampling import Request, TransformersSampler, pick_tokens

SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "qwen2": Qwen2Config(**SIZE),
    "qwen3": Qwen3Config(**SIZE),
    "llama": LlamaConfig(**SIZE),
    "mistral-window": MistralConfig(**SIZE, sliding_window=5),
    "granite": GraniteConfig(**SIZE, logits_scaling=2.0, attention_multiplier=0.3),
    "gemma3-window": Gemma3TextConfig(
        **SIZE, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    # no slots: over transformers' own cache
    "gemma2": Gemma2Config(**SIZE, sliding_window=5, attn_logit_softcapping=2.0),
}
STOP = [5, 6, 7]
SAMPLERS = [TransformersSampler, ContinuousBatchingSampler]


def make(name="qwen2"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name])
    # transformers' own padded Gemma 2 makes NaN in float64
    return model if name == "gemma2" else model.double()


def requests(count=9):
    shared = [11, 12, 13, 14]
    prompts = [shared if i % 3 == 0 else list(range(3, 5 + i)) for i in range(count)]
    return [
        Request(str(i), prompt, seed=i, max_new_tokens=None if i else 3)
        for i, prompt in enumerate(prompts)
    ]


def each_architecture():
    for name in ARCHITECTURES:
        for rows in (1, 4, 32):
            yield name, TransformersSampler, rows
        often = name in ("llama", "gemma3-window", "gemma2")
        marks = () if often else pytest.mark.exhaustive
        yield pytest.param(name, ContinuousBatchingSampler, 4, marks=marks)


@pytest.mark.parametrize(("name", "kind", "rows"), each_architecture())
def test_greedy_equals_generate(name, kind, rows):
    model = make(name).eval()
    sampler = kind(max_new_tokens=12, temperature=0, max_rows=rows)
    samples = sampler.sample(model, requests(), stop_ids=STOP)
    finishes = set()
    for request, sample in zip(requests(), samples, strict=True):
        want = model.generate(
            torch.tensor([request.prompt]),
            attention_mask=torch.ones(1, len(request.prompt), dtype=torch.int64),
            max_new_tokens=request.max_new_tokens or 12,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=0,
        )[0, len(request.prompt) :].tolist()
        assert sample.key == request.key
        assert sample.ids == want
        assert sample.finish == ("stop" if want[-1] in STOP else "length")
        finishes.add(sample.finish)
    assert "length" in finishes


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 5}])
def test_company_changes_nothing(settings):
    model, asked = make(), requests()

    def answers(order, **limits):
        sampler = TransformersSampler(max_new_tokens=12, **settings, **limits)
        samples = sampler.sample(model, order, stop_ids=STOP)
        return {sample.key: sample.ids for sample in samples}

    together = answers(asked)
    assert together == answers(asked[::-1], max_rows=2)
    assert together == answers(asked, max_tokens=40)
    assert together["4"] == answers([asked[4]])["4"]
    # equal prompts with other seeds are other answers
    assert together["3"] != together["6"]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_progress_counts_every_token_and_request(kind):
    seen = []
    samples = kind(max_new_tokens=8).sample(
        make(), requests(), stop_ids=STOP, progress=lambda tokens, done: seen.append((tokens, done))
    )
    assert sum(tokens for tokens, _ in seen) == sum(len(s.ids) for s in samples)
    assert sum(done for _, done in seen) == len(samples)


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen2", SAMPLERS[0]), ("gemma2", SAMPLERS[0]), ("gemma2", SAMPLERS[1])]
)
def test_model_is_left_as_it_was(name, kind):
    model = make(name).train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    model.config.use_cache = False
    before = {n: m.training for n, m in model.named_modules()}
    implementation = model.config._attn_implementation
    state = torch.get_rng_state()
    kind(max_new_tokens=2).sample(model, requests(2), stop_ids=[])
    assert torch.equal(torch.get_rng_state(), state)
    assert before == {n: m.training for n, m in model.named_modules()}
    assert model.config._attn_implementation == implementation
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing
    assert model.model.layers[0].gradient_checkpointing


def test_failure_leaves_the_model_as_it_was():
    model = make().train()
    implementation = model.config._attn_implementation
    with pytest.raises(IndexError):
        TransformersSampler().sample(model, [Request("a", [10**6], 0)], stop_ids=[])
    assert model.training
    assert model.config._attn_implementation == implementation


def test_a_failure_of_continuous_batching_is_told_and_leaves_the_model_as_it_was():
    model = make("gemma2").train()
    with pytest.raises(InputError, match=r"request 'a'.*out of range"):
        ContinuousBatchingSampler().sample(model, [Request("a", [10**6], 0)], stop_ids=[])
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_an_interrupt_of_continuous_batching_does_not_wait_for_the_other_answers():
    model, calls = make(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    asked = [Request("short", [3, 4], 0, max_new_tokens=2)]
    asked += [Request(str(i), [3, 4, 5], i, max_new_tokens=3000) for i in range(3)]

    def interrupt(tokens, done):
        raise KeyboardInterrupt

    sampler = ContinuousBatchingSampler(temperature=0)
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(model, asked, stop_ids=[], progress=interrupt)
    assert 0 < len(calls) < 2000
    assert sampler.sample(model, asked[:1], stop_ids=[])[0].finish == "length"


def test_draws_of_continuous_batching_are_those_of_its_seeds():
    model = make()
    sampler = ContinuousBatchingSampler(max_new_tokens=12, top_p=0.9)
    first = sampler.sample(model, requests(), stop_ids=STOP)
    torch.manual_seed(123)
    assert sampler.sample(model, requests(), stop_ids=STOP) == first
    others = [Request(r.key, r.prompt, r.seed + 1, r.max_new_tokens) for r in requests()]
    assert sampler.sample(model, others, stop_ids=STOP) != first


@pytest.mark.parametrize("kind", SAMPLERS)
def test_peft_model_samples_with_its_adapter(kind):
    from peft import LoraConfig, get_peft_model

    base = make()
    sampler = kind(max_new_tokens=8, temperature=0)
    without = sampler.sample(base, requests(), stop_ids=[])
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model = model.double()
    assert sampler.sample(model, requests(), stop_ids=[]) != without
    with model.disable_adapter():
        assert sampler.sample(model, requests(), stop_ids=[]) == without


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_rows": 0},
        {"max_tokens": 0},
    ],
)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_wrong_settings(kind, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        kind(**settings)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_wrong_requests(kind):
    sampler = kind()
    with pytest.raises(InputError, match="'a'"):
        sampler.sample(make(), [Request("a", [], 0)], stop_ids=[])
    with pytest.raises(InputError, match="'b'"):
        sampler.sample(make(), [Request("b", [3], 0, max_new_tokens=0)], stop_ids=[])
    assert sampler.sample(make(), [], stop_ids=[]) == []


def test_settings_are_json():
    settings = TransformersSampler(max_new_tokens=7, top_p=0.5).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["max_new_tokens"] == 7
    assert settings["top_p"] == 0.5


def picks(probabilities, uniforms, temperature=1.0, top_p=1.0, top_k=0):
    logits = torch.tensor([probabilities], dtype=torch.float64).log().repeat(len(uniforms), 1)
    uniforms = torch.tensor(uniforms, dtype=torch.float64)
    return pick_tokens(logits, uniforms, temperature, top_p, top_k).tolist()


def test_pick_inverts_the_distribution_function():
    # 0.2 | 0.5 | 0.3: tokens change at 0.2 and 0.7
    assert picks([0.2, 0.5, 0.3], [0.0, 0.19, 0.21, 0.69, 0.71, 0.999]) == [0, 0, 1, 1, 2, 2]
    # a probability of zero is never taken, not even at the ends
    assert picks([0.0, 1.0, 0.0], [0.0, 1 - 2**-53]) == [1, 1]


def test_pick_with_temperature():
    # squared: 0.04, 0.25, 0.09 of 0.38; from 0.04/0.38 = 0.105 on token 1, from 0.763 token 2
    assert picks([0.2, 0.5, 0.3], [0.10, 0.11, 0.76, 0.77], temperature=0.5) == [0, 1, 1, 2]
    assert picks([0.2, 0.5, 0.3], [0.0, 0.99], temperature=0) == [1, 1]


def test_pick_with_top_k():
    # two likeliest, in order: 1 (0.5 / 0.8 = 0.625), then 2
    assert picks([0.2, 0.5, 0.3], [0.0, 0.62, 0.63, 0.99], top_k=2) == [1, 1, 2, 2]


def test_pick_with_top_p():
    # 0.5 alone holds less than 0.6, so token 2 joins; token 0 is out
    assert picks([0.2, 0.5, 0.3], [0.62, 0.63, 0.99], top_p=0.6) == [1, 2, 2]
    # 0.5 alone holds 0.5
    assert picks([0.2, 0.5, 0.3], [0.0, 0.99], top_p=0.5) == [1, 1]
    # after top_k=2 (0.625, 0.375), 0.625 alone holds 0.6
    assert picks([0.2, 0.5, 0.3], [0.99], top_p=0.6, top_k=2) == [1]


def test_pick_with_top_p_in_a_flat_large_vocabulary():
    # 3000 equal tokens: more than the likeliest 1024 are needed for 0.9, namely 2700
    uniforms = torch.linspace(0, 0.9999, 500, dtype=torch.float64)
    logits = torch.zeros(500, 3000, dtype=torch.float64)
    tokens = pick_tokens(logits, uniforms, 1.0, 0.9, 0)
    assert len(set(tokens.tolist())) > 450


def test_frequencies_are_the_models():
    """20000 one-token answers: every frequency within 5 standard errors of its probability."""
    model = make().eval()
    asked = [Request(str(i), [3, 4, 5], seed=i) for i in range(20000)]
    sampler = TransformersSampler(max_new_tokens=1, max_rows=20000, max_tokens=10**6)
    drawn = torch.tensor([s.ids[0] for s in sampler.sample(model, asked, stop_ids=[])])
    probs = model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1)
    frequency = torch.bincount(drawn, minlength=61) / len(asked)
    error = (probs * (1 - probs) / len(asked)).sqrt()
    assert ((frequency - probs).abs() <= 5 * error + 1e-4).all()
