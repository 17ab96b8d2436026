"""A network or a NumPy function as a black box: it answers, tells as little as asked, and never gives a gradient."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from zoo.api_cl.boxes import APIResponseError, CallableAPI, ModuleAPI
from zoo.api_cl.ledger import QueryLedger
from zoo.api_cl.responses import grid_decimals

IMAGES = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
CLASSES = [5, 6, 7, 8]


class NoBackward(torch.autograd.Function):
    """Raises as soon as anyone asks for a gradient through the box."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise AssertionError("a gradient passed through the black box")


class Network(nn.Module):
    def __init__(self, *, leaky=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.leaky = leaky

    def forward(self, x):
        x = x if self.leaky else NoBackward.apply(x)
        return self.head(self.norm(self.conv(x)).relu().flatten(1)) * 3


@pytest.fixture
def network():
    return Network().eval()


def test_a_module_answers_with_the_softmax_of_its_logits(network):
    wanted = network(IMAGES).detach().softmax(1)
    torch.testing.assert_close(ModuleAPI(network, CLASSES, name="a").query(IMAGES, "probe"), wanted)


def test_a_module_that_returns_probabilities_says_so(network):
    wanted = network(IMAGES).detach().softmax(1)
    api = ModuleAPI(nn.Sequential(network, nn.Softmax(1)), CLASSES, name="a", output="probs")
    torch.testing.assert_close(api.query(IMAGES, "probe"), wanted)
    wrong = ModuleAPI(network, CLASSES, name="a", output="probs")
    with pytest.raises(APIResponseError, match=r"API 'a': row \d+ looks like logits .*set output='logits'"):
        wrong.query(IMAGES, "probe")


def test_a_module_in_train_mode_is_asked_in_eval_mode_and_never_learns():
    network = Network().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    api = ModuleAPI(network, CLASSES, name="a")
    first = api.query(IMAGES, "probe")
    network.train()
    # In train mode the rows of a batch would depend on each other.
    torch.testing.assert_close(api.query(IMAGES[:1], "probe"), first[:1])
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_box_in_a_module_is_no_part_of_it(network):
    owner = nn.Module()
    owner.api = ModuleAPI(network, CLASSES, name="a")
    assert not list(owner.parameters()) and not owner.state_dict() and not list(owner.children())


def test_no_graph_leads_into_the_network():
    api = ModuleAPI(Network(leaky=False), CLASSES, name="a")
    scale = torch.ones(1, requires_grad=True)
    probs = api.query((IMAGES * scale).detach(), "gen_base")
    (probs * scale).sum().backward()
    assert probs.grad_fn is None and scale.grad == pytest.approx(16)


def test_autocast_of_the_caller_does_not_reach_the_box(network):
    api = ModuleAPI(network, CLASSES, name="a", preprocess=lambda x: x @ torch.eye(4))
    wanted = api.query(IMAGES, "probe")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(IMAGES).dtype == torch.bfloat16
        assert torch.equal(api.query(IMAGES, "probe"), wanted)


def test_a_module_keeps_its_own_precision(network):
    wanted = network(IMAGES).detach().softmax(1)
    api = ModuleAPI(network.double(), CLASSES, name="a")
    found = api.query(IMAGES, "probe")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    assert api.query(IMAGES.double(), "probe").dtype == torch.float64


@pytest.mark.parametrize("decimals", [1, 2, 4, 6])
def test_rounded_responses_lie_on_the_grid_that_is_declared(network, decimals):
    api = ModuleAPI(network, CLASSES, name="a", decimals=decimals)
    found = api.query(IMAGES, "probe")
    assert (api.output, grid_decimals(found)) == ("probs", decimals)
    assert (found - network(IMAGES).softmax(1)).abs().max() <= 0.5 * 10**-decimals + 1e-6


def test_topk_tells_the_best_scores_and_no_order_of_the_rest(network):
    exact = network(IMAGES).detach().softmax(1)
    api = ModuleAPI(network, CLASSES, name="a", topk=2)
    found = api.query(IMAGES, "probe")
    assert api.output == "topk"
    best = exact.argsort(dim=1, descending=True)
    torch.testing.assert_close(found.gather(1, best[:, :2]), exact.gather(1, best[:, :2]))
    rest = found.gather(1, best[:, 2:])
    torch.testing.assert_close(rest, exact.gather(1, best[:, 2:]).mean(1, keepdim=True).expand(-1, 2))


def test_a_label_only_service_tells_the_best_class(network):
    api = ModuleAPI(network, CLASSES, name="a", label_only=True)
    found = api.query(IMAGES, "probe")
    best = network(IMAGES).argmax(1)
    assert api.output == "label"
    torch.testing.assert_close(found, torch.full((16, 4), 0.1 / 3).scatter_(1, best[:, None], 0.9))


@pytest.mark.parametrize("options", [{}, {"label_only": True}, {"topk": 2}, {"decimals": 3}])
def test_a_module_with_other_classes_than_declared_is_refused(network, options):
    api = ModuleAPI(network, [1, 2, 3], name="a", **options)
    with pytest.raises(APIResponseError, match="API 'a' returned 4 columns for 3 declared classes"):
        api.query(IMAGES, "probe")


def test_a_module_that_returns_no_tensor_is_refused():
    class Pair(Network):
        def forward(self, x):
            return x, x

    with pytest.raises(APIResponseError, match="the module of API 'a' returned a tuple, not a tensor"):
        ModuleAPI(Pair(), CLASSES, name="a").query(IMAGES, "probe")


def test_the_latency_is_waited_for_at_each_request(network):
    api = ModuleAPI(network, CLASSES, name="a", latency=0.02, max_batch=8)
    start = time.perf_counter()
    api.query(IMAGES, "probe")
    assert time.perf_counter() - start >= 0.04


def test_an_exposed_gradient_is_that_of_the_network_and_counts_as_queries(network):
    ledger = QueryLedger()
    api = ModuleAPI(network, CLASSES, name="a", expose_gradient=True, max_batch=5, ledger=ledger)
    images = IMAGES.clone().requires_grad_()
    weights = torch.arange(4.0)
    (api.differentiable(images) @ weights).sum().backward()
    reference = IMAGES.clone().requires_grad_()
    (network(reference).softmax(1) @ weights).sum().backward()
    torch.testing.assert_close(images.grad, reference.grad)
    assert ledger.summary()[0]["gen_base"] == 16
    assert not api.query(IMAGES, "probe").requires_grad


def test_a_gradient_must_be_exposed_on_purpose(network):
    with pytest.raises(ValueError, match="ModuleAPI 'a' gives no gradient; build it with expose_gradient=True"):
        ModuleAPI(network, CLASSES, name="a").differentiable(IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "label"}, "output of ModuleAPI 'a' is what the module returns, 'logits' or 'probs', got 'label'"),
        ({"topk": 5}, "topk of ModuleAPI 'a' must lie between 1 and its 4 classes, without label_only, got 5"),
        ({"topk": 0}, "topk of ModuleAPI 'a' must lie between 1"),
        ({"topk": 2, "label_only": True}, "without label_only, got 2"),
        ({"latency": -1}, "latency of ModuleAPI 'a' must be at least 0 s, got -1"),
        ({"expose_gradient": True, "decimals": 4}, "expose_gradient=True must have no decimals"),
        ({"expose_gradient": True, "input_quantization": "uint8"}, "expose_gradient=True must have no decimals"),
    ],
)
def test_a_module_that_cannot_be_such_a_service_is_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        ModuleAPI(network, CLASSES, name="a", **options)


def test_a_classifier_of_scikit_learn_is_an_api():
    from sklearn.linear_model import LogisticRegression

    labels = (np.arange(16) % 3) + 4
    model = LogisticRegression().fit(IMAGES.flatten(1).numpy(), labels)
    api = CallableAPI(model.predict_proba, model.classes_, name="linear", flatten=True, max_batch=7)
    assert api.classes == (4, 5, 6)
    found = api.query(IMAGES, "probe")
    assert found.dtype == torch.float32 and found.device == IMAGES.device
    np.testing.assert_allclose(found.numpy(), model.predict_proba(IMAGES.flatten(1).numpy()), atol=1e-6)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_function_receives_float32_arrays(flatten):
    shapes = []

    def fn(array):
        shapes.append((array.shape, array.dtype))
        return np.full((len(array), 2), 0.5)

    CallableAPI(fn, [0, 1], name="f", flatten=flatten).query(IMAGES.double(), "probe")
    assert shapes == [((16, 16) if flatten else (16, 1, 4, 4), np.float32)]


def test_a_function_that_writes_into_its_input_leaves_the_callers_images_alone():
    def fn(array):
        array *= 255
        return np.full((len(array), 2), 0.5)

    images = IMAGES.clone()
    CallableAPI(fn, [0, 1], name="f").query(images, "probe")
    assert torch.equal(images, IMAGES)


def test_a_function_may_hand_out_the_same_array_each_time():
    buffer = np.zeros((8, 2), dtype=np.float32)

    def fn(array):
        buffer[:, 0] = (array.mean(axis=(1, 2, 3)) + 1) / 2
        buffer[:, 1] = 1 - buffer[:, 0]
        return buffer

    found = CallableAPI(fn, [0, 1], name="f", max_batch=8).query(IMAGES, "probe")
    torch.testing.assert_close(found[:, 0], (IMAGES.mean(dim=(1, 2, 3)) + 1) / 2)


def test_a_function_may_return_columns_of_labels_or_lists():
    def columns(array):
        return [int(value > 0) for value in array.mean(axis=(1, 2, 3))]

    found = CallableAPI(columns, [3, 4], name="f", output="label").query(IMAGES, "probe")
    assert torch.equal(found.argmax(1), (IMAGES.mean(dim=(1, 2, 3)) > 0).long())


def test_a_function_that_returns_no_numbers_is_refused():
    api = CallableAPI(lambda array: ["cat"] * len(array), [0, 1], name="f", output="label")
    with pytest.raises(APIResponseError, match="API 'f' returned an array of <U3, expected numbers"):
        api.query(IMAGES, "probe")
