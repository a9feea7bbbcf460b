"""A causal language model from its checkpoint, whole: a weight that is not in the checkpoint is no weight of the model.

`from_pretrained` fills what a checkpoint lacks with random numbers and goes on. Here that is refused, by name: scores
of such a model would be those of no model that anybody has.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from retrograd.lm.adapters import Adapter, adapted, base_of, check_adapter

__all__ = ["DTYPES", "load_module", "model_width", "read_config", "refuse_no_folder", "told"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

_COMPOSITE = "ForConditionalGeneration"  # text beside images or sound: AutoModelForCausalLM loads the part for text
_LEFT = "model"  # where a run leaves its model
_NAMED = 5  # weights named in a message


def load_module(name: str, dtype: torch.dtype, adapter: Adapter | None = "merge") -> Any:
    """The module of a hub name or local folder, with every weight from the checkpoint.

    Attention is SDPA where the architecture has it, else its own ("eager").

    Args:
        adapter: What to make of a folder of adapters: merge them into their base, or leave them there to be trained
            ("continue"). None: whoever calls has to say which.
    Raises:
        ValueError: If it cannot be loaded, is no causal language model, or the checkpoint lacks weights.
    """
    base = check_adapter(name, adapter)
    if base is None:
        return _load_whole(name, dtype)
    assert adapter is not None, "checked"
    return adapted(name, _load_whole(base, dtype), adapter)


def _load_whole(name: str, dtype: torch.dtype) -> Any:
    import transformers
    from transformers.utils import logging

    _check_causal(name)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    logging.disable_progress_bar()  # loading is short; the bar would only break up the run's own
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights, which are refused below
    try:
        # attention None: part by part, SDPA where there is one
        module, report = load(
            name, dtype=dtype, attn_implementation=None, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ValueError(f"cannot load model {name!r}. {told(error)}") from error
    finally:
        logging.set_verbosity(level)
    _check_whole(name, report)
    return module


def _check_whole(name: str, report: dict[str, Any]) -> None:
    """Refuse weights that would be random; tell of those that would go unused."""
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    sizes = [f"{key} ({list(saved)}, not {list(wanted)})" for key, saved, wanted in sorted(report["mismatched_keys"])]
    if missing:
        near = f" It has {len(extra)} that the model does not know instead: {_some(extra)}." if extra else ""
        raise ValueError(
            f"the checkpoint of model {name!r} lacks {len(missing)} of its weights, which would be random numbers: "
            f"{_some(missing)}.{near} Save the model again from where it was whole (a compiled or wrapped module saves "
            "other names: unwrap it before save_pretrained), or correct config.json to what was saved."
        )
    if sizes:
        raise ValueError(
            f"{len(sizes)} weights in the checkpoint of model {name!r} have other shapes than config.json says, and "
            f"would be random numbers: {_some(sizes)}. Correct config.json, or save model and configuration together."
        )
    if extra:
        warnings.warn(
            f"the checkpoint of model {name!r} holds {len(extra)} weights that the model does not use: {_some(extra)}. "
            "Right for the parts of another task; wrong if config.json says fewer layers than were saved.",
            stacklevel=4,
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def model_width(name: str) -> int:
    """The size of the hidden states of a model, by its configuration alone.

    Raises:
        ValueError: If there is none.
    """
    return int(read_config(name).get_text_config(decoder=True).hidden_size)


def refuse_no_folder(name: str, what: str) -> None:
    """Refuse a name that can only be meant as a local folder and is none, before a hub is asked for it; and the folder
    of a run, whose model is in it.

    Raises:
        ValueError: With the part of the path that does exist.
    """
    path = Path(name)
    if not (path / "config.json").is_file() and (path / _LEFT / "config.json").is_file():
        raise ValueError(
            f"cannot load {what} {name!r}: it is the folder of a run, which left its model in {path / _LEFT}"
        )
    if (name.startswith((".", "/", "~")) or len(path.parts) > 2) and not path.is_dir():
        there = next(folder for folder in path.absolute().parents if folder.exists())
        why = "is a file" if path.exists() else f"does not exist; {there} does"
        raise ValueError(
            f"cannot load {what} {name!r}: the folder {why}. Give a folder, or a hub name such as org/name"
        )


def read_config(name: str) -> Any:
    """The configuration of a model by hub name or local folder; of a folder of adapters, its base's.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoConfig

    name = base_of(name) or name
    refuse_no_folder(name, "model")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot load model {name!r}: check the spelling and the network, or give a local folder saved with "
            f"save_pretrained. {told(error)}"
        ) from error


def _check_causal(name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(name)
    architectures = getattr(config, "architectures", None) or []
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal = set(_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    fits = not architectures or any(kind in causal or kind.endswith(_COMPOSITE) for kind in architectures)
    if not known or not fits or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model {name!r} is not a causal language model: its type is {config.model_type!r}, its architecture "
            f"{', '.join(architectures) or 'not named'}. Give one that predicts the next token, such as a "
            "...ForCausalLM."
        )


def _names(values: Collection[Any]) -> list[str]:
    return [name for value in values for name in ([value] if isinstance(value, str) else value)]


def told(error: BaseException) -> str:
    """An error's kind and first line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
