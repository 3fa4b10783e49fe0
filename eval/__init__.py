"""Evaluation of chat models: five dimensions, any data set, and what a training log or a data set says."""
