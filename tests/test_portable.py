"""What is saved is written as releases 4 and 5 of transformers both read it; nothing that it means has changed.

Loaded for real by both: bash tests/loads_elsewhere.sh FOLDER.
"""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, Qwen3_5Config, Qwen3_5ForConditionalGeneration, StableLmConfig

from llmops import files
from llmops.models import portable
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

PART = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.375}
TEXTS = ["你好，世界！ Hello  world\n\n123", "<|im_start|>user\nhi<|im_end|>\n", "\t  多 个 空格"]


@pytest.fixture
def base(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint as today's libraries write it, with the terms of its use."""
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    (folder / "LICENSE.txt").write_text("terms", encoding="utf-8")
    return folder


def saved(base: Path, name: str = "saved") -> Path:
    """A folder as the library leaves it after training: config.json and a tokenizer of its own making."""
    folder = base.parent / name
    folder.mkdir()
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    config = AutoConfig.from_pretrained(base)
    config.use_cache = False
    config.save_pretrained(folder)
    return folder


def settings(folder: Path, name: str) -> dict[str, object]:
    """A JSON file of a folder."""
    found: dict[str, object] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def test_the_tokenizer_is_the_same_in_words_that_both_releases_know(base: Path) -> None:
    folder = saved(base)
    portable.make_portable(folder, base)
    found = settings(folder, "tokenizer_config.json")
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in found
    assert found["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    merges = settings(folder, "tokenizer.json")["model"]["merges"]  # type: ignore[index]
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    one, other = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    assert one.get_vocab() == other.get_vocab()
    assert one.all_special_ids == other.all_special_ids
    assert [one(text)["input_ids"] for text in TEXTS] == [other(text)["input_ids"] for text in TEXTS]


def test_files_that_are_readable_everywhere_are_copied_byte_for_byte(base: Path) -> None:
    first = saved(base)
    portable.make_portable(first, base)
    published = base.parent / "published"  # as a vendor of 2024 has it
    shutil.copytree(first, published)
    (published / "special_tokens_map.json").write_text('{"eos_token":   "<|im_end|>"}', encoding="utf-8")
    folder = saved(published, "again")
    portable.make_portable(folder, published)
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in names:
        assert (folder / name).read_bytes() == (published / name).read_bytes(), name


def test_a_piece_with_a_blank_keeps_the_new_form(base: Path) -> None:
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].append(["a b", "c"])
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    before = path.read_bytes()
    portable.write_old_merges(path)
    assert path.read_bytes() == before


def test_a_template_that_only_the_training_had_is_kept(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    folder = saved(base)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    portable.make_portable(folder, base)
    assert settings(folder, "tokenizer_config.json")["chat_template"] == "{{ messages }}"
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"


def test_templates_for_tools_are_kept_beside_the_default_one(base: Path) -> None:
    """Today's libraries write them into a folder, which is no file of a model; both releases read a list of them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    several = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.chat_template = several
    tokenizer.save_pretrained(base)
    assert (base / portable.NAMED).is_dir()
    folder = saved(base)
    portable.make_portable(folder, base)
    assert AutoTokenizer.from_pretrained(folder).chat_template == several
    assert not [path for path in folder.iterdir() if path.is_dir() or path.name == portable.TEMPLATE]
    assert {
        one["name"]: one["template"] for one in settings(folder, "tokenizer_config.json")["chat_template"]
    } == several  # type: ignore[attr-defined]


def test_the_template_of_a_named_mode_goes_before_the_tokenizers_own(base: Path) -> None:
    own = (base / "chat_template.jinja").read_text(encoding="utf-8")
    folder = saved(base)
    learned = Checkpoint(base, mode="llama2").named_template
    assert learned not in ("", own)
    portable.make_portable(folder, base, template=learned)
    assert settings(folder, "tokenizer_config.json")["chat_template"] == learned
    assert AutoTokenizer.from_pretrained(folder).chat_template == learned
    assert Checkpoint(base).named_template == ""


def test_a_model_is_asked_as_it_was_trained(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In the mode that was named then: the run's folder, a checkpoint of it, an adapter that is put on the base."""
    asked = [{"role": "user", "content": "你好"}]
    base, run = checkpoints["qwen2"], tmp_path / "run"
    for folder in (run, run / "checkpoint-2"):
        shutil.copytree(base, folder, dirs_exist_ok=True)
    (run / "finetune_config.json").write_text('{"mode": "qwen1.5"}', encoding="utf-8")
    expected = ChatModel(Checkpoint(base, mode="qwen1.5")).chat.prompt(asked)
    assert expected != ChatModel(Checkpoint(base)).chat.prompt(asked)
    for folder in (run, run / "checkpoint-2"):
        assert ChatModel(Checkpoint(folder)).chat.prompt(asked) == expected
    assert ChatModel(Checkpoint(base, adapter=run)).chat.prompt(asked) == expected
    (run / "finetune_config.json").write_text('{"mode": "one of yours that is gone"}', encoding="utf-8")
    assert ChatModel(Checkpoint(run)).chat.prompt(asked) == ChatModel(Checkpoint(base)).chat.prompt(asked)


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 123456.0}, None),
        ({"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}, {"type": "dynamic", "factor": 2.0}),
        (
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 4096},
            {"type": "dynamic", "factor": 2.0},
        ),
        (
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 77},
            {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 77},
        ),
        (
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
            {"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
        ),
    ],
)  # fmt: skip
def test_the_config_has_both_spellings(base: Path, rope: dict[str, object], scaling: dict[str, object] | None) -> None:
    path = base / "config.json"
    path.write_text(
        json.dumps(
            settings(base, "config.json") | {"rope_parameters": rope, "seq_length": 77, "torch_dtype": "float16"}
        ),
        encoding="utf-8",
    )
    folder = saved(base)
    expected = AutoConfig.from_pretrained(folder)
    portable.make_portable(folder, base)
    found = settings(folder, "config.json")
    assert (found["rope_theta"], found["rope_scaling"]) == (rope["rope_theta"], scaling)
    assert found["torch_dtype"] == found["dtype"]
    assert (found["use_cache"], found["seq_length"]) == (True, 77)
    read = AutoConfig.from_pretrained(folder)
    said = {key: value for key, value in expected.rope_parameters.items() if value != expected.max_position_embeddings}
    assert {key: value for key, value in read.rope_parameters.items() if key in expected.rope_parameters} == said
    assert set(read.rope_parameters) <= {*expected.rope_parameters, "type"}
    assert (folder / "LICENSE.txt").read_text(encoding="utf-8") == "terms"
    assert (folder / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_the_part_that_rotates_has_both_spellings() -> None:
    """Inside rope_parameters today, beside rope_scaling before: a Phi or StableLM would be another model without it."""
    config = portable.both_spellings(StableLmConfig(rope_parameters=PART).to_dict())
    assert (config["partial_rotary_factor"], config["rope_theta"], config["rope_scaling"]) == (0.375, 5e5, None)
    scaled = portable.both_spellings({"rope_parameters": PART | {"rope_type": "linear", "factor": 3.0}})
    assert (scaled["partial_rotary_factor"], scaled["rope_scaling"]) == (0.375, {"type": "linear", "factor": 3.0})
    for written, kind in ((config, "default"), (scaled, "linear")):
        read = StableLmConfig.from_dict(written).rope_parameters
        assert {key: read[key] for key in PART} | {"rope_type": read["rope_type"]} == PART | {"rope_type": kind}


def test_an_adapter_names_only_what_it_uses(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    plain, special = LoraConfig(r=4, target_modules=["q_proj"]), LoraConfig(r=4, use_dora=True, layers_to_transform=[0])
    for config, more in ((plain, set()), (special, {"use_dora"})):
        config.save_pretrained(folder)
        written = settings(folder, "adapter_config.json")
        portable.make_portable(folder, base)
        found = settings(folder, "adapter_config.json")
        assert set(found) == set(portable.LORA_SETTINGS) & set(written) | more
        assert LoraConfig.from_pretrained(folder).to_dict() == config.to_dict()
    assert set(portable.LORA_SETTINGS) - set(inspect.signature(LoraConfig).parameters) <= {"auto_mapping"}


def test_the_end_that_was_learned_stands_beside_those_of_a_base_that_was_no_chat_model(base: Path) -> None:
    """As Qwen2.5-0.5B: a text ends with one token, an answer of its template with another. Byte for byte else."""
    folder = saved(base)
    portable.make_portable(folder, base, ends=ChatModel(Checkpoint(base)).chat.stop_ids())
    assert (folder / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    path, text_end = base / "generation_config.json", {"eos_token_id": 0, "temperature": 0.9, "do_sample": False}
    path.write_text(json.dumps(text_end), encoding="utf-8")
    adapter = base.parent / "adapter"
    whole = ChatModel(Checkpoint(base)).weights(torch.float32)
    get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    told = settings(adapter, "adapter_config.json") | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(told), encoding="utf-8")
    opened = ChatModel(Checkpoint(adapter))  # as PEFT saves it, without a tokenizer: the base's is its own
    end = opened.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert opened.chat.stop_ids() == [0, end]
    opened.save_merged(base.parent / "merged", torch.float32, [[5, 6]], opened.chat.stop_ids())
    assert settings(base.parent / "merged", "generation_config.json") == text_end | {"eos_token_id": [0, end]}
    readable = {path.stat().st_mode & 0o777 for path in (base.parent / "merged").iterdir()}
    assert readable == {0o666 & ~files.current_umask()}
    assert ChatModel(Checkpoint(base.parent / "merged")).tokenizer.get_vocab() == opened.tokenizer.get_vocab()


def test_the_text_part_of_a_larger_model_opens_again(base: Path) -> None:
    """As Qwen3.5: the checkpoint holds a vision part, what is trained and saved is the text part alone."""
    text = {
        "vocab_size": 900, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "max_position_embeddings": 4096,
        "num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).save_pretrained(base)
    opened = ChatModel(Checkpoint(base))
    assert (opened.checkpoint.vocabulary, opened.checkpoint.length) == (900, 4096)
    model = opened.weights(torch.float32)
    folder = base.parent / "saved"
    model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    opened.make_portable(folder)
    again = ChatModel(Checkpoint(folder)).weights(torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert not {"vision_config", "text_config"} & settings(folder, "config.json").keys()


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v7", "own_words.txt"])
def test_a_vocabulary_of_another_name_is_not_lost(base: Path, name: str) -> None:
    """Those of Mistral's are copied; of one that is not known here what the library wrote stays."""
    folder = saved(base)
    written = (folder / "tokenizer.json").read_bytes()
    (base / "tokenizer.json").rename(base / name)
    portable.make_portable(folder, base)
    if name == "own_words.txt":
        assert (folder / "tokenizer.json").read_bytes() == written
    else:
        assert (folder / name).read_bytes() == (base / name).read_bytes()
