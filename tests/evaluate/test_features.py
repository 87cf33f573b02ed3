"""Feature extractors: what they refuse."""

import pickle
from pathlib import Path

import pytest
import torch

from trce_cli.errors import BadInput
from trce_cli.evaluate.features import InceptionFeatures


def test_inception_needs_its_package_or_its_weights(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    weights = tmp_path / "inception.pth"
    weights.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BadInput) as caught:
        InceptionFeatures(weights, torch.device("cpu"))
    assert not (tmp_path / "sprung").exists()
    assert "torch-fidelity" in f"{caught.value.message} {caught.value.hint}"
