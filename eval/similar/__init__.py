"""Similar questions with different intents: reading, embedding, exact search, findings, report, heat map."""
