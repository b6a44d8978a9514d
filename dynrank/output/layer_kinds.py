"""The kind of a layer: one name for the layers at the same position of each block."""

import re
from collections import Counter
from collections.abc import Iterable


def layer_kinds(names: Iterable[str]) -> dict[str, str]:
    """{layer: its kind}: the part of its name after the last number, or the whole name with * for its numbers.

    The whole name is used if the part alone would give layers at different positions the same kind.

    >>> layer_kinds(["h.0.attn.q", "h.1.attn.q", "head"])
    {'h.0.attn.q': 'attn.q', 'h.1.attn.q': 'attn.q', 'head': 'head'}
    >>> layer_kinds(["encoder.0.q", "decoder.0.q"])
    {'encoder.0.q': 'encoder.*.q', 'decoder.0.q': 'decoder.*.q'}
    >>> layer_kinds(["lora_unet_blocks_0_to_q"])
    {'lora_unet_blocks_0_to_q': 'to_q'}
    """
    whole = {name: re.sub(r"(?<=[._])\d+(?=[._])", "*", name) for name in names}
    tails = {kind: re.sub(r".*\*[._]", "", kind) for kind in whole.values()}
    counts = Counter(tails.values())
    return {name: tails[kind] if counts[tails[kind]] == 1 else kind for name, kind in whole.items()}
