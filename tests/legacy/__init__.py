"""Old remote-code checkpoints: every symptom, there without its patch, gone with it."""
