"""Conversations: their one form, the shapes that people have them in, the files they lie in."""
