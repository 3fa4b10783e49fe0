"""What a model answers: choices, likelihoods and texts, with what prompts share computed once."""
