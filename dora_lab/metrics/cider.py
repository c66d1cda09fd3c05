"""CIDEr-D of captions (Vedantam et al. 2015, arXiv 1411.5726, section 5), as pycocoevalcap 1.2 computes "CIDEr"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from dora_lab.metrics.ptb import words

LONGEST = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty on a difference in length, in bigrams
Grams = tuple[Counter[tuple[str, ...]], ...]  # counts of the n-grams of a caption, n = 1 to 4
Weights = dict[tuple[str, ...], float]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption against the references of its image, in [0, 10]; tables print the mean times 100.

    An n-gram weighs ln(number of images) - ln(number of images that have it in a reference): a caption's score depends
    on all the images that are scored with it, and a single image scores 0. An empty caption scores 0; references that
    are equal count each. Raises ValueError for other numbers of captions and images, an image without a reference.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} images; give one for each")
    if empty := [number for number, texts in enumerate(references) if not texts]:
        raise ValueError(f"image {empty[0]}: no reference; give one at least")
    images = [[_grams(text) for text in texts] for texts in references]
    found = Counter(gram for image in images for gram in {gram for text in image for count in text for gram in count})
    idf = {gram: math.log(len(images)) - math.log(n) for gram, n in found.items()}
    unknown = math.log(len(images)) if images else 0.0
    return [_score(_grams(caption), image, idf, unknown) for caption, image in zip(captions, images, strict=True)]


def _grams(caption: str) -> Grams:
    text = words(caption)
    return tuple(
        Counter(tuple(text[start : start + n]) for start in range(len(text) - n + 1)) for n in range(1, LONGEST + 1)
    )


def _score(caption: Grams, references: Sequence[Grams], idf: Weights, unknown: float) -> float:
    """The sums are taken in the reference's order, so that the last digits agree."""
    weighted = _weigh(caption, idf, unknown)
    totals = [0.0] * LONGEST
    for reference in references:
        longer = caption[1].total() - reference[1].total()
        penalty = math.e ** (-(longer**2) / (2 * SIGMA**2))
        for n, (ours, theirs) in enumerate(zip(weighted, _weigh(reference, idf, unknown), strict=True)):
            totals[n] += _similarity(ours, theirs) * penalty
    return sum(totals) / LONGEST / len(references) * 10


def _weigh(caption: Grams, idf: Weights, unknown: float) -> list[Weights]:
    return [{gram: n * idf.get(gram, unknown) for gram, n in counts.items()} for counts in caption]


def _similarity(caption: Weights, reference: Weights) -> float:
    """Cosine of two weighted counts, the caption's cut off at the reference's (that is the D); 0 where one has none."""
    lengths = _length(caption) * _length(reference)
    shared = sum(
        min(weight, reference[gram]) * reference[gram] for gram, weight in caption.items() if gram in reference
    )
    return shared / lengths if lengths else 0.0


def _length(weights: Weights) -> float:
    return math.sqrt(sum(weight**2 for weight in weights.values()))
