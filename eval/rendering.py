"""Prompts and answers as tokens: by the model's chat format, as in training, or as plain text."""

from collections.abc import Sequence

from eval.samples import Sample
from llmops.console import UserError
from llmops.formats.chat_format import ChatFormat
from llmops.formats.control_tokens import ControlTokens
from llmops.models.chat_model import ChatModel


class Renderer:
    """Prompts and answers as tokens: by the model's chat format, as in training, or as plain text."""

    def __init__(self, model: ChatModel, chat_template: bool) -> None:
        self.chat: ChatFormat | None = None
        if chat_template:
            try:
                self.chat = model.chat
            except UserError as error:
                if "chat template" not in str(error):
                    raise
                raise UserError(f"{error}; or turn chat_template off to ask in plain text") from error
        self.tokenizer = model.tokenizer
        # without a chat format, too, a text is a text
        self.controls = self.chat.controls if self.chat else ControlTokens(self.tokenizer, {})
        self.known: dict[str, list[int]] = {}
        self.stop_ids = sorted(self._stop_ids())

    def prompt(self, sample: Sample) -> list[int]:
        """The tokens up to where the answer begins."""
        if self.chat:
            return self.chat.prompt(sample.messages)
        return self.controls.encode_text(self.plain_text(sample), add_special_tokens=True)

    def plain_text(self, sample: Sample) -> str:
        """The conversation as text without role tokens, up to where the answer begins."""
        parts = []
        for message in sample.messages:
            parts.append(message["content"] + ("\n\n" if message["role"] == "assistant" else ""))
            if message["role"] == "system":
                parts.append("\n\n")
        return "".join(parts)

    def choices(self, sample: Sample, prompt: Sequence[int]) -> list[list[int]]:
        """The tokens of each choice after the prompt, without an end token."""
        if not sample.choices:
            return []
        if self.chat:
            return [self._chat_answer(choice)[:-1] for choice in sample.choices]
        found = []
        for choice in sample.choices:
            whole = self.controls.encode_text(self.plain_text(sample) + choice, add_special_tokens=True)
            if whole[-1:] == [self.tokenizer.eos_token_id]:
                whole = whole[:-1]
            joined = whole[: len(prompt)] == list(prompt) and len(whole) > len(prompt)
            found.append(whole[len(prompt) :] if joined else self._bare(choice))
        return found

    def answer_length(self, text: str) -> int:
        """How many tokens a text is, with an end token."""
        return len(self._bare(text)) + 1

    def decode(self, ids: Sequence[int]) -> str:
        """A generated text. In plain text an answer ends with its line, because nothing else ends it."""
        text = self._text(ids)
        return text if self.chat else text.split("\n", 1)[0].rstrip()

    def ends_by_line(self, ids: Sequence[int]) -> bool:
        """Whether a text without chat format goes on beyond the line that is its answer."""
        return self.chat is None and "\n" in self._text(ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _bare(self, text: str) -> list[int]:
        return self.controls.encode_text(text)

    def _continued(self, text: str) -> list[int]:
        """The tokens of a text amid another one: SentencePiece puts a blank before the first word of a whole one."""
        anchor = self._bare("a")
        whole = self._bare("a" + text)
        return whole[len(anchor) :] if whole[: len(anchor)] == anchor else self._bare(text)

    def _chat_answer(self, answer: str) -> list[int]:
        """The learned tokens of an answer: it and its end token."""
        if answer not in self.known:
            assert self.chat
            question = [{"role": "user", "content": "?"}]
            rendered = self.chat.conversation([*question, {"role": "assistant", "content": answer}])[-1]
            self.known[answer] = [i for i, learned in zip(rendered.ids, rendered.learned, strict=True) if learned]
            if not self.known[answer]:
                raise UserError(
                    f"the chat format ({self.chat.name}) writes no answer into a conversation; mend the model's chat "
                    "template, name another mode, or turn chat_template off to ask in plain text"
                )
        return self.known[answer]

    def _stop_ids(self) -> set[int]:
        """What ends an answer: what the chat format says; in plain text, its line."""
        if self.chat:
            self._chat_answer("。")  # a format that writes none is told before anything is asked
            found = {*self.chat.stop_ids()}
        else:
            line_ends = {ids[0] for ids in map(self._continued, ("\n", "\n\n")) if len(ids) == 1}
            found = {self.tokenizer.eos_token_id} | line_ends
        return found - {None}
