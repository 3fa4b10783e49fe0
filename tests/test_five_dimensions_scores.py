"""eval/evaluate_model_from_five_dimensions: answers whatever the batch, scores that measure what they say."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Messages, teach
from dimension_calls import ALL, call, lines_of, load
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from eval import evaluate_model_from_five_dimensions as command
from eval.engine import Engine, Settings
from eval.rendering import Renderer
from eval.report import draw_radar
from eval.samples import Sample, draw
from llmops.machine.sharing import Processes
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

# --- answers ---------------------------------------------------------------------------------------------------------


def sum_of_logs(engine: Engine, sample: Sample) -> list[float]:
    """Log-likelihoods of a sample's choices, one plain pass of transformers' model per choice."""
    import torch

    prompt = engine.renderer.prompt(sample)
    found = []
    for ids in engine.renderer.choices(sample, prompt):
        with torch.no_grad():
            logits = engine.generator.model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
        found.append(sum(logits[len(prompt) + k - 1, token].item() for k, token in enumerate(ids)))
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_batch_size_and_prefixes_change_nothing(checkpoints: dict[str, Path], architecture: str) -> None:
    """Choices (few-shot, several tokens) within 1e-4, also of the plain definition; generated answers equal."""
    samples = [
        *draw(load("inference_ability", num_fewshot=2).samples, 5, 0),
        *draw(load("innovation_capacity").samples, 4, 0),
        *load("reading_comprehension").samples[:6],
    ]
    samples[0] = replace(samples[0], choices=("是", "否", "完全一样的意思"))
    answers = []
    for size, reuse in [(3, True), (1, True), (8, True), (1, False), (3, False), (8, False)]:
        settings = Settings(
            str(checkpoints[architecture]), batch_size=size, reuse_prefix=reuse, gpu_id=-1, max_seq_len=2048
        )
        engine = Engine(settings, Processes())
        answers.append(engine.answer(engine.prepare("x", samples, 5)))
        if len(answers) == 1:
            engine.generator.model.set_attn_implementation("eager")
            for sample, answer in zip(samples[:9], answers[0], strict=False):
                assert answer.loglikelihoods == pytest.approx(sum_of_logs(engine, sample), abs=1e-4)
    for found in answers[1:]:
        for one, other in zip(answers[0], found, strict=True):
            assert one.text == other.text
            assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)


def test_plain_text_scores_what_is_written(checkpoints: dict[str, Path]) -> None:
    """Without chat template: prompt and choice are encoded together, and no role tokens are in the prompt."""
    sample = load("inference_ability", num_fewshot=1).samples[0]
    engine = Engine(Settings(str(checkpoints["llama"]), chat_template=False, gpu_id=-1), Processes())
    prompt = engine.renderer.prompt(sample)
    (first, *_) = engine.renderer.choices(sample, prompt)
    text = engine.renderer.tokenizer.decode([*prompt, *first])
    assert "<|im_start|>" not in text
    assert text.endswith("答案：是")
    assert "答案：否\n\n下面" in text or "答案：是\n\n下面" in text
    (answer,) = engine.answer(engine.prepare("x", [sample], 1))
    assert answer.loglikelihoods == pytest.approx(sum_of_logs(engine, sample), abs=1e-4)


def test_plain_text_ends_with_its_line(checkpoints: dict[str, Path]) -> None:
    """Llama 2's tokenizer puts a blank before every text: the id of a line's end is seen after a word only."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    vocabulary |= {piece: 259 + i for i, piece in enumerate(["▁", "a", "b", "▁a"])}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model = ChatModel(Checkpoint(checkpoints["llama"]))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")
    renderer = Renderer(model, chat_template=False)
    end = vocabulary["<0x0A>"]
    assert len(core.encode("\n", add_special_tokens=False).ids) == 2
    assert renderer.stop_ids == [2, end]
    ids = [vocabulary["▁a"], end, vocabulary["b"]]
    assert (renderer.decode(ids), renderer.ends_by_line(ids), renderer.ends_by_line(ids[:2])) == ("a", True, False)


# --- scores that measure ---------------------------------------------------------------------------------------------

KNOWN = {"inference_ability": 12, "innovation_capacity": 12, "chinese_language_skill": 8}


@pytest.fixture(scope="module")
def scholar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was taught some of the shipped samples (the first ones of three dimensions)."""
    conversations: list[Messages] = []
    for name, count in KNOWN.items():
        for sample in load(name).samples[:count]:
            conversations.append([*sample.messages, {"role": "assistant", "content": sample.references[0]}])
    return teach(tmp_path_factory.mktemp("scholar"), conversations, steps=170)


def write_known(folder: Path, shuffled: bool) -> Path:
    """The samples that the model was taught, in the official formats; with shuffled labels nothing it could know."""
    draw = random.Random(7)
    afqmc = lines_of(command.SAMPLES / "afqmc" / "dev.json")[: KNOWN["inference_ability"]]
    name = sorted((command.SAMPLES / "m3ke" / "data" / "test").glob("*.jsonl"))[0].name
    m3ke = [
        row for path in sorted((command.SAMPLES / "m3ke" / "data" / "test").glob("*.jsonl")) for row in lines_of(path)
    ]
    tnews = lines_of(command.SAMPLES / "tnews" / "dev.json")[: KNOWN["chinese_language_skill"]]
    m3ke = m3ke[:10]  # of one file: the prompt names the subject
    if shuffled:
        for row in afqmc:
            row["label"] = draw.choice("01")
        for row in m3ke:
            row["answer"] = draw.choice("ABCD")
        words = [row["keywords"] for row in tnews]
        for row, other in zip(tnews, words[1:] + words[:1], strict=True):
            row["keywords"] = other
    for path, rows in [("afqmc/dev.json", afqmc), (f"m3ke/data/dev/{name}", m3ke), ("tnews/dev.json", tnews)]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def test_it_measures_what_it_says(capfd: pytest.CaptureFixture[str], scholar: Path, tmp_path: Path) -> None:
    """Near 1 on what the model was taught, near chance on the same questions with shuffled labels."""
    right = write_known(tmp_path / "right", False)
    output = tmp_path / "out"
    options = {"data_dir": str(right), "output_path": str(output), "gpu_id": -1, "max_seq_len": 1024}
    code, found, errors = call(capfd, scholar, list(KNOWN), options)
    assert code == 0, errors
    assert list(found) == ["evaluation_results", "diagnosis"]
    assert list(found["evaluation_results"]) == list(KNOWN)
    assert min(found["evaluation_results"].values()) > 0.9, found
    for name, notes in found["diagnosis"].items():  # the user's own data, everything read, nothing cut, but few samples
        (note,) = notes
        assert note.startswith(f"{KNOWN[name] if name != 'innovation_capacity' else 10} samples: "), note
        assert "95% interval 0." in note
    wrong = write_known(tmp_path / "wrong", True)
    code, shuffled, _ = call(capfd, scholar, list(KNOWN), options | {"data_dir": str(wrong), "output_path": ""})
    results = shuffled["evaluation_results"]
    assert 0.1 <= results["inference_ability"] <= 0.9
    assert results["innovation_capacity"] <= 0.6
    assert results["chinese_language_skill"] < 0.3
    report = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
    assert report["evaluation_results"] == found["evaluation_results"]
    inference = report["dimensions"]["inference_ability"]
    assert inference["baselines"]["majority"] >= 0.5
    assert inference["spread"]["references"] == inference["spread"]["predictions"]
    assert sum(group["samples"] for group in report["dimensions"]["innovation_capacity"]["by_group"].values()) == 10
    assert (output / "five_dimensions.png").stat().st_size > 10_000
    rows = lines_of(output / "samples" / "inference_ability.jsonl")
    assert [row["scores"]["accuracy"] for row in rows] == [
        float(row["prediction"] in row["references"]) for row in rows
    ]
    # started again: nothing is answered twice; beside another model's results in one chart
    again = options | {"compare_with": [str(output)]}
    code, found_again, errors = call(capfd, scholar, list(KNOWN), again)
    assert found_again == found
    assert errors.count("answers are in") == 3


def test_adapters(capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """An adapter's folder as the model and the adapter put on its base answer alike, and not like the base."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint

    model = ChatModel(Checkpoint(checkpoints["llama"])).weights(torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=5.0)
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (checkpoints["llama"] / name).is_file():
            (tmp_path / "adapter" / name).write_bytes((checkpoints["llama"] / name).read_bytes())
    options = {"data_dir": str(command.SAMPLES), "gpu_id": -1, "limit": 6}
    rows = []
    for i, (model, more) in enumerate([
        (tmp_path / "adapter", {}),
        (checkpoints["llama"], {"adapter": str(tmp_path / "adapter")}),
        (checkpoints["llama"], {}),
    ]):  # fmt: skip
        given = options | more | {"output_path": str(tmp_path / f"{i}")}
        code, _, errors = call(capfd, model, ["inference_ability"], given)
        assert code == 0, errors
        samples = lines_of(tmp_path / f"{i}" / "samples" / "inference_ability.jsonl")
        rows.append([row["loglikelihoods"] for row in samples])
    for one, other in zip(rows[0], rows[1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert rows[0] != rows[2]


def test_what_a_reader_must_know_is_in_diagnosis(
    capfd: pytest.CaptureFixture[str], checkpoints: dict[str, Path]
) -> None:
    """An untrained model on shipped samples with little room: samples, cuts and baselines are named."""
    options = {"additional_parameters": {"max_seq_len": 200, "limit": 12, "gpu_id": -1, "chat_template": "on"}}
    code, found, errors = call(capfd, checkpoints["llama"], ["reading_comprehension", "inference_ability"], options)
    assert code == 0, errors
    reading = " ".join(found["diagnosis"]["reading_comprehension"])
    assert "scored on 12 samples that ship with the toolkit, which is no CMRC2018 score" in reading
    assert "prompts were longer than max_seq_len allows and were cut" in reading
    assert "is not above the baseline 'first sentence'" in reading
    assert "scored on 12 samples" in found["diagnosis"]["inference_ability"][0]


def test_radar_of_several_models(tmp_path: Path) -> None:
    models = [("one", dict(zip(ALL, (0.9, 0.5, 0.3, 0.2, 0.6), strict=True))), ("另一个", {ALL[0]: 0.4, ALL[3]: 0.8})]
    for count in (5, 2):
        draw_radar(models, ALL[:count], tmp_path / f"{count}.png", dict.fromkeys(ALL, (0.25, 0.9)))
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")
