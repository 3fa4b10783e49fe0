"""What the code of old checkpoints needs under current transformers: a patch per symptom."""
