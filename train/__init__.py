"""Fine-tuning of chat models."""
