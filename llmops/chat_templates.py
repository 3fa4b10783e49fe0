"""A tokenizer's chat template at work: conversations as text, in which the template's control tokens can be told."""

from collections.abc import Sequence
from typing import Any

from llmops.console import UserError
from llmops.control_tokens import ControlTokens, Marks
from llmops.records import Message

PROBE: list[Message] = [
    {"role": "system", "content": "first probe"},
    {"role": "user", "content": "second probe"},
    {"role": "assistant", "content": "third probe"},
    {"role": "user", "content": "fourth probe"},
]


class ChatTemplate:
    """Renders conversations for one tokenizer by its chat template, within the limits of llmops/template_limits.py.

    A tokenizer class of a checkpoint's own that renders in its own way, without Jinja, is trusted code and does so.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        from transformers import PreTrainedTokenizerBase

        from llmops.template_limits import LimitedTemplate

        self.tokenizer = tokenizer
        self.name = name
        self._outlines: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        self._limited: LimitedTemplate | None = None
        if type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
            try:
                source = tokenizer.get_chat_template()
            except ValueError as error:
                raise UserError(f"{name} cannot be chosen: {str(error).splitlines()[0]}") from error
            self._limited = LimitedTemplate(source, name)
        self._special = dict(tokenizer.special_tokens_map)

    def start(self, messages: Sequence[Message]) -> None:
        """Begin the time that a conversation may take, however often it is rendered."""
        if self._limited:
            self._limited.limits.start(len(messages))

    def text(self, messages: Sequence[Message], generate: bool) -> str:
        """The conversation as the template writes it. Raises UserError, whatever the template does wrong."""
        if self._limited:
            return self._limited.render(
                messages, tools=None, documents=None, add_generation_prompt=generate, **self._special
            )
        from llmops.template_limits import ERRORS, said

        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
        except ERRORS as error:
            raise UserError(f"{self.name} refuses a conversation: {said(error)}") from error

    def own_only(self, text: str, messages: Sequence[Message], generate: bool, controls: ControlTokens) -> bool:
        """Whether a rendered conversation has just the control tokens that it would have with any other texts.

        One more can come from two texts that the template writes side by side.
        """
        roles = tuple(message["role"] for message in messages)
        outline = self._outlines.get((roles, generate))
        if outline is None:
            plain = [{"role": role, "content": "x"} for role in roles]
            try:
                outline = controls.found(self.text(plain, generate))
            except UserError:  # the template wants other texts than this one
                return False
            self._outlines[roles, generate] = outline
        return controls.found(text) == outline

    def named(self, messages: Sequence[Message], generate: bool, controls: ControlTokens) -> str:
        """The conversation with names (see ControlTokens) for the template's own control tokens, and for these only.

        Marks in the messages' texts show what comes from where. A template that looks into texts may write them
        differently because of the marks: then the marks at the edges are left out, and if that does not help, it gets
        to see texts in which no control token stands.
        """
        plain = self.text(messages, generate)
        marks = Marks.absent_from([plain, getattr(self._limited, "source", ""), *(m["content"] for m in messages)])
        for edges in (True, False):
            marked = [m | {"content": marks.put(m["content"], controls, edges)} for m in messages]
            text = self.text(marked, generate)
            named = marks.named(text, controls)
            if named is not None and (not edges or marks.taken(text) == plain):
                break
        assert named is not None  # without edges there are no pairs
        if not edges and controls.first(messages) and not self.own_only(text, messages, generate, controls):
            raise UserError(
                f"{self.name} makes a control token of what a message's text holds "
                f"({controls.first(messages)!r}); take it out of the text, or use another --mode"
            )
        return named


def written_around(template: ChatTemplate) -> list[str]:
    """Added tokens that a template writes around messages although the tokenizer does not call them special.

    A tag that it opens and closes before an answer (an empty `<think></think>`) is none: answers may write it.
    """
    added = getattr(template.tokenizer, "added_tokens_decoder", {}).values()
    plain = [token.content for token in added if not token.special and len(token.content) > 2]
    markup = [one for one in plain if not any(end.isalnum() or end.isspace() for end in (one[0], one[-1]))]
    if not markup:
        return []
    for messages in (PROBE, PROBE[1:]):
        template.start(messages)
        try:
            text = template.text(messages, generate=False)
            break
        except UserError:  # it takes no system message, or none of these conversations: real ones will tell
            text = ""
    before_answer = text.partition("second probe")[2].partition("third probe")[0]
    tags = {one for one in markup if one in before_answer and one.replace("<", "</", 1) in before_answer}
    return [one for one in markup if one in text and one not in tags and one.replace("</", "<", 1) not in tags]
