"""What runs in processes of its own: the module built directly, and generation under ZeRO 3."""

import json
from pathlib import Path

import torch

from checkpoint_check.subject import UNEQUAL
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint


def write_reference(folder: Path, given: Path, file: Path, dtype: torch.dtype) -> None:
    """Build the model directly, without llmops.legacy, and save its logits and losses for the prompts."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = settings.get("auto_map", {})
    if names:
        config = get_class_from_dynamic_module(names["AutoConfig"], str(folder)).from_pretrained(str(folder))
        reference = names.get("AutoModelForCausalLM") or names.get("AutoModelForSeq2SeqLM") or names["AutoModel"]
        kind = get_class_from_dynamic_module(reference, str(folder))
        if "max_length" not in vars(config) and hasattr(config, "seq_length"):
            config.max_length = config.seq_length
    else:
        config = transformers.AutoConfig.from_pretrained(str(folder))
        kind = getattr(transformers, config.architectures[0])
    config.dtype = dtype
    torch.set_default_dtype(dtype)
    model = kind(config)
    torch.set_default_dtype(torch.float32)
    model = model.to(dtype)
    weights = read_weights(folder)
    missing = set(model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=False).missing_keys)
    head = {"lm_head.weight"}
    if missing & head:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert all("inv_freq" in name for name in missing - head), f"the weight files lack {sorted(missing)}"
    model = model.to(device).eval()
    logits, losses = [], []
    with torch.no_grad():
        for prompt in json.loads(given.read_text(encoding="utf-8")):
            ids = torch.tensor([prompt], device=device)
            output = model(input_ids=ids, labels=ids, use_cache=False, return_dict=True)
            logits.append(output.logits.float().cpu())
            losses.append(float(output.loss))
    torch.save({"logits": logits, "losses": losses}, file)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the weight files."""
    weights: dict[str, torch.Tensor] = {}
    shards = sorted(folder.glob("model*.safetensors"))
    if shards:
        from safetensors.torch import load_file

        for path in shards:
            weights |= load_file(path)
    for path in [] if shards else sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(path, map_location="cpu", weights_only=True)
    return weights


def write_zero3_answers(folder: Path, given: Path, file: Path, dtype: torch.dtype) -> None:
    """One process of the row above."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    settings = {
        "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "train_batch_size": world,
        "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16},
    }  # fmt: skip
    kept = HfDeepSpeedConfig(settings)  # from_pretrained looks at it as long as it lives
    model = ChatModel(Checkpoint(folder, trust_remote_code=True)).weights(dtype)
    engine = deepspeed.initialize(model=model, config=kept.config)[0]
    engine.module.eval()
    prompts = json.loads(given.read_text(encoding="utf-8"))
    ids = torch.tensor([prompts[rank % len(prompts)]], device=engine.device)
    settings = {"max_new_tokens": UNEQUAL[rank % len(UNEQUAL)], "do_sample": False, "repetition_penalty": 1.0}
    with torch.no_grad():
        found = engine.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), synced_gpus=True, pad_token_id=0, **settings
        )
    Path(f"{file}.{rank}").write_text(json.dumps(found[0, ids.shape[1] :].tolist()), encoding="utf-8")
    torch.distributed.destroy_process_group()
