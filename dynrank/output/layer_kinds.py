"""One name for layers that stand at the same place of each block."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def layer_kinds(names: Iterable[str]) -> dict[str, str]:
    """{layer: its kind}, which is what follows the last number in its name, or the whole name without its numbers.

    The second is taken where the first would put layers from different places under one name.

    >>> layer_kinds(["h.0.attn.q", "h.1.attn.q", "head"])
    {'h.0.attn.q': 'attn.q', 'h.1.attn.q': 'attn.q', 'head': 'head'}
    >>> layer_kinds(["encoder.0.q", "decoder.0.q"])
    {'encoder.0.q': 'encoder.*.q', 'decoder.0.q': 'decoder.*.q'}
    >>> layer_kinds(["lora_unet_blocks_0_to_q"])
    {'lora_unet_blocks_0_to_q': 'to_q'}
    """
    whole = {name: re.sub(r"(?<=[._])\d+(?=[._])", "*", name) for name in names}
    tails = {kind: re.sub(r".*\*[._]", "", kind) for kind in whole.values()}
    bearers = Counter(tails.values())
    return {name: tails[kind] if bearers[tails[kind]] == 1 else kind for name, kind in whole.items()}
