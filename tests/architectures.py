"""Tiny models of every causal architecture that transformers has, built from their default settings made small.

As a script, `python tests/architectures.py docs/architectures.md` writes the page of what was found of each.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from retrograd.core.engine import Double
from retrograd.data.rows import Rows, pad
from retrograd.lm.chain import decoder_chain
from retrograd.lm.layout import Form, twice_differentiable
from retrograd.lm.model import causal_objective, trainable
from retrograd.lm.proof import form_of

VOCABULARY = 40
LARGE = 2_000_000  # parameters of what is not tiny any more
DOZEN = ("llama", "gpt2", "gemma3_text", "mixtral", "nanochat", "cohere", "lfm2", "mamba", "qwen3_next", "bart", "phi3",
         "falcon")  # fmt: skip

# what a setting becomes, by the first of these that is the whole of its name
_SMALL: dict[str, Any] = {
    r"vocab_size(_per_layer_input)?|byte_vocab_size|tgt_vocab_size|\w*_vocab_size|n_words|vocabulary_size": VOCABULARY,
    r"bos_token_id|decoder_start_token_id": 1,
    r"eos_token_id": 0,
    r"pad_token_id": 2,
    r"\w+_token_id|\w+_token_index": 3,
    r"hidden_size|d_model|n_embd|d_embed|embed_dim|embedding_size|embedding_dim|emb_dim|word_embed_proj_dim|lru_width": 32,
    r"dim_model|attention_size": 32,
    r"hidden_size_per_layer_input|\w*lora_(rank|dim)|\w+_lora_rank": 8,
    r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|ffn_inner_dim|intermediate_size_mlp)": 32,
    r"n_inner|d_ff|dff|dim_ff|feed_forward_size": 32,
    r"num_attention_heads|n_heads?|num_heads|\w+_attention_heads|\w+_num_heads|num_attention_heads_\w+": 4,
    r"num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads|num_global_key_value_heads|swa_num_key_value_heads": 2,
    r"qk_head_dim": 16,
    r"(\w+_)?head_dim|attention_head_size|kv_channels|dim_head|d_head": 8,
    r"rotary_dim": 4,
    r"max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|model_max_length|max_\w+_positions": 64,
    r"\w*window(_size|_len)?|local_attention|attention_chunk_size|index_topk": 6,
    r"index_n_heads": 2,
    r"\w*chunk_length|block_size|\w*chunk_size": 8,
    r"\w*experts": 4,
    r"num_experts_per_tok(en)?|\w*top_?k|num_selected_experts|moe_k": 2,
    r"(n|num)_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group|num_limited_groups": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"(mamba_)?(n_heads|num_heads)|mamba_n_heads|n_mamba_heads|num_mamba_heads": 4,
    r"mamba_d_head|mamba_head_dim": 16,
    r"mamba_d_state|state_size|ssm_state_size": 8,
    r"mamba_d_ssm": 64,
    r"mamba_n_groups|n_groups|mamba_ngroups": 1,
    r"mamba_dt_rank|time_step_rank": 4,
    r"linear_num_\w+_heads": 2,
    r"image_size": 28,
    r"patch_size": 14,
}
_LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|\w+_layers|num_blocks")
_KEPT = re.compile(
    r"\w*shared_layers|max_window_layers|num_nextn_predict_layers|\w*mtp\w*|no_rope_layers|dual_chunk\w*|"
    r"chunk_size_feed_forward|chunk_size_lm_head"
)
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_HYBRID = ["conv", "full_attention"]
# what some need besides
_EXTRA: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": _HYBRID, "num_hidden_layers": 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _HYBRID, "num_hidden_layers": 2}, "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "ministral": {"head_dim": 8},
    "dots3_note_text": {"num_key_value_heads": 4}, "zaya": {"num_experts_per_tok": 1}, "nemotron": {"num_key_value_heads": 2},
    "xlm": {"n_heads": 4, "causal": True},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1}, "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 40},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
}  # fmt: skip


class Found(NamedTuple):
    """What was found of an architecture. error: the largest difference of a loss, relative. reason: of a refusal."""

    kind: str
    form: Form | None = None
    blocks: bool = False
    double: bool = False
    error: float = 0.0
    reason: str = ""


def kinds() -> list[str]:
    """All model types with a causal class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _small(settings: dict[str, Any]) -> dict[str, Any]:
    """What of the settings has to be other for a tiny model; nested settings too."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name.endswith("_config"):
            found[name] = {**{k: v for k, v in value.items() if k == "model_type"}, **_small(value)}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and not _KEPT.fullmatch(name):
            fits = [2] if _LAYERS.fullmatch(name) else [v for key, v in _SMALL.items() if re.fullmatch(key, name)]
            found.update({name: fits[0]} if fits else {})
    count = next((settings[n] for n in _COUNTS if isinstance(settings.get(n), int)), None)
    each = {
        n: list({str(x): x for x in v}.values()) for n, v in settings.items() if isinstance(v, list) and len(v) == count
    }
    heads = settings.get("num_attention_heads")
    if heads is not None and settings.get("num_key_value_heads") == heads:
        found["num_key_value_heads"] = found["num_attention_heads"]
    layers = max([2, *map(len, each.values())])  # one of each kind
    for name, values in each.items():
        less = [32 if type(x) is int and x > 32 else x for x in values]
        found[name] = (less * layers)[:layers]
    return {**found, **{n: layers for n in _COUNTS if n in found and each}}


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A causal model of a model type, with weights as large as a trained one's, in float32."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[kind]
    config = made(**{**_small(made().to_dict()), **_EXTRA.get(kind, {})})
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if (size := sum(p.numel() for p in whole.parameters())) > LARGE:
        raise ValueError(f"{kind} has {size} parameters and is not tiny")
    torch.manual_seed(seed)
    try:
        module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except (ValueError, ImportError):
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return module.eval()


def held(module: Any, lengths: list[list[int]]) -> float:
    """|objective − Σ losses of the documents by the module's own forward pass, each alone|, relative."""
    draw = torch.Generator().manual_seed(7)
    rows = [[torch.randint(4, 30, (n,), generator=draw) for n in row] for row in lengths]
    masks = [[(torch.arange(len(d)) > 0) for d in row] for row in rows]
    owners = [[torch.full((len(d),), 10 * i + k) for k, d in enumerate(row)] for i, row in enumerate(rows)]
    packed = any(len(row) > 1 for row in lengths)
    inputs = pad(Rows(*_arrays(rows, masks, owners), 100, {}, packed=packed), range(len(rows)))  # type: ignore[arg-type]
    with torch.no_grad(), twice_differentiable(torch.float32):
        found = causal_objective(module)[0](trainable(module)[0], inputs, inputs["target_mask"].float())
        own = [F.cross_entropy(module(input_ids=d[None], use_cache=False).logits[0, :-1], d[1:], reduction="sum")
               for row in rows for d in row]  # fmt: skip
    return float((found - torch.stack(own).sum()).abs() / torch.stack(own).sum())


def _arrays(*columns: list[list[Tensor]]) -> list[list[Any]]:
    return [[torch.cat(parts).numpy() for parts in column] for column in columns]


def examine(kind: str) -> Found:
    """What there is to say of an architecture.

    Raises:
        AssertionError: If an objective was given out that is not the module's.
    """
    try:
        module = tiny_model(kind)
    except Exception as error:  # whatever their settings do not like
        return Found(kind, reason=f"not tried, for it does not build tiny: {_line(error)}")
    try:
        form = form_of(module)
    except ValueError as error:
        return Found(kind, reason=_line(error))
    worst = max(held(module, [[12], [5], [9]]), held(module, [[5, 7], [4, 3, 2]]), held(module, [[20], [11]]))
    assert worst < 1e-3, f"{kind}: an objective that is not the model's, {worst:.2g} off, {form}"
    try:
        decoder_chain(module)
        return Found(kind, form, True, True, worst)
    except Exception:  # nothing to say but no
        return Found(kind, form, False, _twice(module), worst)


def _twice(module: Any) -> bool:
    """Whether `double` can differentiate it."""
    from retrograd.core.step import Batch

    params = trainable(module)[0]
    ids = torch.arange(4, 16).view(2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    batch = Batch({"input_ids": ids, "target_mask": mask}, torch.arange(12).view(2, 6), mask / 10.0)
    try:
        grads, pull = Double(causal_objective(module)[0]).linearize(params, [batch], torch.ones(12), None)
        pull({n: x[None] for n, x in grads.items()})
    except Exception:
        return False
    return True


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) < 240 else text[:239] + "…").replace("|", "/") or type(error).__name__


def page(found: list[Found]) -> str:
    """docs/architectures.md."""
    import transformers

    def row(one: Found) -> str:
        if one.form is None:
            return f"| {one.kind} | {one.reason} | | | | |"
        rows = "joined" if one.form.joins else "padded" if one.form.batches else "one by one"
        engines = ["no", "yes"]
        return (
            f"| {one.kind} | {rows} | {'masked' if one.form.masks else 'taken apart'} | {engines[one.form.fused]} | "
            f"{engines[one.double]} | {engines[one.blocks]} |"
        )

    taken = [one for one in found if one.form]
    heads = "| type | rows | packed rows | fused head | `double` | `blocks` |\n|---|---|---|---|---|---|"
    return f"""# Architectures

Every model type with a causal class in transformers {transformers.__version__}, built tiny from its default settings and
held against its own plain forward pass, one document at a time (`python tests/architectures.py docs/architectures.md`,
which the slow tests do too). {len(taken)} of {len(found)} are taken. What is taken has the losses of the module itself, row
by row and packed; what is not is refused when it is loaded, with the reason. Settings other than the default ones may
enter in another way: what counts is what is found when a model is loaded.

* **rows**: *joined* to one row without padding; *padded* on the right; or *one by one*, where the loss of a row changes
  with the rows beside it.
* **packed rows**: *masked* by document; or *taken apart*, the documents as rows of their own.
* **fused head**: the vocabulary head is a bare linear layer; others (soft caps, scales) are called as they are.
* **`double`**, **`blocks`**: the engines that can differentiate it twice, tried in float32.

{heads}
{chr(10).join(map(row, taken))}

Refused, or not tried:

| type | reason |
|---|---|
{chr(10).join(f"| {one.kind} | {one.reason} |" for one in found if one.form is None)}
"""


if __name__ == "__main__":
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    results, wrong = [], []
    for name in kinds():
        try:
            results.append(examine(name))
            print(*results[-1], flush=True)
        except AssertionError as error:
            wrong.append(str(error))
            print(error, flush=True)
    if wrong:
        sys.exit("\n".join(wrong))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page(results), encoding="utf8")
