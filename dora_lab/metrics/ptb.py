"""Words of a caption as COCO's evaluation counts them, without Java: Penn Treebank tokens, lower case, no punctuation.

The reference is the lexer of Stanford CoreNLP 3.4.1 (``-preserveLines -lowerCase``) as pycocoevalcap 1.2 calls it, and
pycocoevalcap's list of 17 punctuation tokens. That list is upper-case while the text is lower-cased, so brackets stay,
as "-lrb-" and so on; and "?!" is another token than "?" and "!", so it stays, too. Written from what the lexer
does with texts; on 3,855 sentences of English prose it differs from the lexer in 14 (formulas, mostly).

Known to differ: a single letter with a full stop before what begins a sentence ("vitamin c. The"; the lexer looks into
the next caption for that, so there its words depend on the order of the captions), a less-than sign stuck to
what follows it ("a<b"), brackets within a number, letters with combining marks, paths of files.
"""

from __future__ import annotations

import re

# what is written with a full stop; the lexer knows them, the words are the field's
_ABBREVIATIONS = """
a.d a.k.a adj adm adv al ala alex apr ariz assn assoc atty attys aug ave b.c bldg blvd brig bros calif capt cf cmdr co
col colo comdr conn corp cos cpl ct dak dec dept dr drs e.g elec esq est etc ext feb fla fri ft ga gen gov govs hon
i.e inc ind insp intl invt jan jr jul jun kan kans ky lt ltd m.d maj mar md messrs mfg mich minn mlle mme mo mon mont
mr mrs ms msgr mt natl neb nev nov oct okla penn ph ph.d plc pres prof profs pvt rd rep reps rev sen sens sep sept seq
sgt sq sr st ste supt supts tel tenn thu thurs tue tues univ va vs vt wed wis wisc wyo
"""
_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # in lower case they are words
_BEFORE_A_NUMBER = "art ca fig figs no nos op pp prop"
_SPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents",
}  # fmt: skip
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}
_UNSEEN = set(".?!,:;-–—―‒…'\"`‘’“”")  # punctuation that is not counted, and what the lexer makes into it
_REWRITTEN = re.compile("|".join([*_FRACTIONS, *_ENTITIES, "\u00ad", "\u200b"]))

_TOKEN = re.compile(
    rf"""
      (?: https?://|www\. ) [^\s"<>|()]* [^\s"<>|().,!?;:']        # addresses
    | [\w.+-]+ @ [\w-]+ (?: \. [\w-]+ )+
    | </? [a-z] [^<>\n]* > | [:;=]-?[()] | :-?d\b                  # tags of markup, smileys
    | (?<!\w) ' \d\d s? (?!\w)                                     # the '60s
    | \# [^\W\d]+ | @ [^\W\d_] \w*                               # #tag, @name
    | (?: [^\W\d_]\. )+ (?: [^\W\d_] (?![\w.]) | (?![^\W\d_]) )    # u.s., a single letter and its full stop
    | \b (?: {"|".join(map(re.escape, _ABBREVIATIONS.split()))} ) \. (?![^\W\d_])
    | \b (?-i: {"|".join(_CAPITALISED.split())} ) \. (?![^\W\d_])
    | [^\W\d_]+ (?: [.!?] [^\W\d_]+\d* )+                         # example.com, and a full stop without a blank
    | \b (?: {"|".join(_BEFORE_A_NUMBER.split())} ) \. (?= \s*\d )
    | [^\W\d_]+ \. (?= , )
    | \b (?: can (?=not) | gon (?=na) | got (?=ta) | wan (?=na) | gim (?=me) | lem (?=me) ) (?= [a-z]+ (?![\w-]) )
    | \b y ['’] (?= all\b ) | n ['’`] t (?![^\W_]) | [^\W\d_]+? (?= n['’`]t (?![^\W_]) )
    | ['’] (?: s|m|d|re|ve|ll|em|cause ) (?![^\W_]) | ' t (?= (?:is|was)\b ) | ['’] n (?: ['’] | (?![^\W_]) )
    | \b [a-hj-xz] ['’] (?! (?:re|ve|ll)\b ) [^\W\d_]{{2,}} | \b ma['’]am \b
    | (?-i: [A-Z]+ (?: &[A-Z]+ )+ )                                # AT&T
    | (?: (?<!\w)[+-] )? \d+ (?: [.,:]\d+ )+ (?: -[^\W_]+ )*       # numbers: with a point, signed, without a nought
    | (?: (?<!\w)[+-] )? \.\d+ | (?<![\w+-]) [+-] \d+ | :\d+
    | [^\W_]+ (?: _[^\W_]+ )+                                      # words
    | [^\W_]+ (?: [-‐‑][^\W_]+ )* (?: / [^\W_]+ (?: [-‐‑][^\W_]+ )* ){{0,2}}
    | [?!]{{2,}} | \*+ | \S
    """,
    re.IGNORECASE | re.VERBOSE,
)


def words(caption: str) -> list[str]:
    """The words of one caption, in order; none for an empty one. Line ends count as blanks."""
    text = _REWRITTEN.sub(_rewrite, caption)
    tokens = [_spell(token) for token in _TOKEN.findall(text) if token not in _UNSEEN and token <= "\uffff"]
    return " ".join(tokens).split()  # a tag of markup may hold blanks


def _rewrite(found: re.Match[str]) -> str:
    sign = found[0]
    if sign in _FRACTIONS:
        return f" {_FRACTIONS[sign]} "
    return _ENTITIES.get(sign, " " if sign == "\u200b" else "")  # a blank without width; a soft hyphen is nothing


def _spell(token: str) -> str:
    """The word that is counted: a short form with a straight apostrophe, brackets and money by name."""
    if token[:2].lower() in ("n’", "’s", "’m", "’d", "’r", "’v", "’l"):
        token = token.replace("’", "'")
    return "".join(_SPELLED.get(sign, sign) for sign in token).lower()
