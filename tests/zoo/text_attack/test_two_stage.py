"""TwoStage: when stages end, and what comes back when they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.text_attack.two_stage import TwoStage


def put(network: nn.Linear, table: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        network.weight.fill_(value)
        table.fill_(value)


def steps(stages: TwoStage, network: nn.Linear, table: torch.Tensor, values: list[float], first: int = 0) -> list[int]:
    """Each validation with other weights, its place in the run; the stage after each."""
    found = []
    for place, value in enumerate(values, first):
        put(network, table, float(place))
        stages.step(value, network, table)
        found.append(int(stages.stage))
    return found


def fresh(patience: tuple[int, int] = (2, 1)) -> tuple[TwoStage, nn.Linear, torch.Tensor]:
    network, table = nn.Linear(2, 2), torch.zeros(3, 2)
    return TwoStage(network, table, patience), network, table


def test_each_stage_ends_after_its_patience_and_gives_the_best_weights_and_table_back() -> None:
    stages, network, table = fresh()
    assert steps(stages, network, table, [0.1, 0.3, 0.2, 0.4, 0.4]) == [1, 1, 1, 1, 1]
    assert not stages.frozen and (network.weight == 4.0).all()
    assert steps(stages, network, table, [0.35], first=5) == [2]
    assert stages.frozen and not stages.over
    assert (network.weight == 3.0).all() and (table == 3.0).all()
    # The second stage must beat the first one's best, and its own best weights are what the end gives back.
    assert steps(stages, network, table, [0.5, 0.45], first=6) == [2, 3]
    assert stages.over and (network.weight == 6.0).all() and (table == 6.0).all()
    steps(stages, network, table, [0.9], first=9)
    assert (network.weight == 9.0).all() and float(stages.best) == 0.5 and int(stages.stage) == 3


def test_a_second_stage_without_improvement_ends_with_the_first_ones_best() -> None:
    stages, network, table = fresh((1, 2))
    assert steps(stages, network, table, [0.4, 0.3, 0.3, 0.4]) == [1, 2, 2, 3]
    assert (network.weight == 0.0).all() and (table == 0.0).all()


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
def test_a_value_is_no_improvement_on_itself(value: float) -> None:
    stages, network, table = fresh((3, 1))
    assert steps(stages, network, table, [value] * 4) == [1, 1, 1, 2]


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    values = [0.1, 0.3, 0.2, 0.25, 0.2, 0.6]
    for cut in range(1, len(values)):
        stages, network, table = fresh()
        before = steps(stages, network, table, values[:cut])
        other, network_2, table_2 = fresh()
        other.load_state_dict(stages.state_dict())
        network_2.load_state_dict(network.state_dict())
        table_2.copy_(table)
        whole, network_3, table_3 = fresh()
        assert before + steps(other, network_2, table_2, values[cut:], cut) == steps(whole, network_3, table_3, values)
        assert torch.equal(network_2.weight, network_3.weight) and torch.equal(table_2, table_3)


def test_its_copy_of_the_network_is_not_trained() -> None:
    stages, network, _ = fresh()
    assert not any(parameter.requires_grad for parameter in stages.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("patience", [[], [5], [5, 0], [1, 2, 3]], ids=str)
def test_a_patience_that_is_not_two_positive_numbers_is_refused(patience: list[int]) -> None:
    with pytest.raises(ValueError, match="patience must be two positive numbers"):
        TwoStage(nn.Linear(1, 1), torch.zeros(1, 1), patience)
