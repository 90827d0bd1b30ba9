"""A tokenizer of bytes, made in memory: for random models, which have no vocabulary of their own."""

BYTE_VOCABULARY = 3 + 256  # <unk>, <s>, </s> and every byte


def byte_tokenizer():
    """Returns a fast Hugging Face tokenizer with one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return as_hugging_face(tokenizer)


def as_hugging_face(tokenizer):
    """Returns a tokenizer with <unk>, <s> and </s> as 0 to 2 as a fast Hugging Face one that begins texts with <s>."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
