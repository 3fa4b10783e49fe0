"""Written as in 2023: the base class is set up before the vocabulary is there; a bos can be put before every text."""

import sentencepiece as spm
from transformers import PreTrainedTokenizer


class LateTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, vocab_file, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        add_bos_token=True, **kwargs,
    ):  # fmt: skip
        super().__init__(
            bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, pad_token=pad_token,
            add_bos_token=add_bos_token, **kwargs,
        )  # fmt: skip
        self.vocab_file = vocab_file
        self.add_bos_token = add_bos_token
        self.pieces = spm.SentencePieceProcessor(model_file=vocab_file)

    @property
    def vocab_size(self):
        return self.pieces.get_piece_size()

    def get_vocab(self):
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.pieces.decode(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return ([self.bos_token_id] if self.add_bos_token else []) + token_ids_0

    def save_vocabulary(self, save_directory, filename_prefix=None):
        target = f"{save_directory}/tokenizer.model"
        with open(target, "wb") as stream:
            stream.write(self.pieces.serialized_model_proto())
        return (target,)
