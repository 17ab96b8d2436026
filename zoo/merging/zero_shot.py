"""CLIP's zero-shot heads: class embeddings from the pre-trained text tower, averaged over prompt templates."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.common.pretrained import load_pretrained, transformers_library
from zoo.merging.heads import CosineHead, load_heads, save_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# The part of a CLIP model that text features depend on.
_TEXT_SIDE = ("text_model.", "text_projection.", "logit_scale")
# Part of the cache's key: a change of how heads are computed must not find the old ones.
_CACHE_VERSION = 1


def zero_shot_heads(
    clip: nn.Module | str | Path,
    tokenizer: Callable[..., Any] | str | Path | None = None,
    *,
    class_names: Mapping[str, Sequence[str]],
    templates: Mapping[str, Sequence[str]],
    batch_size: int = 256,
    cache_dir: str | Path | None = None,
) -> dict[str, CosineHead]:
    """One frozen head a task; tasks with the same prompts get the same head.

    Row c of W is normalise(mean over templates of normalise(text feature)), and the scale is exp(logit_scale).

    Args:
        clip: The pre-trained CLIP model: a module with `get_text_features` and `logit_scale`, a folder or a hub id.
        tokenizer: The model's tokenizer (prompts -> `input_ids`, lists of numbers), a folder or a hub id; None for the
            one that belongs to `clip`'s folder or hub id.
        class_names: Task -> names of its classes, in the order of its labels.
        templates: Task -> prompts with "{}" where the name goes.
        batch_size: Prompts in one pass through the text tower.
        cache_dir: Where heads are kept, one safetensors file for a set of prompts; in the user's cache by default. A
            file is used again for the same tokens and the same text weights only.

    Returns:
        Task -> `CosineHead` with weight `(C, d)` in float32 on the CPU.

    Raises:
        FileNotFoundError: If the model or tokenizer cannot be had.
        ValueError: If the tasks of names and templates differ, one of them has none, a template lacks "{}", or a prompt
            is too long for the text tower.
    """
    _check(class_names, templates)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if tokenizer is None:
        if isinstance(clip, nn.Module):
            raise ValueError("tokenizer=None goes with a folder or hub id; with a model in memory, pass its tokenizer")
        tokenizer = clip
    if isinstance(tokenizer, str | Path):
        tokenizer = cast("Callable[..., Any]", load_pretrained(tokenizer, transformers_library().AutoTokenizer))
    model = clip if isinstance(clip, nn.Module) else load_pretrained(clip, transformers_library().CLIPModel)
    folder = Path(cache_dir).expanduser() if cache_dir is not None else _default_cache()
    fingerprint = _fingerprint(model)
    heads: dict[str, CosineHead] = {}
    known: dict[str, CosineHead] = {}
    for task, names in class_names.items():
        prompts = [template.replace("{}", name) for name in names for template in templates[task]]
        tokens = _tokenise(tokenizer, prompts, model, task)
        key = hashlib.sha256(f"{_CACHE_VERSION} {fingerprint} {len(names)} {tokens}".encode()).hexdigest()[:32]
        if key not in known:
            known[key] = _cached(folder / f"{key}.safetensors", model, tokens, len(names), batch_size)
        # A module for each task: what is done to one of them later must not reach another.
        heads[task] = CosineHead(known[key].weight, known[key].scale)
    return heads


def _check(class_names: Mapping[str, Sequence[str]], templates: Mapping[str, Sequence[str]]) -> None:
    if not class_names or set(class_names) != set(templates):
        raise ValueError(
            f"class_names and templates must have the same tasks, and at least one: class_names has "
            f"{', '.join(class_names) or 'none'}; templates has {', '.join(templates) or 'none'}"
        )
    for task, names in class_names.items():
        for what, texts in (("class_names", names), ("templates", templates[task])):
            if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"{what}[{task!r}] must be a list of texts that are not empty, got {texts!r}")
        lacking = [template for template in templates[task] if "{}" not in template]
        if lacking:
            raise ValueError(f"templates[{task!r}]: {lacking[0]!r} has no {{}} where the class name goes")
        repeated = sorted({name for name in names if list(names).count(name) > 1})
        if repeated:
            warnings.warn(
                f"class_names[{task!r}] repeats {', '.join(repeated[:10])}: such classes get equal logits, and only "
                "the first of them can be predicted",
                stacklevel=3,
            )


def _tokenise(tokenizer: Callable[..., Any], prompts: list[str], model: nn.Module, task: str) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(prompts)["input_ids"]
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    longest = getattr(text_config, "max_position_embeddings", None)
    for prompt, ids in zip(prompts, tokens, strict=True):
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"the prompt {prompt!r} of task {task!r} has {len(ids)} tokens, the text tower takes {longest}: "
                "shorten the class name or the template"
            )
    return tokens


def _cached(path: Path, model: Any, tokens: list[list[int]], num_classes: int, batch_size: int) -> CosineHead:
    if path.is_file():
        return cast("CosineHead", load_heads(path)["head"])
    features = _embed(model, tokens, batch_size)
    weight = F.normalize(features.view(num_classes, -1, features.shape[1]).mean(1), dim=-1)
    head = CosineHead(weight.cpu(), float(model.logit_scale.detach().double().exp()))
    try:
        save_heads(path, {"head": head})
    except OSError as error:
        warnings.warn(f"zero-shot heads are not kept for the next run: {error}; set cache_dir", stacklevel=3)
    return head


@torch.no_grad()
def _embed(model: Any, tokens: list[list[int]], batch_size: int) -> Tensor:
    """Text features `(prompts, d)` of unit length, in float32."""
    device = model.logit_scale.device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # Prompts of one length side by side need the least padding.
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    parts = []
    try:
        for start in range(0, len(order), batch_size):
            rows = [tokens[row] for row in order[start : start + batch_size]]
            length = len(rows[-1])
            # CLIP reads the feature at the first end token: padding with the last token is right with any tokenizer.
            ids = torch.tensor([row + row[-1:] * (length - len(row)) for row in rows], device=device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = (torch.arange(length, device=device) < lengths[:, None]).long()
            output = model.get_text_features(input_ids=ids, attention_mask=mask)
            features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
            parts.append(F.normalize(features.float(), dim=-1))
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(parts)[torch.tensor(order, device=device).argsort()]


def _fingerprint(model: nn.Module) -> str:
    """A hash of what text features depend on: the text side's weights and config."""
    digest = hashlib.sha256()
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    settings = {} if text_config is None else dict(text_config.to_dict())
    for name in ("transformers_version", "_name_or_path"):
        settings.pop(name, None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    state = model.state_dict()
    # Of a network that is laid out differently, all weights count.
    prefixes = _TEXT_SIDE if any(name.startswith("text_model.") for name in state) else ("",)
    for name in sorted(name for name in state if name.startswith(prefixes)):
        tensor = state[name].detach().cpu().contiguous().view(-1)
        digest.update(f"{name} {tensor.dtype} {len(tensor)}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lightning-method-zoo" / "zero_shot_heads"
