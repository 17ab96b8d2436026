"""Plain lists of English words: which to leave alone, and which to append."""

from __future__ import annotations

_PRONOUNS = """
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
it its itself they them their theirs themselves this that these those who whom whose which what
"""
_AUXILIARIES = """
am is are was were be been being have has had having do does did doing will would shall should can could may might must
ought ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't
shouldn't wasn't weren't won't wouldn't
"""
_SMALL_WORDS = """
a an the and but or nor so yet if because as until while though although unless since whether than of at by for with
about against between into through during before after above below to from up down in out on off over under again
further then once here there when where why how all any both each few more most other some such no not only own same
too very just now
"""
_LINKING_WORDS = """
across afterwards almost alone along already also always among amongst anyhow anyone anything anyway anywhere around
beforehand behind beside besides beyond cannot despite due either else elsewhere empty enough even ever every everyone
everything everywhere except former formerly hence hereafter hereby herein hereupon however indeed instead latter
latterly least meanwhile moreover much mostly namely neither never nevertheless next nobody none noone nothing nowhere
onto others otherwise per perhaps please rather regarding seem seemed seeming seems several somehow someone something
sometime sometimes somewhere still thence thereafter thereby therefore therein thereupon throughout thru thus together
toward towards unto upon via well whatever whence whenever whereafter whereas whereby wherein whereupon wherever whither
whoever whole within without
"""

STOPWORDS: tuple[str, ...] = tuple((_PRONOUNS + _AUXILIARIES + _SMALL_WORDS).split())
"""Function words of English, the usual short list: a swap of one of them is seen at once and changes little."""

TEXTFOOLER_STOPWORDS: tuple[str, ...] = (*STOPWORDS, *_LINKING_WORDS.split())
"""The longer list in the manner of TextFooler's: linking adverbs and indefinite pronouns besides `STOPWORDS`."""

_PRAISE = """
good great best nice excellent amazing awesome fantastic wonderful perfect ultimate love beautiful better easy happy
recommend works fine fast fun quality value popular top choice favorite superb brilliant outstanding
"""
POSITIVE_WORDS: tuple[str, ...] = tuple(_PRAISE.split())
"""Words of praise, for `TrivialInsertion`."""

PROTECTED_WORDS: tuple[str, ...] = ("title", "brand", "category")
"""Names of an item's attributes, which a victim may read as such."""
