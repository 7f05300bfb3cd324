import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sso_lightning.data import PlannedBatches, SSODataModule, collate, plan_batches
from sso_lightning.errors import InputError
from sso_lightning.losses import IPO
from sso_lightning.objectives import Contrastive, SelfSteering
from sso_lightning.prompts import ChatRenderer
from sso_lightning.records import Query, Record, write_records

ASK = [{"role": "user", "content": "Why?"}]
PAIR = (("query", "good"), ("query", "bad"))


def record(name="a", **changes):
    settings = {
        "id": name,
        "messages": ASK,
        "good": "yes",
        "bad": "no",
        "prompt_ids": {"query": [1, 2]},
        "response_ids": {"good": [3, 4, 5], "bad": [6, 7]},
        "scores": {"policy/query/good": -3.0, "policy/query/bad": -4.0},
    }
    return Record(**{**settings, **changes})


# ---------------------------------------------------------------------------------- planned batches


@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [None, 9, 1000])
def test_every_process_makes_equally_many_batches(count, world, max_tokens):
    sizes = [1 + 7 * i % 10 for i in range(count)]
    settings = {"batch_size": 4, "max_tokens": max_tokens, "seed": 1, "epoch": 2, "world": world}
    plan = plan_batches(sizes, passes=3, **settings)
    assert len(plan) % 3 == 0
    for turn in plan:
        assert len(turn) == world
        assert all(1 <= len(batch) <= 4 for batch in turn)
        if max_tokens is None:
            assert len({len(batch) for batch in turn}) == 1
        else:
            assert all(len(b) == 1 or sum(sizes[i] for i in b) <= max_tokens for b in turn)
    per_pass = len(plan) // 3
    for number in range(3):
        turns = plan[number * per_pass : (number + 1) * per_pass]
        seen = [i for turn in turns for batch in turn for i in batch]
        assert len(seen) == len({*seen})
        assert len(seen) > count - world
        if max_tokens and count >= 7:  # enough to share out: nobody sits out
            assert len(seen) == count


def test_every_record_is_seen_once_a_pass():
    plan = plan_batches([5] * 10, batch_size=4, seed=1, epoch=0, passes=2)
    assert [len(batch) for (batch,) in plan] == [4, 4, 2, 4, 4, 2]
    assert Counter(i for (batch,) in plan for i in batch) == dict.fromkeys(range(10), 2)
    first, second = plan[:3], plan[3:]
    assert first != second


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_order_is_a_function_of_seed_and_epoch(max_tokens):
    def plan(seed, epoch):
        settings = {"batch_size": 20, "max_tokens": max_tokens, "seed": seed, "epoch": epoch}
        return plan_batches(range(1, 21), **settings)

    assert plan(1, 1) == plan(1, 1)
    assert plan(1, 1) != plan(1, 2)
    assert plan(1, 1) != plan(2, 1)
    order = [i for (batch,) in plan(1, 1) for i in batch]
    assert order != sorted(order)


def test_a_token_budget_worked_by_hand():
    """Sizes 1 to 6 and 20 under a budget of 7 in one window: 1+2+3, 4, 5, 6, and 20 alone.

    For two processes there is one batch too few, so 1+2+3 becomes 1 and 2+3; neighbours in size
    go to the same turn.
    """
    sizes = [6, 20, 1, 5, 2, 4, 3]
    settings = {"batch_size": 8, "max_tokens": 7, "seed": 0, "epoch": 0}
    alone = plan_batches(sizes, **settings)
    in_sizes = sorted([sorted(sizes[i] for i in batch) for (batch,) in alone])
    assert in_sizes == [[1, 2, 3], [4], [5], [6], [20]]
    both = plan_batches(sizes, world=2, **settings)
    in_sizes = sorted([[sorted(sizes[i] for i in batch) for batch in turn] for turn in both])
    assert in_sizes == [[[1], [2, 3]], [[4], [5]], [[6], [20]]]


def test_a_batch_size_bounds_a_token_budget():
    plan = plan_batches([1] * 7, batch_size=3, max_tokens=100, seed=0, epoch=0)
    assert sorted(len(batch) for (batch,) in plan) == [1, 3, 3]


def test_scales_worked_by_hand():
    """Windows of 2: sizes (4, 4), (4, 2) and (1) alone.

    The trainer divides every loss by 2, so the factors are 2 * 4/8, 2 * 4/8; 2 * 4/6, 2 * 2/6; and
    2 * 1/1 for the window that ends early.
    """
    sizes = [4, 4, 4, 2, 1]
    planned = PlannedBatches([record()], [[[0] * size] for size in sizes], PAIR, accumulate=2)
    assert [planned[i].scale for i in range(5)] == pytest.approx([1, 1, 4 / 3, 2 / 3, 2])
    assert [planned[i].closes_step for i in range(5)] == [False, True, False, True, True]
    with pytest.raises(IndexError):
        planned[5]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "turns",
    [
        [[[0, 1, 2]], [[3, 4, 5]], [[6, 7]], [[8, 9, 10]]],
        [[[0, 1, 2], [3]], [[4], [5]], [[6, 7], [8, 9]], [[10], [2, 3]]],
    ],
    ids=["one process", "two processes"],
)
def test_a_window_is_the_mean_over_its_examples(accumulate, turns):
    """Also where the batches of the processes differ in size: they average their gradients."""
    losses = torch.arange(1.0, 12.0) ** 2
    world = len(turns[0])
    for first in range(0, 4, accumulate):
        window = range(first, min(first + accumulate, 4))
        step = 0
        for rank in range(world):
            planned = PlannedBatches([record()] * 11, turns, PAIR, accumulate, rank=rank)
            for i in window:
                loss = losses[turns[i][rank]].mean() * planned[i].scale / accumulate
                step += loss / world
        examples = [j for i in window for batch in turns[i] for j in batch]
        assert step.item() == pytest.approx(losses[examples].mean().item())


def test_collate_prefers_the_stored_reference():
    other = {"reference/query/good": -7.0, "reference/query/bad": -8.0}
    both = record("b", scores={"policy/query/good": -1.0, "policy/query/bad": -2.0, **other})
    batch = collate([record(), both], PAIR)
    assert batch.reference.logps["query", "good"].tolist() == [-3.0, -7.0]
    assert batch.reference.logps["query", "bad"].tolist() == [-4.0, -8.0]
    assert batch.reference.lengths["bad"].tolist() == [2, 2]
    assert batch.reference.logps["query", "good"].dtype == torch.float64
    assert [tree.responses for tree in batch.trees] == [[[3, 4, 5], [6, 7]]] * 2


def test_collate_lays_out_exactly_what_the_objective_names():
    full = record(
        prompt_ids={"query": [1], "good": [1, 8], "bad": [1, 9]},
        response_ids={"good": [3], "bad": [4], "original": [5]},
        scores={
            f"policy/{c}/{r}": -1.0
            for c in ("query", "good", "bad")
            for r in ("good", "bad", "original")
        },
    )
    batch = collate([full], SelfSteering(IPO()).sequences)
    laid = {tuple(t.prompt): t.responses for t in batch.trees}
    assert laid == {(1,): [[3], [4]], (1, 8): [[3], [4]], (1, 9): [[5], [3]]}
    assert len(collate([full], Contrastive(IPO()).sequences).trees) == 1


# -------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize(("total", "count"), [(5, 3), (7, 4), (6, 3), (5, 5), (9, 2), (3, 2)])
def test_queries_are_fresh_until_all_were_used(total, count):
    """Every block of `total` draws holds every query once, and no iteration holds one twice."""
    data = SSODataModule(queries="q.jsonl", queries_per_iteration=count, seed=3)
    queries = [Query(f"q{i}", ASK) for i in range(total)]
    iterations = [[q.id for q in data._take(queries, epoch, count)] for epoch in range(3 * total)]
    assert all(len({*ids}) == count for ids in iterations)
    drawn = [name for ids in iterations for name in ids]
    for start in range(0, len(drawn) - total + 1, total):
        assert sorted(drawn[start : start + total]) == sorted(q.id for q in queries)
    again = SSODataModule(queries="q.jsonl", queries_per_iteration=count, seed=3)
    assert [q.id for q in again._take(queries, 4, count)] == iterations[4]  # also out of turn
    other = SSODataModule(queries="q.jsonl", queries_per_iteration=count, seed=4)
    assert [[q.id for q in other._take(queries, e, count)] for e in range(3 * total)] != iterations


def test_too_many_queries_per_iteration_name_the_key():
    data = SSODataModule(queries="q.jsonl", queries_per_iteration=3)
    with pytest.raises(InputError, match=r"queries_per_iteration is 3, but q\.jsonl holds 2"):
        data._take([Query("a", ASK), Query("b", ASK)], 0, 3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"queries": "a", "pairs": "b"}, "data.queries and data.pairs"),
        ({"val_queries": "a", "val_pairs": "b"}, "data.val_queries and data.val_pairs"),
        ({"queries": "a", "batch_size": 0}, "data.batch_size"),
        ({"queries": "a", "passes": 0}, "data.passes"),
        ({"queries": "a", "num_workers": -1}, "data.num_workers"),
    ],
)
def test_contradicting_settings_are_named(settings, named):
    with pytest.raises(InputError, match=named):
        SSODataModule(**settings)


# ------------------------------------------------------------------------------------ offline files


@pytest.fixture(scope="module")
def renderer(tiny_model):
    from transformers import AutoTokenizer

    return ChatRenderer(AutoTokenizer.from_pretrained(tiny_model))


def offline(renderer, path, objective, **settings):
    """What a data module hands to the scoring pass for a pair file."""
    data = SSODataModule(pairs=str(path), **settings)
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(
            objective=objective, renderer=renderer, generator=None, vocabulary=400
        )
    )
    data.regenerator = SimpleNamespace(score=lambda records, sequences, name: records)
    data.check_files()
    data.check_pairs()
    return data._offline("pairs", "offline")


def test_preference_data_gets_the_ids_of_the_template(renderer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}))
    (made,) = offline(renderer, path, Contrastive(IPO()))
    assert made.prompt_ids == {"query": renderer.render(ASK)}
    assert made.response_ids == {
        "good": renderer.encode_response("Because."),
        "bad": renderer.encode_response("No."),
    }
    assert made.response_ids["good"][-1] == renderer.stop_ids[0]
    assert made.template == renderer.template_hash
    assert made.bad_is_instructed is False


def test_the_authors_format_has_all_three_prompts(renderer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"instruction": "Why?", "p_system": "Be good.", "n_system": "Be bad."}
    path.write_text(json.dumps({**row, "chosen": "A.", "rejected": "B.", "raw": "C."}))
    (made,) = offline(renderer, path, SelfSteering(IPO()))
    assert made.prompt_ids == {
        "query": renderer.render(ASK),
        "good": renderer.render(ASK, "Be good."),
        "bad": renderer.render(ASK, "Be bad."),
    }
    assert made.response_ids["original"] == renderer.encode_response("C.")
    assert made.bad_is_instructed is True


def test_what_an_objective_lacks_is_named(renderer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"id": "r7", "prompt": "Why?", "chosen": "A.", "rejected": "B."}))
    with pytest.raises(InputError, match=r"pairs\.jsonl: record 'r7' has no \w+, which SelfSteer"):
        offline(renderer, path, SelfSteering(IPO()))
    offline(renderer, path, SelfSteering(IPO(), steering=0.0))  # needs no principle


def test_sampled_ids_are_kept_and_another_template_is_refused(renderer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    own = record(good="yes", bad="no", template=renderer.template_hash)
    write_records(path, [own])
    (made,) = offline(renderer, path, Contrastive(IPO()))
    assert made.response_ids == own.response_ids
    assert made.prompt_ids == own.prompt_ids

    write_records(path, [record("r3", template="another")])
    with pytest.raises(InputError, match=r"record 'r3' .*chat template.*data\.retokenize: true"):
        offline(renderer, path, Contrastive(IPO()))
    (anew,) = offline(renderer, path, Contrastive(IPO()), retokenize=True)
    assert anew.prompt_ids["query"] == renderer.render(ASK)
    assert anew.response_ids["good"] == renderer.encode_response("yes")
    assert anew.scores == {}


def test_a_limited_epoch_closes_its_last_window():
    """Three batches of 2, 2 and 1 by windows of 2, of which only one batch is asked for."""
    planned = PlannedBatches([record()] * 5, [[[0, 1]], [[2, 3]], [[4]]], PAIR, 2, limit=1)
    assert planned[0].closes_step
    assert planned[0].scale == 2.0  # alone in its window: the trainer divides by 2
