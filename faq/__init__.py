"""The FAQ scenario: which of the known intents does a question have?"""
