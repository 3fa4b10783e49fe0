"""How a model is told a conversation: chat formats, chat templates within bounds, control tokens."""
