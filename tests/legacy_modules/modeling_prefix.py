"""A model as they were written in 2023: the prompt is read in both directions, a token has two positions.

Half precision stands in the code; masks have four dimensions and are made from the place of the bos token.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modeling_streaming import Streaming


class PrefixConfig(PretrainedConfig):
    model_type = "old_prefix"

    def __init__(
        self, vocab_size=300, hidden_size=32, num_layers=2, num_attention_heads=2, use_cache=True,
        mask_token_id=296, gmask_token_id=297, bos_token_id=298, eos_token_id=299, **kwargs,
    ):  # fmt: skip
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.use_cache = use_cache
        self.mask_token_id = mask_token_id
        self.gmask_token_id = gmask_token_id
        self.position_encoding_2d = True
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)


class HalfRotation(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", (1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))).half())

    def forward(self, length):
        positions = torch.arange(length, dtype=self.inv_freq.dtype, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def turn(x, position, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[position][:, :, None] + torch.cat([-second, first], -1) * sin[position][:, :, None]


class PrefixLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm = nn.LayerNorm(width, dtype=torch.half)
        self.query_key_value = nn.Linear(width, 3 * width, dtype=torch.half)
        self.dense = nn.Linear(width, width, dtype=torch.half)
        self.rotation = HalfRotation(width // self.heads // 2)

    def forward(self, hidden, position_ids, mask, past=None, use_cache=False):
        length, rows, width = hidden.shape
        query, key, value = self.query_key_value(self.norm(hidden)).view(length, rows, self.heads, -1).chunk(3, -1)
        table = self.rotation(int(position_ids.max()) + 1)
        first, second = position_ids[:, 0].T, position_ids[:, 1].T
        query, key = (
            torch.cat(
                [turn(half, place, *table) for half, place in zip(x.chunk(2, -1), (first, second), strict=True)], -1
            )
            for x in (query, key)
        )
        if past is not None:
            key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / (width // self.heads) ** 0.5
        weights = scores.masked_fill(mask, -10000.0).softmax(-1).to(value.dtype)
        mixed = torch.einsum("bhqk,kbhd->qbhd", weights, value).reshape(length, rows, width)
        return hidden + self.dense(mixed), ((key, value) if use_cache else None)


class PrefixPreTrainedModel(PreTrainedModel):
    config_class = PrefixConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrefixLayer"]

    def _init_weights(self, module):
        return

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, PrefixModel):
            module.gradient_checkpointing = value

    def get_masks(self, input_ids, device):
        prompt = [row.index(self.config.bos_token_id) for row in input_ids.tolist()]
        mask = torch.ones(len(prompt), input_ids.shape[1], input_ids.shape[1], device=device).tril()
        for i, length in enumerate(prompt):
            mask[i, :, :length] = 1
        return (mask < 0.5)[:, None]

    def get_position_ids(self, input_ids, mask_positions, device):
        rows, length = input_ids.shape
        places = torch.arange(length, device=device).repeat(rows, 1)
        steps = torch.zeros_like(places)
        for i, row in enumerate(input_ids.tolist()):
            start = row.index(self.config.bos_token_id)
            places[i, start:] = mask_positions[i]
            steps[i, start:] = torch.arange(1, length - start + 1, device=device)
        return torch.stack([places, steps], 1)


class PrefixModel(PrefixPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, dtype=torch.half)
        self.layers = nn.ModuleList([PrefixLayer(config) for _ in range(config.num_layers)])
        self.gradient_checkpointing = False

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        if past_key_values is None:
            if attention_mask is None:
                attention_mask = self.get_masks(input_ids, input_ids.device)
            if position_ids is None:
                places = [row.index(self.config.gmask_token_id) for row in input_ids.tolist()]
                position_ids = self.get_position_ids(input_ids, places, input_ids.device)
        hidden, kept = self.word_embeddings(input_ids).transpose(0, 1), ()
        for i, layer in enumerate(self.layers):
            before = past_key_values[i] if past_key_values is not None else None
            hidden, pair = layer(hidden, position_ids, attention_mask, past=before, use_cache=use_cache)
            kept += (pair,)
        return hidden, (kept if use_cache else None)


class PrefixForConditionalGeneration(Streaming, PrefixPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.position_encoding_2d = config.position_encoding_2d
        self.transformer = PrefixModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=torch.half)

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, past=None, past_key_values=None, **kwargs):
        past = past_key_values if past is None else past
        return {"input_ids": input_ids if past is None else input_ids[:, -1:], "past_key_values": past}

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        use_cache = use_cache if use_cache is not None else self.config.use_cache
        hidden, kept = self.transformer(input_ids, position_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(hidden).transpose(0, 1)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)

    @staticmethod
    def _reorder_cache(past, beam_idx):
        return tuple(tuple(part.index_select(1, beam_idx) for part in pair) for pair in past)
