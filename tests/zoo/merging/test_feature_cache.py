"""Caches of features and of deep targets: one look at each image, nothing stale, the same in several processes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from zoo.merging.deep_surgery import DeepSurgery
from zoo.merging.feature_cache import FeatureCache, TargetCache, check_finite, feature_pair, fingerprint_of
from zoo.merging.heads import CosineHead
from zoo.merging.surgery import SurgeryBank, surgery_loss

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TASKS = ["mnist", "a/b.c"]


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor | None
    rows: Tensor
    task: str


class Net(nn.Module):
    """Counts the images that it sees, and its calls."""

    def __init__(self, seed: int, dim: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.dropout, self.norm, self.out = nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, dim)
        self.seen = self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.calls += 1
        for block in self.blocks:
            x = torch.tanh(block(x))
        features: Tensor = self.out(self.norm(self.dropout(x)))
        return features


MERGED, EXPERTS = Net(0), {"mnist": Net(1), "a/b.c": Net(2)}


def images(task: str, count: int = 50) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(TASKS.index(task)))


def batches(task: str, rows: list[list[int]]) -> list[Batch]:
    pool = images(task)
    return [Batch(pool[index], torch.zeros(len(index)), torch.tensor(index), task) for index in rows]


def expected(task: str, rows: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    models = copy.deepcopy((MERGED, EXPERTS[task]))
    with torch.no_grad():
        z, z_ind = (model.eval()(images(task)[rows]) for model in models)
    return z, z_ind


def lent(task: str) -> Net:
    return copy.deepcopy(EXPERTS[task])


def built(**options: Any) -> FeatureCache:
    cache = FeatureCache(**options)
    cache.build(MERGED, lent, {task: batches(task, [[7, 3, 30], [1, 49]]) for task in TASKS})
    return cache


def test_features_of_any_rows_come_in_the_order_asked_for() -> None:
    cache = built()
    assert cache.task_names == TASKS and cache.rows("mnist").tolist() == [1, 3, 7, 30, 49]
    for task in TASKS:
        for rows in ([49, 3], [3, 3, 7, 1, 3], [30]):
            found = cache.gather(task, torch.tensor(rows))
            torch.testing.assert_close(found, expected(task, rows))
        torch.testing.assert_close(cache.gather(task), expected(task, cache.rows(task)))
        assert cache.gather(task, torch.tensor([], dtype=torch.int64))[0].shape == (0, 4)


def test_each_image_is_computed_once() -> None:
    merged, experts = copy.deepcopy(MERGED), {task: lent(task) for task in TASKS}
    merged.seen = merged.calls = 0
    cache = FeatureCache()
    given = {
        "mnist": batches("mnist", [[5, 6, 5], [6, 5], [7, 5, 8, 7], [8]]),
        "a/b.c": iter(batches("a/b.c", [[5]])),
    }
    cache.build(merged, experts.__getitem__, given)
    assert merged.seen == 5 and merged.calls == 3 and experts["mnist"].seen == 4 + EXPERTS["mnist"].seen
    torch.testing.assert_close(cache.gather("mnist", torch.tensor([8, 7, 6, 5])), expected("mnist", [8, 7, 6, 5]))


def test_batches_of_other_kinds_are_cut_to_new_images_too() -> None:
    cache, pool = FeatureCache(), images("mnist")
    given = [{"pixel_values": pool[index], "rows": torch.tensor(index)} for index in ([2, 4], [4, 9])]
    cache.build(MERGED, lent, {"mnist": given}, feature_fn=lambda model, batch: model(batch["pixel_values"]))
    torch.testing.assert_close(cache.gather("mnist", torch.tensor([9, 2])), expected("mnist", [9, 2]))


def test_networks_run_in_evaluation_mode_and_get_their_modes_back() -> None:
    merged, expert = copy.deepcopy(MERGED).train(), lent("mnist").train()
    merged.norm.eval()
    before = copy.deepcopy((merged.state_dict(), expert.state_dict()))
    cache = FeatureCache()
    cache.build(merged, lambda task: expert, {"mnist": batches("mnist", [[7, 3]])})
    torch.testing.assert_close(cache.gather("mnist", torch.tensor([7, 3])), expected("mnist", [7, 3]))
    assert expert.training and merged.training and merged.dropout.training and not merged.norm.training
    for model, state in zip((merged, expert), before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_one_expert_is_alive_at_a_time_even_one_in_a_cycle() -> None:
    alive: list[weakref.ref[nn.Module]] = []
    gc.collect()

    def fresh(task: str) -> nn.Module:
        assert not any(reference() for reference in alive)
        expert = lent(task)
        expert.__dict__["myself"] = expert
        alive.append(weakref.ref(expert))
        return expert

    cache = FeatureCache()
    given = {task: batches(task, [[1, 2]]) for task in TASKS}
    cache.build(MERGED, fresh, given)
    assert len(alive) == 2 and not any(reference() for reference in alive)
    deep = DeepSurgery(TASKS, [6, 6], 4, 2)
    TargetCache().build(deep, fresh, given)
    assert len(alive) == 4 and not any(reference() for reference in alive)


def test_stored_halves_come_back_as_float32() -> None:
    cache = built(dtype=torch.float16)
    found = cache.gather("mnist", torch.tensor([7, 3]))
    assert {value.dtype for value in found} == {torch.float32}
    for value, exact in zip(found, expected("mnist", [7, 3]), strict=True):
        assert torch.equal(value, exact.half().float()) and not torch.equal(value, exact)


def test_a_cache_moves_to_a_device_and_answers_on_that_of_the_rows() -> None:
    cache = built()
    cache.to("meta")
    assert cache.rows("mnist").is_meta and all(value.is_meta for value in cache.gather("mnist"))


def test_experts_and_batches_go_to_the_device_and_an_owned_expert_comes_back() -> None:
    expert, seen = lent("mnist"), []

    def look(model: Any, batch: Batch) -> Tensor:
        seen.append((expert.out.weight.device.type, batch.images.device.type, batch.task))
        return torch.zeros(len(batch.images), 4)

    # Tensors without values stand for those on another device; modules cannot leave it.
    moves: list[str] = []
    expert.to = lambda device: moves.append(torch.device(device).type)  # type: ignore[method-assign, assignment]
    cache = FeatureCache()
    cache.build(MERGED, lambda task: expert, {"mnist": batches("mnist", [[1]])}, feature_fn=look, device="meta")
    assert seen == [("cpu", "meta", "mnist")] * 2
    assert moves == ["meta", "cpu"]
    assert cache.gather("mnist")[0].device.type == "cpu"


def prints(**changes: str) -> dict[str, str]:
    return {task: fingerprint_of(changes.get(task, "same"), task) for task in TASKS}


def test_files_are_used_only_for_the_same_fingerprint_dtype_function_and_rows(tmp_path: Path) -> None:
    asked: list[str] = []

    def asking(task: str) -> Net:
        asked.append(task)
        return lent(task)

    def own(model: Any, batch: Batch) -> Tensor:
        features: Tensor = model(batch.images)
        return features

    def build(index: list[list[int]] | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> list[str]:
        asked.clear()
        cache = FeatureCache(tmp_path, dtype)
        given = {task: batches(task, index or [[7, 3], [1]]) for task in TASKS}
        computed = cache.build(MERGED, asking, given, **options)
        assert computed == asked
        for task in TASKS:
            for found, exact in zip(cache.gather(task), expected(task, cache.rows(task)), strict=True):
                torch.testing.assert_close(found, exact.to(dtype).float())
        return computed

    assert build(fingerprints=prints()) == TASKS
    assert build(fingerprints=prints()) == []
    assert len(list(tmp_path.iterdir())) == 2 and all(path.is_file() for path in tmp_path.iterdir())
    assert build(fingerprints=prints(mnist="other weights")) == ["mnist"]
    assert build(fingerprints=prints()) == ["mnist"]
    wanted = {task: torch.tensor([1, 3]) for task in TASKS}
    assert build(fingerprints=prints(), rows=wanted) == []
    wanted["mnist"] = torch.tensor([1, 4])
    assert build([[1, 4]], fingerprints=prints(), rows=wanted) == ["mnist"]
    assert build(fingerprints=prints(), feature_fn=own) == TASKS
    assert build(fingerprints=prints(), feature_fn=own, dtype=torch.float16) == TASKS
    assert build(fingerprints=prints(), feature_fn=own, dtype=torch.float16) == []
    with pytest.raises(ValueError, match=r"needs fingerprints= of each task; there is none of \['mnist'\]"):
        build(fingerprints={**prints(), "mnist": ""})


def test_a_damaged_file_is_made_anew_with_a_warning(tmp_path: Path) -> None:
    given = {"mnist": batches("mnist", [[7, 3]])}
    FeatureCache(tmp_path).build(MERGED, lent, given, fingerprints=prints())
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for damaged in (content[:-5], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        cache = FeatureCache(tmp_path)
        with pytest.warns(UserWarning, match=r"features-mnist.safetensors is damaged and is made anew"):
            assert cache.build(MERGED, lent, given, fingerprints=prints()) == ["mnist"]
        torch.testing.assert_close(cache.gather("mnist", torch.tensor([7, 3])), expected("mnist", [7, 3]))
        assert path.read_bytes() == content


def test_a_failed_build_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no batch of task 'mnist'"):
        FeatureCache(tmp_path).build(MERGED, lent, {"mnist": []}, fingerprints=prints())
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_tell_names_types_shapes_values_and_texts_apart() -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    base = fingerprint_of(state, "mnist test")
    assert len(base) == 64
    assert base == fingerprint_of(dict(reversed(state.items())), "mnist test")
    assert base == fingerprint_of({**state, "b": torch.ones(3, 2).T}, "mnist test")
    others = [
        fingerprint_of({**state, "b": state["b"].T.contiguous()}, "mnist test"),
        fingerprint_of({**state, "b": state["b"].double()}, "mnist test"),
        fingerprint_of({**state, "a": state["a"] + torch.tensor([0, 0, 0, 1e-6])}, "mnist test"),
        fingerprint_of({"a": state["a"], "c": state["b"]}, "mnist test"),
        fingerprint_of({"a": state["b"], "b": state["a"]}, "mnist test"),
        fingerprint_of(state, "mnist tests"),
        fingerprint_of(state, "mnist", " test"),
        fingerprint_of("mnist test", state),
        fingerprint_of(state, state, "mnist test"),
        fingerprint_of(state),
        fingerprint_of("a", "b"),
        fingerprint_of("atextb"),
        fingerprint_of({"a": state["a"]}, {"b": state["b"]}),
        fingerprint_of({"a": torch.zeros(2)}),
        fingerprint_of({"a": torch.zeros(2, dtype=torch.int32)}),
    ]
    assert len({base, *others}) == len(others) + 1
    odd = {
        "empty": torch.zeros(0),
        "scalar": torch.tensor(3),
        "flag": torch.tensor([True]),
        "b": torch.ones(2).bfloat16(),
    }
    assert fingerprint_of(odd) == fingerprint_of(copy.deepcopy(odd))
    with pytest.raises(ValueError, match="no tensors to take a fingerprint of"):
        fingerprint_of({})


@pytest.mark.parametrize(("side", "value"), [("merged encoder", torch.nan), ("expert", -torch.inf)])
def test_features_that_are_not_finite_name_the_task_and_the_batch(side: str, value: float) -> None:
    def broken(model: Any, batch: Batch) -> Tensor:
        features: Tensor = model(batch.images)
        if (model is MERGED) == (side == "merged encoder"):
            features[batch.rows == 3, 2] = value
        return features

    given = {"mnist": batches("mnist", [[1, 2], [3, 4]])}
    with pytest.raises(ValueError, match=f"task 'mnist', batch 1: features of the {side} hold NaN or infinity in 1 of"):
        FeatureCache().build(MERGED, lent, given, feature_fn=broken)
    with pytest.raises(ValueError, match="here: these hold NaN"):
        check_finite(torch.tensor([[value]]), "these", "here")


def test_features_too_large_for_halves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'mnist', batch 0: values up to .*e\+0.* do not fit in torch.float16; use"):
        FeatureCache(dtype=torch.float16).build(
            MERGED, lent, {"mnist": batches("mnist", [[1]])}, feature_fn=lambda model, batch: 1e6 * model(batch.images)
        )


def test_features_of_other_shapes_name_both_and_the_task() -> None:
    given = {"mnist": batches("mnist", [[1, 2]])}
    with pytest.raises(ValueError, match=r"'mnist', batch 0: .*shape \(2, 4\), of the expert \(2, 5\).*feature_fn"):
        FeatureCache().build(MERGED, lambda task: Net(1, 5), given)
    with pytest.raises(ValueError, match=r"shape \(2,\), of the expert \(2,\); both must be \(batch, dim\)"):
        feature_pair(MERGED, lent("mnist"), given["mnist"][0], "here", lambda model, batch: model(batch.images)[:, 0])
    with pytest.raises(ValueError, match=r"batch 0: values of shape \(1, 4\) for 2 images; the shape must be \(2, 4\)"):
        FeatureCache().build(MERGED, lent, given, feature_fn=lambda model, batch: model(batch.images)[:1])
    ragged = {"mnist": batches("mnist", [[1, 2], [3]])}
    with pytest.raises(ValueError, match=r"batch 1: values of shape \(1, 1, 4\) .* must be \(1, 2, 4\), as in the bat"):
        FeatureCache().build(
            MERGED, lent, ragged, feature_fn=lambda model, batch: model(batch.images).repeat(len(batch.rows), 1, 1)
        )


@pytest.mark.parametrize("rows", [None, torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)])
def test_batches_without_rows_are_refused(rows: Tensor | None) -> None:
    given: dict[str, Any] = {"mnist": [{"images": images("mnist")[:2], "rows": rows}]}
    with pytest.raises(ValueError, match=r"task 'mnist', batch 0: a batch must have a field 'rows'.*this dict has"):
        FeatureCache().build(MERGED, lent, given)


def test_rows_and_tasks_that_are_not_there_are_refused() -> None:
    cache = built()
    for rows in ([7, 2], [50], [-1]):
        with pytest.raises(ValueError, match=rf"no row \[{rows[-1]}\] of task 'mnist', of which it has 5"):
            cache.gather("mnist", torch.tensor(rows))
    with pytest.raises(ValueError, match=r"no task 'dtd'; it has \['mnist', 'a/b.c'\]"):
        cache.gather("dtd")
    with pytest.raises(ValueError, match=r"dtype of a cache must be one of .*got torch.bfloat16"):
        FeatureCache(dtype=torch.bfloat16)


def test_targets_of_deep_surgery_are_those_of_the_expert(tmp_path: Path) -> None:
    deep = DeepSurgery(TASKS, [6, 6], 4, 2)
    given = {task: batches(task, [[7, 3, 30], [1, 49]]) for task in TASKS}
    cache = TargetCache(tmp_path)
    assert cache.build(deep, lent, given, fingerprints=prints()) == TASKS
    rows = torch.tensor([30, 1, 1])
    wanted = deep.targets(lent("mnist").eval(), images("mnist")[rows])
    found = cache.gather("mnist", rows)
    torch.testing.assert_close(found, wanted)
    assert [tuple(value.shape) for value in found] == [(3, 6), (3, 6), (3, 4)]
    assert cache.build(deep, lent, given, fingerprints=prints()) == []
    assert FeatureCache(tmp_path).build(MERGED, lent, given, fingerprints=prints()) == TASKS
    assert cache.build(deep, lent, given, fingerprints=prints()) == []
    other = DeepSurgery(TASKS, [6], 4, 2)
    assert cache.build(other, lent, given, blocks=["blocks.1"], fingerprints=prints()) == TASKS
    torch.testing.assert_close(cache.gather("mnist", rows), wanted[1:])
    assert cache.build(other, lent, given, blocks=["blocks.0"], fingerprints=prints()) == TASKS
    torch.testing.assert_close(cache.gather("mnist", rows), (wanted[0], wanted[2]))


def test_targets_that_do_not_fit_or_are_broken_name_the_task_and_the_batch() -> None:
    deep, given = DeepSurgery(TASKS, [6, 6], 5, 2), {"mnist": batches("mnist", [[1, 2]])}
    with pytest.raises(ValueError, match=r"task 'mnist', batch 0: final features: the expert has 4 channels.* 5; give"):
        TargetCache().build(deep, lent, given)
    expert = lent("mnist")
    nn.init.constant_(expert.blocks[1].bias, torch.nan)
    with pytest.raises(ValueError, match="task 'mnist', batch 0: block 1 hold NaN"):
        TargetCache().build(DeepSurgery(TASKS, [6, 6], 4, 2), lambda task: expert, given)


def stream(steps: int = 60) -> Iterator[dict[str, Batch]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield {task: batches(task, [torch.randperm(50, generator=generator)[:8].tolist()])[0] for task in TASKS}


def test_training_on_stored_features_equals_training_on_images_and_changes_nothing_else() -> None:
    frozen = [copy.deepcopy(MERGED).eval(), *(lent(task).eval() for task in TASKS)]
    heads = [CosineHead(torch.randn(3, 4)), CosineHead(torch.randn(5, 4))]
    before = [fingerprint_of(model.state_dict()) for model in (*frozen, *heads)]
    experts = dict(zip(TASKS, frozen[1:], strict=True))
    cache = FeatureCache()
    cache.build(frozen[0], experts.__getitem__, {t: batches(t, [list(range(30)), list(range(30, 50))]) for t in TASKS})
    banks = [SurgeryBank(TASKS, 4, 2)]
    banks.append(copy.deepcopy(banks[0]))
    for stored, bank in zip((False, True), banks, strict=True):
        optimizer = torch.optim.Adam(bank.parameters(), lr=1e-2)
        for given in stream():
            losses = []
            for task, batch in given.items():
                pair = cache.gather(task, batch.rows) if stored else feature_pair(frozen[0], experts[task], batch, "")
                losses.append(surgery_loss(bank(pair[0], task), pair[1]))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
    for one, other in zip(*(bank.parameters() for bank in banks), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    z, z_ind = cache.gather("mnist")
    assert surgery_loss(banks[1](z, "mnist"), z_ind) < 0.9 * surgery_loss(z, z_ind)
    assert [fingerprint_of(model.state_dict()) for model in (*frozen, *heads)] == before
    assert all(parameter.grad is None for model in (*frozen, *heads) for parameter in model.parameters())


def _build_in_parts(rank: int, folder: str, sharded: bool) -> list[Any]:
    index = [[7, 3], [1, 49], [3, 20], [5]]
    own = index[rank::2] if sharded else index
    given = {"mnist": batches("mnist", own), "a/b.c": batches("a/b.c", own[:1] if rank == 0 or not sharded else [])}
    found: list[Any] = []
    for _ in range(2):
        merged = copy.deepcopy(MERGED)
        merged.seen = 0
        cache = FeatureCache(f"{folder}/{rank}")
        computed = cache.build(merged, lent, given, fingerprints=prints(), sharded=sharded)
        found += [computed, merged.seen, *[[cache.rows(task), *cache.gather(task)] for task in TASKS]]
    return found


@pytest.mark.parametrize("sharded", [False, True])
def test_processes_share_the_work_and_all_hold_the_whole(tmp_path: Path, sharded: bool) -> None:
    for path in ("0", "1"):
        (tmp_path / path).mkdir()
    results = run_ranks(tmp_path, _build_in_parts, str(tmp_path), sharded)
    for rank, result in enumerate(results):
        for computed, seen, mnist, other in (result[:4], result[4:]):
            # Only the first process writes: the second finds no file, and so both compute again.
            assert computed == TASKS
            assert seen == ([2 + 1 + 2, 2 + 1] if not sharded else [2 + 2 + 2 - 1, 2 + 1])[rank]
            assert mnist[0].tolist() == [1, 3, 5, 7, 20, 49] and other[0].tolist() == [3, 7]
            torch.testing.assert_close(tuple(mnist[1:]), expected("mnist", mnist[0]))
            torch.testing.assert_close(tuple(other[1:]), expected("a/b.c", other[0]))
    assert [len(list((tmp_path / path).iterdir())) for path in ("0", "1")] == [2, 0]


def _build_from_one_folder(rank: int, folder: str) -> list[list[str]]:
    given = {task: batches(task, [[7, 3], [1]]) for task in TASKS}
    found = []
    for change in ("same", "same", "other"):
        cache = FeatureCache(folder)
        found.append(cache.build(MERGED, lent, given, fingerprints=prints(mnist=change)))
        torch.distributed.barrier()
    return found


def test_processes_read_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert run_ranks(tmp_path, _build_from_one_folder, str(folder)) == [[TASKS, [], ["mnist"]]] * 2


def _fail_on_one(rank: int) -> str:
    def broken(model: Any, batch: Batch) -> Tensor:
        features: Tensor = model(batch.images)
        return features * torch.nan if rank == 1 else features

    try:
        FeatureCache().build(MERGED, lent, {"mnist": batches("mnist", [[1], [2]])}, feature_fn=broken)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, _fail_on_one)
    assert second.startswith("ValueError: task 'mnist', batch 1: features of the merged encoder hold NaN")
    assert first == f"RuntimeError: process 1 failed: {second}"
