"""A tokenizer as LLaMA's, made by hand: BPE over the marker ▁ that words begin with; runs of spaces are kept."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

WORDS = [
    *["▁Below", "▁is", "▁an", "▁instruction", "▁that", "▁describes", "▁a", "▁task", "▁Write", "▁response"],
    *["▁appropriately", "▁completes", "▁the", "▁request", "▁Instruction", "Instruction", "▁Response", "Response"],
    *["▁correct", "▁answer", "▁true", "▁false", "▁Please", "▁question", "the", "###"],
]
SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2, as LLaMA's


def llama_like(unk: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer; with `unk` False token 0 is "!", an ordinary one, and there is neither <unk> nor padding token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    special = SPECIAL if unk else ["!", *SPECIAL[1:]]
    vocab: dict[str, int] = {token: place for place, token in enumerate(special)}
    for character in ["▁", "\n", *map(chr, range(33, 127))]:
        vocab.setdefault(character, len(vocab))
    merges = []
    for word in WORDS:  # letter by letter, so that every word becomes one token
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault(word[: end + 1], len(vocab))
    for length in (1, 2, 4, 8):  # after the words: the last space of a run goes to the word that follows
        merges.append(("▁" * length, "▁" * length))
        vocab.setdefault("▁" * 2 * length, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>" if unk else None, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False,
        **({"unk_token": "<unk>"} if unk else {}),
    )  # fmt: skip
