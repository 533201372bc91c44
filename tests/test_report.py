"""The page of a run, from run folders as runs leave them, whole and damaged."""

from __future__ import annotations

import json
import math
import os
import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import RunFolder
from pipeline.report import LiveReport, graph, report_again, write_report
from pipeline.report.charts import Library, Point, frontier_chart, line_chart
from pipeline.report.curves import Chart, Series, curves, points_each, series_of, summary, swept, thin
from pipeline.report.page import as_script
from pipeline.report.reading import open_run, progress, read_run
from pipeline.report.results import evaluations, iterations
from pipeline.report.words import differences, duration, moment, number, prompt, share, short
from stages.errors import DataError

HOSTILE = "</script></pre><img src=x onerror='alert(1)'>\"{{ 7 * 7 }}<!--\u2028é日本"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library that draws is made once for this file, and not in the user's home."""
    before = os.environ.get("RAYLIGN_CACHE")
    os.environ["RAYLIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("RAYLIGN_CACHE")
    if before is not None:
        os.environ["RAYLIGN_CACHE"] = before


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def loss(steps: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": 1 / (1 + i), "learning_rate": 1e-3 / (1 + i), "tokens_per_second": 100.0 + i, **more}
        for i in range(1, steps + 1)
    ]


def make_run(path: Path, stages: dict[str, dict[str, Any]], **state: Any) -> Path:
    """A run folder.

    Args:
        stages: by name: `record` (in run.json), `manifest`, `files` (name -> text). Without a manifest a stage's files lie in
            its work folder.
    """
    records = {}
    for name, given in stages.items():
        record = {"kind": "sft", "state": "done", "fingerprint": f"{name}-print", "seconds": 1.0} | given.get(
            "record", {}
        )
        records[name] = record
        folder = path / name
        if given.get("manifest") is None:
            folder = path / ".work" / f"{name}-{record['fingerprint'][:12]}"
        folder.mkdir(parents=True)
        if given.get("manifest") is not None:
            manifest = {"name": name, "kind": record["kind"], "produces": "model", "fingerprint": record["fingerprint"]}
            manifest |= {"metrics": {}, "details": {}} | given["manifest"]
            (folder / "manifest.json").write_text(json.dumps(manifest))
        for file, text in given.get("files", {}).items():
            (folder / file).write_text(text)
    path.mkdir(exist_ok=True)
    made = {"name": path.name, "state": "done", "started": 1000.0, "finished": 1060.0, "stages": records, "sweeps": {}}
    (path / "run.json").write_text(json.dumps(made | state))
    (path / "spec.yaml").write_text("name: run\n")
    return path


class Outline(HTMLParser):
    """Elements that are never closed, or closed twice, and the text of the page without its scripts."""

    VOID = frozenset({"meta", "link", "input", "br", "rect", "circle", "path", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.said: list[str] = []
        self.feed(page)
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        elif tag not in self.VOID:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def page_of(run: Path) -> str:
    return report_again(str(run)).read_text()


def page_of_live(run: Path) -> str:
    """As the runner writes it."""
    return write_report(RunFolder(run)).read_text()


def checked(page: str) -> Outline:
    """The page is well formed, fetches nothing, and its ids are its own."""
    outline = Outline(page)
    assert not outline.wrong
    names = dict(outline.attributes)
    assert "src" not in names and "srcset" not in names
    assert all(v is None or re.match(r"#|data:,$", v) for k, v in outline.attributes if k == "href")
    assert not [k for k, _ in outline.attributes if k.startswith("on")]
    ids = [v for k, v in outline.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    return outline


# ------------------------------------------------------------------------------------------------ words


def test_values_in_few_characters() -> None:
    values = (0.13516, 2e-05, 5617.7, 12, 0.0, 1.0, -3.0, 123456, "NaN", None, True)
    assert [number(v) for v in values] == [
        "0.1352",
        "2e-05",
        "5,618",
        "12",
        "0",
        "1",
        "-3",
        "123,456",
        "NaN",
        "",
        "yes",
    ]
    assert share(0.5241) == "52.4%" and share("Infinity") == "Infinity" and share(None) == ""
    seconds = (0.42, 8.3, 75, 3599.6, 3725, 200000, None)
    assert [duration(s) for s in seconds] == ["0.4 s", "8.3 s", "1 min 15 s", "1 h 00 min", "1 h 02 min", "2 d 7 h", ""]
    assert moment(0).startswith("19") and moment(1e300) == "" and moment(None) == ""
    assert short("support-assistant", 9) == "support-…" and short("sft", 9) == "sft"


def test_differences_are_of_words() -> None:
    def told(other: str, text: str) -> list[tuple[str, str]]:
        return [(p.text, p.kind) for p in differences(other, text)]

    assert told("a b c", "a x c") == [("a ", "same"), ("b", "gone"), ("x", "new"), (" c", "same")]
    assert told("e, b, c", "e, b, c, a") == [("e, b, c", "same"), (", a", "new")]
    assert told("same", "same") == [("same", "same")] and told("", "") == [] and told("", "a") == [("a", "new")]
    long = "word " * 1000
    assert told("", long) == [(long, "same")]  # too long to be compared
    for other, text in (("a b", "b a"), ("x", ""), ("日本 語", "日本 語 x")):
        pieces = differences(other, text)
        assert "".join(p.text for p in pieces if p.kind != "gone") == text
        assert "".join(p.text for p in pieces if p.kind != "new") == other


def test_of_a_prompt_the_end_is_shown_and_control_tokens_are_told_apart() -> None:
    pieces = prompt("<|im_start|>user\nHi <b><|im_end|>")
    assert [(p.text, p.kind) for p in pieces] == [
        ("<|im_start|>", "control"), ("user\nHi <b>", "same"), ("<|im_end|>", "control"),
    ]  # fmt: skip
    cut = prompt("x" * 5000 + "the end", at_most=100)
    assert (
        cut[0].text.startswith("… 4,907 characters") and cut[-1].text.endswith("the end") and len(cut[-1].text) == 100
    )


# ------------------------------------------------------------------------------------------------ curves


def test_metrics_that_belong_together_share_a_chart() -> None:
    metrics = [
        {"step": i, "loss": 1.0 / i, "rewards/chosen": i, "rewards/rejected": -i, "rewards/margins": 2 * i,
         "rewards/accuracies": 0.5 + i / 20, "logps/chosen": -i, "logps/rejected": -2 * i, "learning_rate": i * 1e-5,
         "grad_norm": i, "tokens_per_second": i, "trained_tokens_per_second": i / 2, "padding_share": 0.0, "epoch": i}
        for i in range(1, 6)
    ]  # fmt: skip
    metrics += [{"step": 3, "eval_loss": 0.5}, {"step": 5, "eval_loss": 0.4, "eval_rewards/accuracies": 0.7}]
    found = curves(metrics)
    titles = [chart.title for chart in found.charts]
    assert titles == [
        "loss", "margin between the rewards", "reward of answers", "accuracy", "log-probability a token",
        "tokens a second", "learning rate", "gradient norm",
    ]  # fmt: skip
    assert [chart.main for chart in found.charts] == [True] * 5 + [False] * 3
    of_loss, _, answers, accuracy = found.charts[:4]
    assert [(s.label, s.held_out, len(s.points)) for s in of_loss.series] == [
        ("held out", True, 2),
        ("training", False, 5),
    ]
    assert [s.label for s in answers.series] == ["chosen", "rejected"]
    assert accuracy.unit == "share" and len(accuracy.series) == 1  # one held-out value is no curve
    assert found.constant == [("padding share", "0.0%")] and not found.odd
    assert found.once == [("accuracies, held out", "70.0%")]


def test_curves_of_reinforcement_learning() -> None:
    metrics = [
        {"step": i, "loss": 0.1 * i, "reward": i, "rlhf_reward": i - 0.1, "rewards/a": i / 2, "rewards/b": i / 3, "kl": i / 10,
         "rewards/b/std": i, "entropy": 1 / i, "clip_fraction": i / 100, "value_clip_fraction": i / 50, "policy_loss": -i,
         "value_loss": i, "answer_tokens": i, "stopped": 1.0, "seconds/generate": i, "my_own": i}
        for i in range(1, 4)
    ]  # fmt: skip
    found = curves(metrics)
    main = [chart.title for chart in found.charts if chart.main]
    assert main == [
        "reward", "terms of the reward", "KL to the reference, nats an answer", "length of answers, tokens",
        "entropy, nats a token", "clipped share",
    ]  # fmt: skip
    assert [s.label for s in found.charts[1].series] == ["a", "b"]
    more = [chart.title for chart in found.charts if not chart.main]
    assert more == ["loss", "losses of policy and value", "spread", "seconds", "my own"]  # the loss says nothing there
    alone = curves([{"step": i, "reward": i, "rewards/reward": i} for i in range(3)])
    assert [chart.title for chart in alone.charts] == ["reward"]  # one term is the reward itself


def test_what_is_no_number_is_left_out_and_told() -> None:
    metrics = [{"step": i, "loss": value} for i, value in enumerate([1.0, "NaN", None, "0.5", 0.25, True, [1], 0.2])]
    metrics += [{"step": "x", "loss": 9.0}, {"loss": 9.0}, {"step": 3, "model": "sft", "loss": 9.0}]
    found = curves(metrics)
    (chart,) = found.charts
    assert chart.series[0].points == [(0, 1.0), (4, 0.25), (7, 0.2)]
    assert found.odd == ["loss: 5 of its values are not numbers, and not shown"]
    assert curves([]).charts == [] and curves([{"step": 1, "loss": 1.0}]).charts == []
    again = series_of([{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])[0]
    assert again == {"loss": [(1, 3.0), (2, 2.0)]}  # a step that was trained again counts as it was the last time


@pytest.mark.parametrize("count", [2, 499, 500, 501, 999, 20_000])
def test_many_points_are_thinned_and_extremes_stay(count: int) -> None:
    points = [(float(i), math.sin(i / 50)) for i in range(count)]
    points[count // 3] = (float(count // 3), 50.0)
    points[count // 2] = (float(count // 2), -50.0)
    thinned = thin(points)
    assert len(thinned) <= 500 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert thinned == sorted(set(thinned)) and set(thinned) <= set(points)
    assert min(v for _, v in thinned) == min(v for _, v in points) and max(v for _, v in thinned) == max(
        v for _, v in points
    )


def test_fewer_points_on_a_page_of_many_lines() -> None:
    assert points_each(0) == points_each(100) == 500 and points_each(300) == 200 and points_each(10_000) == 120


def test_a_sweep_has_a_line_for_each_variant() -> None:
    variants = {
        "dpo-beta-0.1": {"train.beta": 0.1},
        "dpo-beta-0.3": {"train.beta": 0.3},
        "dpo-beta-1": {"train.beta": 1},
    }
    metrics = {
        name: [{"step": i, "loss": i * b, "eval_loss": i + b, "rewards/margins": b} for i in range(3)]
        for b, name in enumerate(list(variants)[:2], 1)
    }
    charts = swept(variants, metrics)
    assert [(c.title, [s.label for s in c.series]) for c in charts] == [
        ("loss, held out", ["beta 0.1", "beta 0.3"]), ("margin between the rewards", ["beta 0.1", "beta 0.3"]),
    ]  # fmt: skip
    assert swept({}, {}) == []


def test_a_chart_says_in_words_what_it_shows() -> None:
    chart = Chart("accuracy", [Series("held out", [(1, 0.5), (2, 0.25), (3, 1.0)], True)], "share")
    assert summary(chart) == (
        "accuracy: held out from 50.0% at step 1 to 100.0% at step 3 (least 25.0%, greatest 100.0%)"
    )
    figure = line_chart(chart)
    assert figure.says == summary(chart) and figure.keys[0].value == "100.0%"
    assert figure.data["lines"][0]["y"] == [0.5, 0.25, 1.0] and figure.spec["encoding"]["y"]["scale"]["domain"] == [
        0.25,
        1.0,
    ]
    json.loads(as_script(figure.spec))
    flat = line_chart(Chart("x", [Series("x", [(1, 2.0), (2, 2.0)])]))
    assert flat.spec["encoding"]["y"]["scale"]["domain"] == [1.5, 2.5]


# ------------------------------------------------------------------------------------------------ the chain


def chain_of(inputs: dict[str, tuple[str, ...]]) -> list[graph.Node]:
    return [graph.Node(name, "sft", "done", "1 s", refs, href=f"#stage-{name}") for name, refs in inputs.items()]


QUICKSTART = {
    "base": (), "sft": ("base",), "compared": ("sft",), "reward": ("sft", "compared"), "dpo": ("sft",), "kto": ("sft",),
    "ppo": ("sft", "reward"), "eval": ("sft", "reward", "dpo", "kto", "ppo"),
}  # fmt: skip


def overlap(a: graph.Box, b: graph.Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


@pytest.mark.parametrize(
    "inputs",
    [
        QUICKSTART,
        {"a": ()},
        {"a": (), "b": ("a",)},
        {"a": (), **{f"b{i}": ("a",) for i in range(12)}, "c": tuple(f"b{i}" for i in range(12))},
        {f"s{i}": tuple(f"s{j}" for j in range(i) if (i * j) % 3 == 1 or j == i - 1) for i in range(7)},
    ],
)
def test_boxes_do_not_overlap_and_lines_go_right(inputs: dict[str, tuple[str, ...]]) -> None:
    given = chain_of(inputs)
    wide, tall = graph.wide(given), graph.tall(given)
    assert wide is not None
    for picture in (wide, tall):
        assert {box.node.name for box in picture.boxes} == set(inputs)
        boxes = picture.boxes
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if overlap(a, b)]
        for box in boxes:
            assert box.x >= 0 and box.y >= 0
            assert box.x + box.width <= picture.width + 0.1 and box.y + box.height <= picture.height + 0.1
        assert {(line.source, line.target) for line in picture.lines} == {
            (r, n) for n, refs in inputs.items() for r in refs
        }
    at = {box.node.name: box for box in wide.boxes}
    for line in wide.lines:
        assert at[line.source].x + at[line.source].width < at[line.target].x
        through = [tuple(map(float, p.split())) for p in re.findall(r"[ML]([\d.]+ [\d.]+)", line.path)]
        for x, y in through[1:]:  # where it turns within a column it is beside the boxes
            assert not [b for b in wide.boxes if b.x <= x <= b.x + b.width and b.y < y < b.y + b.height]


def test_lines_of_the_quickstart_do_not_cross() -> None:
    columns = graph.layers(chain_of(QUICKSTART))
    assert columns[:2] == [["base"], ["sft"]] and columns[-1] == ["eval"] and len(columns) == 6
    given = chain_of(QUICKSTART)
    chains = graph._chains(given, columns)
    pairs = [pair for chain in chains for pair in pairwise(chain)]
    assert graph._crossings(graph._ordered(columns, pairs, {n.name: n for n in given}), pairs) <= 1


def test_long_chains_go_down_and_circles_and_strangers_do_no_harm() -> None:
    long = chain_of({f"s{i}": (f"s{i - 1}",) if i else () for i in range(20)})
    assert graph.wide(long) is None and len(graph.tall(long).boxes) == 20
    odd = chain_of({"a": ("b", "a"), "b": ("a",), "c": ("nobody", "b")})
    wide = graph.wide(odd)
    assert wide is not None and len(wide.boxes) == 3 and len(graph.tall(odd).boxes) == 3
    empty = graph.wide([])
    assert empty is not None and empty.boxes == []


def test_sweeps_are_one_box_where_there_are_many_variants(tmp_path: Path) -> None:
    names = [f"dpo-beta-{i}" for i in range(5)]
    states = ["done", "done", "running", "waiting", "waiting"]
    stages: dict[str, Any] = {"sft": {"record": {"inputs": ["org/model"]}, "manifest": {}}}
    for name, state in zip(names, states, strict=True):
        stages[name] = {"record": {"kind": "dpo", "state": state, "inputs": ["stages.sft"]}}
    stages["eval"] = {"record": {"kind": "evaluate", "state": "waiting", "inputs": [f"stages.{n}" for n in names]}}
    sweeps = {"dpo": {name: {"train.beta": i} for i, name in enumerate(names)}}
    run = read_run(RunFolder(make_run(tmp_path / "run", stages, sweeps=sweeps)))
    given, sft, dpo, judged = graph.nodes(run)
    assert (given.name, given.state, given.href) == ("org/model", "given", "")
    assert sft.inputs == ("org/model",) and judged.inputs == ("dpo",)
    assert (dpo.name, dpo.count, dpo.state, dpo.inputs, dpo.href) == ("dpo", 5, "running", ("sft",), "#sweep-dpo")
    few = {"dpo": {name: {"train.beta": 1} for name in names[:3]}}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"stages": {n: {} for n in names[:3]}, "sweeps": few}))
    assert [n.name for n in graph.nodes(read_run(RunFolder(tmp_path / "run")))] == names[:3]


# ------------------------------------------------------------------------------------------------ results


def test_the_state_of_several_stages_is_what_is_worth_knowing_first() -> None:
    said = {
        "done": ["done", "cached"],
        "cached": ["cached"] * 2,
        "failed": ["done", "running", "failed"],
        "running": ["running", "odd"],
    }
    assert all(graph.state_of(states) == state for state, states in said.items())
    assert graph.state_of(["done", "unknown", "done"]) == "unknown" and graph.state_of(["odd"]) == "odd"


def judged_run(path: Path) -> Path:
    metrics = {
        "sft": {"loss": 0.5, "exact_match": 0.25, "answer_tokens": 5.0},
        "a": {"loss": 0.25, "exact_match": 0.75, "kl": 1.5, "kl_stderr": 0.25},
        "b": {"loss": "oops", "exact_match": 0.5, "kl": float("nan")},
        "c": {"exact_match": 0.625, "kl": 0.5},
    }
    samples = [
        {"prompt": "2+2?", "expected": "4", "answers": {"sft": "5", "a": "4", "b": "5", "c": "4 or so"}},
        {"prompt": "Hi", "expected": None, "answers": {"sft": "Hello", "a": "Hello there"}},
    ]
    made_from = {"inputs": {"model": [{"stage": "sft"}]}}
    stages: dict[str, Any] = {name: {"manifest": made_from} for name in ("a", "b", "c")}
    gates = [{"holds": True, "says": "a is good"}, {"holds": False, "says": "b is <bad>"}, "odd", {"holds": "yes"}]
    stages = {"sft": {"manifest": {}}, **stages} | {
        "eval": {
            "record": {"kind": "evaluate", "gates": gates},
            "manifest": {"produces": "metrics", "metrics": metrics, "details": {"samples": samples}},
        }
    }
    return make_run(path, stages)


def test_models_side_by_side_and_the_frontier(tmp_path: Path) -> None:
    (found,) = evaluations(read_run(RunFolder(judged_run(tmp_path / "run"))))
    assert found.columns == ["held-out loss", "exact match", "answer tokens", "KL to reference"]
    rows = {model: [(c.text, c.best) for c in cells] for model, cells in found.rows}
    assert rows["a"] == [("0.250", True), ("75.0%", True), ("", False), ("1.500 ±0.250", False)]
    assert rows["b"] == [("oops", False), ("50.0%", False), ("", False), ("NaN", False)]
    assert [(g.holds, g.says) for g in found.gates] == [
        (True, "a is good"), (False, "b is <bad>"), (False, "what it says is missing"),
    ]  # fmt: skip
    assert found.frontier is not None
    points = {p["k"]: (p["x"], p["y"]) for p in found.frontier.data["rows"]}
    assert points == {"sft": (0.0, 0.25), "a": (1.5, 0.75), "c": (0.5, 0.625)}  # what they were trained from is at 0
    first, second = found.samples.shown
    assert [(a.models, a.right) for a in first.answers] == [(["sft", "b"], False), (["a"], True), (["c"], False)]
    assert [p.kind for p in first.answers[2].pieces] == ["same", "new"]
    assert second.expected is None and second.answers[0].right is None
    assert [(p.text, p.kind) for p in second.answers[1].pieces] == [("Hello", "same"), (" there", "new")]
    outline = checked(page_of(tmp_path / "run"))
    assert "✗ not met b is <bad>" in outline.text and "exact match against KL" in outline.text


def test_an_evaluation_that_goes_on_shows_the_models_that_are_done(tmp_path: Path) -> None:
    files = {"metrics.jsonl": lines({"step": 0, "model": "sft", "exact_match": 0.5})}
    run = make_run(tmp_path / "run", {"eval": {"record": {"kind": "evaluate", "state": "running"}, "files": files}})
    (found,) = evaluations(read_run(RunFolder(run)))
    assert [model for model, _ in found.rows] == ["sft"] and found.frontier is None


def test_labels_that_would_lie_over_one_another_are_left_out() -> None:
    places = [(0.0, 0.5, ""), (1.0, 0.9, "0.1"), (1.01, 0.9, "0.2"), (3.0, 0.6, "0.3")]
    figure = frontier_chart([Point(f"m{i}", "g", said, x, 0.0, y) for i, (x, y, said) in enumerate(places)], "x", False)
    assert [row["label"] for row in figure.data["rows"]] == ["", "0.1", "", "0.3"]


def test_how_answers_changed(tmp_path: Path) -> None:
    samples = [
        {"iteration": i, "prompt": "2+2?", "answer": "four" if i < 5 else "four !", "reward": i / 10, "stopped": i != 3}
        for i in range(20)
    ]
    samples += [{"iteration": "x"}, {"iteration": 19, "prompt": None, "answer": None, "reward": "NaN"}]
    run = make_run(tmp_path / "run", {"ppo": {"manifest": {}, "files": {"samples.jsonl": lines(*samples)}}})
    found = iterations(read_run(RunFolder(run)).stages["ppo"])
    assert [it.title.partition(":")[0] for it in found] == [f"iteration {i}" for i in (0, 3, 5, 8, 11, 14, 16, 19)]
    assert [[p.kind for p in it.samples[0].answers[0].pieces] for it in found[:4]] == [
        ["same"], ["same"], ["same", "new"], ["same"],
    ]  # fmt: skip
    assert not found[1].samples[0].answers[0].stopped and "mean reward 1.9 of 1" in found[-1].title
    checked(page_of(run))


# ------------------------------------------------------------------------------------------------ whole pages


def full_stage() -> dict[str, Any]:
    details = {
        "trained_tokens": 250, "epochs": 2, "lengths": {"median": 120, "90%": 130, "99%": 1300, "longest": 1300}, "workers": {"workers": 2, "lost": 1},
        "ledger": {"read": 10, "kept": 8, "reasons": {"too_long": 2},
                   "examples": [{"source": "chats.jsonl", "row": 3, "reason": "too_long", "detail": "300 tokens"}]},
        "mixture": [{"path": "chats.jsonl", "format": "messages", "weight": 1.0, "read": 10, "kept": 8, "held_out": 0,
                     "examples": 8, "tokens": 1000, "share_of_tokens": 1.0}],
        "warnings": {"no_stop_token": 3}, "training_warnings": ["answers run away"], "kernels": {"attention": "sdpa"},
    }  # fmt: skip
    handoff = {
        "parameters": 1000, "dtype": "float32", "stop_token_ids": [2, 3], "logits_difference": 1e-6, "logits_allowed": 1e-3,
        "probes": 8, "stops": False, "warnings": ["does not stop"],
    }  # fmt: skip
    manifest = {
        "metrics": {"loss": 0.125, "train_seconds": 3600.0}, "rows": 8, "tokens": 1000, "steps": 40, "seed": 7, "workers": 2,
        "versions": {"torch": "2.0", "trl": "1.0"}, "inputs": {"model": [{"model": "org/base"}]}, "details": details,
        "handoff": handoff,
    }  # fmt: skip
    files = {"metrics.jsonl": lines(*loss(40, eval_loss=0.5), {"step": 40, "kl": 0.75})}
    return {"record": {"seconds": 7200.0, "workers": 2, "started": 1001.0}, "manifest": manifest, "files": files}


def test_a_stage_tells_its_facts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"sft": full_stage()})
    (run / "sft" / "model").mkdir()
    outline = checked(page_of(run))
    text = outline.text
    for said in (
        "trained tokens 250 (25.0%)", "tokens a row 125", "worker-hours 4", "tokens an example median 120, 90% 130, 99% 1,300, longest 1,300", "workers lost 1", "of it training 1 h 00 min",
        "10 rows read, 8 used ; left out: 2 too long (20.0%)".replace(" ;", ";"), "chats.jsonl:3", "300 tokens",
        "3 rows:", "answers run away", "does not stop", "read again it computes the same on 8 probes",
        "its answers do not end", "stop tokens 2, 3", "AutoModelForCausalLM.from_pretrained(folder)",
        f"raylign chat {run} --stage sft", "torch 2.0", "org/base", "name: run", "attention: sdpa", "loss 0.125",
        "The same at every step: loss, held out 0.5", "Logged once: kl 0.75",
    ):  # fmt: skip
        assert said in text, said
    titles = re.findall(r"<figcaption><b>(.*?)</b>", (run / "report.html").read_text())
    assert titles == ["loss", "tokens a second", "learning rate"]
    assert outline.tags.count("h1") == 1 and "reload" in (run / "report.html").read_text()


def test_what_a_stage_cost(tmp_path: Path) -> None:
    """Hours of the workers it had, not of those it might have had; its bar is that of this run's attempt."""
    stage = full_stage()
    stage["record"] |= {"workers": 8, "started": 1030.0, "seconds": 3630.0, "earlier": 3600.0}
    stage["manifest"]["workers"] = 8
    page = page_of(make_run(tmp_path / "run", {"sft": stage}))
    assert "workers 2 worker-hours 2.02" in checked(page).text
    assert "margin-left: 50.0%; width: 50.0%" in page
    stage["record"] |= {"state": "running", "started": time.time() - 30}
    page = page_of_live(
        make_run(tmp_path / "live", {"sft": stage}, state="running", started=time.time() - 60, finished=None)
    )
    assert "1 h 00 min" in checked(page).text


def test_what_is_written_while_the_run_goes_on(tmp_path: Path) -> None:
    files = {
        "metrics.jsonl": lines(*loss(5)) + '{"step": 6, "lo',  # it is being written
        "events.jsonl": lines({"phase": "train"}, {"done": 5, "total": 20, "unit": "step"}) + '{"do',
        "ledger.json": json.dumps({"read": 4, "kept": 3, "reasons": {"too_long": 1}, "examples": []}),
    }
    stages: dict[str, Any] = {
        "sft": {"record": {"state": "running", "seconds": None, "started": time.time() - 30}, "files": files},
        "dpo": {"record": {"kind": "dpo", "state": "waiting", "seconds": None, "inputs": ["stages.sft"]}},
    }
    path = make_run(tmp_path / "run", stages, state="running", started=time.time() - 60, finished=None)
    folder = RunFolder(path)
    told: list[str] = []
    live = LiveReport(folder, told.append)
    with folder.lock():  # as the runner has it
        live.follow()
        first = (path / "report.html").read_text()
        live.write(final=True)
        text = (path / "report.html").read_text()
    assert not told and 'data-every="15"' in first and "<noscript><meta http-equiv" in first
    outline = checked(text)
    assert "train 5 of 20 steps" in outline.text and '<progress value="0.25"' in text
    assert (
        "4 rows read, 3 used; left out: 1 too long (25.0%)" in outline.text and 'data-from="sft" data-to="dpo"' in text
    )
    assert "What is missing" not in outline.text and 'class="plot"' in text
    # written by hand when the runner is gone: it does not wait for more
    text = page_of(path)
    assert "its process is gone" in text and 'data-every="' not in text and ">running<" not in text


def test_the_page_is_written_when_something_changed_or_some_time_has_passed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {}, state="running")
    live = LiveReport(RunFolder(path), print)
    live.follow()
    file = path / "report.html"
    file.unlink()
    live.follow()
    live.change()
    live.follow()
    assert not file.exists()  # a moment ago it was written
    live.written -= 2
    live.follow()
    assert file.exists() and not live.changed
    file.unlink()
    live.written -= 10
    live.follow()
    assert not file.exists()
    live.written -= 10
    live.follow()
    assert file.exists()
    live.write(final=True)


def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    live = LiveReport(RunFolder(tmp_path / "nowhere" / "run"), told.append)
    live.write()
    live.write(final=True)
    (said,) = told
    assert said.startswith("report.html could not be written (FileNotFoundError: ") and "\n" not in said


def test_a_page_is_cheap(tmp_path: Path) -> None:
    stages = {f"s{i}": full_stage() | {"files": {"metrics.jsonl": lines(*loss(300))}} for i in range(8)}
    folder = RunFolder(make_run(tmp_path / "run", stages))
    write_report(folder)
    taken = []
    for _ in range(3):
        start = time.process_time()
        write_report(folder)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.3
    assert (folder.path / "report.html").stat().st_size < 1_500_000


def test_thousands_of_points_and_hundreds_of_samples(tmp_path: Path) -> None:
    samples = [
        {
            "prompt": f"prompt {i} " + "long " * 2000,
            "expected": "x",
            "answers": {f"m{j}": f"{i * j} word" for j in range(5)},
        }
        for i in range(300)
    ]
    metrics = {f"m{j}": {"exact_match": j / 5} for j in range(5)}
    stages: dict[str, Any] = {"sft": {"manifest": {}, "files": {"metrics.jsonl": lines(*loss(20_000))}}}
    stages["eval"] = {
        "record": {"kind": "evaluate"},
        "manifest": {"produces": "metrics", "metrics": metrics, "details": {"samples": samples}},
    }
    page = page_of(make_run(tmp_path / "run", stages))
    assert "prompt 5 " in page and "94 more" in page and "200 more are in the run folder" in page
    data = json.loads(re.search(r'id="figures">(.*?)</script>', page)[1])  # type: ignore[index]
    assert all(len(line["x"]) <= 500 for figure in data for line in figure["data"].get("lines", []))
    checked(page)


# ------------------------------------------------------------------------------------------------ bad input


def test_whatever_names_and_values_are_they_are_text(tmp_path: Path) -> None:
    manifest = {
        "produces": "model", "metrics": {HOSTILE: HOSTILE, "loss": 1.0}, "versions": {HOSTILE: HOSTILE}, "rows": HOSTILE,
        "config": {HOSTILE: HOSTILE}, "seed": HOSTILE, "inputs": {HOSTILE: [{"stage": HOSTILE}]},
        "handoff": {"dtype": HOSTILE, "warnings": [HOSTILE], "stop_token_ids": [HOSTILE]},
        "details": {
            "ledger": {"read": 2, "kept": HOSTILE, "reasons": {HOSTILE: 1, "b": HOSTILE},
                       "examples": [{"source": HOSTILE, "row": HOSTILE, "reason": HOSTILE, "detail": HOSTILE}]},
            "warnings": {HOSTILE: HOSTILE}, "kernels": {HOSTILE: HOSTILE}, "mixture": [{"path": HOSTILE, "tokens": HOSTILE}],
            "samples": [{"prompt": HOSTILE, "expected": HOSTILE, "reason": HOSTILE,
                         "answers": [{"text": HOSTILE, "use": HOSTILE, "reward": HOSTILE}]}],
        },
    }  # fmt: skip
    metrics = [
        {"step": i, HOSTILE: float(i), "loss": float(i), f"rewards/{HOSTILE}": float(-i), "reward": i} for i in range(9)
    ]
    files = {
        "metrics.jsonl": lines(*metrics),
        "samples.jsonl": lines({"iteration": 1, "prompt": HOSTILE, "answer": HOSTILE, "reward": HOSTILE}),
    }
    record = {"kind": HOSTILE, "state": "failed", "error": HOSTILE, "waiting": HOSTILE, "gates": [{"says": HOSTILE}]}
    judged = {
        "record": {"kind": "evaluate", "gates": [{"says": HOSTILE}]},
        "manifest": {
            "metrics": {HOSTILE: {"exact_match": 0.5, "kl": 1.0}, "b": {"exact_match": HOSTILE, "kl": 1.0}, "c": {"exact_match": 1, "kl": 2}},
            "details": {"samples": [{"prompt": HOSTILE, "expected": HOSTILE, "answers": {HOSTILE: HOSTILE}}]},
        },
    }  # fmt: skip
    stages: dict[str, Any] = {
        "sft": {"record": record | {"inputs": [HOSTILE]}, "manifest": manifest, "files": files}, "eval": judged,
    }  # fmt: skip
    run = make_run(tmp_path / "run", stages, name=HOSTILE, sweeps={HOSTILE: {"sft": {HOSTILE: HOSTILE}}})
    (run / "spec.yaml").write_text(HOSTILE)
    page = page_of(run)
    outline = checked(page)
    assert (
        "img" not in outline.tags
        and outline.tags.count("script") == 3
        and "49" not in re.findall(r"\b49\b", outline.text)
    )
    assert outline.text.count("<img src=x") > 20
    data = re.search(r'id="figures">(.*?)</script>', page)
    assert data is not None and not set("<>&") & set(data[1]) and json.loads(data[1])


def test_long_names_and_halves_of_characters(tmp_path: Path) -> None:
    state = {"name": "x" * 5000 + "\ud800", "stages": {"n" * 120: {"kind": "k" * 300, "state": "s" * 300}}}
    run = make_run(tmp_path / "run", {})
    (run / "run.json").write_text(json.dumps(state))
    outline = checked(page_of(run))
    assert "n" * 120 in outline.text


def test_a_run_without_stages(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", {}))
    assert "There are no stages in this run" in page and "<script" not in page
    checked(page)


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "null", '{"stages": []}', '{"stages": {"a": 1}, "sweeps": {"s": [1]}}', "\x00\xff"]
)
def test_a_damaged_record_leaves_the_stages_that_are_published(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run", {"sft": full_stage()})
    (run / "run.json").write_text(text)
    outline = checked(page_of(run))
    assert "What is missing on this page" in outline.text
    if "sweeps" not in text:
        assert "its stages are those that have a manifest: sft" in outline.text and "trained tokens" in outline.text


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "null", '{"metrics": 1, "details": [], "handoff": "x", "inputs": [1]}', "{" * 5000]
)
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run", {"sft": full_stage(), "dpo": {"manifest": {"metrics": {"loss": 1.0}}}})
    (run / "sft" / "manifest.json").write_text(text)
    outline = checked(page_of(run))
    assert "sft: done, but its manifest is missing" in outline.text and "loss 1.000" in outline.text


def test_files_that_are_missing_or_torn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"sft": full_stage(), "dpo": {"manifest": None}})
    (run / "spec.yaml").unlink()
    file = run / "sft" / "metrics.jsonl"
    file.write_text("not json\n" + file.read_text() + '[1]\n{"step": 41, "loss": NaN, "x": Infinity}\n{"step": 42, "lo')
    (run / "sft" / "samples.jsonl").write_bytes(b"\xff\xfe{}\n")
    outline = checked(page_of(run))
    for said in (
        "spec.yaml is missing", "dpo: done, but its manifest is missing",
        "sft/metrics.jsonl: 3 of 45 lines cannot be read, the first is line 1",
        "sft/samples.jsonl: 1 of 1 lines cannot be read", "sft: loss: 1 of its values are not numbers",
        "sft: x: 1 of its values are not numbers",
    ):  # fmt: skip
        assert said in outline.text, said
    (run / "run.json").unlink()
    (run / "spec.yaml").write_text("name: run\n")
    assert "run.json is missing" in checked(page_of(run)).text


def test_a_run_of_another_version(tmp_path: Path) -> None:
    """Keys that are not there, and keys that nobody knows."""
    run = tmp_path / "run"
    (run / "sft").mkdir(parents=True)
    (run / "sft" / "manifest.json").write_text(
        '{"fingerprint": "f", "future": {"x": 1}, "metrics": {"loss": 1}, "rows": "many"}'
    )
    (run / "run.json").write_text('{"stages": {"sft": {"fingerprint": "f", "future": []}, "b": {}}, "version": 99}')
    outline = checked(page_of(run))
    assert "loss 1" in outline.text and "future" in outline.text and "spec.yaml is missing" in outline.text


@pytest.mark.parametrize("key", ["name", "state", "started", "finished", "stages", "sweeps"])
@pytest.mark.parametrize(
    "value", [None, 1, "x", [], {}, {"a": None}, {"a": {"b": 1}}, [1], float("nan"), 1e400, 10**400, -5, True]
)
def test_no_value_of_the_record_stops_the_page(tmp_path: Path, key: str, value: Any) -> None:
    run = make_run(tmp_path / "run", {"sft": full_stage()})
    state = json.loads((run / "run.json").read_text()) | {key: value}
    (run / "run.json").write_text(json.dumps(state))
    checked(page_of(run))


@pytest.mark.parametrize(
    "key", ["kind", "state", "started", "seconds", "workers", "gates", "error", "waiting", "inputs", "fingerprint"]
)
@pytest.mark.parametrize("value", [None, 1, "x", [], {}, ["a", None], {"a": 1}, float("inf"), 10**400, -5])
def test_no_value_of_a_stage_s_record_stops_the_page(tmp_path: Path, key: str, value: Any) -> None:
    stage = full_stage()
    run = make_run(tmp_path / "run", {"sft": stage})
    state = json.loads((run / "run.json").read_text())
    state["stages"]["sft"][key] = value
    (run / "run.json").write_text(json.dumps(state))
    checked(page_of(run))


@pytest.mark.parametrize(
    "value", [None, 1, "x", [], {}, [None], {"a": 1}, {"a": [1]}, [{"a": 1}], float("nan"), 10**400, True]
)
def test_no_value_of_a_manifest_stops_the_page(tmp_path: Path, value: Any) -> None:
    def variants(given: dict[str, Any]) -> list[dict[str, Any]]:
        out = [given | {key: value} for key in given]
        for key, inner in given.items():
            if isinstance(inner, dict):
                out += [given | {key: changed} for changed in variants(inner)]
        return out

    for i, manifest in enumerate(variants(full_stage()["manifest"])):
        checked(page_of(make_run(tmp_path / str(i), {"sft": full_stage() | {"manifest": manifest}})))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: not the record of a run"):
        open_run(tmp_path)
    run = make_run(tmp_path / "run", {"sft": full_stage()})
    for folder in (run / "sft", tmp_path):
        with pytest.raises(DataError):
            report_again(str(folder))
    assert not (tmp_path / "report.html").exists() and not (run / "sft" / "report.html").exists()


def test_names_that_lead_out_of_the_folder_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"sft": full_stage()})
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "manifest.json").write_text('{"fingerprint": "f", "metrics": {"loss": 4242}}')
    state = {"stages": {"../secret": {"fingerprint": "f"}, "sft": {"fingerprint": "../../secret"}}}
    (run / "run.json").write_text(json.dumps(state))
    outline = checked(page_of(run))
    assert "4,242" not in outline.text and "'../secret' is no name of a stage" in outline.text


def test_how_far_a_stage_is(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    assert progress(events) == (None, "")
    events.write_text(lines({"phase": "prepare"}))
    assert progress(events) == (None, "prepare")
    filler = [{"done": i, "total": 400, "unit": "step"} for i in range(300)]
    events.write_text(lines({"phase": "train"}, *filler) + "torn")
    assert progress(events)[0] == 299 / 400
    events.write_text(lines({"phase": "train"}, {"done": "x", "total": 0}, {"done": 3, "total": 2, "unit": "step"}))
    assert progress(events) == (1.0, "train 3 of 2 steps")


# ------------------------------------------------------------------------------------------------ the library


def test_the_library_is_made_once_and_kept(tmp_path: Path) -> None:
    first = Library(tmp_path)
    assert first.process is not None and first.text(wait=False) is None
    made = first.text(wait=True)
    first.close()
    assert made is not None and not set("<>&\"'") & set(made)
    again = Library(tmp_path)
    assert again.process is None and again.text(wait=False) == made
    assert [file.name for file in tmp_path.iterdir()] == [again.file.name]


def test_without_a_place_to_keep_it_the_library_is_made_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    library = Library(tmp_path / "file" / "cache")
    made = library.temporary
    assert library.text(wait=True) is not None and made is not None and made.is_file()
    library.close()
    assert not made.exists()


def test_a_library_that_is_not_waited_for_leaves_nothing(tmp_path: Path) -> None:
    library = Library(tmp_path)
    library.close()
    assert list(tmp_path.iterdir()) == []


def test_a_page_whose_charts_cannot_be_drawn_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.charts.MAKE", "raise SystemExit('no room')")
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    page = page_of(make_run(tmp_path / "run", {"sft": full_stage()}))
    outline = checked(page)
    assert (
        "vl-convert-python failed: no room" in outline.text
        and "trained tokens" in outline.text
        and "<script" not in page
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYLIGN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it is where nobody knows the user
    library = Library()
    made = library.temporary
    library.close()
    assert made is not None and not made.exists()
