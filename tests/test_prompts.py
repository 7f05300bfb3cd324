import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sso_lightning.errors import InputError
from sso_lightning.prompts import ChatRenderer, clean_response

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<turn_end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LAST_TURN_ONLY = "{{ messages[-1].content }}"
DROPS_USER = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}"
)
MARKS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<turn>", "[INST]"]

USER = [{"role": "user", "content": "Why is the sky blue?"}]
TALK = [
    {"role": "system", "content": "Speak Latin."},
    {"role": "user", "content": "Salve!"},
    {"role": "assistant", "content": "Ave!"},
    {"role": "user", "content": "Quid novi?"},
]


def make_tokenizer(template, eos="</s>"):
    """A byte-level tokenizer without merges that, as many do, adds a BOS when left to itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>", *MARKS])
    # an end of turn that is an added token without being marked special, and white space as a token
    model.add_tokens([AddedToken("<turn_end>", special=False), AddedToken("\n\n\n", special=False)])
    bos = model.token_to_id("<s>")
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    names = {"bos_token": "<s>", **({"eos_token": eos} if eos else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **names)
    tokenizer.chat_template = template
    return tokenizer


def shown(renderer, messages, system=None):
    return renderer._tokenizer.decode(renderer.render(messages, system))


def test_chatml_renders_system_and_joins_the_querys_own_first():
    renderer = ChatRenderer(make_tokenizer(CHATML))
    assert renderer.mode == "system"
    assert shown(renderer, USER, "Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown(renderer, TALK, "Be brief.").startswith(
        "<|im_start|>system\nSpeak Latin.\n\nBe brief.<|im_end|>\n<|im_start|>user\nSalve!"
    )
    assert "system" not in shown(renderer, USER)


def test_bos_is_not_doubled():
    tokenizer = make_tokenizer(LLAMA3)
    renderer = ChatRenderer(tokenizer)
    ids = renderer.render(USER, "Be brief.")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # it would be without care


def test_bos_is_not_invented_where_the_template_has_none():
    tokenizer = make_tokenizer(CHATML)
    assert tokenizer.bos_token_id not in ChatRenderer(tokenizer).render(USER)


@pytest.mark.parametrize("template", [GEMMA, DROPS_SYSTEM], ids=["raises", "drops"])
def test_system_text_is_folded_into_the_last_user_turn(template):
    renderer = ChatRenderer(make_tokenizer(template))
    assert renderer.mode == "fold"
    text = shown(renderer, TALK, "Be brief.")
    assert "Speak Latin.\n\nBe brief.\n\nQuid novi?" in text
    assert text.index("Ave!") < text.index("Speak Latin.")
    assert text.count("Be brief.") == 1


def test_folding_leaves_the_callers_messages_alone():
    messages = [dict(turn) for turn in TALK]
    ChatRenderer(make_tokenizer(GEMMA)).render(messages, "Be brief.")
    assert messages == TALK


def test_system_role_overrides_the_probe_and_is_verified():
    assert ChatRenderer(make_tokenizer(CHATML), system_role="fold").mode == "fold"
    for template in (GEMMA, DROPS_SYSTEM):
        with pytest.raises(InputError, match="chat template"):
            ChatRenderer(make_tokenizer(template), system_role="system")
    with pytest.raises(InputError, match="system_role"):
        ChatRenderer(make_tokenizer(CHATML), system_role="user")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (DROPS_USER, "drops, repeats or reorders a turn's text"),
        (LAST_TURN_ONLY, "drops, repeats or reorders a turn's text"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "cannot render the turns user"),
    ],
)
def test_useless_templates_are_refused_in_one_line(template, message):
    with pytest.raises(InputError, match=message) as caught:
        ChatRenderer(make_tokenizer(template))
    assert "\n" not in str(caught.value)


def test_a_conversation_the_template_refuses_is_an_input_error():
    renderer = ChatRenderer(make_tokenizer(GEMMA))
    with pytest.raises(InputError, match="user, user"):
        renderer.render([*USER, *USER])


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>"), (GEMMA, "<turn_end>"), (DROPS_SYSTEM, "</s>")],
)
def test_the_end_of_turn_comes_from_the_template(template, end):
    tokenizer = make_tokenizer(template)
    renderer = ChatRenderer(tokenizer, extra_stop_ids=[7, tokenizer.eos_token_id])
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert renderer.stop_ids == tuple(dict.fromkeys([end_id, tokenizer.eos_token_id, 7]))
    ids = renderer.encode_response("Rayleigh scattering.")
    assert ids[-1] == end_id
    assert len(ids) == len("Rayleigh scattering.") + 1  # one id a byte, no BOS
    assert renderer.decode(ids) == "Rayleigh scattering."
    assert renderer.decode(ids[:-1]) == "Rayleigh scattering."
    assert renderer.decode([]) == ""


def test_white_space_tokens_do_not_end_a_turn():
    template = CHATML.replace("<|im_end|>", "\n\n\n<|im_end|>")
    tokenizer = make_tokenizer(template)
    assert ChatRenderer(tokenizer).stop_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_tokenizer_without_any_end_is_refused():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(InputError, match="eos_token"):
        ChatRenderer(make_tokenizer(template, eos=None))
    tokenizer = make_tokenizer(template)
    assert ChatRenderer(tokenizer).stop_ids == (tokenizer.eos_token_id,)


def test_long_prompts_are_never_truncated():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.model_max_length = 16
    tokenizer.truncation_side = "left"
    text = shown(ChatRenderer(tokenizer), [{"role": "user", "content": "ab" * 500}], "Be brief.")
    assert "Be brief." in text
    assert "ab" * 500 in text


def test_template_hash_follows_what_changes_prompts():
    hashes = {
        ChatRenderer(make_tokenizer(CHATML)).template_hash,
        ChatRenderer(make_tokenizer(LLAMA3)).template_hash,
        ChatRenderer(make_tokenizer(CHATML), system_role="fold").template_hash,
        ChatRenderer(make_tokenizer(CHATML), template_kwargs={"thinking": False}).template_hash,
        ChatRenderer(make_tokenizer(CHATML, eos="<|im_end|>")).template_hash,
    }
    assert len(hashes) == 5
    again = ChatRenderer(make_tokenizer(CHATML), system_role="system")
    assert again.template_hash in hashes


def test_template_kwargs_reach_the_template():
    template = CHATML.replace("assistant\n{% endif", "assistant\n{{ opening }}{% endif")
    renderer = ChatRenderer(make_tokenizer(template), template_kwargs={"opening": "<think>"})
    assert shown(renderer, USER).endswith("<think>")


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_rendered_text_is_the_querys(content):
    text = shown(RENDERER, [{"role": "user", "content": content}], "Be brief.")
    assert f"user\n{content}<|im_end|>" in text


RENDERER = ChatRenderer(make_tokenizer(CHATML))
ADJECTIVES = ("helpful", "unhelpful", "well-written", "badly written", "accurate", "careless")


@pytest.mark.parametrize(
    "heading",
    [
        "Helpful response:",
        "**Accurate answer:**",
        "**Accurate answer**:",
        "Here is a careless response:",
        "Here's an unhelpful answer to your question:",
        "Here\u2019s my well-written reply:",
        "Sure! Here is a helpful and accurate response:",
        "Helpful, Accurate Response:",
        "helpful/accurate response :",
        "A more helpful response:",
        "Badly written answer:",
        "GOOD ANSWER:",
        "Bad response:",
        "## Helpful Response\n",
        "**Helpful response**\n",
        "### Unhelpful answer:",
        "Good response:\n\n**Helpful response:**",
    ],
)
def test_leaked_headings_are_stripped(heading):
    assert clean_response(f"{heading} The sky scatters blue light.", ADJECTIVES) == (
        "The sky scatters blue light."
    )
    assert clean_response(f"\n {heading}\n\nThe sky scatters.", ADJECTIVES) == "The sky scatters."


@pytest.mark.parametrize(
    "text",
    [
        "Note: keep it dry.",
        "Response: 404",
        "Answer: 42",
        "Helpful: yes.",
        "A helpful response is one that helps.",
        "Helpful response times matter: measure them.",
        "Helpful response",
        "Good answers: there are none.",
        "Here is a careless mistake: 1 + 1 = 3.",
        "Here is the response: 404.",
        "The server says\nBad response: 404",
        "Accurate answer keys: see below.",
        "Inaccurate response: not an adjective in play.",
        "Unfriendly reply: no such feature here.",
        "**Careless** people answer: no.",
    ],
)
def test_ordinary_text_stays(text):
    assert clean_response(text, ADJECTIVES) == text


def test_adjectives_count_only_when_in_play():
    assert clean_response("Careless response: No.", ()) == "Careless response: No."
    assert clean_response("Careless response: No.", ("careless", " ")) == "No."
    assert clean_response("Helpful response:", ADJECTIVES) == ""
    assert clean_response("C++ (fast) answer: yes", ("c++ (fast)",)) == "yes"


@given(st.text())
def test_cleaning_takes_only_from_the_front(text):
    assert text.strip().endswith(clean_response(text, ADJECTIVES))
