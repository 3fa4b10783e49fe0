"""Texts to vectors: an embedding model of a folder, the vectors that are kept, and n-grams where there is no model."""
