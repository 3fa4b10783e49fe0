"""The model server's engine, in this process: answers against transformers' own, sampling, limits, faults."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_inside import QUESTIONS, answers, opened, rendered, user
from tokenizers import decoders

from serve.answers import ApiError
from serve.settings import Limits, Model


@pytest.fixture(scope="module")
def service(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model that is served."""
    with opened(Model(checkpoints["llama"]), tmp_path_factory.mktemp("x") / "feedback.jsonl") as found:
        yield found


def test_answers_are_those_of_transformers(service: Any) -> None:
    """Prompts of all lengths together, more than there are rows, against `generate` on one prompt at a time."""
    import torch

    model = service.model.weights(torch.float32).eval()
    prompts = [[*ids, *ids[3 : 3 + 40 * (i % 3)]] for i, ids in enumerate(rendered(service, QUESTIONS))]
    expected = []
    for ids in prompts:
        out = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
        expected.append(service.decode(out.tolist()))
    for _ in range(2):  # the second time their beginnings are known
        texts, exchange = answers(service, prompts, temperature=0, max_tokens=10)
        assert texts == expected
    assert exchange.usage()["prompt_tokens_details"]["cached_tokens"] > 0.5 * exchange.usage()["prompt_tokens"]


def test_a_conversation_goes_on_from_what_is_known(service: Any) -> None:
    ids = rendered(service, ["A long question. " * 30])[0]
    _, first = answers(service, [ids], temperature=0, max_tokens=8)
    longer = [*ids, *first.answers[0].ids, *rendered(service, ["And then?"])[0]]
    known, again = answers(service, [longer], temperature=0, max_tokens=8)
    assert again.answers[0].cached >= len(ids) - 16
    service.engine.lanes["base"].room.clear()
    assert service.engine.lanes["base"].known_bytes == 0
    fresh, third = answers(service, [longer], temperature=0, max_tokens=8)
    assert third.answers[0].cached == 0
    assert fresh == known


def test_a_seed_decides_alone_and_in_company(service: Any) -> None:
    prompts = rendered(service, QUESTIONS[:6])
    for fields in ({"top_p": 0.9}, {"top_k": 5}, {"temperature": 1.5, "repetition_penalty": 1.2}, {}):
        asked = {"max_tokens": 8, "seed": 7, **fields}
        together = answers(service, prompts, **asked)[0]
        assert [answers(service, [ids], **asked)[0][0] for ids in prompts[:2]] == together[:2]
    assert answers(service, prompts, max_tokens=8, seed=8)[0] != together


def test_sampling_keeps_and_draws_what_transformers_keeps() -> None:
    import torch
    from transformers import TopPLogitsWarper

    from serve.model.asked import Sampling
    from serve.model.sampling import Sampler

    draw = torch.Generator().manual_seed(0)
    for size, scale in ((50, 1.0), (3000, 0.5), (3000, 4.0)):
        logits = torch.randn(1, size, generator=draw) * scale
        for top_p in (0.05, 0.5, 0.95):
            few, ids = Sampler(Sampling(top_p=top_p))._few(logits)
            kept = TopPLogitsWarper(top_p)(None, logits)[0].isfinite().nonzero()[:, 0].tolist()
            if ids is not None:
                assert sorted(ids[few.isfinite()].tolist()) == kept
    sampler = Sampler(Sampling(temperature=0.5, top_k=3, seed=1))
    logits = torch.tensor([1.0, 2.0, 0.5, 1.5, -1.0])
    count = [0] * 5
    for _ in range(4000):
        count[sampler.next([], logits)] += 1
    weights = [math.exp(2 * value) for value in (1.0, 2.0, 1.5)]
    expected = [weights[0], weights[1], 0, weights[2], 0]
    for found, share in zip(count, expected, strict=True):
        assert found / 4000 == pytest.approx(share / sum(weights), abs=0.03)


def test_template_variables_reach_the_template(service: Any) -> None:
    model = type(service.model)(service.model.checkpoint)
    model.tokenizer.chat_template = model.tokenizer.chat_template + "{% if loud %}LOUD{% endif %}"
    plain, loud = (model.chat_with(variables).prompt(user("x")) for variables in ({}, {"loud": True}))
    assert service.decode(loud) == service.decode(plain) + "LOUD"


def test_a_prompt_that_memory_cannot_hold_is_refused_and_the_others_are_answered(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from serve.model.asked import read_completion
    from serve.model.exchange import Exchange

    lane, prefix = service.engine.lanes["base"], service.engine.lanes["base"].passes.prefix
    reads: list[int] = []

    def little_memory(ids: Any, known: Any) -> Any:
        reads.append(len(ids))
        if len(ids) > 200:
            raise torch.OutOfMemoryError
        return prefix(ids, known)

    async def one(ids: list[int], tokens: int) -> str:
        body = {"prompt": ids, "temperature": 0, "max_tokens": tokens}
        asked = read_completion(body, service.limits).asked
        return "".join([event.text async for _, event in Exchange(service, asked, [ids]).told()])

    async def all_of(prompts: list[list[int]], tokens: int) -> list[Any]:
        return await asyncio.gather(*(one(ids, tokens) for ids in prompts), return_exceptions=True)

    few = rendered(service, QUESTIONS[:7])
    long = rendered(service, ["A long question. " * 100])[0]
    expected = asyncio.run(all_of(few, 60))
    monkeypatch.setattr(lane, "at_once", 64)
    monkeypatch.setattr(lane.passes, "prefix", little_memory)
    for prompts in ([long], [*few[:1], long], [*few, long]):
        *told, refused = asyncio.run(all_of(prompts, 60))
        assert told == expected[: len(told)]
        assert isinstance(refused, ApiError)
        assert (refused.status, refused.code, refused.retry) == (503, "memory", 1)
    assert sum(count > 200 for count in reads) < 12  # it is not tried again until its time is over
    assert lane.rows < 8
    for _ in range(5):
        assert asyncio.run(all_of(few, 2)) == asyncio.run(all_of(few, 2))
    assert lane.rows == 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_shortage_of_memory_at_any_place_changes_no_answer(
    service: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    import torch

    from llmops.generation import continuous
    from serve.model import lanes

    prompts = rendered(service, QUESTIONS[:4])
    asked = {"temperature": 0, "max_tokens": 6, "logprobs": 1, "stream": stream}
    expected = answers(service, prompts, **asked)[0]
    faults = {(continuous, "in_own_caches"): 1, (continuous, "merge"): 1, (lanes, "layers_of"): 100}
    for (module, name), times in faults.items():
        real, left = getattr(module, name), iter(range(times))

        def short(*given: Any, real: Any = real, left: Any = left, **named: Any) -> Any:
            if next(left, None) is not None:
                raise torch.OutOfMemoryError
            return real(*given, **named)

        monkeypatch.setattr(module, name, short)
        texts, exchange = answers(service, prompts, **asked)
        assert texts == expected, name
        if not stream:  # a stream's were told token by token
            assert all(len(answer.event.logprobs) == len(answer.ids) for answer in exchange.answers), name
    assert service.engine.lanes["base"].known_bytes == 0


def test_tokens_that_the_model_has_not_are_refused_whatever_its_configuration_says(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmops.models.checkpoints import Checkpoint

    monkeypatch.setattr(Checkpoint, "vocabulary", None)  # as where the sizes stand in text_config
    with opened(Model(checkpoints["llama"]), tmp_path / "feedback.jsonl") as silent:
        known = silent.model.tokenizer.vocab_size
        for token in (2_000_000_000, silent.vocabulary):
            with pytest.raises(ApiError, match="tokens that the model does not know") as caught:
                answers(silent, [[1, token]], max_tokens=2)
            assert caught.value.status == 400
        assert answers(silent, [[1, known - 1]], max_tokens=2)[1].answers[0].done


def test_more_requests_than_the_queue_holds_are_refused(service: Any) -> None:
    from serve.metrics import Metrics
    from serve.model.engine import Engine

    engine = Engine(Limits(rows=2, queue=1), Metrics())
    engine.lanes = service.engine.lanes
    engine.submit("base", [object()] * 3, print)  # type: ignore[list-item]
    with pytest.raises(ApiError) as caught:
        engine.submit("base", [object()], print)  # type: ignore[list-item]
    assert (caught.value.status, caught.value.response.headers["retry-after"]) == (429, "1")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_in_the_engine_refuses_what_waits_and_ends_the_server(service: Any, tmp_path: Path) -> None:
    from serve import server as module
    from serve.app import build_app
    from serve.metrics import Metrics
    from serve.model.engine import Engine
    from serve.settings import Access, Settings

    class Faulty:
        refused = False

        def turn(self, out: Any) -> bool:
            raise KeyError("a fault")

        def fail(self, error: ApiError, out: Any) -> None:
            self.refused = error.status == 500

    faulty, engine = Faulty(), Engine(Limits(), Metrics())
    engine.start({}, [faulty])
    engine._thread.join(10)
    assert (faulty.refused, engine.alive) == (True, False)
    with pytest.raises(ApiError):
        engine.check()

    class Dead:
        alive = False
        intents = None
        metrics = Metrics()

    async def run() -> None:
        access = Access(port=0)
        app = build_app(Settings(tmp_path, access))
        app.state.model = Dead()
        listener = module.bound(access)
        await module.Server(app, access, 1, lambda: None).serve(sockets=[listener])

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_handed_over_while_the_engine_fails_is_refused_too(service: Any) -> None:
    import threading
    from collections import deque

    from serve.metrics import Metrics
    from serve.model.engine import Engine

    refusing, handed = threading.Event(), threading.Event()

    class Slow(deque[Any]):
        def extend(self, more: Any) -> None:
            handed.set()
            refusing.wait(0.5)  # the engine fails meanwhile
            super().extend(more)

        def append(self, one: Any) -> None:
            self.extend([one])

    class Faulty:
        going: tuple[Any, ...] = ()

        def __init__(self) -> None:
            self.waiting: deque[Any] = deque()
            self.refused: list[Any] = []

        def turn(self, out: Any) -> bool:
            handed.wait(5)
            raise KeyError("a fault")

        def fail(self, error: ApiError, out: Any) -> None:
            self.refused += self.waiting
            refusing.set()

    for hand_over in ("submit", "ask"):
        refusing.clear()
        handed.clear()
        engine, faulty = Engine(Limits(), Metrics()), Faulty()
        engine._inbox = Slow()
        engine.start({"base": faulty}, [])  # type: ignore[dict-item]
        if hand_over == "submit":
            engine.submit("base", ["x"], print)  # type: ignore[list-item]
        else:
            faulty.waiting = Slow()
            engine.ask(faulty.waiting, "x", print)
        engine._thread.join(10)
        assert faulty.refused == ["x"], hand_over
        with pytest.raises(ApiError):
            engine.check()


def test_time_that_is_over_ends_an_answer_and_refuses_one_that_waits(service: Any) -> None:
    limits, service.limits = service.limits, Limits(rows=8, seconds=0.3)
    try:
        prompts = rendered(service, QUESTIONS[:1])
        _, exchange = answers(service, prompts, temperature=0, max_tokens=4000, stop="never there")
        assert exchange.answers[0].finish in ("", "stop")
        assert len(exchange.answers[0].ids) < 4000
        service.limits = Limits(rows=8, seconds=-1)
        with pytest.raises(ApiError) as caught:
            answers(service, prompts, max_tokens=4)
        assert (caught.value.status, caught.value.retry) == (503, 1)
    finally:
        service.limits = limits


def test_known_beginnings_stay_within_their_memory() -> None:
    import torch

    from llmops.generation.shared_prefix import NOTHING, Prefix
    from serve.model.prefixes import Prefixes, Room, chain

    def made(ids: list[int]) -> Prefix:
        return Prefix(ids, [(torch.zeros(1, len(ids), 4), torch.zeros(1, len(ids), 4))])  # 32 bytes a token

    room = Room(32 * 200)
    kept = Prefixes(room)
    kept.keep(made(list(range(64))))
    assert kept.longest([*range(64), 1]).ids == list(range(64))
    assert kept.longest([*range(50), 999]).ids == list(range(48))
    assert kept.longest([*range(50), 999]) is kept.longest([*range(49), 1, 2])
    assert kept.longest([5, *range(64)]) is NOTHING
    assert kept.longest(list(range(64))).length == 48  # the last token has to be computed
    kept.keep(made([*range(64), *range(40)]))
    assert (len(kept), kept.bytes) == (1, 32 * 104)  # the longer one took the shorter one's place
    kept.keep(made(list(range(64))))
    assert len(kept) == 1
    kept.keep(made(list(range(1000, 1090))))
    assert kept.longest([*range(64), 7]).length == 64  # used: the other one is older now
    kept.keep(made(list(range(2000, 2060))))
    assert kept.bytes <= 32 * 200
    assert kept.longest(list(range(1000, 1090))) is NOTHING
    kept.keep(made(list(range(5000))))
    assert kept.bytes <= 32 * 200
    assert kept._blocks.keys() == {key for prefix in kept._kept.values() for key in chain(prefix.ids)}
    other = Prefixes(room)  # another model's: the limit is of both together
    assert kept.longest([*range(2000, 2060), 1]).length == 48
    for start in (7000, 8000):
        other.keep(made(list(range(start, start + 60))))
    assert (kept.bytes + other.bytes, room.bytes) == (32 * 180, 32 * 180)
    assert kept.longest([*range(2000, 2060), 1]).length == 48  # used last of all: the others go first
    other.keep(made(list(range(9000, 9060))))
    assert [len(kept), len(other), room.bytes] == [1, 2, 32 * 180]
    other.keep(made(list(range(200))))
    assert [len(kept), len(other), room.bytes] == [0, 1, 32 * 200]
    room.clear()
    assert (room.bytes, kept.bytes + other.bytes, len(room.used), len(other)) == (0, 0, 0, 0)


def test_text_comes_whole_whatever_the_tokens(service: Any) -> None:
    from serve.model.text import Detokenizer

    for text in ("naïve 世界 🦊🦊  two  blanks\n\n`x = [1]`", "早上八点", "a"):
        ids = service.model.tokenizer(text)["input_ids"]
        written = Detokenizer(service.decode)
        assert "".join(written.push(token) for token in ids) + written.finish() == service.decode(ids)
    # Llama 2's decoder, of bytes where the vocabulary lacks a character
    llama = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    for text in ("😊\n🎉\n", "😀😀😀 ok", "好😊😊😊😊\n\n 两 个"):
        pieces = ["▁"]
        for sign in text:
            known = {" ": ["▁"]}.get(
                sign, [sign] if sign in "ok好两个" else [f"<0x{byte:02X}>" for byte in sign.encode()]
            )
            pieces += known
        written = Detokenizer(lambda ids, pieces=pieces: llama.decode([pieces[i] for i in ids]))  # type: ignore[misc]
        assert "".join(written.push(i) for i in range(len(pieces))) + written.finish() == text
    stopping = Detokenizer(service.decode, ["世界", "never"])
    ids = service.model.tokenizer("hello 世界 and more")["input_ids"]
    said = ""
    for token in ids:
        said += stopping.push(token)
        if stopping.stopped:
            break
    assert (said, stopping.stopped) == ("hello ", True)


def test_zero_is_not_false_to_a_template(service: Any) -> None:
    zero, false = (service._format({"enable_thinking": value}) for value in (0, False))
    assert zero is not false
    assert service._format({"thinking": False}) is false
