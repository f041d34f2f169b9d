"""NetVLAD for place recognition: local descriptors of an image -> one global descriptor -> the nearest image of a map.

    python examples/netvlad_place_recognition.py [--small]

Paints places (posters of coloured shapes), each seen twice: a map image and a query from another camera position, light
and noise. Local descriptors are those of a small convolutional network. Three global descriptors are compared by
recall@1, the share of queries whose nearest map image shows the same place: the mean of the descriptors, VLAD (hard
assignment to a fitted codebook, nothing trained), and NetVLAD with the network trained by a triplet loss on other places.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

import dre_fast

SIZE, VIEW, DIM, CODEWORDS = 80, 64, 32, 16


def paint(places: int, generator: torch.Generator) -> Tensor:
    """Places [P, 3, SIZE, SIZE]: twelve soft ellipses each, of one palette of six colours for all of them."""
    palette = torch.rand(6, 3, generator=torch.Generator().manual_seed(7))
    axis = torch.linspace(-1, 1, SIZE)
    images = torch.full((places, 3, SIZE, SIZE), 0.5)
    for image in images:
        for _ in range(12):
            x, y = (2 * torch.rand(2, generator=generator) - 1).tolist()
            width, height = (0.1 + 0.3 * torch.rand(2, generator=generator)).tolist()
            inside = torch.sigmoid(
                20 * (1 - ((axis[None] - x) / width) ** 2 - ((axis[:, None] - y) / height) ** 2)
            )
            colour = palette[int(torch.randint(6, (1,), generator=generator))][:, None, None]
            image.mul_(1 - inside).add_(inside * colour)
    return images


def look(places: Tensor, generator: torch.Generator) -> Tensor:
    """Views [P, 3, VIEW, VIEW]: another position, light and noise for each."""
    views = []
    for image in places:
        top, left = torch.randint(SIZE - VIEW + 1, (2,), generator=generator).tolist()
        light = 0.6 + 0.8 * torch.rand(1, generator=generator)
        tint = 0.85 + 0.3 * torch.rand(3, 1, 1, generator=generator)
        view = image[:, top : top + VIEW, left : left + VIEW] * light * tint
        views.append(view + 0.05 * torch.randn(view.shape, generator=generator))
    return torch.stack(views)


class Network(nn.Module):
    """Images [B, 3, H, W] -> local descriptors [B, H W / 16, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 5, 2, 2), nn.Conv2d(16, DIM, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(relu(self.first(images - images.mean(dim=(2, 3), keepdim=True))))
        return maps.flatten(2).transpose(1, 2)  # [B, D, H, W] -> rows [B, H W, D]


def recall(queries: Tensor, stored: Tensor) -> float:
    """Recall@1 of descriptors of unit length [P, *], query p belonging to map image p."""
    nearest = (queries @ stored.T).argmax(1)
    return float((nearest == torch.arange(len(queries))).double().mean())


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="fewer places and steps")
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    places, steps, batch = (60, 10, 12) if args.small else (160, 80, 24)
    train, test = paint(places, generator), paint(places, generator)
    stored, queries = look(test, generator), look(test, generator)
    print(f"{places} places to train on, {places} others to find again, among {places} map images")

    network = Network()
    with torch.no_grad():
        rows = [network(look(train, generator))[number] for number in range(places)]
        plain = dre_fast.ResidualEncoding(DIM, CODEWORDS, normalize_rows=True)
        plain.fit(rows)

        def mean(images: Tensor) -> Tensor:
            return normalize(normalize(network(images), dim=2).mean(1), dim=1)

        def vlad(images: Tensor) -> Tensor:
            return plain(network(images)).flatten(1)  # intra- and L2-normalised: [B, K D]

        results = {"mean": recall(mean(queries), mean(stored)), "VLAD": recall(vlad(queries), vlad(stored))}

    # NetVLAD: the same call in place of a hand-written layer; codebook, assignment and network learn
    netvlad = dre_fast.ResidualEncoding(DIM, CODEWORDS, "netvlad", learnable=True, normalize_rows=True)
    netvlad.fit(rows)
    parameters = [*network.parameters(), *netvlad.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for step in range(steps):
        chosen = train[torch.randperm(places, generator=generator)[:batch]]
        anchor, positive = (netvlad(network(look(chosen, generator))).flatten(1) for _ in range(2))
        similar = anchor @ positive.T
        hardest = (similar - 2 * torch.eye(batch)).max(1).values  # the most similar other place
        loss = relu(0.2 + hardest - similar.diagonal()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1}: triplet loss {loss.item():.3f}")
    with torch.no_grad():
        views = (netvlad(network(images)).flatten(1) for images in (queries, stored))
        results["NetVLAD, trained"] = recall(*views)
    for name, value in results.items():
        print(f"recall@1 {name:<18} {value:.3f}")
    return results


if __name__ == "__main__":
    main()
