"""What a job is told: every row of the platform's two tables, wrong values, secrets."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT

from job.calls import HIDDEN, check_address, check_header, shown_address
from job.settings import EVALUATE, FIVE, FLAGS, SIMILAR, TRAIN, read_settings
from job.tasks import plan
from llmops.console import UserError

# what the platform sets for a job of each kind, and for all of them
COMMON = {"TENANT_ID": "9d65d67f", "JOB_ID": "0b7d3a86", "API_URL": "http://aigc-server:8080/api/finetuning/0b7d3a86/finish",
          "AUTH": "Bearer abcdefgh", "HF_HOME": "/data/hf", "HF_ENDPOINT": "", "HTTP_PROXY": "", "HTTPS_PROXY": "",
          "NO_PROXY": ""}  # fmt: skip
TRAINING = COMMON | {"SCENARIO": "general", "BASE_MODEL_PATH": "/data/base-model/qwen1.5-7b-chat",
                     "BASE_MODEL_NAME": "qwen1.5-7b-chat", "TRAIN_FILE": "/data/train.jsonl", "EVAL_FILE": "",
                     "OUTPUT_DIR": "/data/ft-model/ft-qwen-1", "USE_LORA": "true", "GPUS_PER_NODE": "2",
                     "MODEL_MAX_LENGTH": "2048", "NUM_TRAIN_EPOCHS": "3", "PER_DEVICE_TRAIN_BATCH_SIZE": "8",
                     "PER_DEVICE_EVAL_BATCH_SIZE": "32", "GRADIENT_ACCUMULATION_STEPS": "2", "LEARNING_RATE": "2e-5",
                     "MASTER_PORT": "29123"}  # fmt: skip
EVALUATION = COMMON | {"MODEL_PATH": "/data/ft-model/ft-qwen-1", "DATASET_PATH": "/data/test.jsonl",
                       "EVALUATION_METRICS": "Rouge", "MAX_SEQ_LEN": "512", "PER_DEVICE_BATCH_SIZE": "8"}  # fmt: skip
SIMILAR_QUESTIONS = COMMON | {"DATASET_ANALYZE_MODEL": "uer/sbert-base-chinese-nli", "DATASET_TYPE": "faq",
                              "DATASET_PATH": "/data/faq.jsonl", "DATA_TASK_JOB_ID": "task-1"}  # fmt: skip


def planned(environment: dict[str, str], *arguments: str) -> tuple[str, dict[str, str], dict[str, str], Sequence[str]]:
    """(script, flags, environment, further flags) of the command that a job runs; places are taken as they are."""
    settings = read_settings(arguments, environment)
    work = plan(settings, lambda name, text: text, lambda name, text: text)
    assert work.command[0] == "bash"
    flags = dict(item.removeprefix("--").split("=", 1) for item in work.command[2:] if "=" in item)
    rest = [item for item in work.command[2:] if "=" not in item]
    return str(Path(work.command[1]).relative_to(ROOT)), flags, work.environment, rest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"scenario": "general"}),
        ({"SCENARIO": "faq"}, {"scenario": "faq"}),
        ({}, {"model_name_or_path": "/data/base-model/qwen1.5-7b-chat"}),
        ({"BASE_MODEL_PATH": ""}, {"model_name_or_path": "qwen1.5-7b-chat"}),
        ({"BASE_MODEL_PATH": "Qwen/Qwen1.5-7B-Chat"}, {"model_name_or_path": "Qwen/Qwen1.5-7B-Chat"}),
        ({}, {"train_file": "/data/train.jsonl", "test_file": None}),
        ({"EVAL_FILE": "http://a/e.jsonl"}, {"test_file": "http://a/e.jsonl"}),
        ({}, {"output_path": "/data/ft-model/ft-qwen-1/run", "merge_lora": "true"}),
        ({}, {"train_type": "lora", "zero_stage": "2"}),
        ({"USE_LORA": "false"}, {"train_type": "all", "zero_stage": "3", "merge_lora": None}),
        ({"USE_LORA": "True", "ZERO_STAGE": "3_offload"}, {"train_type": "lora", "zero_stage": None}),
        ({"USE_LORA": ""}, {"train_type": None, "zero_stage": None, "merge_lora": "true"}),
        ({"USE_LORA": "", "TRAIN_TYPE": "all"}, {"train_type": None, "merge_lora": None}),
        ({}, {"num_processes": "2"}),
        ({"GPUS_PER_NODE": "0"}, {"num_processes": "1"}),
        ({"GPUS_PER_NODE": ""}, {"num_processes": None}),
        ({}, {"max_seq_len": "2048"}),
        ({"MODEL_MAX_LENGTH": "", "MAX_SEQ_LEN": "64"}, {"max_seq_len": "64"}),
        ({"OUTPUT_DIR": ""}, {"output_path": None, "merge_lora": None}),
    ],
)  # fmt: skip
def test_each_row_of_training(change: dict[str, str], expected: dict[str, str | None]) -> None:
    script, flags, _, _ = planned(TRAINING | change)
    assert script == "chat_main.sh"
    assert {name: flags.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    "name",
    ["NUM_TRAIN_EPOCHS", "PER_DEVICE_TRAIN_BATCH_SIZE", "PER_DEVICE_EVAL_BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS",
     "LEARNING_RATE", "MASTER_PORT"],
)  # fmt: skip
def test_what_has_the_same_name_stays_in_the_environment(name: str) -> None:
    """chat_main.sh reads these itself."""
    assert f'\n{name}="${{{name}:-' in (ROOT / "chat_main.sh").read_text(encoding="utf-8")
    assert planned(TRAINING)[2][name] == TRAINING[name]


def test_the_cpu_is_asked_for_by_no_gpus() -> None:
    assert planned(TRAINING | {"GPUS_PER_NODE": "0"})[2]["CUDA_VISIBLE_DEVICES"] == "-1"
    assert "CUDA_VISIBLE_DEVICES" not in planned(TRAINING)[2]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"model_name_or_path": "/data/ft-model/ft-qwen-1", "dataset_path": "/data/test.jsonl"}),
        ({}, {"evaluation_metrics": "Rouge"}),
        ({"EVALUATION_METRICS": "Acc"}, {"evaluation_metrics": "Acc"}),
        ({}, {"max_new_tokens": "512", "max_seq_len": "auto"}),  # there: the tokens of the answer
        ({"MAX_SEQ_LEN": "0"}, {"max_new_tokens": None}),
        ({}, {"per_device_batch_size": "8"}),
        ({"PER_DEVICE_BATCH_SIZE": "0"}, {"per_device_batch_size": None}),
        ({}, {"num_processes": None}),
        ({"GPUS_PER_NODE": "4"}, {"num_processes": "4"}),
        ({"GPUS_PER_NODE": "0"}, {"num_processes": "1"}),
    ],
)  # fmt: skip
def test_each_row_of_an_evaluation(change: dict[str, str], expected: dict[str, str | None]) -> None:
    script, flags, _, _ = planned(EVALUATION | change)
    assert script == "eval/model_performance_evaluation.sh"
    assert {name: flags.get(name) for name in expected} == expected


def test_the_five_dimensions_are_a_metric() -> None:
    """The platform gives no data for them; how long answers may be is each dimension's own."""
    script, flags, _, _ = planned(EVALUATION | {"EVALUATION_METRICS": "five", "DATASET_PATH": ""})
    assert script == "eval/evaluate_model_from_five_dimensions.sh"
    assert flags["model_name_or_path"] == "/data/ft-model/ft-qwen-1"
    assert json.loads(flags["additional_parameters"]) == {"additional_parameters": {"batch_size": 8}}
    assert "max_new_tokens" not in flags
    assert planned(EVALUATION | {"EVALUATION_METRICS": "five"}, "--task", EVALUATE)[0] == script


def test_each_row_of_similar_questions() -> None:
    script, flags, _, _ = planned(SIMILAR_QUESTIONS)
    assert script == "eval/analyze_similar_questions_and_intents.sh"
    assert flags == {"data_file_path": "/data/faq.jsonl", "model_path": "uer/sbert-base-chinese-nli"}
    with pytest.raises(UserError, match="DATASET_TYPE is 'general', expected faq"):
        read_settings([], SIMILAR_QUESTIONS | {"DATASET_TYPE": "general"})
    with pytest.raises(UserError, match="DATASET_PATH is empty"):
        read_settings([], SIMILAR_QUESTIONS | {"DATASET_PATH": ""})


@pytest.mark.parametrize(
    ("environment", "task"),
    [(TRAINING, TRAIN), (EVALUATION, EVALUATE), (EVALUATION | {"EVALUATION_METRICS": "five"}, FIVE),
     (SIMILAR_QUESTIONS, SIMILAR), ({}, TRAIN)],
)  # fmt: skip
def test_the_task_is_told_by_what_is_set(environment: dict[str, str], task: str) -> None:
    assert read_settings([], environment).task == task


def test_flags_win_and_the_rest_is_the_commands() -> None:
    script, flags, _, rest = planned(TRAINING, "--gpus_per_node", "1", "--output_dir=/b", "--", "--lora_dim", "8")
    assert (script, flags["num_processes"], flags["output_path"]) == ("chat_main.sh", "1", "/b/run")
    assert rest == ["--lora_dim", "8"]
    assert planned({"MODEL_NAME_OR_PATH": "/m"})[1]["model_name_or_path"] == "/m"


@pytest.mark.parametrize("names", [TRAINING, EVALUATION, SIMILAR_QUESTIONS])
def test_the_command_sees_no_secret_and_nothing_twice(names: dict[str, str]) -> None:
    environment = planned(names | {"NOTIFY_TOKEN": "t" * 20, "PATH": "/bin"})[2]
    assert not {"AUTH", "API_URL", "TENANT_ID", "NOTIFY_TOKEN", "NOTIFY_URL"} & environment.keys()
    assert not {name.upper() for name in FLAGS} & environment.keys()
    assert environment["PATH"] == "/bin"
    assert environment["HF_HOME"] == "/data/hf"
    assert environment["TENSORBOARD"] == "false"


def test_every_setting_stands_in_the_script() -> None:
    """run.sh lists and exports what run.py reads."""
    text = (ROOT / "job" / "run.sh").read_text(encoding="utf-8")
    for name in FLAGS:
        assert f'\n{name.upper()}="${{{name.upper()}:-' in text
        assert f" {name.upper()}" in text.partition("\nexport")[2].partition("PYTHON=")[0]


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"SCENARIO": "rag"}, "SCENARIO is 'rag', expected general or faq"),
        ({"GPUS_PER_NODE": "two"}, "GPUS_PER_NODE is 'two', expected a whole number from 0 to 1024"),
        ({"GPUS_PER_NODE": "-1"}, "GPUS_PER_NODE is '-1', expected"),
        ({"MODEL_MAX_LENGTH": "4"}, "MODEL_MAX_LENGTH is '4', expected a whole number from 8"),
        ({"USE_LORA": "maybe"}, "USE_LORA is 'maybe', expected true or false"),
        ({"JOB_ID": "../../etc"}, "JOB_ID is '../../etc', expected letters"),
        ({"FETCH": "yes"}, "FETCH is 'yes', expected auto or true or false"),
        ({"LOG_STYLE": "x", "TASK": "y"}, "TASK is 'y', expected train or evaluate or five or similar; LOG_STYLE is"),
        ({"API_URL": "file:///etc/passwd"}, "API_URL is no address; expected one such as https://"),
        ({"API_URL": "http://a b/"}, "API_URL is no address"),
        ({"API_URL": "http://a:port/"}, "API_URL is no address"),
        ({"NOTIFY_URL": "example.org/hook"}, "NOTIFY_URL is no address"),
        ({"TRAIN_FILE": "https://"}, "TRAIN_FILE is no address"),
        ({"AUTH": "Bearer abc\r\nX-Evil: 1"}, "AUTH holds a character that no HTTP header can"),
        ({"TENANT_ID": "租户"}, "TENANT_ID holds a character that no HTTP header can"),
    ],
)  # fmt: skip
def test_wrong_values_are_one_sentence(change: dict[str, str], phrase: str) -> None:
    with pytest.raises(UserError) as caught:
        read_settings([], TRAINING | change)
    assert phrase in str(caught.value)
    assert "abcdefgh" not in str(caught.value)
    assert "X-Evil" not in str(caught.value)


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(UserError, match="unrecognized arguments: --lora_dim"):
        read_settings(["--lora_dim", "8"], {})
    with pytest.raises(UserError, match="unrecognized arguments: --auth"):
        read_settings(["--auth", "x"], {})  # every user of the machine would see it


def test_secrets_are_taken_out_of_texts() -> None:
    given = {"AUTH": "Bearer eyJhbGciOi.J9", "NOTIFY_TOKEN": "hook-token-1", "HF_TOKEN": "hf_abcdefgh",
             "TRAIN_FILE": "https://user:passw0rd@store/a.jsonl?X-Sig=0123456789abcdef"}  # fmt: skip
    settings = read_settings([], TRAINING | given)
    text = "eyJhbGciOi.J9 hook-token-1 hf_abcdefgh user:passw0rd X-Sig=0123456789abcdef"
    assert settings.secrets.hidden(text) == " ".join([HIDDEN] * 5)
    assert settings.secrets.hidden("store/a.jsonl, Bearer") == "store/a.jsonl, Bearer"
    assert shown_address(given["TRAIN_FILE"]) == "https://store/a.jsonl"
    assert not any(secret in repr(settings) for secret in ("eyJhbGciOi", "hook-token-1"))


def test_addresses_and_headers() -> None:
    assert check_address("A", "http://[::1]:80/a?b#c") == "http://[::1]:80/a?b#c"
    assert check_header("A", " Bearer x ") == "Bearer x"


def test_a_training_goes_on_where_one_began(tmp_path: Path) -> None:
    """Then its data is what it was; an evaluation reads what stands at the address today."""
    given = TRAINING | {"OUTPUT_DIR": str(tmp_path)}
    assert not read_settings([], given).goes_on
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune_config.json").write_text("{}")
    assert read_settings([], given).goes_on
    assert not read_settings([], given | {"OVERWRITE_OUTPUT_PATH": "True"}).goes_on
    assert not read_settings(["--", "--overwrite_output_path=true"], given).goes_on
    assert not read_settings(["--", "--overwrite_output_path", "true"], given).goes_on
    assert read_settings(["--", "--overwrite_output_path", "false"], given | {"OVERWRITE_OUTPUT_PATH": "1"}).goes_on
    assert not read_settings(["--task", "evaluate"], given).goes_on
