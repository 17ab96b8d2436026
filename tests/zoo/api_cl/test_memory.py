"""The memory keeps the same number of rows of each task and class, chosen uniformly, with their own responses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from zoo.api_cl.memory import ReplayMemory


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def candidates(n, classes=2, start=0, weights=None):
    """Images whose pixels hold their own number, and responses that follow from it; numbers up to 2048 are exact."""
    numbers = torch.arange(start, start + n)
    images = (numbers / 2048).view(-1, 1, 1, 1).expand(n, 1, 4, 4).clone()
    winner = numbers % classes if weights is None else torch.multinomial(torch.tensor(weights), n, True)
    responses = torch.full((n, classes), 0.1 / max(classes - 1, 1))
    responses[torch.arange(n), winner] = 0.9 - numbers / 1e5
    return images, responses


def numbers_of(images):
    return (images[:, 0, 0, 0].double() * 2048).round().long()


def rows_of(memory, task, real=False):
    """All stored rows of a closed task."""
    found = [rows for rows in memory.sample(memory.size * 2, seeded(), real) if rows.task == task]
    if not found:
        return None
    rows = found[0]
    once = torch.tensor(
        [
            position
            for position, number in enumerate(numbers_of(rows.images).tolist())
            if number not in numbers_of(rows.images)[:position].tolist()
        ]
    )
    return rows._replace(**{name: getattr(rows, name)[once] for name in ("images", "responses", "labels")})


def test_all_tasks_have_the_same_share_after_every_task_and_classes_are_balanced():
    memory = ReplayMemory(100)
    for task in range(4):
        for batch in range(8):
            memory.offer(*candidates(40, 3, start=40 * batch), task, seeded(100 * task + batch))
        memory.close_task(task)
        assert memory.tasks == list(range(task + 1))
        assert [memory.count(own, False) for own in memory.tasks] == [100 // (task + 1)] * (task + 1)
        assert len(memory) == sum(memory.count(own, False) for own in memory.tasks)
        for own in memory.tasks:
            counts = rows_of(memory, own).responses.argmax(1).bincount(minlength=3)
            assert counts.amax() - counts.amin() <= 1 and counts.sum() == 100 // (task + 1)


def test_an_image_keeps_the_response_that_it_was_offered_with():
    memory = ReplayMemory(30)
    images, responses = candidates(600, 3)
    for start in range(0, 600, 50):
        memory.offer(images[start : start + 50], responses[start : start + 50], 0, seeded(start))
    kept = images.clone(), responses.clone()
    images.zero_(), responses.zero_()
    memory.close_task(0)
    memory.offer(*candidates(600, 5), 1, seeded(1))
    memory.close_task(1)
    rows = rows_of(memory, 0)
    assert len(rows.images) == 15 and rows.images.dtype == rows.responses.dtype == torch.float32 and not rows.real
    assert torch.equal(rows.images, kept[0][numbers_of(rows.images)])
    assert torch.equal(rows.responses, kept[1][numbers_of(rows.images)])
    assert rows.labels.tolist() == [-1] * 15 and rows_of(memory, 1).responses.shape == (15, 5)


def in_turn(groups, priorities, capacity, balanced):
    """Reference in plain Python: class by class, one row each in turn, the lowest priority of a round first."""
    waiting = {}
    for number in sorted(range(len(groups)), key=lambda number: priorities[number]):
        waiting.setdefault(groups[number] if balanced else 0, []).append(number)
    kept = []
    while len(kept) < capacity and any(waiting.values()):
        round_ = sorted((own.pop(0) for own in waiting.values() if own), key=lambda number: priorities[number])
        kept += round_[: capacity - len(kept)]
    return sorted(kept)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("capacity", [1, 7, 64, 300])
def test_what_is_kept_is_the_choice_of_a_loop_over_all_candidates_at_once(balanced, capacity):
    torch.manual_seed(capacity)
    images, responses = candidates(250, 4, weights=[0.7, 0.2, 0.08, 0.02])
    memory = ReplayMemory(capacity, balanced)
    generator = seeded(3)
    for start, end in ((0, 1), (1, 60), (60, 61), (61, 180), (180, 250)):
        memory.offer(images[start:end], responses[start:end], 0, generator)
    memory.close_task(0)
    generator = seeded(3)
    sizes = (1, 59, 1, 119, 70)
    priorities = torch.cat([torch.rand(n, dtype=torch.float64, generator=generator) for n in sizes]).tolist()
    expected = in_turn(responses.argmax(1).tolist(), priorities, capacity, balanced)
    assert sorted(numbers_of(memory.export()["task_0.synthetic.images"]).tolist()) == expected
    # A later cut is the same as a smaller memory from the start.
    if capacity > 1:
        memory.close_task(1)
        expected = in_turn(responses.argmax(1).tolist(), priorities, min(capacity // 2, 250), balanced)
        assert sorted(numbers_of(memory.export()["task_0.synthetic.images"]).tolist()) == expected


@pytest.mark.parametrize("balanced", [True, False])
def test_early_and_late_candidates_have_the_same_chance(balanced):
    memory = ReplayMemory(1000, balanced)
    generator = seeded(7)
    for batch in range(20):
        images, responses = candidates(100, 2)
        memory.offer(torch.full_like(images, batch / 32), responses, 0, generator)
    memory.close_task(0)
    memory.close_task(1)
    batches = (memory.export()["task_0.synthetic.images"][:, 0, 0, 0].float() * 32).long().bincount(minlength=20)
    assert batches.sum() == 500
    # 25 expected of each of 20 batches: the 99.9 % point of chi-square with 19 degrees of freedom is 43.8.
    assert ((batches - 25) ** 2 / 25).sum() < 43.8


def test_a_rare_class_is_kept_whole_and_the_others_share_the_rest():
    memory = ReplayMemory(20)
    images, responses = candidates(300, 3)
    few = responses.argmax(1) != 2
    few[[2, 5, 8]] = True
    memory.offer(images[few], responses[few], 0, seeded())
    memory.close_task(0)
    counts = rows_of(memory, 0).responses.argmax(1).bincount()
    assert sorted(counts.tolist()) == [3, 8, 9] and counts[2] == 3
    plain = ReplayMemory(20, balanced=False)
    plain.offer(images, (responses * torch.tensor([1.0, 0, 0])), 0, seeded())
    plain.close_task(0)
    assert len(plain) == 20


def test_real_images_take_at_most_their_share_and_are_balanced_over_their_labels():
    memory = ReplayMemory(40, balanced=False, max_real_share=0.25)
    for task in range(3):
        images, responses = candidates(200, 4)
        labels = torch.where(torch.arange(200) < 180, 4 * task, 4 * task + 3)
        memory.offer(images, responses, task, seeded(task))
        for part in (slice(0, 90), slice(90, 200)):
            memory.add_real(images[part], labels[part], task, seeded(10 + task), responses[part])
        memory.close_task(task)
        quota = 40 // (task + 1)
        for own in memory.tasks:
            real = rows_of(memory, own, real=True)
            assert real.real and len(real.images) == memory.count(own, True) == int(quota / 4)
            assert memory.count(own, False) == quota - int(quota / 4)
            counts = real.labels.bincount()
            counts = counts[counts > 0]
            assert len(counts) == 2 and counts.amax() - counts.amin() <= 1
            numbers = numbers_of(real.images)
            assert torch.equal(real.labels, torch.where(numbers < 180, 4 * own, 4 * own + 3))
            assert torch.equal(real.responses, candidates(200, 4)[1][numbers])
    assert len(memory) <= 40


def test_real_images_may_take_all_and_need_no_responses():
    memory = ReplayMemory(12, max_real_share=1.0)
    for task in range(2):
        memory.add_real(candidates(50)[0], torch.arange(50) % 2 + 2 * task, task, seeded(task))
        memory.close_task(task)
    assert [memory.count(task, True) for task in range(2)] == [6, 6] and not memory.sample(5)
    rows = rows_of(memory, 1, real=True)
    assert rows.responses.shape == (6, 0) and rows.labels.bincount().tolist() == [0, 0, 3, 3]


def test_where_real_images_are_few_synthetic_ones_fill_the_share():
    memory = ReplayMemory(20)
    memory.offer(*candidates(100), 0, seeded())
    memory.add_real(candidates(2)[0], torch.tensor([0, 1]), 0, seeded())
    memory.close_task(0)
    assert (memory.count(0, False), memory.count(0, True)) == (18, 2)


def test_samples_are_uniform_over_rows_and_grouped_by_task():
    memory = ReplayMemory(60)
    memory.offer(*candidates(10), 0, seeded())
    memory.close_task(0)
    memory.offer(*candidates(100), 1, seeded(1))
    memory.close_task(1)
    assert [memory.count(task, False) for task in range(2)] == [10, 30]
    generator, drawn = seeded(2), torch.zeros(2)
    for _ in range(200):
        groups = memory.sample(8, generator)
        assert sum(len(rows.images) for rows in groups) == 8
        assert [rows.task for rows in groups] == sorted({rows.task for rows in groups})
        for rows in groups:
            assert len(rows.images) == len(rows.responses) == len(rows.labels) > 0
            assert len(numbers_of(rows.images).unique()) == len(rows.images)
            drawn[rows.task] += len(rows.images)
    # Of 1600 draws a quarter, within 5 standard errors of independent ones.
    assert drawn[0] == pytest.approx(400, abs=5 * (1600 * 0.25 * 0.75) ** 0.5)


def test_every_row_is_drawn_before_one_is_drawn_twice():
    memory = ReplayMemory(7)
    memory.offer(*candidates(7), 0, seeded())
    memory.close_task(0)
    (rows,) = memory.sample(17, seeded())
    assert sorted(numbers_of(rows.images).bincount().tolist()) == [2, 2, 2, 2, 3, 3, 3]


def test_the_open_task_is_not_sampled():
    memory = ReplayMemory(10)
    memory.offer(*candidates(50), 0, seeded())
    assert not len(memory) and not memory.sample(4) and not memory.export() and memory.count(0, False) == 10
    memory.close_task(0)
    memory.offer(*candidates(50, start=100), 1, seeded())
    assert len(memory) == 10 and [rows.task for rows in memory.sample(20)] == [0]
    assert set(memory.export()) == {f"task_0.synthetic.{name}" for name in ("images", "responses", "labels")}


def test_draws_come_from_the_generator_alone():
    def stored(seed):
        memory = ReplayMemory(10)
        memory.offer(*candidates(100), 0, seeded(seed))
        memory.close_task(0)
        return [numbers_of(rows.images).tolist() for rows in memory.sample(6, seeded(seed + 1))]

    state = torch.get_rng_state()
    assert stored(0) == stored(0) != stored(5)
    assert torch.equal(torch.get_rng_state(), state)
    memory = ReplayMemory(10)
    memory.offer(*candidates(100), 0)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_memory_restored_in_the_middle_of_a_task_goes_on_as_if_nothing_happened(tmp_path):
    def finish(memory, generator):
        memory.offer(*candidates(80, start=80), 1, generator)
        memory.add_real(candidates(30)[0], torch.arange(30) % 2, 1, generator)
        memory.close_task(1)
        return memory.export()

    memory, generator = ReplayMemory(24), seeded(1)
    memory.offer(*candidates(80), 0, generator)
    memory.add_real(candidates(30)[0], torch.arange(30) % 2, 0, generator)
    memory.close_task(0)
    memory.offer(*candidates(80), 1, generator)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    position = generator.get_state()
    expected = finish(memory, generator)
    other = ReplayMemory(24)
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    generator.set_state(position)
    restored = finish(other, generator)
    assert other.tasks == [0, 1] and restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(restored[name], tensor), name


def test_a_state_is_a_copy():
    memory = ReplayMemory(8)
    memory.offer(*candidates(8), 0, seeded())
    state = memory.state_dict()
    other = ReplayMemory(8)
    other.load_state_dict(state)
    for later in (memory, other):
        later.offer(*candidates(400, start=400), 0, seeded(2))
    numbers = numbers_of(state["stores"][0]["images"])
    assert sorted(numbers.tolist()) == list(range(8))


def test_images_are_stored_in_half_precision_and_exported_for_safetensors(tmp_path):
    memory = ReplayMemory(16)
    images, responses = candidates(16)
    images[:, :, 1] = torch.linspace(-1, 1, 4)
    memory.offer(images, responses, 0, seeded())
    memory.close_task(0)
    exported = memory.export()
    assert exported["task_0.synthetic.images"].dtype == torch.float16
    assert exported["task_0.synthetic.responses"].dtype == torch.float32
    assert (rows_of(memory, 0).images - images[numbers_of(rows_of(memory, 0).images)]).abs().max() < 5e-4
    save_file(exported, tmp_path / "memory.safetensors")
    exported["task_0.synthetic.images"].zero_()
    assert len(numbers_of(rows_of(memory, 0).images).unique()) == 16


def test_a_memory_moves_to_a_device_and_restored_rows_go_there_too():
    memory = ReplayMemory(8)
    memory.offer(*candidates(8), 0, seeded())
    memory.close_task(0)
    state = memory.state_dict()
    assert memory.to("meta") is memory
    assert all(tensor.device.type == "meta" for tensor in memory.export().values())
    memory.load_state_dict(state)
    assert all(tensor.device.type == "meta" for tensor in memory.export().values())


def test_a_memory_of_size_0_stores_nothing():
    memory = ReplayMemory(0)
    memory.offer(*candidates(8), 0)
    memory.add_real(candidates(8)[0], torch.zeros(8, dtype=torch.long), 0)
    memory.close_task(0)
    assert memory.tasks == [0] and not len(memory) and memory.sample(3) == []


def test_empty_batches_and_responses_with_a_gradient_are_fine():
    memory = ReplayMemory(8)
    images, responses = candidates(8)
    memory.offer(images[:0], responses[:0], 0)
    assert memory.count(0, False) == 0
    memory.offer(images.requires_grad_(), responses.requires_grad_(), 0)
    memory.close_task(0)
    (rows,) = memory.sample(4)
    assert not rows.images.requires_grad and not rows.responses.requires_grad


def test_what_does_not_fit_is_refused():
    images, responses = candidates(8)
    with pytest.raises(ValueError, match="must not be negative, got memory_size=-1"):
        ReplayMemory(-1)
    with pytest.raises(ValueError, match=r"max_real_share must lie between 0 and 1, got 1\.5"):
        ReplayMemory(1, max_real_share=1.5)
    memory = ReplayMemory(2)
    memory.offer(images, responses, 0)
    with pytest.raises(ValueError, match=r"task 0 is still open: close_task\(0\) comes before task 1"):
        memory.offer(images, responses, 1)
    with pytest.raises(ValueError, match="task 0 is still open"):
        memory.close_task(1)
    with pytest.raises(ValueError, match=r"task 0 holds images \(1, 4, 4\) with 2 responses, got \(1, 4, 4\) with 3"):
        memory.offer(images, candidates(8, 3)[1], 0)
    with pytest.raises(ValueError, match=r"got \(8, 1, 4, 4\), \(5, 2\) and \(8,\)"):
        memory.offer(images, responses[:5], 0)
    memory.close_task(0)
    for call in (lambda: memory.close_task(0), lambda: memory.offer(images, responses, 0)):
        with pytest.raises(ValueError, match="task 0 is closed"):
            call()
    memory.close_task(1)
    with pytest.raises(ValueError, match="memory_size=2 leaves no row for each of 3 tasks"):
        memory.close_task(2)
    with pytest.raises(ValueError, match="a memory of 2 rows, this one has 3: set memory_size=2"):
        ReplayMemory(3).load_state_dict(memory.state_dict())
