"""A tuned model for tests of the server: an adapter with FAQ intents on a tiny checkpoint."""

import json
from pathlib import Path

INTENTS = {"查询物流进度": "请在订单页查看。", "申请退款": "请提交申请。", "修改密码": "请进入设置。", "开具发票": ""}


def write_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter with random weights, large enough to change answers, with an intents.json; its folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llmops.intents.catalog import Catalog, wording_of
    from llmops.models.chat_model import ChatModel
    from llmops.models.checkpoints import Checkpoint

    torch.manual_seed(3)
    model = ChatModel(Checkpoint(base)).weights(torch.float32)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    ChatModel(Checkpoint(base)).tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    catalog = Catalog("auto", wording_of("auto"), INTENTS, none_reply="请转人工。")
    (folder / "intents.json").write_text(catalog.to_json(), encoding="utf-8")
    return folder
