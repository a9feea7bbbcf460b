"""Folders of adapters as models: the base they name, with the adapters merged into it or trained further.

    merge       one model, W + s B A, and no adapters
    continue    the base frozen, the adapters as they are in the folder, and these alone are trained

Low-rank adapters (LoRA) only: others change what the model reads, and are not merged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Adapter", "adapted", "adapter_settings", "base_of", "check_adapter", "merged"]

Adapter = Literal["merge", "continue"]

_FILE = "adapter_config.json"


def base_of(name: str) -> str | None:
    """The base model that a folder of adapters names; None for what is no such folder.

    Raises:
        ValueError: If it names none, or its adapters are of another kind than LoRA.
    """
    path = Path(name).expanduser() / _FILE
    if not path.is_file() or (path.parent / "config.json").is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Save the adapters again.") from error
    base, kind = values.get("base_model_name_or_path"), values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{name} holds adapters of the kind {kind!r}; LORA alone can be merged or trained further")
    if not base:
        raise ValueError(f"{path} names no base_model_name_or_path: write there which model the adapters are for")
    return str(base)


def check_adapter(name: str, how: Adapter | None) -> str | None:
    """What `base_of` gives, where it is said what to make of it.

    Raises:
        ValueError: If it is a folder of adapters and nothing is said, or the adapters of none are to be continued.
    """
    base = base_of(name)
    if base is None and how == "continue":
        raise ValueError(f"--lora.adapter continue: model {name!r} is no folder of adapters; leave it out")
    if base is not None and how is None:
        raise ValueError(
            f"model {name!r} is a folder of adapters for {base}. Say what to make of them: --lora.adapter merge, into "
            "one model that is trained as the other settings say; or --lora.adapter continue, which trains them "
            "further and leaves the base as it is"
        )
    return base


def adapter_settings(name: str) -> Any:
    """The adapters' settings as peft has them, to be trained."""
    import peft

    config = peft.PeftConfig.from_pretrained(str(Path(name).expanduser()))
    config.inference_mode = False
    return config


def adapted(name: str, base: Any, how: Adapter) -> Any:
    """A base model with the adapters of a folder: merged, or in place and alone to train.

    Raises:
        ValueError: If the adapters are not those of this base, tensor by tensor.
    """
    import peft

    config = adapter_settings(name)
    saved = peft.load_peft_weights(str(Path(name).expanduser()), device="cpu")
    try:
        model = peft.get_peft_model(base, config)
        expected = peft.get_peft_model_state_dict(model)
        wrong = sorted(expected.keys() ^ saved.keys())
        wrong += [key for key in expected.keys() & saved.keys() if expected[key].shape != saved[key].shape]
    except ValueError as error:  # layers that the base does not have
        raise ValueError(f"the adapters in {name} do not fit their base model: {error}") from error
    if wrong:
        raise ValueError(
            f"the adapters in {name} do not fit their base model {config.base_model_name_or_path}: {len(wrong)} of "
            f"{len(saved)} tensors are missing, left over or of another shape, {wrong[0]} first. Name the right base "
            f"in {_FILE}, or save the adapters again"
        )
    peft.set_peft_model_state_dict(model, saved)
    return model if how == "continue" else merged(model.eval()).requires_grad_(True)


def merged(model: Any) -> Any:
    """A peft model as one without adapters, which computes the same up to rounding; consumes it.

    Raises:
        ValueError: If its logits move by more than that.
    """
    expected = _logits(model)
    _untie(model)
    whole = model.merge_and_unload()
    _check_merged(expected, _logits(whole))
    return whole


def _untie(adapted: Any) -> None:
    """Gives a weight that an adapter changes storage of its own, where it shares it with another."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    names = [p.untyped_storage().data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    changed = False
    for part in model.modules():
        weight = getattr(part.get_base_layer(), "weight", None) if isinstance(part, BaseTunerLayer) else None
        if weight is not None and names.count(weight.untyped_storage().data_ptr()) > 1:
            part.get_base_layer().weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            changed = True
    if changed:
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}  # what `transformers` leaves out when it saves


def _logits(model: Any) -> Tensor:
    """[8, 8, V], of tokens from all over the vocabulary."""
    table = model.get_input_embeddings().weight
    ids = torch.linspace(0, len(table) - 1, 64, device=table.device).long().view(8, 8)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _check_merged(expected: Tensor, logits: Tensor) -> None:
    near = min(1000 * torch.finfo(expected.dtype).eps, 0.05)
    off = float((logits.double() - expected.double()).norm() / expected.double().norm())
    if off > near:  # not finite in both: a diverged model is saved as such
        raise ValueError(
            f"the adapters cannot be merged into the model that was measured: its logits move by {off:.1e} of their "
            f"size, and rounding explains {near:.1e}. Choose other --lora.target_modules, or leave saving out."
        )
