"""A causal model as they were written in 2023: ALiBi in a mask for every position, a head that normalises its weight.

Batch first, a forward that swallows every keyword, a tuple cache, gradient checkpointing switched by the configuration.
"""

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class AlibiConfig(PretrainedConfig):
    model_type = "old_alibi"

    def __init__(
        self, vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, model_max_length=256,
        use_cache=True, tie_word_embeddings=False, gradient_checkpointing=False, **kwargs,
    ):  # fmt: skip
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.model_max_length = model_max_length
        self.use_cache = use_cache
        self.gradient_checkpointing = (gradient_checkpointing,)  # the comma is the symptom
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class AlibiLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden, mask, past=None, use_cache=False):
        rows, length, width = hidden.shape
        query, key, value = (
            part.view(rows, length, self.heads, -1).transpose(1, 2) for part in self.W_pack(hidden).chunk(3, -1)
        )
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        scores = query @ key.transpose(2, 3) / math.sqrt(width // self.heads)
        scores = (scores + mask[..., -length:, :]).clamp(min=torch.finfo(scores.dtype).min)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, width)
        return hidden + self.o_proj(mixed), ((key, value) if use_cache else None)


class AlibiPreTrainedModel(PreTrainedModel):
    config_class = AlibiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AlibiLayer"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=0.02)

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, AlibiModel):
            module.gradient_checkpointing = value


class AlibiModel(AlibiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.n_head = config.num_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([AlibiLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = config.gradient_checkpointing
        self.max_cache_pos = config.model_max_length
        self.first_run = True
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_alibi_mask(self, tensor, seq_length_with_past):
        if self.first_run:
            self.first_run = False
            count = self.max_cache_pos
            slopes = torch.tensor([2 ** (-8 * (i + 1) / self.n_head) for i in range(self.n_head)])
            ahead = torch.full((count, count), float("-inf")).triu(1)
            everything = ahead + slopes[:, None, None] * torch.arange(count)
            self.register_buffer("future_mask", everything.to(tensor), persistent=False)
        return self.future_mask[:, :seq_length_with_past, :seq_length_with_past]

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        total = input_ids.shape[1] + (past_key_values[0][0].shape[2] if past_key_values is not None else 0)
        hidden = self.embed_tokens(input_ids)
        mask = self.get_alibi_mask(hidden, total)
        if attention_mask is not None:
            if attention_mask.dim() == 2:
                attention_mask = (attention_mask[:, :, None] * attention_mask[:, None, :]).tril()
            hidden_keys = (attention_mask[:, None] == 0).to(mask.dtype) * torch.finfo(mask.dtype).min
            mask = mask[None] + hidden_keys
        kept = ()
        for i, layer in enumerate(self.layers):
            before = past_key_values[i] if past_key_values is not None else None
            if self.gradient_checkpointing and self.training:
                hidden, pair = torch.utils.checkpoint.checkpoint(
                    layer, hidden, mask, before, False, use_reentrant=False
                )
            else:
                hidden, pair = layer(hidden, mask, past=before, use_cache=use_cache)
            kept += (pair,)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept if use_cache else None)


class UnitHead(nn.Module):
    def __init__(self, width, words):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, width))
        self.first_flag = True

    def forward(self, hidden_states):
        if self.training:
            self.first_flag = True
            return nn.functional.linear(hidden_states, nn.functional.normalize(self.weight))
        if self.first_flag:
            self.first_flag = False
            self.weight.data = nn.functional.normalize(self.weight)
        return nn.functional.linear(hidden_states, self.weight)


class AlibiForCausalLM(AlibiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = AlibiModel(config)
        self.lm_head = UnitHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, labels=None, use_cache=None, return_dict=True,
        **kwargs,
    ):  # fmt: skip
        output = self.model(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        if past_key_values:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids, "past_key_values": past_key_values, "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
        }  # fmt: skip

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(part.index_select(0, beam_idx) for part in pair) for pair in past_key_values)
