"""Checkpoints: what is known of them without torch, models that are opened, folders that others can load."""
