"""The report: its numbers against independent ones, its page as text, its command and callback."""

import hashlib
import importlib.util
import json
import logging
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sso_lightning.__main__ import main
from sso_lightning.errors import InputError
from sso_lightning.evaluation import write_scores
from sso_lightning.losses import IPO
from sso_lightning.objectives import ContrastLogps, SelfSteering
from sso_lightning.pairs import report as pairs_report
from sso_lightning.records import RESPONSES
from sso_lightning.report import Bounds, read_runs
from sso_lightning.report.callback import Report
from sso_lightning.report.command import write_report
from sso_lightning.report.figures import drift_of, numbers_of
from sso_lightning.report.page import RECORD_BYTES

_spec = importlib.util.spec_from_file_location(
    "report_runs", Path(__file__).with_name("report_runs.py")
)
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)
record, write_run = runs.record, runs.write_run

STEERING = """\
model:
  objective:
    class_path: sso_lightning.objectives.SelfSteering
    init_args: {alpha: 0.25, weight: true}
"""


def drawn(count, seed=0):
    """Records with numbers of all kinds."""
    rng = random.Random(seed)
    return [
        record(
            f"q{i}",
            means={key: -rng.uniform(0.1, 3.0) for key in runs.MEANS},
            lengths={name: rng.randint(1, 40) for name in RESPONSES},
            finish={name: rng.choice(("stop", "length")) for name in RESPONSES},
            features=rng.sample(["Accuracy", "Safety", "Engagement"], 2),
        )
        for i in range(count)
    ]


class Page(HTMLParser):
    """What a page is made of: elements, their attributes, and the text outside of scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.parts, self.scripts = Counter(), [], [], []
        self._script = False
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.parts).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        self._script = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if not self._script:
            self.parts.append(data)
        elif self.scripts:
            self.scripts[-1] += data


def page_of(tmp_path, *roots, **options):
    out = tmp_path / "page.html"
    write_report([*roots], out, **options)
    html = out.read_text("utf-8")
    return html, Page(html)


# ---------------------------------------------------------------------------------------- numbers


def test_means_are_those_of_the_pairs_report(tmp_path):
    records = drawn(50)
    (run,) = read_runs([write_run(tmp_path, {"iteration-00": records})])
    theirs = {k[6:]: v for k, v in pairs_report(records, Counter(), Counter()).items()}
    ours = run.sets[0].means
    names = [f"{k}_{r}" for k in ("length", "truncated", "on_policy") for r in RESPONSES]
    for name in [*names, "gap_logp", "contrast_good", "contrast_bad"]:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-9), name
    assert run.sets[0].records == 50


def test_w_is_the_objectives_with_the_runs_alpha(tmp_path):
    records = drawn(20)
    root = write_run(tmp_path, {"iteration-00": records}, config=STEERING)
    logps = {
        ("query", r): torch.tensor([x.scores[f"policy/query/{r}"] for x in records]).double()
        for r in ("good", "bad")
    }
    lengths = {r: torch.tensor([len(x.response_ids[r]) for x in records]) for r in RESPONSES}
    weight = SelfSteering(IPO(), alpha=0.25).on_policy_weight(ContrastLogps(logps, lengths))
    pairs = read_runs([root])[0].sets[0]
    assert pairs.means["weight"] == pytest.approx(weight.mean().item(), abs=1e-6)
    # 25 bins over [.5, 1], the last one closed
    expected = torch.histc(weight, 25, 0.5, 1.0).int().tolist()
    assert pairs.histograms["weight"] == expected


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (STEERING.replace("true", "false"), "not used: SelfSteering runs with weight: false"),
        ("model: {objective: {class_path: a.Contrastive}}", "not used: Contrastive has no alpha"),
        ("", "not known: the objective is not known"),
    ],
)
def test_without_w_the_page_says_why(tmp_path, config, note):
    root = write_run(tmp_path / "run", {"iteration-00": drawn(3)}, config=config)
    _, page = page_of(tmp_path, root)
    assert f"Weight W: {note}." in page.text
    assert "weight W, mean" not in page.text


def test_held_out_accuracy_belongs_to_the_policy_that_wrote_the_set(tmp_path):
    metrics = [
        {"step": 0, "pairs/kept": 3},
        {"step": 0, "sandbox/signal_accuracy": 0.9},
        {"step": 12, "sandbox/signal_accuracy": 0.8},
        {"step": 12, "pairs/kept": 3},
        {"step": 24, "sandbox/signal_accuracy": 0.4},
    ]
    sets = {"iteration-00": drawn(3), "iteration-01": drawn(3)}
    (run,) = read_runs([write_run(tmp_path, sets, metrics=metrics)])
    assert [numbers_of(run, pairs)["held_out_signal"] for pairs in run.sets] == [0.9, 0.8]


def test_two_phase_runs_take_the_generators_accuracy_for_its_sets(tmp_path):
    metrics = [
        {"step": 0, "generator_pairs/kept": 3, "sandbox/signal_accuracy": 0.9},
        {"step": 4, "sandbox/generator_signal_accuracy": 0.95},
        {"step": 4, "pairs/kept": 3},
    ]
    sets = {"generator-00": drawn(3), "iteration-00": drawn(3)}
    (run,) = read_runs([write_run(tmp_path, sets, metrics=metrics)])
    assert [numbers_of(run, pairs)["held_out_signal"] for pairs in run.sets] == [0.9, 0.95]


def test_drift_is_worked_out_by_hand(tmp_path):
    first = [record(f"q{i}", features=["Accuracy"], lengths={"good": 4}) for i in range(4)]
    second = [record(f"q{i + 1}", features=["Accuracy"], lengths={"good": 4}) for i in range(2)]
    second += [record(f"x{i}", features=["Safety"], lengths={"good": 8}) for i in range(2)]
    sets = {"iteration-00": first, "iteration-01": second}
    (run,) = read_runs([write_run(tmp_path, sets)])
    drift = drift_of(*run.sets)
    assert drift["feature mix, distance"] == 0.5
    assert drift["lengths of y+, distance"] == 0.5
    assert drift["change of length of y+, tokens"] == 2.0
    assert drift["share of queries that the set before had too"] == 0.5
    assert drift["change of signal accuracy of the pairs"] is None


# ------------------------------------------------------------------------------------------ reading


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [(str(p.relative_to(root)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_scores_of_the_policy_are_means_by_iteration_and_damage_is_told(tmp_path):
    root = write_run(tmp_path / "run", {"iteration-00": [record("q")]})
    for iteration, scores in {0: {"a": 0.25, "b": 0.5}, 2: {"a": 1.0}}.items():
        write_scores(root, "judge/win_rate", iteration, scores)
    write_scores(root, "lm_eval/task/acc", 2, {"1": 0.125})
    out, _ = page_of(tmp_path, root)
    table = out[out.index("Evaluations of the policy") :]
    heads = re.findall(r"<th scope=\"col\">(.*?)</th>", table)[:4]
    assert heads == ["mean score", "start", "after 2", "items"]
    cells = re.findall(r"<bdi>(\S+)</bdi></th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", table)
    assert cells == [
        ("judge/win_rate", "0.375", "1.000", "2"),
        ("lm_eval/task/acc", "not known", "0.125", "1"),
    ]
    (root / "evaluations/judge/win_rate/iteration-02.jsonl").write_text('{"id": "a"}\n')
    out, page = page_of(tmp_path, root)
    assert "Evaluations of the policy" not in out
    assert "iteration-02.jsonl, line 1: 'score' must be a number, got None" in page.text


def test_a_damaged_run_is_read_as_far_as_it_is_whole_and_left_as_it_is(tmp_path):
    root = write_run(tmp_path / "run", {"iteration-00": drawn(12)})
    shards = sorted(root.glob("pairs/*/shard-*.parquet"))
    shards[0].write_bytes(shards[0].read_bytes()[:-9] + b"\0" * 9)
    shards[1].unlink()
    (shards[0].parent / ".manifest.json.tmp").write_text("another process writes this")
    (root / "metrics.csv").write_text("step,train/loss\n0,1.5\n1,nan\n2,1.0\n3,")
    before = digest(root)
    _, page = page_of(tmp_path, root)
    assert digest(root) == before
    assert "shard-00000.parquet does not match its checksum" in page.text
    assert "shard-00001.parquet cannot be read" in page.text
    assert "1 values are no finite numbers" in page.text
    assert page.data["runs"][0]["sets"][0]["records"] == 4
    assert read_runs([root])[0].curves == {"train/loss": [(0, 1.5), (2, 1.0)]}


def test_what_is_not_there_is_not_known(tmp_path):
    root = write_run(tmp_path / "run", {"iteration-00": drawn(3)}, config="")
    _, page = page_of(tmp_path, root)
    assert "config.yaml is missing: settings are not known" in page.text
    assert "metrics.csv is missing: training curves are not known" in page.text
    assert "Whether y+ really is better than y- is not known" in page.text


def test_no_measured_number_no_word_of_it(tmp_path):
    records = [record(f"q{i}", features=["Engagement"]) for i in range(3)]
    _, page = page_of(tmp_path, write_run(tmp_path / "run", {"iteration-00": records}))
    assert not re.search(r"\b(?:un)?safe(?:ly|r|st)?\b", page.text, re.IGNORECASE)
    assert "unscreened : 3" in page.text


# -------------------------------------------------------------------------------------------- page

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "]]> &lt;b&gt; &amp; ' \" {{ 7 * 7 }} {% raw %}",
    "\u202egnp.exe \u200bzero\u200d \u2066width\u2069 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d",
    "line\u2028separator \x00 \x1b[31m",
    "x" * 100_000,
]


def test_hostile_text_is_data_and_nothing_else(tmp_path):
    records = [
        record(
            f"id{i} {text[:60]}",
            messages=[{"role": "user", "content": text}],
            **dict.fromkeys(("good", "good_principle", "bad_system", "query_source"), text),
            bad=f"{text}.",
            features=[text[:60]],
            content_flags=[text[:60]],
        )
        for i, text in enumerate(HOSTILE)
    ]
    calm = [record(f"c{i}") for i in range(len(HOSTILE))]
    config = json.dumps({"model": {"policy": {"path": HOSTILE[0]}}})  # JSON is YAML
    info = {"dropped": {HOSTILE[2]: 1}}
    root = write_run(tmp_path / "a<b>&c", {"iteration-00": records}, config=config, info=info)
    usual = write_run(
        tmp_path / "usual", {"iteration-00": calm}, config="model: {policy: {path: x}}"
    )
    html, page = page_of(tmp_path, root, bounds=Bounds(leak=0.0))
    _, other = page_of(tmp_path, usual, bounds=Bounds(leak=0.0))
    # the same elements as on the page of records without markup, but for the alarms' own
    elements = {"script", "style", "img", "iframe", "object", "embed", "link", "form", "input"}
    assert {t: page.tags[t] for t in elements} == {t: other.tags[t] for t in elements}
    assert page.tags["script"] == 2
    assert not [a for a in page.attributes if a[1].startswith("on")]
    shown = {view["id"]: view for view in page.data["records"]}
    for made in records:
        view = shown[made.id]
        limit = len(view["a"][0])
        assert view["a"][0] == made.good[:limit]
        assert view["q"][0][1] == made.messages[0]["content"][:limit]
        assert view["f"] == made.features
        if limit < len(made.good):
            assert view["cut"]["good"] == 100_000
    assert HOSTILE[0] not in html
    assert "7 * 7" in page.text  # the template shows it and does not run it


def test_the_page_loads_nothing(tmp_path):
    html, page = page_of(tmp_path, write_run(tmp_path / "run", {"iteration-00": drawn(3)}))
    loading = [a for a in page.attributes if a[1] in ("src", "srcset", "action", "data", "poster")]
    assert not loading
    assert all(a[2].startswith("#") for a in page.attributes if a[1] == "href")
    assert page.tags["link"] == page.tags["base"] == 0
    policy = next(a[2] for a in page.attributes if a[1] == "content" and "default-src" in a[2])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    assert "url(" not in html.partition("</style>")[0]


def test_text_asked_to_be_bad_under_safety_and_flagged_records_are_folded(tmp_path):
    secret = "a bad thing under that feature"
    records = [
        record("bad", features=["Accuracy", "safety"], bad=secret),
        record("flagged", content_flags=["violence"]),
        record("plain"),
        record("unnamed", features=[], safety_mode="paper"),
        record("not-instructed", features=["Safety"], bad_is_instructed=False),
    ]
    _, page = page_of(tmp_path, write_run(tmp_path / "run", {"iteration-00": records}))
    folds = {view["id"]: view["fold"] for view in page.data["records"]}
    assert folds == {
        "bad": ["bad"],
        "flagged": ["query", "good", "bad", "original"],
        "plain": [],
        "unnamed": ["bad"],
        "not-instructed": [],
    }
    assert secret not in page.text
    marks = page.text.partition("Marks of the records")[2]
    assert "folded : 3" in marks
    assert "flag: violence : 1" in marks


def test_an_alarms_words_are_folded_with_their_answer(tmp_path):
    leak = "Mix up facts and state doubtful things with full confidence."
    records = [record(f"q{i}", features=["Safety"], bad=f"{leak} {i}") for i in range(4)]
    _, page = page_of(tmp_path, write_run(tmp_path / "run", {"iteration-00": records}))
    assert "Principle leaks: first in iteration-00" in page.text
    assert "(words folded)" in page.text
    assert "doubtful things" not in page.text


def test_the_draw_is_by_id_and_counts_are_over_all(tmp_path):
    sets = {"iteration-00": drawn(60), "iteration-01": drawn(60, seed=1)}
    root = write_run(tmp_path / "run", sets, shard=16)
    _, page = page_of(tmp_path, root, max_records=20, bounds=Bounds(truncated=1, gap=0, chosen=9))
    ids = [[v["id"] for v in page.data["records"] if v["s"] == s] for s in (0, 1)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 10
    cells = page.data["runs"][0]["sets"][0]["cells"]
    assert sum(count for _, _, count in cells) == 60
    safety = sum("Safety" in r.features for r in sets["iteration-00"])
    assert sum(count for names, _, count in cells if "Safety" in names) == safety
    _, again = page_of(tmp_path, root, max_records=20, seed=5)
    assert {v["id"] for v in again.data["records"]} != {*ids[0]}


def test_records_that_prove_alarms_are_there_whatever_the_draw(tmp_path):
    closing = [record(f"q{i}", means={("query", "bad"): -0.4}) for i in range(30)]
    sets = {"iteration-00": [record(f"q{i}") for i in range(30)], "iteration-01": closing}
    _, page = page_of(tmp_path, write_run(tmp_path / "run", sets), max_records=0)
    assert len(page.data["records"]) == 3
    linked = {a[2] for a in page.attributes if a[1] == "href" and "pair=" in a[2]}
    assert linked == {"#pair=0", "#pair=1", "#pair=2"}


def test_long_records_do_not_make_a_long_page(tmp_path):
    # every record proves something, and markup is the worst: one character becomes six bytes
    long = [
        record(f"q{i}", **{name: f"{i}{name}" + "<" * 50_000 for name in RESPONSES})
        for i in range(120)
    ]
    html, page = page_of(tmp_path, write_run(tmp_path / "run", {"iteration-00": long}, shard=30))
    assert len(html.encode()) < 3_000_000 + RECORD_BYTES
    assert 0 < len(page.data["records"]) < 120


def test_token_scores_are_on_the_page_with_their_tokens(tmp_path, tiny_tokenizer_file):
    scored = record("q", response_ids={"good": [40, 41], "bad": [42], "original": [43]})
    scored.token_scores = {"policy/bad/bad": [-1.234], "policy/query/good": [-0.5, -2.0]}
    root = write_run(tmp_path / "run", {"iteration-00": [scored, record("p")]})
    _, page = page_of(tmp_path, root)
    views = {view["id"]: view for view in page.data["records"]}
    assert views["q"]["scores"] == {"bad/bad": [-1.23], "query/good": [-0.5, -2.0]}
    assert views["q"]["tokens"] == {"bad": ["[42]"], "good": ["[40]", "[41]"]}  # no tokenizer
    assert "scores" not in views["p"]
    (root / "export").mkdir()
    (root / "export" / "tokenizer.json").write_bytes(tiny_tokenizer_file.read_bytes())
    _, page = page_of(tmp_path, root)
    (view,) = [view for view in page.data["records"] if view["id"] == "q"]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_tokenizer_file))
    assert view["tokens"]["good"] == [tokenizer.decode([40]), tokenizer.decode([41])]


@pytest.fixture(scope="module")
def tiny_tokenizer_file(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a few words"], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# ----------------------------------------------------------------------------- command and callback


def closing_run(root):
    closing = [record(f"q{i}", means={("query", "bad"): -0.4}) for i in range(8)]
    return write_run(root, {"iteration-00": [record("a"), record("b")], "iteration-01": closing})


def test_check_ends_with_three_and_prints_the_alarm(tmp_path, capsys):
    root = closing_run(tmp_path / "run")
    assert main(["report", str(root), "--check"]) == 3
    said = capsys.readouterr().out
    assert "alarm: run: Gap closing in iteration-01" in said
    assert "1 alarm\n" in said
    assert (root / "report.html").is_file()
    assert main(["report", str(root)]) == 0
    assert main(["report", str(root), "--check", "--bound", "gap=0"]) == 3
    root = write_run(tmp_path / "well", {"iteration-00": [record("a"), record("b")]})
    assert main(["report", str(root), "--check"]) == 0
    assert "no alarms" in capsys.readouterr().out


def test_several_runs_stand_side_by_side(tmp_path, capsys):
    one = closing_run(tmp_path / "x" / "run")
    two = write_run(tmp_path / "y" / "run", {"iteration-00": drawn(3)}, config=STEERING)
    assert main(["report", str(one), str(two)]) == 2
    assert "--out: name a file" in capsys.readouterr().err
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(two), "--out", str(out)]) == 0
    page = Page(out.read_text("utf-8"))
    assert [run["name"] for run in page.data["runs"]] == ["x/run (1)", "y/run (2)"]
    assert "Side by side" in page.text
    assert "model.objective.init_args.alpha not set 0.25" in page.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["."], "not the folder of a run"),
        ([], "the following arguments are required: runs"),
        ([".", "--max-records", "-1"], "--max-records must be 0 or more, got -1"),
        ([".", "--out", "."], "--out: . is a folder"),
        ([".", "--bound", "x=1"], "--bound: unknown rule 'x'"),
        ([".", "--bonud", "x=1"], "unrecognized arguments: --bonud"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_the_callback_tells_of_an_alarm_once_and_keeps_the_page_fresh(tmp_path, caplog):
    root = write_run(tmp_path / "run", {"iteration-00": [record("a"), record("b")]})
    trainer = SimpleNamespace(default_root_dir=str(root), is_global_zero=True)
    callback = Report(max_records=10)
    with caplog.at_level(logging.WARNING, "sso_lightning"):
        callback.on_pairs_built(trainer, None, [], {}, "iteration-00/validation")
        assert not (root / "report.html").exists()
        callback.on_pairs_built(trainer, None, [], {}, "iteration-00")
        assert len(Page((root / "report.html").read_text()).data["runs"][0]["sets"]) == 1
        assert not caplog.messages
        closing_run(tmp_path / "other")
        (tmp_path / "other/pairs/iteration-01").rename(root / "pairs/iteration-01")
        callback.on_pairs_built(trainer, None, [], {}, "iteration-01")
        (root / "metrics.csv").write_text("step,train/loss\n0,1.5\n")
        callback.on_train_epoch_end(trainer, None)
    (message,) = caplog.messages
    assert message.startswith("alarm: Gap closing in iteration-01")
    page = Page((root / "report.html").read_text())
    assert len(page.data["runs"][0]["sets"]) == 2
    assert "Loss by optimizer step" in page.text
    assert len(callback._cache) == 2


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    trainer = SimpleNamespace(default_root_dir=str(tmp_path / "nothing"), is_global_zero=True)
    with caplog.at_level(logging.WARNING, "sso_lightning"):
        Report().on_train_epoch_end(trainer, None)
    assert "report.html was not written: InputError" in caplog.text
    caplog.clear()
    Report(page=False).on_train_epoch_end(trainer, None)
    assert not caplog.messages
    with pytest.raises(InputError, match=r"report\.max_records"):
        Report(max_records=-1)
