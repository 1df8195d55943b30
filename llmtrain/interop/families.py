"""Which Hugging Face model types there are, and how each spells a model.

Invariant: nothing in a ``config.json`` is passed over in silence. A field is translated, or listed
here as without effect on the model, or one sentence refuses it by name.

    family, model = read_config({"model_type": "llama", ...})
    write_config(model, family)        # the fields again
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtrain.config.model import ModelConfig
from llmtrain.config.strict import build, show
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.interop.rotary import read_rope, write_rope


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One Hugging Face model type: what it fixes, and what it calls the rest."""

    model_type: str
    """``model_type`` of its configs."""
    architecture: str
    """``architectures`` of its configs."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a field means that its config leaves out, where it differs from ``DEFAULTS``."""
    attention_bias: bool | None = None
    """Whether queries, keys and values have biases; None where ``attention_bias`` says."""
    output_bias: bool = False
    """Whether a biased attention has a bias on its output too."""
    qk_norm: bool = False
    """Whether queries and keys are normalised."""
    post_norms: bool = False
    """Whether what a block's parts give is normalised."""
    window: str | None = None
    """How a sliding window is spelled: ``plain``, ``switched`` (use_sliding_window), or not."""
    partial_rotary: bool = False
    """Whether part of a head may stay unturned; its turned dims then stand in adjacent pairs."""
    fused: bool = False
    """Whether gate and up are one matrix."""
    whole_heads: bool = False
    """Whether transformers wants num_attention_heads to divide hidden_size."""

    def lacks(self, model: ModelConfig) -> list[str]:
        """Name the fields of ``model`` that this type has no word for."""
        biased = model.attention_bias
        wrong = {
            "attn_logit_softcapping": model.attn_logit_softcapping is not None,
            "qk_norm": model.qk_norm != self.qk_norm,
            "post_norms": model.post_norms != self.post_norms,
            "attention_bias": self.attention_bias not in (None, biased),
            "attention_output_bias": model.attention_output_bias != (biased and self.output_bias),
            "sliding_window": model.sliding_window is not None and self.window is None,
            "partial_rotary_factor": model.partial_rotary_factor != 1 and not self.partial_rotary,
            "hidden_size": self.whole_heads and model.hidden_size % model.num_attention_heads != 0,
        }
        return [f"model.{name}={show(getattr(model, name))}" for name, bad in wrong.items() if bad]


_GLM: Mapping[str, Any] = {
    "head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-07, "max_position_embeddings": 131072, "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="llama", architecture="LlamaForCausalLM", output_bias=True, whole_heads=True,
        defaults={"max_position_embeddings": 2048},
    ),
    Family(
        model_type="mistral", architecture="MistralForCausalLM", attention_bias=False,
        window="plain", defaults={
            "sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8,
        },
    ),
    Family(
        model_type="qwen2", architecture="Qwen2ForCausalLM", attention_bias=True,
        window="switched", defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", output_bias=True, qk_norm=True,
        window="switched", defaults={
            "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
        },
    ),
    Family(
        model_type="glm", architecture="GlmForCausalLM", partial_rotary=True, fused=True,
        defaults=_GLM,
    ),
    Family(
        model_type="glm4", architecture="Glm4ForCausalLM", partial_rotary=True, fused=True,
        post_norms=True, defaults=_GLM,
    ),
)  # fmt: skip
"""In the order in which they are tried for a model that was not imported."""

DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "initializer_range": 0.02, "attention_bias": False,
}  # fmt: skip
"""What most types mean by a field that is left out."""
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "initializer_range",
)  # fmt: skip
"""Fields that have the same name and meaning on both sides."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Ids that transformers fills in with some model's own where a config leaves them out."""
KEPT = (*SPECIAL_IDS, "use_cache")
"""Fields without effect on the model that an export gives back."""
WITHOUT_EFFECT = frozenset({
    *KEPT, "model_type", "architectures", "transformers_version", "torch_dtype", "dtype",
    "_name_or_path", "pretraining_tp", "return_dict", "output_hidden_states", "output_attentions",
    "tokenizer_class", "is_decoder", "id2label", "label2id", "problem_type", "unsloth_version",
    "chunk_size_feed_forward", "_attn_implementation_autoset", "keys_to_ignore_at_inference",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "bad_words_ids",
})  # fmt: skip
"""Fields that change no logit: names, saved types, defaults of generation."""
FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_dropout": (0.0, None), "mlp_bias": (False,),
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "use_mrope": (False,),
    "tie_encoder_decoder": (False,), "torchscript": (False,),
}  # fmt: skip
"""Fields with an effect, and the values whose effect is that of our model."""


def family_of(model_type: object) -> Family:
    """Find a model type.

    Raises:
        CheckpointError: it is none of ours.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise CheckpointError(
        f"config.json has model_type={show(model_type)}, known are {known}; "
        "use a checkpoint of one of these"
    )


def read_config(raw: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """Translate a ``config.json``.

    Raises:
        CheckpointError: an unknown model type.
        ConfigError: every field that our model cannot follow, and sizes that do not fit together.
    """
    family = family_of(raw.get("model_type"))
    values = {**DEFAULTS, **family.defaults, **raw}
    problems: list[str] = []
    tree = _plain_fields(family, values)
    window, used = _read_window(family, values, problems)
    rope, of_rope = read_rope(values, problems)
    tree |= {"sliding_window": window, **rope}
    if tree["partial_rotary_factor"] != 1 and not family.partial_rotary:
        problems.append(
            f"config.json has partial_rotary_factor={tree['partial_rotary_factor']}, which "
            f"model_type={family.model_type} does not have; take it out"
        )
    used |= of_rope | set(SIZES)
    if family.attention_bias is None:
        used |= {"attention_bias"}
    problems += _unknown(raw, used, family)
    try:
        model = build(ModelConfig, tree, "model")
    except ConfigError as error:
        problems += [f"config.json: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return family, model


def _plain_fields(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate sizes and switches."""
    tree: dict[str, Any] = {name: values[name] for name in SIZES if name in values}
    if tree["num_key_value_heads"] is None:
        tree["num_key_value_heads"] = tree.get("num_attention_heads")
    if tree["head_dim"] is None and values.get("num_attention_heads"):
        tree["head_dim"] = values.get("hidden_size", 0) // values["num_attention_heads"]
    fixed = family.attention_bias
    biased = bool(values["attention_bias"]) if fixed is None else fixed
    return tree | {
        "attention_bias": biased, "attention_output_bias": biased and family.output_bias,
        "qk_norm": family.qk_norm, "post_norms": family.post_norms,
    }  # fmt: skip


def _unknown(raw: Mapping[str, Any], used: set[str], family: Family) -> list[str]:
    """A sentence for every field that is neither translated nor without effect."""
    problems = []
    for name in sorted(raw.keys() - used - WITHOUT_EFFECT):
        value, fixed = raw[name], FIXED.get(name)
        if name == "attention_bias":
            fixed = (family.attention_bias,)
        if value is None or (fixed is not None and value in fixed):
            continue
        if fixed is None:
            problems.append(
                f"config.json has {name}={show(value)}, a field this model has no part for; take "
                "it out if it changes nothing, or use another checkpoint"
            )
        else:
            problems.append(
                f"config.json has {name}={show(value)}, this model has {show(fixed[0])} only; "
                "use another checkpoint"
            )
    return problems


def _read_window(
    family: Family, values: Mapping[str, Any], problems: list[str]
) -> tuple[int | None, set[str]]:
    """Find the sliding window of all layers, and the fields that say it."""
    layers = values.get("num_hidden_layers", 0)
    window, used = values.get("sliding_window"), {"sliding_window", "layer_types"}
    kinds = values.get("layer_types")
    if family.window is None:
        window, used = None, {"layer_types"}
    elif family.window == "switched":
        used |= {"use_sliding_window", "max_window_layers"}
        window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
        if kinds is None:
            full = min(values.get("max_window_layers", 28), layers) if window else layers
            kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if "sliding_attention" not in kinds:
            window = None
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and set(kinds) != {expected}:
        problems.append(
            f"config.json has layers of different attention ({kinds.count(expected)} of {layers} "
            f"have {expected}, by layer_types or max_window_layers), model.sliding_window is one "
            "for all layers; use another checkpoint"
        )
    return window, used


def choose_family(model: ModelConfig, preferred: str | None = None) -> Family:
    """Find the model type that can spell ``model``, ``preferred`` if it can.

    Raises:
        ConfigError: none can; names the fields.
    """
    tried = sorted(FAMILIES, key=lambda family: family.model_type != preferred)
    lacking = {family.model_type: family.lacks(model) for family in tried}
    for family in tried:
        if not lacking[family.model_type]:
            return family
    name = min(lacking, key=lambda name: len(lacking[name]))
    raise ConfigError(
        f"no Hugging Face model type has {', '.join(lacking[name])} together with the rest of this "
        f"model ({name} comes nearest); such a model stays in our format"
    )


def write_config(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Spell ``model`` as ``family`` does, in fields that transformers 4 and 5 both read."""
    fields: dict[str, Any] = {
        "architectures": [family.architecture], "model_type": family.model_type,
        "hidden_act": "silu", "attention_dropout": 0.0,
        **dict.fromkeys(SPECIAL_IDS),
        **{name: getattr(model, name) for name in SIZES},
        "head_dim": model.head_size,
        **write_rope(model, partial=family.partial_rotary),
    }  # fmt: skip
    if family.attention_bias is None:
        fields["attention_bias"] = model.attention_bias
    if family.model_type == "llama":
        fields["mlp_bias"] = False
    if family.window is not None:
        fields["sliding_window"] = model.sliding_window
    if family.window == "switched":
        fields["use_sliding_window"] = model.sliding_window is not None
        fields["max_window_layers"] = 0 if model.sliding_window else model.num_hidden_layers
    return fields
