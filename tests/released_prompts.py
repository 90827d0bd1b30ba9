"""The released code's rule for ids and labels, written from its description: what `napo_jax.data.prompts` must equal.

It builds one text for a question and an answer, tokenises that, and then finds the answer by lengths of other texts.
"""

import re

IGNORED = -100
IMAGE_SLOT = -200
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
PAD = SPECIAL["<unk>"]
SYSTEM = {
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.",
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
}


def tokenise(text, sentences):
    """Returns BOS and ids, as Llama's slow tokenizer (legacy=False): special tokens are found first, wherever they are.

    Args:
      text: str.
      sentences: the `SentencePieceProcessor`.
    """
    ids = [SPECIAL["<s>"]]
    for number, part in enumerate(re.split("(" + "|".join(SPECIAL) + ")", text)):
        if part in SPECIAL:
            ids.append(SPECIAL[part])
        elif number == 0:
            ids += sentences.encode(part)  # with the space that sentencepiece puts in front
        else:  # no such space behind a special token: a letter that joins nothing takes it, and goes
            ids += sentences.encode("\x01" + part)[len(sentences.encode("\x01")) :]
    return ids


def tokenise_around_images(text, sentences):
    """Returns ids with one slot for each `<image>`, and the BOS of the first chunk alone."""
    first, *others = [tokenise(chunk, sentences) for chunk in text.split("<image>")]
    for chunk in others:
        first += [IMAGE_SLOT, *chunk[1:]]
    return first


def render(question, answer, template):
    """Returns the text of one turn; a message that is empty has neither its space nor what closes it."""
    text = SYSTEM[template] + " "
    for role, message, end in (("USER", f"<image>\n{question}", " "), ("ASSISTANT", answer, "</s>")):
        text += f"{role}: {message}{end}" if message else f"{role}:"
    return text


def released(question, answer, sentences, template="llava_v1", max_length=2048):
    """Returns (ids, labels) of a question with a picture and an answer; labels are ids, or IGNORED."""
    text = render(question, answer, template)
    ids = tokenise_around_images(text, sentences)
    labels = list(ids)
    begin = 1
    labels[0] = IGNORED
    for number, turn in enumerate(text.split("</s>")):
        parts = turn.split(" ASSISTANT: ")
        if turn == "" or len(parts) != 2:
            break
        turn_length = len(tokenise_around_images(turn, sentences))
        prompt_length = len(tokenise_around_images(parts[0] + " ASSISTANT: ", sentences)) - 2
        if number > 0:
            turn_length, prompt_length = turn_length - 1, prompt_length - 1
        labels[begin : begin + prompt_length] = [IGNORED] * len(labels[begin : begin + prompt_length])
        begin += turn_length
    labels[begin:] = [IGNORED] * len(labels[begin:])
    if begin < max_length and begin != sum(token != PAD for token in ids):
        labels = [IGNORED] * len(labels)
    return ids, labels
