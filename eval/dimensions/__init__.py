"""The five dimensions: per module how a benchmark's files are read, what is asked and how an answer is scored."""
