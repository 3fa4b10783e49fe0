"""Questions with intents: their data, the candidates and prompts, retrieval, what a model predicts."""
