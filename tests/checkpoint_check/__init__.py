"""The rows of check_checkpoint.py."""
