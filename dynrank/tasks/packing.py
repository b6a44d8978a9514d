"""Several examples in one row, without attention between them: their positions, and a check of the model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError


def positions(lengths: Iterable[int]) -> Tensor:
    """0, 1, ... for each example of a row."""
    return torch.cat([torch.arange(length) for length in lengths])


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse a model in which an example attends to another example of its row; two forwards test this.

    In transformers, positions that start again mark a new example, but not every model's attention uses that.
    """
    tokens = torch.arange(1, 9, device=next(model.parameters()).device)
    # The two rows have only their second example in common.
    rows = torch.stack([tokens, torch.cat([tokens[4:], tokens[4:]])])
    training, places = model.training, positions([4, 4]).to(tokens.device).expand(2, 8)
    try:
        first, second = model.eval()(input_ids=rows, position_ids=places, use_cache=False).logits[:, 4:].float()
    # This error means that the model takes no position_ids.
    except TypeError:
        first, second = tokens[:1], tokens[1:2]
    finally:
        model.train(training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        config: Any = model.config
        raise ConfigurationError(
            f"{type(model).__name__} with model.attention={config._attn_implementation} attends to the other "
            "examples of a packed row; set task.packed=false"
        )
