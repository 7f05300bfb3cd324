import copy
import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from sso_lightning import scoring
from sso_lightning.errors import InputError
from sso_lightning.scoring import Tree, response_logps, response_rewards

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Sliding windows are shorter than the sequences, caps and factors far enough from 1 to matter.
ARCHITECTURES = {
    "qwen2": Qwen2Config(**SIZE),
    "qwen2-window": Qwen2Config(
        **SIZE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZE),
    "llama-tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**SIZE, sliding_window=5),
    "gemma": GemmaConfig(**SIZE),
    "gemma2": Gemma2Config(
        **SIZE,
        sliding_window=5,
        query_pre_attn_scalar=16,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZE,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=3.0,
    ),
    "granite": GraniteConfig(
        **SIZE,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
        logits_scaling=2.5,
    ),
}
TREES = [
    Tree([1, 2, 3], [[4, 5], [6, 7, 8]]),
    Tree([9] * 7 + [3, 11], [[1], [2, 3, 4, 5, 6], [5]]),
    Tree([5, 4], [[], [7, 7, 8, 9, 10, 11, 12, 13]]),
    Tree([8], []),
]
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 4.0, 1.5], dtype=torch.float64)


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name]).to(dtype)


def alone(model, trees):
    """Each sequence by one unpadded forward of its own."""
    sums = []
    for tree in trees:
        for response in tree.responses:
            logits = model(torch.tensor([tree.prompt + response])).logits[0]
            logps = logits.log_softmax(-1)[len(tree.prompt) - 1 :]
            picked = [logps[i, token] for i, token in enumerate(response)]
            sums.append(sum(picked, logits.new_zeros(())))
    return torch.stack(sums)


def gradients(model, score, trees=TREES):
    model.zero_grad(set_to_none=True)
    logps = score(model, trees)
    (logps * WEIGHTS.to(logps)).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ours(model, trees, **settings):
    return response_logps(model, trees, **settings)[0]


def assert_same_gradients(left, right, tolerance):
    assert left.keys() == right.keys()
    for name, grad in left.items():
        scale = grad.abs().max() + 1e-9
        assert (grad - right[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("keeps", [True, False])
def test_float64_equals_plain_forwards(name, keeps, caplog, monkeypatch):
    if not keeps:
        monkeypatch.setattr("sso_lightning.scoring._KEPT_BYTES", 0)
    model = make(name, torch.float64)
    want, want_grads = gradients(model, alone)
    with caplog.at_level(logging.WARNING):
        got, grads = gradients(model, ours)
    assert not caplog.records  # no silent fallback
    assert (got - want).abs().max() < 1e-9
    # transformers' norms pass gradients through float32 whatever the model's dtype
    assert_same_gradients(want_grads, grads, 2e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 15, "chunk_bytes": 300}])
@pytest.mark.parametrize("keeps", [True, False])
def test_float32_equals_plain_forwards(name, settings, keeps, monkeypatch):
    if not keeps:
        monkeypatch.setattr("sso_lightning.scoring._KEPT_BYTES", 0)
    model = make(name)
    want, want_grads = gradients(model, alone)
    got, grads = gradients(model, lambda m, t: ours(m, t, **settings))
    assert (got - want).abs().max() < 1e-4
    assert_same_gradients(want_grads, grads, 1e-5)


def test_float64_gradients_are_exact_where_the_norms_are_float64():
    model = make("llama-tied", torch.float64)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            norm = nn.RMSNorm(32, module.variance_epsilon, dtype=torch.float64)
            module.forward = norm.forward
    want, want_grads = gradients(model, alone)
    got, grads = gradients(model, ours)
    assert (got - want).abs().max() < 1e-9
    assert_same_gradients(want_grads, grads, 1e-9)


def test_lengths_and_order():
    logps, lengths = response_logps(make("qwen2"), TREES)
    assert lengths.tolist() == [2, 3, 1, 5, 1, 0, 8]
    assert logps.dtype == torch.float64
    assert logps[5] == 0


def test_no_trees_and_no_responses():
    for trees in ([], [Tree([1], [])], [Tree([1], [[]])]):
        logps, lengths = response_logps(make("qwen2"), trees)
        assert len(logps) == len(lengths) == sum(len(t.responses) for t in trees)


def test_empty_prompt_is_refused():
    with pytest.raises(InputError, match="tree 1"):
        response_logps(make("qwen2"), [TREES[0], Tree([], [[1]])])


def test_no_grad_and_modes():
    model = make("qwen2").train()
    model.model.layers[0].eval()
    before = {n: m.training for n, m in model.named_modules()}
    with torch.no_grad():
        logps = ours(model, TREES)
    assert not logps.requires_grad
    assert before == {n: m.training for n, m in model.named_modules()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = make("gemma3").train()
    want, want_grads = gradients(model, ours)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    got, grads = gradients(model, ours)
    assert len(calls) == 2  # forward and recomputation
    assert torch.equal(got, want)
    assert_same_gradients(want_grads, grads, 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_changed(checkpointing):
    model = make("qwen2").train()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def state():
        return {
            name: {
                k: v for k, v in vars(module).items() if k != "_output_capturing_hooks_installed"
            }
            | {"hooks": len(module._forward_pre_hooks) + len(module._forward_hooks)}
            for name, module in model.named_modules()
        }

    model(torch.tensor([[1, 2]]))  # transformers installs its own hooks at the first call
    before, implementation = state(), model.config._attn_implementation
    ours(model, TREES).sum().backward()
    assert model.config._attn_implementation == implementation
    after = state()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys()
        for key, value in attributes.items():
            assert value is after[name][key] or value == after[name][key], (name, key)
    with pytest.raises(IndexError):
        ours(model, [Tree([1, 2], [[3, 10**6]])])  # an error half way restores as well
    assert state().keys() == before.keys()
    assert model.config._attn_implementation == implementation
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_entropy():
    model = make("gemma2", torch.float64)
    tree = Tree([3, 4, 5], [[6, 7, 8, 9]])
    logps = model(torch.tensor([[3, 4, 5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)[2:6]
    want = -(logps.exp() * logps).sum()
    _, _, entropy = response_logps(model, [tree], entropy=True, chunk_bytes=100)
    assert entropy.item() == pytest.approx(want.item(), abs=1e-9)
    assert not entropy.requires_grad


def lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "o_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_lora(settings):
    base = make("qwen2", torch.float64)
    plain_base = alone(base, TREES).detach()
    torch.manual_seed(1)
    model = lora(base, **settings)
    want, want_grads = gradients(model, alone)
    got, grads = gradients(model, ours)
    assert (got - want).abs().max() < 1e-9
    assert_same_gradients(want_grads, grads, 2e-6)
    assert (got - plain_base).abs().max() > 1e-3
    with torch.no_grad(), model.disable_adapter():
        assert (ours(model, TREES) - plain_base).abs().max() < 1e-9


def rewards_alone(model, trees):
    """The rewards of conversations by unpadded forwards of their own."""
    rows = [tree.prompt + response for tree in trees for response in tree.responses]
    return torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])


def classifier(name, dtype=torch.float64):
    torch.manual_seed(0)
    config = copy.deepcopy(ARCHITECTURES[name])
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).to(dtype)


ANSWERED = [Tree(t.prompt, [r for r in t.responses if r]) for t in TREES]
ANSWERED += [Tree([], [[3, 4]])]


# transformers has no sequence classifier of Granite
@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"granite"}))
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 15}])
def test_rewards_equal_plain_forwards(name, settings):
    model = classifier(name)
    want, want_grads = gradients(model, rewards_alone, ANSWERED)
    got, grads = gradients(model, partial(response_rewards, **settings), ANSWERED)
    assert len(got) == 7
    assert (got - want).abs().max() < 1e-9
    assert_same_gradients(want_grads, grads, 2e-6)


@pytest.mark.parametrize("change", ["lora", "checkpointing", "bfloat16"])
def test_rewards_of_changed_models(change):
    model = classifier("qwen2", torch.bfloat16 if change == "bfloat16" else torch.float64).train()
    if change == "lora":
        torch.manual_seed(1)
        model = lora(model, target_modules="all-linear", task_type="SEQ_CLS")
    want, want_grads = gradients(model, rewards_alone, ANSWERED)
    if change == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got, grads = gradients(model, response_rewards, ANSWERED)
    if change == "bfloat16":
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 0.05
    else:
        assert (got - want).abs().max() < 1e-9
        assert_same_gradients(want_grads, grads, 2e-6)


def test_frozen_head_is_not_computed_twice():
    """A frozen head needs two products per logit: the logits and the gradient of its input."""
    model = make("qwen2")
    model.lm_head.requires_grad_(False)
    hidden = torch.randn(40, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        targets = torch.arange(40)
        scoring._head_logps(model, hidden, targets, 4096, False)[0].sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 40 * 32 * 97


def test_bfloat16_is_close_to_float32():
    model = make("llama-tied")
    want = ours(model, TREES)
    model = model.to(torch.bfloat16)
    got, _ = gradients(model, ours)
    plain = alone(model, TREES)
    assert (got - want).abs().max() < 2 * (plain - want).abs().max() + 0.5


def test_autocast_equals_the_models_own():
    model = make("qwen2")
    with torch.autocast("cpu", torch.bfloat16):
        want, got = alone(model, TREES), ours(model, TREES)
    assert (got - want).abs().max() < 0.2
    got.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_four_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    make("llama-tied").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.float32
    )
    # in eval mode bitsandbytes repacks weights on some CPUs, which `policy.load_model` prevents
    model = lora(model, target_modules=["q_proj", "down_proj"]).train()
    want, want_grads = gradients(model, alone)
    got, grads = gradients(model, ours)
    assert (got - want).abs().max() < 1e-3
    assert_same_gradients(want_grads, grads, 1e-3)


def test_unproven_architecture_is_scored_as_rows_and_says_so_once(caplog):
    scoring._say_once.cache_clear()
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    want, want_grads = gradients(model, alone)
    for max_tokens in (None, 20):
        got, grads = gradients(model, lambda m, t, n=max_tokens: ours(m, t, max_tokens=n))
        assert (got - want).abs().max() < 1e-9
        assert_same_gradients(want_grads, grads, 1e-6)
    assert len([r for r in caplog.records if "gpt_neox" in r.message]) == 1


def test_rope_that_depends_on_the_row_is_scored_as_rows():
    config = LlamaConfig(
        **SIZE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    model = AutoModelForCausalLM.from_config(config)
    assert "rotary" in scoring._why_not_trees(model, model)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_flops_tokens_and_positions_are_the_closed_form(gradient, kept, monkeypatch):
    """Prompts once, the head and the last MLP on scored positions only, every tile as planned.

    Per token and layer the products are q, o (32x32), k, v (32x16) and three MLP matrices (32x48).
    The head costs one product without gradient and three with one: logits, the gradient of its
    input, the gradient of its weight. Where its tiles are not kept, the logits are made twice.
    """
    if not kept:
        monkeypatch.setattr("sso_lightning.scoring._KEPT_BYTES", 0)
    model = make("qwen2")
    trees = [Tree([1] * 20, [[2] * 7, [3] * 11]), Tree([4] * 9, [[5] * 3])]
    tokens = (20 + 6 + 10) + (9 + 2)
    scored = 7 + 11 + 3
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    body = 2 * (attention * tokens * 3 + mlp * (2 * tokens + scored))
    # o_proj of the last layer runs on scored positions only
    body -= 2 * 32 * 32 * (tokens - scored)
    head = 2 * 32 * 97 * scored
    context = nullcontext() if gradient else torch.no_grad()
    with FlopCounterMode(display=False) as counter, context:
        logps = ours(model, trees)
        if gradient:
            logps.sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    products = sum(
        flops
        for operator, flops in by_operator.items()
        if str(operator) in ("aten.mm", "aten.addmm", "aten.bmm")
    )
    assert products == (3 * body + (3 if kept else 4) * head if gradient else body + head)
    row = scoring._Row([(trees[0], 0), (trees[1], 2)], torch.device("cpu"))
    assert (len(row.ids), len(row.scored)) == (tokens, scored)


def emulated_varlen(
    q, k, v, ends_q, ends_k, most_q, most_k, *, scale, window_size, enable_gqa, corner="lower right"
):
    """The kernel's documented meaning: causal from the lower right corner."""
    assert enable_gqa
    assert ends_q.dtype == ends_k.dtype == torch.int32
    left, right = window_size
    out = []
    for i in range(len(ends_q) - 1):
        a, b = (x[ends_q[i] : ends_q[i + 1]] for x in (q, q))
        keys, values = (x[ends_k[i] : ends_k[i + 1]] for x in (k, v))
        assert len(a) <= most_q
        assert len(keys) <= most_k
        keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
        shift = len(keys) - len(b) if corner == "lower right" else 0
        at = torch.arange(len(a))[:, None] + shift
        to = torch.arange(len(keys))
        seen = (to <= at + right) & ((left < 0) | (to >= at - left))
        scores = torch.einsum("qhd,khd->hqk", a, keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(out)


def test_varlen_segments(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", emulated_varlen)
    trees = [(TREES[0], 0), (TREES[1], 2), (TREES[2], 5)]
    row = scoring._Row(trees, torch.device("cpu"))
    q = torch.randn(1, 4, len(row.ids), 8)
    k, v = torch.randn(2, 1, 2, len(row.ids), 8)
    for window in (None, 4):
        got = scoring._attend_varlen(q, k, v, row, 0.3, window)
        want, _ = scoring._attend(
            None, q, k, v, None, sso_row=row, scaling=0.3, sliding_window=window
        )
        assert torch.allclose(got, want, atol=1e-5)


def refuse(*args, **kwargs):
    raise RuntimeError("no such kernel here")


@pytest.mark.parametrize(
    ("kernel", "agrees"),
    [
        (emulated_varlen, True),
        (partial(emulated_varlen, corner="upper left"), False),
        (refuse, False),
    ],
    ids=["right", "wrong corner", "missing"],
)
def test_varlen_is_proved_before_it_is_used(kernel, agrees, monkeypatch, caplog):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    scoring._varlen_agrees.cache_clear()
    monkeypatch.setattr(logging.getLogger("sso_lightning"), "propagate", True)
    assert scoring._varlen_agrees(torch.device("cpu"), torch.bfloat16, 4, 2, 16) is agrees
    assert ("without the variable-length" in caplog.text) is not agrees
    scoring._varlen_agrees.cache_clear()
