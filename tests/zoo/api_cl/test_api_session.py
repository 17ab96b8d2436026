"""The API of a task as the training sees it: order of answers, precision, step, purposes and budget."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from zoo.api_cl.api_session import APISession, look, shared_ledger
from zoo.api_cl.black_box import BlackBoxAPI
from zoo.api_cl.boxes import CallableAPI, ModuleAPI
from zoo.api_cl.ledger import QueryBudgetExceeded, QueryLedger

IMAGES = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
CLASSES, TASK = (7, 2, 5), [2, 5, 7]
ESTIMATOR = {"num_directions": 2, "eps": "auto", "directions": "auto", "central": False}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()


class Remote(BlackBoxAPI):
    """A service of which nothing is known but what it answers, of `rounded` decimals."""

    def __init__(self, network, rounded=None, **options):
        super().__init__(CLASSES, name="far", **options)
        self.network, self.rounded, self.purposes = network, rounded, []

    def _answer_all(self, images, purpose):
        self.purposes.append((purpose, len(images)))
        return super()._answer_all(images, purpose)

    def _answer(self, images):
        probs = self.network(images).softmax(-1)
        if self.output == "label":
            return probs.argmax(-1)
        return probs if self.rounded is None else probs.round(decimals=self.rounded)


def session(api, ledger=None, **options):
    estimator = ESTIMATOR | {name: options.pop(name) for name in tuple(options) if name in ESTIMATOR}
    return APISession(api, TASK, ledger or QueryLedger(), 16, estimator, **options)


def counts(ledger):
    return {name: value for name, value in ledger.summary()[0].items() if name not in ("api", "requests") and value}


def test_answers_come_in_the_order_of_the_task(network):
    api = ModuleAPI(network, CLASSES, name="a", expose_gradient=True)
    wanted = network(IMAGES).softmax(-1).detach()[:, [1, 2, 0]]
    one = session(api)
    torch.testing.assert_close(one.ask(IMAGES, "student"), wanted)
    torch.testing.assert_close(one.ask(IMAGES, {"gen_base": 5, "gen_dirs": 7}), wanted)
    torch.testing.assert_close(look(api, TASK, IMAGES), wanted)
    images = IMAGES.clone().requires_grad_()
    probs = one.differentiable(images)
    torch.testing.assert_close(probs.detach(), wanted)
    (found,) = torch.autograd.grad(probs[:, 0].sum(), images, retain_graph=True)
    (exact,) = torch.autograd.grad(network(images).softmax(-1)[:, 1].sum(), images)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(
    "purpose",
    [{"gen_base": 4, "gen_dirs": 8}, {"gen_dirs": 8, "gen_base": 4}, {"gen_base": 6, "gen_dirs": 6}, {"gen_base": 12}],
)
def test_rows_for_two_purposes_are_sent_together_and_counted_apart(purpose, network):
    api, ledger = Remote(network, decimals=4), QueryLedger()
    one = session(api, ledger, probe=None)
    one.ask(IMAGES, "student")
    one.ask(IMAGES, purpose)
    assert counts(ledger) == {"rows": 24, "student": 12, **purpose}
    assert [rows for _, rows in api.purposes] == [12, 12]


def test_a_purpose_of_no_rows_is_no_error(network):
    ledger = QueryLedger()
    session(ModuleAPI(network, CLASSES, name="a"), ledger).ask(IMAGES, {"gen_base": 12, "gen_dirs": 0})
    assert counts(ledger) == {"rows": 12, "gen_base": 12}


def test_rows_of_two_purposes_are_refused_together(network):
    ledger = QueryLedger(per_api=11)
    one = session(ModuleAPI(network, CLASSES, name="a"), ledger)
    assert one.allows(11) and not one.allows(12) and session(ModuleAPI(network, CLASSES, name="a")).allows(10**9)
    with pytest.raises(QueryBudgetExceeded):
        one.ask(IMAGES, {"gen_base": 4, "gen_dirs": 8})
    assert ledger.summary() == [] or ledger.spent() == 0
    assert one.allows(11)


def test_a_white_box_is_counted(network):
    ledger = QueryLedger()
    session(ModuleAPI(network, CLASSES, name="a", expose_gradient=True), ledger).differentiable(IMAGES)
    assert counts(ledger) == {"rows": 12, "gen_base": 12}


def test_an_api_that_tells_labels_only_gets_a_surrogate(network):
    api = ModuleAPI(network, CLASSES, name="a", label_only=True)
    with pytest.warns(UserWarning, match="API 'a' tells labels only.*gen_grad=surrogate is used"):
        one = session(api)
    assert one.gen_grad == "surrogate"
    remote = Remote(network, output="label")
    with pytest.warns(UserWarning, match="API 'far' tells labels only"):
        # No precision to find out.
        assert session(remote, probe=lambda: IMAGES).gen_grad == "surrogate"
    assert remote.purposes == []
    assert session(api, gen_grad="surrogate").gen_grad == "surrogate"


@pytest.mark.parametrize(("decimals", "eps"), [(4, 0.1), (5, 10**-1.5), (8, 1e-3), (None, 1e-3)])
def test_the_step_follows_the_declared_precision(decimals, eps, network):
    one = session(ModuleAPI(network, CLASSES, name="a", decimals=decimals))
    assert one.decimals == decimals and one.gap.kind == "l1" and one.estimator.eps == pytest.approx(eps)
    assert (one.estimator.num_directions, one.probed) == (2, -1 if decimals is None else decimals)


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_few_decimals_take_the_gap_of_probabilities(decimals, network):
    api = ModuleAPI(network, CLASSES, name="a", decimals=decimals)
    with pytest.warns(UserWarning, match=f"API 'a' rounds to {decimals} decimals.*generator_gap=l1_prob is used"):
        one = session(api)
    assert one.gap.kind == "l1_prob" and one.estimator.eps == pytest.approx(min(1, 10 ** (-(decimals - 2) / 2)))
    # Neither another gap nor another gradient has logarithms of noise.
    for options in ({"gap": "kl"}, {"gap": "l1_prob"}, {"gen_grad": "surrogate"}):
        assert session(api, **options).gap.kind == options.get("gap", "l1")


def test_a_temperature_is_of_kl_alone(network):
    api = ModuleAPI(network, CLASSES, name="a")
    assert (session(api, tau=4.0).gap.tau, session(api, gap="kl", tau=4.0).gap.tau) == (1.0, 4.0)


@pytest.mark.parametrize(("rounded", "eps"), [(4, 0.1), (6, 0.01), (None, 1e-3)])
def test_a_precision_that_is_not_declared_is_probed_and_counted(rounded, eps, network):
    ledger, api = QueryLedger(), Remote(network, rounded)
    one = session(api, ledger, probe=lambda: IMAGES)
    assert (one.decimals, one.probed) == (rounded, -1 if rounded is None else rounded)
    assert one.estimator.eps == pytest.approx(eps)
    assert counts(ledger) == {"rows": 12, "probe": 12}
    # A resumed run knows already.
    again = session(api, ledger, probe=lambda: IMAGES, decimals=one.probed)
    assert again.decimals == rounded and again.estimator.eps == one.estimator.eps and ledger.spent() == 12


def test_a_probe_that_finds_few_decimals_changes_the_gap(network):
    with pytest.warns(UserWarning, match="API 'far' rounds to 2 decimals"):
        one = session(Remote(network, 2), probe=lambda: IMAGES)
    assert one.gap.kind == "l1_prob" and one.estimator.eps == 1


@pytest.mark.parametrize(
    ("options", "settings"), [({"decimals": 5}, {}), ({}, {"gen_grad": "surrogate"}), ({}, {"gen_grad": "whitebox"})]
)
def test_nothing_is_probed_that_is_declared_or_of_no_use(options, settings, network):
    api = Remote(network, 5, **options)
    session(api, probe=lambda: pytest.fail("probed"), **settings)
    assert api.purposes == []


def test_a_local_api_that_declares_nothing_does_not_round(network):
    box = CallableAPI(lambda x: network(torch.from_numpy(x)).softmax(-1).detach().numpy(), CLASSES, name="a")
    one = session(box, probe=lambda: pytest.fail("probed"))
    assert one.decimals is None and one.probed == -1


@pytest.mark.parametrize(
    ("decimals", "quantization", "eps", "message"),
    [(4, None, 1e-3, "responses of 4 decimals.*use eps=0.1"), (None, "uint8", 1e-3, "8-bit images.*use eps=0.031")],
)
def test_a_step_that_drowns_in_rounding_is_warned_of(decimals, quantization, eps, message, network):
    api = ModuleAPI(network, CLASSES, name="a", decimals=decimals, input_quantization=quantization)
    with pytest.warns(UserWarning, match=f"API 'a' eps=0.001 is too small for {message}"):
        assert session(api, eps=eps).estimator.eps == eps
    assert session(api, eps=0.2).estimator.eps == 0.2
    assert session(api, eps=eps, gen_grad="surrogate").estimator.eps == eps
    assert session(api).estimator.eps > 0.03


def test_to_look_costs_and_counts_nothing(network):
    api, ledger = ModuleAPI(network, CLASSES, name="a"), QueryLedger(per_api=12)
    one = session(api, ledger)
    one.ask(IMAGES, "student")
    before = ledger.summary()
    assert len(look(api, TASK, IMAGES)) == 12
    assert ledger.summary() == before and api.ledger is ledger


def test_a_look_that_fails_leaves_the_ledger_in_place(network):
    api, ledger = ModuleAPI(network, CLASSES, name="a"), QueryLedger()
    session(api, ledger)
    with pytest.raises(ValueError, match="must lie in"):
        look(api, TASK, 2 + IMAGES)
    assert api.ledger is ledger


def test_a_service_is_never_looked_at(network):
    api = Remote(network)
    assert look(api, TASK, IMAGES) is None and api.purposes == []


def test_processes_share_a_budget():
    ledger = QueryLedger(total=100, per_api=41, on_exhausted="raise")
    assert shared_ledger(ledger, 1) is ledger
    own = shared_ledger(ledger, 4)
    assert (own.total, own.per_api, own.on_exhausted) == (25, 10, "raise")
    assert shared_ledger(QueryLedger(), 4).remaining("a") is None
    # A budget of nothing would be refused.
    assert shared_ledger(QueryLedger(total=2), 4).total == 1


def test_an_ordinary_api_gives_no_warning(network):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session(ModuleAPI(network, CLASSES, name="a"), eps=1e-3)
