"""DeepSpeed files of users: what is refused before anything is loaded, and what is warned about."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

from train import deepspeed_file
from train.config import DS_FILES, Config

GOOD: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def config_with(path: Path, content: Any, **settings: Any) -> Config:
    """Settings with a DeepSpeed file of this content (text as it is)."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return replace(Config(), ds_file=str(path), **settings)


@pytest.mark.parametrize(
    ("kind", "params", "unused"),
    [
        ("WarmupLR", {"warmup_num_steps": "auto"}, "--lr_scheduler_type"),
        ("WarmupDecayLR", {"total_num_steps": "auto"}, "--lr_scheduler_type, --warmup_ratio"),
        (
            "OneCycle",
            {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-4},
            "--lr_scheduler_type, --warmup_ratio, --learning_rate",
        ),
        ("LRRangeTest", None, "--lr_scheduler_type, --warmup_ratio, --learning_rate"),
    ],
)
def test_settings_that_a_scheduler_of_the_file_leaves_unused(
    tmp_path: Path, kind: str, params: dict[str, Any] | None, unused: str
) -> None:
    section = {"type": kind} | ({} if params is None else {"params": params})
    config = config_with(tmp_path / "ds.json", GOOD | {"scheduler": section})
    assert deepspeed_file.find_problems(config) == []
    (warning,) = deepspeed_file.warnings(config)
    assert f"scheduler decides how the learning rate runs, and not {unused}; leave the section" in warning


@pytest.mark.parametrize("kind", deepspeed_file.OWN_RATES)
def test_schedulers_of_deepspeed_with_rates_of_their_own(kind: str) -> None:
    """The optimizer's learning rate is gone when they begin; WarmupLR takes it for its peak."""
    params: dict[str, dict[str, Any]] = {
        "OneCycle": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-4, "cycle_momentum": False},
        "LRRangeTest": {},
    }
    rates = []
    for rate in (1.0, 2.0):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        schedule = getattr(lr_schedules, kind)(optimizer, **params[kind])
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize("stage", DS_FILES)
def test_our_own_files_are_good(stage: str) -> None:
    config = replace(Config(), zero_stage=stage)
    assert deepspeed_file.find_problems(config) == []
    assert deepspeed_file.warnings(config) == []


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("null", "holds a JSON NoneType, expected an object"),
        ("[]", "holds a JSON list, expected an object"),
        ("{", "is not JSON"),
        ({"zero_optimization": {"stage": "x"}}, "zero_optimization.stage is 'x', expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is '2', expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true"),
        ({"zero_optimization": 2}, "zero_optimization is 2, expected a JSON object"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer is 'cpu', expected"),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            "device is 'disk', expected none or cpu or nvme",
        ),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size is 'big'"),
        ({"gradient_accumulation_steps": "four"}, "gradient_accumulation_steps is 'four', expected a whole number"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu is 0, expected a whole number"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1, expected a number of at least 0"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes', expected true, false"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"optimizer": {"params": {}}}, "optimizer.type is null, expected a name"),
        ({"scheduler": "cosine"}, "scheduler is 'cosine', expected a JSON object"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8 and --gradient_accumulation_steps is 4"),
        ({"gradient_clipping": 0.5}, 'gradient_clipping is 0.5 and --max_grad_norm is 1; write "auto"'),
    ],
)
def test_wrong_files_are_one_sentence_each(tmp_path: Path, content: Any, phrase: str) -> None:
    given = content if isinstance(content, str) else GOOD | content
    problems = deepspeed_file.find_problems(config_with(tmp_path / "ds.json", given))
    assert len(problems) == 1
    assert re.search(re.escape(phrase), problems[0]), problems
    assert str(tmp_path / "ds.json") in problems[0]


def test_a_number_format_that_is_not_that_of_the_settings(tmp_path: Path) -> None:
    config = config_with(tmp_path / "ds.json", GOOD | {"bf16": {"enabled": True}}, dtype="fp32")
    assert "bf16.enabled is true and --dtype is fp32" in deepspeed_file.find_problems(config)[0]
    assert deepspeed_file.find_problems(replace(config, dtype="bf16")) == []
    assert deepspeed_file.find_problems(replace(config, dtype="auto")) == []


@pytest.mark.parametrize("key", deepspeed_file.GATHERING)
def test_stage_3_without_its_weights(tmp_path: Path, key: str) -> None:
    """All weights are gathered to be saved; an adapter is whatever the file says."""
    config = config_with(tmp_path / "ds.json", GOOD | {"zero_optimization": {"stage": 3}}, train_type="all")
    (problem,) = deepspeed_file.find_problems(config)
    assert "stage3_gather_16bit_weights_on_model_save is not true, so stage 3 would save no weights" in problem
    assert deepspeed_file.find_problems(replace(config, train_type="lora")) == []
    gathered = GOOD | {"zero_optimization": {"stage": 3, key: True}}
    assert deepspeed_file.find_problems(config_with(tmp_path / "ds.json", gathered, train_type="all")) == []
    for stage in DS_FILES:
        assert deepspeed_file.find_problems(replace(Config(), zero_stage=stage, train_type="all")) == []


def test_what_is_missing(tmp_path: Path) -> None:
    """Batch sizes are the settings' own (train/session.py); DeepSpeed's clipping and no mixed precision are silent."""
    config = config_with(tmp_path / "ds.json", {"zero_optimization": {"stage": 1}}, dtype="bf16", max_grad_norm=0.0)
    assert deepspeed_file.find_problems(config) == []
    assert deepspeed_file.CLIPPING == GRADIENT_CLIPPING_DEFAULT
    clipping, dtype = deepspeed_file.warnings(config)
    assert "clips at 1 and not at --max_grad_norm 0" in clipping
    assert "bf16 is missing" in dtype
    assert deepspeed_file.warnings(replace(config, max_grad_norm=1.0, dtype="fp32")) == []
    bare = config_with(tmp_path / "ds.json", {"gradient_accumulation_steps": "auto"})
    assert "zero_optimization is missing" in deepspeed_file.find_problems(bare)[0]
