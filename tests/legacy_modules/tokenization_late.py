"""Written as in 2023: the base class is set up before the vocabulary is there; a bos can be put before every text.

A setting is not handed to the base class, and the ids that `build_inputs_with_special_tokens` is given are changed.
"""

import sentencepiece as spm
from transformers import PreTrainedTokenizer


class LateTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, vocab_file, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        add_bos_token=True, add_eos_token=False, spare_ids=200, **kwargs,
    ):  # fmt: skip
        super().__init__(
            bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token,
            add_bos_token=add_bos_token, **kwargs,
        )  # fmt: skip
        self.vocab_file = vocab_file
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.first = spare_ids
        self.pieces = spm.SentencePieceProcessor(model_file=vocab_file)

    @property
    def vocab_size(self):
        return self.first + self.pieces.get_piece_size()

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.first + self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return f"<spare_{index}>" if index < self.first else self.pieces.id_to_piece(index - self.first)

    def convert_tokens_to_string(self, tokens):
        return self.pieces.decode(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        if self.add_eos_token:
            token_ids_0 += [self.eos_token_id]
        return [self.bos_token_id, *token_ids_0] if self.add_bos_token else token_ids_0

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = f"{save_directory}/tokenizer.model"
        with open(target, "wb") as stream:
            stream.write(self.pieces.serialized_model_proto())
        return (target,)
