"""Model, data, training and testing: nothing in this file knows of federated learning."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small convolutional network with BatchNorm, whose buffers travel with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify images of shape (N, 1, 8, 8)."""
        return self.head(self.features(images).flatten(1))


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return this site's share of the digits: four fifths to train on, one fifth to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images[partition_id::num_partitions], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target[partition_id::num_partitions])
    held_out = torch.arange(len(labels)) % 5 == 0
    return (
        DataLoader(TensorDataset(images[~held_out], labels[~held_out]), batch_size=batch_size, shuffle=True),
        DataLoader(TensorDataset(images[held_out], labels[held_out]), batch_size=batch_size),
    )


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    """Train ``net`` in place; return the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(loader)


def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Return loss and accuracy."""
    net.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            logits = net(images)
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)


def save(state: dict[str, torch.Tensor], path: str) -> None:
    """Write a trained model to disk."""
    torch.save(state, path)
