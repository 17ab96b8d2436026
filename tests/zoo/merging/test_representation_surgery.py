"""Surgery on merged encoders: what is trained, on what, and what it must not touch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from tests.zoo.merging.small_experts import (
    CLASSES,
    DIM,
    QUIET,
    SIZE,
    TASKS,
    Net,
    clip,
    encoder,
    equal,
    expert_folder,
    image_data,
    images,
    moved,
    net,
    rows,
    states,
    stream,
    task_loaders,
    trainer,
    weights,
)
from zoo.merging import (
    AdaMerging,
    CosineHead,
    MergedClassifier,
    MergedModel,
    RepresentationSurgery,
    TaskVectorStore,
)
from zoo.merging.backbones import build_encoder
from zoo.merging.feature_cache import fingerprint_of
from zoo.merging.one_shot import task_arithmetic, weight_average
from zoo.merging.surgery import SurgeryBank

pytestmark = QUIET


def module(network=None, **options):
    network = network or net()
    torch.manual_seed(1)
    settings = {
        "experts": states(network),
        "pretrained": network,
        "heads": weights(),
        "rank": 2,
        "cache_features": False,
    }
    return RepresentationSurgery(TASKS, **{**settings, **options})


def on_folder(root, network=None, **options):
    folder = expert_folder(root / "experts", network)
    torch.manual_seed(1)
    return RepresentationSurgery(TASKS, experts=str(folder.root), **{"rank": 3, **options})


def result(model, data, folder):
    kind = "dataloaders" if isinstance(data, list) else "datamodule"
    return trainer(folder).test(model, verbose=False, **{kind: data})[0]


def features(network, loader):
    with torch.no_grad():
        return torch.cat([network(batch["pixel_values"]) for batch in loader])


@pytest.mark.parametrize(
    ("base", "depth"), [("task_arithmetic", "last"), ("average", "last"), ("ties", "last"), ("average", "all")]
)
def test_it_starts_as_the_merged_model_exactly(tmp_path, base, depth):
    data = image_data()
    model = on_folder(tmp_path, clip() if depth == "all" else None, base=base, depth=depth)
    found = result(model, data, tmp_path)
    plain = MergedClassifier(TASKS, rule=base, experts=str(tmp_path / "experts"))
    merged = result(plain, data, tmp_path)
    assert {name: found[name] for name in merged} == merged
    for task in CLASSES:
        assert found[f"test/bias_l1/{task}"] == found[f"test/bias_l1_before/{task}"] > 0
    assert equal(model.merged_encoder.state_dict(), plain.with_weights(plain.merged()).state_dict())


def test_the_loss_and_the_first_gradients_are_those_of_the_equations(tmp_path):
    base = net()
    model = module(base)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(model, stream())
    merged = Net().eval()
    merged.load_state_dict(task_arithmetic(base.state_dict(), states(base), coef=0.3))
    batch = next(iter(stream()))[0]
    total = 0.0
    for task in CLASSES:
        expert = Net().eval()
        expert.load_state_dict(states(base)[task])
        z, z_ind = (one(batch[task]["pixel_values"]).detach() for one in (merged, expert))
        loss = (z - z_ind).abs().mean()
        assert float(fit.callback_metrics[f"train/loss/{task}"]) == pytest.approx(float(loss), rel=1e-4)
        total += float(loss)
        down, up = model.bank[task].down.weight, model.bank[task].up.weight
        assert bool((down.grad == 0).all()) and float(up.grad.abs().max()) > 0
        # The other tasks' losses have no part in it: W_up's gradient is -sign(z - z_ind)^T relu(W_down z) / (B d).
        torch.manual_seed(1)
        fresh = SurgeryBank(list(CLASSES), DIM, 2)[task].down.weight.detach()
        expected = -(z - z_ind).sign().T @ torch.relu(z @ fresh.T) / z.numel()
        torch.testing.assert_close(up.grad, expected, rtol=1e-3, atol=1e-6)
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(total / 3, rel=1e-4)


def test_training_on_kept_features_is_training_on_images(tmp_path):
    trained = []
    for cache in (True, False):
        model = on_folder(tmp_path, cache_features=cache)
        before = copy.deepcopy(model.bank.state_dict())
        trainer(tmp_path, max_steps=6).fit(model, datamodule=image_data())
        assert not equal(before, model.bank.state_dict())
        trained.append(model.bank.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-5, atol=1e-5)


def test_nothing_but_the_bank_changes_is_registered_or_saved(tmp_path):
    base = net(dropout=0.5, batch_norm=True)
    experts = {task: moved(base, 10 + k) for k, task in enumerate(CLASSES)}
    # Networks in training mode: dropout would show at once.
    for one in (base, *experts.values()):
        one.train()
    model = module(base, experts=experts)
    fit = trainer(tmp_path, max_steps=0)
    fit.fit(model, stream())
    parts = {"base": base, **experts, "merged": model.merged_encoder, "network": model.encoder, "heads": model.heads}
    parts |= {f"opened {task}": model.expert(task) for task in CLASSES}
    before = {name: fingerprint_of(dict(part.state_dict())) for name, part in parts.items()}
    bank = copy.deepcopy(model.bank.state_dict())
    fit = trainer(tmp_path, max_steps=4)
    fit.fit(model, stream())
    assert {name: fingerprint_of(dict(part.state_dict())) for name, part in parts.items()} == before
    assert all(p.grad is None for part in parts.values() for p in part.parameters())
    assert not any(m.training for part in (model.merged_encoder, model.expert("c")) for m in part.modules())
    assert not any(torch.equal(bank[name], model.bank.state_dict()[name]) for name in bank if "up" in name)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"bank"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"bank", "heads"}
    fit.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"bank", "heads"}


def test_all_tasks_in_one_step_are_each_task_alone(tmp_path):
    base = net()
    merged = moved(base, 50)
    together = module(base, merged=merged)
    start = copy.deepcopy(together.bank)
    trainer(tmp_path, max_steps=2).fit(together, stream())
    for task in CLASSES:
        alone = module(base, merged=merged, merge_tasks=[task])
        alone.bank[task].load_state_dict(start[task].state_dict())
        trainer(tmp_path, max_steps=2).fit(alone, stream([task]))
        for name, tensor in alone.bank[task].state_dict().items():
            torch.testing.assert_close(together.bank[task].state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


def test_labels_in_the_stream_change_nothing_bit_for_bit(tmp_path):
    trained = []
    for labels in (True, False):
        model = module()
        trainer(tmp_path, max_steps=3).fit(model, stream(labels=labels))
        trained.append(model.bank.state_dict())
    assert equal(*trained)


@pytest.mark.parametrize(("surgery", "rank"), [("shift", 3), ("linear", 3), ("linear", 8), ("linear", 16)])
def test_the_controls_are_fitted_in_closed_form_to_the_stream(tmp_path, surgery, rank):
    model = on_folder(tmp_path, surgery=surgery, rank=rank)
    data = image_data()
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(model, datamodule=data)
    assert fit.current_epoch <= 1
    for task in CLASSES:
        shown, _ = data.images(task, "test")
        inputs = data._normalise(shown)
        with torch.no_grad():
            z, z_ind = model.merged_encoder(inputs).double(), model.expert(task)(inputs).double()
            repaired = model.bank(z.float(), task).double()
        if surgery == "shift":
            expected = z - (z - z_ind).mean(0)
        elif rank >= 8:
            expected = z @ torch.linalg.lstsq(z, z_ind).solution
        else:
            full = z @ torch.linalg.lstsq(z, z - z_ind).solution
            main = torch.linalg.svd(full, full_matrices=False).Vh[:rank].T
            expected = z - full @ main @ main.T
        torch.testing.assert_close(repaired, expected, rtol=1e-3, atol=1e-4)
    found = result(model, data, tmp_path)
    assert all(found[f"test/bias_l1/{task}"] < found[f"test/bias_l1_before/{task}"] for task in CLASSES)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    loaded = RepresentationSurgery.load_from_checkpoint(tmp_path / "run.ckpt")
    assert equal(loaded.bank.state_dict(), model.bank.state_dict())


@pytest.mark.parametrize("cache", [True, False])
def test_surgery_at_every_block_trains_and_leaves_the_encoder_as_it_was(tmp_path, cache):
    model = on_folder(tmp_path, clip(), depth="all", rank=2, lr=1e-2, cache_features=cache)
    data = image_data()
    fit = trainer(tmp_path, max_steps=0)
    fit.fit(model, datamodule=data)
    batch = next(iter(data.eval_loader("c", "test")))
    plain = model.merged_encoder(batch.images)
    fit = trainer(tmp_path, max_steps=12)
    fit.fit(model, datamodule=data)
    assert torch.equal(model.merged_encoder(batch.images), plain)
    found = result(model, data, tmp_path)
    assert sum(found[f"test/bias_l1/{task}"] for task in CLASSES) < sum(
        found[f"test/bias_l1_before/{task}"] for task in CLASSES
    )
    # Two blocks of width 16, and 8 projected features, of rank 2.
    per_task = 2 * 2 * 16 * 2 + 2 * 8 * 2
    assert sum(parameter.numel() for parameter in model.bank.parameters()) == 3 * per_task
    assert {name.split(".")[0] for name in model.state_dict()} == {"bank", "heads"}
    fit.save_checkpoint(tmp_path / "run.ckpt")
    loaded = RepresentationSurgery.load_from_checkpoint(tmp_path / "run.ckpt")
    loaders = data.predict_dataloader()
    for one, other in zip(*(trainer(tmp_path).predict(m, loaders) for m in (model, loaded)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for some in (model, loaded):
        deployed = some.as_task_model("c")
        assert torch.equal(deployed(batch.images), some.task_logits(batch, "c"))
        assert set(some.export()) == set(CLASSES)


def test_kept_targets_of_all_blocks_train_as_fresh_ones_do(tmp_path):
    trained = []
    for cache in (True, False):
        model = on_folder(tmp_path, clip(), depth="all", cache_features=cache)
        trainer(tmp_path, max_steps=3).fit(model, datamodule=image_data())
        trained.append(model.bank.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-4, atol=1e-5)


def test_online_surgery_makes_one_step_an_image_and_keeps_none(tmp_path):
    model = module(online=True, cache_features=True)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(model, stream(batch_size=1))
    assert model._cache is None
    # The longest stream has 32 images.
    assert fit.global_step == 32
    plain = module(cache_features=False)
    trainer(tmp_path, max_epochs=1).fit(plain, stream(batch_size=1))
    assert equal(plain.bank.state_dict(), model.bank.state_dict())


def test_a_merged_model_of_ones_own_is_repaired_whatever_it_is(tmp_path):
    base = net()
    merged = Net(dropout=0.5)
    merged.load_state_dict(weight_average(base.state_dict(), states(base)))
    merged.train()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    store = TaskVectorStore.from_checkpoints(base, states(base))
    given = [
        merged,
        merged.state_dict(),
        str(tmp_path / "merged.safetensors"),
        MergedModel(copy.deepcopy(base), store, 1 / 3),
    ]
    expected = module(base, base="average")
    trainer(tmp_path, max_steps=3).fit(expected, stream())
    for one in given:
        model = module(base, merged=one)
        trainer(tmp_path, max_steps=3).fit(model, stream())
        for name, tensor in expected.bank.state_dict().items():
            torch.testing.assert_close(model.bank.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
        assert result(model, task_loaders(), tmp_path) == pytest.approx(
            result(expected, task_loaders(), tmp_path), rel=1e-4, abs=1e-6
        )
    # A module of the user's stays in the user's mode.
    assert merged.training and all(parameter.requires_grad for parameter in merged.parameters())


def test_coefficients_of_adamerging_are_a_base(tmp_path):
    folder = expert_folder(tmp_path / "experts")
    learnt = AdaMerging(TASKS, experts=str(folder.root))
    trainer(tmp_path, max_steps=2).fit(learnt, datamodule=image_data())
    learnt.export_coefficients(tmp_path / "coef.safetensors")
    options = {"coef_path": str(tmp_path / "coef.safetensors")}
    model = on_folder(tmp_path, base="adamerging", base_options=options)
    found, merged = (result(one, image_data(), tmp_path) for one in (model, learnt))
    assert {name: found[name] for name in merged} == pytest.approx(merged, rel=1e-5)


def test_a_bank_for_another_merged_model_is_refused_unless_told(tmp_path):
    data = image_data()
    model = on_folder(tmp_path, base="average")
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(model, datamodule=data)
    path = tmp_path / "run.ckpt"
    fit.save_checkpoint(path)
    loaders = data.predict_dataloader()
    for one, other in zip(
        *(trainer(tmp_path).predict(m, loaders) for m in (model, RepresentationSurgery.load_from_checkpoint(path))),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    message = "trained on another merged encoder than this one"
    other = {"base": "task_arithmetic", "base_options": {"coef": 0.2}}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).predict(RepresentationSurgery.load_from_checkpoint(path, **other), loaders)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).predict(on_folder(tmp_path, **other), loaders, ckpt_path=path)
    trainer(tmp_path).predict(on_folder(tmp_path, strict_fingerprint=False, **other), loaders, ckpt_path=path)
    loose = RepresentationSurgery.load_from_checkpoint(path, strict_fingerprint=False, **other)
    trainer(tmp_path).predict(loose, loaders)
    assert equal(loose.bank.state_dict(), model.bank.state_dict())


def test_a_task_model_stands_alone(tmp_path):
    base = net()
    model = module(base)
    trainer(tmp_path, max_steps=3).fit(model, stream())
    for task in CLASSES:
        batch = next(iter(DataLoader(rows(task), batch_size=8)))
        deployed = model.as_task_model(task)
        z = model.merged_encoder(batch["pixel_values"])
        expected = CosineHead(weights()[task])(model.bank(z, task))
        torch.testing.assert_close(deployed(batch), expected)
        torch.testing.assert_close(model.task_logits(batch, task), expected)
        again = copy.deepcopy(deployed)
        again.surgery.load_state_dict(model.export()[task])
        assert torch.equal(again(batch), deployed(batch))


def test_the_bias_is_the_mean_difference_over_all_images_before_and_after(tmp_path, figures):
    model = module(lr=0.05)
    trainer(tmp_path, max_steps=8).fit(model, stream())
    found = result(model, task_loaders(), tmp_path)
    for task, loader in zip(CLASSES, task_loaders(), strict=True):
        z, z_ind = (features(one, loader) for one in (model.merged_encoder, model.expert(task)))
        with torch.no_grad():
            after = F.l1_loss(model.bank(z, task), z_ind)
        assert found[f"test/bias_l1_before/{task}"] == pytest.approx(float(F.l1_loss(z, z_ind)), rel=1e-5)
        assert found[f"test/bias_l1/{task}"] == pytest.approx(float(after), rel=1e-5)
    assert (tmp_path / "tables/test/bias_l1.jsonl").exists()
    assert (tmp_path / "figures/test/bias_l1.png").exists()


@pytest.mark.parametrize("options", [{"loss": "mse"}, {"loss": "cosine"}, {"match": "normalized"}, {"bias": True},
                                     {"activation": "gelu"}])  # fmt: skip
def test_other_losses_and_modules_train_too(tmp_path, options):
    model = module(lr=0.02, **options)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(model, stream())
    first = float(fit.callback_metrics["train/loss"])
    fit = trainer(tmp_path, max_steps=20)
    fit.fit(model, stream())
    assert float(fit.callback_metrics["train/loss"]) < first


def test_unseen_tasks_are_not_repaired(tmp_path):
    seen = ["c", "a.b"]
    model = module(merge_tasks=seen)
    trainer(tmp_path, max_steps=3).fit(model, stream(seen))
    found = result(model, task_loaders(), tmp_path)
    plain = MergedClassifier(TASKS, experts=states(net()), pretrained=net(), heads=weights(), merge_tasks=seen)
    assert found["test/acc/keys"] == found["test/acc/unseen"]
    assert found["test/entropy/keys"] == result(plain, task_loaders(), tmp_path)["test/entropy/keys"]
    assert "test/bias_l1/keys" not in found
    assert found["test/acc/seen"] == pytest.approx((found["test/acc/c"] + found["test/acc/a.b"]) / 2)


def test_features_kept_on_disk_are_found_again_and_never_those_of_other_weights(tmp_path):
    def trained(name, **options):
        model = on_folder(tmp_path, options.pop("network", None), **options)
        trainer(tmp_path, max_steps=3).fit(model, datamodule=image_data())
        return model.bank.state_dict()

    kept = {"cache_dir": str(tmp_path / "kept")}
    expected = trained("fresh")
    assert equal(trained("first", **kept), expected)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(files) >= 3
    assert equal(trained("second", **kept), expected)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == files
    other = {"network": moved(encoder(), 7)}
    assert equal(trained("other experts", **other, **kept), trained("other experts", **other))
    assert not equal(trained("other experts", **other), expected)


@pytest.mark.filterwarnings("ignore:.*ddp_fork.*")
def test_two_processes_train_what_one_does_at_the_same_global_batch(tmp_path):
    trained = []
    for size, options in ((8, {}), (4, {"strategy": "ddp_fork", "devices": 2})):
        model = on_folder(tmp_path)
        fit = trainer(tmp_path, max_steps=4, limit_val_batches=0, **options)
        fit.fit(model, datamodule=image_data(images(), batch_size=size))
        trained.append(model.bank.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_merged_repaired_and_experts_features_are_pictured_on_request(tmp_path, figures):
    model = on_folder(tmp_path, tsne_images=6)
    result(model, image_data(), tmp_path)
    assert (tmp_path / "figures/test/tsne.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must lie between 1 and the 5 channels of the features, got 0"),
        ({"rank": 6}, "rank must lie between 1 and the 5 channels of the features, got 6"),
        ({"base": "mean"}, "the rule must be one of pretrained, joint, average, .*got 'mean'"),
        ({"base": "ties", "base_options": {"drop": 1}}, "ties has no option 'drop'"),
        ({"surgery": "quadratic"}, "surgery must be one of lowrank, linear, shift, got 'quadratic'"),
        ({"depth": "first"}, "depth must be one of last, all, got 'first'"),
        ({"depth": "all", "surgery": "shift"}, "surgery='shift' has a closed form for depth='last' only"),
        ({"depth": "all"}, "depth='all' needs an encoder of build_encoder"),
        ({"loss": "l0"}, "loss"),
        ({"match": "scaled"}, "match"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"heads": dict.fromkeys(CLASSES, nn.Identity())}, "the number of features is not known: Net has no `dim`"),
        ({"experts": {"c": net()}}, "experts has c, but not a.b, keys of the tasks"),
        ({"heads": {"c": weights()["c"]}}, "there is no head for a.b, keys: heads has c"),
    ],
)
def test_an_option_that_cannot_be_is_refused_when_the_module_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_full_rank_is_warned_of():
    with pytest.warns(UserWarning, match="rank 5 is the full width of the features"):
        module(rank=5)


def test_a_network_without_a_list_of_blocks_is_refused_with_the_option(tmp_path):
    class Plain(nn.Module):
        config = {"image_size": SIZE, "num_channels": 3}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3 * SIZE * SIZE, 8)

        def forward(self, images):
            return self.inner(images.flatten(1))

    from zoo.merging.backbones import ImageEncoder

    base = ImageEncoder(Plain(), 8)
    with pytest.raises(ValueError, match="blocks="):
        module(base, heads=weights(8), depth="all")
    with pytest.raises(ValueError, match=r"no\.such"):
        on_folder(tmp_path, clip(), depth="all", blocks="no.such")


def test_features_that_differ_in_shape_are_refused_with_both_shapes(tmp_path):
    wide = nn.Sequential(nn.Linear(6, 7))
    with pytest.raises(ValueError, match=r"task a.b, batch 0: .*\(8, 7\), of the expert \(8, 5\).*feature_fn"):
        trainer(tmp_path, max_steps=1).fit(module(merged=wide), stream())


def test_features_that_are_not_finite_are_refused_with_task_and_batch(tmp_path):
    loaders = stream()
    broken = loaders.flattened[1].dataset
    broken[9]["pixel_values"][0] = torch.nan
    with pytest.raises(
        ValueError, match="task keys, batch 1: features of the merged encoder hold NaN or infinity in 1"
    ):
        trainer(tmp_path, max_steps=3).fit(module(), loaders)


def test_keeping_features_needs_numbered_images(tmp_path):
    with pytest.raises(ValueError, match=r"cache_features needs a data module .* or set cache_features=False"):
        trainer(tmp_path, max_steps=1).fit(module(cache_features=True), stream())


def test_a_merged_encoder_that_equals_an_expert_is_warned_of(tmp_path):
    folder = expert_folder(tmp_path / "experts")
    model = on_folder(tmp_path, merged=build_encoder(folder.experts["c"]))
    with pytest.warns(UserWarning, match=r"features of \['c'\] are the expert's own"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=image_data())
    with pytest.warns(UserWarning, match=r"features of \['c'\] are the expert's own"):
        result(module(merged=states(net())["c"]), task_loaders(), tmp_path)


def test_a_stream_or_an_evaluation_of_other_tasks_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"the training batch has the tasks a.b, c, the merged experts are a.b, keys, c"
    ):
        trainer(tmp_path, max_steps=1).fit(module(), stream(["a.b", "c"]))
    with pytest.raises(ValueError, match=r"a batch of task None came from loader 3, the tasks are a.b, keys, c"):
        result(module(), [*task_loaders(), *task_loaders(["c"])], tmp_path)


def test_the_merged_encoder_is_there_from_setup_on_and_says_so_before():
    with pytest.raises(RuntimeError, match="setup"):
        module().as_task_model("c")
