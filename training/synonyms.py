"""Let the text encoder read what is said otherwise: by a keyword that one concept alone has, or with words around it.

In captions a keyword is rare, most belong to several concepts, and there are no words that mean nothing, so the UNet
draws few of such prompts right. What it draws by a plain caption it draws by any text with the same hidden states. So
a copy of the text encoder is trained to give, for a caption by keyword, the states that the original gives for the
same caption by name; for one with words around it, those of the plain caption; and for every other caption the
original's own (distillation, Hinton et al. 2015, arXiv 1503.02531, of hidden states). For captions with a colour the
original is what the stage ``colours`` has left, for all others the text encoder that the UNet was trained with; the
colour that a picture has anyway is one of the words around. Pairs of a concept and a style that are held out are held
out here, too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.export.models.clip import TextEncoder
from training import colours, data
from training.captions import own_keywords, sample_caption, sample_phrasing, sample_synonyms
from training.config import TrainingConfig
from training.run import Run
from training.texts import Texts
from training.unet import trained


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``synonyms.pt``."""
    dataset = data.load(config)
    seen, unseen = dataset.split()
    keywords = own_keywords(dataset.concepts)
    taken = {word for words in keywords.values() for word in words}
    texts, original = Texts(config), trained(config)[1]
    with_colours = colours.load(config)
    model = copy.deepcopy(with_colours).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.text_model.parameters(), lr=config.synonyms_lr, weight_decay=0.0)
    run = Run("synonyms", config, config.synonyms_budget)
    parts = {"model": model, "optimizer": optimizer}
    run.resume(parts)
    pairs = [(n, word) for n in seen for word in keywords[dataset.concepts[n].slug]]
    hues = {n: (name, *colours.others(name)) for n, name in colours.own_colours(dataset).items()}

    def coloured(chosen: np.ndarray) -> list[tuple[int, str | None]]:
        """Pictures, a quarter of those that may have a colour with one."""
        choices = [hues[n] if n in hues and run.rng.random() < 0.25 else (None,) for n in chosen]
        return [(n, own[run.rng.integers(len(own))]) for n, own in zip(chosen, choices, strict=True)]

    for update in run.steps(optimizer, parts):
        chosen = [pairs[place] for place in run.rng.integers(len(pairs), size=config.synonyms_batch)]
        # Each a text that is asked, the one that it is to be read as, and the colour in that.
        renamed = [
            (*sample_synonyms(dataset.concepts[n], word, dataset.styles[n], run.rng), None) for n, word in chosen
        ]
        phrased: list[tuple[str, str, str | None]] = []
        for n, hue in coloured(run.rng.choice(seen, config.synonyms_batch)):
            asked, plain = sample_phrasing(dataset.concepts[n], dataset.styles[n], run.rng, hue)
            if hue is not None and hue == hues[n][0]:  # says nothing that the name does not say
                asked = asked if run.rng.random() < 0.5 else plain
                plain, hue = plain.replace(f"{hue} ", "", 1), None
            phrased.append((asked, plain, hue))
        kept = {"": None}  # what guidance goes away from
        kept |= {
            sample_caption(dataset.concepts[n], dataset.styles[n], run.rng, hue): hue
            for n, hue in coloured(run.rng.choice(seen, config.synonyms_batch))
            if n not in hues or hue != hues[n][0]
        }
        as_before = [(text, text, hue) for text, hue in kept.items() if text.partition(", ")[0] not in taken]
        texts_asked, texts_plain, colour = zip(*renamed, *phrased, *as_before, strict=True)
        ids, wanted = texts.encode(texts_asked), states(original, texts, texts_plain)
        with_one = [place for place, each in enumerate(colour) if each is not None]
        if with_one:
            wanted[with_one] = states(with_colours, texts, [texts_plain[place] for place in with_one])
        words = slice(len(renamed), len(renamed) + len(phrased))
        places = aligned(ids[words], texts.encode(texts_plain[words]))
        wanted[words] = wanted[words].gather(1, places[..., None].expand(-1, -1, wanted.shape[2]))
        errors = (model(ids)[0] - wanted).square().mean(dim=(1, 2))
        means = [part.mean() for part in errors.split([len(renamed), len(phrased), len(as_before)])]
        update((means[0] + means[1] + config.synonyms_keep * means[2]) / (2 + config.synonyms_keep))
    figures = {
        part: measured(model, original, texts, dataset, chosen)
        for part, chosen in (("seen", seen), ("held_out", unseen))
    }
    print(f"synonyms: {run.step} steps, {json.dumps(figures)}")


def load(config: TrainingConfig) -> TextEncoder:
    """The text encoder that reads keywords and words around a name; without that stage, the one before it. Frozen."""
    model, path = colours.load(config), config.work / "synonyms.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model


def aligned(asked: Tensor, plain: Tensor) -> Tensor:
    """By position of each text ``asked`` (B, tokens) the one in ``plain`` whose state it is to have, int64.

    A token that the plain caption has not takes the state before it, which has read as much of the meaning.
    """
    places = torch.zeros_like(asked)
    for row, (words, wanted) in enumerate(zip(asked.tolist(), plain.tolist(), strict=True)):
        place = -1
        for position, token in enumerate(words):
            if place + 1 < len(wanted) and token == wanted[place + 1]:
                place += 1
            places[row, position] = max(0, place)
    return places


@torch.no_grad()
def states(model: TextEncoder, texts: Texts, captions: Sequence[str]) -> Tensor:
    """The last hidden states (B, tokens, channels) of ``captions``, float32."""
    return torch.cat([model(texts.encode(captions[n : n + 512]))[0] for n in range(0, len(captions), 512)])


def measured(
    model: TextEncoder, original: TextEncoder, texts: Texts, dataset: data.Dataset, chosen: np.ndarray
) -> dict[str, float]:
    """Of the pairs ``chosen``, how far captions stray, and how often one is nearest to its concept's name.

    Such captions are by keyword, or by name in words that were not taught. The last position is compared, which has
    read the whole caption, among all names in the pair's style. Errors are mean squares over all positions, over the
    variance of the original's states between captions.
    """
    keywords = own_keywords(dataset.concepts)
    concepts = {concept.slug: concept for concept in dataset.concepts}
    places = {slug: place for place, slug in enumerate(concepts)}
    style = "{}, {} style".format
    names = {
        each: states(original, texts, [style(concept.name, each) for concept in concepts.values()])
        for each in dict.fromkeys(dataset.styles)
    }
    variance = torch.stack([group.var(dim=0).mean() for group in names.values()]).mean()
    found, errors, kept, around = [], [], [], []
    for each, group in names.items():
        own = [dataset.concepts[n] for n in chosen if dataset.styles[n] == each]
        if not own:
            continue
        asked = [(concept.slug, word) for concept in own for word in keywords[concept.slug]]
        kept.append((states(model, texts, [style(concept.name, each) for concept in own]), own, group))
        phrased = states(model, texts, [style(f"could you paint a {concept.name}", each) for concept in own])
        right = torch.tensor([places[concept.slug] for concept in own], device=phrased.device)
        around.append(torch.cdist(phrased[:, -1], group[:, -1]).argmin(dim=1) == right)
        if asked:
            got = states(model, texts, [style(word, each) for _, word in asked])
            right = torch.tensor([places[slug] for slug, _ in asked], device=got.device)
            found.append(torch.cdist(got[:, -1], group[:, -1]).argmin(dim=1) == right)
            errors.append((got - group[right]).square().mean(dim=(1, 2)))
    strayed = [F.mse_loss(got, group[[places[c.slug] for c in own]]) for got, own, group in kept]
    return {
        "nearest_by_keyword": round(float(torch.cat(found).float().mean()), 4),
        "nearest_in_other_words": round(float(torch.cat(around).float().mean()), 4),
        "error_by_keyword": round(float(torch.cat(errors).mean() / variance), 4),
        "error_by_name": round(float(torch.stack(strayed).mean() / variance), 4),
    }
