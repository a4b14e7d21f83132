"""Chat templates and special tokens of a target, through its own tokenizer."""

from __future__ import annotations

from pathlib import Path

from sglang_dflash.errors import UserError


class Chat:
    """Tokenizer of a target folder with the three things training asks of it."""

    def __init__(self, path: Path | str) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:
            raise UserError(f"no usable tokenizer in {path}: {error}") from None
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer in {path} has no chat template: give an instruct target")

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of one user turn, templated up to where the assistant begins."""
        templated = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer.encode(templated, add_special_tokens=False)

    def opener_ids(self, text: str) -> list[int]:
        """Token ids of a user turn left open after ``text``, for the target to complete."""
        marker = "\u241eOPEN\u241e"
        templated = self.tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
        return self.tokenizer.encode(templated.split(marker)[0] + text, add_special_tokens=False)

    def stop_ids(self) -> set[int]:
        """Ids that end a turn: the tokenizer's end and whatever the template puts after a turn."""
        marker = "\u241eEND\u241e"
        templated = self.tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
        after = self.tokenizer.encode(templated.split(marker)[1].strip(), add_special_tokens=False)
        special = set(self.tokenizer.all_special_ids)
        stops = {i for i in after[:1] if i in special} | {self.tokenizer.eos_token_id}
        return {i for i in stops if i is not None}

    def mask_token(self) -> tuple[int, str]:
        """The drafter's mask token: the tokenizer's own, or an id that chat text never holds.

        Drafters share the target's embedding, so the id must exist in it. Preferred: a mask
        or reserved token; else a special token of pre-training that no chat template uses.
        """
        tok = self.tokenizer
        if tok.mask_token_id is not None:
            return tok.mask_token_id, tok.mask_token
        vocab = tok.get_vocab()
        template = str(tok.chat_template)
        wanted = ("<|mask|>", "<mask>", "<empty_output>", "<|fim_pad|>", "<jupyter_script>", "<unused0>")
        for name in wanted:
            if name in vocab and name not in template:
                return vocab[name], name
        for name, index in sorted(vocab.items(), key=lambda item: item[1]):
            reserved = "reserved" in name or "unused" in name or "extra" in name
            if reserved and name.startswith("<") and name not in template:
                return index, name
        raise UserError("the tokenizer has no mask or reserved token: name one with --mask-token-id")
