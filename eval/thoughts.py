"""The thought before an answer, `<think> ... </think>`: it is kept with the answer and not scored."""

OPEN, CLOSE = "<think>", "</think>"


def after_thought(text: str, opened: bool = False) -> str:
    """What follows the last thought of an answer; "" where the answer never leaves it.

    `opened`: the prompt has opened the thought, as DeepSeek-R1's does.
    """
    _, closed, said = text.rpartition(CLOSE)
    return "" if in_thought(text, opened) else (said.strip() if closed else text)


def in_thought(text: str, opened: bool = False) -> bool:
    """Whether an answer never leaves its thought."""
    _, closed, said = text.rpartition(CLOSE)
    return said.lstrip().startswith(OPEN) or (opened and not closed)


def told(setting: str) -> bool | None:
    """enable_thinking as the chat template gets it: `auto` is None, what the run that trained the model told it."""
    return {"true": True, "false": False}.get(setting)


def thought_note(count: int, asked: int) -> str:
    """What a reader of the scores must know of answers that are all thought."""
    return (
        f"{count} of {asked} answers never left their thought (</think>) and count as empty; enable_thinking false "
        "asks for answers without one"
    )
