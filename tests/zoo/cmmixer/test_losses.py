import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from tests.ranks import run_ranks
from zoo.cmmixer.losses import RETRIEVAL_LOSSES, retrieval_loss, triplet_loss

REPEATED = torch.tensor([4, 1, 4, 2, 1, 6])


def towers(pairs: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video, audio = F.normalize(torch.randn(2, pairs, 5, generator=generator, dtype=torch.float64), dim=2).to(dtype)
    return video, audio


def by_loops(kind: str, video: Tensor, audio: Tensor, temperature: float, margin: float, ids: list[int]) -> float:
    pairs, items, owners = len(ids), [*video.tolist(), *audio.tolist()], ids * 2
    cosine = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in items] for x in items]
    total = 0.0
    for i in range(2 * pairs):
        partner = (i + pairs) % (2 * pairs)
        rivals = [j for j in range(2 * pairs) if owners[j] != owners[i]]
        if kind != "nt_xent":
            rivals = [j for j in rivals if (j < pairs) != (i < pairs)]
        if kind == "triplet":
            total += max(0.0, *(margin + cosine[i][j] - cosine[i][partner] for j in rivals))
        else:
            scores = [math.exp(cosine[i][j] / temperature) for j in (partner, *rivals)]
            total -= math.log(scores[0] / sum(scores))
    return total / (2 * pairs)


@pytest.mark.parametrize("ids", [list(range(6)), REPEATED.tolist()], ids=["distinct", "repeated"])
@pytest.mark.parametrize("kind", RETRIEVAL_LOSSES)
def test_each_loss_equals_its_formula_written_out_in_loops(kind: str, ids: list[int]) -> None:
    video, audio = towers()
    value = retrieval_loss(video, audio, kind, 0.3, 0.25, torch.tensor(ids)).item()
    assert value == pytest.approx(by_loops(kind, video, audio, 0.3, 0.25, ids), rel=1e-10)
    if ids == list(range(6)):
        assert value == pytest.approx(retrieval_loss(video, audio, kind, 0.3, 0.25).item(), rel=1e-12)


@pytest.mark.parametrize("pairs", [2, 5, 32])
def test_equal_vectors_have_the_loss_of_a_guess(pairs: int) -> None:
    x = towers(1)[0].expand(pairs, -1)
    assert retrieval_loss(x, x).item() == pytest.approx(math.log(2 * pairs - 1), rel=1e-9)
    assert retrieval_loss(x, x, "infonce").item() == pytest.approx(math.log(pairs), rel=1e-9)
    assert retrieval_loss(x, x, "triplet", margin=0.2).item() == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize("kind", RETRIEVAL_LOSSES)
def test_perfect_pairs_at_a_small_temperature_have_no_loss(kind: str) -> None:
    assert retrieval_loss(torch.eye(8), torch.eye(8), kind, 0.01).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", RETRIEVAL_LOSSES)
def test_swapping_the_towers_changes_nothing(kind: str) -> None:
    video, audio = towers()
    forth, back = (retrieval_loss(*pair, kind, sample_ids=REPEATED).item() for pair in ((video, audio), (audio, video)))
    assert forth == pytest.approx(back, rel=1e-12)


def test_two_pairs_have_the_values_worked_out_by_hand() -> None:
    # Cosines: v0.a0 = 0.6, v0.a1 = 0.8, v1.a0 = 0.8, v1.a1 = -0.6, v0.v1 = 0, a0.a1 = 0.
    video = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    audio = torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
    a, b, c = math.exp(0.6 / 0.5), math.exp(0.8 / 0.5), math.exp(-0.6 / 0.5)
    nt_xent = -(math.log(a / (a + b + 1)) + math.log(c / (c + b + 1))) / 2
    infonce = -(math.log(a / (a + b)) + math.log(c / (c + b))) / 2
    assert retrieval_loss(video, audio, "nt_xent", 0.5).item() == pytest.approx(nt_xent, rel=1e-10)
    assert retrieval_loss(video, audio, "infonce", 0.5).item() == pytest.approx(infonce, rel=1e-10)
    # Hinges: 0.3 + 0.8 - 0.6 and 0.3 + 0.8 + 0.6, each in both directions.
    assert triplet_loss(video, audio, 0.3).item() == pytest.approx((0.5 + 1.7) / 2, rel=1e-10)


def test_the_triplet_loss_knows_cosines_only_and_stops_at_its_margin() -> None:
    video, audio = towers()
    expected = triplet_loss(video, audio).item()
    assert triplet_loss(3 * video, 0.1 * audio).item() == pytest.approx(expected, rel=1e-10)
    assert triplet_loss(torch.eye(4), torch.eye(4), margin=1.0).item() == 0.0
    assert triplet_loss(torch.eye(4), torch.eye(4), margin=1.25).item() == pytest.approx(0.25)


@pytest.mark.parametrize("kind", RETRIEVAL_LOSSES)
def test_rows_of_one_id_only_leave_no_loss_and_a_finite_gradient(kind: str) -> None:
    video, audio = (x.requires_grad_() for x in towers())
    value = retrieval_loss(video, audio, kind, sample_ids=torch.zeros(6, dtype=torch.int64))
    value.backward()
    assert value.item() == 0.0
    assert video.grad is not None
    assert not video.grad.any()


@pytest.mark.parametrize("kind", ["nt_xent", "infonce"])
def test_a_learnable_temperature_gets_the_slope_of_the_loss(kind: str) -> None:
    video, audio = towers()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    retrieval_loss(video, audio, kind, temperature).backward()
    above, below = (retrieval_loss(video, audio, kind, 0.3 + step).item() for step in (1e-5, -1e-5))
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx((above - below) / 2e-5, rel=1e-6)


def _on_rank(rank: int, kind: str, video: Tensor, audio: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    own = slice(3 * rank, 3 * rank + 3)
    parts = video[own].clone().requires_grad_(), audio[own].clone().requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = retrieval_loss(*parts, kind, temperature, 0.6, REPEATED[own], gather_distributed=True)
    loss.backward()
    slope = torch.zeros(()) if temperature.grad is None else temperature.grad
    assert parts[0].grad is not None
    assert parts[1].grad is not None
    # DDP averages gradients over processes.
    return loss.item(), parts[0].grad / 2, parts[1].grad / 2, slope / 2


@pytest.mark.parametrize("kind", RETRIEVAL_LOSSES)
def test_two_processes_give_value_and_gradients_of_one_with_the_whole_batch(kind: str, tmp_path: Path) -> None:
    video, audio = (x.requires_grad_() for x in towers())
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = retrieval_loss(video, audio, kind, temperature, 0.6, REPEATED)
    loss.backward()
    ranks = run_ranks(tmp_path, _on_rank, kind, video.detach(), audio.detach())
    values, videos, audios, slopes = zip(*ranks, strict=True)
    assert sum(values) / 2 == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(videos), video.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat(audios), audio.grad, rtol=1e-10, atol=1e-12)
    if kind == "triplet":
        assert temperature.grad is None
        assert not any(slopes)
    else:
        torch.testing.assert_close(sum(slopes), temperature.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", RETRIEVAL_LOSSES)
def test_autocast_does_not_lower_the_precision(kind: str) -> None:
    video, audio = towers(dtype=torch.float32)
    temperature = torch.tensor(0.05)
    expected = retrieval_loss(video, audio, kind, temperature)
    with torch.autocast("cpu", torch.bfloat16):
        value = retrieval_loss(video, audio, kind, temperature)
    assert value.dtype == torch.float32
    assert value.item() == expected.item()
    half = retrieval_loss(video.bfloat16(), audio.bfloat16(), kind, temperature)
    whole = retrieval_loss(video.bfloat16().double(), audio.bfloat16().double(), kind, temperature)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("kind", RETRIEVAL_LOSSES)
def test_one_pair_is_refused_because_nothing_is_negative(kind: str) -> None:
    for gather_distributed in (False, True):
        with pytest.raises(ValueError, match="at least 2 pairs in a batch, got 1"):
            retrieval_loss(*towers(1), kind, gather_distributed=gather_distributed)


def _one_pair_each(rank: int, gather_distributed: bool) -> list[float]:
    video, audio = (x[rank : rank + 1] for x in towers(2))
    return [
        retrieval_loss(video, audio, kind, gather_distributed=gather_distributed).item() for kind in RETRIEVAL_LOSSES
    ]


def test_one_pair_a_process_is_enough_where_processes_share_their_negatives(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, _one_pair_each, True)
    for kind, *values in zip(RETRIEVAL_LOSSES, *ranks, strict=True):
        assert sum(values) / 2 == pytest.approx(retrieval_loss(*towers(2), kind).item(), rel=1e-12)


def test_one_pair_a_process_is_refused_where_processes_stay_apart(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="at least 2 pairs in a batch, got 1"):
        run_ranks(tmp_path, _one_pair_each, False)


def test_wrong_input_is_refused() -> None:
    video, audio = towers()
    with pytest.raises(ValueError, match=r"kind must be one of \['nt_xent', 'infonce', 'triplet'\], got 'clip'"):
        retrieval_loss(video, audio, "clip")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        retrieval_loss(video, audio, temperature=0.0)
    with pytest.raises(ValueError, match="margin must be at least 0, got -1"):
        triplet_loss(video, audio, -1.0)
    for kind in RETRIEVAL_LOSSES:
        with pytest.raises(ValueError, match=r"\(6, 5\) and \(4, 5\)"):
            retrieval_loss(video, audio[:4], kind)
        with pytest.raises(ValueError, match=r"sample_ids must be int64 of shape \(6,\)"):
            retrieval_loss(video, audio, kind, sample_ids=torch.zeros(6))
