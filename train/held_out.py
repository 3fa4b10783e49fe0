"""The part of the training data that was held out, written down: what can be asked of the model afterwards."""

from collections.abc import Sequence
from pathlib import Path

from llmops import files, json_text
from llmops.conversations import data_files
from llmops.conversations.data_files import Read
from llmops.conversations.records import Conversation
from train.dataset import TokenDataset
from train.ownership import HELD_OUT


def write(output: Path, test: TokenDataset, sources: Sequence[Path]) -> None:
    """Write the conversations of `sources` that `test` was made of into a run's folder, in the shape of training data.

    Raises RunStopped where it cannot be written.
    """
    places = test.places()
    with files.writing(output / HELD_OUT) as stream:
        for chunk in data_files.read_chunks(sources):
            number = sources.index(chunk.path)
            for read in data_files.conversations_of(chunk):
                if isinstance(read, Read) and (number, read.number) in places:
                    stream.write(json_text.dumps(row_of(read.conversation)) + "\n")


def row_of(conversation: Conversation) -> dict[str, object]:
    """A conversation as a line of training data; an answer that is not learned says so."""
    messages = [
        message | ({"loss": False} if message["role"] == "assistant" and not learned else {})
        for message, learned in zip(conversation.messages, conversation.learned, strict=True)
    ]
    return {"messages": messages} | ({"tools": conversation.tools} if conversation.tools else {})
