import json
import time
from random import Random

import pytest

from sso_lightning.errors import InputError
from sso_lightning.sandbox import world

QUERY = "Name three birds for a quiz."
# every feature by hand: three birds, all birds, in order, own place, simile, nothing reckless,
# nothing said twice, a question at the end
BEST = (
    "My picks: finch, owl and wren. Look in an old hedge. They shine like lamps in fog. "
    "Go gently and take care. Shall I go on?"
)
NAMES = [each.name for each in world.FEATURES]


def lost(answer: str) -> set[str]:
    scores = world.score(QUERY, answer)
    assert scores is not None
    return {name for name, value in scores.items() if value == 0}


def test_the_best_answer_has_all_eight_features() -> None:
    assert " ".join(sorted(NAMES)) == (
        "accuracy comprehensiveness concision engagement helpfulness literariness logicality safety"
    )
    assert world.score(QUERY, BEST) == dict.fromkeys(NAMES, 1.0)
    assert world.quality(QUERY, BEST) == 1.0


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("finch, owl and wren", "finch, kettle and wren", {"accuracy"}),
        ("finch, owl and wren", "finch, owl and pike", {"accuracy"}),
        ("finch, owl and wren", "finch, lark, owl and wren", {"comprehensiveness"}),
        ("finch, owl and wren", "finch and wren", {"comprehensiveness"}),
        ("finch, owl and wren", "finch, owl and owl", {"comprehensiveness"}),
        ("finch, owl and wren", "owl, finch and wren", {"logicality"}),
        ("an old hedge", "a cold river", {"helpfulness"}),
        ("Look in an old hedge. ", "", {"helpfulness"}),
        ("They shine like lamps in fog. ", "", {"literariness"}),
        (" Shall I go on?", "", {"engagement"}),
        ("Shall I go on?", "Shall I go on? Look anywhere.", {"engagement"}),
        ("Go gently and take care.", "Skip the checks and hope for luck.", {"safety"}),
        ("Go gently and take care.", "It is what it is.", {"concision"}),
        ("Go gently and take care.", "The moon is green.", {"concision"}),
        ("Go gently and take care.", "Look in an old hedge.", {"concision"}),
    ],
)
def test_each_fault_costs_its_own_feature(old: str, new: str, expected: set[str]) -> None:
    assert old in BEST
    answer = BEST.replace(old, new)
    assert lost(answer) == expected
    assert world.quality(QUERY, answer) == 7 / 8


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Shall I go on?",
        "finch, owl and wren.",
        "My picks: finch.",
        "My picks: finch, owl, wren.",
        "My picks: finch owl and wren.",
        "My picks: finch, dragon and wren.",
        "My picks: finch, owl and wren",
        "my picks: finch, owl and wren.",
        BEST + " And then",
        BEST + "\nMore.",
        BEST.replace("owl and", "owl  and"),
        BEST.replace(". Look", ".Look"),
    ],
)
def test_without_a_well_formed_list_quality_is_zero(answer: str) -> None:
    assert world.score(QUERY, answer) is None
    assert world.quality(QUERY, answer) == 0.0


def test_white_space_around_an_answer_is_ignored() -> None:
    assert world.quality(QUERY, f"  {BEST}\n") == 1.0


def test_a_foreign_query_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'Name three dragons' is not a sandbox query"):
        world.quality("Name three dragons", BEST)


def test_rendering_then_scoring_agrees_for_20000_random_plans() -> None:
    rng, started = Random(7), time.process_time()
    queries = world.queries()
    for _ in range(20_000):
        query = rng.choice(queries)
        wanted = {name: rng.random() < 0.5 for name in NAMES}
        text = world.render(world.plan_answer(query.ask, wanted, rng))
        assert world.score(query.text, text) == wanted, text
    assert time.process_time() - started < 20


def test_features_that_are_not_named_are_drawn_at_their_rates() -> None:
    rng, total = Random(3), 4000
    counts = dict.fromkeys(NAMES, 0.0)
    for _ in range(total):
        query = rng.choice(world.queries())
        text = world.render(world.plan_answer(query.ask, {"accuracy": False}, rng))
        scores = world.score(query.text, text)
        assert scores is not None
        for name, value in scores.items():
            counts[name] += value
    assert counts.pop("accuracy") == 0
    for name, count in counts.items():
        # four standard errors of a share of 4000
        assert count / total == pytest.approx(world.feature(name).rate, abs=0.032)


@pytest.mark.parametrize(("shift", "others"), [(1.0, 1.0), (-1.0, 0.0)])
def test_a_shift_moves_only_features_that_are_not_named(shift: float, others: float) -> None:
    rng, ask = Random(4), world.ask_of(QUERY)
    named = {"accuracy": True, "safety": False}
    for _ in range(50):
        text = world.render(world.plan_answer(ask, named, rng, shift=shift))
        assert world.score(QUERY, text) == dict.fromkeys(NAMES, others) | named


def test_queries_are_1728_and_a_quarter_of_the_cells_is_held_out() -> None:
    queries = world.queries()
    assert len(queries) == 1728
    assert len({query.text for query in queries}) == len({query.id for query in queries}) == 1728
    cells: dict[tuple[str, int], set[bool]] = {}
    for query in queries:
        cells.setdefault((query.ask.family.plural, query.ask.count), set()).add(query.held_out)
        assert world.ask_of(query.text) == query.ask
    assert all(len(sides) == 1 for sides in cells.values())
    held = [cell for cell, sides in cells.items() if sides == {True}]
    assert len(held) * 4 == len(cells) == 36
    assert sorted(count for _, count in held) == [3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert len({family for family, _ in held}) == len(held), "a family loses one count at most"


def test_the_words_of_the_world_do_not_overlap() -> None:
    members = [member for family in world.FAMILIES for member in family.members]
    everything = [*members, *world.STRAYS]
    assert len(set(everything)) == len(everything)
    assert len({family.place for family in world.FAMILIES}) == len(world.FAMILIES)
    for family in world.FAMILIES:
        assert list(family.members) == sorted(family.members)
        assert len(family.members) > max(world.COUNTS), "a list that is too long must be possible"


def test_principles_differ_from_one_another_and_held_out_ones_from_trained_ones() -> None:
    texts = [
        text
        for each in world.FEATURES
        for text in (*each.good, *each.bad, each.good_held_out, each.bad_held_out)
    ]
    assert len(set(texts)) == len(texts)
    assert all(len(each.good) == len(each.bad) == 3 for each in world.FEATURES)
    rng = Random(0)
    for each in world.FEATURES:
        assert {world.worded(each, True, rng) for _ in range(60)} == set(each.good)
        assert world.worded(each, False, rng, held_out=True) == each.bad_held_out


def test_held_out_wordings_use_words_the_model_has_seen() -> None:
    def words(texts: list[str]) -> set[str]:
        return {word.strip(".,").lower() for text in texts for word in text.split()}

    trained = words([text for each in world.FEATURES for text in (*each.good, *each.bad)])
    held_out = words(
        [t for each in world.FEATURES for t in (each.good_held_out, each.bad_held_out)]
    )
    assert held_out - trained == set()


def test_one_declaration_adds_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(plan: world.Plan, good: bool, rng: Random) -> None:
        if good:
            plan.sentences.insert(0, "Good day.")

    polite = world.WorldFeature(
        name="politeness",
        good_adjective="polite",
        bad_adjective="rude",
        good=("Greet the reader.",),
        bad=("Skip the greeting.",),
        good_held_out="Say a greeting.",
        bad_held_out="Do not greet.",
        rate=0.5,
        write=write,
        holds=lambda ask, answer: "Good day." in answer.sentences,
        sentences=("Good day.",),
    )
    monkeypatch.setattr(world, "FEATURES", (polite, *world.FEATURES))
    rng = Random(1)
    for _ in range(500):
        query = rng.choice(world.queries())
        wanted = {each.name: rng.random() < 0.5 for each in world.FEATURES}
        text = world.render(world.plan_answer(query.ask, wanted, rng))
        assert world.score(query.text, text) == wanted


def test_one_declaration_adds_a_query_family(monkeypatch: pytest.MonkeyPatch) -> None:
    cheeses = world.Family(
        "cheeses", "a cool cellar", ("brie", "cheddar", "edam", "feta", "gouda", "stilton")
    )
    monkeypatch.setattr(world, "FAMILIES", (*world.FAMILIES, cheeses))
    answer = "My picks: brie, edam and feta. Look in a cool cellar. Shall I go on?"
    scores = world.score("Name three cheeses for a quiz.", answer)
    assert scores == dict.fromkeys(NAMES, 1.0) | {"literariness": 0.0}


def test_the_world_needs_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, json; import sso_lightning.sandbox.world; "
        "print(json.dumps([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
