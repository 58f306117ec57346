"""The picture of docs/moma.md: which tokens experts of two modalities choose, and which ones
auxiliary routers foresee.

    python docs/moma_figure.py docs/images/moma.png

A router with random weights chooses among random tokens; auxiliary routers learn to foresee it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `coterie` of this checkout

from coterie.comm.axis import Axes as Ranks
from coterie.models.initialise import initialise
from coterie.moe.routers.modality import ModalityConfig, ModalityRouter
from coterie.moe.tokens import TokenInfo

WIDTH, TOKENS, SHOWN, STEPS = 16, 256, 24, 300
TEXT, IMAGE, NOBODY = "#4477aa", "#ee9944", "#f1f1f1"
MODALITY_T = torch.tensor(([0] * 5 + [1] * 9 + [0] * 4 + [1] * 6) * 11)[:TOKENS]


def trained() -> ModalityRouter:
    """A router whose auxiliary routers have learnt."""
    router = ModalityConfig(experts=(4, 4), auxiliary=True).build(WIDTH, 8, Ranks())
    assert isinstance(router, ModalityRouter) and router.auxiliary is not None
    initialise(router, 0)
    with torch.no_grad():
        router.weight.mul_(50)
    optimizer = torch.optim.Adam(router.auxiliary.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        router(tokens(step), TokenInfo(modality_T=MODALITY_T)).losses["auxiliary"].backward()
        optimizer.step()
    return router.eval()


def tokens(seed: int) -> Tensor:
    """Activations as a norm leaves them."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def chosen(router: ModalityRouter, by_choice: bool) -> np.ndarray:
    """bool (T, E), of tokens that were not trained on."""
    info = TokenInfo(modality_T=MODALITY_T, by_choice=by_choice)
    rows = router(tokens(STEPS), info).assignment
    result_TE = np.zeros((TOKENS, 8), dtype=bool)
    result_TE[rows.token_A, rows.expert_A] = True
    return result_TE


def draw(ax: Axes, router: ModalityRouter, taken_TE: np.ndarray, truth_TE: np.ndarray) -> None:
    """A row for each expert, those of a modality together; a column for each token."""
    experts = sorted(range(8), key=lambda expert: (router.groups[expert], expert))
    for row, expert in enumerate(experts):
        group = router.groups[expert]
        for token in range(SHOWN):
            mine = int(MODALITY_T[token]) == group
            colour = (TEXT, IMAGE)[group] if taken_TE[token, expert] else "white"
            face = colour if mine else NOBODY
            wrong = mine and taken_TE[token, expert] != truth_TE[token, expert]
            ax.add_patch(
                Rectangle((token, -row), 0.92, 0.92, facecolor=face, edgecolor="#cccccc", lw=0.5)
            )
            if wrong:
                cross = "white" if taken_TE[token, expert] else "#cc3311"
                ax.text(token + 0.46, 0.46 - row, "×", ha="center", va="center", color=cross)
    for token in range(SHOWN):
        colour = (TEXT, IMAGE)[int(MODALITY_T[token])]
        ax.add_patch(Rectangle((token, 1.25), 0.92, 0.5, facecolor=colour))
    ax.text(-0.3, 1.5, "tokens", ha="right", va="center", fontsize=8)
    ax.text(-0.3, -1, "text\nexperts", ha="right", va="center", fontsize=8)
    ax.text(-0.3, -5, "image\nexperts", ha="right", va="center", fontsize=8)
    ax.set_xlim(-3.2, SHOWN)
    ax.set_ylim(-7.2, 2)
    ax.set_aspect("equal")
    ax.axis("off")


def main(path: Path) -> None:
    """Write the picture."""
    torch.set_num_threads(1)
    router = trained()
    by_choice, foreseen = chosen(router, True), chosen(router, False)
    mine_TE = MODALITY_T[:, None].numpy() == np.array(router.groups)
    agreement = (by_choice == foreseen)[mine_TE].mean()
    figure = Figure(figsize=(11, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw(left, router, by_choice, by_choice)
    left.set_title(
        "Training: each expert takes the best quarter\n"
        f"of its modality's tokens (in each row; {SHOWN} of {TOKENS} tokens shown)",
        fontsize=9,
    )
    draw(right, router, foreseen, by_choice)
    right.set_title(
        "Inference: auxiliary routers look at one token alone\n(in each column); "
        f"they agree on {agreement:.1%} of all pairs",
        fontsize=9,
    )
    shown = {"text": TEXT, "image": IMAGE, "other modality: never": NOBODY}
    patches = [Patch(color=colour, label=name) for name, colour in shown.items()]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8)
    legend.set_title("a filled square: the expert takes the token; ×: not as experts chose")
    legend.get_title().set_fontsize(8)
    figure.savefig(path, dpi=110)
    print(f"agreement {agreement:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
