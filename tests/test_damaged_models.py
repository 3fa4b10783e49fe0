"""Damaged checkpoints, adapters and templates: one sentence that names the file, and nothing made up."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from eval import model_performance_evaluation
from faq import predict, prepare
from llmops import loading
from llmops.console import RunStopped, UserError
from llmops.formats import families
from llmops.formats.families import TEMPLATES, read_families
from llmops.generation.generator import Generator
from llmops.models import checkpoints
from llmops.models.chat_model import ChatModel, load_tokenizer
from llmops.models.checkpoints import Checkpoint
from train import finetune


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.getfixturevalue("checkpoints")["llama"], tmp_path / "model"))


@pytest.fixture
def adapter(model: Path) -> Path:
    whole = ChatModel(Checkpoint(model)).weights(torch.float32)
    folder = model.parent / "adapter"
    get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=str(model))
    return folder


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    found = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}), encoding="utf-8")


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("model_type"), r"^the model in x cannot be loaded \(KeyError: 'model_type'\); copy the folder"),
        (Exception("expected value\nat line 1"), r"cannot be loaded \(Exception: expected value\); copy"),
        (PanicException("out of range"), r"\(PanicException: out of range\)"),
        (ValueError("bad \x1b[31m" + "x" * 1000), r"\(bad \?\[31mx{200,}…\)"),
        (ImportError("No module named 'icetk'", name="icetk"), r"wants a package that is not here: pip install icetk$"),
        (OSError(), r"\(OSError\)"),
        (UnpicklingError("Unsupported global: GLOBAL posix.system was not"), r"loaded: a file asks for posix.system"),
        (UnpicklingError("invalid load key"), r"cannot be loaded: a .bin file is damaged, or no weights"),
    ],
)
def test_what_libraries_raise_is_one_sentence(error: BaseException, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught, loading.loading("the model in x"):
        raise error
    assert "\n" not in str(caught.value)


def test_memory_signals_and_our_own_faults_are_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 9")):
        with pytest.raises(RunStopped, match="not enough memory: the model could"), loading.loading("the model"):
            raise error
    for kept in (KeyboardInterrupt, SystemExit, UserError, RunStopped):
        with pytest.raises(kept), loading.loading("the model"):
            raise kept
    monkeypatch.setattr(loading, "OWN_PACKAGES", (str(Path(__file__).parent),))  # as if this file were of the toolkit
    with pytest.raises(KeyError), loading.loading("the model"):
        raise KeyError("ours")


def test_weights_that_are_not_there_are_not_made_up(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp" in name)
    save_file({k: v for k, v in weights.items() if k != name}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lack 1 of the tensors that config.json asks for, such as {name}"):
        ChatModel(Checkpoint(model)).weights(torch.float32)


def test_tokens_that_the_model_does_not_know(model: Path) -> None:
    generator = Generator(ChatModel(Checkpoint(model)).weights(torch.float32), 0, 2)
    known = Checkpoint(model).config["vocab_size"]
    for ask in (
        lambda: generator.generate([[5, known]], 2, [2]),
        lambda: generator.loglikelihoods([[5, known]], [[[8], [9]]]),
        lambda: generator.loglikelihoods([[5]], [[[8], [known]]]),
    ):
        with pytest.raises(UserError, match=f"writes the token {known} and the model knows {known}, from 0"):
            list(ask())


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_answers_that_are_no_numbers(model: Path, reuse_prefix: bool) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    generator = Generator(ChatModel(Checkpoint(model)).weights(torch.float32), 0, 2, reuse_prefix)
    with pytest.raises(UserError, match="the model gives no numbers"):
        list(generator.generate([[5, 6, 7], [5, 6]], 2, [2]))
    with pytest.raises(UserError, match="the model gives no numbers"):
        list(generator.loglikelihoods([[5, 6, 7]], [[[8], [9]]]))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", "[]", "holds a JSON list, expected an object"),
        ("config.json", '{"model_type": 7}', "model_type is 7, expected a name"),
        ("config.json", '{"model_type": "llama", "auto_map": []}', "auto_map is"),
        ("config.json", '{"model_type": "llama", "seq_length": -1}', "seq_length is -1, expected a whole"),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": 0}', "num_hidden_layers is 0, expected a whole"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("tokenizer.json", '{"version": "1.0"}', "the tokenizer of .* cannot be loaded"),
        ("tokenizer_config.json", '{"a": \xff}', "tokenizer_config.json"),
        ("model.safetensors", "", "the model in .* cannot be loaded"),
        ("pytorch_model.bin", "ignored", ""),
    ],
)
def test_damaged_files_of_a_checkpoint(model: Path, name: str, content: str, sentence: str) -> None:
    (model / name).write_bytes(content.encode("latin-1"))
    if not sentence:
        ChatModel(Checkpoint(model)).load(torch.float32)
        return
    with pytest.raises(UserError, match=sentence):  # noqa: PT012
        _ = ChatModel(Checkpoint(model)).chat
        ChatModel(Checkpoint(model)).load(torch.float32)


def test_weights_without_a_place_are_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(model / "config.json", num_hidden_layers=1)
    ChatModel(Checkpoint(model)).weights(torch.float32)
    assert "warning: 9 tensors of" in capsys.readouterr().err


def test_a_tokenizer_without_an_end_token(model: Path) -> None:
    change(model / "tokenizer_config.json", eos_token=None)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(Checkpoint(model))


def test_an_adapter_opens_without_the_libraries_talk(adapter: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ChatModel(Checkpoint(adapter)).load(torch.float32)


def test_adapters_that_do_not_fit(adapter: Path) -> None:
    whole = load_file(adapter / "adapter_model.safetensors")
    some = next(iter(whole))
    for tensors, sentence in (
        ({k: v for k, v in whole.items() if k != some}, "1 of its tensors are missing and 0 belong to no layer"),
        (whole | {some.replace("layers.0", "layers.7"): whole[some].clone()}, "are missing and 1 belong"),
        ({k: v[:1].clone() for k, v in whole.items()}, "cannot be loaded .RuntimeError"),
    ):
        save_file(dict(tensors), adapter / "adapter_model.safetensors")
        with pytest.raises(UserError, match=sentence):
            ChatModel(Checkpoint(adapter)).load(torch.float32)


def test_an_adapter_on_another_model_is_said(adapter: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tensors fit every model of that size; a mount that moved has another path, and the same name."""
    for name, said in (("/moved/model", False), ("/moved/other", True)):
        change(adapter / "adapter_config.json", base_model_name_or_path=name)
        ChatModel(Checkpoint(model, adapter=adapter)).load(torch.float32)
        warning = f"warning: the adapter {adapter} was trained on {name} and goes on {model}; where that is"
        assert (warning in capsys.readouterr().err) == said


def test_an_adapter_that_adds_to_the_prompt_is_refused(model: Path) -> None:
    """Its tokens are in no prompt that is put through here: it would be answered with as if it were not there."""
    whole = ChatModel(Checkpoint(model)).weights(torch.float32)
    folder = model.parent / "prefix"
    get_peft_model(whole, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=str(model))
    with pytest.raises(UserError, match="is of the kind PREFIX_TUNING, which adds to the prompt and not to the wei"):
        ChatModel(Checkpoint(folder)).load(torch.float32)


def test_bases_of_adapters(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    change(path, base_model_name_or_path="/moved/model")
    assert Checkpoint(adapter).base.folder == adapter.parent / "model"
    for value, sentence in (
        (["x"], "expected the folder of the base model"), ("a\0b", "expected the folder"), ("/moved/x", "is not there"),
        (str(adapter), "is not there"),
    ):  # fmt: skip
        change(path, base_model_name_or_path=value)
        with pytest.raises(UserError, match=sentence):
            _ = Checkpoint(adapter).base
    path.write_text("null", encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter_config.json holds a JSON NoneType"):
        _ = Checkpoint(adapter).config


def test_weights_that_are_no_numbers_are_not_merged(adapter: Path) -> None:
    for path in (adapter.parent / "model").glob("*token*"):
        shutil.copy(path, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    target = adapter / "merged"
    with pytest.raises(UserError, match=r"differs from base \+ adapter by nan"):
        ChatModel(Checkpoint(adapter)).save_merged(target, torch.float32, [[1, 2], [3]])
    assert not target.exists()


def test_a_checkpoints_config_is_read_once(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(
        checkpoints, "read_config", lambda path: read.append(path) or {"vocab_size": 9, "seq_length": 7}
    )
    checkpoint = Checkpoint(adapter)
    checkpoint.check_trust()
    assert (checkpoint.length, checkpoint.vocabulary, checkpoint.family().name) == (7, 9, "auto")
    assert checkpoint.lora_layers is None
    assert read == [adapter.parent / "model" / "config.json"]
    assert (checkpoint.is_whole, checkpoint.adapters, checkpoint.base.adapters) == (False, [adapter], [])


@pytest.mark.parametrize(
    ("change_of", "sentence"),
    [
        ({"stop": "x"}, 'stop is "x"|stop is .x., expected a list of texts'),
        ({"one_sample_per_answer": 1}, "expected true or false"),
        ({"chat_template": []}, "chat_template is"),
        ({"generation": {"batch_size": 0}}, "expected an object of whole numbers from 1"),
        ({"faq": {"none": None}}, "expected an object of texts"),
        ({"layout": "other"}, "unknown layout"),
        ({"surprise": 1}, "unknown key"),
        ({"model_types": [], "layout": ""}, "found none of them"),
    ],
)
def test_templates_of_ones_own_name_file_and_key(tmp_path: Path, change_of: dict[str, Any], sentence: str) -> None:
    folder = Path(shutil.copytree(TEMPLATES, tmp_path / "templates"))
    change(folder / "glm3.json", **change_of)
    with pytest.raises(UserError, match=sentence) as caught:
        read_families(folder)
    assert str(folder / "glm3.json") in str(caught.value)


def test_templates_need_the_common_one(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TEMPLATES, tmp_path / "templates"))
    (folder / "auto.json").unlink()
    with pytest.raises(UserError, match=r"has no auto.json"):
        read_families(folder)


def test_a_damaged_template_is_an_error_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Of each command that knows modes, and not of the modules that are imported."""
    folder = Path(shutil.copytree(TEMPLATES, tmp_path / "templates"))
    change(folder / "glm3.json", surprise=1)
    monkeypatch.setattr(families, "TEMPLATES", folder)
    request.addfinalizer(families.families.cache_clear)
    families.families.cache_clear()
    for command in (finetune, predict, prepare, model_performance_evaluation):
        assert command.main(["--help"]) == 2
        said = capsys.readouterr()
        assert "error: " in said.err
        assert "glm3.json: unknown key surprise" in said.err
        assert said.out == "" or json.loads(said.out)["code"] == 2


def test_checkpoints_are_known_without_torch(adapter: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmops.models.chat_model import Checkpoint;"
        "found = Checkpoint(Path(sys.argv[1])); found.check_trust(); print(found.length, found.family().name);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapter)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" auto\n")


def test_a_package_that_a_checkpoints_code_imports_is_named(model: Path) -> None:
    """As ChatGLM-6B's icetk and Qwen's tiktoken: transformers looks for it before it runs the code."""
    (model / "tokenization_own.py").write_text("import icetk_that_nobody_has\n\n\nclass OwnTokenizer:\n    pass\n")
    (model / "tokenizer.json").unlink()
    code = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    change(model / "tokenizer_config.json", auto_map=code, tokenizer_class="OwnTokenizer")
    change(model / "config.json", auto_map={"AutoTokenizer": code["AutoTokenizer"]})
    with pytest.raises(UserError, match=r"wants a package that is not here: pip install icetk_that_nobody_has$"):
        load_tokenizer(Checkpoint(model, trust_remote_code=True))
