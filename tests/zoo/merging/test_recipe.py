"""Base and experts trained on the spot."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from tests.zoo.merging.small_experts import CLASSES, QUIET, SIZE, TASKS, encoder, equal, image_data, images, trainer
from zoo.merging import AdaMerging, MergedClassifier, RepresentationSurgery, load_heads
from zoo.merging.backbones import build_encoder
from zoo.merging.finetune import prototype_heads
from zoo.merging.recipe import Recipe, shifted, train_experts

pytestmark = QUIET

FEW = {"pretrain_epochs": 2, "pretrain_batch_size": 6, "epochs": 2, "batch_size": 12, "warmup_steps": 2}
TINY = {"kind": "mlp", "image_size": SIZE, "hidden_size": 16, "num_layers": 1, "output_size": 8}


def data(**options):
    return image_data(images(), pretrain_images=12, **options)


def train(root, recipe=FEW, **options):
    torch.manual_seed(1)
    base = encoder()
    settings = {"tasks": list(CLASSES), "seed": 3, "progress": False, **options}
    heads = prototype_heads(CLASSES, 8, 16.0)
    return train_experts(root, base, heads, data(), Recipe.from_options(recipe), **settings)


def weights_of(folder):
    found = {task: build_encoder(path).state_dict() for task, path in folder.experts.items()}
    return {**found, "": build_encoder(folder.pretrained).state_dict()}


def test_base_and_experts_differ_and_a_second_training_gives_the_same(tmp_path):
    one, two = (weights_of(train(tmp_path / name)) for name in ("one", "two"))
    assert list(one) == [*CLASSES, ""]
    assert all(equal(one[task], two[task]) for task in one)
    fresh = encoder().state_dict()
    names = [*one]
    assert not any(equal(one[a], one[b]) for a in names for b in names if a < b)
    assert not any(equal(fresh, one[a]) for a in names)


def test_the_second_call_reads_what_the_first_one_trained(tmp_path):
    folder = train(tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*") if path.is_file()}
    again = train(tmp_path / "run", seed=9)
    assert again == folder
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("*") if path.is_file()} == files


def test_an_expert_does_not_depend_on_what_is_drawn_outside_and_draws_nothing_itself(tmp_path):
    torch.manual_seed(11)
    folder = train_experts(
        tmp_path / "a", encoder(), prototype_heads(CLASSES, 8, 16.0), data(),
        Recipe.from_options(FEW), tasks=list(CLASSES), seed=3, progress=False,
    )  # fmt: skip
    before = encoder()
    torch.manual_seed(12)
    state = torch.random.get_rng_state()
    kept = copy.deepcopy(before.state_dict())
    heads = prototype_heads(CLASSES, 8, 16.0)
    other = train_experts(
        tmp_path / "b", before, heads, data(), Recipe.from_options(FEW), tasks=list(CLASSES), seed=3, progress=False
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert equal(before.state_dict(), kept) and not before.training
    for task, found in weights_of(folder).items():
        assert equal(found, weights_of(other)[task])
    saved = load_heads(other.heads)
    assert all(torch.equal(saved[task].weight, heads[task].weight) for task in CLASSES)


def test_a_joint_encoder_is_trained_on_request(tmp_path):
    assert train(tmp_path / "without").joint is None
    folder = train(tmp_path / "with", {**FEW, "joint_epochs": 1})
    assert folder.joint is not None
    joint = build_encoder(folder.joint).state_dict()
    assert not any(equal(joint, found) for found in weights_of(folder).values())
    without = weights_of(train(tmp_path / "without"))
    assert all(equal(found, without[task]) for task, found in weights_of(folder).items())


def test_no_pretraining_leaves_the_fresh_weights_as_the_base(tmp_path):
    folder = train(tmp_path / "run", {**FEW, "pretrain_epochs": 0})
    assert equal(build_encoder(folder.pretrained).state_dict(), encoder().state_dict())


def module(kind=AdaMerging, recipe=FEW, **options):
    torch.manual_seed(6)
    return kind(TASKS, **{"recipe": recipe, "encoder_options": TINY, **options})


def test_modules_of_one_recipe_share_the_experts_and_others_do_not(tmp_path):
    fits = {}

    def fit(name, made, **options):
        fits[name] = made
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(made, datamodule=data(**options))
        return made.folder.root

    first = fit("first", module())
    assert first.parent == tmp_path / "experts"
    assert fit("surgery", module(RepresentationSurgery, rank=2, cache_features=False)) == first
    assert fit("merged", module(MergedClassifier)) == first
    # Of what the experts depend on, nothing may be another.
    other = fit("epochs", module(recipe={**FEW, "epochs": 3}))
    scale = fit("scale", module(head_scale=5.0))
    deeper = fit("deeper", module(encoder_options={**TINY, "num_layers": 2}))
    fewer = fit("fewer", module(), max_images=40)
    assert len({first, other, scale, deeper, fewer}) == 5
    # The stream is none of it.
    assert fit("train", module(), adapt_fraction=0.9) == first
    base = build_encoder(first / "pretrained").backbone.state_dict()
    assert equal(fits["first"].store.state_dict(0.0), base)
    assert equal(fits["first"].encoder.backbone.state_dict(), base)


def test_a_checkpoint_finds_its_experts_without_data(tmp_path):
    made = module()
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(made, datamodule=data())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    loaded = AdaMerging.load_from_checkpoint(tmp_path / "run.ckpt")
    loaders = data().predict_dataloader()
    one, other = (trainer(tmp_path / "elsewhere").predict(m, loaders) for m in (made, loaded))
    assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    shutil.rmtree(tmp_path / "experts")
    with pytest.raises(FileNotFoundError, match="is no folder of experts"):
        trainer(tmp_path).predict(AdaMerging.load_from_checkpoint(tmp_path / "run.ckpt"), loaders)


def test_a_recipe_needs_a_data_module_and_an_encoder_of_the_room(tmp_path):
    with pytest.raises(ValueError, match="a recipe trains on the data module's labelled images"):
        trainer(tmp_path).predict(module(), data().predict_dataloader())
    with pytest.raises(ValueError, match="a recipe needs an encoder of build_encoder"):
        AdaMerging(TASKS, recipe=FEW, encoder=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "recipe has no option 'steps': it has pretrain_epochs, pretrain_lr"),
        ({"epochs": 0}, "recipe: epochs must be positive, got 0"),
        ({"lr": -0.1}, "recipe: lr must be positive, got -0.1"),
        ({"joint_epochs": -1}, "recipe: joint_epochs must be at least 0, got -1"),
        ({"batch_size": "many"}, "recipe: batch_size must be a number, got 'many'"),
        ({"epochs": True}, "recipe: epochs must be a number, got True"),
        ({"epochs": 2.5}, "recipe: epochs must be a whole number, got 2.5"),
        ({"lr": float("nan")}, "recipe: lr must be positive, got nan"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_options(options)
    with pytest.raises(ValueError, match=message):
        module(recipe=options)


def test_the_key_tells_settings_and_context_apart():
    recipe = Recipe.from_options(FEW)
    assert recipe.key("a", [1]) == Recipe.from_options(dict(reversed(FEW.items()))).key("a", [1])
    others = [recipe.key("a", [2]), recipe.key("a"), Recipe.from_options({**FEW, "lr": 1e-4}).key("a", [1])]
    assert len({recipe.key("a", [1]), *others}) == 4
    assert Recipe.from_options({}) == Recipe()


def test_shifted_images_are_windows_of_the_padded_one():
    images = torch.rand(40, 3, 5, 6)
    moved = shifted(images, 2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    found = set()
    for image, result in zip(padded, moved, strict=True):
        places = [
            (top, left) for top in range(5) for left in range(5)
            if torch.equal(image[:, top : top + 5, left : left + 6], result)
        ]  # fmt: skip
        assert len(places) == 1
        found.add(places[0])
    assert {0, 4} <= {top for top, _ in found} and {0, 4} <= {left for _, left in found} and len(found) > 15
    assert shifted(images, 0) is images


def test_shifts_change_what_is_learnt_and_are_the_same_every_time(tmp_path):
    plain, moved, again = (
        weights_of(train(tmp_path / name, {**FEW, "shift": shift})) for name, shift in (("a", 0), ("b", 1), ("c", 1))
    )
    assert all(equal(moved[name], again[name]) for name in moved)
    assert not any(equal(moved[name], plain[name]) for name in moved)
