"""The APIs of a stream: built in each way, trained once, refused where they do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from zoo.api_cl.apis import APIBuilder, check_classes, load_network, train_api
from zoo.api_cl.boxes import ModuleAPI
from zoo.api_cl.networks import build_classifier

SHAPE = (1, 8, 8)
TASKS = [[3, 8], [1, 0]]


class Digits:
    """Private images of the digits of each task; the even half of the set."""

    def __init__(self, rest=0, tasks=TASKS):
        images, labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(np.rint(images * 255 / 16).astype(np.uint8)).view(-1, *SHAPE)
        self.images, self.labels = pixels[rest::2], torch.from_numpy(labels[rest::2]).long()
        self.tasks, self.read = tasks, []

    def private(self, task):
        self.read.append(task)
        keep = torch.isin(self.labels, torch.tensor(self.tasks[task]))
        return self.images[keep], self.labels[keep]

    def fingerprint(self, task):
        return f"digits {sorted(self.tasks[task])}"


@pytest.fixture(scope="module")
def digits():
    return Digits()


def builder(root, **options):
    return APIBuilder(TASKS, SHAPE, **{"archs": ("mlp", "logistic"), "epochs": 1, "root": root} | options)


def network(arch="logistic", classes=2, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_classifier(arch, SHAPE, classes)


def box(classes, name):
    return ModuleAPI(network(classes=len(classes)), classes, name=name)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("arch", "epochs"), [("lenet", 5), ("mlp", 15)])
def test_a_few_epochs_tell_two_digits_apart(arch, epochs, digits):
    trained = train_api(arch, *digits.private(0), TASKS[0], epochs, seed=1)
    images, labels = Digits(rest=1).private(0)
    with torch.no_grad():
        answers = torch.tensor(TASKS[0])[trained(images.float() / 127.5 - 1).argmax(-1)]
    assert not trained.training and (answers == labels).float().mean() > 0.95


def test_training_depends_on_its_seed_alone_and_draws_nothing_from_others(digits):
    images, labels = digits.private(0)
    found = []
    for outer, seed in ((0, 1), (5, 1), (5, 2)):
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        found.append(state(train_api("mlp", images, labels, TASKS[0], 1, seed=seed, hidden=8)))
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(found[0], found[1]) and not equal(found[1], found[2])


def test_columns_follow_the_order_of_the_classes(digits):
    images, labels = digits.private(0)
    for classes in ([3, 8], [8, 3]):
        trained = train_api("mlp", images, labels, classes, 8)
        with torch.no_grad():
            answers = torch.tensor(classes)[trained(images.float() / 127.5 - 1).argmax(-1)]
        assert (answers == labels).float().mean() > 0.95


def test_fewer_images_than_a_batch_are_one():
    images = torch.randint(0, 256, (10, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(10) % 2
    one, two = (state(train_api("mlp", images, labels, [0, 1], epochs, hidden=4)) for epochs in (1, 3))
    assert not equal(one, two)


def test_images_of_other_classes_are_refused(digits):
    with pytest.raises(ValueError, match=r"API of the classes \[3\] cannot learn from images of \[8\]"):
        train_api("mlp", *digits.private(0), [3], 1)


def test_apis_are_trained_once_and_kept(tmp_path, monkeypatch):
    data = Digits()
    first = builder(tmp_path).build("train", data)
    assert [(api.name, api.classes, api.output, api.input_shape) for api in first] == [
        ("api0-mlp", (3, 8), "logits", SHAPE),
        ("api1-logistic", (1, 0), "logits", SHAPE),
    ]
    assert data.read == [0, 1] and len(list(tmp_path.glob("*.safetensors"))) == 2
    monkeypatch.setattr("zoo.api_cl.apis.train_api", lambda *arguments, **options: pytest.fail("trained again"))
    before = torch.get_rng_state()
    again = builder(tmp_path).build("train", data)
    assert torch.equal(torch.get_rng_state(), before)
    assert data.read == [0, 1]
    for one, other in zip(first, again, strict=True):
        assert equal(state(one.module), state(other.module))
        assert not other.module.training and not any(p.requires_grad for p in other.module.parameters())


def test_a_private_network_answers_for_its_own_classes(tmp_path):
    api = builder(tmp_path, archs=["mlp"], epochs=8).build("train", Digits())[1]
    images, labels = Digits(rest=1).private(1)
    answers = torch.tensor(api.classes)[api.query(images.float() / 127.5 - 1, "probe").argmax(-1)]
    assert (answers == labels).float().mean() > 0.95


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"epochs": 2}, {"lr": 2e-3}, {"arch_options": {"mlp": {"hidden": 8}}}, {"archs": ["wrn"]}]
)
def test_another_setting_is_another_api(change, tmp_path, monkeypatch):
    made = []

    def instead(arch, images, labels, classes, *rest, **options):
        made.append(arch)
        return build_classifier(arch, SHAPE, len(classes), **options)

    monkeypatch.setattr("zoo.api_cl.apis.train_api", instead)
    data, options = Digits(), {"archs": ["mlp"]}
    builder(tmp_path, **options).build("train", data)
    builder(tmp_path, **options).build("train", data)
    assert len(made) == 2
    builder(tmp_path, **options | change).build("train", data)
    assert len(made) == 4


def test_classes_in_another_order_are_learnt_in_that_order(tmp_path):
    data = Digits()
    plain = builder(tmp_path, archs=["mlp"], epochs=8)
    api = plain.build([{"type": "train", "classes": [8, 3]}, {"type": "train"}], data)[0]
    images, labels = data.private(0)
    answers = torch.tensor([8, 3])[api.query(images.float() / 127.5 - 1, "probe").argmax(-1)]
    assert (answers == labels).float().mean() > 0.95
    # The one in the order of the task is another one.
    plain.build("train", data)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_the_same_images_as_another_task_make_an_api_of_its_own(tmp_path):
    for tasks in ([[3, 8], [1, 0]], [[1, 0], [3, 8]]):
        APIBuilder(tasks, SHAPE, ["logistic"], epochs=1, root=tmp_path).build("train", Digits(tasks=tasks))
    fresh = tmp_path / "fresh"
    tasks = [[1, 0], [3, 8]]
    kept, new = (
        APIBuilder(tasks, SHAPE, ["logistic"], epochs=1, root=root).build("train", Digits(tasks=tasks))
        for root in (tmp_path, fresh)
    )
    # What was kept is what would be trained now, whatever ran before.
    assert all(equal(state(a.module), state(b.module)) for a, b in zip(kept, new, strict=True))


def test_a_damaged_file_is_named(tmp_path):
    data = Digits()
    builder(tmp_path).build("train", data)
    path = next(tmp_path.glob("mlp-*.safetensors"))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path.name} does not hold a mlp for images .1, 8, 8. and 2 classes"):
        builder(tmp_path).build("train", data)


def test_objects_weights_and_trained_ones_mix(tmp_path):
    tasks = [[3, 8], [1, 0], [2, 4, 5], [6, 7]]
    mine, kept = box([8, 3], "mine"), network(classes=3, seed=4)
    save_file(kept.state_dict(), tmp_path / "kept.safetensors")
    plain = APIBuilder(tasks, SHAPE, ["logistic"], epochs=1, options={"decimals": 4, "max_batch": 10}, root=tmp_path)
    module = {"type": "module", "weights": str(tmp_path / "kept.safetensors"), "decimals": 2, "name": "kept"}
    described = [
        mine, {"type": "train", "topk": 1}, {**module, "classes": [5, 2, 4]},
        {"type": "http", "url": "http://127.0.0.1:9", "max_batch": 7},
    ]  # fmt: skip
    apis = plain.build(described, Digits(tasks=tasks))
    assert apis[0] is mine
    assert (apis[1].name, apis[1].topk, apis[1].decimals, apis[1].max_batch) == ("api1-logistic", 1, 4, 10)
    assert (apis[2].name, apis[2].classes, apis[2].decimals) == ("kept", (5, 2, 4), 2)
    images = torch.rand(4, *SHAPE)
    torch.testing.assert_close(apis[2].query(images, "probe"), kept(images).softmax(-1).detach().round(decimals=2))
    assert (apis[3].name, apis[3].classes, apis[3].max_batch, apis[3].input_shape) == ("api3", (6, 7), 7, SHAPE)
    apis[3].close()
    # What is described may be described again.
    assert described[1] == {"type": "train", "topk": 1}


def test_reading_weights_draws_nothing(tmp_path):
    save_file(network(seed=3).state_dict(), tmp_path / "a.safetensors")
    before = torch.get_rng_state()
    found = load_network(tmp_path / "a.safetensors", "logistic", SHAPE, 2)
    assert torch.equal(torch.get_rng_state(), before) and equal(state(found), state(network(seed=3)))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors is missing: expected the weights of a mlp"):
        load_network(path, "mlp", SHAPE, 2)
    save_file(network().state_dict(), path)
    for arch, classes in (("mlp", 2), ("logistic", 3)):
        with pytest.raises(ValueError, match=f"does not hold a {arch} .* {classes} classes"):
            load_network(path, arch, SHAPE, classes)


@pytest.mark.parametrize(
    ("apis", "message"),
    [
        ([([3, 8], "a"), ([8, 0], "b")], "APIs 'a' and 'b' both declare the class 8"),
        (
            [([3, 1], "a"), ([8, 0], "b")],
            r"API 'a' declares \[3, 1\], but task 0 .*: missing \[8\], unk.*\[1\]",
        ),
        ([([3, 8], "a"), ([1], "b")], r"API 'b' declares \[1\].*missing \[0\], unknown none"),
        ([([3, 8], "a"), ([1, 0, 5], "b")], r"API 'b' .*missing none, unknown \[5\]"),
        ([([3, 8], "a"), ([1, 0], "a")], "APIs of tasks 0 and 1 are both named 'a'"),
    ],
)
def test_apis_that_do_not_share_out_the_classes_are_refused(apis, message, tmp_path):
    boxes = [box(classes, name) for classes, name in apis]
    with pytest.raises(ValueError, match=message):
        check_classes(boxes, TASKS)
    with pytest.raises(ValueError, match=message):
        builder(tmp_path).build(boxes, None)


def test_classes_in_any_order_fit():
    check_classes([box([8, 3], "a"), box([0, 1], "b")], TASKS)


GOOD = {"type": "http", "url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("apis", "message"),
    [
        ("trained", "apis must be 'train' or a list with one API a task, got 'trained'"),
        ([GOOD], "apis has 1 entries for 2 tasks"),
        (["train", GOOD], r"apis\[0\] is 'train': expected an API, or a mapping"),
        ([GOOD, {"type": "grpc"}], r"apis\[1\] has the type 'grpc': expected one of train, module, http"),
        ([GOOD, {"url": "http://x"}], r"apis\[1\] has the type None"),
        ([{"type": "http"}, GOOD], r"apis\[0\] of type http needs a url"),
        ([{**GOOD, "arch": "mlp"}, GOOD], r"apis\[0\] has no option 'arch': it has url, protocol"),
        ([{"type": "module"}, GOOD], r"apis\[0\] of type module needs weights"),
        ([{"type": "train", "url": "x"}, GOOD], r"apis\[0\] has no option 'url': it has decimals, topk"),
        ([{"type": "train"}, GOOD], r"apis\[0\] is to be trained on the spot.*ClassStreamData"),
    ],
)
def test_descriptions_that_say_too_little_or_too_much_are_refused(apis, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        builder(tmp_path).build(apis, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"archs": ["lenet", "vit"]}, "api_archs has 'vit': expected some of lenet"),
        ({"archs": []}, "api_archs has 'no name'"),
        ({"arch_options": {"vit": {}}}, "api_arch_options has 'vit'"),
        ({"epochs": 0}, "api_epochs and api_lr must be positive, got 0"),
        ({"lr": 0.0}, "api_epochs and api_lr must be positive"),
        ({"options": {"digits": 4}}, "api_options has no 'digits': it has decimals"),
    ],
)
def test_settings_out_of_range_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        builder(tmp_path, **options)
