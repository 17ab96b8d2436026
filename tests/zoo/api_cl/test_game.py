"""A round of the game: the generators' gradient through a black box is the true one, and nothing else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.zoo.api_cl.small_networks import SHAPE, SIZE, backbone, seeded, sharper
from zoo.api_cl.boxes import ModuleAPI
from zoo.api_cl.game import generator_round
from zoo.api_cl.gaps import ResponseGap
from zoo.api_cl.generator_objective import GeneratorObjective
from zoo.api_cl.generators import DFGenerator
from zoo.api_cl.networks import Classifier
from zoo.api_cl.zeroth_order import ZerothOrderGradient

LATENT = 6
COLUMNS = torch.tensor([3, 0, 5])


@pytest.fixture
def learner():
    """In train mode, as between two rounds."""
    return sharper(Classifier(backbone(9, 1), 9, 6)).double().train()


@pytest.fixture
def api():
    network = nn.Sequential(backbone(11, 2), nn.Linear(11, 3))
    return ModuleAPI(sharper(network).double(), (3, 0, 5), name="a", expose_gradient=True)


@pytest.fixture
def generators():
    torch.manual_seed(3)
    return [DFGenerator(LATENT, SHAPE, 3).double() for _ in range(2)]


NOISE = torch.randn(12, LATENT, generator=seeded(4), dtype=torch.float64)


class Asked:
    """Notes what an API is asked for."""

    def __init__(self, api):
        self.api, self.calls = api, []

    def __call__(self, images, purpose):
        self.calls.append((images, dict(purpose)))
        return self.api.query(images, "gen_base")


def play(generators, learner, api, objective, gap="l1", noise=NOISE, **options):
    options.setdefault("estimator", ZerothOrderGradient(SIZE, 1e-5, "orthonormal"))
    options.setdefault("rng", seeded(5))
    ask = api if isinstance(api, Asked) else Asked(api)
    return generator_round(
        generators, noise, learner, COLUMNS, ask, objective, ResponseGap(gap),
        differentiable=ask.api.differentiable, **options,
    )  # fmt: skip


def weights_gradient(loss, generators):
    parameters = [parameter for generator in generators for parameter in generator.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def written_out(generators, learner, api, noise, gap, adv, balance, conf, coop, margin, kind):
    """The objective as section 2.4 of the sheet has it, by plain autograd through learner and API."""
    learner = copy.deepcopy(learner).eval()
    images = [generator(noise).tanh() for generator in generators]
    loss = torch.zeros((), dtype=torch.float64)
    for x in images:
        p, s = api.module(x).softmax(-1), learner(x)[:, COLUMNS]
        if gap == "l1":
            log_p, log_q = p.log(), s.log_softmax(-1)
            difference = (log_p - log_p.mean(-1, keepdim=True)) - (log_q - log_q.mean(-1, keepdim=True))
            d = difference.abs().mean(-1)
        elif gap == "kl":
            d = (p * (p.log() - s.log_softmax(-1))).sum(-1)
        else:
            d = (p - s.softmax(-1)).abs().sum(-1)
        mean = p.mean(0)
        loss = loss - adv * d.mean() + balance * (mean * mean.log()).sum() - conf * (p * p.log()).sum(-1).mean()
    if len(images) == 2 and kind == "pixel":
        loss = loss + coop * (margin - (images[0] - images[1]).abs().mean()).clamp_min(0)
    if len(images) == 2 and kind == "feature":
        one, other = (nn.functional.normalize(learner.features(x), dim=-1) for x in images)
        loss = loss + coop * (margin - (1 - (one * other).sum(-1)).mean()).clamp_min(0)
    return loss


CASES = [
    ("l1", (1.0, 1.0, 0.0, 1.0, 2.0, "pixel"), 2),
    ("l1", (0.7, 1.9, 0.6, 0.8, 2.0, "feature"), 2),
    ("kl", (1.0, 0.5, 0.4, 1.0, 0.5, "none"), 2),
    ("l1_prob", (1.0, 2.0, 0.3, 1.0, 2.0, "pixel"), 1),
    ("l1", (1.0, 0.0, 0.0, 0.0, 0.5, "pixel"), 2),
    ("l1", (0.0, 1.0, 0.0, 0.0, 0.5, "pixel"), 2),
    ("l1", (0.0, 0.0, 1.0, 0.0, 0.5, "pixel"), 2),
]


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize(("gap", "terms", "count"), CASES)
def test_with_all_directions_the_generators_weights_get_the_gradient_of_autograd(
    gap, terms, count, central, generators, learner, api
):
    generators = generators[:count]
    estimator = ZerothOrderGradient(SIZE, 1e-5, "orthonormal", central)
    found = play(generators, learner, api, GeneratorObjective(*terms), gap, estimator=estimator)
    estimate = weights_gradient(found.loss, generators)
    exact = weights_gradient(written_out(generators, learner, api, NOISE, gap, *terms), generators)
    assert exact.norm() > 1e-3
    assert nn.functional.cosine_similarity(estimate, exact, dim=0) > 0.9999
    assert abs(float(estimate.norm() / exact.norm()) - 1) < 1e-3


@pytest.mark.parametrize(("gap", "terms", "count"), CASES)
def test_through_a_white_box_the_gradient_is_that_of_autograd_itself(gap, terms, count, generators, learner, api):
    generators = generators[:count]
    found = play(generators, learner, api, GeneratorObjective(*terms), gap, mode="whitebox")
    wanted = written_out(generators, learner, api, NOISE, gap, *terms)
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(weights_gradient(found.loss, generators), weights_gradient(wanted, generators))


def test_a_surrogate_takes_the_label_for_a_constant(generators, learner, api):
    objective = GeneratorObjective(0.7, 1.3, 0.4, coop=0.8, margin=2.0)
    asked = Asked(api)
    found = play(generators, learner, asked, objective, mode="surrogate")
    fixed = copy.deepcopy(learner).eval()
    images = [generator(NOISE).tanh() for generator in generators]
    wanted = 0.8 * (2.0 - (images[0] - images[1]).abs().mean())
    for x in images:
        s = fixed(x)[:, COLUMNS]
        labels = api.module(x).argmax(-1)
        mean = s.softmax(-1).mean(0)
        wanted = wanted - 0.7 * nn.functional.cross_entropy(s, labels) + 1.3 * (mean * mean.log()).sum()
        wanted = wanted - 0.4 * (s.softmax(-1) * s.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(weights_gradient(found.loss, generators), weights_gradient(wanted, generators))
    ((sent, purposes),) = asked.calls
    assert len(sent) == 24 and purposes == {"gen_base": 24} and not sent.requires_grad


class Pixels(nn.Module):
    """Images before tanh as they are: their gradient shows the estimate itself."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, noise):
        assert len(noise) == len(self.values)
        return self.values * 1


class Along(ZerothOrderGradient):
    """Differences along given directions `(m, B, ...)`."""

    def __init__(self, directions):
        super().__init__(len(directions), 1e-3, "sphere")
        self.given = directions

    def draw(self, x, generator=None):
        return self.given


def estimates(values, directions, learner, api):
    """Estimates `(2, B, ...)` for the images of two generators; directions `(m, 2, B, ...)`."""
    pixels = [Pixels(part) for part in values]
    batch = values.shape[1]
    found = play(
        pixels, learner, api, GeneratorObjective(1.0, 1.0, 0.5, coop=0), noise=NOISE.new_zeros(batch, LATENT),
        estimator=Along(directions.flatten(1, 2)),
    )  # fmt: skip
    return torch.stack(torch.autograd.grad(found.loss, [one.values for one in pixels])) * batch


@pytest.fixture
def points():
    values = torch.randn(2, 7, *SHAPE, generator=seeded(6), dtype=torch.float64)
    directions = torch.randn(3, *values.shape, generator=seeded(7), dtype=torch.float64)
    return values, directions / directions.flatten(3).norm(dim=-1)[..., None, None, None]


def test_permuting_images_with_their_directions_permutes_the_estimates(points, learner, api):
    values, directions = points
    order = torch.randperm(7, generator=seeded(8))
    wanted = estimates(values, directions, learner, api)[:, order]
    torch.testing.assert_close(estimates(values[:, order], directions[:, :, order], learner, api), wanted)
    # Generators do not depend on each other, either.
    swapped = estimates(values.flip(0), directions.flip(1), learner, api)
    torch.testing.assert_close(swapped[:, order], wanted.flip(0))


def test_doubling_the_batch_leaves_the_estimates_as_they_are(points, learner, api):
    values, directions = points
    wanted = estimates(values, directions, learner, api)
    doubled = estimates(values.repeat(1, 2, 1, 1, 1), directions.repeat(1, 1, 2, 1, 1, 1), learner, api)
    torch.testing.assert_close(doubled, wanted.repeat(1, 2, 1, 1, 1))
    assert wanted.abs().max() > 1e-3


def test_an_image_matters_to_others_through_the_mean_response_alone(points, learner, api):
    values, directions = points
    other = values.clone()
    other[0, 0] += 1

    def along(images, mean_over_ranks):
        pixels = [Pixels(part) for part in images]
        found = play(
            pixels, learner, api, GeneratorObjective(coop=0), noise=NOISE.new_zeros(7, LATENT),
            estimator=Along(directions.flatten(1, 2)), mean_over_ranks=mean_over_ranks,
        )  # fmt: skip
        return torch.autograd.grad(found.loss, [one.values for one in pixels])

    fixed = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    changed = [
        (a - b).flatten(1).abs().amax(1)
        for a, b in zip(*(along(v, lambda m: fixed) for v in (values, other)), strict=True)
    ]
    assert changed[0][0] > 1e-6 and changed[0][1:].max() < 1e-12 and changed[1].max() < 1e-12
    free = [
        (a - b).flatten(1).abs().amax(1) for a, b in zip(*(along(v, lambda m: m) for v in (values, other)), strict=True)
    ]
    assert free[0][1:].min() > 1e-9 and free[1].max() < 1e-12


@pytest.mark.parametrize("mode", ["zo", "surrogate", "whitebox"])
@pytest.mark.parametrize("kind", ["pixel", "feature"])
@pytest.mark.parametrize("training", [True, False])
def test_the_learner_and_the_api_are_left_as_they_were(mode, kind, training, generators, learner, api):
    learner.train(training)
    learner.head.bias.requires_grad_(False)
    before = copy.deepcopy(learner.state_dict()), copy.deepcopy(api.module.state_dict())
    found = play(generators, learner, api, GeneratorObjective(margin=3.0, kind=kind), mode=mode)
    torch.autograd.backward(found.loss)
    assert all(parameter.grad is not None for generator in generators for parameter in generator.parameters())
    for network, state in zip((learner, api.module), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())
    assert learner.training is training and all(module.training is training for module in learner.modules())
    wanted = {name: name != "head.bias" for name, _ in learner.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in learner.named_parameters()} == wanted


def test_a_learner_is_thawed_after_a_query_that_failed(generators, learner, api):
    def ask(images, purpose):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        generator_round(
            generators, NOISE, learner, COLUMNS, ask, GeneratorObjective(), ResponseGap("l1"),
            estimator=ZerothOrderGradient(),
        )  # fmt: skip
    assert learner.training and all(parameter.requires_grad for parameter in learner.parameters())


def test_all_points_of_both_generators_are_asked_for_at_once(generators, learner, api):
    asked = Asked(api)
    means = []
    found = play(
        generators, learner, asked, GeneratorObjective(), estimator=ZerothOrderGradient(5, 1e-3, central=True),
        mean_over_ranks=lambda mean: means.append(mean) or mean,
    )  # fmt: skip
    ((sent, purposes),) = asked.calls
    assert purposes == {"gen_base": 24, "gen_dirs": 240} and len(sent) == 264
    assert sent.abs().max() <= 1 and not sent.requires_grad
    # The unperturbed images come first, generator by generator, and serve the learner later.
    assert torch.equal(found.images, sent[:24]) and torch.equal(found.probs, api.query(sent[:24], "probe"))
    # The mean response that is held fixed is theirs alone.
    (mean,) = means
    assert torch.equal(mean, found.probs.view(2, 12, 3).mean(1))
    made = torch.cat([generator(NOISE).tanh() for generator in generators]).detach()
    torch.testing.assert_close(found.images, made)
    assert not found.images.requires_grad and not found.probs.requires_grad


def test_a_round_reports_what_it_saw(generators, learner, api):
    found = play(generators, learner, api, GeneratorObjective(margin=3.0))
    images = found.images.view(2, 12, *SHAPE)
    gaps = ResponseGap("l1")(found.probs, copy.deepcopy(learner).eval()(found.images)[:, COLUMNS])
    mean = found.probs.view(2, 12, 3).mean(1)
    wanted = {
        "gap": gaps.mean(),
        "entropy": -(mean * mean.log()).sum() / 2,
        "pixel_std": images.std(1, correction=0).mean(),
        "distance": (images[0] - images[1]).abs().mean(),
    }
    gradient = found.report.pop("gradient")
    assert gradient > 0 and not any(value.requires_grad for value in found.report.values())
    torch.testing.assert_close(found.report, {name: value.detach() for name, value in wanted.items()})


def test_one_image_of_one_generator_is_a_batch(learner, api):
    found = play([Pixels(NOISE.new_zeros(1, *SHAPE))], learner, api, GeneratorObjective(), noise=NOISE[:1])
    assert found.report["pixel_std"] == 0 and "distance" not in found.report


def test_a_round_within_autocast_is_computed_in_single_precision(generators, learner, api):
    networks = [network.float() for network in generators]
    api.module.float()
    noise = NOISE.float()

    def loss():
        found = play(networks, learner.float(), api, GeneratorObjective(), noise=noise)
        assert found.images.dtype == found.probs.dtype == torch.float32
        return found.loss

    wanted = loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss()
    assert torch.equal(weights_gradient(found, networks), weights_gradient(wanted, networks))


def test_the_directions_come_from_the_given_source(generators, learner, api):
    def gradient(seed):
        found = play(generators, learner, api, GeneratorObjective(), estimator=ZerothOrderGradient(1), rng=seeded(seed))
        return weights_gradient(found.loss, generators)

    torch.manual_seed(0)
    first = gradient(1)
    torch.manual_seed(1)
    assert torch.equal(gradient(1), first) and not torch.equal(gradient(2), first)
