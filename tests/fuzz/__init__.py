"""Broken and hostile inputs of every kind: what a command does with a file that somebody damaged or forged."""
