"""Names of weights fitted to those of a reference."""

from __future__ import annotations

import pytest

from zoo.merging.key_maps import map_names

VISION = ["embeddings.class_embedding", "encoder.layers.0.self_attn.q_proj.weight", "post_layernorm.weight"]
TEXT = ["embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight", "final_layer_norm.weight"]
CLIP = [
    "logit_scale",
    *(f"text_model.{name}" for name in TEXT),
    *(f"vision_model.{name}" for name in VISION),
    "visual_projection.weight",
    "text_projection.weight",
]


def under(prefix: str, names: list[str]) -> list[str]:
    return [prefix + name for name in names]


def mapped(names: list[str], reference: list[str] | None) -> list[str]:
    return list(map_names(names, "auto", reference, "expert x").values())


@pytest.mark.parametrize("ours", ["", "vision_model.", "model.", "backbone.", "module.", "model.vision_model."])
@pytest.mark.parametrize("theirs", ["", "vision_model.", "model.", "backbone.", "module.", "model.vision_model."])
def test_prefixes_are_exchanged_in_both_directions(ours: str, theirs: str) -> None:
    names = under(theirs, VISION)
    assert map_names(names, "auto", under(ours, VISION), "x") == dict(zip(names, under(ours, VISION), strict=True))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("ours", ["", "vision_model."])
def test_of_a_whole_clip_a_vision_model_takes_the_vision_side(prefix: str, ours: str) -> None:
    found = map_names(under(prefix, CLIP), "auto", under(ours, VISION), "x")
    assert found == {f"{prefix}vision_model.{name}": ours + name for name in VISION}


def test_of_a_whole_clip_a_text_model_takes_the_text_side() -> None:
    assert mapped(CLIP, TEXT) == TEXT


def test_a_projection_is_taken_where_the_reference_has_one() -> None:
    assert set(mapped(CLIP, [*under("vision_model.", VISION), "visual_projection.weight"])) == {
        *under("vision_model.", VISION),
        "visual_projection.weight",
    }


def test_a_whole_clip_is_its_own_reference() -> None:
    assert mapped(CLIP, CLIP) == CLIP


def test_a_vision_model_fits_the_vision_side_of_a_whole_clip() -> None:
    assert mapped(VISION, CLIP) == under("vision_model.", VISION)


def test_a_vision_tensor_that_does_not_fit_is_not_passed_over() -> None:
    deeper = "encoder.layers.1.self_attn.q_proj.weight"
    assert mapped([*CLIP, f"vision_model.{deeper}"], VISION) == [*VISION, deeper]


def test_layers_that_both_towers_have_are_told_apart_by_the_reference() -> None:
    layer = "encoder.layers.0.self_attn.q_proj.weight"
    both = [f"text_model.{layer}", f"vision_model.{layer}"]
    assert map_names(both, "auto", VISION, "x") == {both[1]: layer}
    assert map_names(both, "auto", TEXT, "x") == {both[0]: layer}
    assert mapped(both, CLIP) == both
    # A text tower alone never passes for a vision tower, nor the other way round.
    assert mapped(both[:1], VISION) == mapped(both[1:], TEXT) == []
    with pytest.raises(ValueError, match=r"expert x: 'enc.*' may be '(text|vision)_model.*' or .*; give key_map"):
        mapped([layer], CLIP)


def test_names_like_those_of_clip_stay_in_other_models() -> None:
    assert mapped(["layer.weight", "logit_scale"], ["layer.weight"]) == ["layer.weight", "logit_scale"]


def test_wrappers_inside_names_are_seen_through_on_both_sides() -> None:
    compiled = ["net._orig_mod.0.weight", "head.weight"]
    assert mapped(["net.0.weight", "head.weight"], compiled) == compiled
    assert mapped(compiled, ["net.0.weight", "head.weight"]) == ["net.0.weight", "head.weight"]
    assert mapped(["_fsdp_wrapped_module.a._checkpoint_wrapped_module.w"], ["a.w"]) == ["a.w"]


def test_without_a_reference_only_wrappers_go() -> None:
    assert mapped(["module._orig_mod.model.a", "module._orig_mod.model.b"], None) == ["model.a", "model.b"]
    assert mapped(["module.a", "b"], None) == ["module.a", "b"]
    assert mapped(under("vision_model.", VISION), None) == under("vision_model.", VISION)


def test_a_head_of_its_own_does_not_hinder_the_fit() -> None:
    assert mapped(["model.a", "model.b", "head"], ["a", "b"]) == ["a", "b", "head"]
    assert mapped(["a", "b", "head"], ["model.a", "model.b", "other"]) == ["model.a", "model.b", "model.head"]


def test_names_that_fit_as_they_are_stay() -> None:
    assert mapped(["a.w"], ["a.w", "model.a.w"]) == ["a.w"]


def test_names_of_another_architecture_stay() -> None:
    assert mapped(["model.x", "model.y"], ["a", "b"]) == ["model.x", "model.y"]


def test_none_leaves_names_and_a_function_is_obeyed() -> None:
    assert map_names(["module.a"], "none", ["a"], "x") == {"module.a": "module.a"}
    assert map_names(["p.a", "p.b"], lambda name: name[2:], None, "x") == {"p.a": "a", "p.b": "b"}


def test_two_names_never_become_one() -> None:
    with pytest.raises(ValueError, match=r"expert x: 'a.w' and 'b.w' both become 'w' by key_map"):
        map_names(["a.w", "b.w"], lambda name: name[2:], None, "expert x")
    assert mapped(["model.a", "a", "model.b"], ["a", "b"]) == ["model.a", "a", "model.b"]


def test_an_unknown_key_map_is_refused() -> None:
    with pytest.raises(ValueError, match="key_map must be 'auto', 'none' or a function from a name to a name, got 'au"):
        map_names(["a"], "automatic", None, "x")  # type: ignore[arg-type]
