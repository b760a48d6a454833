"""What a UNet is given when pictures are drawn: prompts of the bundle's own vocabulary, drawn in a few steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import MOST_VOCABULARY
from calotype.runtime.bundle.parity import Inputs
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import Session, Sizes
from calotype.runtime.sessions.traced import Trace
from calotype.runtime.untrusted import parse_json

WORDS, STEPS = 4, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One of the UNet: its inputs by name, and what it made of them."""

    inputs: Inputs
    noise_pred: NDArray[np.float32]


def evaluations(bundle: Bundle, prompts: int) -> list[list[Evaluation]]:
    """Those of drawing ``prompts`` pictures on the CPU, exactly; the same at every call."""
    recorder, found = _Recorder(), []
    with Pipeline(bundle, "cpu", trace=recorder) as pipeline:
        for number, prompt in enumerate(_prompts(bundle, prompts)):
            recorder.seen = []
            pipeline(prompt, seed=number, num_inference_steps=STEPS, output_type="latent")
            found.append(recorder.seen)
    return found


def _prompts(bundle: Bundle, count: int) -> list[str]:
    """Whole words of the tokenizer, a few at a time."""
    vocabulary = parse_json(bundle.read(bundle.manifest.tokenizers["tokenizer"].vocab, MOST_VOCABULARY))
    words = sorted(word.removesuffix("</w>") for word in vocabulary if word.endswith("</w>"))
    words = [word for word in words if word.isalpha() and len(word) > 2]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, WORDS)) if words else "" for _ in range(count)]


class _Recorder(Trace):
    """Lets a pipeline open its networks, and keeps what goes through the UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Evaluation] = []

    def open(self, network: str, opener: Callable[[], Session]) -> Session:
        """See :meth:`Trace.open`."""
        session: Any = super().open(network, opener)
        if network == "unet":
            session.run = self._recorded(session)
        return cast(Session, session)

    def _recorded(self, session: Session) -> Callable[[Sizes], None]:
        run: Callable[[Sizes], Any] = session.run

        def recorded(sizes: Sizes) -> None:
            run(sizes)
            inputs = {item.name: session.buffer(item.name, sizes).copy() for item in session.inputs}
            self.seen.append(Evaluation(inputs=inputs, noise_pred=session.buffer("noise_pred", sizes).copy()))

        return recorded
