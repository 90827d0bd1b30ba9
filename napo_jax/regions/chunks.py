"""The things that an English text names: noun phrases, by lists of small words, endings and neighbours.

It reads captions and answers about pictures, and needs no download. A word that no list holds and no ending gives away
counts as a noun, as it mostly is in such texts.
"""

import re
import unicodedata
from typing import NamedTuple


class Chunk(NamedTuple):
    """A phrase that names a thing.

    Attributes:
      text: the phrase as it is written, without an article or a possessive pronoun in front.
      start: of the phrase in the text, in characters.
      end: of it, exclusive.
      head: the word that says what kind of thing it is, in lower case and singular.
      normal: the same of all its words, without numbers and possessive endings, with a space between.
      place: the number of words in the text before it.
    """

    text: str
    start: int
    end: int
    head: str
    normal: str
    place: int


# What a word can be besides a verb. A "dull" noun names nothing that has a place of its own in the picture.
_LISTED = {
    "determiner": "a an the this these those my your his her its our their whose some any no every either "
    "neither another other many much several few more most less various multiple numerous countless "
    "half such what enough additional different same similar certain own entire whole overall",
    "pronoun": "i you he she it we they me him them us who whom that mine yours hers ours theirs myself yourself "
    "himself herself itself ourselves themselves someone somebody something anyone anybody anything everyone "
    "everybody everything nobody nothing none which both all each others",
    "preposition": "of in on at by for with without within from into onto upon over under underneath beneath below "
    "above behind beside besides between among amongst amid against along alongside across around about after before "
    "during through throughout toward towards off out up down near inside outside past per via like unlike despite "
    "except than as until since beyond opposite atop including regarding next close due according",
    "to": "to",
    "conjunction": "and or but nor so yet if because while whereas although though when where why how whether unless",
    "be": "is are was were be been being am seem seems seemed appear appears appeared look looks looked feel feels "
    "felt remain remains become becomes became stay stays",
    "auxiliary": "do does did done has have had having can could will would shall should may might must cannot let",
    "adverb": "there here not very quite too also just only then now never always often still even almost perhaps "
    "maybe rather again away together nearby outdoors indoors ahead apart alone aside forward backward upright "
    "however moreover furthermore therefore thus hence instead otherwise meanwhile indeed somewhat else ever yes yeah "
    "okay ok oh hello hi please sorry thanks well today tonight sometimes somewhere upside downward upward sideways "
    "already overhead closer farther further",
    "number": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen",
    "adjective": "red blue green yellow purple pink black white gray grey brown beige tan golden dark bright pale "
    "vivid vibrant orange turquoise maroon teal navy blond blonde big small large little tiny huge giant tall short "
    "long wide narrow thick thin deep shallow high low heavy round square oval rectangular triangular circular flat "
    "steep straight old young new modern ancient antique vintage adult elderly middle-aged male female upper lower "
    "rear main central distant far open full empty clear cloudy sunny snowy rainy foggy rocky sandy grassy wet dry "
    "clean dirty warm hot cold cool fresh ripe raw soft hard smooth rough shiny fluffy furry hairy fuzzy sharp broken "
    "frozen worn torn wooden metallic transparent busy calm quiet peaceful happy sad casual formal friendly lovely "
    "lively lonely curly hilly woolly smelly ugly silly pretty nice good great better best bad fine simple plain "
    "fancy cozy elegant cute sleek traditional typical common rare unique special real fake public private urban "
    "rural outdoor indoor electric visible evident apparent first second third fourth fifth last final single double "
    "lone residential professional possible important natural available ready safe healthy tasty sweet scenic dense "
    "bare bald muddy dusty colored coloured",
    "dull": "image picture photo photograph scene background foreground side left right middle center centre top "
    "bottom front back corner edge view way time day moment activity atmosphere ambiance ambience mood sense feeling "
    "fact question answer color colour size shape position location place setting environment presence addition "
    "example detail element context style kind type sort variety information description caption experience interest "
    "attention purpose reason enjoyment appearance impression distance direction end part rest lot bit perspective "
    "angle season morning afternoon evening night number amount thing object item area space use event occasion case "
    "order role focus manner arrangement aspect conclusion result idea possibility love fun overview composition "
    "instance series majority total life weather beauty charm vibe backdrop midst surroundings proximity preparation "
    "action process task conversation date year month week hour minute title viewer contrast emphasis joy happiness "
    "subject brand close-up relaxation tranquility excitement camaraderie nature surface noon gathering meaning",
}
# Forms of the past that no ending shows; verbs that no noun looks like; and words that are verb or noun.
_PAST = (
    "sat stood held wore ate hung laid led made took taken given gave got gone went came seen saw said told known "
    "thought brought bought chosen drawn drove driven found kept lost met ran sold sent set shone shown spread spoke "
    "spoken taught threw thrown written wrote built caught hidden begun put flown flew ridden rode grown grew lit"
)
_VERBS = (
    "wear carry hold eat sit lean contain include depict suggest indicate create add enjoy engage gather provide make "
    "take give get go come see say tell know think want need try keep begin bring buy call choose consist convey "
    "describe emphasize enhance ensure exist express find follow gaze happen hang help hide highlight illustrate imply "
    "involve lay lie listen live lose mean meet occupy occur offer perch perform pose prepare protect put read reach "
    "rely represent reveal sell send share shine stare surround symbolize talk teach throw turn understand wait wander "
    "write allow showcase capture feature possess exhibit resemble accompany adorn evoke contribute mention notice "
    "belong depend demonstrate participate observe identify determine extend relax reflect graze roam fill decorate "
    "grow pass approach interact consume explore learn speak blow chase hug lead crouch kneel shake crawl seat "
    "peck burn rise let"
)
_EITHER = (
    "stand walk ride run play park wave face watch cook cross drink jump kick land line point rest surf skate ski "
    "smile swing catch cut display cover cast hit race stop pitch serve fly stretch move gesture glance sleep swim "
    "climb slide drive travel lift pull push float bark laugh dance fall dot mark block drop soar leave present "
    "produce show"
)
# Nouns in -ing and -ly; those as short as "ring" and "shed" need no list.
_NOUNS = (
    "assembly awning bedding belly building butterfly carving ceiling clothing covering crossing dragonfly drawing "
    "dressing duckling earring family filling flooring frosting handwriting icing italy jelly lettering lighting lily "
    "painting paneling pudding railing scaffolding seating sibling siding sling spring starling string stuffing "
    "topping trolly wedding wiring"
)
_GERUNDS = {"dining", "living", "parking", "vending", "steering", "frying"}  # of rooms and things, after any word
_HOW_OR_WHAT = {"orange", "square", "oval", "adult", "male", "female"}
# Counts and measures: before "of" they are dull.
_MEASURES = "array bunch cluster collection couple group handful mix pair piece pile plenty range row slice stack"
# Plural and singular in turns, where endings mislead.
_PLURALS = (
    "people person children child feet foot teeth tooth mice mouse geese goose lenses lens shoes shoe horseshoes "
    "horseshoe canoes canoe toes toe axes axe movies movie cookies cookie smoothies smoothie ties tie pies pie gases "
    "gas shelves shelf leaves leaf loaves loaf halves half scarves scarf hooves hoof calves calf wolves wolf thieves "
    "thief knives knife wives wife lives life lens lens gas gas canvas canvas atlas atlas christmas christmas news news"
)

_LETTERS = r"[A-Za-zÀ-ɏ\u0300-\u036f]"
_TOKEN = re.compile(
    r"(?P<number>\d[^\W_]*(?:[.,]\d+)*)"
    rf"|(?P<word>{_LETTERS}(?:{_LETTERS}|\d)*(?:[-'’](?:{_LETTERS}|\d)+)*(?:(?<=s)['’](?=\s+{_LETTERS}))?)"
    r"|(?P<comma>,)"
    r"|(?P<gap>[^\w\s,]|[\n\r\v\f\u2028\u2029]|\w)"  # what is left of \w is another script, where English ends
)
_OWN = re.compile(r"['’]s?$", re.IGNORECASE)
_NAMING = ("noun", "adjective", "dull")
_NO_NOUNS = ("verb", "either", "auxiliary", "be", "adverb", "preposition")
_BEFORE_NOUN = ("determiner", "number", "adjective")


class _Token(NamedTuple):
    word: str  # in lower case
    kind: str
    start: int
    end: int
    place: int  # the number of words before it


_GAP = _Token("", "gap", 0, 0, 0)


def find_chunks(text: str) -> list[Chunk]:
    """Returns the things that a text names, in its order; one that is named twice is there twice.

    >>> [chunk.text for chunk in find_chunks("Yes, the man's left hand holds two small dogs near a stop sign.")]
    ["man's left hand", 'two small dogs', 'stop sign']
    >>> find_chunks("It shows a slice of pizzas.")[-1]
    Chunk(text='pizzas', start=20, end=26, head='pizza', normal='pizza', place=5)
    """
    tokens = _settled(text)
    chunks, run = [], []
    tells = False  # whether what comes next says how something is, as after "the sky is"
    for number, token in enumerate(tokens):
        if token.kind in _NAMING or (run and token.kind == "own") or _joins(tokens, number, run, tells):
            run.append(token)
            continue
        found = _chunk(text, run, tells)
        chunks += found
        if token.kind == "be":
            tells = "there" not in {other.word for other in tokens[max(number - 1, 0) : number + 2]}
        elif found or token.kind not in ("adverb", "conjunction", "comma"):
            tells = False
        run = [token] if token.kind == "number" else []
    return chunks + _chunk(text, run, tells)


def name_phrases(text: str, phrases) -> list[Chunk]:
    """Returns the things that phrases of a text name, where another parser has found the phrases.

    What such a phrase says without naming a thing is left out as it is by `find_chunks`: a pronoun, "the left side",
    the slice of "a slice of pizza".

    Args:
      text: the text.
      phrases: (start, end, head) of each, in characters: of the phrase, exclusive at its end, and of its main word.

    >>> [chunk.text for chunk in name_phrases("It is a slice of pizza.", [(0, 2, 0), (6, 13, 8), (17, 22, 17)])]
    ['pizza']
    """
    tokens, chunks = _settled(text), []
    for start, end, head in phrases:
        run = [token for token in tokens if start <= token.start and token.end <= end]
        while run and run[0].kind not in (*_NAMING, "number") and not run[0].start <= head < run[0].end:
            run = run[1:]
        # Words that are lists' verbs, or anything else, are nouns where the parser has one for the phrase's main word.
        run = [
            token._replace(kind="noun") if token.kind in _NO_NOUNS and token.start <= head < token.end else token
            for token in run
        ]
        chunks += _chunk(text, run, tells=False)
    return chunks


def _settled(text):
    """Returns the words and breaks of a text, each with what it is beside its neighbours."""
    tokens = list(_tokens(text))
    for number, token in enumerate(tokens):
        before, after = (tokens[n] if 0 <= n < len(tokens) else _GAP for n in (number - 1, number + 1))
        tokens[number] = token._replace(kind=_settle(token, before, after))
    return tokens


def _tokens(text):
    """Yields the words and breaks of a text; a possessive ending is a word of its own."""
    place = 0
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        kind = match.lastgroup
        if kind != "word":
            yield _Token(match[0], kind, start, end, place)
            place += kind == "number"
            continue
        own = _OWN.search(match[0])
        stop = start + own.start() if own else end
        word = unicodedata.normalize("NFC", text[start:stop]).lower().replace("’", "'")
        yield _Token(word, _kind(word), start, stop, place)
        place += 1
        if own:
            yield _Token("'s", "own", stop, end, place)


def _kind(word):
    """Returns what a word is for all one knows without its neighbours."""
    if re.search(r"'(?:m|re|ve|ll|d|t)$", word):
        return "auxiliary"
    one = _singular(word)
    if word in _KINDS or _KINDS.get(one) == "dull":
        return _KINDS.get(word, "dull")
    if word in _NAMES or one in _NAMES:
        return "noun"
    if len(word) > 4 and (ending := re.search(r"(?:ing|(?<![eb])ed|ly)$", word)):
        return {"ing": "ing", "ed": "ed", "ly": "adverb"}[ending[0]]
    return "adjective" if re.search(r"..(?:ous|less|ful)$", word) else "noun"


def _settle(token, before, after):
    """Returns what a word is beside its neighbours, of which the one before is settled."""
    word, kind = token.word, token.kind
    names_more = after.kind in (*_NAMING, "either", "ed")
    if kind == "ing":  # "a sleeping cat" but "a man holding cats"
        return "adjective" if names_more and (before.kind in _BEFORE_NOUN or word in _GERUNDS) else "verb"
    if kind == "ed":  # "two parked cars" but "two cars parked"
        return "adjective" if names_more and before.kind not in ("noun", "dull", "pronoun") else "verb"
    if kind == "dull" and before.word in _GERUNDS:  # "parking lot", "dining area"
        return "noun"
    if kind == "noun" and _singular(word) in _MEASURES.split() and after.word == "of":
        return "dull"
    if (
        word == "can"
        and before.kind in _NAMING
        and (after.kind in ("preposition", "gap", "comma", "conjunction") or after.word in ("is", "are"))
    ):
        return "noun"
    if word in _HOW_OR_WHAT and before.kind in _BEFORE_NOUN[: 2 if word == "orange" else 3] and not names_more:
        return "noun"  # "a blue square", "an orange"; a dark orange is a colour
    return _settle_verb(token, before, after) if kind == "either" else kind


def _settle_verb(token, before, after):
    ends_in_s = token.word not in _BARE
    if before.kind in ("noun", "dull"):  # "people walk", "a man walks", but "a fruit stand"
        many = _singular(before.word) != before.word
        return "verb" if ends_in_s or many or after.kind in ("determiner", "pronoun") else "noun"
    if before.kind in ("pronoun", "auxiliary") or (before.kind == "to" and not ends_in_s):
        return "verb"
    if before.kind in ("gap", "comma", "conjunction", "adverb"):
        return "verb" if after.kind in ("determiner", "pronoun", "preposition", "adverb") else "noun"
    return "noun"


def _joins(tokens, number, run, tells):
    """Says whether a comma or an "and" stands between adjectives of one thing: "a black and white cat"."""
    if tells or not run or run[-1].kind not in ("adjective", "comma") or any(t.kind in ("noun", "dull") for t in run):
        return False
    signs = [other.word for other in tokens[number : number + 2]]
    after = number + (2 if signs in ([",", "and"], [",", "or"]) else 1)
    return signs[0] in (",", "and", "or") and after < len(tokens) and tokens[after].kind == "adjective"


def _chunk(text, run, tells):
    """Returns the thing that a run of words names, in a list, or an empty list."""
    while run and run[-1].kind != "noun":
        run = run[:-1]
    if not run or (tells and len(run) == 1 and _singular(run[0].word) == run[0].word):
        return []
    words = [_singular(t.word) if t.kind != "adjective" else t.word for t in run if t.kind in _NAMING]
    start, end = run[0].start, run[-1].end
    return [Chunk(text[start:end], start, end, words[-1], " ".join(words), run[0].place)]


def _singular(word):
    if word in _SINGULARS:
        return _SINGULARS[word]
    if word.endswith("men"):
        return word[:-2] + "an"
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:ss|sh|ch|x|z|o|(?<!o)us)es$", word):  # "buses" but "houses"
        return word[:-2]
    return word[:-1]


def _in_third_person(verb):
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + ("es" if re.search(r"(?:s|x|ch|sh|o)$", verb) else "s")


_SINGULARS = dict(zip(_PLURALS.split()[::2], _PLURALS.split()[1::2], strict=True))
_NAMES = {*_NOUNS.split(), *_MEASURES.split()}
_BARE = set(_EITHER.split())
_KINDS = {word: "verb" for verb in _VERBS.split() for word in (verb, _in_third_person(verb))}
_KINDS |= dict.fromkeys(_PAST.split(), "verb")
_KINDS |= {word: "either" for verb in _BARE for word in (verb, _in_third_person(verb))}
_KINDS |= {word: kind for kind, words in _LISTED.items() for word in words.split()}
