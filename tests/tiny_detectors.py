"""Tiny random models of `transformers` that find things in pictures, in files: OWL-ViT and SAM."""

import tokenizers
import torch
import transformers

WORDS = ("!", "a", "dog", "cat", "cats", "red", "hat", "two", "man", "cup", "tree", "the", "<unk>", "<s>", "</s>")
LONGEST = 8


def write_owl(folder):
    """Writes an OWL-ViT, and returns the folder."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [(mark, vocabulary[mark]) for mark in ("<s>", "</s>")]
    words.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "!"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LONGEST, **names)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shape | {"vocab_size": len(WORDS), "max_position_embeddings": LONGEST}
    text |= {"pad_token_id": 0, "bos_token_id": vocabulary["<s>"], "eos_token_id": vocabulary["</s>"]}
    vision = shape | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(3)
    config = transformers.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = transformers.OwlViTForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            elif "norm" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    pixels = transformers.OwlViTImageProcessorPil(size={"height": 32, "width": 32})
    transformers.OwlViTProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def write_sam(folder):
    """Writes a SAM, and returns the folder."""
    vision = {"hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8}
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 16}
    torch.manual_seed(5)
    config = transformers.SamConfig(
        vision_config=vision | {"mlp_dim": 32}, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    model = transformers.SamModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.4)
    model.save_pretrained(folder)
    size = {"longest_edge": 64}
    pixels = transformers.SamImageProcessorPil(size=size, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(image_processor=pixels).save_pretrained(folder)
    return folder


def write_dino(folder):
    """Writes a Grounding DINO, with BERT's numbers for the marks of its text, and returns the folder."""
    names = [f"[unused{number}]" for number in range(1030)]
    for number, name in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}.items():
        names[number] = name
    names[200 : 200 + len(WORDS) - 3] = WORDS[:-3]
    vocabulary = {name: number for number, name in enumerate(names)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", 101), ("[SEP]", 102)]
    words.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **marks)
    torch.manual_seed(7)
    stages = ["stage2", "stage3", "stage4"]
    swin = {"image_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 8, "out_features": stages}
    backbone = transformers.SwinConfig(**swin, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2])
    text = transformers.BertConfig(
        vocab_size=1030, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    small = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _DINO.items()}
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, num_queries=10, max_text_len=16, **small
    )
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    model.save_pretrained(folder)
    pixels = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    transformers.GroundingDinoProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    return folder


_DINO = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}
