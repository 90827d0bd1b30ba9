"""What counts as a word where answers are compared: letters and digits, without case and punctuation."""

import re

# Thai, Lao, Burmese, Khmer, kana and Chinese characters: written without spaces, so each character counts as a word.
_UNSPACED = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SPACED = rf"[^\W_{_UNSPACED}]+"
_WORD = re.compile(rf"[{_UNSPACED}]|{_SPACED}(?:['’]{_SPACED})*")


def words(text):
    """Returns the words of a text in order, as a list of lower-case strings.

    >>> words("It's a RED bus, no. 7! 红色")
    ["it's", 'a', 'red', 'bus', 'no', '7', '红', '色']
    """
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]
