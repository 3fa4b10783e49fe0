"""Answers token by token, written as in 2023: with parts of the library's `generate` that have changed or are gone."""

import copy

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList


class Streaming:
    def stream_generate(self, input_ids, generation_config=None, **kwargs):
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        state = generation_config.update(**kwargs)
        processors = self._get_logits_processor(
            generation_config=generation_config, input_ids_seq_length=input_ids.shape[1], encoder_input_ids=input_ids,
            prefix_allowed_tokens_fn=None, logits_processor=LogitsProcessorList(),
        )  # fmt: skip
        finished = self._get_stopping_criteria(
            generation_config=generation_config, stopping_criteria=StoppingCriteriaList()
        )
        warpers = self._get_logits_warper(generation_config)
        while True:
            output = self(**self.prepare_inputs_for_generation(input_ids, **state), return_dict=True)
            scores = warpers(input_ids, processors(input_ids, output.logits[:, -1]))
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
            state = self._update_model_kwargs_for_generation(output, state)
            yield input_ids
            if finished(input_ids, None):
                return
