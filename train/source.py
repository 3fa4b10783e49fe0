"""What the tokenised form of a file depends on, and the key that stands for all of it."""

import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

from llmops.conversations import data_files, records
from llmops.formats import chat_format
from llmops.formats.families import TEMPLATES

# files of a checkpoint that decide how a conversation is written and tokenised: how their names begin, or end
READ = (
    "tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "config.json", "tokenization"
)  # fmt: skip
READ_SUFFIXES = (".model", ".py", ".jinja")


@dataclass(frozen=True)
class Source:
    """All that the tokenised form of a file depends on."""

    paths: tuple[Path, ...]
    model: Path
    mode: str
    max_seq_len: int
    skip_bad_lines: bool
    whole: bool = False  # a row that is too long is an error instead of being cut
    allow_special_tokens: bool = False  # as the ChatFormat that renders has it
    thinking: bool | None = None  # so is this
    learn: str = "all"

    @property
    def name(self) -> str:
        """What messages call it."""
        return data_files.name_of(self.paths)

    def key(self) -> str:
        """A hash over the files, the tokenizer, the settings and the code that renders."""
        import tokenizers
        import transformers

        digest = hashlib.sha256()
        rooms = (Path(inspect.getfile(module)).parent for module in (records, chat_format))
        code = [
            Path(__file__).with_name("encoding.py"),
            *(path for room in rooms for path in sorted(room.glob("*.py"))),
        ]
        code += sorted(TEMPLATES.glob("*.json"))
        read = [p for p in sorted(self.model.iterdir()) if p.name.startswith(READ) or p.suffix in READ_SUFFIXES]
        digest.update(data_files.digest(self.paths).encode())
        for path in [*self.paths, *code, *(p for p in read if p.is_file())]:
            digest.update(path.name.encode("utf-8", "surrogateescape"))
            if path not in self.paths:
                digest.update(data_files.file_digest(path).encode())
        settings = [
            self.mode, self.max_seq_len, self.skip_bad_lines, self.whole, self.allow_special_tokens, self.thinking,
            self.learn, transformers.__version__, tokenizers.__version__,
        ]  # fmt: skip
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()[:20]
