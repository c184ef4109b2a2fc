"""Constructed title queries with graded relevance, for a catalogue that came without a search log.

Nobody typed these queries. They are made from titles, genres and years by a fixed rule, without
typing errors, so that a search domain over the same items can stand beside recommendation:

* `title`: every movie's whole title in lower case, article first, year and bracketed
  translation dropped ("the shawshank redemption").
* `words`: of a title of three or more words, two or three neighbouring ones with at least one
  informative word (not in `STOP_WORDS`, longer than one letter); place and length by hash.
* `genre_word`: one of the movie's genres and one informative title word, both by hash
  ("thriller usual").
* `genre_decade`: a genre and a release decade that occur together ("comedy 1990s").

Equal texts are one query. Relevance is a function of the query's text and the movie alone:

    grade  title, words                                genre_word           genre_decade
    3      its title holds the phrase                  the genre, the word  genre and decade
    2      an informative word of the query and a      only the word        the genre, a
           genre of a movie that holds the phrase                           neighbouring decade
    1      one of these two                            only the genre       only the genre
    0      none of them                                neither              not the genre

Candidates of a query are the `PER_GRADE` (`PER_GRADE_BROAD` for genre_decade) movies of each
grade with the smallest hash of (seed, query, movie): grades 1 and 2 are the hard negatives,
grade 0 is a uniform sample. The movie that a query was made from is always among its candidates.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from common import mix, stable_hash, words_of

_STOP = (
    "a an and as at be by da das de der des die el en for from her his i ii iii il in into is it its l la las le "
    "les los me my no not of on or our part s se t that the their this to un une up vol we with you your"
)
STOP_WORDS = frozenset(_STOP.split())
PER_GRADE = 3
PER_GRADE_BROAD = 8
_ARTICLE = re.compile(
    r"^(?P<rest>[^(]*), (?P<article>The|An?|Les?|L'|La|Il|Das|Der|Die|El|L[ao]s|Det|Den|Un|Une)(?P<tail>\s*\(.*)?$"
)


@dataclass
class Movies:
    """What queries are made of, one entry a movie.

    Attributes:
        titles: without the year.
        genres: names of genres, at least one.
        decades: first year of the release decade, 0 where it is unknown.
    """

    titles: list[str]
    genres: list[list[str]]
    decades: np.ndarray


@dataclass
class Judgments:
    """Rows (query, movie, relevance).

    Attributes:
        queries: text of every distinct query.
        kinds: its kind: title, words, genre_word or genre_decade.
        query: int64 `[n]`, position in `queries`.
        movie: int64 `[n]`.
        relevance: float32 `[n]`, 0 .. 3.
    """

    queries: list[str]
    kinds: list[str]
    query: np.ndarray
    movie: np.ndarray
    relevance: np.ndarray


def natural_title(title: str) -> str:
    """ "Usual Suspects, The" -> "The Usual Suspects"; a bracketed translation stays behind."""
    found = _ARTICLE.match(title)
    if not found:
        return title
    article = found["article"]
    between = "" if article.endswith("'") else " "
    return f"{article}{between}{found['rest']}{found['tail'] or ''}"


def informative(words: list[str]) -> list[str]:
    """The words that say something about a movie."""
    return [w for w in words if len(w) > 1 and w not in STOP_WORDS]


class Judge:
    """Grades every movie of a catalogue for a query, as the table above says."""

    def __init__(self, movies: Movies) -> None:
        self.movies = movies
        natural = [natural_title(t) for t in movies.titles]
        self.all_words = [words_of(t) for t in natural]
        self.main_words = [words_of(t.split(" (")[0]) or w for t, w in zip(natural, self.all_words, strict=True)]
        self._padded = [f" {' '.join(w)} " for w in self.all_words]
        postings: dict[str, list[int]] = defaultdict(list)
        for movie, words in enumerate(self.all_words):
            for word in dict.fromkeys(words):
                postings[word].append(movie)
        self.postings = {word: np.array(at) for word, at in postings.items()}
        self.genres = sorted({g for names in movies.genres for g in names})
        self._genre_at = {g: i for i, g in enumerate(self.genres)}
        self._has = np.zeros((len(self.genres), len(natural)), bool)
        for movie, names in enumerate(movies.genres):
            self._has[[self._genre_at[g] for g in names], movie] = True

    def __len__(self) -> int:
        return len(self.all_words)

    def having(self, words: list[str]) -> np.ndarray:
        """bool `[movies]`: the title holds at least one of the words."""
        mask = np.zeros(len(self), bool)
        for word in words:
            mask[self.postings.get(word, [])] = True
        return mask

    def phrase(self, words: list[str]) -> np.ndarray:
        """bool `[movies]`: the title holds the words one after the other."""
        rarest = min((self.postings.get(w, np.zeros(0, int)) for w in words), key=len)
        text = f" {' '.join(words)} "
        mask = np.zeros(len(self), bool)
        mask[[m for m in rarest.tolist() if text in self._padded[m]]] = True
        return mask

    def by_phrase(self, words: list[str]) -> np.ndarray:
        """int64 `[movies]`: grades for a `title` or `words` query."""
        exact = self.phrase(words)
        shares_genre = self._has[self._has[:, exact].any(axis=1)].any(axis=0)
        shares_word = self.having(informative(words))
        return np.where(exact, 3, shares_genre.astype(int) + shares_word)

    def by_genre_word(self, genre: str, word: str) -> np.ndarray:
        """int64 `[movies]`: grades for a `genre_word` query."""
        return self._has[self._genre_at[genre]].astype(int) + 2 * self.having([word])

    def by_genre_decade(self, genre: str, decade: int) -> np.ndarray:
        """int64 `[movies]`: grades for a `genre_decade` query."""
        apart = np.abs(self.movies.decades - decade)
        known = self.movies.decades > 0
        near = np.select([known & (apart == 0), known & (apart == 10)], [3, 2], 1)
        return np.where(self._has[self._genre_at[genre]], near, 0)


def construct(movies: Movies, seed: int) -> Judgments:
    """All queries of the rule above with their graded candidates, in a fixed order."""
    judge = Judge(movies)
    names = stable_hash("\t".join(words) for words in judge.all_words)
    # Two movies of one title must differ, or their hashes would tie.
    movie_keys = mix(names, np.arange(len(judge)))
    queries: dict[str, tuple[str, int, np.ndarray]] = {}

    def add(text: str, kind: str, source: int, grades: np.ndarray) -> None:
        queries[text] = (kind, source, grades)

    for movie in range(len(judge)):
        words = judge.main_words[movie]
        text = " ".join(words)
        if text and text not in queries:
            add(text, "title", movie, judge.by_phrase(words))
    picks = mix(seed, stable_hash(["query"])[0], movie_keys).tolist()
    for movie, pick in enumerate(picks):
        phrases = _phrases(judge.main_words[movie])
        if phrases:
            words = phrases[pick % len(phrases)]
            if " ".join(words) not in queries:
                add(" ".join(words), "words", movie, judge.by_phrase(words))
    for movie, pick in enumerate(picks):
        words, genres = informative(judge.main_words[movie]), movies.genres[movie]
        if words and genres:
            word, genre = words[(pick >> 20) % len(words)], genres[(pick >> 40) % len(genres)]
            text = " ".join(words_of(genre) + [word])
            if text not in queries:
                add(text, "genre_word", movie, judge.by_genre_word(genre, word))
    for movie in range(len(judge)):
        for genre in movies.genres[movie]:
            decade = int(movies.decades[movie])
            text = " ".join(words_of(genre) + [f"{decade}s"])
            if decade and text not in queries:
                add(text, "genre_decade", movie, judge.by_genre_decade(genre, decade))
    return _sample(queries, movie_keys, seed)


def _phrases(words: list[str]) -> list[list[str]]:
    """Two or three neighbouring words, one of them informative, shorter than the whole."""
    return [
        words[start : start + length]
        for length in (2, 3)
        if length < len(words)
        for start in range(len(words) - length + 1)
        if informative(words[start : start + length])
    ]


def _sample(queries: dict[str, tuple[str, int, np.ndarray]], movie_keys: np.ndarray, seed: int) -> Judgments:
    """The candidates of every query: per grade those with the smallest hash, and the source."""
    query_keys = stable_hash(queries)
    query, movie, relevance = [], [], []
    for number, (kind, source, grades) in enumerate(queries.values()):
        rank = mix(seed, query_keys[number], movie_keys)
        rank[source] = 0
        limit = PER_GRADE_BROAD if kind == "genre_decade" else PER_GRADE
        for grade in (3, 2, 1, 0):
            pool = np.flatnonzero(grades == grade)
            if len(pool) > limit:
                pool = pool[np.argpartition(rank[pool], limit)[:limit]]
            chosen = pool[np.argsort(rank[pool])]
            query.append(np.full(len(chosen), number))
            movie.append(chosen)
            relevance.append(np.full(len(chosen), grade, np.float32))
    return Judgments(
        list(queries),
        [kind for kind, _, _ in queries.values()],
        np.concatenate(query),
        np.concatenate(movie),
        np.concatenate(relevance),
    )
