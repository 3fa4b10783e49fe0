"""Like modeling_rotary, but it overrides gradient_checkpointing_enable with nothing, as one of 2023's models does."""

from .modeling_rotary import OldForCausalLM, OldModel, OldPreTrainedModel, OldStack, RotaryConfig  # noqa: F401


class DeafForCausalLM(OldForCausalLM):
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        return
