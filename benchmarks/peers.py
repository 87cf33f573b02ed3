"""Other closed-form erasers as baselines, written from their papers: UCE, RECE, and SPEED's null space.

Each of them right-multiplies every key and value projection W by one matrix, W' = W M, so each is a map of
text embeddings, and is written, applied and measured as our own is. Embeddings are rows, float64,
(concepts, dim); `preserved` is the sum of p p^T over the embeddings that shall stay, (dim, dim), for SPEED
their mean over captions.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.home import home_of
from trce_cli.edits.edit import Made
from trce_cli.edits.map import Map
from trce_cli.erase.moments import second_moments
from trce_cli.erase.targets import embed_pairs
from trce_cli.maths.linear_map import LinearMap
from trce_cli.prompts.pairs import PromptPair
from trce_cli.prompts.presets import Preset
from trce_cli.prompts.suites import parts

# UCE's: how much preserving counts, and staying near the old weights; lambda_1 and lambda_2 in RECE's eq. 3.
PRESERVE, NEAR = 0.1, 0.1
# RECE's own: lambda and rounds as its authors give them for objects that UCE finds hard to erase.
DERIVE, ROUNDS = 1e-3, 1
# SPEED: directions in which the preserved captions have less than this on average are their null space. On
# their sum it would mean less the longer the list is. Whether its authors scale it so could not be found out.
NULL = 0.05
LISTED = 300  # captions of the prior that stand in the preserve list


def uce(unsafe: Tensor, safe: Tensor, preserved: Tensor) -> Tensor:
    """Unified Concept Editing (Gandikota et al., WACV 2024, eq. 7, arXiv 2308.14761); M, (dim, dim).

    The minimiser of sum |W' o - W n|^2 + lambda_1 sum |W' p - W p|^2 + lambda_2 |W' - W|^2.
    """
    stay = PRESERVE * preserved + NEAR * torch.eye(len(preserved), dtype=preserved.dtype)
    return torch.linalg.solve(unsafe.T @ unsafe + stay, unsafe.T @ safe + stay).T


def rece(unsafe: Tensor, safe: Tensor, preserved: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024, arXiv 2407.12383); M, (dim, dim).

    After UCE, by turns: the embeddings c' that bring back in the edited weights what o was in the old ones,
    the minimisers of sum_W |W' c' - W o|^2 + lambda |c'|^2, and UCE's edit of these. weights: W, (out, dim).
    """
    gram = sum((W.T @ W for W in weights), torch.zeros_like(preserved))
    identity = torch.eye(len(preserved), dtype=preserved.dtype)
    M = uce(unsafe, safe, preserved)
    for _ in range(ROUNDS):
        derived = torch.linalg.solve(DERIVE * identity + M.T @ gram @ M, M.T @ gram @ unsafe.T).T
        M = M @ uce(derived, safe, preserved)
    return M


def speed(unsafe: Tensor, safe: Tensor, preserved: Tensor, invariants: Tensor) -> Tensor:
    """SPEED's closed form (Li et al., 2025, arXiv 2503.07392); M, (dim, dim).

    The minimiser of sum |W' o - W n|^2 + |W' - W|^2 among the W' that differ from W in the null space of the
    preserved embeddings alone, with W' c = W c for the invariants c, (invariants, dim): start of text, and
    the empty prompt. Which embeddings to preserve is taken as given: its filtering and augmentation of them
    are left out.
    """
    energies, directions = torch.linalg.eigh(preserved)
    free = directions[:, energies < NULL]
    P = free @ free.T
    identity = torch.eye(len(P), dtype=P.dtype)
    N = torch.linalg.inv(unsafe.T @ unsafe @ P + identity)
    C = invariants.T
    Q = identity - N @ C @ torch.linalg.pinv(C.T @ P @ N @ C) @ C.T @ P
    return identity + (safe - unsafe).T @ unsafe @ P @ Q @ N


def write_peer(name: str, checkpoint: Checkpoint, presets: Sequence[Preset], path: Path) -> None:
    """Solve for a checkpoint's first stream and write the map; name: `uce`, `rece` or `speed`."""
    family = checkpoint.family
    text, stream = family.text(checkpoint, "cpu", torch.float32), family.streams[0]
    concepts = [concept for part in parts(presets) for concept in part.concepts]
    # A concept is embedded at its last word and from the end of text on, which is all that says what it is.
    weights = {slot: float(slot != "SOT") for slot in family.slots}
    pairs = [PromptPair(each.unsafe, each.safe, each.unsafe) for each in concepts]
    targets = embed_pairs(text, pairs, [weights]).targets(weights)[stream]
    unsafe, safe = (targets.embeddings[rows].double() for rows in (targets.unsafe, targets.safe))
    listed = home_of(checkpoint).captions()[:LISTED]
    preserved = len(listed) * second_moments(text, listed)[stream]
    match name:
        case "uce":
            M = uce(unsafe, safe, preserved)
        case "rece":
            doors = checkpoint.door_weights()[stream]
            M = rece(unsafe, safe, preserved, [checkpoint.read("denoiser", key).double() for key in doors])
        case "speed":
            M = speed(unsafe, safe, preserved / len(listed), _invariants(checkpoint))
        case _:
            raise ValueError(f"no such eraser: {name}")
    made = Made(family, checkpoint.text_encoder_hash())
    Map(made, {stream: LinearMap.of(M - torch.eye(len(M), dtype=M.dtype))}).save(path, force=True)


def _invariants(checkpoint: Checkpoint) -> Tensor:
    """The embeddings of the empty prompt: start and end of text, (2, dim)."""
    family = checkpoint.family
    text, stream = family.text(checkpoint, "cpu", torch.float32), family.streams[0]
    wanted = {each: {"": [0, 1]} if each == stream else {} for each in text.streams}
    found = [batch[stream].embeddings[list(batch[stream].rows[""])] for batch in text.states(wanted)]
    return torch.cat(found).double()
