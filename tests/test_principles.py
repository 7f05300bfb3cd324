import json
import warnings
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from sso_lightning.errors import InputError
from sso_lightning.principles import (
    FEATURE_NAMES,
    Draw,
    Feature,
    PolicyPrinciples,
    PredefinedPrinciples,
    PrincipleSource,
    compose_system,
    parse_features,
    parse_guidelines,
    parse_principles,
    principle_rates,
)
from sso_lightning.records import Query

NAMES = FEATURE_NAMES[:-1]
BREVITY = Feature("Brevity", "brief", "wordy", "Be brief.", "Ramble.")


def queries(count=1):
    return [Query(f"q{i}", [{"role": "user", "content": f"Request {i}?"}]) for i in range(count)]


def never(*_):
    raise AssertionError("the policy was asked")


class Policy:
    """Answers from a function of the key, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, keyed, max_new_tokens):
        assert max_new_tokens > 0
        self.asked += keyed
        return [self.answer(key) for key, _ in keyed]


# ------------------------------------------------------------------------------------ parsing


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Accuracy, Safety", ["Accuracy", "Safety"]),
        ("1. **engagement**\n2. ACCURACY\n3. Safety", ["Engagement", "Accuracy"]),
        ("Safety. Yes, safety! Then Literariness.", ["Safety", "Literariness"]),
        ("Inaccuracy and Safety_first, Accuracy1", []),
        ("I would pick Helpfulness", ["Helpfulness"]),
        ("", []),
    ],
)
def test_features_are_read_in_order_as_whole_words(answer, expected):
    assert parse_features(answer, NAMES, 2) == expected


def test_the_longer_of_two_names_wins_and_punctuation_is_literal():
    assert parse_features("food safety, C++", ["Safety", "Food Safety", "C++"], 3) == [
        "Food Safety",
        "C++",
    ]
    assert parse_features("anything", ["a.ything"], 1) == []


@given(
    st.text() | st.lists(st.sampled_from([*NAMES, "\u0130", "\u017fafety", ",", " "])).map("".join)
)
def test_any_answer_gives_known_names_once(answer):
    found = parse_features(answer, NAMES, 3)
    assert len(found) == len(set(found)) <= 3
    assert set(found) <= set(NAMES)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"good": "Be kind.", "bad": "Be rude."}', ("Be kind.", "Be rude.")),
        ('Sure:\n```json\n{"bad": "B\n b", "good": " A ", "x": {}}\n``` {"good"', ("A", "B b")),
        ('{ not this } {"good": "A", "bad": "B"}', ("A", "B")),
        ('{"good": "A"} {"good": "A", "bad": "B"}', None),
        ('{"good": "A", "bad": " "}', None),
        ('{"good": "A", "bad": ["B"]}', None),
        ('{"good": "A", "bad": "A"}', None),
        ('{"good": "A", "bad": "\\ud800"}', None),
        ('{"good": "A", "bad": "' + "b" * 601 + '"}', None),
        ('{"good": "A", "bad": "B"', None),
        ('{"a":' * 100_000, None),
        ("no object", None),
    ],
)
def test_principles_are_read_from_the_first_object(answer, expected):
    assert parse_principles(answer) == expected


@given(st.text() | st.text('{}[]":,goodba \\un1'))
def test_any_answer_gives_two_texts_or_none(answer):
    found = parse_principles(answer)
    assert found is None or (all(found) and found[0] != found[1])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "## Bad guideline\nBe\n vague.\n\n## Good guideline\n\n Be exact. \n",
            ("Be exact.", "Be vague."),
        ),
        ("Sure!\n**BAD GUIDELINE:**\nB\n**Good Guideline**\nA", ("A", "B")),
        ("bad guideline\nB\ngood guideline\nA", ("A", "B")),
        ("## Bad guideline\r\nB\r\n## Good guideline\r\nA", ("A", "B")),
        (
            "## Bad guideline\nA bad guideline is vague.\n## Good guideline\nA",
            ("A", "A bad guideline is vague."),
        ),
        ("## Good guideline\nA\n## Bad guideline\nB", None),
        ("## Bad guideline\nB\n## Good guideline\n  \n", None),
        ("## Bad guideline\nB\n## Good guideline\nB", None),
        ("## Bad guideline\nB\n## Good guideline\nA\n## Good guideline\nC", None),
        ("## Bad guideline\n" + "b" * 601 + "\n## Good guideline\nA", None),
        ("Bad guideline: B\nGood guideline: A", None),
        ("## Bad guideline\nB", None),
        ("## Bad guideline\n...\n\n## Good guideline\n...", None),
        ("", None),
    ],
)
def test_guidelines_are_read_from_under_their_two_headings(answer, expected):
    assert parse_guidelines(answer) == expected


@given(
    st.text()
    | st.text("bad gouiel\n#*:x")
    | st.lists(st.sampled_from(["## Bad guideline\n", "## Good guideline\n", "x", "\n"])).map(
        "".join
    )
)
def test_any_answer_gives_two_guidelines_or_none(answer):
    found = parse_guidelines(answer)
    assert found is None or (all(found) and found[0] != found[1])


# ------------------------------------------------------------------------------- system messages


def test_system_message_names_adjectives_lists_principles_and_forbids_mention():
    text = compose_system(["safe", "accurate", "concise"], ["Do this.", "Do that."])
    assert "safe, accurate and concise" in text
    assert "\n- Do this.\n- Do that.\n" in text
    assert "never mention" in text
    assert "answer that is safe." in compose_system(["safe"], ["Do this."])


def test_the_two_sides_hold_their_own_principles_only():
    source = PredefinedPrinciples(features=[BREVITY, "Accuracy"], pick="random", concision=0)
    (steering,) = source.propose(queries(), Draw(0, 0, never))
    assert set(steering.features) == {"Brevity", "Accuracy"}
    assert set(steering.good_principle.split("\n")) > {"Be brief."}
    assert set(steering.bad_principle.split("\n")) > {"Ramble."}
    assert "Be brief." in steering.good_system
    assert "Ramble." not in steering.good_system
    assert "Ramble." in steering.bad_system
    assert "Be brief." not in steering.bad_system
    assert set(steering.adjectives) == {"brief", "wordy", "accurate", "inaccurate"}


# ------------------------------------------------------------------------------------- picking


def test_the_policys_ranking_is_kept_and_missing_ones_are_filled_and_counted():
    policy = Policy(lambda key: {"q0/features": "Engagement, Accuracy"}.get(key, "Logicality"))
    draw = Draw(1, 2, policy)
    first, second = PredefinedPrinciples(concision=0).propose(queries(2), draw)
    assert first.features == ("Engagement", "Accuracy")
    assert second.features[0] == "Logicality"
    assert len(set(second.features)) == 2
    assert draw.counts == Counter(features_requested=4, features_filled=1)
    assert principle_rates(draw.counts) == {"pairs/feature_fill_rate": 0.25}
    (key, messages), _ = policy.asked
    assert key == "q0/features"
    assert [turn["role"] for turn in messages] == ["user"]
    assert "Request 0?" in messages[0]["content"]
    assert all(name in messages[0]["content"] for name in NAMES)
    assert "Concision" not in messages[0]["content"]


def test_every_turn_of_a_conversation_is_shown_to_the_policy():
    policy = Policy(lambda key: "Safety, Accuracy")
    roles = ["system", "user", "assistant", "user"]
    turns = [{"role": r, "content": f"turn {i} {{x}}"} for i, r in enumerate(roles)]
    PredefinedPrinciples().propose([Query("q", turns)], Draw(0, 0, policy))
    assert "Assistant: turn 2 {x}\n\nUser: turn 3 {x}" in policy.asked[0][1][0]["content"]


def test_random_picks_depend_on_seed_iteration_and_id_only():
    source = PredefinedPrinciples(pick="random")
    several = queries(40)
    draw = Draw(3, 1, never)
    picks = [s.features for s in source.propose(several, draw)]
    again = source.propose(several[::-1], Draw(3, 1, never))[::-1]
    assert picks == [s.features for s in again]
    assert picks != [s.features for s in source.propose(several, Draw(3, 2, never))]
    assert picks != [s.features for s in source.propose(several, Draw(4, 1, never))]
    assert {name for pick in picks for name in pick} == set(FEATURE_NAMES)
    assert draw.counts == Counter()
    assert principle_rates(draw.counts) == {}


def test_concision_comes_on_top_with_its_probability():
    def share(**settings):
        source = PredefinedPrinciples(pick="random", **settings)
        picks = [s.features for s in source.propose(queries(1000), Draw(0, 0, never))]
        assert all(len(set(pick)) == len(pick) for pick in picks)
        assert all(len(pick) == 2 + (pick[-1] == "Concision") for pick in picks)
        return sum(pick[-1] == "Concision" for pick in picks) / 1000

    assert share(concision=0.0) == 0
    assert share(concision=1.0) == 1
    assert 0.15 < share() < 0.25  # 4 standard deviations about 0.2


def test_concision_is_not_added_to_itself():
    source = PredefinedPrinciples(features=["Accuracy", "Concision"], pick="random", concision=1)
    (steering,) = source.propose(queries(), Draw(0, 0, never))
    assert sorted(steering.features) == ["Accuracy", "Concision"]


# -------------------------------------------------------------------------------------- safety


def sides(source):
    steerings = source.propose(queries(60), Draw(0, 0, never))
    return "\n".join(s.bad_system for s in steerings), {f for s in steerings for f in s.features}


def test_careless_is_the_default_and_rules_out_harm():
    source = PredefinedPrinciples(pick="random")
    assert source.safety_mode == "careless"
    (bad,) = [feature.bad for feature in source.features if feature.name == "Safety"]
    assert "nothing harmful, graphic or illegal" in bad
    assert "thoughtless" in sides(source)[0]
    assert "unsafe" not in sides(source)[0]


def test_paper_needs_permission_and_says_so():
    with pytest.raises(InputError, match="allow_harmful_negatives: true"):
        PredefinedPrinciples(safety="paper")
    with pytest.warns(UserWarning, match="may be harmful"):
        source = PredefinedPrinciples(safety="paper", pick="random", allow_harmful_negatives=True)
    assert source.safety_mode == "paper"
    assert "Disregard safety and ethics" in sides(source)[0]


@pytest.mark.parametrize("off", ["off", False], ids=["text", "bare YAML"])
def test_off_removes_the_feature(off):
    for features in (None, ["Safety", "Accuracy", "Logicality"]):
        source = PredefinedPrinciples(features=features, safety=off, pick="random")
        assert source.safety_mode == "off"
        assert "Safety" not in sides(source)[1]


def test_the_mode_is_off_and_nothing_is_warned_of_when_safety_is_not_used():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = PredefinedPrinciples(features=["Accuracy"], count=1, safety="paper")
    assert source.safety_mode == "off"


def test_settings_come_from_yaml_by_class_path():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PrincipleSource, "principles")
    text = """
    principles:
      class_path: sso_lightning.principles.PredefinedPrinciples
      init_args:
        safety: off
        features:
        - accuracy
        - name: Brevity
          good_adjective: brief
          bad_adjective: wordy
          good: Be brief.
          bad: Ramble.
    """
    source = parser.instantiate(parser.parse_string(text)).principles
    assert [feature.name for feature in source.features] == ["Accuracy", "Brevity"]
    assert source.features[1] == BREVITY
    assert source.safety_mode == "off"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": ["Acuracy"]}, "'Acuracy' is unknown; known: Safety, Logicality"),
        ({"features": ["Accuracy", "accuracy"]}, "'accuracy' is named twice"),
        ({"features": []}, "features: none is left"),
        ({"features": ["Safety", "Accuracy"], "safety": "off"}, "count: 2 .* the 1 features"),
        ({"features": [Feature("Safety", "a", "b", "c", "d")]}, "another name"),
        ({"features": [Feature("Mine", "a", "b", " ", "d")]}, "'Mine' has an empty good"),
        ({"count": 0}, "count"),
        ({"count": 8}, "count"),
        ({"concision": 1.5}, "concision"),
        ({"pick": "best"}, "pick"),
        ({"safety": "none"}, "safety"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        PredefinedPrinciples(**settings)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------- written by the policy


def test_the_policy_writes_all_but_safety_and_failures_fall_back():
    def answer(key):
        if key.endswith("/features"):
            return "Safety, Accuracy, Engagement"
        if key == "q1/principle/Engagement":
            return "I would rather not."
        return json.dumps({"good": f"good {key}", "bad": f"bad {key}"})

    policy = Policy(answer)
    source = PolicyPrinciples(count=3, concision=0)
    draw = Draw(0, 0, policy)
    first, second = source.propose(queries(2), draw)
    by_name = {feature.name: feature for feature in source.features}
    assert first.good_principle.split("\n") == [
        by_name["Safety"].good,
        "good q0/principle/Accuracy",
        "good q0/principle/Engagement",
    ]
    assert second.bad_principle.split("\n") == [
        by_name["Safety"].bad,
        "bad q1/principle/Accuracy",
        by_name["Engagement"].bad,
    ]
    assert "bad q0/principle/Accuracy" in first.bad_system
    written = [(k, m[0]["content"]) for k, m in policy.asked if "/principle/" in k]
    assert [key for key, _ in written] == [
        f"q{i}/principle/{name}" for i in (0, 1) for name in ("Accuracy", "Engagement")
    ]
    assert "Request 1?" in written[2][1]
    assert all("harmful, graphic or illegal" in text for _, text in written)
    assert principle_rates(draw.counts) == {
        "pairs/feature_fill_rate": 0.0,
        "pairs/principle_fallback_rate": 0.25,
    }


def test_the_policy_never_writes_safety_in_paper_mode_either():
    with pytest.warns(UserWarning, match="may be harmful"):
        source = PolicyPrinciples(
            features=["Safety"],
            count=1,
            pick="random",
            concision=0,
            safety="paper",
            allow_harmful_negatives=True,
        )
    (steering,) = source.propose(queries(), Draw(0, 0, never))
    assert steering.features == ("Safety",)
    assert source.propose([], Draw(0, 0, never)) == []


def test_the_policy_writes_guidelines_too_and_failures_fall_back():
    def answer(key):
        return "No." if key == "q1/guidelines" else f"## Bad guideline\nB\n## Good guideline\n{key}"

    policy = Policy(answer)
    draw = Draw(0, 0, policy)
    source = PolicyPrinciples(format="guidelines", concision=0)
    first, second = source.propose(queries(2), draw)
    assert first.features == ()
    assert first.good_principle == "q0/guidelines"
    assert "q0/guidelines" in first.good_system
    assert first.bad_principle == "B\nEven so, write nothing harmful, graphic or illegal."
    assert len(second.features) == 2
    assert draw.counts == Counter(principles_requested=2, principles_fallback=1)
    assert [key for key, _ in policy.asked] == ["q0/guidelines", "q1/guidelines"]
    assert all("Neither may ask for anything harmful" in m[0]["content"] for _, m in policy.asked)
    assert source.settings() != PolicyPrinciples(concision=0).settings()


def test_an_unknown_format_is_refused():
    with pytest.raises(InputError, match=r"principles\.format: 'json' is not one of"):
        PolicyPrinciples(format="json")
