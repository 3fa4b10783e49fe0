"""Jobs of schedulers and of the platform that these commands come from: what they set, what they want to hear."""
