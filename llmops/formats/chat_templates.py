"""A tokenizer's chat template at work: conversations as text, in which the template's control tokens can be told."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmops import json_text
from llmops.console import UserError
from llmops.conversations.records import Message, texts_in, with_strings
from llmops.formats.control_tokens import ControlTokens, Marks

if TYPE_CHECKING:
    from llmops.formats.template_limits import LimitedTemplate

PROBE: list[Message] = [
    {"role": "system", "content": "first probe"},
    {"role": "user", "content": "second probe"},
    {"role": "assistant", "content": "third probe"},
    {"role": "user", "content": "fourth probe"},
]


TOOL_PROBE = [
    {"type": "function", "function": {"name": "probe_call", "description": "probed description", "parameters": {
        "type": "object", "properties": {"place": {"type": "string", "description": "a place"}}, "required": ["place"],
    }}}
]  # fmt: skip
PROBED_CALL = {
    "id": "000000000", "type": "function", "function": {"name": "probe_call", "arguments": {"place": "probed value"}}
}  # fmt: skip
TOOLS_PROBE: list[Message] = [
    {"role": "user", "content": "first probe"},
    {"role": "assistant", "content": "", "tool_calls": [PROBED_CALL]},
    {"role": "tool", "content": "probed result", "name": "probe_call", "tool_call_id": "000000000"},
    {"role": "assistant", "content": "last probe"},
]
TOOL_PARTS = {
    "probed description": "descriptions of tools", "probed value": "tool calls", "probed result": "results of tools"
}  # fmt: skip


class ChatTemplate:
    """Renders conversations for one tokenizer by its chat template, within the limits of `template_limits`.

    A tokenizer class of a checkpoint's own that renders in its own way, without Jinja, is trusted code and does so.
    `variables` are handed to the template beside what every template gets (`enable_thinking`, `thinking`). A checkpoint
    with several templates has one for conversations with tools, `tool_use`, as transformers chooses it.
    """

    def __init__(self, tokenizer: Any, name: str, variables: Mapping[str, Any] | None = None) -> None:
        from transformers import PreTrainedTokenizerBase

        from llmops.formats.template_limits import LimitedTemplate

        self.tokenizer = tokenizer
        self.name = name
        self.variables = dict(variables or {})
        self._outlines: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        self._limited: LimitedTemplate | None = None
        self._for_tools: LimitedTemplate | None = None
        if type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template:
            try:
                source, for_tools = (tokenizer.get_chat_template(tools=tools) for tools in (None, TOOL_PROBE))
            except ValueError as error:
                raise UserError(f"{name} cannot be chosen: {str(error).splitlines()[0]}") from error
            self._limited = LimitedTemplate(source, name)
            self._for_tools = self._limited if for_tools == source else LimitedTemplate(for_tools, name)
        self._special = dict(tokenizer.special_tokens_map)

    def names_any(self, variables: Iterable[str]) -> bool:
        """Whether the template names one of these variables; a tokenizer that renders in its own way may."""
        return not self._limiteds or any(not limited.names.isdisjoint(variables) for limited in self._limiteds)

    @property
    def _limiteds(self) -> list["LimitedTemplate"]:
        """The templates within limits, without tools and with them; none for a class that renders in its own way."""
        return [limited for limited in (self._limited, self._for_tools) if limited]

    def start(self, messages: Sequence[Message]) -> None:
        """Begin the time that a conversation may take, however often it is rendered."""
        for limited in self._limiteds:
            limited.limits.start(len(messages))

    def text(self, messages: Sequence[Message], generate: bool, tools: Sequence[Any] = ()) -> str:
        """The conversation as the template writes it. Raises UserError, whatever the template does wrong."""
        if any("tool_calls" in message for message in messages) and self._written_with(tools)[1]:
            messages = [with_text_arguments(message) for message in messages]
        text = self._rendered(messages, generate, tools)
        if not json_text.encodable(text):
            raise UserError(f"{self.name} writes half a surrogate pair, which is no character; mend the template")
        return text

    def _rendered(self, messages: Sequence[Message], generate: bool, tools: Sequence[Any]) -> str:
        limited = self._for_tools if tools else self._limited
        if limited:
            return limited.render(
                messages, tools=list(tools) or None, documents=None, add_generation_prompt=generate,
                **(self.variables | self._special),
            )  # fmt: skip
        from llmops.formats.template_limits import ERRORS, said

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generate,
                **self.variables,
            )  # fmt: skip
        except ERRORS as error:
            raise UserError(f"{self.name} refuses a conversation: {said(error)}") from error

    def _written_with(self, tools: Sequence[Any]) -> tuple[str, bool]:
        """(a conversation with a tool as the template writes it, whether it wants a call's arguments as text)."""
        return self._probed if tools or self._for_tools is self._limited else self._probed_without

    @cached_property
    def _probed(self) -> tuple[str, bool]:
        """`_written_with` where the conversation describes its tools."""
        return self._probe(TOOL_PROBE)

    @cached_property
    def _probed_without(self) -> tuple[str, bool]:
        """`_written_with` where it does not, and the checkpoint has another template for that."""
        return self._probe(())

    def _probe(self, tools: Sequence[Any]) -> tuple[str, bool]:
        problem: UserError | None = None
        for as_text in (False, True):
            messages = [with_text_arguments(m) if as_text else m for m in TOOLS_PROBE]
            try:
                return self._rendered(messages, False, tools), as_text
            except UserError as error:
                problem = problem or error
        return "", False

    def check_tools(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        """Raise UserError for a conversation with parts that the template does not write."""
        used = {
            "probed description": bool(tools),
            "probed value": any("tool_calls" in message for message in messages),
            "probed result": any(message["role"] == "tool" for message in messages),
        }
        missing = [
            words for mark, words in TOOL_PARTS.items() if used[mark] and mark not in self._written_with(tools)[0]
        ]
        if missing:
            raise no_tools(self.name, missing)

    @cached_property
    def ends_answers(self) -> bool:
        """Whether the template writes anything after an answer that nothing follows."""
        try:
            text = self.text(PROBE[1:3], generate=False)
        except UserError:
            return True
        _, found, tail = text.rpartition("third probe")
        return bool(tail.strip()) or not found

    def after_answers(self) -> dict[str, str]:
        """What a template that ends no answer itself writes after one, by the role of who speaks next."""
        found: dict[str, str] = {}
        if self.ends_answers:
            return found
        for messages, tools in ((PROBE[1:], []), (TOOLS_PROBE[:3], TOOL_PROBE)):
            try:
                upto, text = (self.text(messages[:end], False, tools).rstrip() for end in (2, 3))
            except UserError:  # it takes no such conversation
                continue
            if text.startswith(upto):
                found[messages[2]["role"]] = text[len(upto) :]
        return found

    def own_only(
        self, text: str, messages: Sequence[Message], generate: bool, controls: ControlTokens, tools: Sequence[Any] = ()
    ) -> bool:
        """Whether a rendered conversation has just the control tokens that it would have with any other texts.

        One more can come from two texts that the template writes side by side.
        """
        if tools or any(len(message) > 2 for message in messages):
            return self._own_with_tools(text, messages, generate, controls, tools)
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

    def _own_with_tools(
        self, text: str, messages: Sequence[Message], generate: bool, controls: ControlTokens, tools: Sequence[Any]
    ) -> bool:
        """`own_only` where calls and descriptions of tools decide what is written: only control tokens are broken."""

        def broken(value: str) -> str:
            return controls.broken(value, "x")

        others = [
            {"role": m["role"], **with_strings({k: v for k, v in m.items() if k != "role"}, broken)} for m in messages
        ]
        return controls.found(text) == controls.found(self.text(others, generate, with_strings(tools, broken)))

    def named(
        self, messages: Sequence[Message], generate: bool, controls: ControlTokens, tools: Sequence[Any] = ()
    ) -> str:
        """The conversation with names (see ControlTokens) for the template's own control tokens, and for these only.

        Marks in the messages' texts show what comes from where. A template that looks into texts may write them
        differently because of the marks: then the marks at the edges are left out, and if that does not help, it gets
        to see texts in which no control token stands.
        """
        plain = self.text(messages, generate, tools)
        sources = [limited.source for limited in self._limiteds]
        marks = Marks.absent_from([plain, *sources, *texts_in(messages, tools)])
        described = with_strings(tools, lambda value: controls.broken(value, marks.inside))
        for edges in (True, False):
            marked = [marks.put_into(message, controls, edges) for message in messages]
            text = self.text(marked, generate, described)
            named = marks.named(text, controls)
            if named is not None and (not edges or marks.taken(text) == plain):
                break
        assert named is not None  # without edges there are no pairs
        held = None if edges else controls.first(messages, tools)
        if held and not self.own_only(text, messages, generate, controls, tools):
            raise UserError(
                f"{self.name} makes a control token of what a message's text holds "
                f"({held!r}); take it out of the text, or use another --mode"
            )
        return named


def with_text_arguments(message: Message) -> Message:
    """A message whose tool calls have their arguments as JSON text, as some templates want them."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json_text.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def no_tools(name: str, parts: Sequence[str]) -> UserError:
    """The error for a conversation with tools in a format without them."""
    return UserError(
        f"{name} writes no {' and no '.join(parts)}, so they would be lost; take these conversations out, or a model "
        "whose chat template knows tools"
    )


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
