import math
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from sso_lightning.errors import InputError
from sso_lightning.pairs import SAMPLED_FROM, SCORED, PairBuilder, repetition, report
from sso_lightning.principles import PredefinedPrinciples
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import Query, Record, load_records
from sso_lightning.sampling import Sample, Sampler, TransformersSampler

PICKY = (
    "{% for m in messages %}{% if 'POISON' in m['content'] %}{{ raise_exception('no thanks') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Scripted(Sampler):
    """Answers each query with given texts, spelt out byte by byte as no tokenizer would."""

    engine = "scripted"

    def __init__(self, renderer, answers):
        self.renderer, self.answers, self.emitted = renderer, answers, {}

    def settings(self):
        return {}

    def sample(self, model, requests, *, stop_ids, progress=None):
        samples = []
        for request in requests:
            prompt = self.renderer._tokenizer.decode(request.prompt)
            name = next(name for name in self.answers if f"Query {name}." in prompt)
            response = request.key.rpartition("/")[2]
            text, finish = self.answers[name][response]
            ids = [i for letter in text for i in self.renderer._encode(letter)]
            ids += [stop_ids[0]] if finish == "stop" else []
            self.emitted[name, response] = ids
            samples.append(Sample(request.key, ids, finish))
        return samples


class Counting(TransformersSampler):
    """The built-in sampler; counts requests for answers and can fail at a call."""

    def __init__(self, fail_at=None, **settings):
        super().__init__(**settings)
        self.calls, self.requests, self.fail_at = 0, 0, fail_at

    def sample(self, model, requests, **others):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the machine goes away")
        self.requests += len(requests)
        return super().sample(model, requests, **others)


@pytest.fixture(scope="module")
def policy(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return model, ChatRenderer(AutoTokenizer.from_pretrained(tiny_model))


def queries(*names, text="Query {}."):
    return [
        Query(n, [{"role": "user", "content": text.format(n)}], f"q.jsonl, line {i}")
        for i, n in enumerate(names, 1)
    ]


def builder(policy, **changes):
    model, renderer = policy
    settings = {
        "sampler": TransformersSampler(max_new_tokens=6),
        "principles": PredefinedPrinciples(pick="random"),
        "seed": 7,
        "iteration": 1,
        "show_progress": False,
        **changes,
    }
    return PairBuilder(model=model, renderer=renderer, **settings)


def script(good="good one", bad="bad one", original="plain one", finish="stop"):
    return {"good": (good, finish), "bad": (bad, finish), "original": (original, finish)}


def plain_logp(model, prompt, response):
    """Sum of the response's log-probabilities, from one unpadded forward of one sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


# ------------------------------------------------------------------------------------ what is made


@pytest.fixture(scope="module")
def built(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    records, numbers = builder(policy).build(queries("a", "b", "c"), folder)
    return folder, records, numbers


def test_scores_are_those_of_a_plain_forward_on_the_stored_ids(policy, built):
    for record in built[1]:
        assert set(record.scores) == {f"policy/{c}/{r}" for c, r in SCORED}
        for context, response in SCORED:
            expected = plain_logp(
                policy[0], record.prompt_ids[context], record.response_ids[response]
            )
            found = record.scores[f"policy/{context}/{response}"]
            assert found == pytest.approx(expected, abs=1e-4)


def test_prompts_are_the_renderers_and_carry_the_principles(policy, built):
    renderer = policy[1]
    for record in built[1]:
        systems = {"query": None, "good": record.good_system, "bad": record.bad_system}
        for context, system in systems.items():
            assert record.prompt_ids[context] == renderer.render(record.messages, system)
            text = renderer._tokenizer.decode(record.prompt_ids[context])
            assert text.endswith("<|im_start|>assistant\n")
            for principle in (record.good_principle, record.bad_principle):
                lines = principle.split("\n")
                inside = principle == getattr(record, f"{context}_principle", None)
                assert all((line in text) == inside for line in lines)


def test_each_response_is_sampled_from_its_own_prompt(policy, tmp_path):
    asked = {}

    class Spy(TransformersSampler):
        def sample(self, model, requests, **others):
            asked.update({r.key: (r.prompt, r.seed) for r in requests})
            return super().sample(model, requests, **others)

    made, _ = builder(policy, sampler=Spy(max_new_tokens=6)).build(queries("a"), tmp_path)
    assert dict(SAMPLED_FROM) == {"good": "good", "bad": "bad", "original": "query"}
    for response, context in SAMPLED_FROM.items():
        assert asked[f"0/{response}"][0] == made[0].prompt_ids[context]
    assert len({seed for _, seed in asked.values()}) == 3


def test_records_say_where_they_come_from(policy, built):
    folder, records, _ = built
    assert [r.id for r in records] == ["a", "b", "c"]
    for number, record in enumerate(records, 1):
        assert record.bad_is_instructed is True
        assert record.content_flags == ["unscreened"]
        assert record.safety_mode == "careless"
        assert record.query_source == f"q.jsonl, line {number}"
        assert (record.seed, record.iteration) == (7, 1)
        assert record.engine == "transformers"
        assert record.sampler["max_new_tokens"] == 6
        assert record.principle_source == "predefined"
        assert record.template == policy[1].template_hash
        assert len(record.policy) == 16
        assert record.adapter == ""
        assert len(record.features) >= 2
        for response in SAMPLED_FROM:
            ids = record.response_ids[response]
            assert (ids[-1] == policy[1].stop_ids[0]) == (record.finish[response] == "stop")
            assert len(ids) == 6 or record.finish[response] == "stop"
    assert load_records(folder) == records


def test_safety_off_is_recorded(policy, tmp_path):
    principles = PredefinedPrinciples(pick="random", safety="off")
    records, _ = builder(policy, principles=principles).build(queries("a"), tmp_path)
    assert [r.safety_mode for r in records] == ["off"]


def test_the_initial_policy_scores_as_the_reference(policy, tmp_path):
    torch.manual_seed(1)
    other = type(policy[0])(policy[0].config).eval()
    made = builder(policy, initial=lambda: nullcontext(other))
    records, _ = made.build(queries("a", "b"), tmp_path)
    for record in records:
        for context, response in SCORED:
            ids = record.prompt_ids[context], record.response_ids[response]
            key = f"{context}/{response}"
            for who, model in (("policy", policy[0]), ("reference", other)):
                expected = plain_logp(model, *ids)
                assert record.scores[f"{who}/{key}"] == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------- cleaning


def test_drops_are_counted_by_reason(policy, tmp_path):
    answers = {
        "kept": script(),
        "same": script(good="one", bad="one"),
        "copy": script(good="one", original="one"),
        "twin": script(bad="one", original="one"),
        "mute": script(bad="   "),
        "leak": script(good="Good answer: one", bad="one"),  # equal once the heading is gone
        "head": script(original="Bad response:"),
    }
    made = builder(policy, sampler=Scripted(policy[1], answers), shard_size=3)
    records, numbers = made.build(queries(*answers), tmp_path)
    assert [r.id for r in records] == ["kept"]
    drops = {k: v for k, v in numbers.items() if k.startswith("pairs/dropped")}
    assert drops == {
        "pairs/dropped": 6,
        "pairs/dropped_good_equals_bad": 2,
        "pairs/dropped_good_equals_original": 1,
        "pairs/dropped_bad_equals_original": 1,
        "pairs/dropped_empty_bad": 1,
        "pairs/dropped_empty_original": 1,
    }
    assert numbers["pairs/kept"] == 1


def test_a_score_that_is_not_finite_drops_its_own_record_only(policy, tmp_path, monkeypatch):
    from sso_lightning import pairs as room

    real = room.response_logps

    def overflowing(*args, **kwargs):
        logps, lengths = real(*args, **kwargs)
        logps[0] = float("nan")
        return logps, lengths

    monkeypatch.setattr(room, "response_logps", overflowing)
    records, report = builder(policy).build(queries("a", "b"), tmp_path)
    assert [record.id for record in records] == ["b"]
    assert report["pairs/dropped_score_not_finite"] == 1


def test_sampled_ids_are_kept_unless_a_heading_had_to_go(policy, tmp_path):
    renderer = policy[1]
    answers = {
        "whole": script(bad="Bad answer: slow fox"),
        "cut": script(bad="Bad answer: slow fox", finish="length"),
    }
    sampler = Scripted(renderer, answers)
    records, _ = builder(policy, sampler=sampler).build(queries(*answers), tmp_path)
    whole, cut = records
    tokens, end = renderer._encode("slow fox"), renderer.stop_ids[0]
    assert whole.bad == cut.bad == "slow fox"
    assert whole.response_ids["bad"] == [*tokens, end]
    assert cut.response_ids["bad"] == tokens  # a truncated answer has no end
    assert (whole.finish["bad"], cut.finish["bad"]) == ("stop", "length")
    for record in records:
        for name in ("good", "original"):
            emitted = sampler.emitted[record.id, name]
            assert record.response_ids[name] == emitted
            assert emitted[:-1] != renderer._encode(getattr(record, name))  # or this shows nothing


def test_a_prompt_that_is_too_long_is_dropped_not_cut(policy, tmp_path):
    sampler = Counting(max_new_tokens=6)
    made = builder(policy, sampler=sampler, principles=PredefinedPrinciples(pick="policy"))
    limit = 1500
    made.max_prompt_tokens = limit
    long = queries("b", text="{}" + " and so on" * 1000)
    records, numbers = made.build([*queries("a"), *long], tmp_path)
    assert [r.id for r in records] == ["a"]
    assert numbers["pairs/dropped_prompt_too_long"] == 1
    assert max(len(ids) for ids in records[0].prompt_ids.values()) <= limit
    assert sampler.requests == 1 + 3  # neither features nor answers are asked for the long one


@pytest.mark.parametrize("pick", ["random", "policy"])
def test_a_render_error_drops_its_own_record_only(policy, tiny_model, tmp_path, pick):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = PICKY
    picky = policy[0], ChatRenderer(tokenizer)
    made = builder(picky, principles=PredefinedPrinciples(pick=pick))
    records, numbers = made.build(queries("a", "POISON", "b"), tmp_path)
    assert [r.id for r in records] == ["a", "b"]
    assert (numbers["pairs/dropped"], numbers["pairs/dropped_render_error"]) == (1, 1)


def test_nothing_left_is_an_error_that_names_the_reasons(policy, tmp_path):
    answers = {"a": script(good="x", bad="x"), "b": script(bad="")}
    made = builder(policy, sampler=Scripted(policy[1], answers))
    for _ in range(2):  # and again when the finished set is read
        with pytest.raises(InputError, match="no record is left of 2 queries") as caught:
            made.build(queries("a", "b"), tmp_path)
        line = str(caught.value)
        assert "(empty_bad 1, 50%, good_equals_bad 1, 50%)" in line
        assert "\n" not in line


# ------------------------------------------------------------------------- batches, shards, crashes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pick", ["random", "policy"])
def test_a_record_does_not_depend_on_its_company(policy, tmp_path, temperature, pick):
    def build(name, asked, shard_size):
        made = builder(
            policy,
            sampler=TransformersSampler(max_new_tokens=6, temperature=temperature),
            principles=PredefinedPrinciples(pick=pick),
            shard_size=shard_size,
        )
        return {r.id: r for r in made.build(asked, tmp_path / name)[0]}

    names = ("a", "bb", "ccc", "dddd")
    one = build("one", queries(*names), 100)
    others = (("two", 2, names), ("alone", 100, ("ccc",)), ("turned", 3, names[::-1]))
    for name, size, some in others:
        for key, record in build(name, queries(*some), size).items():
            twin = one[key]
            assert record.response_ids == twin.response_ids
            assert record.prompt_ids == twin.prompt_ids
            assert record.scores == pytest.approx(twin.scores, abs=1e-4)


def test_seed_and_iteration_change_the_answers(policy, tmp_path):
    sets = [
        builder(policy, **change).build(queries("a", "b"), tmp_path / str(i))[0]
        for i, change in enumerate(({}, {"seed": 8}, {"iteration": 2}))
    ]
    for other in sets[1:]:
        assert [r.response_ids for r in other] != [r.response_ids for r in sets[0]]


def test_a_killed_build_goes_on_where_it_stopped(policy, tmp_path):
    asked = queries("a", "b", "c", "d", "e")

    def build(name, sampler):
        return builder(policy, sampler=sampler, shard_size=2).build(asked, tmp_path / name)

    whole, numbers = build("whole", Counting(max_new_tokens=6))
    with pytest.raises(RuntimeError, match="goes away"):
        build("killed", Counting(max_new_tokens=6, fail_at=2))
    assert len(list((tmp_path / "killed").glob("*.parquet"))) == 1
    second = Counting(max_new_tokens=6)
    records, continued = build("killed", second)
    assert second.requests == 3 * 3  # three queries were left
    assert records == whole
    unequal = {"pairs/seconds", "pairs/tokens_per_second"}
    assert {k: v for k, v in continued.items() if k not in unequal} == {
        k: v for k, v in numbers.items() if k not in unequal
    }
    third = Counting(max_new_tokens=6)
    assert build("killed", third)[0] == whole
    assert third.calls == 0


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "seed"),
        ({"iteration": 2}, "iteration"),
        ({"sampler": TransformersSampler(max_new_tokens=5)}, "sampler"),
        ({"principles": PredefinedPrinciples(pick="random", safety="off")}, "principles"),
        ({"initial": nullcontext}, "reference"),
    ],
)
def test_a_set_of_other_settings_is_refused(policy, tmp_path, change, named, complete):
    if complete:
        builder(policy).build(queries("a"), tmp_path)
    else:
        with pytest.raises(RuntimeError):
            builder(policy, sampler=Counting(fail_at=1, max_new_tokens=6)).build(
                queries("a"), tmp_path
            )
    with pytest.raises(InputError, match=named) as caught:
        builder(policy, **change).build(queries("a"), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_set_of_other_queries_is_refused_also_when_ids_are_equal(policy, tmp_path):
    builder(policy).build(queries("a"), tmp_path)
    for other in (queries("b"), queries("a", text="Something else: {}")):
        with pytest.raises(InputError, match="queries"):
            builder(policy).build(other, tmp_path)


def other_weights(policy):
    model = deepcopy(policy[0])
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    return model, policy[1]


def test_a_run_that_went_back_sets_aside_what_other_weights_wrote(policy, tmp_path):
    asked, folder = queries("a", "b"), tmp_path / "set"
    old, _ = builder(other_weights(policy)).build(asked, folder)
    with pytest.raises(InputError, match="made with another policy"):
        builder(policy).build(asked, folder)
    new, _ = builder(policy, replaces=True).build(asked, folder)
    assert new == builder(policy).build(asked, tmp_path / "fresh")[0] != old
    assert load_records(tmp_path / "set.replaced-1") == old
    with pytest.raises(
        InputError, match="made with another seed"
    ):  # a mistake, not another attempt
        builder(policy, replaces=True, seed=8).build(asked, folder)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_a_policy_trained_since_reads_its_own_set_and_writes_none(policy, tmp_path):
    asked, folder = queries("a", "b"), tmp_path / "set"
    made, _ = builder(policy).build(asked, folder)
    own = {"policy": made[0].policy, "adapter": made[0].adapter}

    def resumed(writer, where=folder):
        moved = builder(other_weights(policy), writer=writer, replaces=True)
        return moved.build(asked, where)[0]

    assert resumed(own) == resumed({}) == made
    gone = pytest.raises(InputError, match="set that the checkpoint trains on")
    with gone:
        resumed({"policy": "another", "adapter": ""})
    with gone:
        resumed(own, tmp_path / "missing")
    next(folder.glob("*.parquet")).unlink()
    with gone:
        resumed(own)
    assert builder(policy).build(asked, folder)[0] == made  # what going further back does


# --------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([1, 2, 1, 2, 1, 2, 1, 2], 4, 0.6),  # 1212 2121 1212 2121 1212: two of five are new
        ([7, 7, 7, 7, 7], 4, 0.5),
        ([7, 7, 7, 7], 4, 0.0),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 6], 4, 1 / 7),
        ([1, 1, 2], 1, 1 / 3),
        ([1, 1, 1], 4, 0.0),
        ([], 4, 0.0),
    ],
)
def test_repetition_by_hand(ids, n, share):
    assert repetition(ids, n) == pytest.approx(share)


def test_report_of_two_records_worked_by_hand():
    """Per-token means, a then b.

    avg(y+|x) -1, -0.5        avg(y-|x) -2, -3         avg(yo|x) -0.5, -2
    avg(y+|x+) -0.5, -1       avg(y+|x-) -1.5, -0.5    contrast good 1, -0.5    mean 0.25
    avg(y-|x-) -1, -1         avg(y-|x+) -3, -1.5      contrast bad 2, 0.5      mean 1.25
    gap 1, 2.5                                                                  mean 1.75
    """
    ask = [{"role": "user", "content": "Why?"}]
    a = Record(
        id="a",
        messages=ask,
        good="g",
        bad="b",
        original="o",
        response_ids={"good": [1, 2], "bad": [1, 2, 3, 4], "original": [1]},
        finish={"good": "stop", "bad": "length", "original": "stop"},
        scores={
            "policy/query/good": -2.0,
            "policy/query/bad": -8.0,
            "policy/query/original": -0.5,
            "policy/good/good": -1.0,
            "policy/bad/good": -3.0,
            "policy/bad/bad": -4.0,
            "policy/good/bad": -12.0,
        },
    )
    b = replace(
        a,
        id="b",
        response_ids={"good": [1, 2, 3, 4], "bad": [1], "original": [1, 2, 3]},
        finish={"good": "stop", "bad": "stop", "original": "stop"},
        scores={
            "policy/query/good": -2.0,
            "policy/query/bad": -3.0,
            "policy/query/original": -6.0,
            "policy/good/good": -4.0,
            "policy/bad/good": -2.0,
            "policy/bad/bad": -1.0,
            "policy/good/bad": -1.5,
        },
    )
    dropped = Counter(empty_bad=2, bad_equals_original=1)
    counts = Counter(features_requested=4, features_filled=1)
    assert report([a, b], dropped, counts) == pytest.approx(
        {
            "pairs/kept": 2,
            "pairs/dropped": 3,
            "pairs/dropped_empty_bad": 2,
            "pairs/dropped_bad_equals_original": 1,
            "pairs/feature_fill_rate": 0.25,
            "pairs/length_good": 3.0,
            "pairs/length_bad": 2.5,
            "pairs/length_original": 2.0,
            "pairs/truncated_good": 0.0,
            "pairs/truncated_bad": 0.5,
            "pairs/truncated_original": 0.0,
            "pairs/repeating_good": 0.0,
            "pairs/repeating_bad": 0.0,
            "pairs/repeating_original": 0.0,
            "pairs/on_policy_good": (math.exp(-1) + math.exp(-0.5)) / 2,
            "pairs/on_policy_bad": (math.exp(-2) + math.exp(-3)) / 2,
            "pairs/on_policy_original": (math.exp(-0.5) + math.exp(-2)) / 2,
            "pairs/gap_logp": 1.75,
            "pairs/contrast_good": 0.25,
            "pairs/contrast_bad": 1.25,
        }
    )
    # a repetition of 0.6 is a loop, one of 0.5 is not yet
    a.response_ids["good"], b.response_ids["good"] = [1, 2] * 4, [7] * 5
    assert report([a, b], dropped, counts)["pairs/repeating_good"] == 0.5
