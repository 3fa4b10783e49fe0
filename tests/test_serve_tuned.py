"""Base and tuned model from one set of weights, models without our attention, FAQ intents: in this process."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_adapter import INTENTS
from serve_inside import QUESTIONS, answers, ask, opened, rendered

from llmops.console import UserError
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from serve.settings import Limits, Model

ASKED = ["我的包裹到哪了", "怎么退钱", "密码忘了", "要发票", "今天天气如何", "退款多久到账"]


@pytest.fixture(scope="module")
def service(adapter: Path) -> Iterator[Any]:
    """Both models."""
    with opened(Model(adapter), adapter / "fed" / "feedback.jsonl") as found:
        yield found


def greedy(model: Any, prompts: list[list[int]], service: Any) -> list[str]:
    """Transformers' own answers, one prompt at a time."""
    import torch

    found = []
    for ids in prompts:
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        found.append(service.decode(out.tolist()))
    return found


def test_base_and_tuned_answer_side_by_side(service: Any, adapter: Path, checkpoints: dict[str, Path]) -> None:
    import torch

    from serve.model.asked import read_completion
    from serve.model.exchange import Exchange

    prompts = rendered(service, QUESTIONS[:10])
    base = greedy(ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32).eval(), prompts, service)
    merged = ChatModel(Checkpoint(adapter)).load(torch.float32, merge=True).eval()
    tuned = greedy(merged, prompts, service)
    assert base != tuned
    assert service.names == ["tuned", "base"]

    async def one(name: str, ids: list[int]) -> str:
        asked = read_completion({"prompt": ids, "model": name, "temperature": 0, "max_tokens": 8}, service.limits).asked
        return "".join([event.text async for _, event in Exchange(service, asked, [ids]).told()])

    async def both() -> list[str]:
        return await asyncio.gather(*(one(name, ids) for ids in prompts for name in ("base", "tuned")))

    for _ in range(2):  # the second time beginnings are known, which are not the same for both
        found = asyncio.run(both())
        assert found[::2] == base
        assert found[1::2] == tuned


def test_memory_for_beginnings_is_of_both_models_together(service: Any) -> None:
    ids = rendered(service, ["A long question. " * 30])[0]
    lanes, most = list(service.engine.lanes.values()), 0
    lanes[0].room.clear()
    for name in ("base", "tuned", "base", "tuned"):
        _, exchange = answers(service, [ids], model=name, temperature=0, max_tokens=2)
        most = most or 3 * lanes[1].known_bytes // 2  # of one conversation and a half
        lanes[0].room.most_bytes = most
        assert exchange.answers[0].cached == 0, name  # the other one's took its place
        assert 0 < sum(lane.known_bytes for lane in lanes) == lanes[0].room.bytes <= most
    lanes[0].room.clear()
    lanes[0].room.most_bytes = service.limits.prefix_bytes


def test_an_adapter_alone_is_merged(adapter: Path, service: Any) -> None:
    from serve.model.service import open_service

    prompts = rendered(service, QUESTIONS[:3])
    expected = answers(service, prompts, temperature=0, max_tokens=8)[0]
    alone = open_service(Model(adapter, base_too=False), Limits(), adapter / "feedback.jsonl")
    try:
        assert alone.names == ["tuned"]
        assert answers(alone, prompts, temperature=0, max_tokens=8)[0] == expected
    finally:
        assert alone.close()


def test_a_model_without_our_attention_answers_batch_by_batch(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from llmops.generation.passes import Passes
    from serve.model import service as module

    monkeypatch.setattr(module, "Passes", lambda model, pad, _: Passes(model, pad, False))
    plain = module.open_service(Model(checkpoints["qwen2"]), Limits(rows=4), tmp_path / "feedback.jsonl")
    try:
        prompts = rendered(plain, QUESTIONS[:6])
        model = plain.model.weights(torch.float32).eval()
        expected = greedy(model, prompts, plain)
        assert answers(plain, prompts, temperature=0, max_tokens=8)[0] == expected
        assert answers(plain, prompts, temperature=0, max_tokens=8, stream=True)[0] == expected
        stop = expected[0][3:5]
        cut, exchange = answers(plain, prompts[:1], temperature=0, max_tokens=8, stop=stop)
        assert cut == [expected[0][: expected[0].index(stop)]]
        assert exchange.answers[0].finish == "stop"
        seeded = [answers(plain, prompts[:k], max_tokens=6, seed=5, top_p=0.9)[0][0] for k in (1, 3)]
        assert seeded[0] == seeded[1]
    finally:
        assert plain.close()


def test_time_that_is_over_ends_a_batch_and_not_the_server(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmops.generation.passes import Passes
    from serve.model import service as module
    from serve.model.asked import read_completion
    from serve.model.exchange import Exchange

    monkeypatch.setattr(module, "Passes", lambda model, pad, _: Passes(model, pad, False))
    plain = module.open_service(Model(checkpoints["qwen2"]), Limits(rows=4, seconds=0.4), tmp_path / "feedback.jsonl")
    prompts = rendered(plain, QUESTIONS[:2])
    asked = read_completion({"prompt": prompts, "max_tokens": 3000, "stop": "never there", "temperature": 0},
                            plain.limits).asked  # fmt: skip

    async def ends(hang_up: bool) -> list[str | None]:
        """How the answers to all prompts end; with `hang_up` nobody waits for them."""
        async with asyncio.timeout(30):
            told = Exchange(plain, asked, prompts).told()
            if not hang_up:
                return [event.finish async for _, event in told]
            waiting = asyncio.ensure_future(anext(told))
            while not plain.engine.running:
                await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            while plain.engine.running and plain.alive:
                await asyncio.sleep(0.01)
            return []

    try:
        assert asyncio.run(ends(False)) == ["length"] * 2
        plain.limits = Limits(rows=4)
        assert asyncio.run(ends(True)) == []
        assert plain.alive
        assert answers(plain, prompts[:1], max_tokens=2)[1].answers[0].done
    finally:
        assert plain.close()


def test_logprobs_are_bounded_and_written_beside_the_loop(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    places, real = set[str](), service.token_bytes

    def token_bytes(token: int) -> bytes:
        places.add(threading.current_thread().name)
        return real(token)

    monkeypatch.setattr(service, "token_bytes", token_bytes)
    body = {"prompt": ["A book"] * 3, "max_tokens": 4, "logprobs": 2, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    told = ask(service, ("/v1/completions", body), ("/v1/chat/completions", chat))
    assert [status for status, _ in told] == [200] * 2
    assert len(told[0][1]["choices"][2]["logprobs"]["top_logprobs"][0]) == 2
    assert places == {"render_0"}
    much = {"prompt": [[1, 2]] * 128, "logprobs": 20, "temperature": 0}
    ((status, found),) = ask(service, ("/v1/completions", much))
    assert (status, found["error"]["param"]) == (400, "logprobs")
    assert "100000 are told at most" in found["error"]["message"]
    assert ask(service, ("/v1/completions", much | {"max_tokens": 1}))[0][0] == 200


def test_intents_are_those_of_predict(service: Any, adapter: Path) -> None:
    import torch

    from faq.predict import Config as PredictConfig
    from faq.predict import build_parser, predict
    from faq.queries import Query

    model = ChatModel(Checkpoint(adapter))
    catalog = service.intents.catalog
    config = PredictConfig(**(vars(build_parser().parse_args([])) | {"question": tuple(ASKED)}))
    queries = [Query(text, tuple(catalog.prompt(text))) for text in ASKED]
    generator = model.generator(torch.float32, torch.device("cpu"), 8)
    expected = dict(predict(config, catalog, queries, model, generator))
    requests = [("/v1/intents", {"questions": [text], "top": 5}) for text in ASKED]
    told = ask(service, ("/v1/intents", {"questions": ASKED}), *requests)
    assert [status for status, _ in told] == [200] * 7
    assert service.intents.generator.pinned.length > 30
    for place, text in enumerate(ASKED):
        single = told[1 + place][1]["data"][0]
        assert told[0][1]["data"][place] | {"top": single["top"]} == single
        assert sum(one["probability"] for one in single["top"]) == pytest.approx(1, abs=1e-5)
        assert len(single["top"]) == 5
        for key in ("intent", "known", "reply", "constrained"):
            assert single[key] == expected[place][key]
        assert single["question"] == text
        assert single["probability"] == pytest.approx(expected[place]["probability"], abs=2e-5)
        assert single["runner_up"]["intent"] == expected[place]["runner_up"]["intent"]
    assert len(told[0][1]["data"][0]["top"]) == 3
    assert service.listed()[0][1]["intents"] == len(INTENTS)


def test_model_and_classifier_together_are_those_of_predict(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from faq import predict
    from llmops.embedding.ngrams import DIMENSION
    from serve.model.service import open_service

    train, intents, out = (tmp_path / name for name in ("train.jsonl", "intents.json", "predictions.jsonl"))
    rows = [
        {"question": form.format(name), "intent": name} for name in INTENTS for form in ("怎么{}", "我要{}", "{}在哪")
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    catalog = json.loads((adapter / "intents.json").read_text(encoding="utf-8"))
    intents.write_text(json.dumps(catalog), encoding="utf-8")
    with pytest.raises(UserError, match="--join_file needs weights in"):
        open_service(Model(adapter, intents_file=intents, join_file=train), Limits(), tmp_path / "f.jsonl")
    decision = {"temperature": 1.0, "shift": 0.0, "threshold": 0.5, "model": 0.5, "linear": 2.0, "inputs": DIMENSION}
    intents.write_text(json.dumps(catalog | {"decision": decision}), encoding="utf-8")
    with pytest.raises(UserError, match="pass --join_file"):
        open_service(Model(adapter, intents_file=intents), Limits(), tmp_path / "f.jsonl")
    common = ["--model_name_or_path", str(adapter), "--intents_file", str(intents), "--join_file", str(train)]
    asked = [flag for text in ASKED for flag in ("--question", text)]
    assert predict.main([*common, *asked, "--output_file", str(out)]) == 0
    expected = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert any(row["model_intent"] != row["proposed"] for row in expected)
    both = open_service(Model(adapter, intents_file=intents, join_file=train), Limits(), tmp_path / "f.jsonl")
    try:
        for told, row in zip(ask(both, ("/v1/intents", {"questions": ASKED}))[0][1]["data"], expected, strict=True):
            top = told.pop("top")
            assert [one["intent"] for one in top[:2]] == [row["proposed"], row["runner_up"]["intent"]]
            for key in ("probability", "confidence"):
                assert told.pop(key) == pytest.approx(row.pop(key), abs=2e-5)
            assert told.pop("runner_up")["probability"] == pytest.approx(row.pop("runner_up")["probability"], abs=2e-5)
            assert told == row
    finally:
        assert both.close()


def test_a_threshold_that_was_kept_decides(service: Any) -> None:
    kept = service.intents.catalog.decision
    kept.update({"temperature": 1.0, "shift": 0.0, "threshold": 1.0})
    try:
        row = ask(service, ("/v1/intents", {"questions": ["怎么退钱"]}))[0][1]["data"][0]
        assert (row["intent"], row["reply"]) == ("不符合", "请转人工。")
        assert row["proposed"] in (*INTENTS, "不符合")
        assert row["confidence"] == pytest.approx(row["probability"], abs=1e-5)
    finally:
        kept.clear()


def test_questions_that_cannot_be_answered_leave_the_others_and_the_server(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    requests = [("/v1/intents", {"questions": [text]}) for text in (ASKED[0], "很长" * 100, ASKED[1])]
    passes, read = service.intents.generator.passes, service.intents.generator.passes.read

    def little_memory(prompts: Any, prefixes: Any) -> Any:
        if max(map(len, prompts)) > 300:
            raise torch.OutOfMemoryError
        return read(prompts, prefixes)

    def intents(told: list[tuple[int, Any]]) -> list[str]:
        return [body["data"][0]["intent"] for status, body in told if status == 200]

    expected = intents(ask(service, *requests))
    assert len(expected) == 3
    monkeypatch.setattr(passes, "read", little_memory)
    told = ask(service, *requests)
    assert intents(told) == [expected[0], expected[2]]
    assert (told[1][0], told[1][1]["error"]["code"]) == (503, "memory")
    assert "does not suffice for one prompt of" in told[1][1]["error"]["message"]
    monkeypatch.setattr(passes, "read", read)
    hook = passes.model.get_output_embeddings().register_forward_hook(lambda *given: given[2] * float("nan"))
    try:
        told = ask(service, *requests)
    finally:
        hook.remove()
    assert [status for status, _ in told] == [500] * 3
    assert "no numbers (NaN)" in told[0][1]["error"]["message"]
    assert intents(ask(service, *requests)) == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "questions"),
        ({"questions": []}, "questions"),
        ({"questions": "x"}, "questions"),
        ({"questions": ["x", " "]}, "questions"),
        ({"questions": ["长" * 10_001]}, "questions"),
        ({"questions": ["长" * 9_000]}, "questions"),
        ({"questions": ["x"], "top": 0}, "top"),
        ({"questions": ["x"], "extra": 1}, "extra"),
        ({"questions": ["x"] * 257}, "questions"),
    ],
)
def test_bad_questions_are_refused(service: Any, body: dict, param: str) -> None:
    ((status, found),) = ask(service, ("/v1/intents", body))
    assert (status, found["error"]["param"]) == (400, param)


def test_corrections_are_what_prepare_reads(service: Any) -> None:
    from llmops.intents.questions import read_faq

    path = service.feedback
    first = {"question": "包裹丢了", "intent": "查询物流进度", "reply": "请联系客服。", "predicted": "申请退款"}
    told = ask(
        service, ("/v1/intents/feedback", first), ("/v1/intents/feedback", {"question": "换货", "intent": "换货"}),
        ("/v1/intents/feedback", {"question": "换货", "intent": "a\nb"}),
        ("/v1/intents/feedback", {"question": "", "intent": "换货"}),
        ("/v1/intents/feedback", {"question": "x", "intent": "换货", "path": "/etc"}),
    )  # fmt: skip
    assert sorted(status for status, _ in told) == [201, 201, 400, 400, 400]
    assert [body["known"] for status, body in told if status == 201] == [True, False]
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"question": "half')
    assert ask(service, ("/v1/intents/feedback", {"question": "改密码", "intent": "修改密码"}))[0][0] == 201
    records = read_faq(path, skip_bad_lines=True)
    assert sorted(record.questions[0] for record in records.records) == sorted(["包裹丢了", "换货", "改密码"])
    assert len(records.problems) == 1


def test_a_correction_follows_no_link_out_of_the_mount(service: Any, tmp_path: Path) -> None:
    elsewhere, kept = tmp_path / "elsewhere", service.feedback
    elsewhere.write_text("mine\n")
    (tmp_path / "feedback.jsonl").symlink_to(elsewhere)
    service.feedback = tmp_path / "feedback.jsonl"
    try:
        ((status, body),) = ask(service, ("/v1/intents/feedback", {"question": "换货", "intent": "换货"}))
    finally:
        service.feedback = kept
    assert (status, elsewhere.read_text()) == (500, "mine\n")
    assert "the correction could not be kept" in body["error"]["message"]


def test_an_intents_file_from_before_examples_were_shown_is_read(adapter: Path, tmp_path: Path) -> None:
    from llmops.intents.catalog import load_catalog

    values = json.loads((adapter / "intents.json").read_text(encoding="utf-8"))
    del values["wording"]["examples"]
    (tmp_path / "intents.json").write_text(json.dumps(values), encoding="utf-8")
    read, whole = (load_catalog(folder / "intents.json") for folder in (tmp_path, adapter))
    assert read.prompt("怎么退钱") == whole.prompt("怎么退钱")


def test_packed_layers_compute_the_same(checkpoints: dict[str, Path]) -> None:
    import torch

    from llmops.generation.packed import PackedLinear, can_pack, pack

    model = ChatModel(Checkpoint(checkpoints["qwen2"])).weights(torch.float32).eval()  # it has biases
    ids = torch.arange(60).reshape(3, 20)
    with torch.inference_mode():
        before = model(ids).logits
        count = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
        assert pack(model) == count > 10
        assert pack(model) == 0
        assert (model(ids).logits - before).abs().max() < 1e-4 * before.abs().max()
        half = ChatModel(Checkpoint(checkpoints["qwen2"])).weights(torch.bfloat16).eval()
        assert pack(half) == (count if can_pack(torch.bfloat16) else 0)  # a processor without AVX-512 answers unpacked
        assert torch.isfinite(half(ids).logits).all()
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            if not can_pack(dtype):
                continue
            linear = torch.nn.Linear(48, 40).to(dtype)
            for rows in (1, 5, 300):
                inputs = torch.randn(rows, 2, 48).to(dtype)
                expected = linear.double()(inputs.double())
                found = PackedLinear(linear.to(dtype))(inputs).double()
                assert (found - expected).abs().max() < bound * expected.abs().max()
