"""The pages of evaluations and FAQ predictions: the numbers of the files, the questions that are asked for."""

import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import ROOT
from starlette.applications import Starlette
from starlette.testclient import TestClient

from eval import samples
from eval.samples import Answer, Sample
from faq.score import score
from serve.console import evaluations
from serve.console.evaluations import DIMENSIONS, Evaluations, labels_of
from serve.console.faq import intents_of, matrix_of, read_predictions
from serve.console.mount import Mounted
from serve.console.radar import RADIUS, SIZE, radar
from serve.console.routes import routes

SCRIPT = "<script>alert(1)</script>"
NOTE = "3 titles without keywords are left out"


def five(folder: Path, model: str, scores: dict[str, float], answers: list[str]) -> None:
    """Results of five dimensions as the command writes them, with samples of the first one."""
    (folder / "samples").mkdir(parents=True)
    parts = {
        name: {
            "metric": "accuracy",
            "metrics": {"accuracy": {"mean": value, "interval_95": [value / 2, value], "samples": 3}},
            "floor": {"what": "majority", "score": 0.25}, "ceiling": {"what": "every answer right", "score": 1.0},
        }
        for name, value in scores.items()
    }  # fmt: skip
    told = {
        "command": "evaluate_model_from_five_dimensions", "model": f"/models/{model}", "settings": {}, "seconds": 1.5,
        "evaluation_results": scores, "diagnosis": {DIMENSIONS[0]: [f"a note {SCRIPT}", NOTE]}, "dimensions": parts,
    }  # fmt: skip
    (folder / "eval_results.json").write_text(json.dumps(told))
    rows = [
        {"id": str(i), "group": "", "prompt": f"question {i} {SCRIPT}", "prediction": answer, "references": ["yes"],
         "scores": {"accuracy": float(answer == "yes"), "acc_norm": 0.0}}
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples" / f"{DIMENSIONS[0]}.jsonl").write_text(lines)


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """Two models' evaluations, and predictions of intents."""
    five(tmp_path / "one", "first", dict.fromkeys(DIMENSIONS, 0.5), ["yes", "no", "yes"])
    five(tmp_path / "two", "second", dict.fromkeys(DIMENSIONS[:4], 0.25), ["yes", "yes", SCRIPT])
    (tmp_path / "eval_results.json").write_text('{"command": "someone else"}')
    rows = [
        {"question": f"q{i} {SCRIPT}", "intent": predicted, "reference": true, "probability": probability,
         "known": True, "runner_up": {"intent": "B", "probability": 0.1}}
        for i, (true, predicted, probability) in enumerate(
            [("A", "A", 0.9), ("A", "B", 0.4), ("B", "B", 0.8), ("C", "B", 0.7), ("C", "C", 0.55), ("A", "B", 0.3)]
        )
    ]  # fmt: skip
    (tmp_path / "faq").mkdir()
    (tmp_path / "faq" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "faq" / "intents.json").write_text(json.dumps({"intents": {"A": "", "B": "", "C": "", "D": ""}}))
    return tmp_path


@pytest.fixture
def client(mount: Path) -> Iterator[TestClient]:
    """A browser without scripts."""
    with TestClient(Starlette(routes=routes(mount))) as opened:
        yield opened


def test_results(mount: Path) -> None:
    found = dict(Evaluations(Mounted(mount)).all())
    assert found["eval_results.json"] is None  # of somebody else
    score = found["one/eval_results.json"].scores[DIMENSIONS[0]]
    assert (score.value, score.low, score.high, score.floor, score.ceiling, score.samples) == (
        0.5,
        0.25,
        0.5,
        0.25,
        1,
        3,
    )
    known = [(name, result) for name, result in found.items() if result]
    assert labels_of(known) == ["first", "second"]
    assert labels_of([known[0], ("other/eval_results.json", known[0][1])]) == ["first (one)", "first (other)"]


@pytest.mark.parametrize("value", ["NaN", "1e999", "1" + "0" * 400, "null", "[null, 0.5]", "[0.9, 0.1]", '"x"', "-5"])
def test_values_of_any_kind(mount: Path, client: TestClient, value: str) -> None:
    """Whatever stands in the files of an evaluation or of predictions, their pages say it or a sentence."""
    for name in ("eval_results.json", f"samples/{DIMENSIONS[0]}.jsonl"):
        path = mount / "one" / name
        for old in ("[0.25, 0.5]", '"score": 0.25', '"accuracy": 1.0', '"seconds": 1.5'):
            key = old.rpartition(": ")[0]
            path.write_text(path.read_text().replace(old, f"{key}: {value}" if key else value))
    path = mount / "faq" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"probability": 0.9', f'"probability": {value}'))
    names = {"a": "one/eval_results.json", "b": "two/eval_results.json", "set": DIMENSIONS[0]}
    assert client.get("/evaluations/samples", params=names | {"show": "better"}).status_code == 200
    for path in ("/evaluations", "/evaluations?result=one/eval_results.json", "/faq", "/faq?below=0.5"):
        assert client.get(path).status_code == 200


def test_radar(mount: Path) -> None:
    found = Evaluations(Mounted(mount))
    results = [found.one(f"{name}/eval_results.json") for name in ("one", "two")]
    drawn = radar(results, DIMENSIONS)
    assert drawn is not None
    for shape, share, points in zip(
        drawn.shapes, (0.5, 0.25), (5, 4), strict=True
    ):  # the second was not asked the last
        reach = [math.hypot(x - SIZE / 2, y - SIZE / 2) / RADIUS for x, y in shape.points]
        assert reach == pytest.approx([share] * points, abs=1e-3)
    assert drawn.shapes[0].points[0] == (SIZE / 2, SIZE / 2 - RADIUS / 2)  # the first dimension is up
    assert radar(results, DIMENSIONS[:2]) is None


def test_page_of_evaluations(client: TestClient) -> None:
    page = client.get("/evaluations?result=one/eval_results.json&result=two/eval_results.json").text
    assert page.count('class="area"') == 2
    for text in ("0.500", "[0.250, 0.500]", "majority", "every answer right", "a note &lt;script&gt;", NOTE):
        assert text in page
    chinese = client.get("/evaluations?result=one/eval_results.json", headers={"accept-language": "zh-CN"}).text
    for text in ("舍去 3 个没有关键词的标题", "最常见的答案", "全部答对"):
        assert text in chinese
    assert "<script>alert" not in page
    assert client.get("/evaluations?result=../one/eval_results.json").status_code == 404
    assert client.get("/evaluations?result=eval_results.json").status_code == 422


@pytest.mark.parametrize(("show", "search", "ids"), [
    ("all", "", [0, 1, 2]), ("right", "", [0, 2]), ("wrong", "", [1]), ("differ", "", [1, 2]), ("better", "", [2]),
    ("worse", "", [1]), ("all", "QUESTION 1", [1]), ("differ", "nowhere", []),
])  # fmt: skip
def test_samples(client: TestClient, show: str, search: str, ids: list[int]) -> None:
    names = {"a": "one/eval_results.json", "b": "two/eval_results.json", "set": DIMENSIONS[0]}
    page = client.get("/evaluations/samples", params=names | {"show": show, "q": search}).text
    assert [int(number) for number in re.findall(r'<p class="small quiet">#(\d+)', page)] == ids
    assert "<script>alert" not in page


def performance(folder: Path, data: str, rows: list[dict[str, object]]) -> str:
    """Results of a data set of the user's, as the command writes them; their name."""
    (folder / "samples").mkdir(parents=True)
    told = {"command": "model_performance_evaluation", "model": f"/models/{folder.name}", "dataset_path": data,
            "evaluation_results": {"Acc": 0.5}, "metrics": {}, "baselines": {}}  # fmt: skip
    (folder / "eval_results.json").write_text(json.dumps(told))
    lines = "".join(json.dumps({"id": "", "group": "", "references": ["yes"]} | row) + "\n" for row in rows)
    (folder / "samples" / "model_performance.jsonl").write_text(lines)
    return f"{folder.name}/eval_results.json"


def rows_of(*questions: str, model: str, told: bool = True) -> list[dict[str, object]]:
    """Rows of the command's own making: the prompts are in the model's format."""
    made = [Sample(question, ("yes",)) for question in questions]
    answers = [Answer(f"k{i}", f"{model} to {q}", f"<{model}>{q}", 3, False) for i, q in enumerate(questions)]
    rows = samples.rows_of(made, answers, [{"Acc": 1.0}] * len(made))
    return [row if told else {key: value for key, value in row.items() if key != "asked"} for row in rows]


@pytest.mark.parametrize(("models", "told", "expected", "lacking", "prompts"), [
    ("ab", True, {"q1": "b to q1", "q2": "b to q2", "q3": None, "q1 again": "b to q1"}, 1, False),
    ("aa", False, {"q1": "a to q1", "q2": "a to q2", "q3": None, "q1 again": "a to q1"}, 1, True),  # an older version's
    ("ab", False, {"q1": None, "q2": None, "q3": None, "q1 again": None}, 4, True),
])  # fmt: skip
def test_samples_of_a_data_set_are_paired_by_what_was_asked(
    tmp_path: Path, models: str, told: bool, expected: dict[str, str | None], lacking: int, prompts: bool
) -> None:
    """The other model was asked in another order, and not the same."""
    one = performance(tmp_path / "one", "/a/data.jsonl", rows_of("q1", "q2", "q3", "q1", model=models[0], told=told))
    two = performance(tmp_path / "two", "/b/data.jsonl", rows_of("q2", "q1", "q4", "q1", model=models[1], told=told))
    performance(tmp_path / "three", "/b/other.jsonl", rows_of("q1", model="a"))
    found = Evaluations(Mounted(tmp_path)).asked(one, two, "model_performance")
    assert [row.other["prediction"] if row.other else None for row in found.rows] == list(expected.values())
    assert (found.alone, found.lacking, found.others, found.prompts) == (
        list(expected.values()).count(None), lacking, 4, prompts,
    )  # fmt: skip
    with TestClient(Starlette(routes=routes(tmp_path))) as client:
        names = {"a": one, "b": two, "set": "model_performance"}
        page = client.get("/evaluations/samples", params=names).text
        assert f"{found.alone} of these 4 samples have no counterpart, and {lacking} of the other model&#39;s 4" in page
        assert ("between chat formats" in page) == prompts
        assert f'<option value="{two}" selected>' in page
        assert "three/" not in page  # another data set
        alone = client.get("/evaluations/samples", params=names | {"show": "unpaired"}).text
        assert len(re.findall(r'<p class="small quiet">#', alone)) == found.alone
        chosen = client.get("/evaluations", params={"result": ["three/eval_results.json", one, two]}).text
        assert f"samples?a={quote(one, '')}&amp;b={quote(two, '')}&amp;set=model_performance" in chosen


def test_ids_of_other_data_are_no_pair(mount: Path) -> None:
    path = mount / "two" / "samples" / f"{DIMENSIONS[0]}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["references"] = ["no"]  # the same id in another version of the benchmark
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Evaluations(Mounted(mount)).asked("one/eval_results.json", "two/eval_results.json", DIMENSIONS[0])
    assert [row.other is None for row in found.rows] == [False, True, False]


def test_a_sample_without_a_metric_is_not_scored(mount: Path, client: TestClient) -> None:
    path = mount / "one" / "samples" / f"{DIMENSIONS[0]}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["scores"] = {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"a": "one/eval_results.json", "b": "two/eval_results.json", "set": DIMENSIONS[0]}
    shown = {}
    for show in ("right", "wrong", "unscored", "better", "worse", "differ"):
        page = client.get("/evaluations/samples", params=names | {"show": show}).text
        shown[show] = [int(number) for number in re.findall(r'<p class="small quiet">#(\d+)', page)]
    assert shown == {"right": [0, 2], "wrong": [], "unscored": [1], "better": [2], "worse": [], "differ": [1, 2]}
    assert '<span class="tag">not scored</span>' in client.get("/evaluations/samples", params=names).text


def test_links_to_samples_lead_somewhere(mount: Path, client: TestClient) -> None:
    """The second model was not asked everything, and most files of samples are gone."""
    (mount / "one" / "samples" / f"{DIMENSIONS[4]}.jsonl").write_text('{"id": "0", "prediction": "x"}\n')
    page = client.get("/evaluations?result=one/eval_results.json&result=two/eval_results.json").text
    links = [html.unescape(link) for link in re.findall(r'href="(/evaluations/samples[^"]*)"', page)]
    assert len(links) == 3
    assert {client.get(link).status_code for link in links} == {200}
    assert page.count("whose file is not here") == 6
    single = client.get("/evaluations/samples", params={"a": "one/eval_results.json", "set": DIMENSIONS[4]}).text
    assert "two/" not in single


def test_samples_stay_inside(client: TestClient) -> None:
    for of in ("../../etc/passwd", "nothing", ""):
        answer = client.get("/evaluations/samples", params={"a": "one/eval_results.json", "set": of})
        assert answer.status_code in (404, 422)


def test_intents_are_counted_as_score_counts(mount: Path) -> None:
    path = mount / "faq" / "predictions.jsonl"
    rows = read_predictions(path)
    told = score([json.loads(line) for line in path.read_text().splitlines()], "D")
    table = {row.name: row for row in intents_of(rows, ["A", "B", "C", "D"])}
    assert set(table) == {"A", "B", "C", "D"}
    for name, figures in told["per_intent"].items():
        assert table[name].questions == figures["questions"]
        assert table[name].right / table[name].questions == pytest.approx(figures["accuracy"], abs=1e-4)
    matrix = matrix_of(rows)
    for pair in told["most_confused"]:
        assert matrix.counts[pair["intent"], pair["predicted"]] == pair["count"]
    assert (matrix.largest, matrix.left_out, matrix.names[0]) == (2, 0, "B")


@pytest.mark.parametrize(("asked", "questions"), [
    ({}, [0, 1, 2, 3, 4, 5]), ({"true": "A", "predicted": "B"}, [1, 5]), ({"below": "0.5"}, [1, 5]),
    ({"wrong": "1"}, [1, 3, 5]), ({"wrong": "1", "below": "0.35"}, [5]), ({"q": "Q4"}, [4]), ({"below": "0"}, []),
])  # fmt: skip
def test_questions(client: TestClient, asked: dict[str, str], questions: list[int]) -> None:
    page = client.get("/faq", params={"file": "faq/predictions.jsonl"} | asked).text
    assert [int(number) for number in re.findall(r'<td class="wrap">q(\d)', page)] == questions
    assert "<script>alert" not in page


def test_wrong_questions(client: TestClient, mount: Path) -> None:
    assert "below is &#39;x&#39;, expected a number from 0 to 1" in client.get("/faq?below=x").text
    assert client.get("/faq?below=nan").status_code == 422
    assert client.get("/faq?file=../x").status_code == 404
    (mount / "faq" / "predictions.jsonl").write_text('{"question": 3}\n')
    assert "predictions.jsonl:1: no question with an intent" in client.get("/faq").text


def test_predictions_that_are_too_large(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "BIGGEST", 100)
    assert "predictions.jsonl has more than 0 MiB" in client.get("/faq").text


def test_an_empty_mount(tmp_path: Path) -> None:
    with TestClient(Starlette(routes=routes(tmp_path / "not-there"))) as client:
        for path in ("/", "/evaluations", "/faq", "/curator", "/compare"):
            assert client.get(path).status_code == 200


def test_demo_files_are_what_is_tested_here() -> None:
    """The names above are the commands' own."""
    from eval import answers
    from serve.console import runs
    from train import run_folder

    assert (evaluations.FIVE, evaluations.PERFORMANCE, evaluations.SAMPLES) == (
        answers.FIVE, answers.PERFORMANCE, answers.SAMPLES,
    )  # fmt: skip
    assert (runs.RESULTS_NAME, runs.STOP_NAME) == (run_folder.RESULTS_NAME, run_folder.STOP_NAME)
    assert (ROOT / "eval" / "dimensions").is_dir()
