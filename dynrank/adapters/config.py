"""PEFT's ``adapter_config.json``, read with every value checked."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dynrank.errors import Count
from dynrank.layers.lora_layer import initial_scaling
from dynrank.layers.peft_layers import HARMLESS_INIT
from dynrank.patterns import EXPRESSION_ERRORS, first_matches, whole_parts

# Close to the largest number in float32.
_LARGEST = 3.4e38


def _unset(value: Any) -> Any:
    if value:
        raise ValueError(f"must be unset, got {value!r:.100}")
    return value


def _harmless(init: Any) -> Any:
    if init is not None and init not in HARMLESS_INIT:
        raise ValueError(f"must not change the base weight, got {init!r:.100}; convert the adapter with PEFT")
    return init


def _expressions(found: Any) -> Any:
    """A pattern, or targets, after a check of its expressions; a list of targets has names."""
    for text in [found] if isinstance(found, str) else [*found] if isinstance(found, dict) else []:
        try:
            whole_parts(text)
        except EXPRESSION_ERRORS as error:
            raise ValueError(f"has {text!r:.100}, which is not a regular expression: {error}") from None
    return found


Unset = Annotated[Any, AfterValidator(_unset)]
Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]
# The rank of a layer, its alpha, and the factor of ``lora_B @ lora_A`` in its update.
LayerSettings = tuple[int, float, float]


class AdapterConfig(BaseModel):
    """The settings of a PEFT LoRA adapter that dynrank reads; other settings are kept unchanged."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    task_type: Any = None
    base_model_name_or_path: Any = None
    revision: str | None = None
    auto_mapping: Any = None
    target_modules: Annotated[str | list[str] | None, AfterValidator(_expressions)] = None
    r: Count
    lora_alpha: Number
    rank_pattern: Annotated[dict[str, Count] | None, AfterValidator(_expressions)] = None
    alpha_pattern: Annotated[dict[str, Number] | None, AfterValidator(_expressions)] = None
    use_rslora: bool | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: Any = None
    target_parameters: list[str] | None = None
    init_lora_weights: Annotated[Any, AfterValidator(_harmless)] = None
    bias: Literal["none"] = "none"
    # Variants whose formula is not y = W x + s B A x are refused.
    use_dora: Unset = None
    use_qalora: Unset = None
    use_bdlora: Unset = None
    lora_bias: Unset = None
    alora_invocation_tokens: Unset = None
    arrow_config: Unset = None
    kasa_config: Unset = None
    megatron_config: Unset = None
    monteclora_config: Unset = None
    layer_replication: Unset = None
    trainable_token_indices: Unset = None

    def of_layers(self, names: Iterable[str]) -> dict[str, LayerSettings]:
        """{layer: (rank, alpha, scaling)} by PEFT's rules: the first key that matches, otherwise r and lora_alpha."""
        names = [*names]
        ranks = first_matches(self.rank_pattern or {}, names)
        alphas = first_matches(self.alpha_pattern or {}, names)
        found = {}
        for name in names:
            rank = ranks.get(name, self.r)
            alpha = alphas.get(name, self.lora_alpha)
            found[name] = rank, alpha, initial_scaling(alpha, rank, bool(self.use_rslora))
        return found
