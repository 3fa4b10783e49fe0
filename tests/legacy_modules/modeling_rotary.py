"""A causal model as they were written in 2023: rotary positions in a buffer, tensors with the sequence first.

No post_init, no GenerationMixin, a tuple cache, the old protocols of gradient checkpointing and generation.
"""

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .modeling_streaming import Streaming


class RotaryConfig(PretrainedConfig):
    model_type = "old_rotary"

    def __init__(
        self, num_layers=2, padded_vocab_size=300, hidden_size=32, num_attention_heads=2, seq_length=512,
        use_prefix=False, **kwargs,
    ):  # fmt: skip
        self.num_layers = num_layers
        self.vocab_size = padded_vocab_size
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.seq_length = seq_length
        self.use_prefix = (use_prefix,)  # the comma is the symptom
        super().__init__(**kwargs)


class Rotation(nn.Module):
    def __init__(self, dim, dtype=None):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).to(dtype) / dim)))
        self.register_buffer("sign", torch.tensor([-1.0, 1.0]), persistent=False)

    def forward(self, length):
        kind = self.inv_freq.dtype
        angles = torch.outer(torch.arange(length, dtype=kind, device=self.inv_freq.device), self.inv_freq)
        angles = angles * self.sign[1].to(kind)
        return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x, table):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = table[..., None, :, 0], table[..., None, :, 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class OldBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.norm = nn.LayerNorm(config.hidden_size, dtype=config.torch_dtype)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, dtype=config.torch_dtype)
        self.dense_4h_to_h = nn.Linear(config.hidden_size, config.hidden_size, dtype=config.torch_dtype)

    def forward(self, hidden, mask, table, past=None, use_cache=True):
        length, rows, width = hidden.shape
        query, key, value = self.query_key_value(self.norm(hidden)).view(length, rows, self.heads, -1).chunk(3, -1)
        query, key = rotate(query, table), rotate(key, table)
        if past is not None:
            key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~mask)
        mixed = mixed.permute(2, 0, 1, 3).reshape(length, rows, width)
        return hidden + self.dense_4h_to_h(mixed), ((key, value) if use_cache else None)


class OldStack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([OldBlock(config) for _ in range(config.num_layers)])
        self.gradient_checkpointing = False

    def forward(self, hidden, mask, table, past=None, use_cache=True):
        kept = ()
        for i, layer in enumerate(self.layers):
            before = past[i] if past else None
            if self.gradient_checkpointing and self.training:
                hidden, pair = torch.utils.checkpoint.checkpoint(layer, hidden, mask, table, before, use_cache)
            else:
                hidden, pair = layer(hidden, mask, table, past=before, use_cache=use_cache)
            kept += (pair,)
        return hidden, (kept if use_cache else None)


class OldPreTrainedModel(PreTrainedModel):
    config_class = RotaryConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OldBlock"]

    def _init_weights(self, module):
        return

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, OldStack):
            module.gradient_checkpointing = value


class OldModel(OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embedding = skip_init(nn.Embedding, config.padded_vocab_size, width, dtype=config.torch_dtype)
        self.rotation = Rotation(width // config.num_attention_heads, dtype=config.torch_dtype)
        self.encoder = OldStack(config)
        self.output_layer = skip_init(
            nn.Linear, width, config.padded_vocab_size, bias=False, dtype=config.torch_dtype
        )  # fmt: skip

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        rows, length = input_ids.shape
        seen = past_key_values[0][0].shape[0] if past_key_values else 0
        visible = torch.ones(rows, length, seen + length, device=input_ids.device).tril(seen).bool()
        if attention_mask is not None:
            visible = visible & (attention_mask[:, None, :] != 0)
        table = self.rotation(self.config.seq_length)
        table = table[position_ids].transpose(0, 1) if position_ids is not None else table[:length, None]
        visible = visible | ~visible.any(-1, keepdim=True)
        hidden, kept = self.encoder(
            self.embedding(input_ids).transpose(0, 1), ~visible[:, None], table, past_key_values, use_cache
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept)


class OldForCausalLM(Streaming, OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.max_sequence_length = config.max_length
        self.transformer = OldModel(config)

    def _update_model_kwargs_for_generation(
        self, outputs, model_kwargs, is_encoder_decoder=False, standardize_cache_format=False
    ):
        model_kwargs["past_key_values"] = self._extract_past_from_model_output(
            outputs, standardize_cache_format=standardize_cache_format
        )
        model_kwargs["is_first_forward"] = False
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, is_first_forward=True, **kwargs
    ):
        if not is_first_forward:
            input_ids, position_ids = input_ids[:, -1:], position_ids[:, -1:]
        return {
            "input_ids": input_ids, "past_key_values": past_key_values, "position_ids": position_ids,
            "attention_mask": attention_mask,
        }  # fmt: skip

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        output = self.transformer(input_ids, position_ids, attention_mask, past_key_values, use_cache)
        logits = self.transformer.output_layer(output.last_hidden_state).transpose(0, 1)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)

    @staticmethod
    def _reorder_cache(past, beam_idx):
        return tuple(tuple(part.index_select(1, beam_idx) for part in pair) for pair in past)
