"""Written as in 2023: special ids behind the vocabulary, several ids without a name, a `_pad` of the old signature.

Its `save_vocabulary` copies a file whose path `__init__` does not keep, and its end token has an id and no name.
"""

import shutil

import sentencepiece as spm
from transformers import PreTrainedTokenizer
from transformers.utils import PaddingStrategy

COMMANDS = ["[MASK]", "[gMASK]", "<sop>", "<eop>"]


class CommandTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, padding_side="left", **kwargs):
        self.pieces = spm.SentencePieceProcessor(model_file=vocab_file)
        self.commands = {name: self.pieces.get_piece_size() + i for i, name in enumerate(COMMANDS)}
        self.special_tokens = {"<eos>": self.pieces.eos_id()}
        super().__init__(padding_side=padding_side, clean_up_tokenization_spaces=False, **kwargs)

    def get_command(self, token):
        return self.special_tokens[token] if token in self.special_tokens else self.commands[token]

    @property
    def vocab_size(self):
        return self.pieces.get_piece_size() + len(COMMANDS)

    @property
    def pad_token(self):
        return "<unk>"

    @property
    def pad_token_id(self):
        return 0

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.commands.get(token, self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index):
        return "" if index < 2 or index >= self.pieces.get_piece_size() else self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.pieces.decode(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = f"{save_directory}/tokenizer.model"
        shutil.copyfile(self.vocab_file, target)
        return (target,)

    def _pad(
        self, encoded_inputs, max_length=None, padding_strategy=PaddingStrategy.DO_NOT_PAD, pad_to_multiple_of=None,
        return_attention_mask=None,
    ):  # fmt: skip
        ids = encoded_inputs["input_ids"]
        mask = encoded_inputs.get("attention_mask", [1] * len(ids))
        short = max_length - len(ids) if padding_strategy != PaddingStrategy.DO_NOT_PAD else 0
        encoded_inputs["input_ids"] = [self.pad_token_id] * short + ids
        encoded_inputs["attention_mask"] = [0] * short + mask
        return encoded_inputs
