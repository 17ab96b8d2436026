"""Real images of a task: kept once, asked once, whatever the loader repeats."""

from __future__ import annotations

import io

import pytest
import torch

from zoo.api_cl.real_images import RealImages

IMAGES = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.tensor([4, 7, 4, 7, 4, 7])


class Asked:
    def __init__(self):
        self.rows = []

    def __call__(self, images):
        self.rows.append(images.clone())
        return answer(images)


def answer(images):
    return torch.stack([images.mean((1, 2, 3)), images.amax((1, 2, 3))], 1)


def test_responses_come_in_the_order_of_the_batch_and_each_image_is_asked_once():
    real, ask = RealImages(), Asked()
    for order in ([2, 0, 2], [0, 1, 3, 2], [3, 3, 1], [5]):
        assert torch.equal(real.add(IMAGES[order], LABELS[order], ask), answer(IMAGES[order]))
    assert len(ask.rows) == 3 and torch.equal(torch.cat(ask.rows), IMAGES[[2, 0, 1, 3, 5]])
    images, labels, responses = real.tensors()
    assert len(real) == 5 and torch.equal(images, IMAGES[[2, 0, 1, 3, 5]])
    assert labels.tolist() == LABELS[[2, 0, 1, 3, 5]].tolist() and torch.equal(responses, answer(images))


def test_without_an_api_images_and_labels_alone_are_kept():
    real = RealImages()
    assert real.add(IMAGES[:3], LABELS[:3]) is None and real.add(IMAGES[1:4], LABELS[1:4]) is None
    images, labels, responses = real.tensors()
    assert torch.equal(images, IMAGES[:4]) and torch.equal(labels, LABELS[:4]) and responses is None


def test_what_is_kept_is_a_copy():
    real, images, labels = RealImages(), IMAGES[:2].clone(), LABELS[:2].clone()
    real.add(images, labels)
    images.zero_(), labels.zero_()
    kept, names, _ = real.tensors()
    assert torch.equal(kept, IMAGES[:2]) and torch.equal(names, LABELS[:2])


def test_a_query_that_fails_leaves_no_trace():
    real, ask = RealImages(), Asked()
    real.add(IMAGES[:1], LABELS[:1], ask)

    def fail(images):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        real.add(IMAGES[:3], LABELS[:3], fail)
    assert len(real) == 1
    assert torch.equal(real.add(IMAGES[:3], LABELS[:3], ask), answer(IMAGES[:3]))


def test_a_new_task_begins_with_nothing():
    real, ask = RealImages(), Asked()
    real.add(IMAGES, LABELS, ask)
    real.clear()
    assert not len(real)
    with pytest.raises(ValueError, match="no real image"):
        real.tensors()
    real.add(IMAGES[:2], LABELS[:2], ask)
    assert [len(rows) for rows in ask.rows] == [6, 2]


@pytest.mark.parametrize("asks", [True, False])
def test_a_restored_one_asks_nothing_twice(asks):
    real, ask = RealImages(), Asked()
    real.add(IMAGES[:4], LABELS[:4], ask if asks else None)
    file = io.BytesIO()
    torch.save(real.state_dict(), file)
    file.seek(0)
    again = RealImages()
    again.add(IMAGES[5:], LABELS[5:], ask if asks else None)
    again.load_state_dict(torch.load(file, weights_only=True))
    ask.rows.clear()
    found = again.add(IMAGES[[4, 1, 0]], LABELS[[4, 1, 0]], ask if asks else None)
    assert len(again) == 5 and torch.equal(again.tensors()[0], IMAGES[:5])
    if asks:
        assert torch.equal(found, answer(IMAGES[[4, 1, 0]]))
        assert len(ask.rows) == 1 and torch.equal(ask.rows[0], IMAGES[4:5])


def test_an_empty_state_is_restored_as_such():
    real = RealImages()
    real.add(IMAGES, LABELS)
    real.load_state_dict(RealImages().state_dict())
    assert not len(real)
