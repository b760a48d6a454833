"""``python -m training.plot FOLDER OUTPUT.svg``: the losses of a run's CSV files against its steps."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

STAGES = {
    "autoencoder": "L1 + L2 + KL",
    "text-encoder": "contrastive",
    "unet": "v, min-SNR weighted",
    "colours": "v, and distance of states",
    "synonyms": "distance of states",
    "finetune-1": "v, min-SNR weighted",
    "finetune-2": "v, min-SNR weighted",
}


def main() -> None:
    """Draw one panel a stage: the mean loss of every logged interval, and its running mean."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    figure, panels = plt.subplots(1, len(STAGES), figsize=(21, 3), layout="constrained")
    for panel, (stage, loss) in zip(panels, STAGES.items(), strict=True):
        steps, _, losses, _ = np.loadtxt(folder / f"{stage}.csv", delimiter=",", ndmin=2).T
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        panel.plot(steps, losses, color="0.8", linewidth=0.8)
        panel.plot(steps[window - 1 :], smooth, color="tab:blue")
        panel.set(title=stage, xlabel="step", ylabel=f"loss ({loss})", yscale="log")
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
