"""Prompts: beside the released rule on sentencepiece itself, and each place where the two are meant to differ."""

import json
import pickle
import random
import subprocess
import sys

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from released_prompts import IGNORED, released
from released_prompts import IMAGE_SLOT as RELEASED_SLOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from toy_tokenizer import sentences, toy_tokenizer, write_toy_tokenizer

from napo_jax.data import prompts
from napo_jax.data.prompts import Prompter, PromptError, load_tokenizer
from napo_jax.hub_files import CHAT_TEMPLATE
from napo_jax.models import IMAGE_SLOT

UNK, BOS, EOS = 0, 1, 2
MARKS = ["<unk>", "<s>", "</s>", "<image>", "<pad>", " ASSISTANT: ", "USER:", "<0x0A>", "▁"]


@pytest.fixture(scope="module")
def sp():
    return toy_tokenizer()[1]


@pytest.fixture(scope="module")
def prompter():
    return Prompter(toy_tokenizer()[0], "llava_v1", image_tokens=1)


def made_up_rows(count):
    """Returns (question, answer) pairs: English, lists, numbers, quotes, other scripts, lines."""
    rng = random.Random(1)
    extras = [
        "",
        "",
        "\n\n- ",
        " 12:30 ",
        " (3/4) ",
        '"',
        "'s ",
        " naïve—",
        " 日本 ",
        " 🙂 ",
        "\t",
        "…",
        " £5.20 ",
        "\r\n",
    ]
    texts = list(sentences(4 * count, seed=2))
    rows = []
    for _ in range(count):
        question = rng.choice(texts) + rng.choice(extras) + rng.choice(["", "\nAnswer in one word.", rng.choice(texts)])
        answer = "".join(rng.choice(texts) + rng.choice([" ", "\n", *extras]) for _ in range(rng.randint(1, 5)))
        rows.append((question, answer))
    return rows


ROWS = made_up_rows(1000)


def ours(prompter, question, answer):
    """Returns (ids, labels) as the oracle does."""
    (answer_ids,) = prompter.answers([answer])
    prefix = prompter.prefix(question)
    return prefix + answer_ids, [IGNORED] * len(prefix) + answer_ids


def trained_text(prompter, answer):
    (ids,) = prompter.answers([answer])
    return "".join(prompter.read_answer(ids))


# The released rule.


@pytest.mark.parametrize("template", ["llava_v1", "vicuna_v1"])
def test_a_thousand_rows_have_the_ids_and_labels_of_the_released_rule(sp, template):
    prompter = Prompter(toy_tokenizer()[0], template, image_tokens=1)
    prefixes = prompter.prefixes([question for question, _ in ROWS])
    answers = prompter.answers([answer for _, answer in ROWS])
    for (question, answer), prefix, answer_ids in zip(ROWS, prefixes, answers, strict=True):
        want = released(question, answer, sp, template)
        assert (prefix + answer_ids, [IGNORED] * len(prefix) + answer_ids) == want, (question, answer)


def test_the_oracle_tells_the_usual_mistakes(sp, prompter):
    """An answer tokenised alone, and an answer found by the length of its prompt, are both wrong."""
    tokenizer = toy_tokenizer()[0]
    opening = tokenizer("A chat. ASSISTANT: ").input_ids
    alone = by_length = 0
    for question, answer in ROWS[:100]:
        _, labels = released(question, answer, sp)
        want = [token for token in labels if token != IGNORED]
        alone += want == [*tokenizer(answer, add_special_tokens=False).input_ids, EOS]
        by_length += want == tokenizer(f"A chat. ASSISTANT: {answer}</s>").input_ids[len(opening) :]
    assert by_length == 0
    assert alone == 100  # true of Llama's dummy prefix, and of it alone: see the byte-level tokenizer below
    assert IMAGE_SLOT == RELEASED_SLOT


@pytest.mark.parametrize("answer", ["5 dogs", "1", "\nYes", "日本 is Japan", "🎉 and so on"])
def test_a_first_letter_that_joins_no_space_is_trained_behind_a_lone_space(sp, prompter, answer):
    ids, labels = ours(prompter, "How many?", answer)
    assert (ids, labels) == released("How many?", answer, sp)
    first = next(label for label in labels if label != IGNORED)
    assert sp.id_to_piece(first) == "▁"


@pytest.mark.parametrize("answer", [" Yes", "   Yes", "Yes ", "Yes   ", "  ", "\n", "a  b", "x" * 500, "a\0b", "\0"])
@pytest.mark.parametrize("question", ["What is it?", "  What is it? ", "\n\n", "5", "日本?", "a\0b"])
def test_white_space_and_nul_are_as_released(sp, prompter, question, answer):
    assert ours(prompter, question, answer) == released(question, answer, sp)
    assert trained_text(prompter, answer) == f" {answer}</s>"


def test_six_thousand_words_are_as_released(sp, prompter):
    answer = " ".join(f"{place} {sentence}" for place, sentence in enumerate(sentences(1000, seed=3)))
    assert len(answer.split()) > 6000
    assert ours(prompter, answer[:9999], answer) == released(answer[:9999], answer, sp)


# Where it differs, and why.


def test_an_empty_answer_is_eos_where_the_released_rule_masks_the_sample(sp, prompter):
    ids, labels = released("What?", "", sp)
    assert set(labels) == {IGNORED}
    assert ids == prompter.prefix("What?")
    assert prompter.answers([""]) == [[EOS]]


@pytest.mark.parametrize("mark", ["</s>", " ASSISTANT: ", "<unk>", "<s>"])
def test_t14_a_marker_in_an_answer_is_text_where_the_released_rule_loses_tokens(sp, prompter, mark):
    answer = f"It is {mark} a dog"
    (ids,) = prompter.answers([answer])
    _, labels = released("What?", answer, sp)
    assert [label for label in labels if label != IGNORED] != ids
    assert "".join(prompter.read_answer(ids)) == f" {answer}</s>"
    assert not {UNK, BOS, EOS, IMAGE_SLOT} & set(ids[:-1])


def test_t14_an_image_marker_in_an_answer_is_text_where_the_released_rule_shows_a_second_picture(sp, prompter):
    ids, _ = released("What?", "It is <image> a dog", sp)
    assert ids.count(IMAGE_SLOT) == 2
    (ids,) = prompter.answers(["It is <image> a dog"])
    assert IMAGE_SLOT not in ids
    assert trained_text(prompter, "It is <image> a dog") == " It is <image> a dog</s>"


@pytest.mark.parametrize("mark", ["</s>", " ASSISTANT: ", "<unk>"])
def test_a_marker_in_a_question_masks_nothing(sp, prompter, mark):
    _, labels = released(f"Is {mark} here?", "It is a dog.", sp)
    assert set(labels) == {IGNORED}
    prefix = prompter.prefix(f"Is {mark} here?")
    assert prefix.count(BOS) == 1
    assert not {UNK, EOS} & set(prefix)
    assert f"\nIs {mark} here? ASSISTANT:" in prompter.read_prefix(prefix)


# What holds of every text.


def test_t7_trained_tokens_decode_to_the_answer_and_eos(prompter):
    tokenizer = toy_tokenizer()[0]
    for (_, answer), ids in zip(ROWS, prompter.answers([answer for _, answer in ROWS]), strict=True):
        assert "".join(prompter.read_answer(ids)) == f" {answer}</s>"
        assert tokenizer.decode(ids) == f"{answer}</s>"  # `transformers` drops the first space of a text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([*MARKS, " ", "\n", "▁", "�"])), max_size=8).map("".join))
def test_t7_so_does_any_text_at_all(text):
    prompter = Prompter(toy_tokenizer()[0], image_tokens=1)
    (ids,) = prompter.answers([text])
    # "▁" is how sentencepiece writes a space; it has no other way to write "▁".
    assert "".join(prompter.read_answer(ids)) == f"{' ' if text else ''}{text}</s>".replace("▁", " ")
    assert not {UNK, BOS, EOS} & set(ids[:-1])


def test_t9_one_bos_begins_a_sequence_and_eos_ends_what_is_trained(prompter):
    hostile = [(f"Who?{mark}", f"{mark}I{mark}") for mark in MARKS]
    for question, answer in [*ROWS[:200], *hostile]:
        ids, labels = ours(prompter, question, answer)
        assert (ids[0], ids.count(BOS)) == (BOS, 1)
        assert (labels[-1], labels.count(EOS), ids.count(EOS)) == (EOS, 1, 1)


def word_tokenizer(split=None):
    """Returns a tokenizer with a word for a token; its special tokens are words of its vocabulary too."""
    words = "<unk> <s> </s> <image> ASSISTANT ASSISTANT: USER: : ? . Yes No it is a dog What"
    vocab = {word: place for place, word in enumerate(words.split())}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens("<image>")  # no special token, so the library would find it in texts
    return tokenizer


def test_t10_the_token_for_unknown_words_stays_trained():
    tokenizer = word_tokenizer()
    (ids,) = Prompter(tokenizer).answers(["Yes zebra is a dog <unk>"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["Yes", "<unk>", "is", "a", "dog", "<unk>", "</s>"]


@pytest.mark.parametrize("special", [True, False])
def test_no_text_gives_the_id_of_an_added_token(special):
    """Whether it is special or not, and whatever the vocabulary or its merges could spell."""
    marks = ["<image>", "<pad>", "dog"]
    tokenizer = pickle.loads(pickle.dumps(toy_tokenizer()[0]))
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=not special) for mark in marks])
    text = f"It is {' '.join([*MARKS, *marks])}."
    assert set(tokenizer(text).input_ids) & set(tokenizer.convert_tokens_to_ids(marks))  # as the library reads it
    plain, given = Prompter(toy_tokenizer()[0]), Prompter(tokenizer)
    added = set(tokenizer.added_tokens_decoder)
    (ids,) = given.answers([text])
    assert not added & set(ids[:-1])
    assert not (added - {BOS}) & set(given.prefix(text.replace("<image>", "")))
    assert given.answers([text.replace("dog", "man")]) == plain.answers([text.replace("dog", "man")])


def test_merges_that_spell_a_special_token_are_not_taken():
    vocab = {piece: place for place, piece in enumerate(["<unk>", "<s>", "</s>", *"</s>▁AIN:Tx", "</", "s>", "</s>x"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "x")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    split = tokenizers.Tokenizer.from_str(backend.to_str())
    split.encode_special_tokens = True
    assert EOS in split.encode("A</s>").ids  # the library's own way to read them as text
    (ids,) = Prompter(tokenizer).answers(["A</s>x"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "A", "</", "s>", "x", "</s>"]


def test_words_that_are_special_tokens_of_a_word_vocabulary_are_unknown():
    tokenizer = word_tokenizer()
    prompter = Prompter(tokenizer, image_tokens=2)
    assert prompter.answers(["Yes </s> <s> <image>"]) == [
        [*tokenizer.convert_tokens_to_ids(["Yes"]), UNK, UNK, UNK, EOS]
    ]
    assert prompter.answers(["No", ""]) == [[tokenizer.convert_tokens_to_ids("No"), EOS], [EOS]]
    whole = prompter.prefix("What is it ?")
    assert tokenizer.convert_ids_to_tokens(whole[-5:]) == ["What", "is", "it", "?", "ASSISTANT:"]
    assert BOS not in whole  # the tokenizer's own texts have none
    assert prompter.read_answer(prompter.answers(["Yes it is"])[0]) == [" Yes", " it", " is", "</s>"]
    split = Prompter(word_tokenizer(pre_tokenizers.Whitespace()))  # "ASSISTANT" and ":"
    assert split.answers(["Yes."])[0] == word_tokenizer().convert_tokens_to_ids(["Yes", ".", "</s>"])


def test_a_letter_of_several_tokens_is_shown_whole_or_as_cut(prompter):
    ((space, *letter, eos),) = prompter.answers(["🎉"])
    assert len(letter) == 4
    assert prompter.read_answer([space, *letter, eos]) == [" ", "", "", "", "🎉", "</s>"]
    assert prompter.read_answer([space, *letter[:2]]) == [" ", "", "��"]


# Other tokenizers.


def byte_level_tokenizer(use_regex=True):
    """Returns a tokenizer of GPT-2's kind; without its regex, words and what is between them merge."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["ASSISTANT: Yes, it is a dog."] * 50 + ["ASSISTANT: No."] * 50, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def test_byte_level_tokens_begin_with_the_space():
    tokenizer = byte_level_tokenizer()
    prompter = Prompter(tokenizer, image_tokens=3)
    texts = ["Yes, it is", "5", "\nYes", "🎉", "  Yes", "<|endoftext|>", ""]
    answers = prompter.answers(texts)
    assert tokenizer.convert_ids_to_tokens(answers[0][0]) == "ĠYes"
    assert tokenizer("Yes", add_special_tokens=False).input_ids != answers[0][:1]  # an answer tokenised alone
    for text, ids in zip(texts, answers, strict=True):
        assert "".join(prompter.read_answer(ids)) == (f" {text}" if text else "") + "<|endoftext|>"
        assert ids.count(tokenizer.eos_token_id) == 1
    whole = tokenizer("ASSISTANT: Yes, it is").input_ids
    assert whole[-len(answers[0]) + 1 :] == answers[0][:-1]
    prefix = prompter.prefix("Is it?")
    assert tokenizer.eos_token_id not in prefix  # GPT-2 names a BOS, and begins no text with it
    assert prompter.read_prefix(prefix).endswith("USER: <image>\nIs it? ASSISTANT:")


def test_a_token_across_the_prompts_end_is_an_error_of_that_answer_alone():
    prompter = Prompter(byte_level_tokenizer(use_regex=False))
    fine, joined = prompter.answers(["", "Yes"])
    assert fine == [prompter.eos]
    assert isinstance(joined, PromptError)
    assert joined.reason == "answer_joins_prompt"


def test_other_kinds_of_model_are_refused():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(ValueError, match="BPE or WordLevel, got Unigram"):
        Prompter(tokenizer)


# Prefixes.


def test_the_prefix_is_the_prompt_that_exported_models_are_given():
    prompter = Prompter(toy_tokenizer()[0], "llava_v1", image_tokens=9)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    want = toy_tokenizer()[0].apply_chat_template(
        [{"role": "user", "content": content}], chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    ids = prompter.prefix("What is it?")
    assert prompter.read_prefix(ids) == "<s>" + want
    slots = [place for place, token in enumerate(ids) if token == IMAGE_SLOT]
    assert slots == list(range(slots[0], slots[0] + 9))
    assert prompter.prefixes(["What is it?"], slots=1) == [ids[: slots[0]] + ids[slots[-1] :]]


def test_a_prompt_without_a_picture_is_one_text_without_its_newline(sp, prompter):
    text = prompter.template.system + " USER: What is it? ASSISTANT:"
    assert prompter.prefix("What is it?", image=False) == [BOS, *sp.encode(text)]
    assert prompter.prefix("<image>\nWhat is it?", image=False) == [BOS, *sp.encode(text)]


def test_a_prompt_without_a_question_keeps_the_newline(sp, prompter):
    opening, ending = prompter.template.system + " USER: ", "\n ASSISTANT:"
    assert prompter.prefix("") == [BOS, *sp.encode(opening), IMAGE_SLOT, *sp.encode(ending)]
    assert prompter.read_prefix(prompter.prefix("")) == f"<s>{opening}<image>{ending}"


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", " <image>What is it? "])
def test_an_image_marker_in_a_question_moves_to_the_front(prompter, question):
    assert prompter.prefix(question) == prompter.prefix("What is it?")


def test_several_image_markers_are_an_error_with_a_reason(prompter):
    with pytest.raises(PromptError, match="one place for a picture, got 2 <image>") as caught:
        prompter.prefix("<image> or <image>?")
    assert caught.value.reason == "several_image_markers"
    assert pickle.loads(pickle.dumps(caught.value)).reason == "several_image_markers"


def test_an_unusable_text_spoils_no_other(prompter, monkeypatch):
    questions = [f"Is it {number}?" for number in range(10)]
    questions[3], questions[6] = "<image><image>", "half a \ud83d"
    want = [None if number in (3, 6) else prompter.prefix(question) for number, question in enumerate(questions)]
    monkeypatch.setattr(prompts, "_TEXTS_AT_ONCE", 4)  # so that there are a full, another and a last part
    found = prompter.prefixes(questions)
    assert [found[3].reason, found[6].reason] == ["several_image_markers", "invalid_unicode"]
    assert [None if isinstance(ids, PromptError) else ids for ids in found] == want
    answers = prompter.answers(questions)
    assert [isinstance(ids, PromptError) for ids in answers] == [number == 6 for number in range(10)]
    assert prompter.prefixes([]) == prompter.answers([]) == []


def test_unknown_templates_are_named_beside_the_known():
    with pytest.raises(ValueError, match="no template 'v1'; there are llava_v1, vicuna_v1"):
        Prompter(toy_tokenizer()[0], "v1")


# The object.


def test_the_fingerprint_follows_all_that_decides_ids():
    tokenizer = toy_tokenizer()[0]
    other = pickle.loads(pickle.dumps(tokenizer))
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["merges"].pop()
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    new_eos = pickle.loads(pickle.dumps(tokenizer))
    new_eos.eos_token = "<unk>"
    no_bos = pickle.loads(pickle.dumps(tokenizer))
    no_bos.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A", "$A $B", [])
    prompter = Prompter(tokenizer, "llava_v1", 4)
    different = [
        Prompter(tokenizer, "vicuna_v1", 4),
        Prompter(tokenizer, "llava_v1", 5),
        *(Prompter(changed, "llava_v1", 4) for changed in (other, new_eos, no_bos)),
    ]
    prints = {prompter.fingerprint, *(each.fingerprint for each in different)}
    assert len(prints) == 6
    assert pickle.loads(pickle.dumps(prompter)).fingerprint == prompter.fingerprint


def test_a_length_or_padding_that_the_tokenizer_was_given_changes_nothing(prompter):
    tokenizer = pickle.loads(pickle.dumps(toy_tokenizer()[0]))
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    given = Prompter(tokenizer, "llava_v1", image_tokens=1)
    answers = [answer for _, answer in ROWS[:20]]
    assert given.answers(answers) == prompter.answers(answers)
    assert given.fingerprint == prompter.fingerprint


def test_it_travels_to_a_process_that_has_not_loaded_transformers(prompter, tmp_path):
    (tmp_path / "prompter").write_bytes(pickle.dumps(prompter))
    code = (
        "import pickle, sys; prompter = pickle.load(open(sys.argv[1], 'rb')); "
        "assert 'transformers' not in sys.modules; print(prompter.fingerprint, *prompter.prefix('What is it?'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "prompter"], capture_output=True, text=True, check=True
    )
    fingerprint, *ids = run.stdout.split()
    assert fingerprint == prompter.fingerprint
    assert [int(token) for token in ids] == prompter.prefix("What is it?")


# Files.


def test_a_tokenizer_reads_the_same_from_either_kind_of_folder(tmp_path):
    original, fast = tmp_path / "original", tmp_path / "fast"
    original.mkdir()
    write_toy_tokenizer(original)
    (original / "code.py").write_text("raise SystemExit('ran the code of a checkpoint')")
    # As every checkpoint has. Read beside it, the tokenizer would become another, and prompts begin with "A", not "▁A".
    (original / "config.json").write_text('{"model_type": "llava"}')
    load_tokenizer(original).save_pretrained(fast)
    want = Prompter(toy_tokenizer()[0])
    for folder in (original, fast):
        prompter = Prompter(load_tokenizer(folder))
        assert prompter.fingerprint == want.fingerprint
        assert prompter.prefix("What is it?") == want.prefix("What is it?")


def _no_eos(folder):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder.rmdir(), "is no folder; expected one"),
        (lambda folder: None, "holds no tokenizer that can be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "holds no tokenizer that can be read"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version'), "holds no tokenizer that can be read"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}'),
            "holds no vocabulary; expected tokenizer.json or tokenizer.model",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}'),
            "holds a slow tokenizer, ByT5Tokenizer; expected a tokenizer.json",
        ),
        (_no_eos, "without an EOS token"),
    ],
)
def test_folders_without_a_usable_tokenizer_are_refused_in_one_line(tmp_path, write, message):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
