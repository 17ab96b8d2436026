import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from tests.ranks import run_ranks
from zoo.common.contrastive import gather_rows, info_nce, nt_xent, nt_xent_from_similarity
from zoo.common.distributed import world_size

Loss = Callable[..., Tensor]


def views(batch: int, seed: int = 0, shape: tuple[int, ...] = (6,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, batch, *shape, generator=generator, dtype=torch.float64)
    return first, second


def brute_force_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> float:
    rows = [row.flatten().tolist() for row in (*z1, *z2)]
    total = 0.0
    for i, anchor in enumerate(rows):
        positive = (i + len(z1)) % len(rows)
        exponentials = {
            j: math.exp(sum(a * b for a, b in zip(anchor, row, strict=True)) / temperature)
            for j, row in enumerate(rows)
            if j != i
        }
        total -= math.log(exponentials[positive] / sum(exponentials.values()))
    return total / len(rows)


def brute_force_info_nce(anchors: Tensor, positives: Tensor, temperature: float) -> float:
    total = 0.0
    for i, anchor in enumerate(anchors):
        exponentials = [math.exp(float((anchor * positive).sum()) / temperature) for positive in positives]
        total -= math.log(exponentials[i] / sum(exponentials))
    return total / len(anchors)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_nt_xent_equals_the_softmax_written_out(shape: tuple[int, ...], temperature: float) -> None:
    z1, z2 = views(4, shape=shape)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(brute_force_nt_xent(z1, z2, temperature), rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_info_nce_equals_the_softmax_written_out(temperature: float) -> None:
    anchors, positives = views(5)
    forth = brute_force_info_nce(anchors, positives, temperature)
    back = brute_force_info_nce(positives, anchors, temperature)
    assert info_nce(anchors, positives, temperature).item() == pytest.approx(forth, rel=1e-10)
    both = info_nce(anchors, positives, temperature, symmetric=True).item()
    assert both == pytest.approx((forth + back) / 2, rel=1e-10)


def test_nt_xent_does_not_tell_the_views_apart() -> None:
    z1, z2 = views(5)
    assert nt_xent(z1, z2).item() == pytest.approx(nt_xent(z2, z1).item(), rel=1e-12)


@pytest.mark.parametrize(("scale", "temperature", "batch"), [(1.0, 1.0, 4), (1.5, 0.5, 3), (2.0, 2.0, 7)])
def test_nt_xent_of_equal_orthogonal_views_has_its_closed_form(scale: float, temperature: float, batch: int) -> None:
    z = scale * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:batch]
    expected = math.log1p((2 * batch - 2) * math.exp(-(scale**2) / temperature))
    assert nt_xent(z, z, temperature).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_one_sample_has_no_negatives_and_no_loss(loss: Loss) -> None:
    z1, z2 = (z.requires_grad_() for z in views(1))
    value = loss(z1, z2)
    value.backward()
    assert value.item() == 0.0
    assert z1.grad is not None
    assert not z1.grad.any()


def test_similarity_computed_elsewhere_gives_the_same_loss_and_is_left_as_it_was() -> None:
    z1, z2 = views(4)
    similarity = torch.cat([z1, z2]) @ torch.cat([z1, z2]).T / 0.7
    before = similarity.clone()
    assert nt_xent_from_similarity(similarity).item() == pytest.approx(nt_xent(z1, z2, 0.7).item(), rel=1e-12)
    assert torch.equal(similarity, before)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_autocast_does_not_lower_the_precision(loss: Loss) -> None:
    z1, z2 = (30 * z.float() for z in views(6))
    expected = loss(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(z1, z2)
    assert value.dtype == torch.float32
    assert value.item() == expected.item()


def test_bf16_similarity_is_summed_in_fp32() -> None:
    similarity = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    value = nt_xent_from_similarity(similarity)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(nt_xent_from_similarity(similarity.double()).item(), rel=1e-5)


def _loss_and_gradients(rank: int, name: str, z1: Tensor, z2: Tensor) -> tuple[float, Tensor, Tensor]:
    batch = len(z1) // 2
    own = slice(rank * batch, (rank + 1) * batch)
    first, second = z1[own].clone().requires_grad_(), z2[own].clone().requires_grad_()
    if name == "nt_xent":
        loss = nt_xent(first, second, 0.5, gather_distributed=True)
    else:
        loss = info_nce(first, second, 0.5, symmetric=name == "symmetric", gather_distributed=True)
    loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    # DDP averages gradients over processes.
    return loss.item(), first.grad / 2, second.grad / 2


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "symmetric"])
def test_two_processes_give_the_value_and_the_gradients_of_one(name: str, tmp_path: Path) -> None:
    z1, z2 = views(6, seed=2)
    first, second = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    loss = nt_xent(first, second, 0.5) if name == "nt_xent" else info_nce(first, second, 0.5, name == "symmetric")
    loss.backward()
    values, first_parts, second_parts = zip(*run_ranks(tmp_path, _loss_and_gradients, name, z1, z2), strict=True)
    assert sum(values) / 2 == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(first_parts), first.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat(second_parts), second.grad, rtol=1e-10, atol=1e-12)


def _unequal_batches(rank: int) -> None:
    nt_xent(*views(3 + rank), gather_distributed=True)


def test_unequal_batches_of_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match=r"equal batches .* \[\(3, 6\), \(4, 6\)\]"):
        run_ranks(tmp_path, _unequal_batches)


def test_without_gathering_processes_stay_apart_and_one_process_may_ask_for_it() -> None:
    z1, z2 = views(3)
    assert nt_xent(z1, z2, gather_distributed=True).item() == nt_xent(z1, z2).item()


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
def test_wrong_input_is_refused(loss: Loss) -> None:
    z1, z2 = views(3)
    with pytest.raises(ValueError, match=r"\(3, 6\) and \(2, 6\)"):
        loss(z1, z2[:2])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        loss(z1, z2, 0.0)
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        nt_xent_from_similarity(torch.zeros(5, 5))


REPEATED = torch.tensor([3, 8, 3, 5, 8, 3])


def brute_force_with_ids(name: str, z1: Tensor, z2: Tensor, temperature: float, sample_ids: Tensor) -> float:
    ids, batch = sample_ids.tolist(), len(z1)
    views, owners = [*z1, *z2], ids * 2
    similarity = [[float((a * b).sum()) / temperature for b in views] for a in views]
    total, anchors = 0.0, range(batch if name == "info_nce" else 2 * batch)
    for i in anchors:
        positive = (i + batch) % (2 * batch)
        rivals = [j for j in range(2 * batch) if owners[j] != owners[i]]
        if name != "nt_xent":
            rivals = [j for j in rivals if (j < batch) == (positive < batch)]
        total += math.log1p(sum(math.exp(similarity[i][j] - similarity[i][positive]) for j in rivals))
    return total / len(anchors)


def loss_by_name(name: str, z1: Tensor, z2: Tensor, sample_ids: Tensor | None, gather: bool = False) -> Tensor:
    if name == "nt_xent":
        return nt_xent(z1, z2, 0.5, gather, sample_ids)
    return info_nce(z1, z2, 0.5, name == "symmetric", gather, sample_ids)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "symmetric"])
def test_rows_of_one_id_are_no_negatives_of_each_other(name: str) -> None:
    z1, z2 = views(6)
    value = loss_by_name(name, z1, z2, REPEATED).item()
    assert value == pytest.approx(brute_force_with_ids(name, z1, z2, 0.5, REPEATED), rel=1e-10)
    assert value < loss_by_name(name, z1, z2, None).item()


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "symmetric"])
def test_ids_that_all_differ_change_nothing(name: str) -> None:
    z1, z2 = views(6)
    assert torch.equal(loss_by_name(name, z1, z2, torch.arange(6) * 7), loss_by_name(name, z1, z2, None))


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "symmetric"])
def test_rows_that_all_have_one_id_leave_no_loss_and_a_finite_gradient(name: str) -> None:
    z1, z2 = (z.requires_grad_() for z in views(4))
    value = loss_by_name(name, z1, z2, torch.full((4,), 9))
    value.backward()
    assert value.item() == 0.0
    assert z1.grad is not None
    assert not z1.grad.any()


def _with_ids(rank: int, name: str, z1: Tensor, z2: Tensor, sample_ids: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    own = slice(3 * rank, 3 * rank + 3)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    first, second = z1[own].clone().requires_grad_(), z2[own].clone().requires_grad_()
    scale = (temperature / 0.5) ** -0.5
    loss = loss_by_name(name, first * scale, second * scale, sample_ids[own], gather=True)
    loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    assert temperature.grad is not None
    return loss.item(), first.grad / 2, second.grad / 2, temperature.grad / 2


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "symmetric"])
def test_ids_of_two_processes_and_a_learnable_temperature_give_what_one_process_gives(
    name: str, tmp_path: Path
) -> None:
    z1, z2 = views(6, seed=3)
    first, second = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    scale = (temperature / 0.5) ** -0.5
    loss = loss_by_name(name, first * scale, second * scale, REPEATED)
    loss.backward()
    values, ones, twos, slopes = zip(*run_ranks(tmp_path, _with_ids, name, z1, z2, REPEATED), strict=True)
    assert sum(values) / 2 == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(ones), first.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat(twos), second.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(slopes), temperature.grad, rtol=1e-10, atol=1e-12)


def test_vectors_scaled_by_the_inverse_root_of_a_temperature_are_divided_by_it() -> None:
    z1, z2 = views(5)
    assert nt_xent(z1 * 0.3**-0.5, z2 * 0.3**-0.5).item() == pytest.approx(nt_xent(z1, z2, 0.3).item(), rel=1e-12)


def _gathered(rank: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
    rows = torch.arange(4.0).reshape(2, 2) + 10 * rank
    return (*gather_rows(rows, -rows, torch.tensor([rank, 7])), world_size())


def test_gathered_rows_lie_in_order_of_rank_and_name_the_own_ones(tmp_path: Path) -> None:
    for rank, (first, second, ids, own, processes) in enumerate(run_ranks(tmp_path, _gathered)):
        assert first[:, 0].tolist() == [0, 2, 10, 12]
        assert torch.equal(second, -first)
        assert ids.tolist() == [0, 7, 1, 7]
        assert own.tolist() == [2 * rank, 2 * rank + 1]
        assert processes == 2


def test_rows_of_one_process_are_handed_back_as_they_are() -> None:
    z1, z2 = views(3)
    rows = gather_rows(z1, z2)
    assert rows.first is z1
    assert rows.second is z2
    assert rows.sample_ids is None
    assert rows.own.tolist() == [0, 1, 2]
    assert world_size() == 1


def _ids_on_one_process(rank: int) -> None:
    nt_xent(*views(3), gather_distributed=True, sample_ids=torch.arange(3) if rank else None)


def test_ids_on_one_process_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match=r"on all processes or on none, got \[False, True\]"):
        run_ranks(tmp_path, _ids_on_one_process)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
@pytest.mark.parametrize(
    "ids", [torch.arange(2), torch.arange(3.0), torch.arange(3)[:, None]], ids=["short", "float", "column"]
)
def test_ids_that_do_not_fit_the_rows_are_refused(loss: Loss, ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"sample_ids must be int64 of shape \(3,\)"):
        loss(*views(3), sample_ids=ids)
