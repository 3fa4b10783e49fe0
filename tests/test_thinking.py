"""Templates that think and templates that call: what the published ones of five families do, in short ones of our own.

The learned tokens are what the model would write after its own prompt.
"""

import shutil
from pathlib import Path

import pytest

from llmops import files
from llmops.console import UserError
from llmops.conversations import shapes
from llmops.formats.chat_format import ChatFormat, Rendered
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint

# earlier turns lose their thinking; the last one always gets a block, an empty one too; the prompt closes it on request
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set text = m.content %}{% set thought = '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# the prompt opens the thinking; no answer is written with its own, not even the last one
DEEPSEEK_R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|im_start|>user' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\n' }}{% endif %}"
)
# the choice has another name; an answer is written after the closed tag, without its thought
DEEPSEEK_V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant</think>' + m.content.split('</think>', 1)[-1] + eos_token }}"
    "{% else %}{{ '<|im_start|>user' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
# nothing ends an answer but the next speaker
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# the same with tools, whose results have a token of their own; thoughts before the last question are dropped
GLM45 = (
    "{{ tools | tojson if tools }}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|endoftext|>' if m.role == 'tool' else '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content if loop.index0 > ns.last else m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# one call per message, as JSON; results come from ipython
LLAMA31 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "{{ '<|im_start|>assistant\n' + '{\"name\": \"' + call.name + '\", \"parameters\": ' }}"
    "{{ call.arguments | tojson }}"
    "{{ '}<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\n' + m.content | trim + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# a call has an id of nine characters, and its result repeats it
MISTRAL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids of nine characters') }}{% endif %}"
    "{{ '[TOOL_CALLS]' + (c.function | tojson) + c.id }}{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS]' + m.content + m.tool_call_id }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
THOUGHT = [
    {"role": "user", "content": "怎么续借？"},
    {"role": "assistant", "content": "<think>\n先想\n</think>\n\n点续借。"},
    {"role": "user", "content": "逾期呢"},
    {"role": "assistant", "content": "<think>\n再想\n</think>\n\n每天0.1元"},
]
ANSWERED = [m | {"content": m["content"].split("</think>\n\n")[-1]} for m in THOUGHT]
CALLED = {
    "tools": [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}],
    "conversations": [
        {"from": "human", "value": "天气？"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "北京"}}'},
        {"from": "observation", "value": "晴"}, {"from": "gpt", "value": "都晴。"},
    ],
}  # fmt: skip


class Chats:
    """Formats of one tokenizer by template."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = ChatModel(Checkpoint(folder)).tokenizer

    def __call__(self, template: str, thinking: bool | None = None) -> ChatFormat:
        self.tokenizer.chat_template = template
        return ChatFormat(self.tokenizer, thinking=thinking)

    def told(self, samples: list[Rendered]) -> list[tuple[str, str]]:
        """(what is read, what is learned) of each sample."""
        decode = self.tokenizer.decode
        return [
            (decode([i for i, flag in zip(s.ids, s.learned, strict=True) if not flag]),
             decode([i for i, flag in zip(s.ids, s.learned, strict=True) if flag]))
            for s in samples
        ]  # fmt: skip


@pytest.fixture(scope="module")
def chats(checkpoints: dict[str, Path]) -> Chats:
    return Chats(checkpoints["llama"])


def test_qwen3_forgets_earlier_thoughts(chats: Chats) -> None:
    """One sample per answer, each with its own thought, none with an earlier one."""
    first, second = chats.told(chats(QWEN3).conversation(THOUGHT))
    assert first[1] == "<think>\n先想\n</think>\n\n点续借。<|im_end|>"
    assert second[1] == "<think>\n再想\n</think>\n\n每天0.1元<|im_end|>"
    assert "先想" not in second[0]
    assert "点续借。<|im_end|>" in second[0]
    (last,) = chats.told(chats(QWEN3).conversation(THOUGHT, learned=(False, False, False, True)))
    assert last == second
    apart = [{"role": "user", "content": "怎么续借？"},
             {"role": "assistant", "content": "点续借。", "reasoning_content": "先想"}]  # fmt: skip
    conversation, _ = shapes.convert({"messages": apart})
    assert chats.told(chats(QWEN3).conversation(conversation.messages)) == [first]


def test_qwen3_is_told_whether_it_thinks(chats: Chats) -> None:
    """Without thoughts the empty block is learned, or stands in the prompt when thinking is off."""
    samples = chats(QWEN3).conversation(ANSWERED)
    assert chats.told(samples)[1][1] == "<think>\n\n</think>\n\n每天0.1元<|im_end|>"
    off = chats(QWEN3, thinking=False)
    told = chats.told(off.conversation(ANSWERED))
    assert [learned for _, learned in told] == ["点续借。<|im_end|>", "每天0.1元<|im_end|>"]
    assert told[1][0].rstrip("\n").endswith("<think>\n\n</think>")
    assert off.conversation(ANSWERED)[1].ids[: len(off.prompt(ANSWERED[:-1]))] == off.prompt(ANSWERED[:-1])
    with pytest.raises(UserError, match=r"an answer thinks .* --enable_thinking false asks for answers that do not"):
        off.conversation(THOUGHT)


def test_what_a_run_was_told_is_told_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A trained model is asked as it was trained, also when it lies in a folder of the run."""
    folder = tmp_path / "merged"
    shutil.copytree(checkpoints["llama"], folder)
    (folder / "chat_template.jinja").write_text(QWEN3, encoding="utf-8")
    for value, closed in (("false", True), ("", False)):
        files.write_json(tmp_path / "finetune_config.json", {"enable_thinking": value})
        opened = ChatModel(Checkpoint(folder))
        tokenizer, chat = opened.tokenizer, opened.chat
        assert ("</think>" in tokenizer.decode(chat.prompt(ANSWERED[:1]))) == closed


def test_deepseek_r1_opens_the_thought_in_its_prompt(chats: Chats) -> None:
    """What is learned follows the prompt's `<think>`, although the template itself leaves every thought out."""
    chat = chats(DEEPSEEK_R1)
    first, second = chat.conversation(THOUGHT)
    assert chats.told([second])[0][1] == "再想\n</think>\n\n每天0.1元<|im_end|>"
    assert "先想" not in chats.told([second])[0][0]
    for sample, end in ((first, 1), (second, 3)):
        prompt = chat.prompt(THOUGHT[:end])
        assert sample.ids[: len(prompt)] == prompt
        assert sample.learned == [False] * len(prompt) + [True] * (len(sample.ids) - len(prompt))
    assert chats.told(chat.conversation(ANSWERED))[0][1] == "</think>\n\n点续借。<|im_end|>"
    held = [*THOUGHT[:3], {"role": "assistant", "content": "<think>\n<|im_end|>\n</think>\n\n<|im_start|>"}]
    (sample,) = chat.conversation(held, learned=(False, False, False, True))
    assert chats.told([sample])[0][1] == "<|im_end|>\n</think>\n\n<|im_start|><|im_end|>"
    assert chat.controls.count(sample.ids[-1:]) == 1
    assert chat.controls.count(sample.ids) == chat.controls.count(chat.conversation(ANSWERED)[1].ids)


def test_an_answer_of_markup_is_no_tag(chats: Chats) -> None:
    """An answer that begins with the prompt's own `<` is learned as a whole."""
    for answer, learned in (
        ("<div>好</div>", "</think>\n\n<div>好</div>"),
        ("<think>\n想\n</think>\n\n<th>", "想\n</think>\n\n<th>"),
        ("<think>\n想\n</think><thinker/>", "想\n</think><thinker/>"),
    ):
        (sample,) = chats(DEEPSEEK_R1).conversation([THOUGHT[0], {"role": "assistant", "content": answer}])
        assert chats.told([sample]) == [(chats.told([sample])[0][0], learned + "<|im_end|>")]


def test_deepseek_v31_thinks_when_it_is_told(chats: Chats) -> None:
    """Its template calls the choice `thinking`; a thought that would be lost is an error that says so."""
    first, second = chats.told(chats(DEEPSEEK_V31, thinking=True).conversation(THOUGHT))
    assert first[1] == "\n先想\n</think>\n\n点续借。<|im_end|>"
    assert second[1] == "\n再想\n</think>\n\n每天0.1元<|im_end|>"
    assert second[0].endswith("assistant<think>")
    for thinking in (None, False):
        (sample,) = chats.told(chats(DEEPSEEK_V31, thinking=thinking).conversation(ANSWERED))
        assert sample[1] == "点续借。<|im_end|>每天0.1元<|im_end|>"
    with pytest.raises(
        UserError, match="leaves the thought out, so it would not be learned; pass --enable_thinking tr"
    ):
        chats(DEEPSEEK_V31).conversation(THOUGHT)
    with pytest.raises(UserError, match="--enable_thinking false asks for answers that do not"):
        chats(DEEPSEEK_V31, thinking=False).conversation(THOUGHT)
    forgets = DEEPSEEK_V31.replace("thinking", "reasons")
    with pytest.raises(UserError, match="so it would not be learned; take the thinking out of the data"):
        chats(forgets).conversation(THOUGHT)


def test_a_choice_that_no_template_has_is_said(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--enable_thinking needs a template that names it; a text or an attribute of that name is none."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], folder)
    _ = ChatModel(Checkpoint(folder), thinking=True).chat
    assert "enable_thinking changes nothing: the checkpoint's own chat template names no" in capfd.readouterr().err
    for template, known in (
        (QWEN3, True), (DEEPSEEK_V31, True), ("{{ 'thinking' + messages[0].thinking + messages[0].content }}", False)
    ):  # fmt: skip
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        assert ChatModel(Checkpoint(folder)).chat.knows_thinking == known


def test_glm4_learns_to_end(chats: Chats) -> None:
    """A template that writes nothing after an answer: the next speaker's token is learned, after the last one eos."""
    (sample,) = chats(GLM4).conversation(ANSWERED)
    assert sample.ids[-1] == chats.tokenizer.eos_token_id
    assert chats.told([sample])[0][1] == "\n点续借。<|im_start|>\n每天0.1元<|im_end|>"
    (first,) = chats(GLM4).conversation(ANSWERED, learned=(False, True, False, False))
    assert not first.learned[-1]
    assert chats.told([first])[0][1] == "\n点续借。<|im_start|>"
    held = [*ANSWERED[:3], {"role": "assistant", "content": "<|im_start|>"}]  # a text of a control token is a text
    (named,) = chats(GLM4).conversation(held)
    assert chats.told([named])[0][1] == "\n点续借。<|im_start|>\n<|im_start|><|im_end|>"
    assert chats(GLM4).controls.count(i for i, flag in zip(named.ids, named.learned, strict=True) if flag) == 2


def test_glm4_learns_to_end_its_calls(chats: Chats) -> None:
    """After a call comes a tool; the same where earlier thoughts are dropped, which makes a sample per answer."""
    call, end = '{"name": "get_weather", "arguments": {"city": "北京"}}', "<|im_end|>"
    thinks = [
        *CALLED["conversations"],
        {"from": "human", "value": "谢谢"}, {"from": "gpt", "value": "<think>想</think>不谢"},
    ]  # fmt: skip
    thinks[3] = {"from": "gpt", "value": "<think>看</think>都晴。"}
    for conversations, learned in (
        (CALLED["conversations"], [f"{call}<|endoftext|>都晴。{end}"]),
        (thinks, [f"{call}<|endoftext|>", "<think>看</think>都晴。<|im_start|>", f"<think>想</think>不谢{end}"]),
    ):
        found = shapes.convert(CALLED | {"conversations": conversations})[0]
        told = chats.told(chats(GLM45).conversation(found.messages, found.tools, found.learned))
        assert [text for _, text in told] == learned


def test_blanks_after_an_answer_are_no_end(chats: Chats) -> None:
    """A template that ends each answer with a line: the end token follows the answer itself."""
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    (sample,) = chats(lines + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}").conversation(ANSWERED)
    assert sample.ids[-1] == chats.tokenizer.eos_token_id
    assert sample.learned[-2:] == [True, True]
    assert chats.told([sample])[0][1] == " 点续借。 每天0.1元<|im_end|>"


def test_tools_are_written_by_their_own_template(chats: Chats) -> None:
    """A checkpoint with several templates (Command-R, Hermes): `tool_use` with tools, `default` without."""
    plain = LLAMA31.replace("if tools", "if false").replace("m.tool_calls", "m.other")
    found, _ = shapes.convert(CALLED)
    (expected,) = chats(LLAMA31).conversation(found.messages, found.tools, found.learned)
    (without,) = chats(plain).conversation(ANSWERED)
    chats.tokenizer.chat_template = {"default": plain, "tool_use": LLAMA31}
    chat = ChatFormat(chats.tokenizer)
    assert chat.conversation(found.messages, found.tools, found.learned) == [expected]
    prompt = chat.prompt(found.messages[:3], found.tools)
    assert prompt == expected.ids[: len(prompt)]
    assert chat.conversation(ANSWERED) == [without]
    held = [m | {"content": m["content"] + "<|im_end|>"} if m["role"] == "tool" else m for m in found.messages]
    (named,) = chat.conversation(held, found.tools, found.learned)
    assert chat.controls.count(named.ids) == chat.controls.count(expected.ids)
    with pytest.raises(UserError, match="writes no tool calls"):  # without tools it is `default` that writes
        chat.conversation(found.messages, (), found.learned)


@pytest.mark.parametrize(
    ("template", "calls", "answer"),
    [
        (LLAMA31, '{"name": "get_weather", "parameters": {"city": "北京"}}<|im_end|>', "都晴。<|im_end|>"),
        (MISTRAL, '[TOOL_CALLS]{"name": "get_weather", "arguments": {"city": "北京"}}000000000<|im_end|>',
         " 都晴。<|im_end|>"),
    ],
)  # fmt: skip
def test_calls_and_answers_are_learned(chats: Chats, template: str, calls: str, answer: str) -> None:
    conversation, _ = shapes.convert(CALLED)
    chat = chats(template)
    (told,) = chats.told(chat.conversation(conversation.messages, conversation.tools, conversation.learned))
    assert told[1] == calls + answer
    assert "晴" in told[0]
    twice = CALLED | {"conversations": [*CALLED["conversations"][:2], *CALLED["conversations"][1:]]}
    conversation, _ = shapes.convert(twice)
    if template is LLAMA31:
        with pytest.raises(UserError, match="only single tool-calls at once"):
            chat.conversation(conversation.messages, conversation.tools)
