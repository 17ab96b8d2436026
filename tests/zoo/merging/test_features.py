"""Features of any usual batch and network, and what is refused."""

from collections import UserDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from zoo.merging.features import default_features, has_labels, read_features, without_labels


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor | None
    rows: Tensor
    task: str


class Tokens(NamedTuple):
    input_ids: Tensor
    label: Tensor | None


IMAGES = torch.randn(4, 3, 2, 2)
LABELS = torch.arange(4)
NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        Batch(IMAGES, LABELS, LABELS, "digits"),
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        [IMAGES],
        {"pixel_values": IMAGES},
        {"pixel_values": IMAGES, "labels": LABELS},
        {"images": IMAGES, "label": LABELS},
        UserDict(pixel_values=IMAGES, label_ids=LABELS),
        ({"pixel_values": IMAGES}, LABELS),
    ],
)
def test_every_usual_batch_gives_the_network_its_inputs_and_nothing_else(batch: object) -> None:
    assert torch.equal(default_features(NETWORK, batch), NETWORK(IMAGES))


def test_a_mapping_of_several_tensors_is_passed_by_name_without_labels() -> None:
    def model(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        return torch.stack([attention_mask.sum(1), input_ids.sum(1)], 1).float()

    ids, mask = torch.tensor([[3, 4]]), torch.tensor([[1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1])}
    assert default_features(model, batch).tolist() == [[1, 7]]
    assert default_features(lambda *, input_ids: input_ids.float(), {"input_ids": ids}).tolist() == [[3, 4]]


@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_most_projected_field_of_an_output_is_taken(as_mapping: bool) -> None:
    fields = {
        "image_embeds": torch.randn(2, 3),
        "text_embeds": torch.randn(2, 3),
        "pooler_output": torch.randn(2, 4),
        "logits": torch.randn(2, 5),
        "last_hidden_state": torch.randn(2, 6, 7),
    }
    expected = {**fields, "last_hidden_state": fields["last_hidden_state"][:, 0]}
    for name in list(fields):
        output = dict(fields) if as_mapping else SimpleNamespace(**fields)
        assert torch.equal(read_features(output), expected[name]), name
        fields[name] = None


def test_the_pooled_map_of_a_convolutional_network_is_flattened() -> None:
    pooled = torch.randn(2, 8, 1, 1)
    assert torch.equal(read_features(SimpleNamespace(pooler_output=pooled)), pooled[:, :, 0, 0])


def test_without_labels_keeps_everything_else() -> None:
    batch = Batch(IMAGES, LABELS, LABELS, "digits")
    kept = without_labels(batch)
    assert type(kept) is Batch and kept.labels is None
    assert kept.images is IMAGES and kept.rows is LABELS and kept.task == "digits"
    assert batch.labels is LABELS
    tokens = without_labels(Tokens(LABELS, LABELS))
    assert tokens.label is None and tokens.input_ids is LABELS
    mapping = {"pixel_values": IMAGES, "labels": LABELS, "label": LABELS, "rows": LABELS}
    assert without_labels(mapping) == {"pixel_values": IMAGES, "rows": LABELS}
    assert "labels" in mapping
    assert without_labels((IMAGES, LABELS)) is IMAGES
    assert without_labels(IMAGES) is IMAGES


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (Batch(IMAGES, LABELS, LABELS, "a"), True),
        (Batch(IMAGES, None, LABELS, "a"), False),
        (Tokens(LABELS, LABELS), True),
        ({"pixel_values": IMAGES, "label": LABELS}, True),
        ({"pixel_values": IMAGES, "labels": None}, False),
        ({"pixel_values": IMAGES}, False),
        ((IMAGES, LABELS), True),
        ((IMAGES, None), False),
        ([IMAGES], False),
        (({"pixel_values": IMAGES, "label": LABELS},), True),
        (IMAGES, False),
    ],
)
def test_labels_are_seen_where_they_are(batch: object, expected: bool) -> None:
    assert has_labels(batch) is expected
    assert not has_labels(without_labels(batch))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Tokens(LABELS, None), "Tokens has the fields input_ids, label and no tensor 'images'"),
        ("text", "batch of type str"),
        ((IMAGES, LABELS, LABELS), "this one has 3 entries"),
        ((), "this one has 0 entries"),
        ({"labels": LABELS}, r"no inputs \(keys labels\)"),
        ((["a"], LABELS), "tuple of list, Tensor"),
    ],
)
def test_an_unknown_batch_is_refused_by_name(batch: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_features(NETWORK, batch)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 3, 4), r"the model's output has shape \(2, 3, 4\)"),
        (torch.zeros(2), r"has shape \(2,\)"),
        ({"logits": torch.zeros(2, 3, 4)}, r"logits of the model's dict has shape \(2, 3, 4\)"),
        ({"loss": torch.zeros(())}, "dict with the keys loss"),
        ((torch.zeros(2, 3), None), "tuple of Tensor, NoneType"),
        (None, "NoneType"),
    ],
)
def test_an_output_without_features_is_refused_by_name(output: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_features(output)
    assert "feature_fn=" in str(caught.value)
