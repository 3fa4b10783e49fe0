"""A model behind HTTP: the engine that owns it, OpenAI's routes, intents."""
