"""Let the text encoder read a keyword that one concept alone has as that concept's name.

In captions a keyword is rare, and most keywords belong to several concepts, so the UNet draws few of them right. What
it draws by name it draws by any text with the same hidden states. So a copy of the text encoder is trained to give, for
a caption by keyword, the states that the original gives for the same caption by name, and for every other caption the
original's own (distillation, Hinton et al. 2015, arXiv 1503.02531, of hidden states). The UNet stays as it is. Pairs of
a concept and a style that are held out are held out here, too.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.export.models.clip import TextEncoder
from training import data
from training.captions import own_keywords, sample_caption, sample_synonyms
from training.config import TrainingConfig
from training.run import Run, begin
from training.texts import Texts


def train(config: TrainingConfig) -> None:
    """Train until the budget is spent; the checkpoint is ``synonyms.pt``."""
    dataset = data.load(config)
    seen, unseen = dataset.split()
    keywords = own_keywords(dataset.concepts)
    own = {word for words in keywords.values() for word in words}
    texts, original = Texts(config), before(config)
    model = copy.deepcopy(original).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.text_model.parameters(), lr=config.synonyms_lr, weight_decay=0.0)
    run = Run("synonyms", config, config.synonyms_budget)
    parts = {"model": model, "optimizer": optimizer}
    run.resume(parts)
    pairs = [(n, word) for n in seen for word in keywords[dataset.concepts[n].slug]]
    for update in run.steps(optimizer, parts):
        chosen = [pairs[place] for place in run.rng.integers(len(pairs), size=config.synonyms_batch)]
        asked = [sample_synonyms(dataset.concepts[n], word, dataset.styles[n], run.rng) for n, word in chosen]
        others = run.rng.choice(seen, config.synonyms_batch)
        kept = [sample_caption(dataset.concepts[n], dataset.styles[n], run.rng) for n in others]
        kept[0] = ""  # what guidance goes away from
        kept = [text for text in kept if text.partition(", ")[0] not in own]  # by such a keyword alone
        wanted = states(original, texts, [by_name for _, by_name in asked] + kept)
        got = model(texts.encode([by_keyword for by_keyword, _ in asked] + kept))[0]
        errors = (got - wanted).square().mean(dim=(1, 2))
        renamed, same = errors[: len(asked)].mean(), errors[len(asked) :].mean()
        update((renamed + config.synonyms_keep * same) / (1 + config.synonyms_keep))
    figures = {
        part: measured(model, original, texts, dataset, chosen)
        for part, chosen in (("seen", seen), ("held_out", unseen))
    }
    print(f"synonyms: {run.step} steps, {json.dumps(figures)}")


def before(config: TrainingConfig) -> TextEncoder:
    """The text encoder that was trained along with the UNet; without that stage, of the bundle the run starts from."""
    model = TextEncoder(config.text_encoder)
    path = config.work / "unet.pt"
    if path.exists() or config.start is None:
        model.load_state_dict(torch.load(path, weights_only=True)["text_ema"])
    else:
        begin(model, config, "text_encoder")
    return model.to(config.device).eval().requires_grad_(False)


@torch.no_grad()
def states(model: TextEncoder, texts: Texts, captions: list[str]) -> Tensor:
    """The last hidden states (B, tokens, channels) of ``captions``, float32."""
    return torch.cat([model(texts.encode(captions[n : n + 512]))[0] for n in range(0, len(captions), 512)])


def measured(
    model: TextEncoder, original: TextEncoder, texts: Texts, dataset: data.Dataset, chosen: np.ndarray
) -> dict[str, float]:
    """Of the pairs ``chosen``, how far captions stray, and how often one by keyword is nearest to its concept's name.

    The last position is compared, which has read the whole caption, among all names in the pair's style. Errors are
    mean squares over all positions, over the variance of the original's states between captions.
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
    found, errors, kept = [], [], []
    for each, group in names.items():
        own = [dataset.concepts[n] for n in chosen if dataset.styles[n] == each]
        asked = [(concept.slug, word) for concept in own for word in keywords[concept.slug]]
        kept.append((states(model, texts, [style(concept.name, each) for concept in own]), own, group))
        if asked:
            got = states(model, texts, [style(word, each) for _, word in asked])
            right = torch.tensor([places[slug] for slug, _ in asked], device=got.device)
            found.append(torch.cdist(got[:, -1], group[:, -1]).argmin(dim=1) == right)
            errors.append((got - group[right]).square().mean(dim=(1, 2)))
    strayed = [F.mse_loss(got, group[[places[c.slug] for c in own]]) for got, own, group in kept if own]
    return {
        "nearest_to_its_name": round(float(torch.cat(found).float().mean()), 4),
        "error_by_keyword": round(float(torch.cat(errors).mean() / variance), 4),
        "error_by_name": round(float(torch.stack(strayed).mean() / variance), 4),
    }
