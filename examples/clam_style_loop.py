"""ResidualMIL in a loop as CLAM writes it: a bag a step, instance clustering, validation, checkpoint, scores of tiles.

    python examples/clam_style_loop.py [--out FOLDER] [--small]

Writes synthetic bags of features in CLAM's layout (pt_files, a table of labels, a split by case), fits the codebook to
the training bags, trains with the bag's and the instances' loss, judges the unseen slides, and saves one slide's scores
as CLAM's heatmaps read them. In a slide of class 1 one tile in ten is of another kind.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

from dre_fast.integrations.build import save_codebook
from dre_fast.integrations.clam import ResidualSB

DIM = 256


class CLAM_SB(ResidualSB):
    """What a CLAM checkout's models/model_clam.py would end with (docs/integrations/clam.md)."""

    codebook: Path

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named, codewords=16, depth=1, codebook=self.codebook)


def write_bags(folder: Path, slides: int) -> list[dict[str, str]]:
    """Bags of 60 to 200 tiles, two kinds of common tiles; a tenth of those of class 1 are of a third kind."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, DIM, generator=generator)
    (folder / "pt_files").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(slides):
        label, tiles = number % 2, int(torch.randint(60, 200, (1,), generator=generator))
        kinds = torch.randint(0, 2, (tiles,), generator=generator)
        if label:
            kinds[: tiles // 10] = 2
        bag = centres[kinds] + 1.5 * torch.randn(tiles, DIM, generator=generator)
        torch.save(bag, folder / "pt_files" / f"slide_{number:03}.pt")
        split = ("train", "train", "test")[number // 2 % 3]
        rows.append(
            {
                "case_id": f"case_{number:03}",
                "slide_id": f"slide_{number:03}",
                "label": str(label),
                "split": split,
            }
        )
    with open(folder / "labels.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return rows


def auc(scores: list[float], labels: list[int]) -> float:
    """The share of pairs of a positive and a negative that the scores put in the right order."""
    s, y = torch.tensor(scores), torch.tensor(labels, dtype=torch.bool)
    pairs = s[y][:, None] - s[~y][None]
    return float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())


def main() -> float:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: one in the system's temporary folder)"
    )
    parser.add_argument("--small", action="store_true", help="fewer slides and epochs")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="clam_style_"))
    torch.manual_seed(0)

    rows = write_bags(out, 24 if args.small else 60)
    loaders = {
        split: [
            (
                torch.load(out / "pt_files" / f"{row['slide_id']}.pt", weights_only=True),
                torch.tensor([int(row["label"])]),
            )
            for row in rows
            if row["split"] == split
        ]
        for split in ("train", "test")
    }
    print(f"{len(rows)} slides in {out}: {len(loaders['train'])} to train, {len(loaders['test'])} to test")

    first = ResidualSB(n_classes=2, embed_dim=DIM, codewords=16)
    first.mil.fit_codebook([bag for bag, _ in loaders["train"]])  # the training bags only
    save_codebook(first.mil, out / "codebook.safetensors")
    CLAM_SB.codebook = out / "codebook.safetensors"

    model = CLAM_SB(dropout=0.25, n_classes=2, embed_dim=DIM, size_arg="small", k_sample=8, subtyping=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, weight_decay=1e-5)
    loss_fn, bag_weight = nn.CrossEntropyLoss(), 0.7
    for epoch in range(2 if args.small else 3):
        model.train()
        total = 0.0
        for number in torch.randperm(len(loaders["train"])).tolist():
            data, label = loaders["train"][number]
            logits, _, _, _, instances = model(data, label=label, instance_eval=True)
            loss = bag_weight * loss_fn(logits, label) + (1 - bag_weight) * instances["instance_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        model.eval()
        scores = []
        with torch.inference_mode():
            for data, _ in loaders["test"]:
                _, Y_prob, _, _, _ = model(data)
                scores.append(float(Y_prob[0, 1]))
        found = auc(scores, [int(label) for _, label in loaders["test"]])
        print(
            f"epoch {epoch + 1}: loss {total / len(loaders['train']):.3f}, AUC of the unseen slides {found:.3f}"
        )

    torch.save(model.state_dict(), out / "s_0_checkpoint.pt")
    data, label = next((data, label) for data, label in loaders["test"] if int(label) == 1)
    with torch.inference_mode():
        A = model.mil.contributions(data, 1).numpy()
    with h5py.File(out / "blockmap.h5", "w") as file:
        file["attention_scores"], file["coords"] = A[:, None], np.zeros((len(A), 2), np.int64)
    print(
        f"scores of the {len(A)} tiles of one slide: from {A.min():+.4f} to {A.max():+.4f}, larger speaks for class 1"
    )
    print(f"checkpoint, codebook and scores are in {out}")
    return found


if __name__ == "__main__":
    main()
